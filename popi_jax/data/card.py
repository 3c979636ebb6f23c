"""data_card.json: what a run's data hold, what was dropped, and what the splits share."""

import collections
import pathlib
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from popi_jax.config import Data
from popi_jax.data import files
from popi_jax.data.disjoint import Shown, folded
from popi_jax.data.schema import Example, Query, Signal

_MOST_PERSONS = 32  # Persons whose users are counted one by one.

Triple = tuple[str, str, str]


def make(
    data: Data, examples: Mapping[str, Sequence[Example]], dropped: Mapping[str, int], licence: str | None
) -> dict[str, Any]:
    """Returns the card.

    Args:
        data: config.data.
        examples: the examples of each split.
        dropped: the number of dropped rows and signals, by reason.
        licence: the licence that the data set's own card names, if any.

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
        "splits": {split: _split(part) for split, part in examples.items()},
        "shared": shared(examples["train"], examples["test"]),
    }


def write(workdir: pathlib.Path, card: Mapping[str, Any]) -> None:
    """Writes data_card.json."""
    files.write_json(workdir / "data_card.json", card)


def shared(train: Sequence[Example], test: Sequence[Example]) -> dict[str, int]:
    """Returns how many things of the test split occur in training; see POPI section 5a on what leaks.

    `test_prompts` and `test_triples` are those of test queries that occur in a training query or signal.
    `test_signals` are pairs and comments that test users show and a training user shows or answers. Case and blanks
    make no difference.
    """
    seen_prompts, seen_triples = set(), set()
    for triple in _all_triples(train):
        seen_triples.add(triple)
        seen_prompts.add(triple[0])
    for signal in _signals(train):
        seen_prompts.add(folded(signal.prompt))
    test_triples = {_folded_triple(query) for query in _queries(test)}
    shown = Shown(train)
    return {
        "persons": len({_person(e) for e in test} & {_person(e) for e in train}),
        "test_prompts": len({prompt for prompt, _, _ in test_triples} & seen_prompts),
        "test_triples": len(test_triples & seen_triples),
        "test_signals": len({_content(signal) for signal in _signals(test) if signal in shown}),
    }


def _split(examples: Sequence[Example]) -> dict[str, Any]:
    persons = collections.Counter(map(_person, examples))
    triples = [_triple(query) for query in _queries(examples)]
    distinct = set(triples)
    return {
        "users": len(examples),
        "persons": len(persons),
        "users_by_person": dict(persons.most_common()) if len(persons) <= min(_MOST_PERSONS, len(examples) - 1) else {},
        "users_without_persona": sum(not example.persona for example in examples),
        "signals_by_kind": dict(collections.Counter(signal.kind for signal in _signals(examples))),
        "signals_per_user": _spread(len(example.signals) for example in examples),
        "queries": len(triples),
        "queries_per_user": _spread(len(example.queries) for example in examples),
        "distinct_prompts": len({prompt for prompt, _, _ in triples}),
        "repeated_triples": len(triples) - len(distinct),
        "reversed_triples": sum((x, b, a) in distinct for x, a, b in distinct) // 2,
        "repeated_signals": _repeats(map(_content, _signals(examples))),
        "queries_whose_prompt_the_user_shows": _shown(examples, lambda pair: pair[0]),
        "queries_that_the_user_shows": _shown(examples, lambda pair: pair),
        "longest": _longest(examples),
        "users_by_file": dict(collections.Counter(map(_file, examples))),
    }


def _shown(examples: Iterable[Example], part: Any) -> int:
    """Counts the queries of which this part (the prompt, or the triple) is in one of their user's own pairs."""
    count = 0
    for example in examples:
        own = {part(_triple(signal)) for signal in example.signals if signal.kind == "pair"}
        count += sum(part(_triple(query)) in own for query in example.queries)
    return count


def _longest(examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """The longest text of each field, in words, and where it stands."""
    longest: dict[str, tuple[int, str]] = {}
    for example in examples:
        texts = [("persona", example.persona, example.user)]
        for signal in example.signals:
            texts += [(f"signal {name}", getattr(signal, name), signal.provenance) for name in _FIELDS]
        for query in example.queries:
            texts += [(name, getattr(query, name), query.provenance) for name in ("prompt", "chosen", "rejected")]
        for name, text, place in texts:
            words = len(text.split())
            if words > longest.get(name, (0, ""))[0]:
                longest[name] = words, place
    return {name: {"words": words, "at": place} for name, (words, place) in longest.items()}


_FIELDS = ("prompt", "chosen", "rejected", "text")


def _person(example: Example) -> str:
    return example.person or example.user


def _file(example: Example) -> str:
    """The file of the first query, whose provenance is FILE#ROW or FILE:ROW."""
    return re.split("[#:]", example.queries[0].provenance)[0] if example.queries else ""


def _queries(examples: Iterable[Example]) -> Iterator[Query]:
    return (query for example in examples for query in example.queries)


def _signals(examples: Iterable[Example]) -> Iterator[Signal]:
    return (signal for example in examples for signal in example.signals)


def _triple(pair: Query | Signal) -> Triple:
    return pair.prompt, pair.chosen, pair.rejected


def _folded_triple(pair: Query | Signal) -> Triple:
    return folded(pair.prompt), folded(pair.chosen), folded(pair.rejected)


def _all_triples(examples: Sequence[Example]) -> Iterator[Triple]:
    yield from map(_folded_triple, _queries(examples))
    yield from (_folded_triple(signal) for signal in _signals(examples) if signal.kind == "pair")


def _content(signal: Signal) -> Hashable:
    return signal.kind, *(getattr(signal, name) for name in _FIELDS)


def _repeats(values: Iterable[Hashable]) -> int:
    """The number of values that occurred before."""
    return sum(count - 1 for count in collections.Counter(values).values())


def _spread(counts: Iterable[int]) -> dict[str, float]:
    values = list(counts) or [0]
    return {"least": min(values), "mean": sum(values) / len(values), "most": max(values)}
