"""The types of an example: a user's signals of several kinds, the queries to answer for them, and their provenance."""

import dataclasses
import json
from json.encoder import encode_basestring as _quoted
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


def to_json(example: Example) -> str:
    """Serialises an example as one line of JSON: that of `json.dumps`, in a third of its time."""
    signals = ", ".join(
        [
            f'{{"kind": {_quoted(s.kind)}, "prompt": {_quoted(s.prompt)}, "chosen": {_quoted(s.chosen)}, "rejected":'
            f' {_quoted(s.rejected)}, "text": {_quoted(s.text)}, "provenance": {_quoted(s.provenance)}}}'
            for s in example.signals
        ]
    )
    queries = ", ".join(
        [
            f'{{"prompt": {prompt}, "chosen": {_quoted(q.chosen)}, "rejected": {_quoted(q.rejected)},'
            f' "provenance": {_quoted(q.provenance)}, "group": {prompt if q.group is q.prompt else _quoted(q.group)}}}'
            for q in example.queries
            for prompt in [_quoted(q.prompt)]
        ]
    )
    # Without it, the text and its hash are those of data that were prepared before it existed.
    person = f', "person": {_quoted(example.person)}' if example.person else ""
    return (
        f'{{"user": {_quoted(example.user)}, "split": {_quoted(example.split)}, "signals": [{signals}], "queries":'
        f' [{queries}], "persona": {_quoted(example.persona)}{person}}}'
    )


def from_json(text: str | bytes) -> Example:
    """Inverse of `to_json`."""
    fields = json.loads(text)
    signals = tuple(Signal(**signal) for signal in fields.pop("signals"))
    queries = tuple(Query(**query) for query in fields.pop("queries"))
    return Example(signals=signals, queries=queries, **fields)
