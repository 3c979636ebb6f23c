"""Encodes every example once before the first step, so that no run ends midway because a user exceeds a limit."""

import array
import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from popi_jax.config import SUMMARIZED, Config
from popi_jax.data import packing
from popi_jax.data.encoding import Encoder, OverflowLog, Unfit
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example, Query
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


class Kept(Sequence[Example]):
    """The examples of a split that fit, read one by one from where all of them are.

    Args:
        source: all examples.
        places: of those that fit; None: all of them.
        queries: the queries that fit, by the places of examples of which some do not.
    """

    def __init__(
        self,
        source: Sequence[Example],
        places: Sequence[int] | None = None,
        queries: Mapping[int, tuple[Query, ...]] | None = None,
    ):
        self._source, self._places, self._queries = source, places, queries or {}

    def __len__(self) -> int:
        return len(self._source) if self._places is None else len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = index if self._places is None else self._places[index]
        example = self._source[place]
        return dataclasses.replace(example, queries=self._queries[place]) if place in self._queries else example

    @property
    def all(self) -> bool:
        """Whether everything fits."""
        return len(self) == len(self._source) and not self._queries

    def of(self, source: Sequence[Example]) -> "Kept":
        """Returns the same examples, read from another place."""
        return Kept(source, self._places, self._queries)


def usable(encoder: Encoder, split: str, examples: Sequence[Example], dropped: collections.Counter[str]) -> Kept:
    """The users and queries that fit. The choice does not depend on the method, so that methods can be compared.

    Args:
        encoder: with limits.on_overflow = "error", everything is returned, and `buckets` reports what does not fit.
        split: for the reasons in `dropped`.
        examples: of the split.
        dropped: updated with the number of dropped users and queries, by reason.
    """
    if encoder.limits.on_overflow == "error":
        return Kept(examples)
    encoder = dataclasses.replace(encoder, overflow=OverflowLog())  # Nothing is read yet.
    places, changed = array.array("q"), {}
    for place, example in enumerate(examples):
        try:
            encoder.signals(example)
        except Unfit as error:
            dropped[f"{split} users {error.reason}"] += 1
            continue
        queries = tuple(_usable_queries(encoder, split, example, dropped))
        if not queries:
            dropped[f"{split} users without a query that fits"] += 1
            continue
        places.append(place)
        if len(queries) < len(example.queries):
            changed[place] = queries
    return Kept(examples, places, changed)


def _usable_queries(
    encoder: Encoder, split: str, example: Example, dropped: collections.Counter[str]
) -> Iterator[Query]:
    """Yields the queries that fit with a summary of the largest length, with the persona and with one signal."""
    start, summary = Told(encoder.prompts.summary_start), encoder.limits.summary
    for query in example.queries:
        try:
            encoder.check(query, None)
            encoder.check(query, start, summary)
            if example.persona:
                encoder.check(query, Told(example.persona))
            encoder.raw_signals(dataclasses.replace(example, queries=(query,)))
        except Unfit as error:
            dropped[f"{split} queries {error.reason}"] += 1
        else:
            yield query


def _lengths(
    config: Config, encoder: Encoder, sources: Mapping[str, Iterable[Example]]
) -> tuple[Sequence[int], Sequence[int]]:
    """The tokens of each user's signals, and of each pair with a summary of the largest length."""
    signals, rows = array.array("l"), array.array("l")
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
            if split == "train" and config.method == "popi":
                rows.extend(_before_training(config, encoder, example))
    return signals, rows


def _before_training(config: Config, encoder: Encoder, example: Example) -> Iterator[int]:
    """Yields the tokens of each pair in the generator's warm-up; UserError if it or the warm start lacks something."""
    schedule = config.schedule
    if schedule.n_generator_warmup:
        told = contexts.told(contexts.in_training(config, "generator_warmup"), encoder, example).told
        yield from (encoder.check(query, told) for query in example.queries)
    if schedule.n_warm_start and schedule.warm_start == "persona":
        contexts.told("oracle", encoder, example)
        encoder.summary(example)
