"""Checks of user-written records. Every error is one line that names the place, the field and the remedy."""

import codecs
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from popi_jax.errors import UserError, first_line, shown

# The first bytes of files that are not plain text, and how to convert them. No JSON text starts with any of them.
_FORMATS = {
    codecs.BOM_UTF16_LE: ("UTF-16 or UTF-32", "convert it to UTF-8, for example with iconv"),
    codecs.BOM_UTF16_BE: ("UTF-16", "convert it to UTF-8, for example with iconv"),
    b"{\0": ("UTF-16 or UTF-32", "convert it to UTF-8, for example with iconv"),
    b"\0": ("UTF-16 or UTF-32", "convert it to UTF-8, for example with iconv"),
    b"\x1f\x8b": ("compressed by gzip", "decompress it with gunzip"),
    b"BZh": ("compressed by bzip2", "decompress it with bunzip2"),
    b"\xfd7zXZ\0": ("compressed by xz", "decompress it with unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "decompress it with unzstd"),
    b"PK\x03\x04": ("a zip archive", "unpack it with unzip"),
    b"PAR1": ("a Parquet file", "convert it, for example with pandas.read_parquet and DataFrame.to_json"),
}


def read_text(path: str | pathlib.Path, remedy: str) -> str:
    """Returns a UTF-8 file's text without its byte order mark; UserError if the file cannot be read."""
    path = pathlib.Path(path)
    try:
        if path.is_char_device():  # Reading a terminal or /dev/zero would never end.
            raise UserError(f"{path}: is a device, not a file; {remedy}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValueError as error:  # A null character in the path.
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {remedy}") from None
    for start, (kind, conversion) in _FORMATS.items():
        if data.startswith(start):
            raise UserError(f"{path}: {kind}, not UTF-8 text; {conversion}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def parse_json(text: str, where: str, line: int | None = None, remedy: str = "fix this line") -> Any:
    """Parses JSON and refuses repeated keys. The `json` module would silently keep the last one.

    Args:
        text: the JSON.
        where: the file, for the error message.
        line: the line number of `text` in the file; None if `text` is the whole file.
        remedy: how to fix text that is not JSON, for the error message.

    Raises:
        UserError: `text` is not valid JSON or repeats a key; the message names the line.
    """
    place = where if line is None else f"{where}:{line}"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for key, value in pairs:
            if key in record:
                raise UserError(f"{place}: field {shown(key)} occurs twice in one object; keep one of them")
            record[key] = value
        return record

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if line is None else place
        raise UserError(f"{place}: not JSON ({error.msg} at column {error.colno}); {remedy}") from None
    except ValueError:  # Python reads no integer of more than 4,300 digits.
        raise UserError(f"{place}: a number has too many digits; {remedy}") from None
    except RecursionError:
        raise UserError(f"{place}: JSON is nested too deeply; {remedy}") from None


def as_object(value: Any, where: str, remedy: str = "write {...}") -> dict[str, Any]:
    """Returns `value` if it is a JSON object; UserError otherwise."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object in braces, found {_kind(value)}; {remedy}")
    return value


def text_field(record: dict[str, Any], field: str, where: str, blank: bool = False) -> str:
    """Returns record[field], a string, non-blank unless `blank`; UserError otherwise."""
    if field not in record:
        raise UserError(f"{where}: field {field!r} is missing; add a non-empty string")
    value = record[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} must be a string, found {_kind(value)}; put text in quotes")
    if not blank and not value.strip():
        raise UserError(f"{where}: field {field!r} is empty; write some text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: field {field!r} has half a surrogate pair (\\ud800-\\udfff); remove it") from None
    return value


def list_field(record: dict[str, Any], field: str, where: str) -> list[Any]:
    """Returns record[field], a non-empty list; UserError otherwise."""
    if field not in record:
        raise UserError(f"{where}: field {field!r} is missing; add a list with at least one entry")
    value = record[field]
    if not isinstance(value, list):
        raise UserError(f"{where}: field {field!r} must be a list, found {_kind(value)}; put it in brackets")
    if not value:
        raise UserError(f"{where}: field {field!r} is an empty list; give at least one entry")
    return value


def only_fields(record: dict[str, Any], known: Iterable[str], where: str) -> None:
    """Raises UserError for a field that nothing reads."""
    known = tuple(known)
    for field in record:
        if field not in known:
            raise UserError(f"{where}: unknown field {shown(field)}; known fields are {', '.join(known)}")


def pair_fields(record: dict[str, Any], where: str) -> dict[str, str]:
    """Returns prompt, chosen and rejected. Equal responses state no preference and raise UserError."""
    pair = {field: text_field(record, field, where) for field in ("prompt", "chosen", "rejected")}
    if pair["chosen"] == pair["rejected"]:
        raise UserError(f"{where}: fields 'chosen' and 'rejected' are the same text; change one or remove the pair")
    return pair


def _kind(value: Any) -> str:
    """Names a JSON value's type in JSON terms."""
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names[type(value)]
