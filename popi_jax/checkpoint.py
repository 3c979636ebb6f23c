"""Checkpoints with Orbax: asynchronous, checksummed, restored onto any mesh.

Checkpoint N holds the state after N steps and a JSON record. The state has dicts and arrays, but no typed PRNG keys,
which are derived from the seed and the step. The record has the caller's metadata (config, data iterator, wall seconds)
and the shape, type and CRC-32C of every leaf. Orbax detects a truncated file, but loads a flipped byte silently.
"""

import atexit
import contextlib
import dataclasses
import functools
import glob
import hashlib
import inspect
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import google_crc32c
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1

from popi_jax.errors import UserError, first_line

_CHUNK = 2**20  # Bytes.
_READ_BACK_BYTES = 64 << 20  # Of each part. A small model's checkpoint is read back as a whole.
_SHOWN = 3  # The number of differences that an error names. The rest are counted.


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read: the number of steps taken, the state, and the metadata saved with it."""

    step: int
    state: Any
    meta: dict[str, Any]


def steps(folder: epath.PathLike) -> list[int]:
    """Returns the steps of the finished checkpoints in `folder`, ascending; [] without such a folder."""
    path = epath.Path(folder).resolve()
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.exists() else []


def check_folder(folder: epath.PathLike) -> None:
    """Raises UserError if Orbax cannot write checkpoints below this folder; see `_plain`."""
    if glob.has_magic(str(epath.Path(folder).resolve())) and jax.process_count() > 1:
        raise UserError(
            f"{folder}: several processes cannot write checkpoints to a path with *, ? or [; choose another --workdir"
        )


def _plain(folder: epath.PathLike) -> epath.Path:
    """Returns an absolute path of the folder that Orbax can use.

    Orbax 0.12.8 looks for a checkpoint's parts with a glob of the whole path. With a bracket in it, it finds none, and
    a checkpoint without its arrays counts as finished. Such a folder gets a link, which processes would not share.
    """
    path = epath.Path(folder).resolve()
    return _link(path) if glob.has_magic(str(path)) else path


@functools.cache
def _link(path: epath.Path) -> epath.Path:
    links = tempfile.mkdtemp(prefix="popi_jax_")
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    link = epath.Path(links) / "checkpoints"
    os.symlink(path, link, target_is_directory=True)
    return link


def fingerprint(folder: epath.PathLike, step: int | None = None) -> str | None:
    """Returns a hash that identifies the newest checkpoint, or that of `step`; None if it is missing or damaged."""
    path = _plain(folder)
    found = steps(path) if step is None else [step]
    try:
        return hashlib.sha256(json.dumps(_read_record(path / str(found[-1]))).encode()).hexdigest() if found else None
    except _Damaged:
        return None


class Writer:
    """Writes checkpoints in the background and keeps the newest ones.

    Args:
        folder: the folder for checkpoints; created if missing.
        keep: the number of newest checkpoints to keep.
        after: the step that the run resumes from. Later checkpoints are removed, because they are damaged or the run is
            about to repeat their steps. Incomplete checkpoints of a killed process are removed too.
    """

    def __init__(self, folder: epath.PathLike, keep: int, after: int) -> None:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        self._folder, self._reads_back = _plain(folder), after == 0
        self._checkpointer = v1.training.Checkpointer(
            self._folder,
            preservation_policy=v1.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        for checkpoint in self._checkpointer.checkpoints:
            if checkpoint.step > after:
                logging.warning("removing checkpoint %d: the run resumes from step %d", checkpoint.step, after)
                self._checkpointer.delete(checkpoint.step)

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; returns when the arrays may be donated.

        The run's first checkpoint is read back, so that a folder that loses data is found before hours of training.

        Args:
            step: the number of steps taken so far.
            state: trees of global jax arrays.
            meta: metadata that JSON can hold; `restore` returns it.
        """
        record = {"tree": _spec(state), "crc32c": _checksums(state), "meta": dict(meta)}
        text = json.dumps(record)
        saved = self._checkpointer.save_checkpointables_async(
            step,
            {"state": state},
            force=True,
            custom_metadata={"record": text, "crc32": zlib.crc32(text.encode())},
        )
        if saved is None:
            raise RuntimeError(f"Orbax did not write checkpoint {step}; there may be a later one")
        if self._reads_back:
            self._reads_back = False
            self.wait()
            self._read_back(step, state)

    def _read_back(self, step: int, state: Mapping[str, Any]) -> None:
        """Reads the parts of a checkpoint that are small; UserError if they are not those of the state."""
        small = {key: tree for key, tree in state.items() if _nbytes(tree) <= _READ_BACK_BYTES}
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small)
        path, context = self._folder / str(step), v1.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                _load(path, like, _read_record(path))
        except _Damaged as error:
            raise UserError(
                f"{path} is not what was written ({error}); choose a --workdir on another file system"
            ) from error

    def wait(self) -> None:
        """Waits until all checkpoints are on disk; raises any error of the background writes."""
        self._checkpointer.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()


