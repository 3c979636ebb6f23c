"""Checkpoints through Orbax: asynchronous, checksummed, restored onto any mesh.

Checkpoint N is the state after N steps (dicts and arrays; no typed PRNG keys: they are folded from the seed and the
step) and a record in JSON: what the caller says of the run (config, data iterator, wall seconds), every leaf's shape,
type and checksum. Orbax notices a truncated file; a flipped byte it would load in silence.
"""

import dataclasses
import functools
import json
import logging
import math
import signal
import types
import zlib
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1

from popi_jax.errors import UserError, first_line

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_SHOWN = 3  # Differences named in an error; the rest are counted.


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read: the step it was taken after, the state, and what was saved with it."""

    step: int
    state: Any
    meta: dict[str, Any]


def steps(folder: epath.PathLike) -> list[int]:
    """The steps that `folder` holds a finished checkpoint of, ascending; [] where there is no folder."""
    path = epath.Path(folder).resolve()
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.exists() else []


class Writer:
    """Writes checkpoints in the background and keeps the newest ones.

    Args:
        folder: where checkpoints go; made if missing.
        keep: how many of the newest stay.
        after: the step that the run goes on from. Later checkpoints are removed: they are damaged, or of steps that the
            run is about to take again. What a killed process left half-written goes too.
    """

    def __init__(self, folder: epath.PathLike, keep: int, after: int) -> None:
        self._checkpointer = v1.training.Checkpointer(
            epath.Path(folder).resolve(),  # Orbax refuses relative paths.
            preservation_policy=v1.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        for checkpoint in self._checkpointer.checkpoints:
            if checkpoint.step > after:
                logging.warning("removing checkpoint %d: the run goes on from step %d", checkpoint.step, after)
                self._checkpointer.delete(checkpoint.step)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts to write; returns when the arrays may be donated.

        Args:
            step: steps taken so far.
            state: pytree of jax arrays, each global (in a run of several processes).
            meta: anything that JSON holds; `restore` gives it back.
        """
        record = {"tree": _spec(state), "checksums": _checksums(state), "meta": dict(meta)}
        text = json.dumps(record)
        saved = self._checkpointer.save_checkpointables_async(
            step,
            {"state": state},
            force=True,
            custom_metadata={"record": text, "crc32": zlib.crc32(text.encode())},
        )
        if saved is None:
            raise RuntimeError(f"orbax did not write checkpoint {step}: is there a later one?")

    def wait(self) -> None:
        """Returns when all that was saved is on disk; raises what the writing raised."""
        self._checkpointer.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()


def restore(
    folder: epath.PathLike, abstract: Any, *, step: int | None = None, expect: Mapping[str, Any] | None = None
) -> Restored | None:
    """Reads the newest checkpoint that is whole, or that of `step`.

    Args:
        folder: what Writer wrote to.
        abstract: the tree that the state must have, of jax.ShapeDtypeStruct with shardings: of any mesh.
        step: this checkpoint and no other; a damaged one is then an error.
        expect: entries that the checkpoint's meta must hold, among others, e.g. the model's fingerprint. Dicts may
            nest.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        UserError: the checkpoint is of another model or config (names what differs), is missing, or none is whole.
    """
    path = epath.Path(folder).resolve()
    found = steps(path)
    if step is not None and step not in found:
        raise UserError(f"{folder} holds no checkpoint of step {step}; it has {found or 'none'}")
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
        raise UserError(f"{folder}: every checkpoint is damaged (steps {found}); remove the folder to start again")
    return None


class StopRequest:
    """Whether this run has been told to end (SIGTERM: a preemption, a time limit). Use as a context manager.

    The loop asks after each step, saves and leaves with 143. In a run of several processes JAX's own service listens in
    our place, and all agree on one step to stop after.
    """

    def __init__(self) -> None:
        self._told = False

    def __enter__(self) -> Self:
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """True from the step on that every process stops after."""
        if jax.process_count() > 1:
            self._told = self._told or bool(multihost_utils.reached_preemption_sync_point(step))
        return self._told

    def _tell(self, signum: int, frame: types.FrameType | None) -> None:
        self._told = True


class _Damaged(Exception):
    """A checkpoint that is not what was written."""


def _paths(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _spec(tree: Any) -> dict[str, str]:
    return {path: f"{np.dtype(x.dtype).name}{list(x.shape)}" for path, x in _paths(tree).items()}


def _checksum(x: jax.Array) -> jax.Array:
    """Sum over elements of bits * odd(index), modulo 2^32: any change of one element changes it, on any mesh."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits * ((index * jnp.uint32(2654435761) + jnp.uint32(1)) | jnp.uint32(1)), dtype=jnp.uint32)


def _checksums(tree: Any) -> dict[str, int]:
    leaves = _paths(tree)
    sharding = next(iter(leaves.values())).sharding
    # Every process needs the sums; left alone, XLA may place them on one device.
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    sums = _stacked_sums(replicated)(list(leaves.values()))
    return dict(zip(leaves, jax.device_get(sums).tolist(), strict=True))


@functools.cache  # One compilation per tree, not one per checkpoint.
def _stacked_sums(out_sharding: NamedSharding | None) -> Any:
    return jax.jit(lambda leaves: jnp.stack([_checksum(x) for x in leaves]), out_shardings=out_sharding)


def _read_record(path: epath.Path) -> dict[str, Any]:
    try:
        custom = v1.checkpointables_metadata(path).custom_metadata
        text = custom["record"]
        whole = zlib.crc32(text.encode()) == custom["crc32"]
    except Exception as error:  # Orbax raises whatever the broken file made it raise.
        raise _Damaged(f"its record is unreadable: {first_line(error)}") from error
    if not whole:
        raise _Damaged("its record has changed since it was written")
    return json.loads(text)


def _load(path: epath.Path, abstract: Any, record: dict[str, Any]) -> Any:
    try:
        state = v1.load_checkpointables(path, {"state": abstract})["state"]
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # Not the checkpoint's fault.
    except Exception as error:
        raise _Damaged(first_line(error.__cause__ or error)) from error  # v1 hides the reason in the cause.
    sums = _checksums(state)
    changed = [leaf for leaf, checksum in record["checksums"].items() if sums[leaf] != checksum]
    if changed:
        raise _Damaged(f"checksum of {_some(changed)} differs")
    return state


def _check_same(name: str, record: dict[str, Any], abstract: Any, expect: Mapping[str, Any]) -> None:
    there, here = record["meta"], json.loads(json.dumps(dict(expect)))  # JSON has no tuples: compare like with like.
    differences = _differences(_asked(there, here), here)
    differences = differences or _differences(record["tree"], _spec(abstract))
    if differences:
        raise UserError(
            f"{name} is a checkpoint of another model or config: {_some(differences)}; "
            "use the config that it was made with, or another --workdir"
        )


def _asked(there: Any, here: Any) -> Any:
    """What `there` holds of the keys of `here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        return {key: _asked(there[key], here[key]) for key in here.keys() & there.keys()}
    return there


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        found: list[str] = []
        for key in sorted(there.keys() | here.keys()):
            path = f"{name}.{key}" if name else key
            if key not in there or key not in here:
                found.append(f"{path} is {'missing' if key not in there else 'only'} there")
            else:
                found += _differences(there[key], here[key], path)
        return found
    return [] if there == here else [f"{name} is {there} there and {here} here"]


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
