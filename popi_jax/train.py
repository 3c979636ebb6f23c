"""The loop: data -> summaries -> step -> metrics -> checkpoint -> evaluation; and the files that a run leaves."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np

from popi_jax import checkpoint, decomposition, evaluate, metrics, preflight, report, rollout, runfiles, sharding, steps
from popi_jax import system as system_lib
from popi_jax.data import prepared
from popi_jax.data.schema import Example, Query
from popi_jax.errors import UserError
from popi_jax.rollout import Item, References
from popi_jax.system import System

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
    preflight.check_examples(system, sources)
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
    if config.data.dataset == "stylebook" and config.method != "base":
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
        print(f"{system.overflow}\n{workdir / 'report.html'}")
    return row


def initial_state(system: System) -> steps.TrainState:
    """The state before the first step, born sharded."""
    init = functools.partial(steps.init_state, settings=system.settings)
    key = system_lib.stream_key(system.config.seed, "init", 0)
    return jax.jit(init, out_shardings=state_shardings(system))(key, system.base)


def state_shardings(system: System) -> steps.TrainState:
    """A NamedSharding for every leaf of the state: moments lie as their parameters do, scalars everywhere."""
    policy, mesh = system.policy, system.mesh
    delta = sharding.param_shardings(policy.logical_axes_delta(), policy.abstract_delta(), mesh)
    everywhere = sharding.replicated(mesh)

    def optimizer(tx) -> Any:
        return sharding.optimizer_shardings(tx, policy.abstract_delta(), delta, mesh)

    return steps.TrainState(
        step=everywhere,
        phi=delta,
        theta=delta,
        opt_phi=optimizer(system.settings.tx_phi),
        opt_theta=optimizer(system.settings.tx_theta),
        baseline=everywhere,
    )


def abstract_state(system: System) -> steps.TrainState:
    """Shapes, types and shardings of the state: what a checkpoint is restored onto."""
    init = functools.partial(steps.init_state, settings=system.settings)
    shapes = jax.eval_shape(init, jax.random.key(0), system.base)
    return jax.tree.map(
        lambda s, placed: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), shapes, state_shardings(system)
    )


def restore(system: System, workdir: pathlib.Path, step: int | None = None) -> tuple[steps.TrainState, dict] | None:
    """The newest (or given) checkpoint of the workdir with its record; None if there is none."""
    expect = {"model": system.fingerprint, "tokenizer": system.tokenizer.fingerprint}
    # Orbax sees plain dicts: their paths outlive the class.
    fields = {f.name: getattr(abstract_state(system), f.name) for f in dataclasses.fields(steps.TrainState)}
    restored = checkpoint.restore(workdir / "checkpoints", fields, step=step, expect=expect)
    return None if restored is None else (steps.TrainState(**restored.state), restored.meta)


def make_steps(system: System) -> dict[str, Callable]:
    """The steps, jitted once each. The state is donated: the new one takes its memory."""
    shardings = (state_shardings(system), sharding.replicated(system.mesh))
    return {
        kind: jax.jit(functools.partial(fn, settings=system.settings), donate_argnums=0, out_shardings=shardings)
        for kind, fn in STEP_FUNCTIONS.items()
    }


def _loop(system: System, workdir: pathlib.Path, sources: dict[str, Any], references: References) -> steps.TrainState:
    config = system.config
    total = system_lib.total_steps(config)
    # Every process reads the same users: the arrays are global, and each device takes its rows.
    iterator = prepared.training_iterator(
        sources["train"], config.train.users_per_step, config.seed, process_index=0, process_count=1
    )
    restored = restore(system, workdir)
    state, start, wall_s = initial_state(system), 0, 0.0
    if restored is not None:
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
    written = WrittenSummaries(workdir / "written_summaries.jsonl")
    step_fns = make_steps(system)
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
            profiler.enter(step)
            kind = system_lib.step_kind(config, step)
            compiling = metrics.CompileClock()
            with jax.profiler.StepTraceAnnotation(kind, step_num=step):
                batch, counts = make_batch(system, state, next(iterator), step, kind, references, written)
                with jax.transfer_guard("disallow"):  # All that a step reads was laid over the mesh before.
                    state, scalars = step_fns[kind](state, system.base, batch)
            # The step before this one is written while this one runs: the host never waits for the newest.
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
                writer.save(step + 1, {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}, meta)
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

    def enter(self, step: int) -> None:
        """Starts or ends the trace where `step` is about to be the first in, or beyond, the span."""
        inside = bool(self._span) and self._span[0] <= step <= self._span[1]
        if inside and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
        elif self._tracing and not inside:
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


class WrittenSummaries:
    """One summary per example, drawn once and written out: what two_phase trains the generator on."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._known = {entry["user"]: entry["summary"] for entry in runfiles.read_jsonl(path)}

    def contexts(self, system: System, phi, examples: Sequence[Example], key: jax.Array) -> list[list[str | None]]:
        """The examples' summaries; those that are not written yet are drawn with phi, as in training."""
        config = system.config
        missing = [example for example in examples if example.user not in self._known]
        if missing:
            drawn = rollout.draw_summaries(
                system,
                phi,
                missing,
                key,
                k=1,
                temperature=config.sampling.temperature,
                top_p=1.0,
                rows=config.train.users_per_step,
            )
            fresh = {example.user: texts[0] for example, texts in zip(missing, drawn.texts_UxK, strict=True)}
            self._known.update(fresh)
            if jax.process_index() == 0:
                lines = [json.dumps({"user": u, "summary": z}, ensure_ascii=False) + "\n" for u, z in fresh.items()]
                # One write for the step: were some of its users known after a kill, the others would be drawn anew.
                with self._path.open("ab", buffering=0) as file:
                    file.write("".join(lines).encode())
        return [[self._known[example.user]] for example in examples]


