"""The one shape of an example: a user's heterogeneous signals, the queries to answer for them, and their provenance."""

import dataclasses
from typing import Literal

SignalKind = Literal["pair", "comment", "profile"]


@dataclasses.dataclass(frozen=True)
class Signal:
    """One thing that a user left behind, s in POPI.

    Attributes:
        kind: "pair" (prompt, chosen, rejected), "comment" (prompt, text) or "profile" (text).
        prompt: what was asked; empty for a profile.
        chosen: the response that the user preferred; pairs only.
        rejected: the response that the user did not prefer; pairs only.
        text: what the user wrote (comment) or what is said of them (profile).
        provenance: where the signal came from (e.g. "student_phd.json#17"), so that a leak can be tested for.
    """

    kind: SignalKind
    prompt: str = ""
    chosen: str = ""
    rejected: str = ""
    text: str = ""
    provenance: str = ""


@dataclasses.dataclass(frozen=True)
class Query:
    """A preference triple (x, y+, y-): `chosen` is the response that this user prefers to `rejected`.

    Rows of one `group` are resampled together: those of one prompt, say, where prompts are what makes a test hard.
    Empty: the user's rows are.
    """

    prompt: str
    chosen: str
    rejected: str
    provenance: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """A user's signals with the queries that are scored for them.

    Attributes:
        user: identifies the user; never shown to a model.
        split: "train" or "test".
        signals: what the inference model reads.
        queries: what the generator is trained or tested on.
        persona: the true description of the user where the data has one, else ""; only the oracle reads it.
    """

    user: str
    split: str
    signals: tuple[Signal, ...]
    queries: tuple[Query, ...]
    persona: str = ""
