"""Encodes every example once before the first step: a limit that some user exceeds ends no run in its middle."""

from collections.abc import Iterable, Mapping

import jax

from popi_jax import evaluate
from popi_jax.data.schema import Example
from popi_jax.system import SUMMARIZED, System


def check_examples(system: System, sources: Mapping[str, Iterable[Example]]) -> None:
    """Raises UserError for the first example of any split that config.limits or config.method cannot take."""
    config, encoder = system.config, system.encoder
    for split, source in sources.items():
        # An evaluation shows the raw signals to a reference, and counts what they would cost, whatever the method.
        shows_signals = split == "test" or config.objective.reference_context == "signals"
        for example in source:
            if shows_signals:
                encoder.raw_signals(example)
            if config.method in SUMMARIZED:  # A context of unknown text, but known length.
                encoder.signals(example)
                context, more = config.prompts.summary_start, config.limits.summary
            else:
                ((told,),) = evaluate.contexts(system, None, [example], jax.random.key(0))
                context, more = told.text, 0
            for query in example.queries:
                encoder.check(query, context, more)
