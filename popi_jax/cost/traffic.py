"""What a compiled program moves on one device: bytes of HBM, collectives, transfers to and from the host.

Every instruction counts as often as it runs: a loop's body as many times as its condition allows.
"""

import dataclasses
import math
import re

from popi_jax.cost import hlo
from popi_jax.cost.hlo import Computation, Instruction, Module

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# No bytes of their own: names for what is there, or markers.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "async-done", "async-update", "copy-done", "add-dependency", "domain",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """How often a kind of collective runs in one call of the program, and the bytes that a device sends for it."""

    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one call of the program, on one device.

    Attributes:
        hbm_bytes: operands read and results written by what runs at the top level of each computation: an upper bound,
            for a result may stay on the chip for the next instruction.
        collectives: by kind.
        host_transfers: names of instructions that talk to the host.
        unknown_loops: how many loops had no trip count that could be read, so that the caller's was taken.
    """

    hbm_bytes: float
    collectives: dict[str, Collective]
    host_transfers: list[str]
    unknown_loops: int


def measure(text: str, unknown_trips: int = 1) -> Traffic:
    """Counts what the program of compiled.as_text() moves.

    Args:
        text: optimised HLO, of a CPU, GPU or TPU.
        unknown_trips: for loops whose condition does not say how often they run.
    """
    walk = _Walk(hlo.parse(text), unknown_trips)
    bytes_, collectives = walk.computation(walk.module.entry)
    return Traffic(
        bytes_, {kind: Collective(*own) for kind, own in sorted(collectives.items())}, walk.host, len(walk.unknown)
    )


Moved = tuple[float, dict[str, tuple[float, float]]]


class _Walk:
    """Sums up over computations, each looked at once."""

    def __init__(self, module: Module, unknown_trips: int):
        self.module, self.unknown_trips = module, unknown_trips
        self.host: list[str] = []
        self.unknown: set[str] = set()
        self._known: dict[str, Moved] = {}

    def computation(self, name: str) -> Moved:
        if name not in self._known:
            own = self.module.computations[name]
            self._known[name] = _total([self._instruction(i, own) for i in own.values()])
        return self._known[name]

    def _instruction(self, i: Instruction, own: Computation) -> Moved:
        if _talks_to_host(i):
            self.host.append(i.name)
        if i.opcode in _FREE or i.opcode.endswith("-done"):
            return 0.0, {}
        if i.opcode == "while":
            trips = self._trips(i)
            bytes_, collectives = _total([self.computation(i.called[key]) for key in ("body", "condition")])
            return trips * bytes_, {kind: (trips * n, trips * size) for kind, (n, size) in collectives.items()}
        if i.opcode == "conditional":
            return max((self.computation(name) for name in i.branches), key=lambda moved: moved[0])
        if i.opcode in ("call", "async-start"):
            return self.computation(i.called["to_apply" if i.opcode == "call" else "calls"])
        kind = next((kind for kind in _KINDS if i.opcode in (kind, f"{kind}-start")), None)
        if kind is not None:
            sent = _sent(kind, i, own, self.module.partitions)
            return self._touched(i, own), {kind: (1.0, sent)}
        inside: dict[str, tuple[float, float]] = {}
        if "calls" in i.called:  # A fusion: its collectives count, but of its bytes only those that leave it.
            inside = self.computation(i.called["calls"])[1]
        return self._touched(i, own), inside

    def _touched(self, i: Instruction, own: Computation) -> float:
        """Bytes of HBM that the instruction reads and writes."""
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * hlo.nbytes(i.shape, hbm_only=True)
        if i.opcode == "dynamic-update-slice":
            return 2 * _operand_bytes(own, i.operands[1])
        if i.opcode.endswith("-start"):  # Its result repeats its operands.
            return 2 * sum(_operand_bytes(own, name) for name in i.operands)
        if i.opcode == "fusion":
            return _fusion_reads(self.module, i, own) + _fusion_writes(self.module, i)
        return sum(_operand_bytes(own, name) for name in i.operands) + hlo.nbytes(i.shape, hbm_only=True)

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r"known_trip_count[^\d]*(\d+)", loop.attributes)
        if known:
            return int(known.group(1))
        limits = _limits(self.module, self.module.computations[loop.called["condition"]])
        if len(limits) != 1:
            self.unknown.add(loop.name)
            return self.unknown_trips
        return limits[0]


def _total(parts: list[Moved]) -> Moved:
    collectives: dict[str, tuple[float, float]] = {}
    for _, own in parts:
        for kind, (n, size) in own.items():
            before = collectives.get(kind, (0.0, 0.0))
            collectives[kind] = (before[0] + n, before[1] + size)
    return sum(bytes_ for bytes_, _ in parts), collectives


def _limits(module: Module, condition: Computation) -> list[int]:
    """What a condition compares its counter with, which counts up from 0 as a scan's does."""
    found = []
    for i in condition.values():
        inner = module.computations.get(i.called.get("calls", ""), {})
        directions = [
            re.search(r"direction=(\w+)", c.attributes) for c in (i, *inner.values()) if c.opcode == "compare"
        ]
        directions = [d for d in directions if d]
        if not directions:
            continue
        scope = [*(condition[name] for name in i.operands if name in condition), *inner.values()]
        limits = [int(c.operands[0]) for c in scope if c.opcode == "constant" and re.match(r"[su]\d+\[\]", c.shape)]
        if len(limits) == 1 and directions[0] and directions[0].group(1) in ("LT", "LE"):
            found.append(limits[0] + (directions[0].group(1) == "LE"))
    return found


