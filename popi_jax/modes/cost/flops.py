"""FLOPs of a traced function's matrix products, loops included; the compiler's own count takes a loop body once."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

from popi_jax.model.remat import RECOMPUTED


def count(jaxpr: core.ClosedJaxpr, while_trips: Iterable[int] = (), *, recomputed: bool = True) -> float:
    """Returns the FLOPs of all matrix products, a multiply-add as two; nothing else is counted.

    Products that no result needs are not counted, since the compiler removes them (a gradient rule computes gradients
    of frozen weights, too). Shapes in a jaxpr are those of whole arrays, so this is the work of all devices together,
    without work that devices duplicate. Inside a shard_map, shapes are those of one device: its products count once for
    each device of the mesh axes that it is manual over. A Pallas kernel counts as in its cost estimate or, if it has
    none, as its products in one block times the blocks of its grid, skipped ones included. Convolutions and ragged
    products are not counted: the models here have none.

    Args:
        jaxpr: from jax.make_jaxpr(f)(*args) or jax.jit(f).trace(*args).jaxpr.
        while_trips: trip counts of the `while` loops, in order, since their ends depend on the data, unlike a scan's;
            1 for any further loop.
        recomputed: whether to count work that a gradient recomputes, which JAX and this package mark as RECOMPUTED.
            Without it the count is the model's own work, the same for every choice of rematerialisation.

    Raises:
        ValueError: a kernel has no cost estimate and a grid that is not known before it runs.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    return _count(needed, iter(while_trips), recomputed)


def _count(jaxpr: core.Jaxpr, while_trips: Iterator[int], recomputed: bool) -> float:
    return sum((_equation(eqn, while_trips, recomputed) for eqn in jaxpr.eqns), 0.0)


def _equation(eqn: core.JaxprEqn, while_trips: Iterator[int], recomputed: bool) -> float:
    name, params = eqn.primitive.name, eqn.params
    if not recomputed and RECOMPUTED in str(eqn.source_info.name_stack):
        return 0.0
    if name == "dot_general":
        return _product(eqn)
    if name == "pallas_call" and params["cost_estimate"] is not None:
        return float(params["cost_estimate"].flops)
    repeats = _repeats(eqn, while_trips)
    # Of a function with a custom derivative, only the primal is a jaxpr here: its rules are Python functions.
    inner = [_count(sub, while_trips, recomputed) for sub in core.jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    return repeats * sum(inner)


def _repeats(eqn: core.JaxprEqn, while_trips: Iterator[int]) -> int:
    """Returns how often an equation runs its jaxprs: once unless it is a loop, a shard_map or a kernel."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"]
    if name == "while":
        return next(while_trips, 1)
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        if not all(isinstance(size, int) for size in grid):
            raise ValueError(f"a Pallas kernel has the dynamic grid {grid} and no cost estimate; give it one")
        return math.prod(grid)
    return 1


def _product(eqn: core.JaxprEqn) -> float:
    """Returns 2 * batch * M * N * K: each element of the result is a sum of K products."""
    lhs, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape
