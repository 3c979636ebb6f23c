"""The decoder: a pre-norm transformer with rope, grouped queries and a gated MLP, its layers stacked and scanned.

Shape letters: docs/architecture.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from popi_jax.model import attention, kernels, remat, sharding
from popi_jax.model import lora as lora_lib
from popi_jax.model.config import LoraConfig, ModelConfig
from popi_jax.model.product import product
from popi_jax.model.weights import Tree, Weight, fan_in, init_tree, merge_trees

# The logit of a row that is not a token. It is finite, so that probability * log-probability is 0 and not NaN.
_IMPOSSIBLE = -1e30


def declare(config: ModelConfig) -> Tree:
    """Declares every weight of the base model; layer weights are stacked along a leading layer axis."""
    n, D, F, V = config.n_layers, config.d_model, config.d_ff, config.vocab_size
    H, Kv, Dh = config.n_heads, config.n_kv_heads, config.head_dim
    # Two residual branches per layer, scaled so that the final variance of the stream does not grow with depth.
    residual = 1.0 / math.sqrt(2 * n)

    def scale(width: int, axis: str) -> dict[str, Weight]:
        return {"scale": Weight((n, width), ("layers", axis), "ones")}

    def projection(heads: int, axis: str) -> dict[str, Weight]:
        weights = {"kernel": Weight((n, D, heads, Dh), ("layers", "embed", axis, "head_dim"), fan_in(D))}
        if config.qkv_bias:
            weights["bias"] = Weight((n, heads, Dh), ("layers", axis, "head_dim"), "zeros")
        return weights

    layers = {
        "attn_norm": scale(D, "norm"),
        "q": projection(H, "heads"),
        "k": projection(Kv, "kv_heads"),
        "v": projection(Kv, "kv_heads"),
        "o": {"kernel": Weight((n, H, Dh, D), ("layers", "heads", "head_dim", "embed"), residual * fan_in(H, Dh))},
        "mlp_norm": scale(D, "norm"),
        "gate": {"kernel": Weight((n, D, F), ("layers", "embed", "mlp"), fan_in(D))},
        "up": {"kernel": Weight((n, D, F), ("layers", "embed", "mlp"), fan_in(D))},
        "down": {"kernel": Weight((n, F, D), ("layers", "mlp", "embed"), residual * fan_in(F))},
    }
    if config.qk_norm:
        layers["q_norm"] = scale(Dh, "head_dim")
        layers["k_norm"] = scale(Dh, "head_dim")
    declared = {
        "embed": {"embedding": Weight((V, D), ("vocab", "embed"), 0.02)},
        "layers": layers,
        "final_norm": {"scale": Weight((D,), ("norm",), "ones")},
    }
    if not config.tie_embeddings:
        declared["head"] = {"kernel": Weight((D, V), ("embed", "vocab"), fan_in(D))}
    return declared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (rope applied) and values of each row's prefix, stored once, and of its N branches; see attend_decode."""

    prefix_k_nxBxKvxDhxT: jax.Array
    prefix_v_nxBxKvxTxDh: jax.Array
    prefix_valid_BxT: jax.Array
    own_k_nxBxKvxNxSxDh: jax.Array
    own_v_nxBxKvxNxSxDh: jax.Array


