"""Where a measurement's time goes: the operations that XLA executes in it, by kind and by part of the model.

XLA's profiler gives the time of each operation, and the compiled program's text says what the operation is.
"""

import collections
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from google.protobuf import empty_pb2, unknown_fields

from popi_jax.modes.cost import hlo

# Operations that move values or make constants. A fusion of these alone is a copy.
_COPIES = frozenset(
    "parameter constant iota tuple get-tuple-element bitcast bitcast-convert convert copy reshape transpose broadcast"
    " slice dynamic-slice dynamic-update-slice concatenate pad reverse gather".split()
)
_CONTROL = ("while", "call", "conditional")  # Their time is the time of the operations that they run.
_PHASES = ("prefill", "decode")
_PARTS = ("embed", "qkv", "attend", "o", "mlp", "logits", "draw", "optimizer")
_WORD = re.compile(r"\w+")
_OP_NAME = re.compile(r'op_name="([^"]*)"')

Event = tuple[int, str, float, float]  # The program's number, the operation, start and duration in ns.


def where(measurement: Callable[[], Any]) -> dict[str, Any]:
    """Traces one measurement, which must be warmed up.

    Returns:
        seconds: of the traced measurement.
        busy: the share of it in which XLA executes anything.
        kinds: shares of the operations' time: products, copies, and arithmetic for everything else.
        parts: shares of the same time by part of the model, such as "backward mlp", "decode attend" and "else".
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with jax.profiler.trace(folder, profiler_options=options):
            measurement()
            seconds = time.perf_counter() - started  # Before the trace is written.
        (path,) = pathlib.Path(folder).glob("**/*.xplane.pb")
        events = list(_events(jax.profiler.ProfileData.from_file(str(path))))
    compiled = [e.hlo_modules()[0] for e in jax.devices()[0].client.live_executables()]
    programs = {program_id(c.as_serialized_hlo_module_proto()): hlo.parse(c.to_string()) for c in compiled}
    return {"seconds": seconds, **shares(events, programs, seconds)}


def _events(profile: jax.profiler.ProfileData) -> Iterator[Event]:
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    yield stats["program_id"], stats["hlo_op"], event.start_ns, event.duration_ns


def program_id(proto: bytes) -> int:
    """The profiler's number of a program: field 5 of its serialized HloModuleProto, which leaves out a 0."""
    fields = unknown_fields.UnknownFieldSet(empty_pb2.Empty.FromString(proto))
    return next((field.data for field in fields if field.field_number == 5), 0)


def shares(events: Sequence[Event], programs: Mapping[int, hlo.Module], seconds: float) -> dict[str, Any]:
    """The shares that `where` returns, from events and the programs by number."""
    known = {
        number: {name: (module, c, i) for c in module.computations.values() for name, i in c.instructions.items()}
        for number, module in programs.items()
        if any(event[0] == number for event in events)
    }
    told = {key: _what(*known[key[0]][key[1]]) for key in {event[:2] for event in events}}
    kinds: dict[str, float] = collections.defaultdict(float)
    parts: dict[str, float] = collections.defaultdict(float)
    spans = []
    for number, name, start, duration in events:
        kind, path = told[number, name]
        if kind:
            spans.append((start, start + duration))
            kinds[kind] += duration
            parts[_part(path)] += duration
    total = sum(kinds.values())
    return {
        "busy": _covered(spans) / seconds / 1e9,
        "kinds": {name: time / total for name, time in kinds.items()},
        "parts": {name: time / total for name, time in parts.items()},
    }


def _what(module: hlo.Module, computation: hlo.Computation, i: hlo.Instruction) -> tuple[str, str]:
    """The kind of an operation, "" for control flow, and the path that says where in the model it is.

    XLA names a fusion after its last operation. A fusion with a product counts as the product, which takes most of its
    time.
    """
    if i.opcode in _CONTROL:
        return "", ""
    inside = [i]
    if "calls" in i.attributes:
        inside = list(module.computations[i.computation("calls")].instructions.values())
    own = _path(i) or _nearest_path(computation, i)
    for one in inside:
        if one.opcode in ("dot", "convolution"):
            return "products", _path(one) or own
    return ("copies" if {one.opcode for one in inside} <= _COPIES else "arithmetic"), own


def _path(i: hlo.Instruction) -> str:
    """The named scopes and the primitive of an instruction; "" if XLA has lost them."""
    found = _OP_NAME.search(i.rest)
    return found.group(1) if found else ""


def _nearest_path(computation: hlo.Computation, i: hlo.Instruction) -> str:
    """The path of the nearest instruction that reads the result and has one, else of the nearest that feeds it.

    XLA drops the names of products that it transposes, among them most of attention's.
    """
    users: dict[str, list[str]] = collections.defaultdict(list)
    for other in computation.instructions.values():
        for operand in other.operands:
            users[operand].append(other.name)
    for neighbours in (users.__getitem__, lambda name: computation.instructions[name].operands):
        seen, names = {i.name}, [i.name]
        while names:
            names = list(dict.fromkeys(n for name in names for n in neighbours(name) if n not in seen))
            if path := next(filter(None, (_path(computation.instructions[name]) for name in names)), ""):
                return path
            seen.update(names)
    return ""


def _part(path: str) -> str:
    """The innermost part of the model in a path, after its phase."""
    words = _WORD.findall(path.partition("/")[2])  # Without the program's name, which may be a part's.
    phase = "backward" if "transpose(" in path else next((word for word in words if word in _PHASES), "")
    part = next((word for word in reversed(words) if word in _PARTS), "else")
    return f"{phase} {part}".strip()


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """The time that these spans cover together."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
