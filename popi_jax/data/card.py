"""data_card.json: what a run's data hold, what was dropped, and what the splits share.

Data may have more examples than memory holds. So texts are counted by 64-bit hashes, eight bytes each, and the counts
of the parts of a split add up.
"""

import array
import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from popi_jax.config import Data
from popi_jax.data.disjoint import Shown, Texts, key
from popi_jax.data.schema import Example, Query, Signal

_MOST_PERSONS = 32  # Persons whose users are counted one by one.
_FIELDS = ("prompt", "chosen", "rejected", "text")
_ODD = np.uint64(0x9E3779B97F4A7C15)  # Multiplying by an odd number loses no bits.


def make(
    data: Data, examples: Mapping[str, Iterable[Example]], dropped: Mapping[str, int], licence: str | None
) -> dict[str, Any]:
    """Returns the card.

    Args:
        data: config.data.
        examples: the examples of each split. They are read one by one.
        dropped: the number of dropped rows and signals, by reason.
        licence: the licence that the data set's own card names, if any.

    Returns:
        As `assembled`.
    """
    test = Tested(examples["test"])
    counts = {split: Counts(test if split == "train" else None) for split in examples}
    for split, part in examples.items():
        counts[split].count(part)
    return assembled(data, counts, dropped, licence, test)


def assembled(
    data: Data, counts: Mapping[str, "Counts"], dropped: Mapping[str, int], licence: str | None, test: "Tested"
) -> dict[str, Any]:
    """Returns the card of splits that are counted already; `counts["train"]` was made with `test`.

    Returns:
        "dropped"; for each split its counts, repeated triples and longest texts; and "shared", the number of persons,
        prompts, triples and signals of the test split that training has, too.
    """
    return {
        "schema": 1,
        "dataset": data.dataset,
        "path": data.path,
        "test_path": data.test_path,
        "protocol": data.protocol,
        "licence": licence,
        "dropped": dict(dropped),
        "splits": {split: own.summary() for split, own in counts.items()},
        "shared": test.shared(counts["train"].met),
    }


def write(workdir: pathlib.Path, card: Mapping[str, Any]) -> None:
    """Writes data_card.json."""
    from popi_jax.data import files  # Late: it imports JAX, which the processes that count do without.

    files.write_json(workdir / "data_card.json", card)


def shared(train: Iterable[Example], test: Iterable[Example]) -> dict[str, int]:
    """Returns how many things of the test split occur in training; see POPI section 5a on what leaks.

    `test_prompts` and `test_triples` are those of test queries that occur in a training query or signal.
    `test_signals` are pairs and comments that test users show and a training user shows or answers. Case and blanks
    make no difference.
    """
    own = Tested(test)
    met = Met()
    for example in train:
        met.add(own, example)
    return own.shared(met)


class Tested:
    """What the test split has, to be looked for in training. `examples` are read once."""

    def __init__(self, examples: Iterable[Example]):
        self.prompts, self.triples, self.shown = Texts(), Texts(), Shown()
        self.persons: set[int] = set()
        self._signals: dict[int, set[int]] = {}  # The exact ones, by the key that folding gives them.
        for example in examples:
            self.persons.add(_hash(_person(example)))
            for query in example.queries:
                self.prompts.add(query.prompt)
                self.triples.add(query.prompt, query.chosen, query.rejected)
            self.shown.add(dataclasses.replace(example, queries=()))
            for signal in example.signals:
                if signal.kind != "profile":
                    folded = key(*(getattr(signal, name) for name in _FIELDS))
                    self._signals.setdefault(folded, set()).add(_content(signal))

    def shared(self, met: "Met") -> dict[str, int]:
        """Returns the counts of `shared` for what was met in training."""
        return {
            "persons": len(met.persons),
            "test_prompts": len(met.prompts),
            "test_triples": len(met.triples),
            "test_signals": sum(len(self._signals[folded]) for folded in met.signals),
        }


