"""The sampler against the full forward pass and against enumeration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.data.batch import PrefixBatch
from popi_jax.model import sharding
from popi_jax.model.decoder import Decoder
from popi_jax.model.policy import Policy
from popi_jax.rollout import sampler
from popi_jax.training import scoring
from tests import tiny

POLICY = tiny.policy(tiny.LORA)
BASE = tiny.perturbed(POLICY.init_base(jax.random.key(0)), 1, 0.2)
DELTA = tiny.perturbed(POLICY.init_delta(BASE, jax.random.key(2)), 3)
STOP, PAD = (3, 11), 0


@functools.partial(jax.jit, static_argnames=("branches", "max_tokens", "temperature", "top_p", "stop_ids", "policy"))
def draw(prompt, length, key, branches, max_tokens, temperature=1.0, top_p=1.0, stop_ids=STOP, policy=POLICY):
    return sampler.sample(
        policy.bind(BASE, DELTA),
        prompt,
        length,
        key,
        branches=branches,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=stop_ids,
        pad_id=PAD,
    )


def prompts(B=3, T=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 30, (B, T)).astype(np.int32), rng.integers(1, T + 1, B).astype(np.int32)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_the_trainers(temperature):
    prompt, length = prompts()
    out = draw(prompt, length, jax.random.key(0), 4, 8, temperature)
    batch = PrefixBatch(prompt, length, out.tokens_BxNxS, out.length_BxN)
    scores = scoring.score(POLICY.bind(BASE, DELTA), batch, temperature=temperature)
    np.testing.assert_allclose(out.logp_BxNxS, scores.logp_BxNxS, atol=1e-4)


def test_several_loops_draw_the_same_as_one(monkeypatch):
    prompt, length = prompts()
    one = draw(prompt, length, jax.random.key(0), 4, 11, stop_ids=(3,))
    monkeypatch.setattr(sampler, "_LOOP_TOKENS", 3)
    several = draw.__wrapped__(prompt, length, jax.random.key(0), 4, 11, stop_ids=(3,))
    np.testing.assert_array_equal(one.tokens_BxNxS, several.tokens_BxNxS)
    np.testing.assert_allclose(one.logp_BxNxS, several.logp_BxNxS, atol=1e-5)
    assert (several.length_BxN > 9).any() and several.finished_BxN.any()


def decoded(monkeypatch, *args, **options):
    """Returns the samples, drawn without jit, and the number of prompts in each decode step."""
    widths = []

    def spy(self, tokens_BxN, *args):
        widths.append(len(tokens_BxN))
        return decode(self, tokens_BxN, *args)

    decode = Decoder.decode
    with monkeypatch.context() as patched, jax.disable_jit():
        patched.setattr(Decoder, "decode", spy)
        return draw(*args, **options), widths


def test_unfinished_prompts_continue_in_half_the_batch(monkeypatch):
    prompt, length = prompts(B=5)
    length[2] = 0  # Padding is finished from the start.
    given = (prompt, length, jax.random.key(13), 2, 8)
    out, widths = decoded(monkeypatch, *given, stop_ids=(3, 5, 7, 11))
    # A prompt runs until the longer of its two branches ends. Of 5 prompts, 3 fit in half the batch, 2 in half of that.
    longest, _, third, fourth, _ = sorted(np.asarray(out.length_BxN).max(axis=1).tolist(), reverse=True)
    assert 1 < fourth < third < longest  # Otherwise the key does not test all three sizes.
    assert widths == [5] * (fourth - 1) + [3] * (third - fourth) + [2] * (longest - third)

    monkeypatch.setattr(sampler, "_HALVINGS", 0)
    whole, widths = decoded(monkeypatch, *given, stop_ids=(3, 5, 7, 11))
    assert widths == [5] * (longest - 1)
    np.testing.assert_array_equal(out.tokens_BxNxS, whole.tokens_BxNxS)
    np.testing.assert_array_equal(out.length_BxN, whole.length_BxN)
    np.testing.assert_array_equal(out.finished_BxN, whole.finished_BxN)
    np.testing.assert_allclose(out.logp_BxNxS, whole.logp_BxNxS, atol=1e-5)


def test_devices_that_finish_at_different_times_draw_the_same_as_one():
    prompt, length = prompts(B=16)
    key = jax.random.key(11)
    one = draw(prompt, length, key, 2, 24, stop_ids=(3, 5, 7, 11))
    waits_ShxBs = np.asarray(one.length_BxN).max(axis=1).reshape(4, 4)
    # At most two of each device's four prompts remain, then at most one, and not in the same places.
    assert len({frozenset(places) for places in np.argsort(waits_ShxBs)[:, 2:].tolist()}) == 3
    _, two, one_waits, all_done = np.sort(waits_ShxBs).max(axis=0)
    assert two < one_waits < all_done
    mesh = sharding.make_mesh(2, 2, 2)
    rows = jax.device_put((prompt, length), sharding.batch_sharding(mesh))
    split = draw(*rows, key, 2, 24, stop_ids=(3, 5, 7, 11), policy=dataclasses.replace(POLICY, mesh=mesh))
    assert split.tokens_BxNxS.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
    np.testing.assert_array_equal(one.tokens_BxNxS, split.tokens_BxNxS)
    np.testing.assert_array_equal(one.length_BxN, split.length_BxN)
    np.testing.assert_allclose(one.logp_BxNxS, split.logp_BxNxS, atol=1e-5)


def test_turns_without_early_stops():
    assert sampler.turns(48) == (47, 0, 0)
    assert sampler.turns(512) == (511, 0, 0) and sampler.turns(513) == (256, 256, 0, 0)
    assert sampler.turns(4096) == (1023, 1024, 1024, 1024, 0, 0)
    assert sampler.turns(1) == (0, 0, 0)


def test_greedy_is_the_argmax_of_the_full_forward():
    prompt, length = prompts(seed=4)
    out = draw(prompt, length, jax.random.key(0), 1, 10, 0.0, stop_ids=(999,))

    @jax.jit
    def best(ids, last):
        decoder = POLICY.bind(BASE, DELTA)
        hidden = decoder(ids[None], jnp.arange(16)[None], jnp.zeros((1, 16), jnp.int32))
        return jnp.argmax(decoder.logits(hidden)[0, last])

    for b in range(len(prompt)):
        tokens = list(prompt[b, : length[b]])
        for t in range(10):
            ids = np.pad(np.array(tokens), (0, 16 - len(tokens)))
            tokens.append(int(best(ids, len(tokens) - 1)))
            assert tokens[-1] == out.tokens_BxNxS[b, 0, t]
    assert not out.finished_BxN.any() and (out.length_BxN == 10).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.0, 1.0), (1.3, 0.9)])
def test_rows_beyond_the_tokenizer_are_never_drawn(temperature, top_p):
    padded = Policy(dataclasses.replace(tiny.CONFIG, n_tokens=12), tiny.LORA)
    prompt, length = prompts()
    options = {"temperature": temperature, "top_p": top_p, "stop_ids": ()}
    assert (draw(prompt, length, jax.random.key(0), 4, 8, **options).tokens_BxNxS >= 12).any()
    out = draw(prompt, length, jax.random.key(0), 4, 8, policy=padded, **options)
    assert (out.tokens_BxNxS < 12).all() and (out.length_BxN == 8).all() and np.isfinite(out.logp_BxNxS).all()


def test_frequencies_follow_the_model():
    prompt, length = prompts(B=1)
    out = draw(prompt, length, jax.random.key(5), 4000, 1)
    decoder = POLICY.bind(BASE, DELTA)
    ids = jnp.asarray(prompt[:, : length[0]])
    hidden = decoder(ids, jnp.arange(ids.shape[1])[None], jnp.zeros_like(ids))
    p = np.asarray(jax.nn.softmax(decoder.logits(hidden)[0, -1]))
    counts = np.bincount(np.asarray(out.tokens_BxNxS).ravel(), minlength=30)
    chi2 = ((counts - 4000 * p) ** 2 / (4000 * p)).sum()
    assert chi2 < 29 + 4 * np.sqrt(2 * 29), chi2  # 29 degrees of freedom, 4 standard deviations.


def test_stops_at_a_stop_token_and_counts_it():
    prompt, length = prompts(B=4, seed=1)
    out = draw(prompt, length, jax.random.key(1), 6, 40)
    tokens = np.asarray(out.tokens_BxNxS)
    for b, n in np.ndindex(4, 6):
        row, count = tokens[b, n], int(out.length_BxN[b, n])
        stops = np.flatnonzero(np.isin(row[:count], STOP))
        if out.finished_BxN[b, n]:
            assert list(stops) == [count - 1]
            assert (row[count:] == PAD).all() and (out.logp_BxNxS[b, n, count:] == 0).all()
        else:
            assert count == 40 and not len(stops)
    assert out.finished_BxN.any()


def test_padding_does_not_matter_and_empty_rows_draw_nothing():
    prompt, length = prompts(B=2, seed=2)
    wide = np.pad(prompt, ((0, 1), (0, 5)), constant_values=7)
    narrow = draw(prompt, length, jax.random.key(3), 2, 6, 0.0)
    padded = draw(wide, np.append(length, 0).astype(np.int32), jax.random.key(3), 2, 6, 0.0)
    np.testing.assert_array_equal(narrow.tokens_BxNxS, padded.tokens_BxNxS[:2])
    assert (padded.length_BxN[2] == 0).all() and (padded.tokens_BxNxS[2] == PAD).all()


def test_top_p_keeps_the_smallest_nucleus_and_normalises_it():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    logp = sampler.truncate(logits, temperature=1.0, top_p=0.7)
    np.testing.assert_allclose(np.exp(logp[0]), [0.625, 0.375, 0, 0], atol=1e-6)
    np.testing.assert_allclose(np.exp(sampler.truncate(logits, temperature=1.0, top_p=0.5)[0]), [1, 0, 0, 0], atol=1e-6)
    half = sampler.truncate(logits, temperature=0.5, top_p=1.0)  # Squares the probabilities.
    np.testing.assert_allclose(np.exp(half[0]), np.array([25, 9, 2.25, 0.25]) / 36.5, atol=1e-6)


def test_the_key_determines_the_samples():
    prompt, length = prompts()
    one, same = (draw(prompt, length, jax.random.key(8), 3, 6) for _ in range(2))
    other = draw(prompt, length, jax.random.key(9), 3, 6)
    np.testing.assert_array_equal(one.tokens_BxNxS, same.tokens_BxNxS)
    assert (np.asarray(one.tokens_BxNxS) != np.asarray(other.tokens_BxNxS)).any()
    assert (np.asarray(one.tokens_BxNxS[:, 0]) != np.asarray(one.tokens_BxNxS[:, 1])).any()


def test_a_draw_equals_jax_random_categorical():
    B, T, N = 40, 6, 10
    prompt, key = prompts(B, T)[0], jax.random.key(3)
    out = draw(prompt, np.full(B, T, np.int32), key, N, 1, top_p=0.9)
    decoder = POLICY.bind(BASE, DELTA)
    hidden_BxTxD = decoder(prompt, jnp.tile(jnp.arange(T), (B, 1)), jnp.zeros((B, T), jnp.int32))
    logp_BxV = sampler.truncate(decoder.logits(hidden_BxTxD)[:, -1], temperature=1.0, top_p=0.9)
    logp_BxNxV = jnp.broadcast_to(logp_BxV[:, None], (B, N, tiny.CONFIG.vocab_size))
    want_BxN = jax.random.categorical(jax.random.fold_in(key, 0), logp_BxNxV)
    np.testing.assert_array_equal(out.tokens_BxNxS[..., 0], want_BxN)
    assert len(np.unique(want_BxN)) > 20


def test_greedy_takes_the_first_of_equal_logits():
    ties_XxV = jnp.array([[0.0, 2.0, 2.0, -jnp.inf], [-jnp.inf] * 4, [-1.0, -3.0, -1.0, -2.0]])
    logp_XxV = sampler.truncate(ties_XxV, temperature=0.0, top_p=1.0)
    np.testing.assert_array_equal(np.exp(logp_XxV), jax.nn.one_hot(jnp.array([1, 0, 0]), 4))
