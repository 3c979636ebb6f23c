"""The bytes that one device sends over its links for each collective of an HLO module."""

import math
import re

from popi_jax.modes.cost.hlo import Array, Computation, Instruction, Module, Shape, Tuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_LISTED = re.compile(r"\{([\d,\s]*)\}")
_IOTA = re.compile(r"\[(\d+),(\d+)\]<=")
# The device order may follow the mesh, after a comma, before the axes.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))? *\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_MESH_GROUP = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")


def kind(i: Instruction) -> str | None:
    """Returns which of KINDS an instruction is or starts; None for all others, including a -done."""
    opcode = i.opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def result(i: Instruction) -> Shape:
    """Returns the shape of an instruction's result; for a -start, that of its -done."""
    if not i.opcode.endswith("-start") or i.opcode == "all-reduce-start" or isinstance(i.shape, Array):
        return i.shape
    # A copy has (destination, source, ...), all others have (operands, results, ...).
    return i.shape.parts[0 if i.opcode == "copy-start" else 1]


def sent(module: Module, computation: Computation, i: Instruction) -> float:
    """Returns the bytes that one device sends in one run of a collective, with ring algorithms among n participants.

    An all-gather and a reduce-scatter send (n-1)/n of the whole array, an all-reduce twice that, an all-to-all (n-1)/n
    of its operand, a permute its operand, a broadcast its result. This is an upper bound: in the last two, some devices
    may send nothing.
    """
    n = group_size(i, module.devices)
    operands = sum(operand.shape.bytes for operand in computation.operands(i))
    match kind(i):
        case "all-gather":
            return result(i).bytes * (n - 1) / n
        case "all-reduce":
            return 2 * operands * (n - 1) / n
        case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
            return operands * (n - 1) / n
        case _:
            return result(i).bytes


def group_size(i: Instruction, devices: int) -> int:
    """Returns the number of devices that take part in a collective together; the largest if group sizes differ.

    Groups are printed as lists {{0,1},{2,3}}, as an iota [groups,size]<=[...], or as axes of a mesh
    mesh['a'=2,'b'=4] {'b'}. A mesh axis may be split: 'b':(1)2 is a part of size 2. Without groups, it is all devices.

    Raises:
        ValueError: the groups are printed in another form.
    """
    printed = i.attributes.get("replica_groups", "{}")
    if printed in ("{}", "{{}}"):
        return devices
    if iota := _IOTA.match(printed):
        return int(iota.group(2))
    if mesh := _MESH.search(i.rest):
        sizes = {axis: int(size) for axis, size in _MESH_AXIS.findall(mesh.group(1))}
        return math.prod(int(part) if part else sizes[axis] for axis, part in _MESH_GROUP.findall(mesh.group(2)))
    groups = _LISTED.findall(printed)
    if not groups:
        raise ValueError(f"{i.name}: replica_groups={printed} is not understood")
    return max(len(group.split(",")) for group in groups)


def fused(module: Module, i: Instruction) -> list[tuple[Computation, Instruction]]:
    """Returns the collectives that count for a fusion: those inside it, except those that another fusion started."""
    return [(at, own) for at, own in _within(module, i) if not carried(module, own)]


def scatters(module: Module, computation: Computation, i: Instruction) -> bool:
    """Returns whether an all-reduce in a fusion is a reduce-scatter: each device keeps only its n-th part."""
    n = group_size(i, module.devices)
    users = computation.users[i.name]
    sliced = all(user.opcode == "dynamic-slice" and user.shape.bytes * n == i.shape.bytes for user in users)
    return kind(i) == "all-reduce" and not i.root and bool(users) and sliced


def carried(module: Module, i: Instruction) -> bool:
    """Returns whether a collective in a fusion was started by another fusion.

    A TPU overlaps a collective with products by fusing it into them: one fusion starts it, others continue it, also in
    loops, and the last one ends it. The same collective, with the same channel, is printed in each of them.
    """
    started = _started(module)
    channel = i.attributes.get("channel_id")
    return channel is not None and channel in started.values() and i.name not in started


def holds(module: Module, i: Instruction) -> bool:
    """Returns whether a fusion contains a collective, started there or earlier."""
    return bool(_within(module, i))


def _started(module: Module) -> dict[str, str | None]:
    """Returns the channels of the collectives that fusions start, by their names in those fusions."""
    calls = module.custom_calls.get("AsyncCollectiveStart", [])
    operands = [operand for at, call in calls for operand in at.operands(call) if kind(operand)]
    return {operand.name: operand.attributes.get("channel_id") for operand in operands}


def _within(module: Module, i: Instruction) -> list[tuple[Computation, Instruction]]:
    """Returns the collectives in a fusion and in fusions nested in it."""
    if i.opcode != "fusion":
        return []
    inner = module.computations[i.computation("calls")]
    found = [(inner, own) for own in inner.instructions.values() if kind(own)]
    return found + [own for nested in inner.instructions.values() for own in _within(module, nested)]


def tuple_parts(shape: Shape) -> tuple[Shape, ...]:
    """Returns the parts of a tuple, or the array alone."""
    return shape.parts if isinstance(shape, Tuple) else (shape,)
