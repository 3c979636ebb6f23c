"""FLOPs of a traced function's matrix products, loops included: what the compiler's own count leaves out."""

import math
from typing import Any

import jax
from jax.extend import core


def count(closed: core.ClosedJaxpr, while_trips: int = 1) -> float:
    """FLOPs of all products on all devices: 2 for each multiplication with its addition. Nothing else is counted.

    Args:
        closed: from jax.make_jaxpr; its shapes are those of whole arrays.
        while_trips: how often a loop runs whose end depends on the data.
    """
    return _count(closed.jaxpr, while_trips)


def _count(jaxpr: core.Jaxpr, while_trips: int) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        inner = [_count(sub, while_trips) for sub in _jaxprs(params)]
        if name == "dot_general":
            total += _product(eqn)
        elif name == "scan":
            total += params["length"] * sum(inner)
        elif name == "while":
            total += while_trips * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif name == "shard_map":  # Its body has one device's shapes.
            total += math.prod(params["mesh"].shape[axis] for axis in params["manual_axes"]) * sum(inner)
        elif name == "pallas_call":
            total += _kernel(eqn, sum(inner))
        else:  # jit, checkpoint, custom rules: what they hold runs once.
            total += sum(inner)
    return total


def _product(eqn: Any) -> float:
    lhs, rhs = (var.aval.shape for var in eqn.invars)
    (contracted, _), _ = eqn.params["dimension_numbers"]
    (out,) = eqn.outvars
    return 2.0 * math.prod(out.aval.shape) * math.prod(lhs[axis] for axis in contracted)


def _kernel(eqn: Any, body: float) -> float:
    """A kernel's own estimate, else its body at every place of its grid: all blocks, those that are skipped too."""
    estimate = eqn.params["cost_estimate"]
    if estimate is not None:
        return float(estimate.flops)
    return body * math.prod(eqn.params["grid_mapping"].grid)


def _jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs that an equation holds. Of a custom derivative that is the primal: the rules are functions."""
    found = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                found.append(part.jaxpr)
            elif isinstance(part, core.Jaxpr):
                found.append(part)
    return found


def trace(jitted: Any, args: tuple[Any, ...]) -> core.ClosedJaxpr:
    """Traces what is jitted afresh: JAX keeps a function's trace, and with it what remat.nothing_twice() changes."""
    return jax.make_jaxpr(lambda *args: jitted.__wrapped__(*args))(*args)