def restore(
    folder: epath.PathLike, abstract: Any, *, step: int | None = None, expect: Mapping[str, Any] | None = None
) -> Restored | None:
    """Reads the newest checkpoint that is not damaged, or that of `step`.

    Args:
        folder: the Writer's folder.
        abstract: the expected state, a tree of jax.ShapeDtypeStruct with shardings on any mesh.
        step: the only checkpoint to try; it is an error if it is missing or damaged.
        expect: entries that the checkpoint's metadata must contain, e.g. the model's fingerprint. Dicts may nest.

    Returns:
        The checkpoint; None if there is none at all.

    Raises:
        UserError: the checkpoint is of another model or config (the message says what differs), the requested one is
            missing, or all are damaged.
    """
    path = _plain(folder)
    found = steps(path)
    if step is not None and step not in found:
        raise UserError(f"{folder} has no checkpoint of step {step}; available steps: {found or 'none'}")
    for candidate in [step] if step is not None else reversed(found):
        try:
            record = _read_record(path / str(candidate))
            _check_same(f"{folder}/{candidate}", record, abstract, expect or {})
            return Restored(candidate, _load(path / str(candidate), abstract, record), record["meta"])
        except _Damaged as error:
            if step is not None:
                raise UserError(f"{folder}: checkpoint {step} is damaged ({error}); choose another step") from error
            logging.warning("checkpoint %d in %s is damaged (%s); trying the one before it", candidate, folder, error)
    if found:
        raise UserError(f"{folder}: all checkpoints are damaged (steps {found}); remove the folder to start again")
    return None


class _Damaged(Exception):
    """The checkpoint differs from what was written."""


def _paths(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _spec(tree: Any) -> dict[str, str]:
    return {path: f"{np.dtype(x.dtype).name}{list(x.shape)}" for path, x in _paths(tree).items()}


def _checksums(tree: Any) -> dict[str, int]:
    """Returns the CRC-32C of every array's bytes in C order, on any mesh and with any number of processes.

    A CRC is linear: that of the whole is the exclusive or of those of the processes' parts, with zeros elsewhere. So no
    process needs the others' data. Each copies its own part to the host, one array at a time, and hashes as many bytes
    as the whole arrays have, at about a second per GB (zeros are written, too) or 0.3 s where it holds them all.
    """
    leaves = _paths(tree)
    parts = np.array([_of_own_part(x) for x in leaves.values()], np.uint32)
    if jax.process_count() > 1:
        parts = np.bitwise_xor.reduce(multihost_utils.process_allgather(parts), axis=0)
    return dict(zip(leaves, parts.tolist(), strict=True))


def _of_own_part(x: jax.Array) -> int:
    # The register of process 0 starts as the standard says, all others with 0; both ends are inverted.
    invert = 0 if jax.process_index() == 0 else 0xFFFFFFFF
    crc = invert
    for part in _own_part(x):
        raw = part.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, _CHUNK):  # The library takes bytes alone: a copy.
            crc = google_crc32c.extend(crc, raw[start : start + _CHUNK].tobytes())
    return crc ^ invert


