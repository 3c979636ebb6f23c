"""The files that describe a run, config.json and environment.json, and checks that a config fits a workdir."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

import popi_jax
from popi_jax.config import Config
from popi_jax.data import files
from popi_jax.errors import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "numpy")

# Keys that may change between two starts of a run. They do not affect its results, except for rounding.
_ASIDE = (
    "table.",
    "train.checkpoint_every",
    "train.checkpoints_kept",
    "train.profile_steps",
    "mesh.",
    "model.remat",
    "model.attention",
    "model.shape",
    "train.accumulation",  # Both accumulation keys.
)
# Keys that do not affect the weights. They may change too, but then the run is evaluated again.
_FREE = (*_ASIDE, "eval.")
# Keys that must be the same when a trained run is used: they define the model or the meaning of its metrics.
_BOUND = ("method", "schedule.name", "lora.", "objective.", "prompts.")


class Stopped(Exception):
    """The run was stopped by SIGTERM and saved a checkpoint after `step`. The same command resumes it."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; run the same command again to resume")


def claim(workdir: pathlib.Path, config: Config) -> None:
    """Writes the run's config.json and environment.json; UserError if the workdir has a run of another config."""
    changed = _changed(workdir, config)
    bound = {key: values for key, values in changed.items() if not key.startswith(_FREE)}
    if bound:
        raise UserError(
            f"{workdir / 'config.json'}: this workdir has a run of another config: {_shown(bound)};"
            " choose another --workdir"
        )
    if jax.process_index() == 0 and any(not key.startswith(_ASIDE) for key in changed):
        (workdir / "results.json").unlink(missing_ok=True)  # It has the results of the earlier eval settings.
    describe(workdir, config)


def one_process(mode: str) -> None:
    """Raises UserError in a run of several processes, each of which would repeat the whole mode."""
    if jax.process_count() > 1:
        raise UserError(f"--mode={mode} runs in a single process; leave out --distributed")


def describe(folder: pathlib.Path, config: Config) -> None:
    """Writes config.json and environment.json, which say how to reproduce the contents of the folder."""
    files.write_json(folder / "config.json", config.model_dump(mode="json"))
    write_environment(folder)


def check_use(workdir: pathlib.Path, config: Config) -> None:
    """Raises UserError if the config changes a trained run's model or the meaning of its metrics.

    Data, limits, precision, mesh and all training settings may differ.
    """
    bound = {key: values for key, values in _changed(workdir, config).items() if key.startswith(_BOUND)}
    if bound:
        raise UserError(
            f"{workdir / 'config.json'}: the run was trained with another config: {_shown(bound)};"
            f" use --config=configs/recorded.py:{workdir / 'config.json'}, or set these keys to the values there"
        )


def finished_row(workdir: pathlib.Path, config: Config) -> dict[str, Any] | None:
    """Returns the row of results.json of a finished run of this config; None if there is none."""
    results = files.read_json(workdir / "results.json")
    if results is None or any(not key.startswith(_ASIDE) for key in _changed(workdir, config)):
        return None
    return results["rows"][0]


def write_environment(workdir: pathlib.Path) -> None:
    """Writes environment.json: versions, git commit, devices, command and time of this start."""
    device = jax.devices()[0]
    environment = {
        "popi_jax": popi_jax.__version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if name in os.environ},
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    files.write_json(workdir / "environment.json", environment)


def git_commit() -> str | None:
    """Returns the commit of the running code, with "+" if files have changed since; None outside a git checkout."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changed = subprocess.run([*git, "diff", "HEAD", "--quiet"], timeout=10, check=False).returncode != 0
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed else "")


def _changed(workdir: pathlib.Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the keys whose values in the workdir's config.json differ, with both values; {} without such a file."""
    there = files.read_json(workdir / "config.json", "choose another --workdir")
    if there is None:
        return {}
    before, now = _flat(there), _flat(config.model_dump(mode="json"))
    return {k: (before.get(k), now.get(k)) for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)}


def _shown(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"config.{key} ({there!r} there, {now!r} now)" for key, (there, now) in list(changed.items())[:3])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return out
