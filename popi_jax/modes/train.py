"""--mode=train, the training loop: data -> batch -> step -> metrics -> evaluation -> checkpoint."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from popi_jax import checkpoint
from popi_jax.config import Config
from popi_jax.data import prepared
from popi_jax.data.prepared import ExampleSource
from popi_jax.errors import UserError
from popi_jax.evaluation import final
from popi_jax.evaluation.evaluate import Evaluator
from popi_jax.modes import programs, runfiles, setup
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
        UserError: the config or the data have a mistake, or a metric is not finite.
        Stopped: SIGTERM stopped the run.
    """
    run = setup.load(config)
    runfiles.claim(workdir, config)
    shared = workdir if shared is None else shared
    sources = prepared.from_config(config.data, shared)
    run = run.fitted(sources)
    print(preview.of_examples(config, run.encoder, sources["train"]))
    evaluator = run.evaluator(run.references(shared / "cache"))
    total = schedule.total_steps(config)
    state = run.initial_state() if total == 0 else _loop(run, workdir, sources, evaluator)
    return final.finish(evaluator, workdir, state, list(sources["test"]), total)


def _loop(run: Run, workdir: pathlib.Path, sources: Mapping[str, ExampleSource], evaluator: Evaluator) -> TrainState:
    config, references = run.config, evaluator.references
    total = schedule.total_steps(config)
    iterator = prepared.training_iterator(sources["train"], config.train.users_per_step, config.seed)
    restored = run.restore(workdir)
    if restored is None:
        state, start, wall_s = run.initial_state(), 0, 0.0
    else:
        state, meta = restored
        if meta["data"] != sources["train"].fingerprint:
            raise UserError(
                f"{workdir}: the checkpoint was trained on other examples than config.data gives now; restore those"
                " examples, or choose another --workdir"
            )
        start, wall_s = int(state.step), meta["wall_s"]
        iterator.set_state(meta["iterator"])
        print(f"resuming from the checkpoint of step {start}")
    print(metrics.parameter_overview(state.theta, programs.mean_and_std))
    if config.objective.reference_context == "prompt":
        references.remember([Item(query, None) for example in sources["train"] for query in example.queries])
    written = WrittenSummaries(workdir / "written_summaries.jsonl")
    maker = BatchMaker(config, run.sampler, run.scorer.packer, references, written)
    # All inputs of a step are on the mesh already. Without jit, its constants count as transfers too.
    guard = "allow" if jax.config.values["jax_disable_jit"] else "disallow"
    with (
        checkpoint.Writer(workdir / "checkpoints", config.train.checkpoints_kept, after=start) as writer,
        checkpoint.StopRequest() as stop,
        metrics.MetricWriter(workdir, resume_step=start, wall_s=wall_s) as log,
        metrics.Progress(total, start, config.name) as progress,
        metrics.Profiler(workdir / "profile", config.train.profile_steps) as profiler,
    ):
        pending: tuple[int, dict[str, Any]] | None = None
        for step in range(start, total):
            profiler.enter(step, state)
            kind = schedule.step_kind(config, step)
            compiling = metrics.CompileClock()
            with jax.profiler.StepTraceAnnotation(kind, step_num=step):
                batch, counts = maker.make(state.phi, next(iterator), step, kind)
                with jax.transfer_guard(guard):
                    state, scalars = run.programs.train_steps[kind](state, run.base, batch)
            # Logs the previous step's metrics while this step runs.
            _write(log, progress, pending)
            pending = (step + 1, scalars | counts | {"compile_s": compiling.seconds()})
            last, saves = step + 1 == total, (step + 1) % config.train.checkpoint_every == 0
            evaluates = config.eval.every and (step + 1) % config.eval.every == 0 and not last
            # Asked once per step. A later signal takes effect at the next step.
            stops = stop.reached(step + 1)
            if saves or last or evaluates or stops:
                _write(log, progress, pending)
                pending = None
            if evaluates:
                started = time.perf_counter()
                with log.pause():
                    found = evaluator.periodic(state.phi, state.theta, sources["test"], step + 1)
                log.write(step + 1, found | {"evaluate_s": time.perf_counter() - started})
            if saves or last or stops:
                meta = run.identity | {
                    "data": sources["train"].fingerprint,
                    "iterator": iterator.get_state(),
                    "wall_s": log.wall_s(),
                    "config": config.model_dump(mode="json"),
                }
                with log.pause():
                    writer.save(step + 1, vars(state), meta)
            if stops and not last:
                writer.wait()
                raise runfiles.Stopped(step + 1)
    return state


def _write(log: metrics.MetricWriter, progress: metrics.Progress, pending: tuple[int, dict[str, Any]] | None) -> None:
    if pending is None:
        return
    step, scalars = pending
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    metrics.check_finite(step, values)
    progress.update(step, log.write(step, values))
