"""Encodes every example once before the first step: a limit that some user exceeds ends no run in its middle."""

from collections.abc import Iterable, Mapping

import jax

from popi_jax import evaluate, rollout
from popi_jax.data.schema import Example
from popi_jax.errors import UserError
from popi_jax.rollout import Item
from popi_jax.system import SUMMARIZED, System


def check_examples(system: System, sources: Mapping[str, Iterable[Example]]) -> None:
    """Raises UserError for the first example of any split that config.limits or config.method cannot take."""
    config = system.config
    for split, source in sources.items():
        # An evaluation shows the raw signals to a reference, and counts what they would cost, whatever the method.
        shows_signals = split == "test" or config.objective.reference_context == "signals"
        for example in source:
            if shows_signals:
                rollout.signals_context(system, example)
            if config.method in SUMMARIZED:
                rollout.encode_signals(system, example)
                _check_summarized(system, example)
            else:
                ((context,),) = evaluate.contexts(system, None, [example], jax.random.key(0))
                for query in example.queries:
                    rollout.encode_item(system, Item(query, context))


def _check_summarized(system: System, example: Example) -> None:
    config = system.config
    for query in example.queries:
        prefix, _, _ = rollout.encode_item(system, Item(query, config.prompts.summary_start))
        most = len(prefix) + config.limits.summary
        if most > config.limits.prompt:
            raise UserError(
                f"query {query.provenance or repr(query.prompt[:40])}: the generator's prompt takes {most} tokens with"
                f" a summary of config.limits.summary, limits.prompt is {config.limits.prompt}; raise it or shorten"
                " the prompt"
            )
