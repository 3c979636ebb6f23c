"""Writes tests/fixtures with transformers and torch: expected values for our decoder, so that tests need no torch.

    python tests/make_fixtures.py                                      # the small random checkpoints
    python tests/make_fixtures.py checkpoints/SmolLM2-135M-Instruct    # expected values of the real checkpoint

Needs torch besides the package's requirements. With torch installed, tests import it to compute the values live.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import tokenizers
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # For a start by the file's path.

from tests import hub_variants  # noqa: E402

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
FAMILIES = ("llama3", "qwen2", "qwen3")
LENGTHS = (3, 24, 7, 12, 1, 18, 9, 15)
NEW_TOKENS = 60
VOCAB = 260
CHAT_TEMPLATE = (
    "{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
SMOLLM2_PROMPTS = (
    "What is gravity? Answer in one sentence.",
    "Hi!",
    "Write a haiku about the sea in winter.",
    "Explain to a ten-year-old why the sky is blue, without using the word 'scattering'.",
    "List 3 prime numbers greater than 100.",
    "I prefer short answers with a dry sense of humour.\n\nHow do I keep basil alive on a north-facing window sill?",
    "Translate 'good morning' into French, German and Japanese.",
    "Prompt: How do I learn to juggle?\nPreferred: Start with one ball.\nRejected: Juggling is an ancient art.\n\n"
    "The example above shows which response a user prefers. Describe in one sentence what this user likes.",
)
SMOLLM2_COLUMNS = 96  # Number of random vocabulary entries whose logits are stored.


def build_model(family: str, seed: int) -> transformers.PreTrainedModel:
    """Returns a small random checkpoint of a family in float32 and evaluation mode.

    Weights are larger than at initialisation, so that attention is far from uniform and the nonlinearities matter.
    Every scale and bias differs from its neutral value, so that omitting one shows.
    """
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if family == "llama3":
        # An original length of 32 puts some frequencies in each of the three bands: kept, blended, divided.
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope = {**scaling, "original_max_position_embeddings": 32, "rope_theta": 500.0}
        config = transformers.LlamaConfig(**shape, rope_parameters=rope, tie_word_embeddings=False)
    elif family == "qwen2":
        config = transformers.Qwen2Config(**shape, rope_theta=10000.0, tie_word_embeddings=True)
    else:
        config = transformers.Qwen3Config(**shape, head_dim=16, rope_theta=1e6, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
    return model.eval()


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer of 256 bytes and four special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<turn>", "<end>", "<eos>"]
    vocab = {token: index for index, token in enumerate(special + alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


def random_prompts(seed: int) -> list[np.ndarray]:
    """Returns eight prompts of the lengths in LENGTHS, without special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCAB, size=length) for length in LENGTHS]


@torch.no_grad()
def padded_logits(model: transformers.PreTrainedModel, prompts: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the logits [length, V] of each prompt, computed in one right-padded batch."""
    longest = max(len(prompt) for prompt in prompts)
    tokens_BxL = np.stack([np.pad(prompt, (0, longest - len(prompt))) for prompt in prompts])
    mask_BxL = np.stack([np.arange(longest) < len(prompt) for prompt in prompts]).astype(np.int64)
    logits_BxLxV = model(torch.tensor(tokens_BxL), attention_mask=torch.tensor(mask_BxL)).logits.numpy()
    return [logits_LxV[: len(prompt)] for logits_LxV, prompt in zip(logits_BxLxV, prompts, strict=True)]


@torch.no_grad()
def greedy(model: transformers.PreTrainedModel, prompts: list[np.ndarray], count: int = NEW_TOKENS) -> np.ndarray:
    """Returns `count` greedy tokens after each prompt, [B, count]; no token ends a row early.

    Computed in one left-padded batch, as transformers pads to generate.
    """
    longest = max(len(prompt) for prompt in prompts)
    tokens_BxL = torch.tensor(np.stack([np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]))
    pad_B = torch.tensor([longest - len(prompt) for prompt in prompts])
    cache, new = None, []
    for end in range(longest, longest + count):
        index_BxS = torch.arange(end)[None].expand(len(prompts), -1)
        positions_BxL = (index_BxS - pad_B[:, None]).clamp(min=0)[:, -tokens_BxL.shape[1] :]
        mask_BxS = (index_BxS >= pad_B[:, None]).long()
        result = model(
            tokens_BxL, attention_mask=mask_BxS, position_ids=positions_BxL, past_key_values=cache, use_cache=True
        )
        cache = result.past_key_values
        tokens_BxL = result.logits[:, -1:].argmax(-1)
        new.append(tokens_BxL)
    return torch.cat(new, dim=1).numpy()


def expected(model: transformers.PreTrainedModel, prompts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of expected.npz; prompts and logits are concatenated, row b has length_B[b] of them."""
    return {
        "prompts": np.concatenate(prompts).astype(np.int32),
        "length_B": np.array([len(prompt) for prompt in prompts], np.int32),
        "logits": np.concatenate(padded_logits(model, prompts)).astype(np.float32),
        "greedy_BxR": greedy(model, prompts).astype(np.int32),
    }


def make_family(family: str, seed: int, folder: pathlib.Path) -> None:
    """Writes a hub folder and expected.npz. llama3 has two shards, qwen2 is in bfloat16."""
    model = build_model(family, seed)
    if family == "qwen2":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200KB" if family == "llama3" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    build_tokenizer().save_pretrained(folder)
    # Reloaded, not cast back: the cast to bfloat16 also rounds the rope frequencies.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    np.savez_compressed(folder / "expected.npz", **expected(model, random_prompts(seed)))


@torch.no_grad()
def variant_logits(name: str) -> np.ndarray:
    """Returns the logits that transformers computes for a folder of hub_variants.py, at the stored positions."""
    with tempfile.TemporaryDirectory() as folder:
        hub_variants.write(pathlib.Path(folder), name)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model(torch.tensor(hub_variants.TOKENS)[None]).logits[0, hub_variants.STORED].numpy()


def make_smollm2(checkpoint: str, path: pathlib.Path) -> None:
    """Writes the expected values of the real checkpoint: some columns of the logits, and the greedy tokens."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in SMOLLM2_PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    values = expected(model, [np.array(tokenizer.encode(text, add_special_tokens=False)) for text in texts])
    columns = np.sort(np.random.default_rng(0).choice(model.config.vocab_size, SMOLLM2_COLUMNS, replace=False))
    values["best"] = values["logits"].max(axis=-1)
    values["logits"] = values["logits"][:, columns]
    np.savez_compressed(path, columns=columns.astype(np.int32), **values)


def main(argv: list[str]) -> None:
    if argv:
        make_smollm2(argv[0], FIXTURES / "smollm2_expected.npz")
    else:
        for seed, family in enumerate(FAMILIES):
            make_family(family, seed, FIXTURES / family)
        variants = {name: variant_logits(name) for name in hub_variants.VARIANTS}
        np.savez_compressed(FIXTURES / "hub_variants.npz", **variants)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (FIXTURES / "VERSIONS.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
