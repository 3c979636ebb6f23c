"""Reads optimised HLO text, compiled.as_text(): computations, their instructions, and the bytes of shapes.

It knows the grammar of the text but not the meaning of operations. Written for XLA's output for CPU and TPU.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

HBM = 0  # The memory space of a layout that does not name one.

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_MARK = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')
_KEY = re.compile(r"\s*([\w.\-]+)=")
_COUNT_COMMENT = re.compile(r"/\*index=\d+\*/")
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # Other types name their width: f32, bf16, f8e4m3fn, u4, c64.


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape and layout of an array.

    Attributes:
        dtype: the dtype's name in HLO.
        dims: the sizes; the bound of a bounded dimension.
        memory_space: HBM, or the n of S(n) in the layout: on a TPU, 1 is VMEM, 2, 4 and 6 are for scalars and
            semaphores, and 5 is host memory.
    """

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = HBM

    @property
    def bytes(self) -> float:
        """Bytes of the elements, without the padding of tiles at the edges."""
        return math.prod(self.dims) * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Tuple:
    """The shape of a tuple."""

    parts: tuple["Shape", ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)


Shape = Array | Tuple


def leaves(shape: Shape) -> Iterator[Array]:
    """Yields the arrays of a shape, in order."""
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
        shape: the result's shape.
        opcode: such as fusion, all-gather-start, while.
        operands: their names; empty for parameters and constants.
        literal: the text in a constant's or parameter's parentheses, else "".
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
        """The printed values, by key: calls, body, replica_groups, is_host_transfer, backend_config ..."""
        keyed = ((_KEY.match(part), part) for part in _split(self.rest))
        return {key.group(1): part[key.end() :].strip() for key, part in keyed if key}

    def computation(self, attribute: str) -> str:
        """Returns the name of the computation in an attribute such as body.

        Raises:
            KeyError: the instruction has no such attribute.
        """
        return self.attributes[attribute].strip("{}").lstrip("%")

    @property
    def target(self) -> str:
        """The target of a custom call; "" for any other instruction."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @property
    def branches(self) -> list[str]:
        """The names of a conditional's computations, by index, or the true and the false one."""
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
        """The parameters by number."""
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """For each instruction's name, the instructions that take it as an operand, each once."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for i in self.instructions.values():
            for operand in dict.fromkeys(i.operands):
                found[operand].append(i)
        return found

    def operands(self, i: Instruction) -> list[Instruction]:
        """Returns the instructions that are the operands of `i`."""
        return [self.instructions[name] for name in i.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program. `entry` names its main computation; `devices` is the number of devices it is compiled for."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    @functools.cached_property
    def custom_calls(self) -> dict[str, list[tuple[Computation, Instruction]]]:
        """The custom calls by target, each with its computation."""
        found: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in self.computations.values():
            for i in computation.instructions.values():
                if i.opcode == "custom-call":
                    found.setdefault(i.target, []).append((computation, i))
        return found


def parse(text: str) -> Module:
    """Reads compiled.as_text().

    Raises:
        ValueError: a line is not understood, or there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, devices = "", "", 1
    lines: list[str] = []
    for line in _COUNT_COMMENT.sub("", text).splitlines():
        if line.startswith("HloModule"):
            sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", line)
            devices = math.prod(int(size) for size in sizes)
        elif not name:
            header = _HEADER.match(line)  # Tables of source lines precede the first computation.
            if header:
                name, lines = header.group(2), []
                entry = name if header.group(1) else entry
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif line.startswith("}") and (not lines or _balanced(lines[-1])):
            instructions = [_instruction(own) for own in lines]
            computations[name] = Computation(name, {i.name: i for i in instructions})
            name = ""
        elif lines:  # A kernel's attributes span lines.
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
    # Operands may be printed after their shapes.
    names = () if literal else tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
    return Instruction(start.group(2), shape, opcode, names, literal, line[closed + 1 :], bool(start.group(1)))


def shape(text: str) -> Shape:
    """Reads a shape such as bf16[8,128]{1,0:T(8,128)(2,1)S(1)} or (f32[2], token[]).

    Raises:
        ValueError: the text is not a shape.
    """
    return _shape(text, 0)[0]


def _shape(text: str, place: int) -> tuple[Shape, int]:
    """Returns the shape that starts at `place`, and its end."""
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
    """Returns the place that closes the parenthesis at `opened`, ignoring those in strings."""
    depth = 0
    for mark in _MARK.finditer(text, opened):
        depth += (mark.group() in "([{") - (mark.group() in ")]}")
        if depth == 0:
            return mark.start()
    raise ValueError(f"a parenthesis is not closed: {text[opened : opened + 120]!r}")


def _balanced(text: str) -> bool:
    """Returns whether all parentheses are closed."""
    marks = [mark.group() for mark in _MARK.finditer(text)]
    return sum(mark in "([{" for mark in marks) == sum(mark in ")]}" for mark in marks)


def _split(text: str) -> list[str]:
    """Splits at the commas that are not in parentheses, braces or strings."""
    parts, depth, start = [], 0, 0
    for mark in _MARK.finditer(text):
        depth += (mark.group() in "([{") - (mark.group() in ")]}")
        if mark.group() == "," and depth == 0:
            parts.append(text[start : mark.start()])
            start = mark.end()
    return [*parts, text[start:]]
