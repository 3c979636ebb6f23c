"""What a compiled program moves on one device: HBM traffic, collectives, transfers to and from the host."""

import dataclasses
import re
from collections.abc import Iterable

from popi_jax.cost import collectives as lib
from popi_jax.cost import executed, hlo
from popi_jax.cost.hlo import Computation, Instruction, Module, Shape

# They name, order or pass on what is there. What a loop, a branch or a call moves is counted inside it.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier",
    "partition-id", "replica-id", "domain", "while", "conditional", "call", "call-start", "async-start", "async-update",
    "custom-call-update",
}  # fmt: skip
# Custom calls of the TPU's compiler that give a name to memory and move nothing.
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
_SLICES = ("dynamic-slice", "slice", "gather")
_IN_PLACE = ("dynamic-update-slice", "scatter")
_ALIASED = re.compile(r"\{([\d, ]*)\}: \(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Of one kind in one call of the program: how often it runs, and the bytes that one device sends for them all."""

    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one call of the program, on one device.

    Attributes:
        hbm_bytes: read and written. Every instruction that runs reads its operands once and writes its results once, a
            slice or an update in place only its part. An upper bound as far as a result may stay on the chip for who
            reads it next, though what the compiler laid into VMEM is left out; what a product or a kernel reads again,
            block by block, and what tiles pad are not in it.
        collectives: by kind, such as "all-gather".
        host_transfers: names of the instructions that wait for or send to the host.
        unknown_loops: names of the loops whose number of turns was not in the text: `unknown_trips` says them.
    """

    hbm_bytes: float
    collectives: dict[str, Collective]
    host_transfers: list[str]
    unknown_loops: list[str]


def measure(text: str, unknown_trips: Iterable[int] = ()) -> Traffic:
    """Counts what a program moves.

    Args:
        text: optimised HLO, compiled.as_text().
        unknown_trips: turns of each loop that ends when the data says so, such as decode's; see executed.walk.

    Raises:
        ValueError: text that is not understood.
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
    """Kind and bytes sent of what an instruction is, or carries out as a fusion."""
    if i.opcode != "fusion":
        kind = lib.kind(i)
        return [(kind, lib.sent(module, computation, i))] if kind else []
    found = []
    for at, own in lib.fused(module, i):
        kind, size = lib.kind(own) or "", lib.sent(module, at, own)
        # An all-reduce is a reduce-scatter and an all-gather: half of it.
        found.append(("reduce-scatter", size / 2) if lib.scatters(module, at, own) else (kind, size))
    return found


def _is_host_transfer(i: Instruction) -> bool:
    if i.opcode in ("send", "recv"):
        return i.attributes.get("is_host_transfer") == "true"
    return i.opcode in ("infeed", "outfeed") or (i.opcode == "custom-call" and "callback" in i.target)


def hbm_bytes(module: Module, computation: Computation, i: Instruction) -> float:
    """Bytes of HBM that one run of an instruction reads and writes; see Traffic."""
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
    """`size` bytes of an array, as far as it is in HBM: never more than it has."""
    return min(_in_hbm(shape), size)


def _changed(computation: Computation, i: Instruction) -> float:
    """Bytes of its first operand that an update in place writes; a scatter combines with what is there: it reads too.

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
        # The buffers of a collective on its way are handed on from fusion to fusion: they count where it starts.
        aliased = {
            index.split(",")[0] for index in _ALIASED.findall(i.attributes.get("output_to_operand_aliasing", ""))
        }
        results = [n for n in results if str(n) not in aliased and "" not in aliased]
    operands = enumerate(computation.operands(i))
    read = sum(_part_of(operand.shape, _read(module, inner, inner.parameters[n])) for n, operand in operands)
    return read + sum(_part_of(parts[n], written[n]) for n in results)


def _read(module: Module, computation: Computation, i: Instruction) -> float:
    """Bytes of a fusion's parameter, or of a view of it, that are read within the fusion."""
    whole = i.shape.bytes
    if i.root:
        return whole
    total = 0.0
    for user in computation.users[i.name]:
        is_first = user.operands[0] == i.name and i.name not in user.operands[1:]
        if user.opcode in _SLICES and is_first:
            total += user.shape.bytes
        elif user.opcode in _IN_PLACE and is_first and user in _results(computation):
            continue  # Its part counts as written.
        elif user.opcode == "tuple" and user.root and i.opcode == "parameter":
            continue  # Handed on as it is.
        elif user.target == "AsyncCollectiveDone" or (lib.kind(user) and lib.carried(module, user)):
            continue  # It counts where the collective starts.
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
    """What makes each result of a fusion, behind views."""
    root = computation.root
    results = computation.operands(root) if root.opcode == "tuple" else [root]
    return [_viewed(computation, one) for one in results]


def _viewed(computation: Computation, i: Instruction) -> Instruction:
    while i.opcode == "bitcast":
        i = computation.operands(i)[0]
    return i


def _written(module: Module, computation: Computation) -> list[float]:
    """Bytes of each result of a fusion that it writes."""
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
