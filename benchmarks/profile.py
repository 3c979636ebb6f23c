"""Where a measurement's time goes: the operations that XLA executes in it, by kind and by part of the model.

XLA's profiler says how long each operation of a program took; the compiled program's own text says what it is.
"""

import collections
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from popi_jax.cost import hlo

# Operations that move values, or make constants, and compute nothing. What is a fusion of such is a copy.
_COPIES = frozenset(
    "parameter constant iota tuple get-tuple-element bitcast bitcast-convert convert copy reshape transpose broadcast"
    " slice dynamic-slice dynamic-update-slice concatenate pad reverse gather".split()
)
_CONTROL = ("while", "call", "conditional")  # Their time is that of what they run.
_PHASES = ("prefill", "decode")
_PARTS = ("embed", "qkv", "attend", "o", "mlp", "logits", "draw", "optimizer")
_WORD = re.compile(r"\w+")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def where(measure: Callable[[], Any]) -> dict[str, Any]:
    """Traces one measurement.

    Args:
        measure: what is measured, warmed up.

    Returns:
        seconds: of the measurement, traced.
        busy: the share of it in which XLA executes anything.
        kinds: shares of the operations' time: products, copies, and arithmetic for all else.
        parts: shares of the same time by where in the model: "backward mlp", "decode attend", and "else".
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:  # Of its own: a case has a worker for each peer.
        started = time.perf_counter()
        with jax.profiler.trace(folder, profiler_options=options):
            measure()
            seconds = time.perf_counter() - started  # Writing the trace is not part of it.
        (path,) = pathlib.Path(folder).glob("**/*.xplane.pb")
        events = list(_events(jax.profiler.ProfileData.from_file(str(path))))
    compiled = [e.hlo_modules()[0] for e in jax.devices()[0].client.live_executables()]
    programs = [(program_id(c.as_serialized_hlo_module_proto()), hlo.parse(c.to_string())) for c in compiled]
    return {"seconds": seconds, **shares(events, programs, seconds)}


Event = tuple[int, str, float, float]  # The program's number, the operation, start and duration in ns.


def _events(profile: jax.profiler.ProfileData) -> Iterator[Event]:
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    yield stats["program_id"], stats["hlo_op"], event.start_ns, event.duration_ns


def program_id(proto: bytes) -> int:
    """The number that the profiler knows a program by: field 5 of a serialized HloModuleProto, 0 where it has none.

    Raises:
        ValueError: a field before it that is neither a number nor a string of bytes.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = proto[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(proto):
        field, wire = divmod(varint(), 8)
        if wire not in (0, 2):
            raise ValueError(f"field {field} of an HLO module has the wire type {wire}")
        value = varint()
        if field == 5:
            return value
        at += value if wire == 2 else 0
    return 0


def shares(events: Sequence[Event], programs: Sequence[tuple[int, hlo.Module]], seconds: float) -> dict[str, Any]:
    """`where`'s shares, of events and the programs, with their numbers, that they may be of."""
    by_program: dict[int, list[Event]] = collections.defaultdict(list)
    for event in events:
        by_program[event[0]].append(event)
    kinds: dict[str, float] = collections.defaultdict(float)
    parts: dict[str, float] = collections.defaultdict(float)
    spans = []
    for number, own in by_program.items():
        names = {name for _, name, _, _ in own}
        module, known = _module(number, names, programs)
        told = {name: _what(module, *known[name]) for name in names if known[name][1].opcode not in _CONTROL}
        for _, name, start, duration in own:
            if name in told:
                spans.append((start, start + duration))
                kind, path = told[name]
                kinds[kind] += duration
                parts[_part(path)] += duration
    total = sum(kinds.values())
    return {
        "busy": _covered(spans) / seconds / 1e9,
        "kinds": {name: time / total for name, time in kinds.items()},
        "parts": {name: time / total for name, time in parts.items()},
    }


def _module(
    number: int, names: set[str], programs: Sequence[tuple[int, hlo.Module]]
) -> tuple[hlo.Module, dict[str, tuple[hlo.Computation, hlo.Instruction]]]:
    """The program of this number, and its instructions, which these are among, each after its computation.

    Another program's may have the same names and mean something else. A program that was read from a compilation cache
    has the number that it had where it was compiled: the only one with all these names is it.
    """
    found = []
    for own, module in programs:
        known = {name: (c, i) for c in module.computations.values() for name, i in c.instructions.items()}
        if names <= known.keys():
            found.append((own == number, module, known))
    exact = [one for one in found if one[0]] or found
    if len(exact) != 1:
        raise ValueError(f"{len(exact)} compiled programs have all of {sorted(names)[:5]} ...; program {number} is one")
    return exact[0][1:]


def _what(module: hlo.Module, computation: hlo.Computation, i: hlo.Instruction) -> tuple[str, str]:
    """The kind of an operation, and the path that says where in the model it is.

    A fusion of a product with what follows it has the name of what follows; most of its time is the product's.
    """
    inside = [i]
    if "calls" in i.attributes:
        inside = list(module.computations[i.computation("calls")].instructions.values())
    own = _path(i) or _nearest_path(computation, i)
    for one in inside:
        if one.opcode in ("dot", "convolution"):
            return "products", _path(one) or own
    return ("copies" if {one.opcode for one in inside} <= _COPIES else "arithmetic"), own


def _path(i: hlo.Instruction) -> str:
    """The named scopes that an instruction was written in, and the primitive; "" where XLA has lost them."""
    found = _OP_NAME.search(i.rest)
    return found.group(1) if found else ""


def _nearest_path(computation: hlo.Computation, i: hlo.Instruction) -> str:
    """That of the nearest instruction that reads the result and has one, else of the nearest that it is made from.

    XLA drops the names of products that it turns round, among them most of attention's.
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
    words = _WORD.findall(path.partition("/")[2])  # The first is the program's name, which may be that of a part.
    phase = "backward" if "transpose(" in path else next((word for word in words if word in _PHASES), "")
    part = next((word for word in reversed(words) if word in _PARTS), "else")
    return f"{phase} {part}".strip()


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """How long any of these lasts."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
