"""--mode=compile: compiles every program of a config for a TPU slice that need not exist, and reports its cost.

Nothing runs and nothing is loaded. Every text is as long as its limit. Memory is the compiler's own plan; times are
lower bounds from the chip's public peaks (popi_jax/modes/cost).
"""

import dataclasses
import math
import os
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from popi_jax.config import SUMMARIZED, Config
from popi_jax.data import files
from popi_jax.data.shapes import Shapes, placed
from popi_jax.errors import UserError, first_line
from popi_jax.model import hub, sharding
from popi_jax.model.weights import Tree
from popi_jax.modes import setup
from popi_jax.modes.cost import bound, chips, flops, printed, traffic
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
        UserError: libtpu is not installed, or the name is none of a slice.
    """
    if topology == HERE:
        return jax.devices()
    known = f"give a slice, such as {', '.join(chips.TOPOLOGIES)}, or {HERE!r} for this machine"
    sizes = re.fullmatch(r"\w+:([1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2})(_twisted|_untwisted)?", topology)
    # Checked here, because libtpu can end the process over sizes that no slice has.
    if sizes is None or math.prod(map(int, sizes[1].split("x"))) > chips.LARGEST:
        raise UserError(f"--topology={topology}: not the name of a slice of at most {chips.LARGEST} chips; {known}")
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
            f"--topology={topology}: {first_line(error)}; install libtpu (pip install libtpu) and {known}"
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
    found += [Call(f"{kind}_step", programs.train_steps[kind], (state, base, shapes.step(kind))) for kind in kinds]
    if writes:
        k = config.eval.summaries_per_user
        found.append(_summaries(shapes, programs, "evaluate_sample", base, state.phi, text.in_use(config), k))
    found.append(Call("evaluate_score", programs.score, (base, state.theta, shapes.scoring())))
    if config.eval.samples:
        sampling = dataclasses.replace(text.in_use(config), batch_size=config.eval.samples)
        lengths = config.limits.prompt, config.eval.response_tokens
        found.append(_drawing(shapes, programs, "evaluate_respond", base, state.theta, sampling, 1, *lengths))
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
    """Compiles every program and reports its cost; `table` shows it, --output holds it.

    Args:
        config: the experiment.
        topology: see `slice_devices`.

    Raises:
        UserError: for a config that does not fit the slice's mesh or the model.
    """
    devices = slice_devices(topology)
    mesh = setup.make_mesh(config, devices)
    model = hub.read_config(model_shape(config), **setup.model_options(config, mesh))
    run = setup.make_programs(config, mesh, model)
    # A kernel's products are known to the kernel alone; plain attention does as many, apart from masked ones.
    plain = setup.make_programs(config, mesh, dataclasses.replace(model, attention="xla"))
    kind = devices[0].device_kind
    chip = None if topology == HERE else chips.chip(kind)
    steps = []
    for call, counted in zip(calls(config, run), calls(config, plain), strict=True):
        print(f"compiling {call.name} ...", flush=True)
        taken, moved = compile_call(call)
        step = {"name": call.name} | taken | products(counted, mesh.size)
        steps.append(step if chip is None else step | at_best(step, moved, chip))
    return {
        "schema": 1,
        "config": config.name,
        "topology": topology,
        "device_kind": kind,
        "devices": mesh.size,
        "hbm_bytes_per_device": None if chip is None else chip.hbm_bytes,
        "mesh": dict(mesh.shape),
        "steps": steps,
    }


def check_output(path: pathlib.Path) -> None:
    """Raises UserError unless the path is free or has an earlier report."""
    files.check_output(path)
    if path.exists() and path.stat().st_size:
        there = files.read_json(path, "choose another --output") or {}
        if not {"schema", "topology", "steps"} <= there.keys():
            raise UserError(f"--output={path}: not a report of --mode=compile; choose another --output")


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


def products(call: Call, devices: int) -> dict[str, float]:
    """FLOPs of the call's products on each of the devices: the model's own, and with those that are computed again."""
    traced = call.fn.trace(*call.args, **call.options).jaxpr
    return {
        "model_flops_per_device": flops.count(traced, call.trips, recomputed=False) / devices,
        "executed_flops_per_device": flops.count(traced, call.trips) / devices,
    }


def compile_call(call: Call) -> tuple[dict[str, Any], traffic.Traffic | None]:
    """The cost of one call on each device, and its traffic where the compiler can print the program."""
    started = time.perf_counter()
    printed.forget()
    try:
        compiled = call.fn.lower(*call.args, **call.options).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "why_not": _why_not(error), "compile_s": time.perf_counter() - started}, None
    seconds, memory = time.perf_counter() - started, compiled.memory_analysis()
    # A donated array is an argument and a result in one place.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    row: dict[str, Any] = {
        "fits": True,
        "compile_s": seconds,
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        "temp_bytes_per_device": memory.temp_size_in_bytes,
        "total_bytes_per_device": memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
        # The compiler's own count: the body of a loop counts once, however often it runs.
        "compiler_flops_per_device": (compiled.cost_analysis() or {}).get("flops"),
    }
    try:
        hlo = printed.text(compiled)
    except jax.errors.JaxRuntimeError as error:  # XLA cannot print some of its own asynchronous instructions.
        return row | _UNKNOWN_TRAFFIC | {"why_no_traffic": first_line(error)}, None
    moved = traffic.measure(hlo, call.trips)
    return row | {
        "hbm_bytes_moved_per_device": moved.hbm_bytes,
        "collective_bytes_per_device": {name: own.bytes for name, own in moved.collectives.items()},
        "collective_counts": {name: own.count for name, own in moved.collectives.items()},
        "host_transfers": moved.host_transfers,
        "unknown_loops": moved.unknown_loops,
    }, moved


_UNKNOWN_TRAFFIC = dict.fromkeys(
    (
        "hbm_bytes_moved_per_device",
        "collective_bytes_per_device",
        "collective_counts",
        "host_transfers",
        "unknown_loops",
    )
)


def at_best(step: dict[str, Any], moved: traffic.Traffic | None, chip: chips.Chip) -> dict[str, Any]:
    """The bounds on the call's time, and the share of the chip's peak that the tightest leaves to the model."""
    if not step["fits"]:
        return {}
    known = traffic.Traffic(0.0, {}, [], []) if moved is None else moved
    bounds = bound.bound(step["executed_flops_per_device"], known, chip, devices=1)
    if moved is None:  # The other two bounds are unknown, so which one binds is unknown too.
        return {
            "bounds_s": {"compute_s": bounds.compute_s, "memory_s": None, "interconnect_s": None},
            "bound_s": bounds.compute_s,
            "bound_by": None,
            "mfu_bound": None,
            "advice": None,
        }
    return {
        "bounds_s": {name: getattr(bounds, name) for name in ("compute_s", "memory_s", "interconnect_s")},
        "bound_s": bounds.seconds,
        "bound_by": bounds.binding,
        "mfu_bound": bounds.mfu(step["model_flops_per_device"]),
        "advice": bound.advice(bounds),
    }


def _why_not(error: Exception) -> str:
    """The sentence with both figures, out of a page of the compiler's."""
    pattern = r"(total )?memory required[^.]*\([^)]*\)[^.]*\.[^.]*\.|Used \S+ of \S+ hbm\."
    wanted = re.search(pattern, str(error))
    return " ".join(wanted.group().split()) if wanted else first_line(error)


