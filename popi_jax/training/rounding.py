"""Updates of bfloat16 weights: each update is added in float32, and the sum is stochastically rounded.

A bfloat16 number has 8 significant bits. Rounding to nearest loses an update of less than 1/512 of its weight.
Stochastic rounding picks each neighbour with a probability given by its distance, so the result is right on average.
"""

from typing import Any

import jax
import jax.numpy as jnp


def add(params: Any, updates: Any, key: jax.Array) -> Any:
    """Returns params + updates, each leaf in its own type; bfloat16 leaves are stochastically rounded.

    Args:
        params: a tree of float32 and bfloat16 arrays.
        updates: the same tree in float32.
        key: PRNG key of this update; each leaf gets its own key from it.
    """
    leaves, treedef = jax.tree.flatten(params)
    sums = [
        stochastic_round(leaf.astype(jnp.float32) + update, jax.random.fold_in(key, i))
        if leaf.dtype == jnp.bfloat16
        else leaf + update
        for i, (leaf, update) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))
    ]
    return jax.tree.unflatten(treedef, sums)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two neighbouring bfloat16 numbers, with expectation x. Keeps infinities and NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A bfloat16 is the upper half of a float32. Random bits added to the lower half carry with the right probability.
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16)
    cut = jax.lax.bitcast_convert_type(carried & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)