@dataclasses.dataclass
class Met:
    """The keys of what training has of the test split."""

    persons: set[int] = dataclasses.field(default_factory=set)
    prompts: set[int] = dataclasses.field(default_factory=set)
    triples: set[int] = dataclasses.field(default_factory=set)
    signals: set[int] = dataclasses.field(default_factory=set)

    def add(self, test: Tested, example: Example) -> None:
        """Adds what a training example has of the test split."""
        if (person := _hash(_person(example))) in test.persons:
            self.persons.add(person)
        own: list[Signal | Query] = [*example.signals, *example.queries]
        for part in own:
            if (found := test.prompts.found(part.prompt)) is not None:
                self.prompts.add(found)
            triple = isinstance(part, Query) or part.kind == "pair"
            if triple and (found := test.triples.found(part.prompt, part.chosen, part.rejected)) is not None:
                self.triples.add(found)
            if (found := test.shown.found(part)) is not None:
                self.signals.add(found)

    def merge(self, other: Self) -> None:
        """Adds what was met in other examples."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).update(getattr(other, field.name))


def _numbers() -> "array.array[int]":
    return array.array("Q")


class Counts:
    """Counts the examples of a split, one after the other.

    Args:
        test: for training, the test split, which is looked for in it.
    """

    def __init__(self, test: Tested | None = None):
        self._test, self.met = test, Met()
        self._users = self._without_persona = self._shown_prompts = self._shown_triples = 0
        self._signals, self._queries = _Spread(), _Spread()
        self._kinds: collections.Counter[str] = collections.Counter()
        self._files: collections.Counter[str] = collections.Counter()
        self._by_person: collections.Counter[str] = collections.Counter()  # Of the first persons.
        self._longest: dict[str, tuple[int, str]] = {}
        # Hashes: of each user's person, of each query's texts, of each signal.
        self._persons, self._contents = _numbers(), _numbers()
        self._texts = {name: _numbers() for name in ("prompt", "chosen", "rejected")}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_test": None}  # It is large, and a count that is sent back needs it no more.

    def count(self, examples: Iterable[Example]) -> None:
        """Counts the examples."""
        for example in examples:
            self.add(example)

    def add(self, example: Example) -> None:
        """Counts an example."""
        person = _person(example)
        self._users += 1
        self._without_persona += not example.persona
        self._persons.append(_hash(person))
        if person in self._by_person or len(self._by_person) <= _MOST_PERSONS:
            self._by_person[person] += 1
        self._signals.add(len(example.signals))
        self._queries.add(len(example.queries))
        self._files[_file(example)] += 1
        for signal in example.signals:
            self._kinds[signal.kind] += 1
            self._contents.append(_content(signal))
        for query in example.queries:
            for name, hashes in self._texts.items():
                hashes.append(_hash(getattr(query, name)))
        self._count_shown(example)
        self._measure(example)
        if self._test is not None:
            self.met.add(self._test, example)

    def merge(self, other: Self) -> None:
        """Adds the counts of later examples of the split."""
        for name in ("_users", "_without_persona", "_shown_prompts", "_shown_triples"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("_kinds", "_files"):
            getattr(self, name).update(getattr(other, name))
        for person, count in other._by_person.items():
            if person in self._by_person or len(self._by_person) <= _MOST_PERSONS:
                self._by_person[person] += count
        for name in ("_signals", "_queries", "met"):
            getattr(self, name).merge(getattr(other, name))
        for field, (words, place) in other._longest.items():
            if words > self._longest.get(field, (0, ""))[0]:
                self._longest[field] = words, place
        self._persons.extend(other._persons)
        self._contents.extend(other._contents)
        for name, hashes in self._texts.items():
            hashes.extend(other._texts[name])

    def summary(self) -> dict[str, Any]:
        """Returns the split's part of the card."""
        persons = _distinct(self._persons)
        prompts, chosen, rejected = (np.asarray(self._texts[name], np.uint64) for name in self._texts)
        triples, first = np.unique(_triples(prompts, chosen, rejected), return_index=True)
        reversed_ = _triples(prompts[first], rejected[first], chosen[first])
        return {
            "users": self._users,
            "persons": persons,
            "users_by_person": dict(self._by_person.most_common())
            if persons <= min(_MOST_PERSONS, self._users - 1)
            else {},
            "users_without_persona": self._without_persona,
            "signals_by_kind": dict(self._kinds),
            "signals_per_user": self._signals.summary(),
            "queries": len(prompts),
            "queries_per_user": self._queries.summary(),
            "distinct_prompts": _distinct(self._texts["prompt"]),
            "repeated_triples": len(prompts) - len(triples),
            "reversed_triples": int(np.isin(reversed_, triples).sum()) // 2,
            "repeated_signals": len(self._contents) - _distinct(self._contents),
            "queries_whose_prompt_the_user_shows": self._shown_prompts,
            "queries_that_the_user_shows": self._shown_triples,
            "longest": {name: {"words": words, "at": place} for name, (words, place) in self._longest.items()},
            "users_by_file": dict(self._files),
        }

    def _count_shown(self, example: Example) -> None:
        """Counts the queries whose prompt or triple is in one of their user's own pairs."""
        pairs = [signal for signal in example.signals if signal.kind == "pair"]
        prompts = {pair.prompt for pair in pairs}
        for query in example.queries:
            if query.prompt in prompts:
                self._shown_prompts += 1
                self._shown_triples += _triple(query) in map(_triple, pairs)

    def _measure(self, example: Example) -> None:
        """Looks for the longest text of each field, in words, and where it stands."""
        self._longer("persona", example.persona, example.user)
        for signal in example.signals:
            for name, label in _OF_SIGNALS.items():
                self._longer(label, getattr(signal, name), signal.provenance)
        for query in example.queries:
            for name in ("prompt", "chosen", "rejected"):
                self._longer(name, getattr(query, name), query.provenance)

    def _longer(self, field: str, text: str, place: str) -> None:
        longest = self._longest.get(field, (0, ""))[0]
        # A text of n words has at least 2n - 1 characters.
        if len(text) > 2 * longest and (words := len(text.split())) > longest:
            self._longest[field] = words, place


