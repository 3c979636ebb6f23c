"""The instructions that an HLO module executes, each with its number of runs in one call of the program."""

import dataclasses
from collections.abc import Callable, Iterable

from popi_jax.modes.cost import trips
from popi_jax.modes.cost.hlo import Computation, Instruction, Module

# The attribute that names the computation an instruction runs, also on a TPU's SparseCore, asynchronously.
_RUNS = {
    "call": ("to_apply",),
    "call-start": ("to_apply",),
    "async-start": ("calls",),
    "custom-call-start": ("called_computations",),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction of an executed computation, which runs `times` times. A fusion is one instruction."""

    instruction: Instruction
    computation: Computation
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """The instructions that one call of a module executes.

    Attributes:
        executions: the instructions of each computation in order, once for each call of it.
        unknown_loops: names of the loops whose trip count is not in the text.
    """

    executions: list[Execution]
    unknown_loops: list[str]


def walk(module: Module, unknown_trips: Iterable[int], weight: Callable[[Computation, Instruction], float]) -> Program:
    """Walks a module from its entry.

    A loop's body and condition count as often as the body runs; nested loops multiply. A conditional counts as its
    heaviest branch. Calls are entered, asynchronous ones too; fusions are not.

    Args:
        module: from hlo.parse.
        unknown_trips: trip counts, in order, of the loops whose count is not in the text, such as a decode loop, which
            ends when all rows are finished; 1 for any further loop.
        weight: weight of one run of an instruction, to compare the branches of a conditional.
    """
    walker = _Walker(unknown_trips, weight)
    executions = walker.computation(trips.entry(module), 1)
    return Program(executions, list(dict.fromkeys(walker.unknown)))


class _Walker:
    def __init__(self, unknown_trips: Iterable[int], weight: Callable[[Computation, Instruction], float]):
        self.unknown_trips, self.weight = iter(unknown_trips), weight
        self.unknown: list[str] = []

    def computation(self, scope: trips.Scope, times: int) -> list[Execution]:
        found = []
        for i in scope.computation.instructions.values():
            found.append(Execution(i, scope.computation, times))
            found.extend(self._inside(scope, i, times))
        return found

    def _inside(self, scope: trips.Scope, i: Instruction, times: int) -> list[Execution]:
        """Returns the executions of the computations that an instruction runs."""
        if i.opcode == "while":
            turns = trips.count(scope, i)
            if turns is None:
                self.unknown.append(i.name)
                turns = next(self.unknown_trips, 1)
            inner = [trips.turn(scope, i, attribute) for attribute in ("condition", "body")]
            return [e for one in inner for e in self.computation(one, times * turns)]
        if i.opcode == "conditional":
            branches = []
            for n, name in enumerate(i.branches):
                # Operand 0 selects the branch; each branch takes one of the others.
                branch = dataclasses.replace(i, operands=(i.operands[n + 1],))
                branches.append(self.computation(trips.called(scope, branch, name), times))
            return max(branches, key=self._weight)
        for attribute in _RUNS.get(i.opcode, ()):
            if attribute in i.attributes:
                return self.computation(trips.called(scope, i, i.computation(attribute)), times)
        return []

    def _weight(self, executions: list[Execution]) -> float:
        return sum(e.times * self.weight(e.computation, e.instruction) for e in executions)
