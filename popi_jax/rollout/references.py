"""Log-probabilities of query pairs under the reference. They are constant for a data set, so they are cached."""

import collections
import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from popi_jax.data import files
from popi_jax.data.layouts import Told
from popi_jax.errors import first_line
from popi_jax.rollout.pairs import Item, PairScorer


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
        self._path = folder / f"reference_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
        self._known = self._read()

    def remember(self, items: Sequence[Item]) -> None:
        """Computes the values that are not cached yet and saves them."""
        missing = list({_item_key(item): item for item in items if _item_key(item) not in self._known}.items())
        if not missing:
            return
        logps = self._scorer.logps(None, [item for _, item in missing])
        self._known.update(zip([key for key, _ in missing], logps, strict=True))
        files.write_npz(
            self._path,
            identity=np.array(self._identity),
            keys=np.array(list(self._known)),
            logps=np.stack(list(self._known.values())),
        )

    def _read(self) -> dict[str, np.ndarray]:
        if not self._path.exists():
            if others := list(self._path.parent.glob("reference_*.npz")):
                logging.warning(
                    "%s is of another model, tokenizer, instruction or precision; computing log-probabilities again",
                    ", ".join(map(str, others)),
                )
            return {}
        try:
            with np.load(self._path, allow_pickle=False) as stored:
                keys, logps = stored["keys"].tolist(), stored["logps"]
                if stored["identity"].item() != self._identity or logps.shape != (len(keys), 2):
                    raise ValueError("it holds other values")
            return dict(zip(keys, logps, strict=True))
        except Exception as error:  # A broken file can make numpy and zipfile raise any exception.
            logging.warning("%s is damaged (%s); computing its values again", self._path, first_line(error))
            return {}

    def lookup(self, items: Sequence[Item]) -> np.ndarray:
        """Log pi_ref of y+ and y-, [items, 2], in nats. Uncached items are computed in this order and stay uncached."""
        unknown = [item for item in items if _item_key(item) not in self._known]
        fresh = self._scorer.logps(None, unknown) if unknown else ()
        known = collections.ChainMap(dict(zip(map(_item_key, unknown), fresh, strict=True)), self._known)
        return np.stack([known[_item_key(item)] for item in items])


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
