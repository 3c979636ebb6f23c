"""Shapes and features of the decoder, and their conversion from and to a hub folder's config.json.

One config covers SmolLM2 and Llama 2-3.x (grouped queries, tied or untied head, Llama 3 rope scaling), Qwen 2.5 (bias
on q, k and v) and Qwen 3 (norm on each query and key head).
"""

import dataclasses
from typing import Any

from popi_jax.errors import UserError
from popi_jax.model import remat

# Defaults of absent fields, the same as in the hub's own readers of these three families.
_HUB_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
}
_HUB_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's scaling of the low rope frequencies; lengths are in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: the output of each target gains (alpha / rank) * x a b.

    Attributes:
        rank: r, the adapter's inner width.
        alpha: numerator of the scale.
        targets: the layers with an adapter, from q, k, v, o, gate, up, down.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # A list from a config file is not hashable.
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank}: the rank must be at least 1")
        if not self.targets:
            raise UserError("lora.targets is empty: name at least one of q, k, v, o, gate, up, down")
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise UserError(f"lora.targets: {target!r} is unknown; choose from {', '.join(LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the decoder's program. Hashable, so it can be a static argument of jit.

    Attributes:
        head_dim: width of one head; n_heads * head_dim need not equal d_model (Qwen 3).
        max_length: the longest context that the weights were trained for, in tokens.
        compute_dtype: dtype of activations, "float32" or "bfloat16"; weights keep their own.
        remat: what the backward pass recomputes in each layer instead of storing it: a name in remat.CHOICES.
        attention: "xla", "splash" or "cudnn" (see kernels.bind); chosen for the devices, not part of a checkpoint.
        frozen_dtype: dtype in which the base weights are stored, "float32" or "bfloat16".
        trained_dtype: dtype in which the trained weights (an adapter or a full copy) are stored, likewise.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_length: int = 2048
    compute_dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"
    frozen_dtype: str = "float32"
    trained_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"model: {self.n_heads} heads cannot share {self.n_kv_heads} kv heads evenly")
        if self.head_dim % 2:
            raise UserError(f"model: head_dim={self.head_dim} must be even, since rope rotates pairs of features")
        for name in ("compute_dtype", "frozen_dtype", "trained_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise UserError(f"model.{name}={getattr(self, name)!r}: choose float32 or bfloat16")
        if self.remat not in remat.CHOICES:
            raise UserError(f"model.remat={self.remat!r}: choose one of {', '.join(remat.CHOICES)}")
        if self.attention not in ("xla", "splash", "cudnn"):
            raise UserError(f"model.attention={self.attention!r}: choose xla, splash or cudnn")

    @classmethod
    def from_hub(cls, hub: dict[str, Any], source: str, **options: Any) -> "ModelConfig":
        """Reads a parsed config.json.

        Args:
            hub: the file's object.
            source: the file's name, for messages.
            options: fields that no checkpoint has: compute_dtype, remat, attention, frozen_dtype, trained_dtype.

        Raises:
            UserError: a field is missing, or the checkpoint needs a feature that this decoder lacks.
        """
        if "model_type" not in hub or hub["model_type"] not in _ARCHITECTURES:
            found = repr(hub["model_type"]) if "model_type" in hub else "missing"
            raise UserError(f"{source}: model_type is {found}; supported: {', '.join(_ARCHITECTURES)}")
        for name in _HUB_REQUIRED:
            if name not in hub:
                raise UserError(f"{source}: {name} is missing")
        model_type = hub["model_type"]
        hub = {**_HUB_DEFAULTS, **hub}
        _refuse_unsupported(hub, source)
        theta, scaling = _rope_from_hub(hub, source)
        n_heads = hub["num_attention_heads"]
        head_dim = hub["head_dim"]
        if head_dim is None:
            head_dim = hub["hidden_size"] // n_heads
        n_kv_heads = hub["num_key_value_heads"]
        return cls(
            vocab_size=hub["vocab_size"],
            d_model=hub["hidden_size"],
            n_layers=hub["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
            head_dim=head_dim,
            d_ff=hub["intermediate_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=hub["rms_norm_eps"],
            tie_embeddings=hub["tie_word_embeddings"],
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            max_length=hub["max_position_embeddings"],
            **options,
        )

    def to_hub(self) -> dict[str, Any]:
        """Returns the config.json fields that hub readers (transformers 4 and 5, vLLM) need to rebuild this model.

        Raises:
            UserError: the model has both qkv_bias and qk_norm, which no hub family combines.
        """
        if self.qkv_bias and self.qk_norm:
            raise UserError(
                "model: no hub architecture combines qkv_bias with qk_norm, so this model cannot be exported"
            )
        model_type = "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama"
        scaling = None
        if self.rope_scaling is not None:
            scaling = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_length,
            }
        return {
            "architectures": [_ARCHITECTURES[model_type]],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.d_ff,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_length,
        }


def _refuse_unsupported(hub: dict[str, Any], source: str) -> None:
    if hub["hidden_act"] != "silu":
        raise UserError(f"{source}: hidden_act={hub['hidden_act']!r} is not supported, only silu")
    for name in ("attention_bias", "mlp_bias"):
        if hub[name]:
            raise UserError(f"{source}: {name}=true is not supported")
    if hub["partial_rotary_factor"] != 1.0:
        raise UserError(f"{source}: partial_rotary_factor={hub['partial_rotary_factor']} is not supported, only 1")
    layer_types = hub["layer_types"] or ()
    windowed = hub["use_sliding_window"] or any(kind != "full_attention" for kind in layer_types)
    # Llama's reader ignores sliding_window; the two Qwen readers use it only where use_sliding_window is set.
    if windowed and hub["sliding_window"] is not None:
        raise UserError(f"{source}: sliding-window attention (sliding_window={hub['sliding_window']}) is not supported")
    if any(kind not in ("full_attention", "sliding_attention") for kind in layer_types):
        raise UserError(f"{source}: layer_types {sorted(set(layer_types))} are not supported, only full_attention")


def _rope_from_hub(hub: dict[str, Any], source: str) -> tuple[float, Llama3RopeScaling | None]:
    """Returns theta and scaling; transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    rope = {"rope_theta": hub["rope_theta"], **(hub["rope_scaling"] or {}), **(hub["rope_parameters"] or {})}
    kind = "default"
    for name in ("type", "rope_type"):  # Newer name last: rope_type wins if both are present.
        if name in rope:
            kind = rope[name]
    if kind == "default":
        return rope["rope_theta"], None
    if kind != "llama3":
        raise UserError(f"{source}: rope type {kind!r} is not supported, only default and llama3")
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in fields:
        if name not in rope:
            raise UserError(f"{source}: rope type llama3 needs {name}")
    return rope["rope_theta"], Llama3RopeScaling(*(rope[name] for name in fields))
