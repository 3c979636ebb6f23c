"""One role's model as a frozen base and a trainable delta: an adapter (LoRA) or a full copy, under one interface."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from popi_jax.model import decoder as decoder_lib
from popi_jax.model import lora as lora_lib
from popi_jax.model import sharding, weights
from popi_jax.model.config import LoraConfig, ModelConfig
from popi_jax.model.decoder import Decoder
from popi_jax.model.weights import Tree


@dataclasses.dataclass(frozen=True)
class Policy:
    """How (base, delta) become a decoder. Hashable, so it may be a static argument of jit.

    Attributes:
        config: the model's shapes.
        lora: the adapter's shape; None for full fine-tuning, where delta is a whole set of weights.
        mesh: the devices that activations are split over as sharding.RULES say; None for one device.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    mesh: Mesh | None = None

    def init_base(self, key: jax.Array) -> Tree:
        """Random base weights, float32."""
        return weights.init_tree(self._declared_base(), key)

    def init_delta(self, base: Tree, key: jax.Array) -> Tree:
        """A delta that leaves the base's function as it is: a fresh adapter, or a copy of base that may be donated.

        Either is of config.trained_dtype, whatever base is.
        """
        dtype = jnp.dtype(self.config.trained_dtype)
        if self.lora is None:
            return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), base)
        return jax.tree.map(lambda x: x.astype(dtype), weights.init_tree(self._declared_delta(), key))

    def bind(self, base: Tree, delta: Tree | None) -> Decoder:
        """The decoder that delta makes of base; the frozen reference where delta is None.

        In full fine-tuning delta holds the weights, and base is not looked at. Pure: works inside jit and grad.
        """
        if delta is None:
            return nnx.merge(_graph(self.config, None, self.mesh), base)
        if self.lora is None:
            return nnx.merge(_graph(self.config, None, self.mesh), delta)
        return nnx.merge(_graph(self.config, self.lora, self.mesh), weights.merge_trees(base, delta))

    def fuse(self, base: Tree, delta: Tree | None) -> Tree:
        """Plain base-shaped weights of the same function as bind(base, delta), for export."""
        if delta is None:
            return base
        if self.lora is None:
            return delta
        return lora_lib.fuse(base, delta, self.lora)

    def abstract_base(self) -> Tree:
        """Shapes and types of the base weights, as they are kept: config.frozen_dtype."""
        return weights.abstract_tree(self._declared_base(), self.config.frozen_dtype)

    def abstract_delta(self) -> Tree:
        """Shapes and types of the delta: config.trained_dtype."""
        return weights.abstract_tree(self._declared_delta(), self.config.trained_dtype)

    def base_shardings(self, mesh: Mesh) -> Tree:
        """The sharding of every base weight on this mesh."""
        return sharding.param_shardings(weights.axes_tree(self._declared_base()), self.abstract_base(), mesh)

    def delta_shardings(self, mesh: Mesh) -> Tree:
        """The sharding of every array of the delta on this mesh."""
        return sharding.param_shardings(weights.axes_tree(self._declared_delta()), self.abstract_delta(), mesh)

    def _declared_base(self) -> Tree:
        return decoder_lib.declare(self.config)

    def _declared_delta(self) -> Tree:
        base = self._declared_base()
        return base if self.lora is None else lora_lib.declare(base["layers"], self.lora)


@functools.cache
def _graph(config: ModelConfig, lora: LoraConfig | None, mesh: Mesh | None) -> Any:
    """The decoder's static part; made without drawing a weight."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, lora, mesh, rngs=nnx.Rngs(0))))[0]
