"""Reads and writes the files of a run: JSON lines and whole texts. The one reader, the one atomic writer."""

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


def read_json(path: pathlib.Path, remedy: str = "remove the file and run again") -> dict[str, Any] | None:
    """The object of a JSON file, None where there is no such file; UserError for anything but an object."""
    if not path.exists():
        return None
    return checks.as_object(checks.parse_json(checks.read_text(path, remedy), str(path), remedy=remedy), str(path))


def read_jsonl(path: pathlib.Path, remedy: str = "remove the file and run again") -> list[dict[str, Any]]:
    """The objects of a JSON lines file, [] where there is no such file; UserError names a line that is none."""
    return [record for _, record in numbered_objects(path, remedy, remedy)] if path.exists() else []


def numbered_objects(
    path: pathlib.Path, if_missing: str, if_damaged: str = "mend this line"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON lines file with their line numbers, from 1; blank lines are skipped.

    Args:
        path: the file.
        if_missing: the remedy that the error names where the file cannot be read.
        if_damaged: the remedy for a line that is not JSON.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object.
    """
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(checks.read_text(path, if_missing).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield number, checks.as_object(checks.parse_json(line, str(path), number, if_damaged), where)


def write_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line; a number that is not finite becomes null, for JSON has none."""
    write_text(path, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """One JSON object, indented; a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all; in a run of several processes the first one writes."""
    _write(path, text.encode())


def write_npz(path: pathlib.Path, **arrays: Any) -> None:
    """Writes arrays as numpy's npz, whole or not at all."""
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
        os.fsync(file.fileno())  # Else a power cut could leave the new name with no content.
    scratch.replace(path)


def finite(value: Any) -> Any:
    """The same tree with null for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