def table(found: dict[str, Any]) -> str:
    """The report as text for the terminal."""
    GiB, devices, lines = 2**30, found["devices"], []
    shape = " x ".join(f"{name}={size}" for name, size in found["mesh"].items())
    lines.append(f"{found['config']} on {found['topology']}: {devices} x {found['device_kind']}, mesh {shape}")
    limit = found["hbm_bytes_per_device"]
    of = "" if limit is None else f" of {limit / GiB:.2f}"
    for step in found["steps"]:
        lines.append(f"\n{step['name']}  (compiled in {step['compile_s']:.0f} s)")
        if not step["fits"]:
            lines.append(f"  does not fit: {step['why_not']}")
            continue
        total, arguments, temp = (step[f"{name}_bytes_per_device"] / GiB for name in ("total", "argument", "temp"))
        model, executed = (devices * step[f"{name}_flops_per_device"] / 1e12 for name in ("model", "executed"))
        lines += [
            f"  memory       {total:.2f}{of} GiB per device: arguments {arguments:.2f}, temporaries {temp:.2f}",
            f"  products     {model:.3g} TFLOP on all devices, {executed:.3g} including recomputation",
            f"  traffic      {_traffic(step)}",
        ]
        if "bound_s" in step and step["bound_by"] is None:
            lines.append(f"  roofline     at least {step['bound_s']:.3g} s, for the products alone")
        elif "bound_s" in step:
            lines.append(
                f"  roofline     {step['bound_s']:.3g} s, bound by {step['bound_by']};"
                f" {100 * step['mfu_bound']:.0f}% of peak at that bound. {step['advice']}"
            )
    return "\n".join(lines)


def _traffic(step: dict[str, Any]) -> str:
    if step["hbm_bytes_moved_per_device"] is None:
        return f"unknown, because the compiler cannot print this program: {step['why_no_traffic']}"
    parts = [f"{step['hbm_bytes_moved_per_device'] / 2**30:.3g} GiB of HBM per device"]
    parts += [
        f"{name} {size / 2**30:.3g} GiB in {step['collective_counts'][name]:.0f}"
        for name, size in step["collective_bytes_per_device"].items()
    ]
    if step["host_transfers"]:
        parts.append(f"TO OR FROM THE HOST: {', '.join(step['host_transfers'])}")
    return "; ".join(parts)
