"""The loop: data -> summaries -> step -> metrics -> evaluation -> checkpoint; and the files that a run leaves."""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax

from popi_jax import checkpoint
from popi_jax.data import prepared
from popi_jax.data.schema import Example
from popi_jax.errors import UserError
from popi_jax.evaluation import decomposition, evaluate, report
from popi_jax.model import sharding
from popi_jax.modes import runfiles
from popi_jax.modes import setup as system_lib
from popi_jax.modes.setup import Plan, System
from popi_jax.rollout import limits as preflight
from popi_jax.rollout.pairs import Item
from popi_jax.rollout.references import References
from popi_jax.training import batches, metrics, steps

STEP_FUNCTIONS: dict[str, Callable] = {
    "joint": steps.joint_step,
    "inference": steps.inference_step,
    "generator": steps.generator_step,
}


def train(config, workdir: pathlib.Path, shared: pathlib.Path | None = None) -> dict[str, object]:
    """Trains what the config says, from where the workdir left off; evaluates, and writes results and the report.

    Args:
        config: the experiment.
        workdir: where the run's files go.
        shared: where runs of one table keep prepared data and reference log-probabilities; the workdir by default.

    Returns:
        The run's row of results.json.

    Raises:
        UserError: for a mistake in the config or the data, or a metric that is not finite.
    """
    system = system_lib.load(config)
    runfiles.claim(workdir, config)
    shared = workdir if shared is None else shared
    sources = prepared.from_config(config, shared)
    system = preflight.fit(system, sources)
    references = References(system, shared / "cache", config.eval.users_per_batch * config.eval.summaries_per_user)
    if system_lib.total_steps(config) == 0:
        state = initial_state(system)
    else:
        state = _loop(system, workdir, sources, references)
    return finish(system, workdir, state, list(sources["test"]), references, system_lib.total_steps(config))


def finish(
    system: System,
    workdir: pathlib.Path,
    state: steps.TrainState,
    test: Sequence[Example],
    references: References,
    step: int,
) -> dict[str, object]:
    """Evaluates on all test users and writes eval_records.jsonl, samples.jsonl, results.json and the report."""
    config = system.config
    theta = None if config.method == "base" else state.theta
    started = time.time()
    records = evaluate.evaluate(system, state.phi, theta, test, references, step)
    row = evaluate.result_row(records, config, config.method)
    if (config.data.dataset, config.objective.reference_context) == ("stylebook", "prompt") and config.method != "base":
        measured = decomposition.measure(system, state.phi, theta, test, references, step)
        decomposition.write(workdir / "decomposition.npz", measured)
        row |= measured.terms()
    row["evaluate_s"] = time.time() - started
    evaluate.write_records(workdir / "eval_records.jsonl", records)
    samples = evaluate.respond(system, state.phi, theta, test, step)
    runfiles.write_jsonl(workdir / "samples.jsonl", samples)
    runfiles.write_results(workdir, config, [row])
    if jax.process_index() == 0:
        report.write(workdir)
        print(f"{system.encoder.overflow}\n{workdir / 'report.html'}")
    return row


def initial_state(system: System) -> steps.TrainState:
    """The state before the first step, born sharded."""
    init = functools.partial(steps.init_state, settings=system.settings)
    key = system_lib.stream_key(system.config.seed, "init", 0)
    return jax.jit(init, out_shardings=state_shardings(system))(key, system.base)


def state_shardings(plan: Plan) -> steps.TrainState:
    """A NamedSharding for every leaf of the state: moments lie as their parameters do, scalars everywhere."""
    policy, mesh = plan.policy, plan.mesh
    delta = sharding.param_shardings(policy.logical_axes_delta(), policy.abstract_delta(), mesh)
    everywhere = sharding.replicated(mesh)

    def optimizer(tx) -> Any:
        return None if tx is None else sharding.optimizer_shardings(tx, policy.abstract_delta(), delta, mesh)

    return steps.TrainState(
        step=everywhere,
        phi=None if plan.settings.tx_phi is None else delta,
        theta=delta,
        opt_phi=optimizer(plan.settings.tx_phi),
        opt_theta=optimizer(plan.settings.tx_theta),
        baseline=everywhere,
    )


def abstract_state(plan: Plan) -> steps.TrainState:
    """Shapes, types and shardings of the state: what a checkpoint is restored onto."""
    shapes = jax.eval_shape(
        lambda base: steps.init_state(jax.random.key(0), base, plan.settings), plan.policy.abstract_base()
    )
    return jax.tree.map(
        lambda s, placed: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), shapes, state_shardings(plan)
    )


def restore(system: System, workdir: pathlib.Path, step: int | None = None) -> tuple[steps.TrainState, dict] | None:
    """The newest (or given) checkpoint of the workdir with its record; None if there is none."""
    # Full or LoRA, and its rank, by their keys: told from the weights' shapes alone, the difference would read as
    # dozens of weights that are missing.
    lora = json.loads(system.config.lora.to_json_best_effort())
    expect = {"model": system.fingerprint, "tokenizer": system.tokenizer.fingerprint, "config": {"lora": lora}}
    # Orbax sees plain dicts: their paths outlive the class.
    fields = vars(abstract_state(system))
    restored = checkpoint.restore(workdir / "checkpoints", fields, step=step, expect=expect)
    return None if restored is None else (steps.TrainState(**restored.state), restored.meta)


