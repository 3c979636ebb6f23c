"""Whether both sides compute the same, according to what their checks left in WORK/check.

Both sum in float32, in different orders. Gradients are therefore compared as vectors: the norm of the difference over
the norm of the peer's.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

TOLERANCE = 1e-4


def compare(folder: pathlib.Path, case: str) -> dict[str, Any]:
    """The differences in one case; "agrees" says whether all are within the tolerance."""
    ours, peer = (json.loads((folder / f"{case}_{side}.json").read_text(encoding="utf-8")) for side in ("ours", "peer"))
    if "tokens" in ours:
        return compare_tokens(ours["tokens"], peer["tokens"])
    found: dict[str, Any] = {name: relative(ours[name], peer[name]) for name in ours}
    worst = list(found.values())
    with np.load(folder / f"{case}_ours.npz") as mine, np.load(folder / f"{case}_peer.npz") as theirs:
        if mine.files:
            found |= compare_gradients(mine, theirs)
            worst += [found["gradient"], found["worst_tensor"]]
    return found | {"values": {"ours": ours, "peer": peer}, "agrees": max(worst) <= TOLERANCE}


def relative(ours: Any, peer: Any) -> float:
    """|ours - peer| / |peer|; the largest one for lists of equal length."""
    if np.shape(ours) != np.shape(peer):
        return float("inf")
    return float(np.max(np.abs(np.subtract(ours, peer)) / np.maximum(np.abs(peer), 1e-30)))


def compare_tokens(ours: list[list[int]], peer: list[list[int]]) -> dict[str, Any]:
    """How many rows are equal, token for token, and where the first other row begins to differ."""
    same = [a == b for a, b in zip(ours, peer, strict=True)]
    first = None
    if not all(same):
        row = same.index(False)
        a, b = ours[row], peer[row]
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return {"identical_rows": sum(same), "rows": len(same), "first_difference_at": first, "agrees": all(same)}


def compare_gradients(ours: Mapping[str, np.ndarray], peer: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Relative differences of the whole gradient and of the tensor where it is largest."""
    if ours.keys() != peer.keys():
        apart = sorted(ours.keys() ^ peer.keys())[:4]
        return {"gradient": float("inf"), "worst_tensor": float("inf"), "names_differ": apart}
    distance: dict[str, float] = {}
    norm: dict[str, float] = {}
    for name, value in ours.items():
        theirs = peer[name]
        norm[name], distance[name] = float(np.linalg.norm(theirs)), float(np.linalg.norm(value - theirs))
    total = float(np.linalg.norm(list(norm.values())))
    worst = max(distance, key=lambda name: distance[name] / max(norm[name], 1e-30))
    return {
        "gradient": float(np.linalg.norm(list(distance.values()))) / total,
        "gradient_norm": total,
        "worst_tensor": distance[worst] / max(norm[worst], 1e-30),
        "worst_tensor_name": worst,
        "tensors": len(norm),
    }
