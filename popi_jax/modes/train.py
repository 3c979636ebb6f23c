"""--mode=train, the training loop: data -> batch -> step -> metrics -> evaluation -> checkpoint."""

import collections
import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from popi_jax import checkpoint
from popi_jax.config import Config
from popi_jax.data import card, files, locks, prepared
from popi_jax.data.schema import Example
from popi_jax.errors import UserError
from popi_jax.evaluation import final
from popi_jax.evaluation.evaluate import Evaluator
from popi_jax.modes import programs, runfiles, setup, signals
from popi_jax.modes.setup import Run
from popi_jax.rollout import preview
from popi_jax.rollout.pairs import Item
from popi_jax.training import metrics, schedule
from popi_jax.training.batches import BatchMaker, WrittenSummaries
from popi_jax.training.steps import TrainState


def train(config: Config, workdir: pathlib.Path, shared: pathlib.Path | None = None) -> dict[str, object]:
    """Trains, or resumes the run in the workdir, then evaluates and writes the results and the report.

    Args:
        config: the run's settings.
        workdir: the folder for the run's files.
        shared: the folder where the runs of a table share prepared data and reference log-probabilities; the workdir
            by default.

    Returns:
        The run's row of results.json.

    Raises:
        UserError: the config or the data have a mistake, a metric is not finite, or another process writes the workdir.
        Stopped: a signal stopped the run.
    """
    files.check_folder(workdir, "--workdir")
    checkpoint.check_folder(workdir)
    runfiles.check_claim(workdir, config)
    signals.say(lambda: _saved(workdir))
    # All that may be a mistake is read before the run claims the workdir.
    shared = workdir if shared is None else shared
    found = prepared.find(config.data, shared)
    run = setup.load(config)
    dropped = collections.Counter(found.dropped)
    examples = run.usable(found.examples, dropped)
    run = run.fitted(examples)
    print(preview.of_examples(config, run.encoder, examples["train"]))
    with locks.held(workdir):
        inputs, total = run.inputs(found.examples) | setup.adapters(config), schedule.total_steps(config)
        begin = _start(run, workdir, inputs) if total else _Start(run.initial_state())
        runfiles.claim(workdir, config, inputs)
        whole = all(part.all for part in examples.values())
        own = found.card if whole else card.make(config.data, examples, dropped, prepared.licence(config.data))
        card.write(workdir, {**own, "dropped": dict(dropped)})
        sources = {split: examples[split].of(source) for split, source in prepared.stored(found).items()}
        evaluator = run.evaluator(run.references(shared / "cache"))
        state = _loop(run, workdir, sources, evaluator, begin, inputs) if total else begin.state
        return final.finish(evaluator, workdir, state, list(sources["test"]), total)


def _saved(workdir: pathlib.Path) -> str:
    """Says what a run leaves if it ends now."""
    there = checkpoint.steps(workdir / "checkpoints")
    return f"{workdir} has the checkpoint of step {there[-1]}" if there else f"{workdir} has no checkpoint yet"


# The fields of a checkpoint's metadata that `_Start` has, too.
_RECORDED = ("wall_s", "iterator", "written", "metrics", "evaluates")


@dataclasses.dataclass
class _Start:
    """Where the loop starts. `evaluates`: a signal broke off the evaluation of this state."""

    state: TrainState
    step: int = 0
    wall_s: float = 0.0
    iterator: Any = None
    written: str | None = None
    metrics: Sequence[int] | None = None
    evaluates: bool = False


def _start(run: Run, workdir: pathlib.Path, inputs: Mapping[str, str]) -> _Start:
    """Restores the newest checkpoint of the workdir, if it has one; UserError if it is of another run."""
    restored = run.restore(workdir)
    if restored is None:
        return _Start(run.initial_state())
    state, meta = restored
    runfiles.check_trained(str(workdir), meta["config"], run.config)
    if meta["data"] != inputs["train"]:
        raise UserError(
            f"{workdir}: the checkpoint was trained on other examples than config.data gives now; restore those"
            " examples, or choose another --workdir"
        )
    if meta.get("adapters", {}) != setup.adapters(run.config):
        raise UserError(
            f"{workdir}: the checkpoint started from another adapter than config.lora.init_inference and"
            " .init_generator name now; restore it, or choose another --workdir"
        )
    if meta["test"] != inputs["test"]:
        print(
            "the test examples changed since the checkpoint; earlier evaluations in metrics.jsonl are of the old ones"
        )
    print(f"resuming from the checkpoint of step {int(state.step)}")
    return _Start(state, int(state.step), **{field: meta[field] for field in _RECORDED})