def chosen_queries(example: Example, count: int, seed: int, step: int, place: int) -> list[Query]:
    """`count` of the example's queries, another draw each step; all of them, in order, where there are no more."""
    if len(example.queries) <= count:
        return list(example.queries)
    rng = np.random.default_rng((seed, system_lib.STREAMS.index("queries"), step, place))
    return [example.queries[i] for i in sorted(rng.choice(len(example.queries), count, replace=False))]


def make_batch(
    system: System,
    state: steps.TrainState,
    examples: Sequence[Example],
    step: int,
    kind: str,
    references: References,
    written: WrittenSummaries,
) -> tuple[Any, dict[str, Any]]:
    """Draws the summaries that this step needs and lays out its rows.

    Returns:
        The batch of the step `kind`, and counts to log: tokens scored (each once), summaries cut by the limit.
    """
    config = system.config
    users, started = config.train.users_per_step, time.perf_counter()
    learned = config.sampling.k_generator or config.sampling.k
    key = system_lib.stream_key(config.seed, "sample", step)
    signals = [""] * len(examples)
    if config.objective.reference_context == "signals":
        signals = [rollout.signals_context(system, example) for example in examples]
    counts: dict[str, Any] = {}
    drawn = None
    if config.method == "popi" and kind == "generator" and config.schedule.name == "two_phase":
        contexts = written.contexts(system, state.phi, examples, key)
    elif config.method in system_lib.SUMMARIZED:
        phi = state.phi if config.method == "popi" else None
        k = learned if kind == "generator" else config.sampling.k
        drawn = rollout.draw_summaries(
            system, phi, examples, key, k=k, temperature=config.sampling.temperature, top_p=1.0, rows=users
        )
        contexts = [list(texts) for texts in drawn.texts_UxK]
        finished = drawn.samples.finished_BxN[: len(examples)]
        counts |= {"summaries_cut": float(np.mean(~finished)), "sample_s": time.perf_counter() - started}
    else:
        contexts = evaluate.contexts(system, None, examples, key)
    queries = [chosen_queries(e, config.data.queries_per_user, config.seed, step, u) for u, e in enumerate(examples)]
    generator = generator_rows(system, queries, contexts, signals, references)
    tokens = generator.rows.token_count  # An array still: the host does not wait for it here.
    if kind == "generator":
        return generator, counts | {"tokens": tokens}
    assert drawn is not None  # An inference or joint step is popi's, and draws.
    inference = rollout.inference_batch(system, drawn, users)
    counts["tokens"] = tokens + inference.rows.token_count
    if kind == "inference":
        return (inference, generator), counts
    fewer = None
    if learned < config.sampling.k:
        # Their share of all bins, which varies less than their own number: few shapes.
        bins = len(generator.rows.tokens_CxL) // config.train.accumulation
        few = [own[:learned] for own in contexts]
        fewer = generator_rows(system, queries, few, signals, references, bins * learned // config.sampling.k)
    return (inference, generator, fewer), counts


def generator_rows(
    system: System,
    queries: Sequence[Sequence[Query]],
    contexts: Sequence[Sequence[str | None]],
    signals: Sequence[str],
    references: References,
    least_bins: int = 0,
) -> steps.GeneratorBatch:
    """The rows (u, k, m) of a step: each user's queries under each of the user's contexts.

    Args:
        queries: of each user, at most M.
        contexts: of each user, the same number for all.
        signals: each user's raw signals, where the reference reads them.
        references: where the reference's log-probabilities come from.
        least_bins: see `rollout.pack_pairs`.
    """
    config = system.config
    M = config.data.queries_per_user
    items: list[Item | None] = []
    row_signals: list[str] = []
    for own_queries, own_contexts, own_signals in zip(queries, contexts, signals, strict=True):
        for context in own_contexts:
            items += [Item(query, context) for query in own_queries] + [None] * (M - len(own_queries))
            row_signals += [own_signals] * M
    # As many users as the inference batch has, and, with accumulation, rows that micro-batches share alike.
    missing = (rollout.padded_users(system, config.train.users_per_step) - len(queries)) * len(contexts[0]) * M
    items, row_signals = items + [None] * missing, row_signals + [""] * missing
    return rollout.generator_batch(system, items, row_signals, references, least_bins)
