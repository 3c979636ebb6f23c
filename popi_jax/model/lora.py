"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685, equation 3): declarations and the fusion into plain weights."""

from typing import Any

import jax.numpy as jnp

from popi_jax.model.config import LoraConfig
from popi_jax.model.weights import Tree, Weight, fan_in

# Number of input dimensions of each target's kernel, after the layer axis: o reads heads x head_dim.
INPUT_DIMS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


def declare(layers: dict[str, Any], lora: LoraConfig) -> Tree:
    """Declares the adapters of the stacked layers whose own weights are declared in `layers`.

    a has the standard deviation of its fan-in and b is zero, so that a fresh adapter changes nothing.
    """
    adapters = {}
    for target in lora.targets:
        kernel: Weight = layers[target]["kernel"]
        split = 1 + INPUT_DIMS[target]
        into, out = kernel.shape[1:split], kernel.shape[split:]
        n = kernel.shape[0]
        adapters[target] = {
            "a": Weight((n, *into, lora.rank), (*kernel.axes[:split], "lora_rank"), fan_in(*into)),
            "b": Weight((n, lora.rank, *out), (kernel.axes[0], "lora_rank", *kernel.axes[split:]), "zeros"),
        }
    return {"layers": adapters}


def fuse(base: Tree, delta: Tree, lora: LoraConfig) -> Tree:
    """Returns base with kernel + (alpha / rank) a b in place of each adapted kernel, added in float32."""
    layers = dict(base["layers"])
    for target, adapter in delta["layers"].items():
        kernel = layers[target]["kernel"]
        a = adapter["a"].astype(jnp.float32)
        b = adapter["b"].astype(jnp.float32)
        a_nxInxr = a.reshape(a.shape[0], -1, lora.rank)
        b_nxrxOut = b.reshape(b.shape[0], lora.rank, -1)
        product = jnp.einsum("nir,nro->nio", a_nxInxr, b_nxrxOut, precision="highest").reshape(kernel.shape)
        fused = (kernel.astype(jnp.float32) + lora.scale * product).astype(kernel.dtype)
        layers[target] = {**layers[target], "kernel": fused}
    return {**base, "layers": layers}
