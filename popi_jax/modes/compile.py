"""--mode=compile: compiles every program of a config for a slice that need not be there, and says what each costs.

Nothing runs and nothing is loaded: the shapes are those of the config's limits, every array full. Memory is the
compiler's own plan; times are lower bounds from the chip's public peaks (popi_jax/cost).
Shapes: as in steps.py, rollout.py and pairs.py.
"""

import dataclasses
import functools
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from popi_jax.cost import bound, chips, flops, printed, traffic
from popi_jax.data import packing
from popi_jax.errors import UserError, first_line
from popi_jax.model import hub, remat, sharding
from popi_jax.modes import setup as system_lib
from popi_jax.modes import train
from popi_jax.modes.setup import Plan
from popi_jax.rollout import pairs, sampler
from popi_jax.rollout import text as rollout
from popi_jax.training import scoring, steps

HERE = "here"  # The topology that is this machine's own devices.


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of a run, with abstract arguments that know their shardings.

    Attributes:
        name: what the report calls it.
        fn: jitted.
        args: of fn.
        trips: how often each loop runs whose end depends on the data: the decode loops, at most.
    """

    name: str
    fn: Any
    args: tuple[Any, ...]
    trips: tuple[int, ...] = ()


def slice_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice by name, such as v5e:4x4, or of this machine (HERE).

    Raises:
        UserError: libtpu is not installed, or does not know the name.
    """
    if topology == HERE:
        return jax.devices()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # Else libtpu waits for the metadata server of a cloud machine.
    # Else one process at a time, as for the chips themselves, which the compiler does not touch.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    printed.keep_texts()
    # Both cores of a chip as one device, as JAX runs on v4; of single cores it makes no mesh.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # libtpu's errors have no base in common.
        raise UserError(
            f"--topology={topology}: {first_line(error)}; install libtpu (pip install libtpu) and give a slice that it"
            f" knows, such as {', '.join(chips.TOPOLOGIES)}, or {HERE!r} for this machine"
        ) from error


def programs(plan: Plan) -> list[Program]:
    """Every program of a run of this plan, at the limits of its config."""
    config, mesh = plan.config, plan.mesh
    everywhere = sharding.replicated(mesh)
    policy = plan.policy
    base = placed(
        policy.abstract_base(), sharding.param_shardings(policy.logical_axes_base(), policy.abstract_base(), mesh)
    )
    state = train.abstract_state(plan)
    kinds = sorted({system_lib.step_kind(config, step) for step in range(system_lib.total_steps(config))})
    found = []
    writes = config.method in system_lib.SUMMARIZED
    if writes:
        k = max(system_lib.summaries_per_user(config, kind) for kind in kinds)
        found.append(_summaries(plan, "sample", base, state.phi, rollout.in_training(config), k))
    step_fns = train.make_steps(plan)
    found += [Program(f"{kind} step", step_fns[kind], (state, base, abstract_batch(plan, kind))) for kind in kinds]
    if writes:
        k = config.eval.summaries_per_user
        found.append(_summaries(plan, "evaluate: sample", base, state.phi, rollout.in_use(config), k))
    rows = packing.round_up(config.eval.users_per_batch * config.eval.summaries_per_user, sharding.row_shards(mesh))
    scored = abstract_bins(plan, rows)
    score = jax.jit(
        functools.partial(steps.pair_logps, policy, reduction=config.objective.logp_reduction),
        out_shardings=everywhere,
        compiler_options=sharding.compiler_options(mesh),
    )
    args = (base, state.theta, placed(scored, pairs.packed_shardings(mesh, sharding.batch_sharding(mesh))))
    found.append(Program("evaluate: score", score, args))
    if config.eval.samples:
        sampling = dataclasses.replace(rollout.in_use(config), rows=config.eval.samples)
        lengths = config.limits.prompt, config.eval.response_tokens
        found.append(_drawing(plan, "evaluate: respond", base, state.theta, sampling, 1, *lengths))
    return found


def _summaries(plan: Plan, name: str, base, phi, sampling: rollout.Sampling, k: int) -> Program:
    limits = plan.config.limits
    return _drawing(plan, name, base, phi, sampling, k, limits.signals, limits.summary)


def _drawing(
    plan: Plan, name: str, base, delta, sampling: rollout.Sampling, branches: int, longest: int, max_tokens: int
) -> Program:
    """`branches` texts after each prompt, the prompts all as long as the longest."""
    mesh = plan.mesh
    B = packing.round_up(sampling.rows, sharding.row_shards(mesh))
    lines = _int32(B, packing.bucket(longest, plan.buckets)), _int32(B)
    key = jax.eval_shape(lambda: jax.random.key(0))
    options: dict[str, Any] = {"policy": plan.policy, "branches": branches, "max_tokens": max_tokens}
    # Any ids do: a program's shape does not depend on them.
    options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "stop_ids": (0,), "pad_id": 0}
    compiler_options = sharding.compiler_options(mesh)
    fn = jax.jit(functools.partial(rollout.draw, **options), compiler_options=compiler_options)
    args = (base, delta, *placed(lines, sharding.batch_sharding(mesh)), placed(key, sharding.replicated(mesh)))
    return Program(name, fn, args, trips=sampler.turns(max_tokens))


