"""Encodes every example once before the first step: a limit that some user exceeds ends no run in its middle."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax

from popi_jax.data import packing
from popi_jax.data.schema import Example
from popi_jax.evaluation import evaluate
from popi_jax.modes.setup import SUMMARIZED, System

_BUCKETS = 8  # Of each kind; each is compiled for itself: as many shapes as a run of some length can bear.


def fit(system: System, sources: Mapping[str, Iterable[Example]]) -> System:
    """The system for these data: where limits.buckets is (), with buckets for the prompts that a run reads.

    Raises:
        UserError: for the first example of any split that config.limits or config.method cannot take.
    """
    signals, rows = _lengths(system, sources)
    if system.buckets:
        return system
    summary = system.config.limits.summary  # How long summaries get, nobody knows before.
    chosen = {*packing.choose_buckets(signals, _BUCKETS), *packing.choose_buckets(rows, _BUCKETS)}
    return dataclasses.replace(system, buckets=tuple(sorted(chosen | {-(-summary // 4), -(-summary // 2), summary})))


def _lengths(system: System, sources: Mapping[str, Iterable[Example]]) -> tuple[list[int], list[int]]:
    """The tokens of what the inference model reads of each user, and of each pair, its summary as long as may be."""
    config, encoder = system.config, system.encoder
    signals: list[int] = []
    rows: list[int] = []
    for split, source in sources.items():
        # An evaluation shows the raw signals to a reference, and counts what they would cost, whatever the method.
        shows_signals = split == "test" or config.objective.reference_context == "signals"
        for example in source:
            if shows_signals:
                encoder.raw_signals(example)
            if config.method in SUMMARIZED:  # A context of unknown text, but known length.
                signals.append(len(encoder.signals(example)))
                context, more = config.prompts.summary_start, config.limits.summary
            else:
                ((told,),) = evaluate.contexts(system, None, [example], jax.random.key(0))
                context, more = told.text, 0
            rows.extend(encoder.check(query, context, more) for query in example.queries)
    return signals, rows
