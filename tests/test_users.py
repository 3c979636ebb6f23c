"""users.jsonl: reading and writing it. Each mistake is one line with the place and the remedy."""

import bz2
import gzip
import json
import lzma
import pathlib
from typing import Any

import pytest

from popi_jax.data import users
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError

PAIR = {"kind": "pair", "prompt": "p", "chosen": "c", "rejected": "r"}
COMMENT = {"kind": "comment", "prompt": "p2", "text": "t2"}
PROFILE = {"kind": "profile", "text": "t3"}
QUERY = {"prompt": "q", "chosen": "yes", "rejected": "no"}


def record(**changes: Any) -> dict[str, Any]:
    merged = {"user": "u1", "signals": [PAIR, COMMENT, PROFILE], "queries": [QUERY], "persona": "kind"} | changes
    return {key: value for key, value in merged.items() if value is not ...}


def write(folder: pathlib.Path, *lines: Any) -> pathlib.Path:
    path = folder / "users.jsonl"
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8"
    )
    return path


def test_every_kind_of_signal_is_read_with_its_provenance(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, record(user="u0"), "", record())
    assert users.read_users(path, split="test")[1] == Example(
        user="u1",
        split="test",
        signals=(
            Signal("pair", prompt="p", chosen="c", rejected="r", provenance="users.jsonl:3/signals/0"),
            Signal("comment", prompt="p2", text="t2", provenance="users.jsonl:3/signals/1"),
            Signal("profile", text="t3", provenance="users.jsonl:3/signals/2"),
        ),
        queries=(Query("q", "yes", "no", provenance="users.jsonl:3/queries/0"),),
        persona="kind",
    )


def test_persona_is_optional(tmp_path: pathlib.Path) -> None:
    assert users.read_users(write(tmp_path, record(persona=...)))[0].persona == ""


def test_text_is_unchanged(tmp_path: pathlib.Path) -> None:
    text = ' "quoted"\n\n  naïve \u2028 日本 😀 '
    path = write(tmp_path, json.dumps(record(signals=[PROFILE | {"text": text}]), ensure_ascii=False))
    assert users.read_users(path)[0].signals[0].text == text


def test_a_byte_order_mark_and_windows_line_endings_are_accepted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "users.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(record()).encode() + b"\r\n" + json.dumps(record(user="u2")).encode())
    assert [example.user for example in users.read_users(path)] == ["u1", "u2"]


def test_write_and_read_are_inverse(tmp_path: pathlib.Path) -> None:
    first = users.read_users(write(tmp_path, record(), record(user="ü2", persona=..., signals=[PROFILE])))
    (tmp_path / "again").mkdir()
    users.write_users(tmp_path / "again" / "users.jsonl", first)
    assert users.read_users(tmp_path / "again" / "users.jsonl") == first


@pytest.mark.parametrize("queries", [..., []])
def test_queries_may_be_missing_only_if_not_required(tmp_path: pathlib.Path, queries: Any) -> None:
    path = write(tmp_path, record(queries=queries))
    assert users.read_users(path, require_queries=False)[0].queries == ()
    with pytest.raises(UserError, match=r"users.jsonl:1: field 'queries' is"):
        users.read_users(path)


def test_queries_are_checked_even_if_not_required(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r":1: queries\[0\]: field 'rejected' is missing"):
        users.read_users(write(tmp_path, record(queries=[{"prompt": "q", "chosen": "c"}])), require_queries=False)


