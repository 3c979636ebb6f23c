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
from popi_jax import checkpoint
from popi_jax import config as config_lib
from popi_jax.config import Config
from popi_jax.data import files
from popi_jax.errors import UserError
from popi_jax.evaluation import final, stored
from popi_jax.training import metrics

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


def check_claim(workdir: pathlib.Path, config: Config) -> None:
    """Raises UserError if the workdir keeps something of a run of another config."""
    bound = {key: values for key, values in _changed(workdir, config).items() if not key.startswith(_FREE)}
    if bound and _keeps(workdir):
        raise UserError(
            f"{workdir / 'config.json'}: this workdir has a run of another config: {_shown(bound)};"
            " choose another --workdir"
        )


def claim(workdir: pathlib.Path, config: Config, inputs: Mapping[str, str]) -> None:
    """Writes the run's config.json and environment.json; UserError as `check_claim`.

    Args:
        workdir: the run's folder.
        config: the run's settings.
        inputs: the fingerprints of what the run reads, see `setup.read_inputs`.
    """
    check_claim(workdir, config)
    changed = [key for key in _changed(workdir, config) if not key.startswith(_ASIDE)]
    if jax.process_index() == 0 and (changed or _other_inputs(workdir, inputs)):
        (workdir / "results.json").unlink(missing_ok=True)  # It has results of earlier eval settings or inputs.
    describe(workdir, config, inputs)


def one_process(mode: str) -> None:
    """Raises UserError in a run of several processes, each of which would repeat the whole mode."""
    if jax.process_count() > 1:
        raise UserError(f"--mode={mode} runs in a single process; leave out --distributed")


def describe(folder: pathlib.Path, config: Config, inputs: Mapping[str, str]) -> None:
    """Writes config.json and environment.json, which say how to reproduce the contents of the folder."""
    write_environment(folder, inputs)  # First: it says that the rest is ours.
    files.write_json(folder / "config.json", config.model_dump(mode="json"))


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


def check_trained(name: str, trained: Mapping[str, Any], config: Config) -> None:
    """Raises UserError if a checkpoint was trained with another config, whatever config.json says."""
    bound = {key: v for key, v in _differences(trained, config).items() if not key.startswith(_FREE)}
    if bound:
        raise UserError(
            f"{name}: its checkpoint was trained with another config: {_shown(bound)}; choose another --workdir"
        )


def finished_row(workdir: pathlib.Path, config: Config, inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the row of results.json of a finished run of this config and these inputs; None if there is none.

    None, too, if its files changed since it was written.
    """
    results = stored.results(workdir)
    if results is None:
        return None
    if bound := {key: values for key, values in _changed(workdir, config).items() if not key.startswith(_ASIDE)}:
        print(f"{workdir}: its results are of another config: {_shown(bound)}; running it again")
        return None
    if _inputs_of(workdir) is None:
        print(f"{workdir}: environment.json has no fingerprints of its inputs; its row is taken unchecked")
    elif other := _other_inputs(workdir, inputs):
        print(f"{workdir}: since it finished, its inputs changed ({', '.join(other)}); running it again")
        return None
    if "crc32" not in results:
        print(f"{workdir}: results.json has no checksum; its row is taken unchecked")
    elif results["crc32"] != final.checksum(workdir, results["rows"]):
        print(f"{workdir}: since it finished, results.json or a file that it sums up changed; running it again")
        return None
    return results["rows"][0]


def write_environment(workdir: pathlib.Path, inputs: Mapping[str, str]) -> None:
    """Writes environment.json: versions, git commit, devices, command and time of this start, and its inputs."""
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
        "inputs": dict(inputs),
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


def _keeps(workdir: pathlib.Path) -> bool:
    """Whether the workdir has something to keep. A run that has saved nothing may start again with another config."""
    kept = [workdir / name for name in ("results.json", metrics.METRICS_FILE)]
    return any(path.exists() and path.stat().st_size for path in kept) or bool(
        checkpoint.steps(workdir / "checkpoints")
    )


def _other_inputs(workdir: pathlib.Path, inputs: Mapping[str, str]) -> list[str]:
    """Returns the names of the inputs that differ from those in environment.json; [] if it has none."""
    there = _inputs_of(workdir)
    if there is None:
        return []
    return sorted(name for name in there.keys() | inputs.keys() if there.get(name) != inputs.get(name))


def _inputs_of(workdir: pathlib.Path) -> dict[str, str] | None:
    there = (files.read_json(workdir / "environment.json") or {}).get("inputs")
    return there if isinstance(there, dict) else None


def _changed(workdir: pathlib.Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the keys whose values in the workdir's config.json differ, with both values; {} without such a file."""
    there = files.read_json(workdir / "config.json", "remove the file and repeat the run's own command")
    return {} if there is None else _differences(there, config)


def _differences(there: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    before, now = _flat(config_lib.upgraded(there)), _flat(config.model_dump(mode="json"))
    return {k: (before.get(k), now.get(k)) for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)}


def _shown(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"config.{key} ({there!r} there, {now!r} now)" for key, (there, now) in list(changed.items())[:3])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return out
