"""The data that a compiled program moves on one device: HBM traffic, collectives, host transfers."""

import dataclasses
import re
from collections.abc import Iterable

from popi_jax.modes.cost import collectives as lib
from popi_jax.modes.cost import executed, hlo
from popi_jax.modes.cost.hlo import Computation, Instruction, Module, Shape

# These name, order or pass on existing data. The traffic of a loop, a branch or a call is counted inside it.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier",
    "partition-id", "replica-id", "domain", "while", "conditional", "call", "call-start", "async-start", "async-update",
    "custom-call-update",
}  # fmt: skip
# Custom calls of the TPU compiler that name memory but move nothing.
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
_SLICES = ("dynamic-slice", "slice", "gather")
_IN_PLACE = ("dynamic-update-slice", "scatter")
_ALIASED = re.compile(r"\{([\d, ]*)\}: \(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one call of the program: number of runs, and total bytes that one device sends."""

    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The traffic of one call of the program on one device.

    Attributes:
        hbm_bytes: bytes read and written. Every executed instruction reads its operands once and writes its results
            once; slices and in-place updates count only their part, and arrays that the compiler put in VMEM do not
            count. The count is too high if a result stays on the chip for its next reader, and too low if a product or
            a kernel reads its operands again, block by block; the padding of tiles is left out.
        collectives: by kind, such as "all-gather".
        host_transfers: names of the instructions that send to or wait for the host.
        unknown_loops: names of the loops whose trip count is not in the text; `unknown_trips` supplies it.
    """

    hbm_bytes: float
    collectives: dict[str, Collective]
    host_transfers: list[str]
    unknown_loops: list[str]


def measure(text: str, unknown_trips: Iterable[int] = ()) -> Traffic:
    """Measures a program's traffic.

    Args:
        text: optimised HLO, compiled.as_text().
        unknown_trips: trip counts of the loops whose end depends on the data, such as decode's; see executed.walk.

    Raises:
        ValueError: the text is not understood.
    """
    module = hlo.parse(text)
    program = executed.walk(module, unknown_trips, lambda computation, i: _weight(module, computation, i))
    hbm, moved, host = 0.0, dict[str, Collective](), []
    for run in program.executions:
        hbm += run.times * hbm_bytes(module, run.computation, run.instruction)
        for kind, size in _collectives(module, run.computation, run.instruction):
            before = moved.get(kind, Collective(0, 0.0))
            moved[kind] = Collective(before.count + run.times, before.bytes + run.times * size)
        if _is_host_transfer(run.instruction):
            host.append(run.instruction.name)
    return Traffic(hbm, dict(sorted(moved.items())), list(dict.fromkeys(host)), program.unknown_loops)


def _weight(module: Module, computation: Computation, i: Instruction) -> float:
    sent = sum(size for _, size in _collectives(module, computation, i))
    return hbm_bytes(module, computation, i) + sent


def _collectives(module: Module, computation: Computation, i: Instruction) -> list[tuple[str, float]]:
    """Returns kind and bytes sent of each collective that an instruction is or, if a fusion, contains."""
    if i.opcode != "fusion":
        kind = lib.kind(i)
        return [(kind, lib.sent(module, computation, i))] if kind else []
    found = []
    for at, own in lib.fused(module, i):
        kind, size = lib.kind(own) or "", lib.sent(module, at, own)
        # Half of an all-reduce, which is a reduce-scatter and an all-gather.
        found.append(("reduce-scatter", size / 2) if lib.scatters(module, at, own) else (kind, size))
    return found


def _is_host_transfer(i: Instruction) -> bool:
    if i.opcode in ("send", "recv"):
        return i.attributes.get("is_host_transfer") == "true"
    return i.opcode in ("infeed", "outfeed") or (i.opcode == "custom-call" and "callback" in i.target)


def hbm_bytes(module: Module, computation: Computation, i: Instruction) -> float:
    """Returns the bytes of HBM that one run of an instruction reads and writes; see Traffic."""
    operands = [operand.shape for operand in computation.operands(i)]
    if i.opcode in _FREE or i.opcode.endswith("-done") or i.target in _FREE_TARGETS:
        return 0.0
    if i.opcode == "custom-call-start" and "called_computations" in i.attributes:
        return 0.0
    if i.opcode == "fusion":
        return _fusion(module, computation, i)
    if i.opcode.removesuffix("-start") in _SLICES:
        made = lib.result(i)
        indices = sum(_in_hbm(operand) for operand in operands[1:])
        return _part_of(operands[0], made.bytes) + indices + _in_hbm(made)
    if i.opcode in _IN_PLACE:
        changed = _changed(computation, i)
        return sum(_in_hbm(operand) for operand in operands[1:]) + _part_of(operands[0], changed)
    if i.opcode == "send":
        return _in_hbm(operands[0])
    if i.opcode == "recv":
        return _in_hbm(lib.tuple_parts(i.shape)[0])
    return sum(_in_hbm(operand) for operand in operands) + _in_hbm(lib.result(i))


def _in_hbm(shape: Shape) -> float:
    return sum(leaf.bytes for leaf in hlo.leaves(shape) if leaf.memory_space == hlo.HBM)


def _part_of(shape: Shape, size: float) -> float:
    """Returns `size`, but at most the bytes of the array that are in HBM."""
    return min(_in_hbm(shape), size)


def _changed(computation: Computation, i: Instruction) -> float:
    """Returns the bytes of its first operand that an in-place update writes; a scatter also reads what it updates.

    A scatter's operands are n arrays, the indices, and n arrays of updates.
    """
    operands = computation.operands(i)
    if i.opcode == "scatter":
        return 2 * sum(update.shape.bytes for update in operands[len(operands) // 2 + 1 :])
    return operands[1].shape.bytes


def _fusion(module: Module, computation: Computation, i: Instruction) -> float:
    inner = module.computations[i.computation("calls")]
    parts, written = lib.tuple_parts(i.shape), _written(module, inner)
    results = list(range(len(parts)))
    if lib.holds(module, i):
        # Fusions pass on the buffers of a running collective; these count where it starts.
        aliased = {
            index.split(",")[0] for index in _ALIASED.findall(i.attributes.get("output_to_operand_aliasing", ""))
        }
        results = [n for n in results if str(n) not in aliased and "" not in aliased]
    operands = enumerate(computation.operands(i))
    read = sum(_part_of(operand.shape, _read(module, inner, inner.parameters[n])) for n, operand in operands)
    return read + sum(_part_of(parts[n], written[n]) for n in results)


def _read(module: Module, computation: Computation, i: Instruction) -> float:
    """Returns the bytes of a fusion's parameter, or of a view of it, that the fusion reads."""
    whole = i.shape.bytes
    if i.root:
        return whole
    total = 0.0
    for user in computation.users[i.name]:
        is_first = user.operands[0] == i.name and i.name not in user.operands[1:]
        if user.opcode in _SLICES and is_first:
            total += user.shape.bytes
        elif user.opcode in _IN_PLACE and is_first and user in _results(computation):
            continue  # The updated part counts as written.
        elif user.opcode == "tuple" and user.root and i.opcode == "parameter":
            continue  # Passed on unchanged.
        elif user.target == "AsyncCollectiveDone" or (lib.kind(user) and lib.carried(module, user)):
            continue  # Counted where the collective starts.
        elif user.opcode == "bitcast":
            total += _read(module, computation, user)
        elif user.opcode == "fusion":
            inner = module.computations[user.computation("calls")]
            uses = [n for n, name in enumerate(user.operands) if name == i.name]
            total += sum(_read(module, inner, inner.parameters[n]) for n in uses)
        else:
            return whole
    return min(whole, total)


def _results(computation: Computation) -> list[Instruction]:
    """Returns the instruction that computes each result of a fusion, looking through views."""
    root = computation.root
    results = computation.operands(root) if root.opcode == "tuple" else [root]
    return [_viewed(computation, one) for one in results]


def _viewed(computation: Computation, i: Instruction) -> Instruction:
    while i.opcode == "bitcast":
        i = computation.operands(i)[0]
    return i


def _written(module: Module, computation: Computation) -> list[float]:
    """Returns the bytes of each result that a fusion writes."""
    written: list[float] = []
    for one in _results(computation):
        if one.opcode in _IN_PLACE:
            written.append(_changed(computation, one))
        elif one.opcode == "parameter" and not computation.parameters[int(one.literal)].root:
            written.append(0.0)
        elif one.opcode == "fusion":
            written += _written(module, module.computations[one.computation("calls")])
        else:
            written += [part.bytes for part in lib.tuple_parts(one.shape)]
    return written
