"""Log-probabilities of query pairs under the reference. They are constant for a data set, so they are cached."""

import collections
import hashlib
import json
import logging
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np

from popi_jax.data import files, progress
from popi_jax.data.layouts import Told
from popi_jax.errors import first_line
from popi_jax.rollout.pairs import Item, PairScorer

_SAVE_EVERY = 30.0  # Seconds between two writes of an unfinished pass.


class References:
    """A cache of log pi_ref for query pairs (POPI section 2), filled in one pass.

    Args:
        scorer: scores pairs that are not cached yet, with the base model.
        folder: of the cache file.
        identity: everything that the values depend on apart from the pairs. The file holds it, and its hash is in the
            file name; each pair is found by its own hash. A file of another identity, or a damaged one, is not used.
    """

    def __init__(self, scorer: PairScorer, folder: pathlib.Path, identity: str):
        self._scorer = scorer
        self._identity = identity
        name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._path = folder / f"reference_{name}.npz"
        self._part = folder / f"unfinished_reference_{name}.npz"
        self._known = self._read()

    def remember(self, items: Sequence[Item]) -> None:
        """Computes the values that are not cached yet and saves them."""
        missing = {_item_key(item): item for item in items if _item_key(item) not in self._known}
        if not missing:
            return
        keys, found = list(missing), self._unfinished(list(missing))
        saved = time.monotonic()
        with progress.Progress("reference log-probabilities", len(keys)) as shown:
            shown.update(_count(found))

            def done(logps: np.ndarray) -> None:
                nonlocal saved
                shown.update(_count(logps))
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._write(self._part, keys, logps)
                    saved = time.monotonic()

            logps = self._scorer.logps(None, list(missing.values()), known=found, done=done)
        self._known.update(zip(keys, logps, strict=True))
        self._write(self._path, list(self._known), np.stack(list(self._known.values())))
        if jax.process_index() == 0:
            self._part.unlink(missing_ok=True)

    def _write(self, path: pathlib.Path, keys: Sequence[str], logps: np.ndarray) -> None:
        files.write_npz(path, identity=np.array(self._identity), keys=np.array(keys), logps=logps)

    def _unfinished(self, keys: Sequence[str]) -> np.ndarray:
        """Returns what an interrupted pass over the same pairs had found, NaN elsewhere."""
        unknown = np.full((len(keys), 2), np.nan, np.float32)
        if jax.process_count() > 1 or not self._part.exists():  # All processes must score the same parts.
            return unknown
        stored = self._stored(self._part)
        # Among other pairs, the parts would be others, and so would the rounding.
        return unknown if stored is None or stored[0] != keys else stored[1]

    def _read(self) -> dict[str, np.ndarray]:
        if not self._path.exists():
            if others := list(self._path.parent.glob("reference_*.npz")):
                logging.warning(
                    "%s is of another model, tokenizer, instruction or precision; computing log-probabilities again",
                    ", ".join(map(str, others)),
                )
            return {}
        stored = self._stored(self._path)
        return {} if stored is None else dict(zip(*stored, strict=True))

    def _stored(self, path: pathlib.Path) -> tuple[list[str], np.ndarray] | None:
        """Returns the keys and values of a file; None, with a warning, if it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                keys, logps = stored["keys"].tolist(), stored["logps"]
                if stored["identity"].item() != self._identity or logps.shape != (len(keys), 2):
                    raise ValueError("it holds other values")
            return keys, logps
        except Exception as error:  # A broken file can make numpy and zipfile raise any exception.
            logging.warning("%s is damaged (%s); computing its values again", path, first_line(error))
            return None

    def lookup(self, items: Sequence[Item]) -> np.ndarray:
        """Log pi_ref of y+ and y-, [items, 2], in nats. Uncached items are computed in this order and stay uncached."""
        unknown = [item for item in items if _item_key(item) not in self._known]
        fresh = self._scorer.logps(None, unknown) if unknown else ()
        known = collections.ChainMap(dict(zip(map(_item_key, unknown), fresh, strict=True)), self._known)
        return np.stack([known[_item_key(item)] for item in items])


def _count(logps: np.ndarray) -> int:
    """The number of pairs whose values are known."""
    return int(np.isfinite(logps).all(axis=1).sum())


def _item_key(item: Item) -> str:
    # JSON, because the texts may contain any separator.
    told = [None] if item.told is None else [item.told.text, *["raw signals"] * item.told.raw_signals]
    fields = [item.query.prompt, item.query.chosen, item.query.rejected, *told]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def reference_item(which: str, item: Item, signals: Told | None) -> Item:
    """The item that the reference reads for a row.

    Args:
        which: objective.reference_context; "prompt" shows the question alone.
        item: the item that the policy reads.
        signals: the user's raw signals, needed for "signals" alone.
    """
    return Item(item.query, {"prompt": None, "summary": item.told, "signals": signals}[which])
