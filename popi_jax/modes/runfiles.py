"""The files that a run leaves in its workdir beside metrics and checkpoints: config.json, results.json, JSON lines."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from popi_jax.errors import UserError
from popi_jax.training import metrics

# What may change between two starts of one run and leaves its results as they are, but for rounding.
_ASIDE = (
    "table.",
    "train.checkpoint_every",
    "train.checkpoints_kept",
    "train.profile_steps",
    "mesh.",
    "model.remat",
    "model.attention",
    "model.shape",
    "train.accumulation",  # Of either model.
)
# What has no part in the weights: it may change too, and the evaluation is done again.
_FREE = (*_ASIDE, "eval.")
# What a trained run must be used with: another value would be another model, or another meaning of its figures.
_BOUND = ("method", "schedule.name", "lora.", "objective.", "prompts.")


class Stopped(Exception):
    """The run was told to stop (SIGTERM) and has saved itself after `step`; the same command goes on."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; run the same command again to go on")


def claim(workdir: pathlib.Path, config) -> None:
    """Describes the run in its workdir; refuses a workdir that holds a run of another config."""
    changed = _changed(workdir, config)
    bound = {key: values for key, values in changed.items() if not key.startswith(_FREE)}
    if bound:
        raise UserError(
            f"{workdir / 'config.json'}: this workdir holds a run of another config: {_shown(bound)};"
            " choose another --workdir"
        )
    if jax.process_index() == 0 and any(not key.startswith(_ASIDE) for key in changed):
        (workdir / "results.json").unlink(missing_ok=True)  # They are of the evaluation that was asked for before.
    describe(workdir, config)


def describe(folder: pathlib.Path, config) -> None:
    """Writes config.json and environment.json: how to make again what the folder holds."""
    write_text(folder / "config.json", json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n")
    metrics.write_environment(folder)


def check_use(workdir: pathlib.Path, config) -> None:
    """Refuses to use a trained run with a config that makes something else of its weights or its figures.

    Data, limits, precision, mesh and everything of the training itself may differ.
    """
    bound = {key: values for key, values in _changed(workdir, config).items() if key.startswith(_BOUND)}
    if bound:
        raise UserError(
            f"{workdir / 'config.json'}: the run was trained with another config: {_shown(bound)};"
            f" use --config=configs/recorded.py:{workdir / 'config.json'}, or set these keys as they are there"
        )


def write_results(workdir: pathlib.Path, config, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes results.json, schema 1; a number that is not finite becomes null."""
    results = {"schema": 1, "config": config.name, "dataset": config.data.dataset, "split": "test", "rows": list(rows)}
    write_text(workdir / "results.json", json.dumps(_finite(results), indent=2, ensure_ascii=False) + "\n")


def finished_row(workdir: pathlib.Path, config) -> dict[str, Any] | None:
    """The row of a run of this config that has finished, None if there is none."""
    path = workdir / "results.json"
    if not path.exists() or any(not key.startswith(_ASIDE) for key in _changed(workdir, config)):
        return None
    return json.loads(path.read_text(encoding="utf-8"))["rows"][0]


def write_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line; a number that is not finite becomes null, for JSON has none."""
    write_text(path, "".join(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """What `write_jsonl` wrote, [] where there is no such file; UserError that names a line that is not an object."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = []
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); remove the file and run again") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; remove the file and run again")
        rows.append(row)
    return rows


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all; in a run of several processes the first one writes."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _changed(workdir: pathlib.Path, config) -> dict[str, tuple[Any, Any]]:
    """The keys in which the workdir's config.json differs from the config, with both values; {} if there is none."""
    path = workdir / "config.json"
    if not path.exists():
        return {}
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); choose another --workdir") from error
    before, now = _flat(there), _flat(json.loads(config.to_json_best_effort()))
    return {k: (before.get(k), now.get(k)) for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)}


def _shown(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"config.{key} ({there!r} there, {now!r} now)" for key, (there, now) in list(changed.items())[:3])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return out
