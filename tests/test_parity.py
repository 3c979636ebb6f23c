"""Our decoder against transformers: logits of a padded batch, greedy tokens, cache against full forward, export.

Expected values are in tests/fixtures, made by make_fixtures.py; with torch installed, they are also computed live.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.model import hub
from popi_jax.model.policy import Policy
from popi_jax.model.tokenizer import Tokenizer
from tests import hub_variants

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
SMOLLM2 = pathlib.Path(__file__).resolve().parent.parent / "checkpoints" / "SmolLM2-135M-Instruct"
FAMILIES = ("llama3", "qwen2", "qwen3")


def split_rows(values: np.ndarray, length_B: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(length_B)[:-1])


def pad(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded tokens, positions and segments, each [B, L]."""
    length_B = np.array([len(row) for row in rows])
    longest = length_B.max()
    tokens_BxL = np.stack([np.pad(row, (0, longest - len(row))) for row in rows]).astype(np.int32)
    positions_BxL = np.broadcast_to(np.arange(longest, dtype=np.int32), tokens_BxL.shape)
    segments_BxL = np.where(positions_BxL < length_B[:, None], 0, -1).astype(np.int32)
    return tokens_BxL, positions_BxL, segments_BxL


@functools.partial(jax.jit, static_argnums=0)
def forward(policy: Policy, params: Any, tokens_BxL: jax.Array, positions_BxL: jax.Array, segments_BxL: jax.Array):
    decoder = policy.bind(params, None)
    return decoder.logits(decoder(tokens_BxL, positions_BxL, segments_BxL))


@functools.partial(jax.jit, static_argnums=(0, 5))
def decode_greedily(policy, params, tokens_BxT, positions_BxT, segments_BxT, count: int):
    """Runs prefill and `count` greedy steps; returns tokens_BxR and logits_BxRxV, from which each was chosen."""
    decoder = policy.bind(params, None)
    hidden_BxTxD, cache = decoder.prefill(tokens_BxT, positions_BxT, segments_BxT, 1, count)
    length_Bx1 = (segments_BxT == 0).sum(axis=1, keepdims=True)
    last_Bx1xD = jnp.take_along_axis(hidden_BxTxD, length_Bx1[:, :, None] - 1, axis=1)

    def step(carry, index):
        hidden_Bx1xD, cache = carry
        logits_Bx1xV = decoder.logits(hidden_Bx1xD)
        token_Bx1 = jnp.argmax(logits_Bx1xV, axis=-1).astype(jnp.int32)
        carry = decoder.decode(token_Bx1, length_Bx1 + index, cache, index)
        return carry, (token_Bx1[:, 0], logits_Bx1xV[:, 0])

    _, (tokens_RxB, logits_RxBxV) = jax.lax.scan(step, (last_Bx1xD, cache), jnp.arange(count))
    return tokens_RxB.T, logits_RxBxV.transpose(1, 0, 2)


def padded_logits(checkpoint: hub.Checkpoint, rows: list[np.ndarray]) -> list[np.ndarray]:
    logits_BxLxV = np.asarray(forward(Policy(checkpoint.config), checkpoint.params, *pad(rows)))
    return [logits_LxV[: len(row)] for logits_LxV, row in zip(logits_BxLxV, rows, strict=True)]


def worst_difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def check(
    checkpoint: hub.Checkpoint, expected: Mapping[str, np.ndarray], tolerance: float, decode_tolerance: float = 1e-4
) -> dict[str, float]:
    """Asserts parity with `expected` (see make_fixtures.expected); returns the largest differences."""
    prompts = split_rows(expected["prompts"], expected["length_B"])
    assert len({len(prompt) for prompt in prompts}) == 8
    ours = padded_logits(checkpoint, prompts)
    if "columns" in expected:
        best = worst_difference([row.max(axis=-1) for row in ours], split_rows(expected["best"], expected["length_B"]))
        assert best <= tolerance
        ours = [row[:, expected["columns"]] for row in ours]
    measured = {"logits": worst_difference(ours, split_rows(expected["logits"], expected["length_B"]))}
    assert measured["logits"] <= tolerance

    greedy_BxR = expected["greedy_BxR"]
    count = greedy_BxR.shape[1]
    assert count == 60
    tokens_BxR, logits_BxRxV = decode_greedily(Policy(checkpoint.config), checkpoint.params, *pad(prompts), count)
    np.testing.assert_array_equal(np.asarray(tokens_BxR), greedy_BxR)

    rows = [np.concatenate([prompt, new]) for prompt, new in zip(prompts, greedy_BxR, strict=True)]
    full = [
        logits_LxV[len(prompt) - 1 : -1]
        for logits_LxV, prompt in zip(padded_logits(checkpoint, rows), prompts, strict=True)
    ]
    decoded = list(np.asarray(logits_BxRxV))
    measured["decode_logits"] = worst_difference(decoded, full)
    measured["decode_logp"] = max(
        float(np.abs(log_softmax(a) - log_softmax(b))[np.arange(count), tokens_R].max())
        for a, b, tokens_R in zip(decoded, full, greedy_BxR, strict=True)
    )
    assert measured["decode_logits"] <= decode_tolerance
    assert measured["decode_logp"] <= 1e-4
    return measured


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_values(family: str):
    expected = np.load(FIXTURES / family / "expected.npz")
    print(family, check(hub.load(FIXTURES / family), expected, tolerance=1e-4))


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_live_values(family: str, tmp_path: pathlib.Path):
    pytest.importorskip("torch", reason="live parity needs torch: pip install -e '.[torch]'")
    from tests import make_fixtures

    make_fixtures.make_family(family, seed=17, folder=tmp_path)
    expected = np.load(tmp_path / "expected.npz")
    print(family, check(hub.load(tmp_path), expected, tolerance=1e-4))