def _sent(kind: str, i: Instruction, own: Computation, partitions: int) -> float:
    """Bytes that one device sends, with the ring algorithms' counts."""
    n = _group_size(i.attributes, partitions)
    size = sum(_operand_bytes(own, name, hbm_only=False) for name in i.operands)
    if kind == "all-gather":
        return size * (n - 1)
    if kind == "all-reduce":
        return 2 * size * (n - 1) / n
    if kind == "collective-permute":
        return size
    return size * (n - 1) / n


def _group_size(attributes: str, partitions: int) -> int:
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota.group(2))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if named:  # mesh['a'=4,'b'=2] {'b'}; a part of an axis is 'a':(1)2, of size 2.
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return len(listed.group(1).split(",")) if listed else partitions


def _operand_bytes(own: Computation, name: str, hbm_only: bool = True) -> float:
    return hlo.nbytes(own[name].shape, hbm_only=hbm_only) if name in own else 0.0


def _fusion_reads(module: Module, i: Instruction, own: Computation) -> float:
    """Of each operand its size, but of one that is only sliced, as a scan's stacked weights are, the slices."""
    fused = module.computations[i.called["calls"]]
    return sum(
        min(_operand_bytes(own, i.operands[place]), _read(module, fused, parameter))
        for place, parameter in _parameters(fused)
    )


def _parameters(fused: Computation) -> list[tuple[int, Instruction]]:
    return [(int(p.operands[0]), p) for p in fused.values() if p.opcode == "parameter"]


def _read(module: Module, fused: Computation, value: Instruction) -> float:
    """Bytes of a value that its users in a fused computation read; fusions within it are looked into."""
    total = 0.0
    for user in (u for u in fused.values() if value.name in u.operands):
        if user.opcode == "bitcast":
            total += _read(module, fused, user)
        elif user.opcode == "dynamic-update-slice" and value.name not in user.operands[1:]:
            pass  # It is written in place.
        elif user.opcode in ("dynamic-slice", "slice", "gather") and value.name == user.operands[0]:
            total += hlo.nbytes(user.shape)
        elif user.opcode == "fusion":
            inner = module.computations[user.called["calls"]]
            total += sum(_read(module, inner, p) for n, p in _parameters(inner) if user.operands[n] == value.name)
        else:
            return hlo.nbytes(value.shape)
    return min(total, hlo.nbytes(value.shape))


def _fusion_writes(module: Module, i: Instruction) -> float:
    """Of the result its size, but of a part that is updated in place the update."""
    saved = _updated_in_place(module, module.computations[i.called["calls"]], None)
    return max(hlo.nbytes(i.shape, hbm_only=True) - saved, 0.0)


def _updated_in_place(module: Module, fused: Computation, name: str | None) -> float:
    """Bytes of a result (the root where no name is given) that stay as they were."""
    result = fused[name] if name is not None else next(r for r in fused.values() if r.root)
    if result.opcode == "tuple":
        return sum(_updated_in_place(module, fused, part) for part in result.operands)
    if result.opcode == "bitcast" and result.operands[0] in fused:
        return _updated_in_place(module, fused, result.operands[0])
    if result.opcode == "fusion":
        return _updated_in_place(module, module.computations[result.called["calls"]], None)
    if result.opcode == "dynamic-update-slice":
        return hlo.nbytes(result.shape) - hlo.nbytes(fused[result.operands[1]].shape)
    return 0.0


def _talks_to_host(i: Instruction) -> bool:
    if i.opcode in ("send", "recv"):
        return "is_host_transfer=true" in i.attributes
    if i.opcode in ("infeed", "outfeed"):
        return True
    return i.opcode == "custom-call" and "callback" in i.attributes.split("backend_config")[0]
