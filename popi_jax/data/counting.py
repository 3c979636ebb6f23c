"""Counts prepared examples for the data card, in several processes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from popi_jax.data import card, workers
from popi_jax.data.card import Counts, Tested
from popi_jax.data.parts import Part
from popi_jax.data.workers import Told

_FEW = 20_000  # Examples that are counted faster than processes start.
_TOLD = 1000  # Examples between two updates of the progress.


@dataclasses.dataclass(frozen=True)
class Made:
    """The examples of a split.

    Attributes:
        parts: they have the examples, and perhaps some that are left out.
        places: those of the examples, counted through the parts.
        counts: of all examples of each part; None for a part that an earlier process wrote.
    """

    parts: Sequence[Part]
    places: np.ndarray
    counts: Sequence[Counts | None]


def count(split: str, made: Made, test: Tested | None) -> Counts:
    """Returns the counts of a split. Only parts that are not counted yet are read again, and what is left out.

    Args:
        split: for the progress.
        made: its examples.
        test: for training, the test split.
    """
    starts = np.cumsum([0, *(part.examples for part in made.parts)])
    places = np.sort(made.places)
    bounds = np.searchsorted(places, starts)
    kept = [places[a:b] - start for a, b, start in zip(bounds, bounds[1:], starts, strict=False)]
    known = [
        None if counts is None else _without(counts, part, own, test)
        for counts, part, own in zip(made.counts, made.parts, kept, strict=True)
    ]
    jobs = [(part, own, test) for part, own, counts in zip(made.parts, kept, known, strict=True) if counts is None]
    rows = sum(len(own) for _, own, _ in jobs)
    counted = iter(workers.run(_count, jobs, f"counting {split}", rows, processes=1 if rows < _FEW else None))
    total = Counts(test)
    for counts in known:
        total.merge(next(counted) if counts is None else counts)
    return total


def _without(counts: Counts, part: Part, kept: np.ndarray, test: Tested | None) -> Counts | None:
    """Takes away what is left out; None if all of the part must be counted for that."""
    left = card.Counts(test)
    left.count(part.read(np.setdiff1d(np.arange(part.examples), kept)))
    if counts.holds(left):
        return None
    counts.merge(left, -1)
    return counts


def _count(job: tuple[Part, np.ndarray, Tested | None], told: Told) -> Counts:
    part, places, test = job
    counts = Counts(test)
    for number, example in enumerate(part.read(places), start=1):
        counts.add(example)
        if number % _TOLD == 0:
            told(_TOLD)
    told(len(places) % _TOLD)
    return counts