@dataclasses.dataclass(frozen=True)
class _Rope:
    """Cosines and sines of the rope angles, float32, with an axis for the heads."""

    cos_BxLx1xI: jax.Array
    sin_BxLx1xI: jax.Array

    def __call__(self, x_BxLxHxDh: jax.Array) -> jax.Array:
        # The hub's convention: feature i is paired with feature i + Dh/2, not with its neighbour.
        first, second = jnp.split(x_BxLxHxDh.astype(jnp.float32), 2, axis=-1)
        cos, sin = self.cos_BxLx1xI, self.sin_BxLx1xI
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.astype(x_BxLxHxDh.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Returns the angle per position of each of the Dh/2 feature pairs, after Llama 3.1's scaling if configured."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequency = config.rope_theta**-exponent
    if config.rope_scaling is not None:
        s = config.rope_scaling
        # Turns within the original context: many keep the frequency, few divide it by the factor; blended in between.
        turns = s.original_max_length * frequency / (2 * np.pi)
        kept = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
        frequency = kept * frequency + (1 - kept) * frequency / s.factor
    return frequency.astype(np.float32)


def _rope(config: ModelConfig, positions_BxL: jax.Array) -> _Rope:
    angle_BxLx1xI = positions_BxL.astype(jnp.float32)[:, :, None, None] * rope_frequencies(config)[None, None, None]
    return _Rope(jnp.cos(angle_BxLx1xI), jnp.sin(angle_BxLx1xI))


class Norm(nnx.Module):
    """RMSNorm over the last axis, in float32."""

    def __init__(self, values: dict[str, jax.Array], eps: float):
        self.scale = nnx.Param(values["scale"])
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def _matmul(x_RxIn: jax.Array, kernel_InxOut: jax.Array) -> jax.Array:
    return remat.keepable(product("ri,io->ro", x_RxIn, kernel_InxOut.astype(x_RxIn.dtype)).astype(x_RxIn.dtype))


class Linear(nnx.Module):
    """A product over the last `input_dims` axes, with a bias and an adapter if the values contain them.

    `axes` are the logical axes of one layer's kernel.
    """

    def __init__(
        self,
        values: dict[str, jax.Array],
        axes: tuple[str, ...],
        input_dims: int,
        lora_scale: float,
        mesh: Mesh | None,
    ):
        self.kernel = nnx.Param(values["kernel"])
        self.bias = nnx.Param(values["bias"]) if "bias" in values else None
        self.a = nnx.LoRAParam(values["a"]) if "a" in values else None
        self.b = nnx.LoRAParam(values["b"]) if "b" in values else None
        self.axes = axes
        self.input_dims = input_dims
        self.lora_scale = lora_scale
        self.mesh = mesh

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.shape[: x.ndim - self.input_dims]
        # Flattened: with two row dimensions the compiler transposes the whole gradient to compute the weight's.
        x_RxIn = x.reshape(math.prod(rows), -1)
        # Cast before it is gathered: bfloat16 halves the bytes to send.
        kernel = self.kernel[...].astype(x.dtype)
        R, into = x_RxIn.shape
        stays = sharding.weight_stays(R, into, kernel.size // into, mesh=self.mesh)
        if not stays:
            kernel = sharding.gather(kernel, self.axes, self.mesh)

        def times(x_RxIn: jax.Array, kernel_InxOut: jax.Array, into: str, out: str) -> jax.Array:
            return (sharding.send_rows(_matmul, into, out, self.mesh) if stays else _matmul)(x_RxIn, kernel_InxOut)

        from_axis, to_axis = self.axes[0], self.axes[self.input_dims]
        y_RxOut = times(x_RxIn, kernel.reshape(into, -1), from_axis, to_axis)
        if self.bias is not None:
            # Added in float32, so that the bias's gradient is summed over the rows in float32.
            bias_1xOut = self.bias[...].reshape(1, -1).astype(x.dtype).astype(jnp.float32)
            y_RxOut = (y_RxOut.astype(jnp.float32) + bias_1xOut).astype(x.dtype)
        if self.a is not None and self.b is not None:
            a_Inxr = self.a[...].reshape(into, -1)
            b_rxOut = self.b[...].reshape(a_Inxr.shape[1], -1)
            low_Rxr = times(x_RxIn, a_Inxr, from_axis, "lora_rank")
            y_RxOut += self.lora_scale * times(low_Rxr, b_rxOut, "lora_rank", to_axis)
        return y_RxOut.reshape(*rows, *kernel.shape[self.input_dims :])


class Layer(nnx.Module):
    """Attention and MLP, each applied to the normed residual stream and added to it.

    Built with the stacked weights of all layers; a scan slices them, so that the methods see those of one layer.
    """

    def __init__(self, values: Tree, config: ModelConfig, lora: LoraConfig | None, mesh: Mesh | None):
        lora_scale = 0.0 if lora is None else lora.scale

        declared = declare(config)["layers"]

        def linear(name: str) -> Linear:
            axes = declared[name]["kernel"].axes[1:]
            return Linear(values[name], axes, lora_lib.INPUT_DIMS[name], lora_scale, mesh)

        self.attn_norm = Norm(values["attn_norm"], config.norm_eps)
        self.q, self.k, self.v, self.o = linear("q"), linear("k"), linear("v"), linear("o")
        self.q_norm = Norm(values["q_norm"], config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(values["k_norm"], config.norm_eps) if config.qk_norm else None
        self.mlp_norm = Norm(values["mlp_norm"], config.norm_eps)
        self.gate, self.up, self.down = linear("gate"), linear("up"), linear("down")

    def project(self, x_BxLxD: jax.Array, rope: _Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the layer's queries and keys, rope applied, and its values."""
        with jax.named_scope("qkv"):
            normed_BxLxD = self.attn_norm(x_BxLxD)
            q_BxLxHxDh = self.q(normed_BxLxD)
            k_BxLxKvxDh = self.k(normed_BxLxD)
            if self.q_norm is not None and self.k_norm is not None:
                q_BxLxHxDh = self.q_norm(q_BxLxHxDh)
                k_BxLxKvxDh = self.k_norm(k_BxLxKvxDh)
            return rope(q_BxLxHxDh), rope(k_BxLxKvxDh), self.v(normed_BxLxD)

    def finish(self, x_BxLxD: jax.Array, attended_BxLxHxDh: jax.Array) -> jax.Array:
        """Returns the residual stream after this layer."""
        with jax.named_scope("o"):
            x_BxLxD = x_BxLxD + self.o(attended_BxLxHxDh)
        with jax.named_scope("mlp"):
            normed_BxLxD = self.mlp_norm(x_BxLxD)
            return x_BxLxD + self.down(nnx.silu(self.gate(normed_BxLxD)) * self.up(normed_BxLxD))


class Decoder(nnx.Module):
    """Maps tokens to hidden states, and hidden states to logits.

    Segments give the row and branch of each token (see attention.attend). A token attends to tokens at its own or an
    earlier index in its row's prefix or its own branch, never to padding. Positions are rope positions; every branch
    starts at the position where the prefix ends.
    """

    def __init__(self, config: ModelConfig, lora: LoraConfig | None, mesh: Mesh | None, *, rngs: nnx.Rngs):
        declared = declare(config)
        if lora is not None:
            declared = merge_trees(declared, lora_lib.declare(declared["layers"], lora))
        values = init_tree(declared, rngs.params())
        self.config = config
        self.mesh = mesh
        self.embed = nnx.Dict(embedding=nnx.Param(values["embed"]["embedding"]))
        self.layers = Layer(values["layers"], config, lora, mesh)
        self.final_norm = Norm(values["final_norm"], config.norm_eps)
        self.head = None if config.tie_embeddings else nnx.Dict(kernel=nnx.Param(values["head"]["kernel"]))

    def __call__(self, tokens_BxL: jax.Array, positions_BxL: jax.Array, segments_BxL: jax.Array) -> jax.Array:
        """Returns hidden_BxLxD after the final norm, in the compute type."""
        return self._forward(tokens_BxL, positions_BxL, segments_BxL, keep=False)[0]

    def prefill(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        segments_BxT: jax.Array,
        branches: int,
        branch_length: int,
    ) -> tuple[jax.Array, Cache]:
        """Reads the prefixes (segment 0; -1 at padding) and allocates space for branches of `branch_length` tokens.

        Returns:
            hidden_BxTxD after the final norm, and the cache that decode starts from.
        """
        hidden_BxTxD, (k_nxBxKvxDhxT, v_nxBxKvxTxDh) = self._forward(tokens_BxT, positions_BxT, segments_BxT, keep=True)
        n, B, Kv, Dh, _ = k_nxBxKvxDhxT.shape
        own = (n, B, Kv, branches, branch_length, Dh)
        dtype = k_nxBxKvxDhxT.dtype
        valid_BxT = segments_BxT == 0
        return hidden_BxTxD, Cache(
            k_nxBxKvxDhxT, v_nxBxKvxTxDh, valid_BxT, jnp.zeros(own, dtype), jnp.zeros(own, dtype)
        )

    def decode(
        self, tokens_BxN: jax.Array, positions_BxN: jax.Array, cache: Cache, index: jax.Array, known: int | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads one token of each branch.

        Args:
            tokens_BxN: the token of each branch.
            positions_BxN: its rope position.
            cache: from prefill or the previous call.
            index: scalar, the number of tokens of each branch already in the cache: the slot that these take.
            known: static, the number of slots of a branch to read, greater than index; None reads all.

        Returns:
            hidden_BxNxD after the final norm, and the cache with slot `index` filled.
        """
        rope = _rope(self.config, positions_BxN)

        def layers_slots(own_nxBxKvxNxSxDh: jax.Array, i: jax.Array) -> jax.Array:
            _, B, Kv, N, S, Dh = own_nxBxKvxNxSxDh.shape
            return jax.lax.dynamic_slice(own_nxBxKvxNxSxDh, (i, 0, 0, 0, 0, 0), (1, B, Kv, N, known or S, Dh))[0]

        def body(carry: Any, xs: Any) -> tuple[Any, None]:
            x_BxNxD, own_k, own_v = carry
            layer, i, prefix_k_BxKvxDhxT, prefix_v_BxKvxTxDh = xs
            q_BxNxHxDh, k_BxNxKvxDh, v_BxNxKvxDh = layer.project(x_BxNxD, rope)
            at = (i, 0, 0, 0, index, 0)
            k_BxKvxNxDh, v_BxKvxNxDh = k_BxNxKvxDh.swapaxes(1, 2), v_BxNxKvxDh.swapaxes(1, 2)
            own_k = jax.lax.dynamic_update_slice(own_k, k_BxKvxNxDh[None, :, :, :, None], at)
            own_v = jax.lax.dynamic_update_slice(own_v, v_BxKvxNxDh[None, :, :, :, None], at)
            with jax.named_scope("attend"):
                attended_BxNxHxDh = attention.attend_decode(
                    q_BxNxHxDh,
                    prefix_k_BxKvxDhxT,
                    prefix_v_BxKvxTxDh,
                    cache.prefix_valid_BxT,
                    layers_slots(own_k, i),
                    layers_slots(own_v, i),
                    index,
                )
            return (layer.finish(x_BxNxD, attended_BxNxHxDh), own_k, own_v), None

        # The carry holds the branches' cache and each layer writes one slot of it, so that XLA updates it in place.
        carry = (self._embed(tokens_BxN), cache.own_k_nxBxKvxNxSxDh, cache.own_v_nxBxKvxNxSxDh)
        layer_ids = jnp.arange(self.config.n_layers)
        xs = (self.layers, layer_ids, cache.prefix_k_nxBxKvxDhxT, cache.prefix_v_nxBxKvxTxDh)
        (x_BxNxD, own_k, own_v), _ = jax.lax.scan(body, carry, xs)
        cache = dataclasses.replace(cache, own_k_nxBxKvxNxSxDh=own_k, own_v_nxBxKvxNxSxDh=own_v)
        return self.final_norm(x_BxNxD), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., V] of hidden states [..., D]. Rows beyond config.n_tokens have probability 0."""
        with jax.named_scope("logits"):
            hidden_RxD = hidden.reshape(-1, hidden.shape[-1])
            kernel_DxV = self.embed["embedding"][...].T if self.head is None else self.head["kernel"][...]
            multiply: Callable[..., jax.Array] = functools.partial(product, "rd,dv->rv")
            if sharding.weight_stays(len(hidden_RxD), *kernel_DxV.shape, mesh=self.mesh):
                multiply = sharding.send_rows(multiply, "embed", "vocab", self.mesh)
            logits_RxV = multiply(hidden_RxD, kernel_DxV.astype(hidden.dtype))
            if self.config.n_tokens is not None and self.config.n_tokens < self.config.vocab_size:
                is_token_V = jnp.arange(self.config.vocab_size) < self.config.n_tokens
                logits_RxV = jnp.where(is_token_V[None], logits_RxV, _IMPOSSIBLE)
            return logits_RxV.reshape(*hidden.shape[:-1], -1)

    def _embed(self, tokens_BxL: jax.Array) -> jax.Array:
        # Each device looks up its slice of the model width for the tokens of all devices that share the table, then
        # takes its own rows. Without the constraints the compiler materialises the stream's whole gradient everywhere.
        with jax.named_scope("embed"):
            constrain = functools.partial(sharding.constrain, mesh=self.mesh)
            tokens_BxL = constrain(constrain(tokens_BxL, ("batch", "length")), ("few", "length"))
            x_BxLxD = self.embed["embedding"][...][tokens_BxL].astype(self.config.compute_dtype)
            x_BxLxD = constrain(x_BxLxD, ("few", "length", "embed"))
            return constrain(x_BxLxD, ("batch", "length", "activation"))

    def _forward(
        self, tokens_BxL: jax.Array, positions_BxL: jax.Array, segments_BxL: jax.Array, keep: bool
    ) -> tuple[jax.Array, Any]:
        """Returns hidden_BxLxD and, if `keep`, the keys and values of all layers in the cache's layout."""
        rope = _rope(self.config, positions_BxL)
        attend = kernels.bind(self.config.attention, self.mesh)

        def body(x_BxLxD: jax.Array, layer: Layer) -> tuple[jax.Array, Any]:
            x_BxLxD = sharding.constrain(x_BxLxD, ("batch", "length", "activation"), self.mesh)
            q_BxLxHxDh, k_BxLxKvxDh, v_BxLxKvxDh = layer.project(x_BxLxD, rope)
            with jax.named_scope("attend"):
                attended_BxLxHxDh = attend(q_BxLxHxDh, k_BxLxKvxDh, v_BxLxKvxDh, segments_BxL)
            kept = (k_BxLxKvxDh.transpose(0, 2, 3, 1), v_BxLxKvxDh.swapaxes(1, 2)) if keep else None
            return layer.finish(x_BxLxD, attended_BxLxHxDh), kept

        x_BxLxD, kept = jax.lax.scan(remat.of_layer(self.config.remat, body), self._embed(tokens_BxL), self.layers)
        return self.final_norm(x_BxLxD), kept
