"""Whether both sides compute the same: what their checks left in WORK/check, compared.

Both are float32 sums in another order, so gradients are compared as vectors: the norm of the difference over the norm.
"""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from benchmarks import cases

TOLERANCE = 1e-4


def compare(folder: pathlib.Path, case: str) -> dict[str, Any]:
    """The differences of one case; "agrees" says whether they are within the tolerance."""
    ours, peer = (json.loads((folder / f"{case}_{side}.json").read_text(encoding="utf-8")) for side in ("ours", "peer"))
    if case == "sampling":
        return compare_tokens(ours["tokens"], peer["tokens"])
    if case == "popi_iteration":
        return compare_rewards(ours["rewards"], peer["rewards"])
    if case == "evaluation":
        differences = {name: relative(ours[name], peer[name]) for name in ours}
        return differences | {"agrees": max(differences.values()) <= TOLERANCE}
    assert case in cases.DPO
    gradients = [safetensors.numpy.load_file(folder / f"{case}_{side}.safetensors") for side in ("ours", "peer")]
    found = {"loss_ours": ours["loss"], "loss_peer": peer["loss"], "loss": relative(ours["loss"], peer["loss"])}
    found |= compare_gradients(*gradients)
    return found | {"agrees": max(found["loss"], found["gradient"], found["worst_tensor"]) <= TOLERANCE}


def relative(ours: float, peer: float) -> float:
    """|ours - peer| / |peer|."""
    return abs(ours - peer) / max(abs(peer), 1e-30)


def compare_rewards(ours: list[float], peer: list[float]) -> dict[str, Any]:
    """The relative difference of the rewards, each as it is."""
    worst = max(relative(a, b) for a, b in zip(ours, peer, strict=True))
    return {"rewards": worst, "agrees": worst <= TOLERANCE}


def compare_tokens(ours: list[list[int]], peer: list[list[int]]) -> dict[str, Any]:
    """How many of the rows are the same, token for token, and where the first one differs."""
    same = [a == b for a, b in zip(ours, peer, strict=True)]
    first = None
    if not all(same):
        row = same.index(False)
        a, b = ours[row], peer[row]
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return {"identical_rows": sum(same), "rows": len(same), "first_difference_at": first, "agrees": all(same)}


def compare_gradients(ours: dict[str, np.ndarray], peer: dict[str, np.ndarray]) -> dict[str, Any]:
    """Relative differences of the whole gradient, of its norm, and of the tensor where it is largest."""
    if ours.keys() != peer.keys():
        apart = sorted(ours.keys() ^ peer.keys())[:4]
        return {"gradient": float("inf"), "worst_tensor": float("inf"), "names_differ": apart}
    distance: dict[str, float] = {}
    norm: dict[str, float] = {}
    own = 0.0
    for name, value in ours.items():
        own += float(np.vdot(value, value))
        norm[name] = float(np.linalg.norm(peer[name]))
        distance[name] = float(np.linalg.norm(value - peer[name]))
    total = float(np.linalg.norm(list(norm.values())))
    worst = max(distance, key=lambda name: distance[name] / max(norm[name], 1e-30))
    return {
        "gradient": float(np.linalg.norm(list(distance.values()))) / total,
        "gradient_norm_ours": own**0.5,
        "gradient_norm_peer": total,
        "worst_tensor": distance[worst] / max(norm[worst], 1e-30),
        "worst_tensor_name": worst,
        "tensors": len(ours),
    }