def make_steps(plan: Plan) -> dict[str, Callable]:
    """The steps, jitted once each. The state is donated: the new one takes its memory."""
    shardings = (state_shardings(plan), sharding.replicated(plan.mesh))
    options = sharding.compiler_options(plan.mesh)
    return {
        kind: jax.jit(
            functools.partial(fn, settings=plan.settings),
            donate_argnums=0,
            out_shardings=shardings,
            compiler_options=options,
        )
        for kind, fn in STEP_FUNCTIONS.items()
    }


def _loop(system: System, workdir: pathlib.Path, sources: dict[str, Any], references: References) -> steps.TrainState:
    config = system.config
    total = system_lib.total_steps(config)
    iterator = prepared.training_iterator(sources["train"], config.train.users_per_step, config.seed)
    restored = restore(system, workdir)
    if restored is None:
        state, start, wall_s = initial_state(system), 0, 0.0
    else:
        state, meta = restored
        if meta["data"] != sources["train"].fingerprint:
            raise UserError(
                f"{workdir}: its checkpoint was trained on other examples than config.data gives now; bring them back,"
                " or choose another --workdir"
            )
        start, wall_s = int(state.step), meta["wall_s"]
        iterator.set_state(meta["iterator"])
        print(f"going on from the checkpoint of step {start}")
    print(metrics.parameter_overview(state.theta))
    if config.objective.reference_context == "prompt":
        references.remember([Item(query, None) for example in sources["train"] for query in example.queries])
    written = batches.WrittenSummaries(workdir / "written_summaries.jsonl")
    step_fns = make_steps(system)
    # All that a step reads was laid over the mesh before. Without jit its constants are transfers too.
    guard = "allow" if jax.config.values["jax_disable_jit"] else "disallow"
    folder = workdir / "checkpoints"
    with (
        checkpoint.Writer(folder, config.train.checkpoints_kept, after=start) as writer,
        checkpoint.StopRequest() as stop,
        metrics.MetricWriter(workdir, resume_step=start, wall_s=wall_s) as log,
        metrics.Progress(total, start, config.name) as progress,
        Profiler(workdir / "profile", config.train.profile_steps) as profiler,
    ):
        pending: tuple[int, dict[str, Any]] | None = None
        for step in range(start, total):
            profiler.enter(step, state)
            kind = system_lib.step_kind(config, step)
            compiling = metrics.CompileClock()
            with jax.profiler.StepTraceAnnotation(kind, step_num=step):
                batch, counts = batches.make_batch(system, state, next(iterator), step, kind, references, written)
                with jax.transfer_guard(guard):
                    state, scalars = step_fns[kind](state, system.base, batch)
            # The step before this one is written while this one runs.
            _write(log, progress, pending)
            pending = (step + 1, scalars | counts | {"compile_s": compiling.seconds()})
            last, saves = step + 1 == total, (step + 1) % config.train.checkpoint_every == 0
            evaluates = config.eval.every and (step + 1) % config.eval.every == 0 and not last
            # Asked once: a signal that comes later is for the next step.
            stops = stop.reached(step + 1)
            if saves or last or evaluates or stops:
                _write(log, progress, pending)
                pending = None
            if evaluates:
                started = time.perf_counter()
                found = periodic(system, state, sources["test"], references, step + 1)
                log.write(step + 1, found | {"evaluate_s": time.perf_counter() - started})
            if saves or last or stops:
                meta = {
                    "model": system.fingerprint,
                    "tokenizer": system.tokenizer.fingerprint,
                    "data": sources["train"].fingerprint,
                    "iterator": iterator.get_state(),
                    "wall_s": log.wall_s(),
                    "config": json.loads(config.to_json_best_effort()),
                }
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


class Profiler:
    """A profiler trace of the steps first..last, 0-based, or of what this start of the run takes of them."""

    def __init__(self, folder: pathlib.Path, steps_traced: Sequence[int]):
        self._folder, self._span, self._tracing = folder, steps_traced, False

    def enter(self, step: int, state: Any = None) -> None:
        """Starts or ends the trace where `step` is about to be the first in, or beyond, the span.

        It ends when `state`, which the steps before leave, is there: what they still do belongs to it.
        """
        inside = bool(self._span) and self._span[0] <= step <= self._span[1]
        if inside and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
        elif self._tracing and not inside:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        self._tracing = inside

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.enter(-1)


def periodic(system: System, state: steps.TrainState, test, references: References, step: int) -> dict[str, float]:
    """Metrics of a periodic evaluation, on config.eval.users of the test users (0: all)."""
    users = system.config.eval.users
    examples = [test[i] for i in range(min(users, len(test)) if users else len(test))]
    records = evaluate.evaluate(system, state.phi, state.theta, examples, references, step)
    row = evaluate.result_row(records, system.config, system.config.method)
    names = ("accuracy", "accuracy_signals_ref", "loss", "nats", "summary_tokens_mean")
    return {f"eval_{name}": float(row[name]) for name in names}  # type: ignore[arg-type]
