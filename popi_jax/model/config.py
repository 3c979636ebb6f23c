"""Shapes and features of the decoder, and their conversion from and to a hub folder's config.json.

One config covers SmolLM2 and Llama 2-3.x (grouped queries, tied or untied head, Llama 3 rope scaling), Qwen 2.5 (bias
on q, k and v) and Qwen 3 (norm on each query and key head).
"""

import dataclasses
import json
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
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
# Sizes that every config.json must have, and the largest that is not a mistake.
_HUB_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**24,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**24,
    "intermediate_size": 2**24,
    "max_position_embeddings": 2**31,
}
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
        n_tokens: the tokenizer's number of tokens. Rows of the vocabulary from here on are padding, which is neither
            drawn nor scored. None: all rows are tokens.
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
    n_tokens: int | None = None

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
        model_type = hub.get("model_type")
        if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
            found = _shown(model_type) if "model_type" in hub else "missing"
            raise UserError(f"{source}: model_type is {found}; supported: {', '.join(_ARCHITECTURES)}")
        sizes = {name: read_size(hub, name, source, most) for name, most in _HUB_SIZES.items()}
        hub = {**_HUB_DEFAULTS, **_FAMILY_DEFAULTS[model_type], **hub}
        _refuse_unsupported(hub, source)
        theta, scaling = _rope_from_hub(hub, source)
        n_heads = n_kv_heads = sizes["num_attention_heads"]
        if hub["num_key_value_heads"] is not None:
            n_kv_heads = read_size(hub, "num_key_value_heads", source)
        if n_heads % n_kv_heads:
            raise UserError(
                f"{source}: num_attention_heads={n_heads} is not a multiple of num_key_value_heads={n_kv_heads}"
                f" (the hub's readers take {_FAMILY_DEFAULTS[model_type].get('num_key_value_heads', n_heads)} where it"
                " is absent); correct it"
            )
        head_dim = sizes["hidden_size"] // n_heads
        if hub["head_dim"] is not None:
            head_dim = read_size(hub, "head_dim", source)
        if head_dim < 1 or head_dim % 2:
            raise UserError(f"{source}: head_dim={head_dim} must be even, since rope rotates pairs of features")
        return cls(
            vocab_size=sizes["vocab_size"],
            d_model=sizes["hidden_size"],
            n_layers=sizes["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            d_ff=sizes["intermediate_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=read_number(hub, "rms_norm_eps", source),
            tie_embeddings=_flag(hub, "tie_word_embeddings", source),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            max_length=sizes["max_position_embeddings"],
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
    """Raises UserError for a feature that the decoder lacks, if the family's hub reader uses its field at all."""
    if hub["hidden_act"] != "silu":
        raise UserError(f"{source}: hidden_act={_shown(hub['hidden_act'])} is not supported, only silu")
    if hub.get("quantization_config"):
        raise UserError(f"{source}: quantization_config is not supported; take the checkpoint that is not quantized")
    read = {"llama": ("attention_bias", "mlp_bias"), "qwen2": (), "qwen3": ("attention_bias",)}
    for name in read[hub["model_type"]]:
        if _flag(hub, name, source):
            raise UserError(f"{source}: {name}=true is not supported")
    if hub["model_type"] == "llama":
        return  # Its reader knows no windows.
    window, kinds = None, hub["layer_types"]
    if _flag(hub, "use_sliding_window", source) and hub["sliding_window"] is not None:
        window = read_size(hub, "sliding_window", source)
    n_layers = hub["num_hidden_layers"]
    if kinds is None:
        slides = window is not None and n_layers > read_size(hub, "max_window_layers", source, least=0)
        kinds = ["sliding_attention" if slides else "full_attention"] * n_layers
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(not isinstance(kind, str) for kind in kinds):
        raise UserError(f"{source}: layer_types={_shown(kinds)} must name the kind of each of the {n_layers} layers")
    # A window as long as the context hides nothing.
    wide = window is not None and window >= hub["max_position_embeddings"]
    for kind in kinds:
        if kind == "sliding_attention" and not wide:
            raise UserError(f"{source}: sliding-window attention (sliding_window={window}) is not supported")
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"{source}: layer_types has {_shown(kind)}; only full_attention is supported")


def _rope_from_hub(hub: dict[str, Any], source: str) -> tuple[float, Llama3RopeScaling | None]:
    """Returns theta and scaling; transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters.

    As in transformers 5, rope_scaling replaces rope_parameters as a whole, theta included.
    """
    name = "rope_scaling" if hub["rope_scaling"] else "rope_parameters"
    rope = hub[name] or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{source}: {name}={_shown(rope)} must be one flat object of rope settings")
    where = f"{source}: {name}"
    rope = {"rope_theta": hub["rope_theta"], "partial_rotary_factor": hub["partial_rotary_factor"], **rope}
    theta = read_number(rope, "rope_theta", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None  # The readers' default rope rotates whole heads, whatever partial_rotary_factor says.
    if kind != "llama3":
        raise UserError(f"{where}: rope type {_shown(kind)} is not supported, only default and llama3")
    if rope["partial_rotary_factor"] != 1:
        raise UserError(f"{where}: partial_rotary_factor={_shown(rope['partial_rotary_factor'])} is not supported")
    original = "original_max_position_embeddings"
    rope.setdefault(original, hub["max_position_embeddings"])
    if original in hub:
        rope[original] = hub[original]
    factor, low, high = (read_number(rope, field, where) for field in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise UserError(f"{where}: high_freq_factor={high} must exceed low_freq_factor={low}")
    return theta, Llama3RopeScaling(factor, low, high, read_size(rope, original, where, 2**31))


def read_size(record: dict[str, Any], name: str, where: str, most: int = 2**24, *, least: int = 1) -> int:
    """Returns record[name], an integer within these bounds; UserError, which begins with `where`, otherwise."""
    return _checked(record, name, where, f"an integer from {least} to {most}", (int,), least, most)


def read_number(record: dict[str, Any], name: str, where: str) -> float:
    """Returns record[name], a positive number; UserError, which begins with `where`, otherwise."""
    return _checked(record, name, where, "a number above 0 and below 1e30", (int, float), 1e-30, 1e30)


def _flag(record: dict[str, Any], name: str, where: str) -> bool:
    return _checked(record, name, where, "true or false", (bool,), False, True)


def _checked(
    record: dict[str, Any], name: str, where: str, wanted: str, types: tuple[type, ...], least: Any, most: Any
) -> Any:
    if name not in record:
        raise UserError(f"{where}: {name} is missing; it must be {wanted}")
    value = record[name]
    if type(value) not in types or not least <= value <= most:  # A bool is an int, but not the other way round.
        raise UserError(f"{where}: {name} is {_shown(value)}; it must be {wanted}")
    return value


def _shown(value: Any) -> str:
    """Returns a value as JSON, cut to a length that a message can hold."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."
