"""Folders of weights, written completely or not at all, and never over what something else wrote."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import safetensors

from popi_jax.errors import UserError, first_line

_LIST = "export.json"


@contextlib.contextmanager
def new(folder: pathlib.Path, texts: Mapping[str, str] | None = None) -> Iterator[pathlib.Path]:
    """Yields a folder, which takes the place of `folder` if the block ends without an error.

    If the block fails, `folder` stays as it was. The new folder has files of these names and texts, and gets a
    list of its files, `export.json`. What a killed process left beside the folder is removed or put back.

    Raises:
        UserError: `check_replaceable` refuses the folder, or it cannot be written.
    """
    folder = folder.resolve()
    check_replaceable(folder)
    scratch, old = (folder.with_name(f".popi_jax_{state}_{folder.name}") for state in ("unfinished", "replaced"))
    try:
        _put_back(folder, scratch, old)
        scratch.mkdir(parents=True)
        for name, text in (texts or {}).items():
            (scratch / name).write_text(text, encoding="utf-8")
        yield scratch
        names = sorted(path.name for path in scratch.iterdir())
        (scratch / _LIST).write_text(json.dumps({"files": names}, indent=2) + "\n", encoding="utf-8")
        for name in names:  # safetensors lets only the owner read its files; the umask has set the mode of the list.
            if (scratch / name).is_file():
                shutil.copymode(scratch / _LIST, scratch / name)
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{folder}: cannot be written ({reason}); free space, or choose another folder") from error
    finally:
        _put_back(folder, scratch, old)


def _put_back(folder: pathlib.Path, scratch: pathlib.Path, old: pathlib.Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)
    for path in (scratch, old):
        shutil.rmtree(path, ignore_errors=True)


def check_replaceable(folder: pathlib.Path) -> None:
    """Raises UserError unless the folder is missing, empty, or one that `new` made and nothing was added to."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; choose another")
    try:
        own = json.loads((folder / _LIST).read_text(encoding="utf-8"))["files"] if (folder / _LIST).exists() else []
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        own = []
    for path in sorted(folder.iterdir()):
        if path.name not in {_LIST, *map(str, own)}:
            raise UserError(f"{folder}: {path.name} there is not from an export; choose another folder, or remove it")
