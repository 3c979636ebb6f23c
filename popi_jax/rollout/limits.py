"""Encodes every example once before the first step, so that a limit which some user exceeds ends no run midway."""

from collections.abc import Iterable, Mapping

from popi_jax.config import SUMMARIZED, Config
from popi_jax.data import packing
from popi_jax.data.encoding import Encoder
from popi_jax.data.schema import Example
from popi_jax.rollout import contexts

_BUCKETS = 8  # Of each kind; each is compiled for itself: as many shapes as a run of some length can bear.


def buckets(config: Config, encoder: Encoder, sources: Mapping[str, Iterable[Example]]) -> tuple[int, ...]:
    """The lengths to pad to: limits.buckets, or where that is () those that suit these data.

    Raises:
        UserError: for the first example of any split that config.limits or config.method cannot take.
    """
    signals, rows = _lengths(config, encoder, sources)
    if config.limits.buckets:
        return config.limits.buckets
    summary = config.limits.summary  # Nobody knows beforehand how long summaries get.
    chosen = {*packing.choose_buckets(signals, _BUCKETS), *packing.choose_buckets(rows, _BUCKETS)}
    return tuple(sorted(chosen | {-(-summary // 4), -(-summary // 2), summary}))


def _lengths(config: Config, encoder: Encoder, sources: Mapping[str, Iterable[Example]]) -> tuple[list[int], list[int]]:
    """The tokens of each user's signals, and of each pair with its summary as long as it may be."""
    signals: list[int] = []
    rows: list[int] = []
    context: str | None
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
                context, more = contexts.told(config.method, encoder, example).text, 0
            rows.extend(encoder.check(query, context, more) for query in example.queries)
    return signals, rows
