"""Reads the text of an optimised HLO module: its computations, their instructions, and the bytes of shapes."""

import dataclasses
import functools
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=\s]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        shape: of the result, as printed.
        opcode: such as fusion or all-gather-start.
        operands: their names; a constant's or parameter's is what stands in its parentheses.
        attributes: the rest of the line.
        root: whether it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Names of the computations that it calls, by attribute."""
        return dict(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> list[str]:
        """Names of a conditional's computations."""
        listed = _BRANCHES.search(self.attributes)
        if listed:
            return [name.strip().lstrip("%") for name in listed.group(1).split(",")]
        return [name for key, name in self.called.items() if key in ("true_computation", "false_computation")]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name; `entry` names the one that runs."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


def parse(text: str) -> Module:
    """Reads compiled.as_text(). Raises ValueError where it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():  # Tuples count their parts in comments.
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no entry computation: it is not that of an HLO module")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if not start:
        return None
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    inside = rest[opened + 1 : closed]
    return Instruction(
        start.group(2), shape, rest[:opened], _operands(inside), rest[closed + 1 :], bool(start.group(1))
    )


def _closing(text: str, opened: int) -> int:
    """The place of the parenthesis that closes the one at `opened`."""
    depth = 0
    for place in range(opened, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis is not closed: {text[opened : opened + 60]!r}")


def _operands(inside: str) -> tuple[str, ...]:
    """Operands may be printed with their shapes: each one's name is its last word."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(inside + ","):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(inside[start:place].strip())
            start = place + 1
    return tuple(part.split(" ")[-1].lstrip("%") for part in parts if part)


def nbytes(shape: str, *, hbm_only: bool = False) -> float:
    """Bytes of an array or of a tuple's arrays together.

    Args:
        shape: as printed, layouts included.
        hbm_only: leave out what a layout puts into another memory than HBM, such as S(1), a TPU's VMEM.
    """
    total = 0.0
    for kind, sizes, layout in _ARRAY.findall(shape):
        if hbm_only and "S(" in layout:
            continue
        count = 1
        for size in sizes.replace("<=", "").split(","):
            count *= int(size) if size.strip() else 1
        total += count * _bits(kind) / 8
    return total


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    width = re.search(r"\d+", kind)  # f32, bf16, s8, u64, f8e4m3fn.
    if width is None:
        raise ValueError(f"the size of type {kind!r} is not known")
    return int(width.group())
