"""Which texts count as the same when training must show nothing of the test split (data.protocol = "disjoint")."""

import collections
import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from popi_jax.data.schema import Example, Query, Signal

_WORDS = 4  # Of a text's beginning.


def folded(text: str) -> str:
    """Returns the text without what makes no difference: case, and the kind and number of blanks."""
    return " ".join(text.casefold().split())


def key(*texts: str) -> int:
    """Returns 64 bits that stand for the folded texts, which are too long to keep for every row."""
    return number("\0".join(map(folded, texts)))


def number(text: str) -> int:
    """Returns 64 bits that stand for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@functools.lru_cache(4096)  # A row's own prompt is asked for several times.
def beginning(text: str) -> int:
    """Returns a number that is the same for all texts that fold to the same one: it stands for their first words."""
    return zlib.crc32(" ".join(text.split(None, _WORDS)[:_WORDS]).casefold().encode())


class Texts:
    """A set of texts, or of tuples of texts, in which folding makes no difference. It keeps 64 bits for each.

    Args:
        keys: by `key`, of tuples that are in the set.
        beginnings: by `beginning`, of the first texts of these tuples. Most texts that are not in the set begin
            otherwise, which takes a fifth of the time to see.
    """

    def __init__(self, keys: Iterable[int] = (), beginnings: Iterable[int] = ()):
        self.keys, self.beginnings = set(keys), set(beginnings)

    def add(self, *texts: str) -> None:
        """Adds the tuple of these texts."""
        self.keys.add(key(*texts))
        self.beginnings.add(beginning(texts[0]))

    def found(self, *texts: str) -> int | None:
        """Returns the key of these texts if they are in the set."""
        own = key(*texts)
        return own if own in self.keys else None


class Shown:
    """The pairs and comments of some users, including queries. Profiles are left out: one can fit many people."""

    def __init__(self, examples: Iterable[Example] = ()):
        self._texts = Texts()
        for example in examples:
            self.add(example)

    def add(self, example: Example) -> None:
        """Adds what a user shows and answers."""
        for part in (*example.signals, *example.queries):
            if _counts(part):
                self._texts.add(*_texts(part))

    @property
    def keys(self) -> set[int]:
        """64 bits for each pair and comment."""
        return self._texts.keys

    @property
    def beginnings(self) -> set[int]:
        """The beginnings of their prompts, see `Texts`."""
        return self._texts.beginnings

    def found(self, part: object) -> int | None:
        """Returns the key of a pair or comment if it is one of them."""
        return self._texts.found(*_texts(part)) if _counts(part) else None

    def __contains__(self, part: object) -> bool:
        return self.found(part) is not None


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


def _counts(part: object) -> bool:
    return isinstance(part, Query) or (isinstance(part, Signal) and part.kind != "profile")


def _texts(part: Any) -> tuple[str, ...]:
    return part.prompt, part.chosen, part.rejected, part.text if isinstance(part, Signal) else ""