MISTAKES = [
    ('{"user": "u1",', r":2: not JSON \(.*\); fix"),
    ("[1]", r":2: expected an object in braces, found a list"),
    ('{"user": "a", "user": "b"}', r":2: field 'user' occurs twice"),
    (record(user=...), r":2: field 'user' is missing; add"),
    (record(user=7), r":2: field 'user' must be a string, found a number"),
    (record(user=" "), r":2: field 'user' is empty"),
    (record(user="u0"), r":2: field 'user': 'u0' is also on line 1; merge"),
    (record(age=3), r":2: unknown field 'age'; .* user, signals, queries, persona"),
    (record(persona=""), r":2: field 'persona' is empty"),
    (record(persona=None), r":2: field 'persona' must be a string, found null"),
    (record(signals=...), r":2: field 'signals' is missing"),
    (record(signals=[]), r":2: field 'signals' is an empty list; give at least one"),
    (record(signals={}), r":2: field 'signals' must be a list, found an object"),
    (record(signals=[PAIR, "x"]), r":2: signals\[1\]: expected an object in braces, found a string"),
    (
        record(signals=[PAIR | {"kind": "vote"}]),
        r":2: signals\[0\]: field 'kind': unknown kind 'vote'; .* pair",
    ),
    (record(signals=[{"text": "t"}]), r":2: signals\[0\]: field 'kind' is missing"),
    (
        record(signals=[{"kind": "pair", "prompt": "p", "chosen": "c"}]),
        r":2: signals\[0\]: field 'rejected' is missing",
    ),
    (record(signals=[PAIR | {"chosen": ""}]), r":2: signals\[0\]: field 'chosen' is empty"),
    (record(signals=[PAIR | {"chosen": "r"}]), r":2: signals\[0\]: fields 'chosen' and 'rejected' are the same"),
    (
        record(signals=[PAIR | {"text": "t"}]),
        r":2: signals\[0\]: unknown field 'text'; .* kind, prompt",
    ),
    (record(signals=[COMMENT | {"prompt": True}]), r":2: signals\[0\]: field 'prompt' must be a string, found true or"),
    (record(signals=[{"kind": "comment", "text": "t"}]), r":2: signals\[0\]: field 'prompt' is missing"),
    (record(signals=[PROFILE | {"text": "\ud800"}]), r":2: signals\[0\]: field 'text' has half a surrogate pair"),
    (record(queries="q"), r":2: field 'queries' must be a list, found a string"),
    (record(queries=[QUERY | {"label": 1.0}]), r":2: queries\[0\]: unknown field 'label'"),
    (
        record(queries=[QUERY, QUERY | {"prompt": []}]),
        r":2: queries\[1\]: field 'prompt' must be a string, found a list",
    ),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_each_error_is_one_line_with_file_line_field_and_remedy(
    tmp_path: pathlib.Path, line: Any, message: str
) -> None:
    path = write(tmp_path, record(user="u0"), line)
    with pytest.raises(UserError, match=message) as caught:
        users.read_users(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_errors_about_the_whole_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="nowhere.jsonl: no such file; give"):
        users.read_users(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        users.read_users(tmp_path)
    with pytest.raises(UserError, match="no users"):
        users.read_users(write(tmp_path, ""))
    (tmp_path / "latin.jsonl").write_bytes('{"user": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 10"):
        users.read_users(tmp_path / "latin.jsonl")


TEXT = json.dumps(record()) + "\n" + json.dumps(record(user="u2"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.encode("utf-16"), "UTF-16 or UTF-32, not UTF-8 text; convert"),
        (TEXT.encode("utf-16-le"), "UTF-16 or UTF-32, not UTF-8 text; convert"),
        (TEXT.encode("utf-16-be"), "UTF-16 or UTF-32, not UTF-8 text; convert"),
        (TEXT.encode("utf-32"), "UTF-16 or UTF-32, not UTF-8 text; convert"),
        (gzip.compress(TEXT.encode()), "compressed by gzip, not UTF-8 text; decompress"),
        (bz2.compress(TEXT.encode()), "compressed by bzip2, not UTF-8 text; decompress"),
        (lzma.compress(TEXT.encode()), "compressed by xz, not UTF-8 text; decompress"),
        (b"PAR1\x15\x04", "a Parquet file, not UTF-8 text; convert"),
        (b"", "no users; write"),
        (json.dumps([record()]).encode(), "1: JSON over several lines or in a list; write"),
        (json.dumps(record(), indent=1).encode(), "1: JSON over several lines or in a list; write"),
        (json.dumps([record()], indent=1).encode(), "1: JSON over several lines or in a list; write"),
        (TEXT.replace("\n", "\n\n,").encode(), "3: not JSON (Expecting value at column 1); fix"),
        (b'{"user": ' + b"9" * 5000 + b"}", "1: a number has too many digits; fix"),
        (b'{"user": -Infinity}', "1: field 'user' must be a string, found a number; put"),
        (b'{"user": ' + b"[" * 100_000, "1: JSON is nested too deeply; fix"),
        (b"{" + b'"a": {' * 100_000, "1: JSON is nested too deeply; fix"),
    ],
)
def test_a_file_of_another_kind_is_one_line_with_the_remedy(tmp_path: pathlib.Path, data: bytes, message: str) -> None:
    path = tmp_path / "users.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        users.read_users(path)
    assert str(caught.value).removeprefix(str(path)).removeprefix(":").strip().startswith(message)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_device_is_not_read() -> None:
    with pytest.raises(UserError, match="/dev/zero: is a device, not a file; give"):
        users.read_users("/dev/zero")


def test_a_message_is_one_line_whatever_the_file_is_called(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"a\\nb\\x1b\[31m: no such file") as caught:
        users.read_users(tmp_path / "a\nb\x1b[31m")
    assert str(caught.value).isprintable()
    with pytest.raises(UserError, match=r"a\\x00b: cannot be read \(embedded null byte\); give"):
        users.read_users("a\0b")
