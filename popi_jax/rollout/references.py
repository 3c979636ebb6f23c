"""The reference's log-probabilities of query pairs: a constant of the data set, computed once and kept."""

import collections
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from popi_jax.data import files
from popi_jax.rollout.pairs import Item, PairScorer


class References:
    """log pi_ref of query pairs: a constant of the data set, computed in one pass and kept (POPI section 2).

    Args:
        scorer: scores the pairs that are not known yet, with the base model.
        folder: where the values are kept.
        identity: everything that the values depend on but the pairs; its hash is part of the file's name. Each pair is
            found by its own hash.
    """

    def __init__(self, scorer: PairScorer, folder: pathlib.Path, identity: str):
        self._scorer = scorer
        self._path = folder / f"reference_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
        self._known: dict[str, np.ndarray] = {}
        if self._path.exists():
            with np.load(self._path, allow_pickle=False) as stored:
                self._known = dict(zip(stored["keys"].tolist(), stored["logps"], strict=True))

    def remember(self, items: Sequence[Item]) -> None:
        """Computes what is not known yet and writes it down."""
        missing = list({_item_key(item): item for item in items if _item_key(item) not in self._known}.items())
        if not missing:
            return
        logps = self._scorer.logps(None, [item for _, item in missing])
        self._known.update(zip([key for key, _ in missing], logps, strict=True))
        files.write_npz(self._path, keys=np.array(list(self._known)), logps=np.stack(list(self._known.values())))

    def lookup(self, items: Sequence[Item]) -> np.ndarray:
        """Log pi_ref of y+ and y-, [n, 2]; what `remember` has not seen is computed, in this order, and not kept."""
        unknown = [item for item in items if _item_key(item) not in self._known]
        fresh = self._scorer.logps(None, unknown) if unknown else ()
        known = collections.ChainMap(dict(zip(map(_item_key, unknown), fresh, strict=True)), self._known)
        return np.stack([known[_item_key(item)] for item in items])


def _item_key(item: Item) -> str:
    parts = (
        item.query.prompt,
        item.query.chosen,
        item.query.rejected,
        "" if item.context is None else "\0" + item.context,
    )
    return hashlib.sha256("\1".join(parts).encode()).hexdigest()


def reference_item(which: str, item: Item, signals: str) -> Item:
    """What the reference is shown for a row.

    Args:
        which: objective.reference_context; "prompt" shows the question alone.
        item: the row, as the policy reads it.
        signals: the user's raw signals, for "signals".
    """
    return Item(item.query, {"prompt": None, "summary": item.context, "signals": signals}[which])
