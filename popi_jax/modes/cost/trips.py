"""Trip counts of the loops of an HLO module, as far as its text determines them.

XLA may print the count (known_trip_count); TPU text never has it. A scan's counter starts at a constant, each iteration
adds one, and the condition compares it with a constant, so the count can be derived.
"""

import dataclasses
import json
import math
from collections.abc import Callable

from popi_jax.modes.cost import hlo
from popi_jax.modes.cost.hlo import Computation, Instruction, Module

# Their result has the value of their first operand.
_SAME = ("copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "opt-barrier")
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class _Value:
    """An integer: `offset` plus the part of the loop's state with index `state`, if any."""

    offset: int
    state: int | None = None


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation together with the values of its parameters.

    Attributes:
        argument: returns the value of part k of parameter n (k is None if it is not a tuple); None if unknown.
    """

    module: Module
    computation: Computation
    argument: Callable[[int, int | None], _Value | None]


def entry(module: Module) -> Scope:
    """Returns the scope of the program, whose arguments are unknown."""
    return Scope(module, module.computations[module.entry], lambda n, k: None)


def called(scope: Scope, i: Instruction, name: str) -> Scope:
    """Returns the scope of a computation that an instruction runs on its own operands."""

    def argument(n: int, k: int | None) -> _Value | None:
        operands = scope.computation.operands(i)
        if n >= len(operands):  # Work for another core is printed without operands.
            return None
        return _value(scope, operands[n]) if k is None else _part(scope, operands[n], k)

    return Scope(scope.module, scope.module.computations[name], argument)


def turn(scope: Scope, loop: Instruction, attribute: str) -> Scope:
    """Returns the scope of a loop's body or condition, in which only the state that never changes is known."""
    own = _state(scope, loop, attribute)

    def argument(n: int, k: int | None) -> _Value | None:
        if k is None or _step(scope, loop, k) != 0:
            return None
        return _initial(scope, loop, k)

    return dataclasses.replace(own, argument=argument)


def count(scope: Scope, loop: Instruction) -> int | None:
    """Returns how often the body of a `while` in this scope runs; None if the text does not determine it.

    It uses XLA's own known_trip_count, or a condition that compares a constant with a counter, which starts at a
    constant and approaches it in constant steps.
    """
    known = json.loads(loop.attributes.get("backend_config", "{}")).get("known_trip_count")
    if known:
        return int(known["n"])
    condition = _state(scope, loop, "condition")
    compared = _comparison(condition)
    if compared is None:
        return None
    left, right = (_settled(scope, loop, value) for value in compared[:2])
    direction = compared[2]
    if left.state is None:
        left, right, direction = right, left, _MIRRORED.get(direction, direction)
    if left.state is None or right.state is not None:
        return None
    start, step = _initial(scope, loop, left.state), _step(scope, loop, left.state)
    if start is None or not step:
        return None
    return _turns(right.offset - start.offset - left.offset, step, direction)


def _settled(scope: Scope, loop: Instruction, value: _Value) -> _Value:
    """Replaces a part of the state by its initial value if that is known and never changes."""
    if value.state is None or _step(scope, loop, value.state) != 0:
        return value
    initial = _initial(scope, loop, value.state)
    return value if initial is None else _Value(initial.offset + value.offset)


def _turns(distance: int, step: int, direction: str) -> int | None:
    """Returns the number of iterations of a counter that starts `distance` below its limit; None if it is unknown."""
    if direction in ("GT", "GE"):
        distance, step = -distance, -step
        direction = {"GT": "LT", "GE": "LE"}[direction]
    if direction == "NE":
        return distance // step if distance % step == 0 and distance // step >= 0 else None
    if step < 0 or direction not in ("LT", "LE"):
        return None
    return max(0, math.ceil(distance / step) if direction == "LT" else distance // step + 1)


def _state(scope: Scope, loop: Instruction, attribute: str) -> Scope:
    """Returns the scope of a loop's body or condition, with its state as the unknown."""
    computation = scope.module.computations[loop.computation(attribute)]
    return Scope(scope.module, computation, lambda n, k: None if k is None else _Value(0, k))


def _initial(scope: Scope, loop: Instruction, k: int) -> _Value | None:
    value = _part(scope, scope.computation.operands(loop)[0], k)
    return value if value and value.state is None else None


def _step(scope: Scope, loop: Instruction, k: int) -> int | None:
    """Returns what an iteration adds to part k of the loop's state."""
    body = _state(scope, loop, "body")
    value = _part(body, body.computation.root, k)
    return value.offset if value and value.state == k else None


def _comparison(condition: Scope) -> tuple[_Value, _Value, str] | None:
    """Returns the operands and direction of a condition's comparison, at its root or that of a fusion at its root."""
    root = condition.computation.root
    while root.opcode in ("fusion", "call"):
        condition = called(condition, root, root.computation("calls" if root.opcode == "fusion" else "to_apply"))
        root = condition.computation.root
    if root.opcode != "compare":
        return None
    left, right = (_value(condition, operand) for operand in condition.computation.operands(root))
    return (left, right, root.attributes["direction"]) if left and right else None


def _value(scope: Scope, i: Instruction) -> _Value | None:
    """Returns the value of a scalar."""
    operands = scope.computation.operands(i)
    if i.opcode == "constant":
        return _constant(i)
    if i.opcode == "parameter":
        return scope.argument(int(i.literal), None)
    if i.opcode == "get-tuple-element":
        return _part(scope, operands[0], int(i.attributes["index"]))
    if i.opcode in _SAME:
        return _value(scope, operands[0])
    if i.opcode in ("fusion", "call"):
        inner = called(scope, i, i.computation("calls" if i.opcode == "fusion" else "to_apply"))
        return _value(inner, inner.computation.root)
    if i.opcode in ("add", "subtract"):
        left, right = (_value(scope, operand) for operand in operands)
        if left is None or right is None:
            return None
        if i.opcode == "add" and (left.state is None or right.state is None):
            state = right.state if left.state is None else left.state
            return _Value(left.offset + right.offset, state)
        if i.opcode == "subtract" and right.state is None:
            return _Value(left.offset - right.offset, left.state)
    return None


def _part(scope: Scope, i: Instruction, k: int) -> _Value | None:
    """Returns the value of part k of a tuple."""
    operands = scope.computation.operands(i)
    if i.opcode == "tuple":
        return _value(scope, operands[k])
    if i.opcode == "parameter":
        return scope.argument(int(i.literal), k)
    if i.opcode in ("copy", "bitcast", "opt-barrier"):
        return _part(scope, operands[0], k)
    if i.opcode in ("fusion", "call"):
        inner = called(scope, i, i.computation("calls" if i.opcode == "fusion" else "to_apply"))
        return _part(inner, inner.computation.root, k)
    if i.opcode == "while":  # A part that the loop does not change.
        return _part(scope, operands[0], k) if _step(scope, i, k) == 0 else None
    return None


def _constant(i: Instruction) -> _Value | None:
    if not isinstance(i.shape, hlo.Array) or math.prod(i.shape.dims) != 1:
        return None
    try:
        return _Value(int(i.literal.strip("{} ")))
    except ValueError:  # true, 0.5
        return None
