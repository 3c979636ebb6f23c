"""--mode=evaluate: evaluates a checkpoint on all test users, of the run's data or other data."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from popi_jax import checkpoint
from popi_jax.config import Config
from popi_jax.data import files, locks, prepared
from popi_jax.data.schema import Example
from popi_jax.errors import UserError
from popi_jax.evaluation import final
from popi_jax.modes import runfiles, setup
from popi_jax.modes.setup import Run
from popi_jax.training.steps import TrainState


def trained(config: Config, workdir: pathlib.Path, step: int | None) -> tuple[Run, TrainState, dict[str, Any]]:
    """Loads the newest checkpoint of the workdir, or that of `step`, with the record saved in it.

    Raises:
        UserError: the workdir has no such checkpoint, or holds a run of another config.
    """
    runfiles.check_use(workdir, config)
    run = setup.load(config)
    restored = run.restore(workdir, step)
    if restored is None:
        raise UserError(f"{workdir} has no checkpoint; train first with --mode=train")
    return run, *restored


def evaluate_checkpoint(
    config: Config,
    workdir: pathlib.Path,
    output: pathlib.Path | None,
    step: int | None = None,
    shared: pathlib.Path | None = None,
    signals: int | None = None,
) -> dict[str, object]:
    """Evaluates a checkpoint on all test users.

    Args:
        config: the run's config; `runfiles.check_use` says which keys may differ.
        workdir: the run's folder.
        output: the folder for results, samples and report; <workdir>/evaluation_step<N> by default.
        step: the checkpoint's step; None means the newest.
        shared: as for `train.train`.
        signals: the number of signals of each test user, see `with_signals`; None means all.

    Returns:
        The row of results.json.
    """
    if output is not None:
        _check_output(output)
    shared = workdir if shared is None else shared
    examples = dict(prepared.find(config.data, shared).examples)
    if signals is not None:
        examples["test"] = with_signals(examples["test"], signals)
    run, state, _ = trained(config, workdir, step)
    test = run.usable({"test": examples["test"]})["test"]
    run = run.fitted({"test": test})
    evaluator = run.evaluator(run.references(shared / "cache"))
    folder = workdir / f"evaluation_step{int(state.step)}" if output is None else output
    inputs = run.inputs(examples) | checkpoint_input(workdir, int(state.step))
    with locks.held(folder):
        runfiles.describe(folder, config, inputs)
        return final.finish(evaluator, folder, state, test, int(state.step))


def with_signals(examples: Sequence[Example], count: int) -> list[Example]:
    """Returns the examples with the last `count` signals of each user. A user with fewer keeps all."""
    return [dataclasses.replace(example, signals=example.signals[-count:]) for example in examples]


def checkpoint_input(workdir: pathlib.Path, step: int | None = None) -> dict[str, str]:
    """Returns the fingerprint of the newest checkpoint, or that of `step`, as an input beside those of the run."""
    return {"checkpoint": checkpoint.fingerprint(workdir / "checkpoints", step) or "none"}


def _check_output(folder: pathlib.Path) -> None:
    """Raises UserError unless the folder is missing, empty, or has an earlier evaluation."""
    files.check_folder(folder, "--output")
    there = sorted(path.name for path in folder.iterdir() if path.name != "lock") if folder.exists() else []
    of_a_run = {"checkpoints", "data", "metrics.jsonl"} & set(there)
    if there and (of_a_run or "popi_jax" not in (files.read_json(folder / "environment.json") or {})):
        raise UserError(f"--output={folder}: {there[0]} there is not from an evaluation; choose another --output")
