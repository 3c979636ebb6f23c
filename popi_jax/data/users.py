"""Reads and writes users.jsonl, the format for your own data: one user per line.

{"user": "u1",
 "signals": [{"kind": "pair", "prompt": "...", "chosen": "...", "rejected": "..."},
             {"kind": "comment", "prompt": "...", "text": "..."},
             {"kind": "profile", "text": "..."}],
 "queries": [{"prompt": "...", "chosen": "...", "rejected": "..."}],
 "persona": "... (optional)"}
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from popi_jax.data import checks, files
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError, shown

FIELDS = ("user", "signals", "queries", "persona")
SIGNAL_FIELDS = {"pair": ("prompt", "chosen", "rejected"), "comment": ("prompt", "text"), "profile": ("text",)}
QUERY_FIELDS = ("prompt", "chosen", "rejected")


def read_users(path: str | pathlib.Path, split: str = "train", require_queries: bool = True) -> list[Example]:
    """Reads users.jsonl. The provenance of a signal is "FILE:LINE/signals/INDEX", and that of a query is similar.

    Args:
        path: the file. Blank lines are skipped.
        split: the split that its users belong to.
        require_queries: False if nothing reads the queries (summaries); the field may then be absent or empty.

    Raises:
        UserError: one line that names the file, the line, the field and the remedy.
    """
    path = pathlib.Path(path)
    line_of: dict[str, int] = {}
    examples = []
    for number, record in files.numbered_objects(path, "give the path of a users.jsonl file"):
        example = _parse_user(record, f"{path}:{number}", f"{path.name}:{number}", split, require_queries)
        if example.user in line_of:
            first = line_of[example.user]
            raise UserError(
                f"{path}:{number}: field 'user': {shown(example.user)} is also on line {first}; merge the two or"
                " rename one"
            )
        line_of[example.user] = number
        examples.append(example)
    if not examples:
        raise UserError(f"{path}: no users; write one JSON object per line")
    return examples


def parse_users(people: Sequence[Example | Mapping[str, Any]]) -> list[Example]:
    """Returns users that are given as in users.jsonl, without queries; UserError names the user and the field."""
    if isinstance(people, Mapping | str):
        raise UserError("users is a single user; give a list of them")
    return [
        person
        if isinstance(person, Example)
        else _parse_user(checks.as_object(person, f"users[{i}]"), f"users[{i}]", f"users[{i}]", "test", False)
        for i, person in enumerate(people)
    ]


def write_users(path: str | pathlib.Path, examples: Iterable[Example]) -> None:
    """Writes users.jsonl. `read_users` returns the same examples except for provenance, split and group."""
    files.write_jsonl(pathlib.Path(path), [_user_record(example) for example in examples])


def _parse_user(record: dict[str, Any], where: str, source: str, split: str, require_queries: bool) -> Example:
    checks.only_fields(record, FIELDS, where)
    user = checks.text_field(record, "user", where)
    signals = tuple(
        _parse_signal(value, f"{where}: signals[{i}]", f"{source}/signals/{i}")
        for i, value in enumerate(checks.list_field(record, "signals", where))
    )
    no_queries = "queries" not in record or record["queries"] == []
    values = [] if no_queries and not require_queries else checks.list_field(record, "queries", where)
    queries = tuple(
        _parse_query(value, f"{where}: queries[{i}]", f"{source}/queries/{i}") for i, value in enumerate(values)
    )
    persona = checks.text_field(record, "persona", where) if "persona" in record else ""
    return Example(user, split, signals, queries, persona)


def _parse_signal(value: Any, where: str, provenance: str) -> Signal:
    record = checks.as_object(value, where)
    kind = checks.text_field(record, "kind", where)
    if kind not in SIGNAL_FIELDS:
        raise UserError(
            f"{where}: field 'kind': unknown kind {shown(kind)}; known kinds are {', '.join(SIGNAL_FIELDS)}"
        )
    checks.only_fields(record, ("kind", *SIGNAL_FIELDS[kind]), where)
    if kind == "pair":
        return Signal("pair", provenance=provenance, **checks.pair_fields(record, where))
    text = checks.text_field(record, "text", where)
    if kind == "comment":
        return Signal("comment", prompt=checks.text_field(record, "prompt", where), text=text, provenance=provenance)
    return Signal("profile", text=text, provenance=provenance)


def _parse_query(value: Any, where: str, provenance: str) -> Query:
    record = checks.as_object(value, where)
    checks.only_fields(record, QUERY_FIELDS, where)
    return Query(provenance=provenance, **checks.pair_fields(record, where))


def _user_record(example: Example) -> dict[str, Any]:
    signals = []
    for signal in example.signals:
        fields = dataclasses.asdict(signal)
        signals.append({"kind": signal.kind} | {name: fields[name] for name in SIGNAL_FIELDS[signal.kind]})
    queries = [{"prompt": q.prompt, "chosen": q.chosen, "rejected": q.rejected} for q in example.queries]
    record: dict[str, Any] = {"user": example.user, "signals": signals, "queries": queries}
    if example.persona:
        record["persona"] = example.persona
    return record
