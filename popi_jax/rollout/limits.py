"""Encodes every example once before the first step, so that no run ends midway because a user exceeds a limit."""

from collections.abc import Iterable, Mapping

from popi_jax.config import SUMMARIZED, Config
from popi_jax.data import packing
from popi_jax.data.encoding import Encoder
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example
from popi_jax.rollout import contexts

_BUCKETS = 8  # Per kind of text. Each bucket is a shape to compile, so a run can afford only a few.


def buckets(config: Config, encoder: Encoder, sources: Mapping[str, Iterable[Example]]) -> tuple[int, ...]:
    """The lengths to pad to: limits.buckets, or buckets chosen for these data if limits.buckets is ().

    Raises:
        UserError: an example of any split exceeds config.limits or does not suit config.method.
    """
    signals, rows = _lengths(config, encoder, sources)
    if config.limits.buckets:
        return config.limits.buckets
    summary = config.limits.summary  # The length of summaries is not known beforehand.
    chosen = {*packing.choose_buckets(signals, _BUCKETS), *packing.choose_buckets(rows, _BUCKETS)}
    return tuple(sorted(chosen | {-(-summary // 4), -(-summary // 2), summary}))


def _lengths(config: Config, encoder: Encoder, sources: Mapping[str, Iterable[Example]]) -> tuple[list[int], list[int]]:
    """The tokens of each user's signals, and of each pair with a summary of the largest length."""
    signals: list[int] = []
    rows: list[int] = []
    told: Told | None
    for split, source in sources.items():
        # Whatever the method, an evaluation shows the raw signals to a reference and counts their tokens.
        shows_signals = split == "test" or config.objective.reference_context == "signals"
        for example in source:
            if shows_signals:
                encoder.raw_signals(example)
            if config.method in SUMMARIZED:  # The text is not known yet, but its largest length is.
                signals.append(len(encoder.signals(example)))
                told, more = Told(config.prompts.summary_start), config.limits.summary
            else:
                told, more = contexts.told(config.method, encoder, example).told, 0
            rows.extend(encoder.check(query, told, more) for query in example.queries)
    return signals, rows
