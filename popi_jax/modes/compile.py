"""--mode=compile: compiles every program of a config for a slice that need not be there, and says what each costs.

Nothing runs and nothing is loaded: the shapes are those of the config's limits, every array full. Memory is the
compiler's own plan; times are lower bounds from the chip's public peaks (popi_jax/cost).
Shapes: as in steps.py, rollout.py and pairs.py.
"""

import dataclasses
import os
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from popi_jax.config import SUMMARIZED, Config
from popi_jax.cost import bound, chips, flops, printed, traffic
from popi_jax.data.shapes import Shapes, abstract_bins, bins_shardings, placed
from popi_jax.errors import UserError, first_line
from popi_jax.model import hub, sharding
from popi_jax.model.weights import Tree
from popi_jax.modes import setup
from popi_jax.modes.programs import Programs
from popi_jax.rollout import sampler, text
from popi_jax.training import schedule

HERE = "here"  # The topology that is this machine's own devices.


@dataclasses.dataclass(frozen=True)
class Call:
    """One program of a run with abstract arguments that know their shardings.

    Attributes:
        name: in the report.
        fn: jitted, from programs.py.
        args: its arrays.
        options: its static arguments.
        trips: how often each loop runs whose end depends on the data: the decode loops, at most.
    """

    name: str
    fn: Any
    args: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
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


def calls(config: Config, programs: Programs) -> list[Call]:
    """Every call of a run's programs, at the limits of its config."""
    shapes = Shapes(config, programs.mesh, config.limits.buckets)
    base, state = programs.abstract_base(), programs.abstract_state()
    kinds = sorted(schedule.step_kinds(config))
    found = []
    writes = config.method in SUMMARIZED
    if writes:
        k = max((shapes.summaries(kind) for kind in kinds), default=1)
        found.append(_summaries(shapes, programs, "sample", base, state.phi, text.in_training(config), k))
    found += [
        Call(f"{kind} step", programs.train_steps[kind], (state, base, shapes.step(kind).abstract(programs.mesh)))
        for kind in kinds
    ]
    if writes:
        k = config.eval.summaries_per_user
        found.append(_summaries(shapes, programs, "evaluate: sample", base, state.phi, text.in_use(config), k))
    split = bins_shardings(sharding.batch_sharding(programs.mesh), programs.mesh)
    bins = placed(abstract_bins(shapes.scoring()), split)
    found.append(Call("evaluate: score", programs.score, (base, state.theta, bins)))
    if config.eval.samples:
        sampling = dataclasses.replace(text.in_use(config), batch_size=config.eval.samples)
        lengths = config.limits.prompt, config.eval.response_tokens
        found.append(_drawing(shapes, programs, "evaluate: respond", base, state.theta, sampling, 1, *lengths))
    return found


def _summaries(
    shapes: Shapes, programs: Programs, name: str, base: Tree, phi: Tree, sampling: text.Sampling, k: int
) -> Call:
    limits = shapes.config.limits
    return _drawing(shapes, programs, name, base, phi, sampling, k, limits.signals, limits.summary)


def _drawing(
    shapes: Shapes,
    programs: Programs,
    name: str,
    base: Tree,
    delta: Tree,
    sampling: text.Sampling,
    branches: int,
    longest: int,
    max_tokens: int,
) -> Call:
    """`branches` texts after each prompt, the prompts all as long as the longest."""
    mesh = programs.mesh
    B, T = shapes.lines(sampling.batch_size, longest)
    tokens, length = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((B, T), (B,)))
    lines = placed((tokens, length), sharding.batch_sharding(mesh))
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))
    options: dict[str, Any] = {"branches": branches, "max_tokens": max_tokens}
    # Any ids do: a program's shape does not depend on them.
    options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "stop_ids": (0,), "pad_id": 0}
    return Call(name, programs.sample, (base, delta, *lines, key), options, sampler.turns(max_tokens))


def report(config: Config, topology: str) -> dict[str, Any]:
    """Compiles every program and says what each takes; what `table` shows and --output holds.

    Args:
        config: the experiment.
        topology: see `slice_devices`.

    Raises:
        UserError: for a config that makes no sense, or does not fit the slice's mesh.
    """
    devices = slice_devices(topology)
    mesh = setup.make_mesh(config, devices)
    model = hub.read_config(model_shape(config), **setup.model_options(config, mesh))
    run = setup.make_programs(config, mesh, model)
    # A kernel's products are known to the kernel alone; plain attention does as many, apart from masked ones.
    plain = setup.make_programs(config, mesh, dataclasses.replace(model, attention="xla"))
    kind = devices[0].device_kind
    chip = None if topology == HERE else chips.chip(kind)
    rows = []
    for call, counted in zip(calls(config, run), calls(config, plain), strict=True):
        print(f"compiling {call.name} ...", flush=True)
        taken, moved = compile_call(call)
        row = {"program": call.name} | products(counted) | taken
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


def model_shape(config: Config) -> pathlib.Path:
    """The config.json that says what the model is: of the folder model.path, or model.shape."""
    if config.model.path == "stylebook" or pathlib.Path(config.model.path).is_dir():
        return hub.resolve(config.model.path) / "config.json"
    if not config.model.shape:
        raise UserError(
            f"config.model.path: {config.model.path} is no folder here; --mode=compile loads nothing, so set"
            " config.model.shape to its config.json"
        )
    return pathlib.Path(config.model.shape)


def products(call: Call) -> dict[str, float]:
    """FLOPs of the call's products on all devices: the model's own, and with those that are computed again."""
    traced = call.fn.trace(*call.args, **call.options).jaxpr
    return {
        "model_flops_all_devices": flops.count(traced, call.trips, recomputed=False),
        "executed_flops_all_devices": flops.count(traced, call.trips),
    }


def compile_call(call: Call) -> tuple[dict[str, Any], traffic.Traffic | None]:
    """What one call takes of each device, and what it moves, where the compiler can print it."""
    started = time.perf_counter()
    printed.forget()
    try:
        compiled = call.fn.lower(*call.args, **call.options).compile()
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
        hlo = printed.text(compiled)
    except jax.errors.JaxRuntimeError as error:  # XLA cannot print some of its own asynchronous instructions.
        return row | {"traffic": None, "why_no_traffic": first_line(error)}, None
    moved = traffic.measure(hlo, call.trips)
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
