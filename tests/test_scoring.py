"""Scoring with shared prefixes equals scoring one plain sequence per branch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.data.batch import PrefixBatch
from popi_jax.model.policy import Policy
from popi_jax.training import scoring
from tests import tiny

POLICY = tiny.policy(tiny.LORA)
BASE = tiny.perturbed(POLICY.init_base(jax.random.key(0)), 1, 0.05)
DELTA = tiny.perturbed(POLICY.init_delta(BASE, jax.random.key(2)), 3)


def separate(delta, batch, temperature=1.0):
    """Returns the log-distribution at each token of a branch, [S, V], from its own unpadded sequence, per (b, n)."""
    decoder = POLICY.bind(BASE, delta)
    out = {}
    for b in range(batch.prefix_BxT.shape[0]):
        prefix = batch.prefix_BxT[b, : batch.prefix_length_B[b]]
        for n in range(batch.branches_BxNxS.shape[1]):
            branch = batch.branches_BxNxS[b, n, : batch.branch_length_BxN[b, n]]
            tokens = jnp.concatenate([prefix, branch])[None]
            hidden = decoder(tokens, jnp.arange(tokens.shape[1])[None], jnp.zeros_like(tokens))
            logp = jax.nn.log_softmax(decoder.logits(hidden)[0] / temperature, axis=-1)
            at = len(prefix) - 1 + jnp.arange(len(branch))
            out[b, n] = logp[at]
    return out


@pytest.mark.parametrize("chunk", [1024, 7])
def test_scores_equal_those_of_separate_sequences(chunk):
    batch = tiny.rows(np.random.default_rng(0), 3, 2, 6, 5)
    scores = jax.jit(lambda b: scoring.score(POLICY.bind(BASE, DELTA), b, chunk=chunk))(batch)
    for (b, n), logp_SxV in separate(DELTA, batch).items():
        length = batch.branch_length_BxN[b, n]
        expected = logp_SxV[np.arange(length), batch.branches_BxNxS[b, n, :length]]
        np.testing.assert_allclose(scores.logp_BxNxS[b, n, :length], expected, atol=1e-5)
        assert (scores.logp_BxNxS[b, n, length:] == 0).all()


def test_gradients_equal_those_of_separate_sequences():
    batch = tiny.rows(np.random.default_rng(1), 2, 3, 5, 4)
    weight_BxN = np.array([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]], np.float32)

    def shared(delta):
        logp = scoring.score(POLICY.bind(BASE, delta), batch, chunk=5).logp_BxNxS.sum(-1)
        return jnp.sum(logp * weight_BxN)

    def apart(delta):
        total = 0.0
        for (b, n), logp_SxV in separate(delta, batch).items():
            length = batch.branch_length_BxN[b, n]
            picked = logp_SxV[np.arange(length), batch.branches_BxNxS[b, n, :length]]
            total += weight_BxN[b, n] * picked.sum()
        return total

    got, expected = jax.jit(jax.grad(shared))(DELTA), jax.jit(jax.grad(apart))(DELTA)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=2e-5, rtol=2e-4), got, expected)


def test_kl_and_reference_at_a_temperature():
    batch = tiny.rows(np.random.default_rng(2), 2, 2, 5, 4)
    temperature = 0.7
    scores = scoring.score(
        POLICY.bind(BASE, DELTA), batch, temperature=temperature, reference=POLICY.bind(BASE, None), chunk=3
    )
    own, ref = separate(DELTA, batch, temperature), separate(None, batch, temperature)
    for key, logp_SxV in own.items():
        length = batch.branch_length_BxN[key]
        p = np.exp(np.asarray(logp_SxV, np.float64))
        kl = (p * (np.asarray(logp_SxV, np.float64) - np.asarray(ref[key], np.float64))).sum(-1)
        np.testing.assert_allclose(scores.kl_BxNxS[key][:length], kl, atol=1e-5)
        picked = ref[key][np.arange(length), batch.branches_BxNxS[key][:length]]
        np.testing.assert_allclose(scores.ref_logp_BxNxS[key][:length], picked, atol=1e-5)


def test_rows_of_padding_are_finite_and_have_no_effect():
    batch = tiny.rows(np.random.default_rng(3), 2, 2, 5, 4)
    batch.prefix_length_B[1] = 0
    batch.branch_length_BxN[1] = 0

    def total(delta):
        return scoring.score(POLICY.bind(BASE, delta), batch).logp_BxNxS.sum()

    value, grads = jax.jit(jax.value_and_grad(total))(DELTA)
    alone = jax.tree.map(lambda x: x[:1], batch)
    expected = scoring.score(POLICY.bind(BASE, DELTA), alone).logp_BxNxS.sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_rows_of_the_vocabulary_beyond_the_tokenizer_are_as_if_they_were_not_there():
    """The model with 30 rows, of which 20 are tokens, equals the one whose embedding is cut to 20 rows."""
    batch = tiny.rows(np.random.default_rng(4), 2, 2, 5, 4)
    ids = (batch.prefix_BxT % 20, batch.branches_BxNxS % 20)
    batch = PrefixBatch(ids[0], batch.prefix_length_B, ids[1], batch.branch_length_BxN)
    padded = Policy(dataclasses.replace(tiny.CONFIG, n_tokens=20), tiny.LORA)
    cut = Policy(dataclasses.replace(tiny.CONFIG, vocab_size=20), tiny.LORA)
    likely = {"embedding": BASE["embed"]["embedding"].at[20:].multiply(50)}
    bases = [(padded, BASE | {"embed": likely}), (cut, BASE | {"embed": jax.tree.map(lambda x: x[:20], likely)})]

    def total(delta, policy, base):
        scores = scoring.score(policy.bind(base, delta), batch, temperature=0.7, reference=policy.bind(base, None))
        return scores.logp_BxNxS.sum() + scores.kl_BxNxS.sum(), scores

    (got, expected) = (jax.grad(total, has_aux=True)(DELTA, policy, base) for policy, base in bases)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=2e-5, rtol=2e-4), got, expected)
