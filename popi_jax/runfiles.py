"""The files that a run leaves in its workdir beside metrics and checkpoints: config.json, results.json, JSON lines."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from popi_jax import metrics
from popi_jax.errors import UserError

# What may change between two starts of one run: it has no part in the weights.
FREE = ("eval", "table", "train.checkpoint_every", "train.checkpoints_kept", "train.profile_steps", "mesh")


class Stopped(Exception):
    """The run was told to stop (SIGTERM) and has saved itself after `step`; the same command goes on."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; run the same command again to go on")


def claim(workdir: pathlib.Path, config) -> None:
    """Writes config.json and environment.json; refuses a workdir that holds a run of another config."""
    path = workdir / "config.json"
    new = json.loads(config.to_json_best_effort())
    if path.exists():
        old = json.loads(path.read_text())
        before, now = _flat(old), _flat(new)
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and not k.startswith(FREE))
        if keys:
            shown = ", ".join(f"config.{k} ({before.get(k)!r} there, {now.get(k)!r} now)" for k in keys[:3])
            raise UserError(f"{path}: this workdir holds a run of another config: {shown}; choose another --workdir")
    write_text(path, json.dumps(new, indent=2) + "\n")
    metrics.write_environment(workdir)


def write_results(workdir: pathlib.Path, config, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes results.json, schema 1."""
    results = {"schema": 1, "config": config.name, "dataset": config.data.dataset, "split": "test", "rows": list(rows)}
    write_text(workdir / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def finished_row(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The row of a run that has finished, None if there is none."""
    path = workdir / "results.json"
    return json.loads(path.read_text())["rows"][0] if path.exists() else None


def write_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all; in a run of several processes the first one writes."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return out
