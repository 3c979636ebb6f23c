"""data_card.json: what a run's data hold, what was dropped, and what the splits share.

Data may have more examples than memory holds. So texts are counted by 64-bit hashes, eight bytes each, and the counts
of the parts of a split add up.
"""

import array
import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from popi_jax.config import Data
from popi_jax.data.disjoint import Shown, Texts, beginning, key, number
from popi_jax.data.schema import Example, Query, Signal

_MOST_PERSONS = 32  # Persons whose users are counted one by one.
_FIELDS = ("prompt", "chosen", "rejected", "text")
_BLANKS = "".join(filter(str.isspace, map(chr, range(128)))).encode()
_ODD = 0x9E3779B97F4A7C15  # Multiplying by an odd number loses no bits.


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
    """What the test split has, to be looked for in training."""

    def __init__(self, examples: Iterable[Example]):
        self.prompts, self.triples, self.shown = Texts(), Texts(), Shown()
        self.persons: set[int] = set()
        self._signals: dict[int, set[int]] = {}  # The exact ones, by the key that folding gives them.
        for example in examples:
            self.add(example)

    def add(self, example: Example) -> None:
        """Adds a test user."""
        self.persons.add(number(_person(example)))
        for query in example.queries:
            self.prompts.add(query.prompt)
            self.triples.add(query.prompt, query.chosen, query.rejected)
        self.shown.add(dataclasses.replace(example, queries=()))
        for signal in example.signals:
            if signal.kind != "profile":
                folded = key(*(getattr(signal, name) for name in _FIELDS))
                self._signals.setdefault(folded, set()).add(_content(signal))

    def may_have(self, prompt: str) -> bool:
        """Whether anything with this prompt may be in it. Usually not, which is seen fast."""
        begun = beginning(prompt)
        return begun in self.prompts.beginnings or begun in self.shown.beginnings

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
    """The keys of what training has of the test split, and how often."""

    persons: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    prompts: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    triples: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    signals: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, test: Tested, example: Example) -> None:
        """Adds what a training example has of the test split."""
        if test.persons and (person := number(_person(example))) in test.persons:
            self.persons[person] += 1
        own: list[Signal | Query] = [*example.signals, *example.queries]
        for part in own:
            if test.may_have(part.prompt):
                self._add(test, part)

    def _add(self, test: Tested, part: Signal | Query) -> None:
        if (found := test.prompts.found(part.prompt)) is not None:
            self.prompts[found] += 1
        triple = isinstance(part, Query) or part.kind == "pair"
        if triple and (found := test.triples.found(part.prompt, part.chosen, part.rejected)) is not None:
            self.triples[found] += 1
        if (found := test.shown.found(part)) is not None:
            self.signals[found] += 1

    def merge(self, other: Self, sign: int = 1) -> None:
        """Adds what was met in other examples, or takes it away."""
        for field in dataclasses.fields(self):
            _merge(getattr(self, field.name), getattr(other, field.name), sign)


def _numbers() -> "array.array[int]":
    return array.array("Q")