@pytest.mark.torch
@pytest.mark.parametrize("shard_bytes", [2**30, 100_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_an_export(family: str, shard_bytes: int, tmp_path: pathlib.Path):
    torch = pytest.importorskip("torch", reason="live parity needs torch: pip install -e '.[torch]'")
    import transformers

    from tests import make_fixtures

    checkpoint = hub.load(FIXTURES / family)
    # Weights that differ from the source's, so that a copy of the source folder would fail.
    params = jax.tree.map(lambda leaf: leaf * 1.25, checkpoint.params)
    hub.save(tmp_path, checkpoint.config, params, checkpoint.tokenizer_path, shard_bytes=shard_bytes)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    prompts = make_fixtures.random_prompts(5)
    theirs = make_fixtures.padded_logits(model.eval(), prompts)
    changed = hub.Checkpoint(checkpoint.config, params, checkpoint.tokenizer_path, "")
    assert worst_difference(padded_logits(changed, prompts), theirs) <= 2e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Tea or coffee?"}]
    theirs_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert Tokenizer.load(tmp_path).render(messages) == theirs_ids


# Rounding of float32: our cached logits, our full logits and transformers' logits each differ by up to 9e-5 from those
# of transformers in float64 (which reach 45), so two of them may differ by twice that.
SMOLLM2_DECODE_TOLERANCE = 2e-4


def smollm2() -> hub.Checkpoint:
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.skip("checkpoints/SmolLM2-135M-Instruct is missing; run make smollm2")
    return hub.load(SMOLLM2)


@pytest.mark.slow
def test_smollm2_stored_values():
    checkpoint = smollm2()
    expected = np.load(FIXTURES / "smollm2_expected.npz")
    tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
    question = [{"role": "user", "content": "What is gravity? Answer in one sentence."}]
    assert tokenizer.render(question) == expected["prompts"][: expected["length_B"][0]].tolist()
    print(check(checkpoint, expected, tolerance=2e-3, decode_tolerance=SMOLLM2_DECODE_TOLERANCE))
    answer = tokenizer.decode(expected["greedy_BxR"][0])
    assert answer.startswith("Gravity is a fundamental concept in physics that describes")


@pytest.mark.slow
@pytest.mark.torch
def test_smollm2_live_values():
    torch = pytest.importorskip("torch", reason="live parity needs torch: pip install -e '.[torch]'")
    import transformers

    from tests import make_fixtures

    checkpoint = smollm2()
    stored = np.load(FIXTURES / "smollm2_expected.npz")
    prompts = split_rows(stored["prompts"], stored["length_B"])
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    expected = make_fixtures.expected(model, prompts)
    print(check(checkpoint, expected, tolerance=2e-3, decode_tolerance=SMOLLM2_DECODE_TOLERANCE))


@pytest.mark.parametrize("name", hub_variants.VARIANTS)
def test_a_folder_means_what_the_hubs_reader_takes_it_for(name: str, tmp_path: pathlib.Path):
    hub_variants.write(tmp_path, name)
    rows = padded_logits(hub.load(tmp_path), [hub_variants.TOKENS])
    stored = np.load(FIXTURES / "hub_variants.npz")[name]
    np.testing.assert_allclose(rows[0][hub_variants.STORED], stored, atol=2e-4, rtol=0)


@pytest.mark.torch
@pytest.mark.parametrize("name", hub_variants.VARIANTS)
def test_live_values_of_unusual_folders(name: str):
    pytest.importorskip("torch", reason="live parity needs torch: pip install -e '.[torch]'")
    from tests import make_fixtures

    stored = np.load(FIXTURES / "hub_variants.npz")[name]
    np.testing.assert_allclose(make_fixtures.variant_logits(name), stored, atol=1e-4, rtol=0)
