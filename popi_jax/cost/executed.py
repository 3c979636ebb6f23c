"""What an HLO module executes: its instructions, each with how often it runs in one call of the program."""

import dataclasses
from collections.abc import Callable, Iterable

from popi_jax.cost import trips
from popi_jax.cost.hlo import Computation, Instruction, Module

# The attribute that names what an instruction runs; on a TPU's SparseCore, too, where it is started and waited for.
_RUNS = {
    "call": ("to_apply",),
    "call-start": ("to_apply",),
    "async-start": ("calls",),
    "custom-call-start": ("called_computations",),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction of a computation that is run, `times` times. A fusion is one instruction."""

    instruction: Instruction
    computation: Computation
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What one call of a module executes.

    Attributes:
        executions: of each computation in order, as often as it is called.
        unknown_loops: names of the loops whose number of turns the text does not say.
    """

    executions: list[Execution]
    unknown_loops: list[str]


def walk(module: Module, unknown_trips: Iterable[int], weight: Callable[[Computation, Instruction], float]) -> Program:
    """Walks a module from its entry.

    A loop's body and condition count as often as the body runs; loops in loops multiply. Of a conditional the heaviest
    branch counts. Calls are entered, and what is started to run at the same time; fusions are not.

    Args:
        module: from hlo.parse.
        unknown_trips: turns of each loop whose number the text does not say, in order, such as a decode loop's, which
            ends when the rows have; one where none is left.
        weight: of one run of an instruction; used to compare the branches of a conditional.
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
        """What an instruction runs as instructions of their own."""
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
                # Operand 0 chooses; each branch takes one of the others.
                branch = dataclasses.replace(i, operands=(i.operands[n + 1],))
                branches.append(self.computation(trips.called(scope, branch, name), times))
            return max(branches, key=self._weight)
        for attribute in _RUNS.get(i.opcode, ()):
            if attribute in i.attributes:
                return self.computation(trips.called(scope, i, i.computation(attribute)), times)
        return []

    def _weight(self, executions: list[Execution]) -> float:
        return sum(e.times * self.weight(e.computation, e.instruction) for e in executions)
