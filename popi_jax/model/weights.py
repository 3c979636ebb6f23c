"""One declaration per weight: shape, logical axes and initial value. All other trees are derived from these."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any  # A nested dict; its leaves are Weights, Arrays, ShapeDtypeStructs or tuples of axis names.


@dataclasses.dataclass(frozen=True)
class Weight:
    """The declaration of one array of the parameter tree.

    Attributes:
        shape: the array's shape.
        axes: one logical axis name per dimension; sharding.RULES maps them to mesh axes.
        init: "zeros", "ones", or the standard deviation of a normal distribution with mean 0.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str | float

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    def make(self, key: jax.Array) -> jax.Array:
        if self.init == "zeros":
            return jnp.zeros(self.shape, jnp.float32)
        if self.init == "ones":
            return jnp.ones(self.shape, jnp.float32)
        return float(self.init) * jax.random.normal(key, self.shape, jnp.float32)


def fan_in(*sizes: int) -> float:
    """Returns the standard deviation that preserves variance in a product summed over dimensions of these sizes."""
    return 1.0 / math.sqrt(math.prod(sizes))


def init_tree(declared: Tree, key: jax.Array) -> Tree:
    """Draws every weight in float32. A weight's key depends only on its path, so adding one changes no other."""

    def make(path: tuple[Any, ...], weight: Weight) -> jax.Array:
        return weight.make(jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())))

    return jax.tree_util.tree_map_with_path(make, declared)


def abstract_tree(declared: Tree, dtype: str = "float32") -> Tree:
    """Returns the tree of shapes and dtypes."""
    return _map(lambda weight: jax.ShapeDtypeStruct(weight.shape, jnp.dtype(dtype)), declared)


def axes_tree(declared: Tree) -> Tree:
    """Returns the tree of logical axis names; its leaves are tuples."""
    return _map(lambda weight: weight.axes, declared)


def merge_trees(first: Tree, second: Tree) -> Tree:
    """Merges two nested dicts that share inner nodes but no leaf.

    Raises:
        ValueError: they share a leaf.
    """
    merged = dict(first)
    for name, value in second.items():
        if name not in merged:
            merged[name] = value
        elif isinstance(merged[name], dict) and isinstance(value, dict):
            merged[name] = merge_trees(merged[name], value)
        else:
            raise ValueError(f"{name} is in both trees")
    return merged


def _map(fn: Callable[[Weight], Any], declared: Tree) -> Tree:
    return jax.tree.map(fn, declared, is_leaf=lambda leaf: isinstance(leaf, Weight))