_OF_SIGNALS = {name: f"signal {name}" for name in _FIELDS}


class _Spread:
    """The least, mean and most of some counts, each of which is below a few thousand."""

    def __init__(self) -> None:
        self._times: collections.Counter[int] = collections.Counter()

    def add(self, count: int) -> None:
        self._times[count] += 1

    def merge(self, other: "_Spread") -> None:
        self._times.update(other._times)

    def summary(self) -> dict[str, float]:
        times = self._times or {0: 1}
        mean = sum(count * number for count, number in times.items()) / sum(times.values())
        return {"least": min(times), "mean": mean, "most": max(times)}


def _person(example: Example) -> str:
    return example.person or example.user


def _file(example: Example) -> str:
    """The file of the first query, whose provenance is FILE#ROW or FILE:ROW."""
    return example.queries[0].provenance.partition("#")[0].partition(":")[0] if example.queries else ""


def _triple(pair: Query | Signal) -> tuple[str, str, str]:
    return pair.prompt, pair.chosen, pair.rejected


def _content(signal: Signal) -> int:
    return _hash("\0".join((signal.kind, signal.prompt, signal.chosen, signal.rejected, signal.text)))


def _hash(text: str) -> int:
    """Returns 64 bits that stand for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _distinct(hashes: Sequence[int]) -> int:
    return len(np.unique(np.asarray(hashes, np.uint64)))


def _triples(prompts_N: np.ndarray, chosen_N: np.ndarray, rejected_N: np.ndarray) -> np.ndarray:
    """Returns a hash of each triple, from those of its texts."""
    return (prompts_N * _ODD + chosen_N) * _ODD + rejected_N
