"""The one JSONL reader and the one writer of the files of a run: completely or not at all."""

import contextlib
import io
import json
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from popi_jax.data import checks
from popi_jax.errors import UserError, first_line

_UNFINISHED = ".popi_jax_unfinished_"  # Begins the name of a file that is being written.
FIX = "fix this line"  # The remedy for a file that the user wrote.


def read_json(path: pathlib.Path, remedy: str = "remove the file and run again") -> dict[str, Any] | None:
    """Returns the object in a JSON file, None if the file does not exist; UserError if it is not an object."""
    if not path.exists():
        return None
    value = checks.parse_json(checks.read_text(path, remedy), str(path), remedy=remedy)
    return checks.as_object(value, str(path), remedy)


def read_jsonl(path: pathlib.Path, remedy: str = "remove the file and run again") -> list[dict[str, Any]]:
    """Returns the objects of a JSONL file, [] if it does not exist; UserError names a line that is not an object."""
    return [record for _, record in numbered_objects(path, remedy, remedy)] if path.exists() else []


def numbered_objects(
    path: pathlib.Path, if_missing: str, if_damaged: str = FIX
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a JSONL file with their line numbers, from 1. Blank lines are skipped.

    Args:
        path: the file.
        if_missing: the remedy for a file that cannot be read, for the error message.
        if_damaged: the remedy for a line that is not JSON, for the error message.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    lines = checks.read_text(path, if_missing).split("\n")  # Not splitlines: JSON strings may contain U+2028.
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if numbered and if_damaged == FIX and (numbered[0][1].startswith("[") or numbered[0][1].strip() == "{"):
        raise UserError(
            f"{path}:{numbered[0][0]}: JSON over several lines or in a list; write one object per line, for example"
            " with jq -c '.[]' for a list"
        )
    for number, line in numbered:
        value = checks.parse_json(line, str(path), number, if_damaged)
        yield number, checks.as_object(value, f"{path}:{number}", if_damaged)


def check_output(path: pathlib.Path) -> None:
    """Raises UserError unless `path` can name a file: its folder exists, and it is not a folder or a device."""
    if not path.parent.is_dir():
        raise UserError(f"--output={path}: {path.parent} is not a folder; create it, or choose another --output")
    if path.exists() and not path.is_file():
        raise UserError(f"--output={path}: not a file; choose another --output")


def check_folder(path: pathlib.Path, flag: str) -> None:
    """Raises UserError unless `path` is a folder, or one can be created there."""
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{flag}={path}: {there} is not a folder; choose another {flag}")
    if not path.exists() and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag}={path}: {there} is not writable; choose another {flag}")


def write_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line. JSON has no non-finite numbers, so they become null."""
    write_bytes(path, jsonl(rows))


def append_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends one JSON object per line, under the same rules as `append`."""
    append(path, jsonl(rows))


def append(path: pathlib.Path, data: bytes) -> None:
    """Appends to a file. If an error interrupts it, the file is as before; a kill can cut the data anywhere."""
    with _reported(path), path.open("ab", buffering=0) as file:
        before, rest = file.seek(0, os.SEEK_END), memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes one indented JSON object. Non-finite numbers become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file as UTF-8, under the same rules as `write_bytes`."""
    write_bytes(path, text.encode())


def write_npz(path: pathlib.Path, **arrays: Any) -> None:
    """Writes arrays as an npz file, under the same rules as `write_bytes`."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file completely or not at all. In a multi-process run, only the first process writes.

    A link stays a link, and an existing file keeps its mode; a new one has the mode that the umask gives.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    if jax.process_index() != 0:
        return
    path = pathlib.Path(os.path.realpath(path))
    scratch = path.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")  # No other process's, and no user's file.
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # Otherwise a power cut could leave an empty file under the new name.
            if path.exists():
                shutil.copymode(path, scratch)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Removes the files below `folder` that killed processes had not finished. The caller holds the folder's lock."""
    for path in folder.rglob(f"{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _reported(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{path}: cannot be written ({reason}); free space, or choose another place") from error


def jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns the bytes of a JSONL file with these rows."""
    return "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows).encode()


def finite(value: Any) -> Any:
    """Returns the same tree with None in place of every non-finite number."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
