"""Where a measurement's time goes: the operations that XLA executes in it, by kind and by part of the model.

XLA's profiler says how long each operation of a program took; the compiled program's own text says what it is.
"""

import collections
import pathlib
import re
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
_PHASES, _PARTS = ("prefill", "decode"), ("qkv", "attend", "o", "mlp", "logits")
_WORD = re.compile(r"\w+")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def where(measure: Callable[[], Any], folder: pathlib.Path) -> dict[str, Any]:
    """Traces one measurement.

    Args:
        measure: what is measured, warmed up.
        folder: for the trace.

    Returns:
        seconds: of the measurement, traced.
        busy: the share of it in which XLA executes anything.
        kinds: shares of the operations' time: products, copies, and arithmetic for all else.
        parts: shares of the same time by where in the model: "backward mlp", "decode attend", and "else".
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    started = time.perf_counter()
    with jax.profiler.trace(str(folder), profiler_options=options):
        measure()
        seconds = time.perf_counter() - started  # Writing the trace is not part of it.
    (path,) = folder.glob("**/*.xplane.pb")
    events = list(_events(jax.profiler.ProfileData.from_file(str(path))))
    texts = [e.hlo_modules()[0].to_string() for e in jax.devices()[0].client.live_executables()]
    return {"seconds": seconds, **shares(events, [hlo.parse(text) for text in texts], seconds)}


Event = tuple[int, str, float, float]  # The program's number, the operation, start and duration in ns.


def _events(profile: jax.profiler.ProfileData) -> Iterator[Event]:
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    yield stats["program_id"], stats["hlo_op"], event.start_ns, event.duration_ns


def shares(events: Sequence[Event], modules: Sequence[hlo.Module], seconds: float) -> dict[str, Any]:
    """`where`'s shares, of events and the programs that they may be of."""
    programs: dict[int, list[Event]] = collections.defaultdict(list)
    for event in events:
        programs[event[0]].append(event)
    kinds: dict[str, float] = collections.defaultdict(float)
    parts: dict[str, float] = collections.defaultdict(float)
    spans = []
    for own in programs.values():
        module, known = _module({name for _, name, _, _ in own}, modules)
        for _, name, start, duration in own:
            if known[name].opcode in _CONTROL:
                continue
            spans.append((start, start + duration))
            kinds[_kind(module, known[name])] += duration
            parts[_part(known[name])] += duration
    total = sum(kinds.values())
    return {
        "busy": _covered(spans) / seconds / 1e9,
        "kinds": {name: time / total for name, time in kinds.items()},
        "parts": {name: time / total for name, time in parts.items()},
    }


def _module(names: set[str], modules: Sequence[hlo.Module]) -> tuple[hlo.Module, dict[str, hlo.Instruction]]:
    """The program that executed these operations, and its instructions: the smallest that has them all."""
    found = []
    for module in modules:
        known = {name: i for c in module.computations.values() for name, i in c.instructions.items()}
        if names <= known.keys():
            found.append((module, known))
    if not found:
        raise ValueError(f"no compiled program has all of {sorted(names)[:5]} ...")
    return min(found, key=lambda one: len(one[1]))


def _kind(module: hlo.Module, i: hlo.Instruction) -> str:
    inside = [i]
    if "calls" in i.attributes:
        inside = list(module.computations[i.computation("calls")].instructions.values())
    opcodes = {one.opcode for one in inside}
    if opcodes & {"dot", "convolution"}:
        return "products"
    return "copies" if opcodes <= _COPIES else "arithmetic"


def _part(i: hlo.Instruction) -> str:
    """The innermost of the named scopes that the operation was written in, after its phase."""
    found = _OP_NAME.search(i.rest)
    path = found.group(1) if found else ""
    words = _WORD.findall(path)
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
