"""Weights kept in bfloat16: an update is added in float32, and the sum is stochastically rounded.

A bfloat16 number has 8 significant bits. Rounded to the nearest one, an update of less than 1/512 of its weight is
lost; stochastically rounded, with odds that follow from how near the two neighbours are, the sum is right on average.
"""

from typing import Any

import jax
import jax.numpy as jnp


def add(params: Any, updates: Any, key: jax.Array) -> Any:
    """Returns params + updates, each leaf in its own type; bfloat16 leaves are stochastically rounded.

    Args:
        params: a tree of float32 and bfloat16 arrays.
        updates: the same tree in float32.
        key: of this update; every leaf draws from a key of its own.
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
    """Rounds float32 to one of the two bfloat16 neighbours; the expectation is x. Infinities and NaN stay."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A bfloat16 is a float32 without its lower half: a random lower half carries over with the odds that are wanted.
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16)
    cut = jax.lax.bitcast_convert_type(carried & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)
