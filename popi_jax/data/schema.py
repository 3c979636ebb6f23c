"""The types of an example: a user's signals of several kinds, the queries to answer for them, and their provenance."""

import dataclasses
from typing import Literal

SignalKind = Literal["pair", "comment", "profile"]


@dataclasses.dataclass(frozen=True)
class Signal:
    """One trace that a user left behind, s in POPI.

    Attributes:
        kind: "pair" (prompt, chosen, rejected), "comment" (prompt, text) or "profile" (text).
        prompt: the question; empty for a profile.
        chosen: the response that the user preferred; pairs only.
        rejected: the response that the user did not prefer; pairs only.
        text: the user's own words (comment) or a description of the user (profile).
        provenance: source of the signal (e.g. "student_phd.json#17"), so that tests can detect leaks.
    """

    kind: SignalKind
    prompt: str = ""
    chosen: str = ""
    rejected: str = ""
    text: str = ""
    provenance: str = ""


@dataclasses.dataclass(frozen=True)
class Query:
    """A preference triple (x, y+, y-): this user prefers `chosen` to `rejected`.

    Bootstraps resample the rows of one `group` together, for example all rows of one prompt if prompts differ in
    difficulty. If it is empty, the user's rows form a group.
    """

    prompt: str
    chosen: str
    rejected: str
    provenance: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """A user's signals, and the queries that are scored for the user.

    Attributes:
        user: identifies the example's user; never shown to a model. No two examples have the same one.
        split: "train" or "test".
        signals: read by the inference model.
        queries: the generator is trained or tested on them.
        persona: the true description of the user if the data has one, else ""; only the oracle reads it.
        person: whose signals these are, if the data makes several examples of one person; "": the user's alone. Splits
            and intervals by user go by it.
    """

    user: str
    split: str
    signals: tuple[Signal, ...]
    queries: tuple[Query, ...]
    persona: str = ""
    person: str = ""
