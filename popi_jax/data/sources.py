"""Digests of what prepared data are made from: the source files, and the code that reads them."""

import functools
import hashlib
import pathlib

from popi_jax.config import Data
from popi_jax.data import parts, tables, workers
from popi_jax.errors import UserError

_CODE = pathlib.Path(__file__).parent


def digests(data: Data) -> dict[str, dict[str, str]]:
    """Returns the SHA-256 of the files in data.path and data.test_path, by setting and path inside.

    A source that cannot be read has none: its data set's loader says what is wrong.
    """
    found = {}
    for name, source in (("path", data.path), ("test_path", data.test_path)):
        if source:
            try:
                there = _files(source, f"data.{name}")
                found[name] = dict(zip(there, workers.threads(parts.file_digest, there.values()), strict=True))
            except (UserError, OSError):
                found[name] = {}
    return found


@functools.cache
def code_digest() -> str:
    """Returns the SHA-256 of the package's code that reads data, so that another version prepares them anew."""
    digest = hashlib.sha256()
    for path in sorted(_CODE.rglob("*.py")):
        digest.update(f"{path.relative_to(_CODE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _files(source: str, flag: str) -> dict[str, pathlib.Path]:
    """Returns the files of a source that have data or its licence, by their paths inside."""
    root = tables.local(source, flag)
    if not root.is_dir():
        beside = root.with_name(tables.CARD)
        return {path.name: path for path in (root, beside) if path.is_file()}
    names = [name for name in tables.names_below(root) if name.lower().endswith(tables.READ) or name == tables.CARD]
    return {name: root / name for name in sorted(names)}
