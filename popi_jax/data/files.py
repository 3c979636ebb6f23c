"""The one JSONL reader and the one atomic writer of the files of a run."""

import io
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from popi_jax.data import checks
from popi_jax.errors import UserError

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


def write_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line. JSON has no non-finite numbers, so they become null."""
    write_text(path, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes one indented JSON object. Non-finite numbers become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file completely or not at all. In a multi-process run, only the first process writes."""
    _write(path, text.encode())


def write_npz(path: pathlib.Path, **arrays: Any) -> None:
    """Writes arrays as an npz file, under the same rules as `write_text`."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _write(path, buffer.getvalue())


def _write(path: pathlib.Path, data: bytes) -> None:
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # Otherwise a power cut could leave an empty file under the new name.
    scratch.replace(path)


def finite(value: Any) -> Any:
    """Returns the same tree with None in place of every non-finite number."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
