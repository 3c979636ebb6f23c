"""Which texts count as the same when training must show nothing of the test split (data.protocol = "disjoint")."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from popi_jax.data.schema import Example, Query, Signal


def folded(text: str) -> str:
    """Returns the text without what makes no difference: case, and the kind and number of blanks."""
    return " ".join(text.casefold().split())


class Shown:
    """The pairs and comments of some users, including queries. Profiles are left out: one can fit many people."""

    def __init__(self, examples: Iterable[Example]):
        self._keys = {_key(part) for example in examples for part in (*example.signals, *example.queries)}

    def __contains__(self, part: object) -> bool:
        pair = isinstance(part, Query) or (isinstance(part, Signal) and part.kind != "profile")
        return pair and _key(part) in self._keys


def without(train: Sequence[Example], test: Sequence[Example], counts: collections.Counter[str]) -> list[Example]:
    """Returns the training users without signals and queries that a test user has, too; `counts` gets their numbers."""
    shown, kept = Shown(test), []
    for example in train:
        signals = tuple(signal for signal in example.signals if signal not in shown)
        queries = tuple(query for query in example.queries if query not in shown)
        for what, before, after in (("signals", example.signals, signals), ("queries", example.queries, queries)):
            if len(after) < len(before):
                counts[f"train {what} that a test user has, too"] += len(before) - len(after)
        if signals and queries:
            kept.append(dataclasses.replace(example, signals=signals, queries=queries))
        else:
            counts["train users of whom test users have all signals or queries, too"] += 1
    return kept


def _key(part: Any) -> tuple[str, ...]:
    texts = (part.prompt, part.chosen, part.rejected, part.text if isinstance(part, Signal) else "")
    return tuple(map(folded, texts))
