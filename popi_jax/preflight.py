"""Encodes every example once before the first step: a limit that some user exceeds ends no run in its middle."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax

from popi_jax import evaluate, packing, pairs
from popi_jax.data.schema import Example
from popi_jax.system import SUMMARIZED, System

_BUCKETS = 8  # Each is compiled for itself: as many shapes as a run of some length can bear.


def fit(system: System, sources: Mapping[str, Iterable[Example]]) -> System:
    """The system for these data: where limits.buckets is (), with buckets for the prompts that a run reads.

    Raises:
        UserError: for the first example of any split that config.limits or config.method cannot take.
    """
    lengths = _check_examples(system, sources)
    if system.buckets:
        return system
    summary = system.config.limits.summary  # How long summaries get, nobody knows before.
    chosen = packing.choose_buckets(lengths, _BUCKETS)
    return dataclasses.replace(system, buckets=tuple(sorted({*chosen, -(-summary // 4), -(-summary // 2), summary})))


def _check_examples(system: System, sources: Mapping[str, Iterable[Example]]) -> list[int]:
    """The tokens of what the inference model reads, and of pairs whose context is known, or too long for limits.bin."""
    config, encoder = system.config, system.encoder
    lengths: list[int] = []
    for split, source in sources.items():
        # An evaluation shows the raw signals to a reference, and counts what they would cost, whatever the method.
        shows_signals = split == "test" or config.objective.reference_context == "signals"
        for example in source:
            if shows_signals:
                encoder.raw_signals(example)
            if config.method in SUMMARIZED:  # A context of unknown text, but known length.
                lengths.append(len(encoder.signals(example)))
                context, more = config.prompts.summary_start, config.limits.summary
            else:
                ((told,),) = evaluate.contexts(system, None, [example], jax.random.key(0))
                context, more = told.text, 0
            for query in example.queries:
                encoder.check(query, context, more)
                tokens = pairs.pair_row(system, pairs.Item(query, context)).tokens + more
                if not more or tokens > config.limits.bin:
                    lengths.append(tokens)
    return lengths
