"""Reads optimised HLO text, compiled.as_text(): computations, their instructions, and the bytes of shapes.

It knows the text's grammar and no operation's meaning. Written for what XLA prints for CPU and TPU.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

HBM = 0  # The memory space of a layout that names none.

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_MARK = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')
_KEY = re.compile(r"\s*([\w.\-]+)=")
_COUNT_COMMENT = re.compile(r"/\*index=\d+\*/")
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # Every other type says its own: f32, bf16, f8e4m3fn, u4, c64.


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's shape as laid out.

    Attributes:
        dtype: HLO's name of it.
        dims: of a bounded dimension the bound.
        memory_space: HBM, or the n of S(n) in the layout: on a TPU 1 is VMEM, 2, 4 and 6 are for scalars and
            semaphores, 5 is the host's memory.
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = HBM

    @property
    def bytes(self) -> float:
        """Of the elements: what tiles pad at the edges is not in it."""
        return math.prod(self.dims) * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Tuple:
    """A tuple's shape."""

    parts: tuple["Shape", ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)


Shape = Array | Tuple


def leaves(shape: Shape) -> Iterator[Array]:
    """The arrays of a shape, in order."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape.parts:
            yield from leaves(part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its module, without the %.
        shape: of the result.
        opcode: such as fusion, all-gather-start, while.
        operands: names; none for a parameter, a constant or what takes none.
        literal: what a constant's or parameter's parentheses hold, else "".
        rest: the line after the operands, as printed.
        root: whether it is its computation's result.
    """

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    literal: str
    rest: str
    root: bool

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """The values as printed, by key: calls, body, replica_groups, is_host_transfer, backend_config ..."""
        keyed = ((_KEY.match(part), part) for part in _split(self.rest))
        return {key.group(1): part[key.end() :].strip() for key, part in keyed if key}

    def computation(self, attribute: str) -> str:
        """The name of the computation that an attribute such as body names.

        Raises:
            KeyError: it has no such attribute.
        """
        return self.attributes[attribute].strip("{}").lstrip("%")

    @property
    def target(self) -> str:
        """What a custom call calls; "" of any other instruction."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @property
    def branches(self) -> list[str]:
        """Names of the computations of a conditional, by index or true and false."""
        listed = self.attributes.get("branch_computations")
        if listed is None:
            return [self.computation("true_computation"), self.computation("false_computation")]
        return [name.strip().lstrip("%") for name in listed.strip("{}").split(",")]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, operands before their users."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take another one as an operand, by its name; each once."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for i in self.instructions.values():
            for operand in dict.fromkeys(i.operands):
                found[operand].append(i)
        return found

    def operands(self, i: Instruction) -> list[Instruction]:
        """The instructions whose results `i` takes."""
        return [self.instructions[name] for name in i.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program. `entry` names the computation that runs; `devices` is how many it is compiled for."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    @functools.cached_property
    def custom_calls(self) -> dict[str, list[tuple[Computation, Instruction]]]:
        """By target, each with the computation that it stands in."""
        found: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in self.computations.values():
            for i in computation.instructions.values():
                if i.opcode == "custom-call":
                    found.setdefault(i.target, []).append((computation, i))
        return found


def parse(text: str) -> Module:
    """Reads compiled.as_text().

    Raises:
        ValueError: a line that is not understood, or no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, devices = "", "", 1
    lines: list[str] = []
    for line in _COUNT_COMMENT.sub("", text).splitlines():
        if line.startswith("HloModule"):
            sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", line)
            devices = math.prod(int(size) for size in sizes)
        elif not name:
            header = _HEADER.match(line)  # Tables of source lines stand before the first computation.
            if header:
                name, lines = header.group(2), []
                entry = name if header.group(1) else entry
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif line.startswith("}") and (not lines or _balanced(lines[-1])):
            instructions = [_instruction(own) for own in lines]
            computations[name] = Computation(name, {i.name: i for i in instructions})
            name = ""
        elif lines:  # A kernel's attributes go on over lines.
            lines[-1] += "\n" + line
        else:
            raise ValueError(f"not an HLO instruction: {line[:120]!r}")
    if name:
        raise ValueError(f"the text ends within computation {name!r}")
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return Module(computations, entry, devices)


def _instruction(line: str) -> Instruction:
    start = _INSTRUCTION.match(line)
    assert start is not None
    shape, end = _shape(line, start.end())
    opened = line.index("(", end)
    closed = _closing(line, opened)
    opcode, inside = line[end:opened].strip(), line[opened + 1 : closed]
    literal = inside if opcode in ("constant", "parameter") else ""
    # Operands may be printed with their shapes before them.
    names = () if literal else tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
    return Instruction(start.group(2), shape, opcode, names, literal, line[closed + 1 :], bool(start.group(1)))


def shape(text: str) -> Shape:
    """Reads a shape such as bf16[8,128]{1,0:T(8,128)(2,1)S(1)} or (f32[2], token[]).

    Raises:
        ValueError: it is none.
    """
    return _shape(text, 0)[0]


def _shape(text: str, place: int) -> tuple[Shape, int]:
    """The shape that starts at `place`, and where it ends."""
    if text[place] != "(":
        array = _ARRAY.match(text, place)
        if not array:
            raise ValueError(f"not an HLO shape: {text[place : place + 80]!r}")
        dtype, dims, layout = array.groups()
        space = _SPACE.search(layout or "")
        sizes = tuple(int(size.strip().removeprefix("<=")) for size in dims.split(",") if size.strip())
        return Array(dtype, sizes, int(space.group(1)) if space else HBM), array.end()
    parts: list[Shape] = []
    place += 1
    while text[place] != ")":
        if text[place] in ", ":
            place += 1
        else:
            part, place = _shape(text, place)
            parts.append(part)
    return Tuple(tuple(parts)), place + 1


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    width = re.search(r"\d+", dtype)
    if width is None:
        raise ValueError(f"HLO type {dtype!r} has no known size")
    return int(width.group())


def _closing(text: str, opened: int) -> int:
    """The place of what closes the parenthesis at `opened`; those in strings do not count."""
    depth = 0
    for mark in _MARK.finditer(text, opened):
        depth += (mark.group() in "([{") - (mark.group() in ")]}")
        if depth == 0:
            return mark.start()
    raise ValueError(f"a parenthesis is not closed: {text[opened : opened + 120]!r}")


def _balanced(text: str) -> bool:
    """Whether everything that is opened is closed."""
    marks = [mark.group() for mark in _MARK.finditer(text)]
    return sum(mark in "([{" for mark in marks) == sum(mark in ")]}" for mark in marks)


def _split(text: str) -> list[str]:
    """The parts between the commas that are in no parentheses, braces or strings."""
    parts, depth, start = [], 0, 0
    for mark in _MARK.finditer(text):
        depth += (mark.group() in "([{") - (mark.group() in ")]}")
        if mark.group() == "," and depth == 0:
            parts.append(text[start : mark.start()])
            start = mark.end()
    return [*parts, text[start:]]
