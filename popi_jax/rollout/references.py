"""The reference's log-probabilities of query pairs: a constant of the data set, computed once and kept."""

import collections
import hashlib
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from popi_jax.modes.setup import System
from popi_jax.rollout import pairs
from popi_jax.rollout.pairs import Item


class References:
    """log pi_ref of query pairs: a constant of the data set, computed in one pass and kept (POPI section 2).

    The file's name is a hash of all that the values depend on but the pairs; each pair is found by its own hash.
    """

    def __init__(self, system: System, folder: pathlib.Path, rows: int):
        self._system, self._rows = system, rows
        config = system.config
        identity = (
            f"{system.fingerprint}|{system.tokenizer.fingerprint}|{config.prompts.generator_instruction}"
            f"|{config.objective.logp_reduction}|{config.model.compute_dtype}|{config.model.frozen_dtype}"
        )
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
        logps = pairs.pair_logps(self._system, None, [item for _, item in missing], self._rows)
        self._known.update(zip([key for key, _ in missing], logps, strict=True))
        if jax.process_index() != 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".tmp.npz")
        np.savez(scratch, keys=np.array(list(self._known)), logps=np.stack(list(self._known.values())))
        scratch.replace(self._path)

    def lookup(self, items: Sequence[Item]) -> np.ndarray:
        """Log pi_ref of y+ and y-, [n, 2]; what `remember` has not seen is computed, in this order, and not kept."""
        unknown = [item for item in items if _item_key(item) not in self._known]
        fresh = pairs.pair_logps(self._system, None, unknown, self._rows) if unknown else ()
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


def reference_item(system: System, item: Item, signals: str) -> Item:
    """What the reference is shown for this row: the question only, unless objective.reference_context says otherwise.

    `signals` are the user's raw ones, where those are what it is shown.
    """
    which = system.config.objective.reference_context
    return Item(item.query, {"prompt": None, "summary": item.context, "signals": signals}[which])