def _loop(
    run: Run,
    workdir: pathlib.Path,
    sources: Mapping[str, Sequence[Example]],
    evaluator: Evaluator,
    begin: _Start,
    inputs: Mapping[str, str],
) -> TrainState:
    config, references = run.config, evaluator.references
    total = schedule.total_steps(config)
    iterator = prepared.training_iterator(sources["train"], config.train.users_per_step, config.seed)
    state, start = begin.state, begin.step
    if begin.iterator is not None:
        iterator.set_state(begin.iterator)
    print(metrics.parameter_overview(state.theta, programs.mean_and_std))
    if config.objective.reference_context == "prompt":
        references.remember([Item(query, None) for example in sources["train"] for query in example.queries])
    written = WrittenSummaries(workdir / "written_summaries.jsonl", start, begin.written)
    maker = BatchMaker(config, run.sampler, run.scorer, references, written)
    # All inputs of a step are on the mesh already. Without jit, its constants count as transfers too.
    guard = "allow" if jax.config.values["jax_disable_jit"] else "disallow"
    with (
        signals.Deferral() as stop,  # Ends last, so that the checkpoint is complete when it raises Stopped.
        checkpoint.Writer(workdir / "checkpoints", config.train.checkpoints_kept, after=start) as writer,
        metrics.MetricWriter(workdir, start, begin.wall_s, begin.metrics) as log,
        metrics.Progress(total, start, config.name) as progress,
        metrics.Profiler(workdir / "profile", config.train.profile_steps) as profiler,
    ):

        def evaluated(step: int) -> bool:
            """Evaluates the state after `step`; returns False if a signal breaks the evaluation off."""
            started = time.perf_counter()
            with log.pause():
                found = stop.breakable(lambda: evaluator.periodic(state.phi, state.theta, sources["test"], step))
            if found is not None:
                log.write(step, found | {"evaluate_s": time.perf_counter() - started})
            return found is not None

        if begin.evaluates:
            evaluated(start)
        pending: tuple[int, dict[str, Any]] | None = None
        for step in range(start, total):
            profiler.enter(step, state)
            kind = schedule.step_kind(config, step)
            compiling = metrics.CompileClock()
            with jax.profiler.StepTraceAnnotation(kind, step_num=step):
                batch, counts = maker.make(state.phi, state.theta, next(iterator), step, kind)
                with jax.transfer_guard(guard):
                    state, scalars = run.programs.train_steps[kind](state, run.base, batch)
            # Logs the previous step's metrics while this step runs.
            _write(log, progress, pending)
            pending = (step + 1, scalars | counts | {"compile_s": compiling.seconds()})
            last, saves = step + 1 == total, (step + 1) % config.train.checkpoint_every == 0
            evaluates = bool(config.eval.every) and (step + 1) % config.eval.every == 0 and not last
            # Asked once per step. A later signal takes effect at the next step, unless it breaks off the evaluation.
            stops = stop.reached(step + 1)
            if saves or last or evaluates or stops:
                _write(log, progress, pending)
                pending = None
            if evaluates:
                evaluates = not evaluated(step + 1)
                stops = stops or evaluates
            if saves or last or stops:
                meta = run.identity | {
                    "data": inputs["train"],
                    "test": inputs["test"],
                    "adapters": setup.adapters(config),
                    "iterator": iterator.get_state(),
                    "written": written.digest(),
                    "metrics": log.written,
                    "evaluates": evaluates,
                    "wall_s": log.wall_s(),
                    "config": config.model_dump(mode="json"),
                }
                with log.pause():
                    writer.save(step + 1, vars(state), meta)
            if stops:
                break
    return state


def _write(log: metrics.MetricWriter, progress: metrics.Progress, pending: tuple[int, dict[str, Any]] | None) -> None:
    if pending is None:
        return
    step, scalars = pending
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    metrics.check_finite(step, values)
    progress.update(step, log.write(step, values))