class Counts:
    """Counts the examples of a split, one after the other.

    Args:
        test: for training, the test split, which is looked for in it.
    """

    def __init__(self, test: Tested | None = None):
        self._test, self.met = test, Met()
        self._of: collections.Counter[str] = collections.Counter()  # By keys of `summary`.
        self._signals: collections.Counter[int] = collections.Counter()  # Users by their number of signals.
        self._queries: collections.Counter[int] = collections.Counter()
        self._kinds: collections.Counter[str] = collections.Counter()
        self._files: collections.Counter[str] = collections.Counter()
        self._by_person: collections.Counter[str] = collections.Counter()  # Of the first persons.
        self._longest: dict[str, tuple[int, str]] = {}
        self._persons, self._contents, self._prompts = Numbers(), Numbers(), Numbers()
        self._triples, self._reversed = Numbers(), Numbers()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_test": None}  # It is large, and a count that is sent back needs it no more.

    def count(self, examples: Iterable[Example]) -> None:
        """Counts the examples."""
        for example in examples:
            self.add(example)

    def add(self, example: Example) -> None:
        """Counts an example."""
        person = _person(example)
        self._of["users"] += 1
        self._of["users_without_persona"] += not example.persona
        self._persons.add(number(person))
        if person in self._by_person or len(self._by_person) <= _MOST_PERSONS:
            self._by_person[person] += 1
        self._signals[len(example.signals)] += 1
        self._queries[len(example.queries)] += 1
        self._files[_file(example)] += 1
        self._longer("persona", example.persona, example.user)
        for signal in example.signals:
            self._kinds[signal.kind] += 1
            self._contents.add(_content(signal))
            for name, label in _OF_SIGNALS[signal.kind]:
                self._longer(label, getattr(signal, name), signal.provenance)
        for query in example.queries:
            prompt, chosen, rejected = number(query.prompt), number(query.chosen), number(query.rejected)
            self._prompts.add(prompt)
            self._triples.add(_mixed(prompt, chosen, rejected))
            self._reversed.add(_mixed(prompt, rejected, chosen))
            pairs = [_triple(s) for s in example.signals if s.kind == "pair" and s.prompt == query.prompt]
            if pairs:
                self._of["queries_whose_prompt_the_user_shows"] += 1
                self._of["queries_that_the_user_shows"] += _triple(query) in pairs
            for name in ("prompt", "chosen", "rejected"):
                self._longer(name, getattr(query, name), query.provenance)
        if self._test is not None:
            self.met.add(self._test, example)

    def merge(self, other: Self, sign: int = 1) -> None:
        """Adds the counts of later examples of the split. With the sign -1, takes away those of some of its own."""
        for name in ("_of", "_signals", "_queries", "_kinds", "_files"):
            _merge(getattr(self, name), getattr(other, name), sign)
        for person, count in other._by_person.items():
            if person in self._by_person or len(self._by_person) <= _MOST_PERSONS:
                _merge(self._by_person, {person: count}, sign)
        self.met.merge(other.met, sign)
        for field, (words, place) in other._longest.items():
            if sign > 0 and words > self._longest.get(field, (0, ""))[0]:
                self._longest[field] = words, place
        for name in ("_persons", "_contents", "_prompts", "_triples", "_reversed"):
            getattr(self, name).merge(getattr(other, name), sign)

    def holds(self, other: Self) -> bool:
        """Whether the longest text of a field is one of the other count, of some of these examples.

        Then the other count cannot be taken away: nobody knows the second longest one.
        """
        return any(self._longest[field] == longest for field, longest in other._longest.items())

    def summary(self) -> dict[str, Any]:
        """Returns the split's part of the card."""
        persons, users, queries = len(self._persons.distinct()), self._of["users"], len(self._prompts)
        few = persons <= min(_MOST_PERSONS, users - 1)
        triples = self._triples.distinct()
        return {
            "users": users,
            "persons": persons,
            "users_by_person": dict(self._by_person.most_common()) if few else {},
            "users_without_persona": self._of["users_without_persona"],
            "signals_by_kind": dict(self._kinds),
            "signals_per_user": _spread(self._signals),
            "queries": queries,
            "queries_per_user": _spread(self._queries),
            "distinct_prompts": len(self._prompts.distinct()),
            "repeated_triples": queries - len(triples),
            "reversed_triples": int(np.isin(self._reversed.distinct(), triples).sum()) // 2,
            "repeated_signals": len(self._contents) - len(self._contents.distinct()),
            "queries_whose_prompt_the_user_shows": self._of["queries_whose_prompt_the_user_shows"],
            "queries_that_the_user_shows": self._of["queries_that_the_user_shows"],
            "longest": {name: {"words": words, "at": place} for name, (words, place) in self._longest.items()},
            "users_by_file": dict(self._files),
        }

    def _longer(self, field: str, text: str, place: str) -> None:
        """Keeps the longest text of each field, in words, and where it stands."""
        longest = self._longest[field][0] if field in self._longest else 0
        # Most texts are seen to be no longer without splitting them: n words have n - 1 blanks between them.
        if len(text) < 2 * longest + 1 or (text.isascii() and _blanks(text) < longest):
            return
        words = len(text.split())
        if words > longest:
            self._longest[field] = words, place


def _blanks(text: str) -> int:
    """Returns the number of blanks in a text of ASCII."""
    return len(text) - len(text.encode().translate(None, _BLANKS))


class Numbers:
    """Numbers of 64 bits, some of which are taken away again."""

    def __init__(self) -> None:
        self._added, self._gone = array.array("Q"), array.array("Q")
        self.add = self._added.append

    def __getstate__(self) -> tuple[Any, Any]:
        return self._added, self._gone

    def __setstate__(self, state: tuple[Any, Any]) -> None:
        self._added, self._gone = state
        self.add = self._added.append

    def __len__(self) -> int:
        return len(self._added) - len(self._gone)

    def merge(self, other: Self, sign: int) -> None:
        """Adds the numbers of another one, or takes them away."""
        added, gone = (self._added, self._gone) if sign > 0 else (self._gone, self._added)
        added.extend(other._added)
        gone.extend(other._gone)

    def distinct(self) -> np.ndarray:
        """Returns each number once."""
        values, counts = np.unique(np.asarray(self._added, np.uint64), return_counts=True)
        gone, gone_counts = np.unique(np.asarray(self._gone, np.uint64), return_counts=True)
        counts[np.searchsorted(values, gone)] -= gone_counts
        return values[counts > 0]


def _merge(counts: collections.Counter[Any], other: Mapping[Any, int], sign: int) -> None:
    for name, count in other.items():
        counts[name] += sign * count
        if not counts[name]:
            del counts[name]


# The fields that a signal of a kind has, and their names in the card.
_OF_SIGNALS = {
    kind: [(name, f"signal {name}") for name in names]
    for kind, names in (
        ("pair", ("prompt", "chosen", "rejected")),
        ("comment", ("prompt", "text")),
        ("profile", ("text",)),
    )
}


def _spread(times: Mapping[int, int]) -> dict[str, float]:
    times = times or {0: 1}
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
    return number("\0".join((signal.kind, signal.prompt, signal.chosen, signal.rejected, signal.text)))


def _mixed(*numbers: int) -> int:
    """Returns 64 bits that stand for a list of numbers."""
    mixed = 0
    for own in numbers:
        mixed = (mixed * _ODD + own) % 2**64
    return mixed