def abstract_batch(plan: Plan, kind: str) -> Any:
    """The batch of a step, every signal, prompt, summary and response as long as its limit."""
    config, mesh = plan.config, plan.mesh
    U = packing.round_up(config.train.users_per_step, sharding.row_shards(mesh))
    learned = system_lib.summaries_per_user(config, "generator")
    if kind == "generator":
        return abstract_rows(plan, U * learned * config.data.queries_per_user)
    A, K, S = config.train.accumulation_inference, config.sampling.k, config.limits.summary
    T = packing.bucket(config.limits.signals, plan.buckets)
    rows = scoring.PrefixBatch(_int32(A, U // A, T), _int32(A, U // A), _int32(A, U // A, K, S), _int32(A, U // A, K))
    drawn = steps.InferenceBatch(rows, _abstract(jnp.float32, A, U // A, K, S))
    inference = placed(drawn, sharding.stack_sharding(mesh))
    generator = abstract_rows(plan, U * K * config.data.queries_per_user)
    if kind == "inference":
        return inference, generator
    fewer = abstract_rows(plan, U * learned * config.data.queries_per_user) if learned < K else None
    return inference, generator, fewer


def abstract_rows(plan: Plan, R: int) -> steps.GeneratorBatch:
    """R generator rows at the limits, in their micro-batches."""
    mesh, A = plan.mesh, plan.config.train.accumulation_generator
    micro = abstract_bins(plan, R, lambda count: packing.coarse(-(-count // A)))
    bins = jax.tree.map(lambda x: jax.ShapeDtypeStruct((A, *x.shape), x.dtype), micro)
    ref = _abstract(jnp.float32, A, R, 2), _abstract(jnp.float32, A, R)
    return steps.GeneratorBatch(
        placed(bins, pairs.packed_shardings(mesh, sharding.stack_sharding(mesh))),
        *placed(ref, sharding.replicated(mesh)),
    )


def abstract_bins(plan: Plan, R: int, rounded: Callable[[int], int] = int) -> scoring.PackedBatch:
    """R rows of the longest prompt with the two longest responses, packed; `rounded` gives the number of bins."""
    limits, shards = plan.config.limits, sharding.row_shards(plan.mesh)
    longest = limits.prompt + 2 * limits.response
    length = max(limits.bin, packing.bucket(longest, plan.buckets))
    per_bin = length // longest
    C = packing.round_up(rounded(-(-R // per_bin)), shards)
    W = packing.round_up(C // shards * per_bin * 2 * limits.response, -(-C // shards * length // 4))
    bins, scored = _int32(C, length), _int32(shards, W)
    return scoring.PackedBatch(bins, bins, bins, scored, scored, scored, _int32(R, 2), _int32(R))


def placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays with their shardings: a tree of them, or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _abstract(dtype: Any, *shape: int) -> Any:  # Any: it stands in for an array.
    return jax.ShapeDtypeStruct(shape, dtype)


def _int32(*shape: int) -> Any:
    return _abstract(np.int32, *shape)


def report(config, topology: str) -> dict[str, Any]:
    """Compiles every program and says what each takes; what `table` shows and --output holds.

    Args:
        config: the experiment.
        topology: see `slice_devices`.

    Raises:
        UserError: for a config that makes no sense, or does not fit the slice's mesh.
    """
    system_lib.check(config)
    devices = slice_devices(topology)
    mesh = system_lib.make_mesh(config, devices)
    model = hub.read_config(model_shape(config), **system_lib.model_options(config, mesh))
    plan = system_lib.make_plan(config, mesh, model)
    # Of a kernel's products only the kernel knows; the plain attention does as many, but for what it masks.
    plain = system_lib.make_plan(config, mesh, dataclasses.replace(model, attention="xla"))
    kind = devices[0].device_kind
    chip = None if topology == HERE else chips.chip(kind)
    rows = []
    # Made before the mesh is set: on devices that are not there not even a zero can be computed.
    both = list(zip(programs(plan), programs(plain), strict=True))
    with jax.set_mesh(mesh):
        for program, counted in both:
            print(f"compiling {program.name} ...", flush=True)
            taken, moved = compile_program(program)
            row = {"program": program.name} | products(counted) | taken
            rows.append(row if chip is None else row | at_best(row, moved, mesh.size, chip))
    return {
        "schema": 1,
        "config": config.name,
        "topology": topology,
        "device": kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "programs": rows,
    }


def model_shape(config) -> pathlib.Path:
    """The config.json that says what the model is: of the folder model.path, or model.shape."""
    if config.model.path == "stylebook" or pathlib.Path(config.model.path).is_dir():
        return hub.resolve(config.model.path) / "config.json"
    if not config.model.shape:
        raise UserError(
            f"config.model.path: {config.model.path} is no folder here; --mode=compile loads nothing, so set"
            " config.model.shape to its config.json"
        )
    return pathlib.Path(config.model.shape)


def products(program: Program) -> dict[str, float]:
    """FLOPs of the program's products on all devices: the model's own, and with what is computed again."""

    def count() -> float:
        # A function of its own each time: JAX keeps the trace of one that it knows, and what is computed again in it.
        traced = jax.make_jaxpr(lambda *args: program.fn.__wrapped__(*args))(*program.args)
        return flops.count(traced, program.trips)

    with remat.nothing_twice():
        own = count()
    return {"model_flops_all_devices": own, "executed_flops_all_devices": count()}


def compile_program(program: Program) -> tuple[dict[str, Any], traffic.Traffic | None]:
    """What one program takes of each device, and what it moves, where the compiler can print it."""
    started = time.perf_counter()
    printed.forget()
    try:
        compiled = program.fn.lower(*program.args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"compile_s": time.perf_counter() - started, "fits": False, "why_not": _why_not(error)}, None
    row: dict[str, Any] = {"compile_s": time.perf_counter() - started, "fits": True}
    memory = compiled.memory_analysis()
    # What is donated is an argument and a result in one place.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    row |= {
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "total_bytes": memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
    }
    try:
        text = printed.text(compiled)
    except jax.errors.JaxRuntimeError as error:  # XLA cannot print some of its own asynchronous instructions.
        return row | {"traffic": None, "why_no_traffic": first_line(error)}, None
    moved = traffic.measure(text, program.trips)
    return row | {"traffic": dataclasses.asdict(moved)}, moved


def at_best(row: dict[str, Any], moved: traffic.Traffic | None, devices: int, chip: chips.Chip) -> dict[str, Any]:
    """The bounds on the program's time, and the share of the chip's peak that the tightest leaves to the model."""
    found: dict[str, Any] = {"hbm_bytes": chip.hbm_bytes}
    if not row["fits"]:
        return found
    known = traffic.Traffic(0.0, {}, [], []) if moved is None else moved
    bounds = bound.bound(row["executed_flops_all_devices"], known, chip, devices)
    if moved is None:  # What the other two need is not known, so neither is which binds.
        return found | {
            "bounds_s": {"compute_s": bounds.compute_s, "memory_s": None, "interconnect_s": None},
            "bound_s": bounds.compute_s,
            "bound_by": None,
            "mfu_at_bound": None,
            "advice": None,
        }
    return found | {
        "bounds_s": {name: getattr(bounds, name) for name in ("compute_s", "memory_s", "interconnect_s")},
        "bound_s": bounds.seconds,
        "bound_by": bounds.binding,
        "mfu_at_bound": bounds.mfu(row["model_flops_all_devices"]),
        "advice": bound.advice(bounds),
    }


def _why_not(error: Exception) -> str:
    """The sentence with both figures, out of a page of the compiler's."""
    pattern = r"(total )?memory required[^.]*\([^)]*\)[^.]*\.[^.]*\.|Used \S+ of \S+ hbm\."
    wanted = re.search(pattern, str(error))
    return " ".join(wanted.group().split()) if wanted else first_line(error)


def table(found: dict[str, Any]) -> str:
    """The report for people."""
    GiB, lines = 2**30, []
    shape = " x ".join(f"{name}={size}" for name, size in found["mesh"].items())
    lines.append(f"{found['config']} on {found['topology']}: {found['devices']} x {found['device']}, mesh {shape}")
    for row in found["programs"]:
        lines.append(f"\n{row['program']}  (compiled in {row['compile_s']:.0f} s)")
        if not row["fits"]:
            lines.append(f"  does not fit: {row['why_not']}")
            continue
        total, limit = row["total_bytes"] / GiB, row.get("hbm_bytes")
        of = "" if limit is None else f" of {limit / GiB:.2f}"
        lines.append(
            f"  memory       {total:.2f}{of} GiB a device: arguments {row['arguments_bytes'] / GiB:.2f},"
            f" temporaries {row['temporaries_bytes'] / GiB:.2f}"
        )
        lines.append(
            f"  products     {row['model_flops_all_devices'] / 1e12:.3g} TFLOP on all devices,"
            f" {row['executed_flops_all_devices'] / 1e12:.3g} with what is computed again"
        )
        lines.append(f"  traffic      {_traffic(row)}")
        if "bound_s" in row and row["bound_by"] is None:
            lines.append(f"  roofline     at least {row['bound_s']:.3g} s, for the products alone")
        elif "bound_s" in row:
            lines.append(
                f"  roofline     {row['bound_s']:.3g} s, by {row['bound_by']}; at that bound"
                f" {100 * row['mfu_at_bound']:.0f}% of peak. {row['advice']}"
            )
    return "\n".join(lines)


def _traffic(row: dict[str, Any]) -> str:
    moved = row["traffic"]
    if moved is None:
        return f"not known, for the compiler cannot print this program: {row['why_no_traffic']}"
    parts = [f"{moved['hbm_bytes'] / 2**30:.3g} GiB of memory a device"]
    parts += [
        f"{name} {own['bytes'] / 2**30:.3g} GiB in {own['count']:.0f}" for name, own in moved["collectives"].items()
    ]
    if moved["host_transfers"]:
        parts.append(f"TO OR FROM THE HOST: {', '.join(moved['host_transfers'])}")
    return "; ".join(parts)
