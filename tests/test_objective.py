"""The objective's elementwise functions, reductions and sums equal values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.training import objective

LOG2 = 0.6931471805599453
LOG_4_3 = 0.28768207245178085  # log(4/3)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_losses_at_zero_margin_by_hand_and_slope_minus_half(beta):
    # -log sigmoid(0) / beta = log 2 / beta; (1 / (2 beta))^2 beta / 2 = 1 / (8 beta).
    np.testing.assert_allclose(objective.dpo_loss(0.0, beta), LOG2 / beta, rtol=1e-6)
    np.testing.assert_allclose(objective.ipo_loss(0.0, beta), 1 / (8 * beta), rtol=1e-6)
    for name in objective.LOSSES:
        np.testing.assert_allclose(jax.grad(objective.preference_loss(name))(0.0, beta), -0.5, rtol=1e-5)


def test_losses_away_from_zero():
    beta = 0.5
    h = np.log(3.0) / beta  # sigmoid(beta h) = 3/4.
    np.testing.assert_allclose(objective.dpo_loss(h, beta), LOG_4_3 / beta, rtol=1e-6)
    np.testing.assert_allclose(objective.preference_nats(h, beta), LOG_4_3, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(objective.dpo_loss)(h, beta), -0.25, rtol=1e-6)
    # IPO has its minimum at h = 1 / (2 beta) = 1 and is symmetric about it: (3 - 1)^2 * 0.25 = 1.
    np.testing.assert_allclose(objective.ipo_loss(jnp.array([1.0, 3.0, -1.0]), beta), [0.0, 1.0, 1.0])


def test_dpo_does_not_overflow():
    value, slope = jax.value_and_grad(objective.dpo_loss)(-1e5, 0.1)
    np.testing.assert_allclose([value, slope], [1e5, -1.0], rtol=1e-6)
    assert float(objective.dpo_loss(1e5, 0.1)) == 0.0


def test_margin_by_hand_and_its_shape():
    policy_2x3x2 = jnp.broadcast_to(jnp.array([-5.0, -9.0]), (2, 3, 2))
    ref_2x1x2 = jnp.array([[[-6.0, -7.0]], [[-5.0, -9.0]]])
    # (-5 + 6) - (-9 + 7) = 3. A policy that equals its reference has margin 0.
    h_2x3 = objective.implicit_reward_margin(policy_2x3x2, ref_2x1x2)
    np.testing.assert_allclose(h_2x3, [[3.0] * 3, [0.0] * 3])


def test_accuracy_is_strict():
    np.testing.assert_array_equal(objective.preference_accuracy(jnp.array([-1.0, 0.0, 1e-6])), [0.0, 0.0, 1.0])


def test_total_logp_sums_only_tokens_in_the_mask():
    logp = jnp.array([[-1.0, -2.0, jnp.nan], [-3.0, jnp.inf, jnp.nan], [jnp.nan] * 3])
    mask = jnp.array([[True, True, False], [True, False, False], [False] * 3])
    np.testing.assert_allclose(objective.total_logp(logp, mask), [-3.0, -3.0, 0.0])
    grad = jax.grad(lambda x: objective.total_logp(x, mask).sum())(logp)
    np.testing.assert_array_equal(grad, mask.astype(np.float32))


def test_total_logp_accumulates_in_float32():
    logp = jnp.full((257,), -1.0, jnp.bfloat16)  # bfloat16 rounds 257 to 256.
    assert float(objective.total_logp(logp, jnp.ones(257, bool))) == -257.0


def test_reduce_logp_sums_or_averages():
    logp, length = jnp.array([-3.0, -3.0, 0.0]), jnp.array([2, 1, 0])
    np.testing.assert_allclose(objective.reduce_logp(logp, length, "sum"), [-3.0, -3.0, 0.0])
    np.testing.assert_allclose(objective.reduce_logp(logp, length, "mean"), [-1.5, -3.0, 0.0])


def test_weighted_total_sums_values_and_weights():
    total, count = objective.weighted_total(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False]))
    assert (float(total), float(count)) == (3.0, 2.0)
    total, count = objective.weighted_total(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([0.5, 2.0, 0.0]))
    assert (float(total), float(count)) == (4.5, 2.5)


def test_advantages_by_hand():
    reward_UxK = jnp.array([[1.0, 2.0, 6.0]])
    # The means of the others are 4, 3.5 and 1.5; the mean of all is 3; the std is sqrt((4 + 1 + 9) / 2) = sqrt 7.
    np.testing.assert_allclose(objective.advantages("rloo", reward_UxK, 0.0), [[-3.0, -1.5, 4.5]])
    np.testing.assert_allclose(objective.advantages("group_mean", reward_UxK, 0.0), [[-2.0, -1.0, 3.0]])
    np.testing.assert_allclose(objective.advantages("reinforce", reward_UxK, 0.5), [[0.5, 1.5, 5.5]])
    grpo = np.array([[-2.0, -1.0, 3.0]]) / (np.sqrt(7.0) + 1e-4)
    np.testing.assert_allclose(objective.advantages("grpo", reward_UxK, 0.0), grpo, rtol=1e-6)


@pytest.mark.parametrize("name", objective.ADVANTAGES)
def test_advantages_of_padding_are_zero_and_carry_no_gradient(name):
    reward_UxK = jnp.array([[1.0, 2.0], [jnp.nan, 3.0]])
    valid_U = jnp.array([True, False])
    assert np.all(np.asarray(objective.advantages(name, reward_UxK, 0.0, valid_U))[0] != 0.0)
    np.testing.assert_array_equal(objective.advantages(name, reward_UxK, 0.0, valid_U)[1], [0.0, 0.0])
    grad = jax.grad(lambda x: objective.advantages(name, x, 0.0)[0, 0])(jnp.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(grad, [[0.0, 0.0]])


def test_grpo_of_equal_rewards_is_zero():
    np.testing.assert_array_equal(objective.advantages("grpo", jnp.full((1, 4), -3.0), 0.0), np.zeros((1, 4)))


def test_baseline_is_updated_by_valid_rewards_only():
    reward_UxK = jnp.array([[2.0, 4.0], [jnp.nan, 100.0]])

    def total(users):
        return objective.weighted_total(reward_UxK, jnp.broadcast_to(jnp.array(users)[:, None], reward_UxK.shape))

    moved = objective.update_baseline(jnp.float32(1.0), total([True, False]), decay=0.9)
    np.testing.assert_allclose(moved, 0.9 * 1.0 + 0.1 * 3.0, rtol=1e-6)
    kept = objective.update_baseline(jnp.float32(1.0), total([False, False]), decay=0.9)
    assert float(kept) == 1.0


def test_score_function_loss_is_minus_the_mean_over_users_and_k():
    sum_logp_UxK, advantage_UxK = jnp.array([[-1.0, -2.0], [-3.0, -4.0]]), jnp.array([[1.0, -1.0], [2.0, 0.5]])
    total, count = objective.score_function_loss(sum_logp_UxK, advantage_UxK)
    assert (float(total), float(count)) == (1.0 - 2.0 + 6.0 + 2.0, 4.0)
    grad = jax.grad(lambda x: objective.score_function_loss(x, advantage_UxK)[0])(sum_logp_UxK)
    np.testing.assert_array_equal(grad, -advantage_UxK)


def batch(n_users, n_samples=3, length=5):
    """Returns random inputs of inference_loss."""
    rng = np.random.default_rng(0)
    shape = (n_users, n_samples, length)
    lengths = rng.integers(1, length + 1, size=shape[:2])
    return {
        "reward_UxK": jnp.asarray(rng.normal(size=shape[:2]), jnp.float32),
        "logp_UxKxS": jnp.asarray(-rng.random(shape), jnp.float32),
        "ref_logp_UxKxS": jnp.asarray(-rng.random(shape), jnp.float32),
        "position_kl_UxKxS": jnp.asarray(rng.random(shape), jnp.float32),
        "mask_UxKxS": jnp.asarray(np.arange(length) < lengths[..., None]),
    }


def loss_and_grad(advantage, kl, inputs, valid_U):
    """Returns (sum, count) and the gradient of the sum with respect to the log-probabilities and the KL."""

    def total(logp_UxKxS, position_kl_UxKxS):
        parts = dict(inputs, logp_UxKxS=logp_UxKxS, position_kl_UxKxS=position_kl_UxKxS)
        loss = objective.inference_loss(
            advantage=advantage, kl=kl, kl_coef=0.3, baseline=0.2, valid_U=valid_U, **parts
        ).loss
        return loss[0], loss[1]

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    return run(inputs["logp_UxKxS"], inputs["position_kl_UxKxS"])


@pytest.mark.parametrize(
    ("advantage", "kl"),
    [("rloo", "exact"), ("reinforce", "k1_reward"), ("group_mean", "k3_loss"), ("grpo", "k1_reward")],
)
def test_micro_batches_and_padding_change_nothing(advantage, kl):
    """Two micro-batches, one of them with a padded user full of NaN, add up to the batch of the three real users."""
    inputs = batch(4)
    (whole, count), grads = loss_and_grad(advantage, kl, {k: v[:3] for k, v in inputs.items()}, jnp.ones(3, bool))
    spoiled = {
        k: v if v.dtype == bool else v.at[3].set(jnp.nan if k == "reward_UxK" else 1e3) for k, v in inputs.items()
    }
    first = loss_and_grad(advantage, kl, {k: v[:2] for k, v in spoiled.items()}, jnp.ones(2, bool))
    second = loss_and_grad(advantage, kl, {k: v[2:] for k, v in spoiled.items()}, jnp.array([True, False]))
    assert float(count) == 9.0 == float(first[0][1] + second[0][1])
    np.testing.assert_allclose(first[0][0] + second[0][0], whole, rtol=1e-5)
    for grad, grad_1, grad_2 in zip(grads, first[1], second[1], strict=True):
        np.testing.assert_allclose(jnp.concatenate([grad_1, grad_2[:1]]), grad, atol=1e-6)
        np.testing.assert_array_equal(grad_2[1], np.zeros_like(grad_2[1]))


@pytest.mark.parametrize("kl", objective.KL_ESTIMATORS)
def test_tokens_after_the_end_have_no_effect(kl):
    inputs = batch(2)
    spoiled = {
        k: jnp.where(inputs["mask_UxKxS"], v, jnp.nan)
        if k in ("logp_UxKxS", "ref_logp_UxKxS", "position_kl_UxKxS")
        else v
        for k, v in inputs.items()
    }
    clean, dirty = (loss_and_grad("rloo", kl, x, jnp.ones(2, bool)) for x in (inputs, spoiled))
    np.testing.assert_array_equal(dirty[0][0], clean[0][0])
    for dirty_grad, clean_grad in zip(dirty[1], clean[1], strict=True):
        np.testing.assert_array_equal(dirty_grad, clean_grad)
        assert np.all(np.asarray(clean_grad)[~np.asarray(inputs["mask_UxKxS"])] == 0.0)


def kl_terms_of_one(kl):
    """One user and one summary of two tokens and padding: log q = -1, -2; log q_0 = -1.5, -1; KL 0.4, 0.3."""
    return objective.kl_terms(
        kl,
        jnp.array([[[-1.0, -2.0, -7.0]]]),
        jnp.array([[[-1.5, -1.0, -3.0]]]),
        jnp.array([[[True, True, False]]]),
        jnp.array([[[0.4, 0.3, 9.0]]]),
    )


def test_kl_terms_by_hand():
    exact, k1, k3 = (kl_terms_of_one(kl) for kl in ("exact", "k1_reward", "k3_loss"))
    # log q(z_1) = -1 times the KL of the later tokens, 0.3. No tokens follow the last one.
    np.testing.assert_allclose(exact.loss, (0.4 + 0.3 - 1.0 * 0.3, 1.0), rtol=1e-6)
    np.testing.assert_allclose(exact.estimate, (0.7, 1.0), rtol=1e-6)
    # Log-ratios 0.5 and -1.
    np.testing.assert_allclose(k1.penalty_UxK, [[-0.5]])
    np.testing.assert_allclose(k1.estimate, (-0.5, 1.0))
    k3_value = (np.exp(-0.5) + 0.5 - 1) + (np.exp(1.0) - 1.0 - 1)
    np.testing.assert_allclose(k3.loss, (k3_value, 1.0), rtol=1e-6)
    np.testing.assert_allclose(k3.estimate, (k3_value, 1.0), rtol=1e-6)
    for terms in (exact, k3):
        np.testing.assert_array_equal(terms.penalty_UxK, [[0.0]])
    assert float(k1.loss[0]) == 0.0


@pytest.mark.parametrize("kl", objective.KL_ESTIMATORS)
def test_kl_penalty_and_estimate_have_no_gradient_and_ignore_padding(kl):
    inputs = batch(2)
    inputs.pop("reward_UxK")
    valid_U = jnp.array([True, False])
    np.testing.assert_array_equal(objective.kl_terms(kl, valid_U=valid_U, **inputs).penalty_UxK[1], np.zeros(3))

    def constant_parts(logp_UxKxS, position_kl_UxKxS):
        parts = dict(inputs, logp_UxKxS=logp_UxKxS, position_kl_UxKxS=position_kl_UxKxS)
        terms = objective.kl_terms(kl, valid_U=valid_U, **parts)
        return terms.penalty_UxK.sum() + terms.estimate[0]

    for grad in jax.grad(constant_parts, argnums=(0, 1))(inputs["logp_UxKxS"], inputs["position_kl_UxKxS"]):
        np.testing.assert_array_equal(grad, np.zeros_like(grad))


def test_inference_loss_returns_the_penalised_reward():
    inputs = batch(2)
    result = objective.inference_loss(
        advantage="rloo", kl="k1_reward", kl_coef=0.3, baseline=0.0, valid_U=jnp.ones(2, bool), **inputs
    )
    ratio = np.where(inputs["mask_UxKxS"], inputs["logp_UxKxS"] - inputs["ref_logp_UxKxS"], 0.0).sum(-1)
    np.testing.assert_allclose(
        result.penalised_UxK, np.asarray(inputs["reward_UxK"]) - 0.3 * ratio, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(result.kl, (ratio.sum(), 6.0), rtol=1e-5)


def test_errors_for_unknown_names_list_the_known_ones():
    inputs = batch(1)
    with pytest.raises(ValueError, match="'kto'.*'dpo', 'ipo'"):
        objective.preference_loss("kto")
    with pytest.raises(ValueError, match="'avg'.*'sum', 'mean'"):
        objective.reduce_logp(jnp.zeros(2), jnp.ones(2), "avg")
    with pytest.raises(ValueError, match="'gae'.*'rloo'"):
        objective.advantages("gae", inputs["reward_UxK"], 0.0)
    with pytest.raises(ValueError, match="'k1'.*'k1_reward'"):
        objective.kl_terms("k1", inputs["logp_UxKxS"], inputs["ref_logp_UxKxS"], inputs["mask_UxKxS"])


def test_missing_inputs_are_refused():
    inputs = batch(1)
    with pytest.raises(ValueError, match="position_kl_UxKxS"):
        objective.kl_terms("exact", inputs["logp_UxKxS"], inputs["ref_logp_UxKxS"], inputs["mask_UxKxS"])
    for name in ("rloo", "group_mean", "grpo"):
        with pytest.raises(ValueError, match="K >= 2, got K = 1"):
            objective.advantages(name, inputs["reward_UxK"][:, :1], 0.0)
    assert objective.advantages("reinforce", inputs["reward_UxK"][:, :1], 0.0).shape == (1, 1)


# The warm start, and the variance of rewards.


def test_best_of_k_by_hand():
    reward = jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [-4.0, -1.0, -2.0], [0.0, 9.0, 0.0]])
    valid = jnp.array([True, True, True, False])
    chosen = objective.best_of_k(reward, valid, -np.inf)
    np.testing.assert_array_equal(chosen, [[0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(objective.best_of_k(reward, valid, 0.0)[2], [0, 0, 0])
    np.testing.assert_array_equal(objective.best_of_k(reward, valid, 3.0), np.zeros((4, 3)))  # Above, not at, it.


def test_the_parts_of_the_rewards_variance_are_unbiased():
    """Over many users whose summaries differ by a known variance and whose queries have a known noise."""
    rng = np.random.default_rng(0)
    U, K, M, a, e = 20_000, 4, 3, 0.5, 2.0
    loss = a * rng.normal(size=(U, K, 1)) + 3.0 * rng.normal(size=(U, 1, M)) + e * rng.normal(size=(U, K, M))
    (variance, users), (noise, _) = objective.reward_variance(jnp.asarray(loss, jnp.float32), jnp.ones((U, M), bool))
    assert users == U
    np.testing.assert_allclose(noise / users, e**2 / M, rtol=0.02)
    np.testing.assert_allclose((variance - noise) / users, a**2, rtol=0.1)


def test_users_with_one_query_have_no_part_in_the_variance():
    loss = jnp.array([[[1.0, 2.0], [3.0, 5.0]], [[7.0, 100.0], [9.0, -100.0]]])
    (variance, users), (noise, _) = objective.reward_variance(loss, jnp.array([[True, True], [True, False]]))
    # The rewards of the first user are -1.5 and -4. Its residuals are 1/4, with alternating signs.
    np.testing.assert_allclose((variance, users), (3.125, 1))
    np.testing.assert_allclose(noise, 4 / 16 / (1 * 1) / 2)
