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
    """Builds a decoder from (base, delta). Hashable, so it can be a static argument of jit.

    Attributes:
        config: the model's shapes.
        lora: the adapter's shape; None for full fine-tuning, where delta is a full set of weights.
        mesh: the devices that sharding.RULES split activations over; None for a single device.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    mesh: Mesh | None = None

    def init_base(self, key: jax.Array) -> Tree:
        """Returns random base weights in float32."""
        return weights.init_tree(self._declared_base(), key)

    def init_delta(self, base: Tree, key: jax.Array) -> Tree:
        """Returns a delta that does not change the base's function: a fresh adapter or a copy of base, safe to donate.

        Its dtype is config.trained_dtype, whatever that of base.
        """
        dtype = jnp.dtype(self.config.trained_dtype)
        if self.lora is None:
            return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), base)
        return jax.tree.map(lambda x: x.astype(dtype), weights.init_tree(self._declared_delta(), key))

    def bind(self, base: Tree, delta: Tree | None) -> Decoder:
        """Returns the decoder of base and delta; the frozen reference if delta is None.

        In full fine-tuning delta holds all weights and base is ignored. Pure: works inside jit and grad.
        """
        if delta is None:
            return nnx.merge(_graph(self.config, None, self.mesh), base)
        if self.lora is None:
            return nnx.merge(_graph(self.config, None, self.mesh), delta)
        return nnx.merge(_graph(self.config, self.lora, self.mesh), weights.merge_trees(base, delta))

    def fuse(self, base: Tree, delta: Tree | None) -> Tree:
        """Returns plain weights, shaped like base, that compute the same function as bind(base, delta), for export."""
        if delta is None:
            return base
        if self.lora is None:
            return delta
        return lora_lib.fuse(base, delta, self.lora)

    def abstract_base(self) -> Tree:
        """Returns shapes and dtypes of the base weights as stored, in config.frozen_dtype."""
        return weights.abstract_tree(self._declared_base(), self.config.frozen_dtype)

    def abstract_delta(self) -> Tree:
        """Returns shapes and dtypes of the delta, in config.trained_dtype."""
        return weights.abstract_tree(self._declared_delta(), self.config.trained_dtype)

    def base_shardings(self, mesh: Mesh) -> Tree:
        """Returns the sharding of every base weight on this mesh."""
        return sharding.param_shardings(weights.axes_tree(self._declared_base()), self.abstract_base(), mesh)

    def delta_shardings(self, mesh: Mesh) -> Tree:
        """Returns the sharding of every array of the delta on this mesh."""
        return sharding.param_shardings(weights.axes_tree(self._declared_delta()), self.abstract_delta(), mesh)

    def _declared_base(self) -> Tree:
        return decoder_lib.declare(self.config)

    def _declared_delta(self) -> Tree:
        base = self._declared_base()
        return base if self.lora is None else lora_lib.declare(base["layers"], self.lora)


@functools.cache
def _graph(config: ModelConfig, lora: LoraConfig | None, mesh: Mesh | None) -> Any:
    """Returns the decoder's static part, without drawing any weights."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, lora, mesh, rngs=nnx.Rngs(0))))[0]