def _own_part(x: jax.Array) -> Iterator[np.ndarray]:
    """Yields the rows of x, with zeros for those of other processes; of replicas, the first counts."""
    shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
    if len(shards) == 1 and shards[0].data.shape == x.shape:
        yield np.ascontiguousarray(shards[0].data)
        return
    if not shards and jax.process_index() != 0:
        return  # Zeros leave a register of 0 as it is.
    held = [(shard.index, np.asarray(shard.data)) for shard in shards]
    n_rows, *row = x.shape or (1,)
    step = max(1, _CHUNK // max(1, math.prod(row) * x.dtype.itemsize))
    for start in range(0, n_rows, step):
        block = np.zeros((min(step, n_rows - start), *row), x.dtype)
        for (rows, *rest), data in held:
            first, last, _ = rows.indices(n_rows)
            low, high = max(first, start), min(last, start + len(block))
            if low < high:
                block[(slice(low - start, high - start), *rest)] = data[low - first : high - first]
        yield block


def _read_record(path: epath.Path) -> dict[str, Any]:
    try:
        with _one_line():
            custom = v1.checkpointables_metadata(path).custom_metadata
        text = custom["record"]
        whole = zlib.crc32(text.encode()) == custom["crc32"]
    except Exception as error:  # A broken file can make Orbax raise any exception.
        raise _Damaged(f"its record is unreadable: {first_line(error)}") from error
    if not whole:
        raise _Damaged("its record was changed after it was written")
    return json.loads(text)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Keeps Orbax from printing pages about a damaged checkpoint: our own message names the reason."""
    _ignore_leftovers()
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        absl.setLevel(level)


@functools.cache
def _ignore_leftovers() -> None:
    """Ignores the errors of the tasks that a failed load leaves behind, which come up whenever these are collected."""
    logging.getLogger("asyncio").addFilter(_not_retrieved)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def unraisable(error: Any) -> None:
        if str(error.exc_value) != "Event loop is closed" and not inspect.iscoroutine(error.object):
            show(error)

    sys.unraisablehook = unraisable


def _not_retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _load(path: epath.Path, abstract: Any, record: dict[str, Any]) -> Any:
    try:
        with _one_line():
            state = v1.load_checkpointables(path, {"state": abstract})["state"]
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # Not caused by the checkpoint.
    except Exception as error:
        raise _Damaged(first_line(error.__cause__ or error)) from error  # v1 hides the reason in the cause.
    sums = _checksums(state)
    changed = [leaf for leaf, found in sums.items() if record["crc32c"][leaf] != found]
    if changed:
        raise _Damaged(f"checksum of {_some(changed)} differs")
    return state


def _check_same(name: str, record: dict[str, Any], abstract: Any, expect: Mapping[str, Any]) -> None:
    if "crc32c" not in record:
        raise UserError(
            f"{name} is a checkpoint of an earlier version, whose checksums cannot be verified; use that version, or"
            " another --workdir"
        )
    there, here = record["meta"], json.loads(json.dumps(dict(expect)))  # The record went through JSON: no tuples.
    differences = _differences(_asked(there, here), here)
    differences = differences or _differences(record["tree"], _spec(abstract))
    if differences:
        raise UserError(
            f"{name} is a checkpoint of another model or config: {_some(differences)}; "
            "use the config of that run, or another --workdir"
        )


def _asked(there: Any, here: Any) -> Any:
    """Returns the entries of `there` whose keys are in `here`, at every level."""
    if isinstance(there, dict) and isinstance(here, dict):
        return {key: _asked(there[key], here[key]) for key in here.keys() & there.keys()}
    return there


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        found: list[str] = []
        for key in sorted(there.keys() | here.keys()):
            path = f"{name}.{key}" if name else key
            if key not in there or key not in here:
                found.append(f"{path} is {'missing in' if key not in there else 'only in'} the checkpoint")
            else:
                found += _differences(there[key], here[key], path)
        return found
    return [] if there == here else [f"{name} is {there} in the checkpoint and {here} in this run"]


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
