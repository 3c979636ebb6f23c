"""Small hub folders whose config.json is unusual, made with numpy alone, so that tests and make_fixtures.py agree.

Each differs from its family's plain folder in a field that hub readers default, ignore or prefer to another.
"""

import json
import pathlib
import zlib
from typing import Any

import numpy as np
import safetensors.numpy

TOKENS = np.random.default_rng(0).integers(0, 64, 48)
STORED = slice(7, None, 8)  # The positions whose logits are compared.
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ABSENT = object()

# name -> (model_type, changes of config.json).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied_with_another_head": ("llama", {"tie_word_embeddings": True, "head": True}),
    "tied_with_the_same_head": ("llama", {"tie_word_embeddings": True, "head": "same"}),
    "tied_with_the_head_alone": ("qwen3", {"tie_word_embeddings": True, "head": "alone"}),
    "rope_scaling_beside_rope_parameters": (
        "llama",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 32},
        },
    ),
    "rope_scaling_and_theta_beside_rope_parameters": (
        "qwen3",
        {
            "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 100.0},
            "rope_scaling": {"type": "default"},
            "rope_theta": 500.0,
        },
    ),
    "empty_rope_scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}, "rope_scaling": {}},
    ),
    "rope_type_beside_type": ("llama", {"rope_scaling": {"rope_type": "default", "type": "llama3"}}),
    "llama3_without_original_length": ("llama", {"rope_parameters": {**_LLAMA3, "rope_theta": 500.0}}),
    "llama3_with_original_length_outside": (
        "llama",
        {
            "rope_parameters": {**_LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 64},
            "original_max_position_embeddings": 16,
        },
    ),
    "partial_rotary_factor": ("llama", {"partial_rotary_factor": 0.5, "rope_theta": 50.0}),
    "layer_types_in_llama": ("llama", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}),
    "attention_bias_in_qwen2": ("qwen2", {"attention_bias": True, "mlp_bias": True}),
    "window_without_layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "window_not_used": ("qwen3", {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}),
    "window_null": ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
    "window_as_long_as_the_context": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
    "full_layers_win_over_window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 0,
            "layer_types": ["full_attention"] * 2,
        },
    ),
    "qwen3_without_head_dim": ("qwen3", {"head_dim": ABSENT}),
    "qwen2_without_kv_heads": ("qwen2", {"num_key_value_heads": ABSENT, "num_attention_heads": 32, "head_dim": 4}),
    "qwen3_with_null_kv_heads": ("qwen3", {"num_key_value_heads": None}),
    "llama_without_kv_heads_and_head_dim": ("llama", {"num_key_value_heads": ABSENT, "head_dim": ABSENT}),
    "absent_eps_and_flags": ("qwen2", {"rms_norm_eps": ABSENT, "tie_word_embeddings": ABSENT, "rope_theta": ABSENT}),
}


def write(folder: pathlib.Path, name: str) -> None:
    """Writes config.json and model.safetensors of the variant `name`."""
    model_type, changes = VARIANTS[name]
    config = {
        "architectures": [
            {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]
        ],
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **changes,
    }
    head = config.pop("head", config["tie_word_embeddings"] is not True)
    config = {key: value for key, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config))
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", 32 if model_type != "llama" else heads) or heads
    head_dim = config.get("head_dim", 128 if model_type == "qwen3" else 32 // heads)
    shapes = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,)}
    for layer in range(2):
        within = {
            "input_layernorm.weight": (32,),
            "post_attention_layernorm.weight": (32,),
            "self_attn.o_proj.weight": (32, heads * head_dim),
            "mlp.gate_proj.weight": (40, 32),
            "mlp.up_proj.weight": (40, 32),
            "mlp.down_proj.weight": (32, 40),
        }
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            within[f"self_attn.{part}_proj.weight"] = (count * head_dim, 32)
            if model_type == "qwen2":
                within[f"self_attn.{part}_proj.bias"] = (count * head_dim,)
            if model_type == "qwen3" and part != "v":
                within[f"self_attn.{part}_norm.weight"] = (head_dim,)
        shapes |= {f"model.layers.{layer}.{key}": shape for key, shape in within.items()}
    if head:
        shapes["lm_head.weight"] = (64, 32)
    weights = {key: _draw(key, shape) for key, shape in shapes.items()}
    if head in ("same", "alone"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    if head == "alone":
        del weights["model.embed_tokens.weight"]
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if name.endswith("norm.weight"):
        return (1 + 0.3 * noise).astype(np.float32)
    return (noise * (1.5 / 32**0.5 if len(shape) > 1 else 0.5)).astype(np.float32)
