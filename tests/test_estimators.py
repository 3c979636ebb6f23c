"""Tests every advantage and KL estimator against exact gradients, on a policy small enough to enumerate.

The policy is a table of logits over 3 tokens for each of the 7 possible prefixes. Token 0 ends a summary, and a summary
has at most three tokens, so there are 15 summaries of length 1 to 3. The exact values are computed in numpy in float64
and share no code with popi_jax.training.objective: objectives are sums over the 15 summaries, and gradients are central
differences of these sums.

Letters of this file: P prefixes, V vocabulary, S length, Z all summaries, J all K-tuples of summaries, W = P * V
parameters, M Monte-Carlo draws.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.training import objective

V, S, END, KL_COEF, BASELINE = 3, 3, 0, 0.7, 6.5
PREFIXES = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
SUMMARIES = [
    z
    for length in range(1, S + 1)
    for z in itertools.product(range(V), repeat=length)
    if END not in z[:-1] and (z[-1] == END or length == S)
]
RNG = np.random.default_rng(7)
LOGITS_PxV = RNG.normal(size=(len(PREFIXES), V))
REF_LOGITS_PxV = LOGITS_PxV + 0.8 * RNG.normal(size=(len(PREFIXES), V))
# The rewards have a large mean, which exposes an estimator that relies on a mean of 0.
REWARD_Z = 7.0 + 1.5 * RNG.normal(size=len(SUMMARIES))

# The inputs of the estimators. After the end, a padded row repeats the first prefix, whose log-probabilities and KL are
# not 0, which exposes a mask that is not applied.
TOKENS_ZxS = np.array([z + (END,) * (S - len(z)) for z in SUMMARIES])
MASK_ZxS = np.array([[t < len(z) for t in range(S)] for z in SUMMARIES])
NODES_ZxS = np.array([[PREFIXES.index(z[:t]) if t < len(z) else 0 for t in range(S)] for z in SUMMARIES])


# Exact values, in numpy.


def log_softmax(logits_PxV):
    return logits_PxV - np.log(np.exp(logits_PxV).sum(axis=-1, keepdims=True))


def exact_logp_Z(logits_PxV):
    logp_PxV = log_softmax(logits_PxV)
    return np.array([sum(logp_PxV[PREFIXES.index(z[:t]), z[t]] for t in range(len(z))) for z in SUMMARIES])


def exact_reward(logits_PxV):
    return np.exp(exact_logp_Z(logits_PxV)) @ REWARD_Z


def exact_kl(logits_PxV):
    logp_Z = exact_logp_Z(logits_PxV)
    return np.exp(logp_Z) @ (logp_Z - exact_logp_Z(REF_LOGITS_PxV))


def forward_kl_on_fixed_prefixes(logits_PxV):
    """Returns sum_t KL(q_0(.|z_<t) || q(.|z_<t)), with prefixes drawn from the unperturbed policy: k3's objective."""
    logp_PxV, ref_PxV, start_PxV = log_softmax(logits_PxV), log_softmax(REF_LOGITS_PxV), log_softmax(LOGITS_PxV)
    total = 0.0
    for p, prefix in enumerate(PREFIXES):
        reach = np.exp(sum(start_PxV[PREFIXES.index(prefix[:t]), prefix[t]] for t in range(len(prefix))))
        total += reach * np.sum(np.exp(ref_PxV[p]) * (ref_PxV[p] - logp_PxV[p]))
    return total


def gradient_W(fn, step=1e-5):
    """Returns the gradient of fn at LOGITS_PxV by central differences."""
    grad_W = np.zeros(LOGITS_PxV.size)
    for w in range(LOGITS_PxV.size):
        shift_PxV = np.zeros(LOGITS_PxV.size)
        shift_PxV[w] = step
        shift_PxV = shift_PxV.reshape(LOGITS_PxV.shape)
        grad_W[w] = (fn(LOGITS_PxV + shift_PxV) - fn(LOGITS_PxV - shift_PxV)) / (2 * step)
    return grad_W


@functools.cache
def grad_logp_ZxW():
    """Returns the gradient of log q(z) in the logits: one-hot minus softmax at each prefix of z."""
    grad_ZxPxV = np.zeros((len(SUMMARIES), *LOGITS_PxV.shape))
    for number, z in enumerate(SUMMARIES):
        for t, token in enumerate(z):
            p = PREFIXES.index(z[:t])
            grad_ZxPxV[number, p] -= np.exp(log_softmax(LOGITS_PxV)[p])
            grad_ZxPxV[number, p, token] += 1.0
    return grad_ZxPxV.reshape(len(SUMMARIES), -1)


def exact_grpo_W(reward_Z, n_samples):
    """Returns -E (1/K) sum_k (r_k - mean) / (std + 1e-4) grad log q(z_k), summed over all tuples."""
    prob_Z = np.exp(exact_logp_Z(LOGITS_PxV))
    total_W = np.zeros(LOGITS_PxV.size)
    for picks in itertools.product(range(len(SUMMARIES)), repeat=n_samples):
        reward_K = reward_Z[list(picks)]
        spread = np.sqrt(np.sum((reward_K - reward_K.mean()) ** 2) / (n_samples - 1))
        advantage_K = (reward_K - reward_K.mean()) / (spread + 1e-4)
        total_W -= np.prod(prob_Z[list(picks)]) * advantage_K @ grad_logp_ZxW()[list(picks)] / n_samples
    return total_W


@functools.cache
def exact_gradient_W(advantage, kl, n_samples):
    """Returns the expected gradient that inference_loss must have."""
    if advantage == "grpo":
        log_ratio_Z = exact_logp_Z(LOGITS_PxV) - exact_logp_Z(REF_LOGITS_PxV)
        penalty_Z = KL_COEF * log_ratio_Z if kl == "k1_reward" else 0.0
        reward_part_W = exact_grpo_W(REWARD_Z - penalty_Z, n_samples)
    else:
        reward_part_W = -gradient_W(exact_reward)
        if kl == "k1_reward":
            reward_part_W = reward_part_W + KL_COEF * gradient_W(exact_kl)
        if advantage == "group_mean":
            reward_part_W = reward_part_W * (n_samples - 1) / n_samples
    kl_loss = {"exact": exact_kl, "k3_loss": forward_kl_on_fixed_prefixes}
    return reward_part_W + (KL_COEF * gradient_W(kl_loss[kl]) if kl in kl_loss else 0.0)


# The estimators of popi_jax, on every tuple of K summaries.


def policy_terms(logits_PxV, picks_K):
    """Returns the inputs of inference_loss for one user with the summaries `picks_K`, as a step would compute them."""
    logp_PxV, ref_PxV = jax.nn.log_softmax(logits_PxV), jax.nn.log_softmax(jnp.asarray(REF_LOGITS_PxV))
    kl_P = jnp.sum(jnp.exp(logp_PxV) * (logp_PxV - ref_PxV), axis=-1)
    tokens_1xKxS, nodes_1xKxS = jnp.asarray(TOKENS_ZxS)[picks_K][None], jnp.asarray(NODES_ZxS)[picks_K][None]
    return {
        "reward_UxK": jnp.asarray(REWARD_Z)[picks_K][None],
        "logp_UxKxS": logp_PxV[nodes_1xKxS, tokens_1xKxS],
        "ref_logp_UxKxS": ref_PxV[nodes_1xKxS, tokens_1xKxS],
        "position_kl_UxKxS": kl_P[nodes_1xKxS],
        "mask_UxKxS": jnp.asarray(MASK_ZxS)[picks_K][None],
    }


def step_loss(logits_PxV, picks_K, advantage, kl, baseline=BASELINE):
    terms = policy_terms(logits_PxV, picks_K)
    total, count = objective.inference_loss(
        advantage=advantage, kl=kl, kl_coef=KL_COEF, baseline=baseline, **terms
    ).loss
    return total / count


def gradients_JxW(loss_fn, n_samples):
    """Returns the gradient of loss_fn(logits, picks) for each K-tuple, [J, W], and the tuples' probabilities, [J]."""
    picks_JxK = np.array(list(itertools.product(range(len(SUMMARIES)), repeat=n_samples)))
    with jax.enable_x64(True):
        per_tuple = jax.jit(jax.vmap(jax.grad(loss_fn), in_axes=(None, 0)))
        grads_JxPxV = np.asarray(per_tuple(jnp.asarray(LOGITS_PxV), jnp.asarray(picks_JxK)))
    prob_J = np.exp(exact_logp_Z(LOGITS_PxV))[picks_JxK].prod(axis=1)
    return grads_JxPxV.reshape(len(picks_JxK), -1), prob_J


@functools.cache
def estimator_gradients(advantage, kl, n_samples):
    return gradients_JxW(functools.partial(step_loss, advantage=advantage, kl=kl), n_samples)


def expected_gradient_W(loss_fn, n_samples):
    grads_JxW, prob_J = gradients_JxW(loss_fn, n_samples)
    return prob_J @ grads_JxW


@functools.cache
def draw_tuples(n_draws, n_samples):
    """Draws `n_draws` K-tuples token by token from the policy, as a sampler would; returns their indices, [M]."""
    rng = np.random.default_rng(11)
    prob_PxV = np.exp(log_softmax(LOGITS_PxV))
    numbers = {z: number for number, z in enumerate(SUMMARIES)}
    drawn = [() for _ in range(n_draws * n_samples)]
    for uniforms in rng.random((S, len(drawn))):
        for i, z in enumerate(drawn):
            if END not in z:
                drawn[i] = (*z, int(np.searchsorted(np.cumsum(prob_PxV[PREFIXES.index(z)])[:-1], uniforms[i])))
    picks_MxK = np.array([numbers[z] for z in drawn]).reshape(n_draws, n_samples)
    return picks_MxK @ len(SUMMARIES) ** np.arange(n_samples - 1, -1, -1)


def standard_errors_off(grads_JxW, exact_W, n_samples, n_draws=20_000):
    """Returns the distance of a Monte-Carlo mean gradient from `exact_W`, in standard errors, along five directions.

    These are the exact gradient itself, where a wrong sign or scale shows most, and four fixed random ones.
    """
    directions_Wx5 = np.stack([exact_W, *np.random.default_rng(5).normal(size=(4, len(exact_W)))], axis=1)
    samples_Mx5 = grads_JxW[draw_tuples(n_draws, n_samples)] @ directions_Wx5
    error_5 = samples_Mx5.std(axis=0, ddof=1) / np.sqrt(n_draws)
    return np.abs(samples_Mx5.mean(axis=0) - exact_W @ directions_Wx5) / error_5


COMBINATIONS = list(itertools.product(objective.ADVANTAGES, objective.KL_ESTIMATORS))


def test_enumeration_is_a_distribution_and_its_gradients_agree():
    prob_Z = np.exp(exact_logp_Z(LOGITS_PxV))
    np.testing.assert_allclose(prob_Z.sum(), 1.0, rtol=1e-12)
    assert len(SUMMARIES) == 15 and not MASK_ZxS.all()
    np.testing.assert_allclose(gradient_W(exact_reward), (prob_Z * REWARD_Z) @ grad_logp_ZxW(), atol=1e-8)


@pytest.mark.parametrize(
    ("advantage", "kl", "n_samples"),
    [(*names, 3) for names in COMBINATIONS]
    + [("rloo", "exact", 2), ("group_mean", "k1_reward", 2), ("grpo", "k3_loss", 2)],
)
def test_expected_gradient_is_exact(advantage, kl, n_samples):
    grads_JxW, prob_J = estimator_gradients(advantage, kl, n_samples)
    exact_W = exact_gradient_W(advantage, kl, n_samples)
    assert np.linalg.norm(exact_W) > 0.1
    np.testing.assert_allclose(prob_J @ grads_JxW, exact_W, atol=1e-6)


@pytest.mark.parametrize(("advantage", "kl"), COMBINATIONS)
def test_monte_carlo_mean_is_within_three_standard_errors(advantage, kl):
    grads_JxW, _ = estimator_gradients(advantage, kl, 3)
    off_5 = standard_errors_off(grads_JxW, exact_gradient_W(advantage, kl, 3), 3)
    assert off_5.max() < 3.0, off_5


@pytest.mark.parametrize("baseline", [-20.0, 0.0])
def test_reinforce_is_unbiased_with_any_constant_baseline(baseline):
    loss_fn = functools.partial(step_loss, advantage="reinforce", kl="exact", baseline=baseline)
    exact_W = exact_gradient_W("reinforce", "exact", 2)
    np.testing.assert_allclose(expected_gradient_W(loss_fn, 2), exact_W, atol=1e-6)


@pytest.mark.parametrize("n_samples", [2, 3])
def test_group_mean_is_rloo_times_k_minus_one_over_k(n_samples):
    group_JxW, _ = estimator_gradients("group_mean", "k1_reward", n_samples)
    rloo_JxW, _ = estimator_gradients("rloo", "k1_reward", n_samples)
    assert np.abs(rloo_JxW).max() > 0.1
    np.testing.assert_allclose(group_JxW, rloo_JxW * (n_samples - 1) / n_samples, atol=1e-6)


def test_one_summary_per_user_is_enough_for_reinforce():
    loss_fn = functools.partial(step_loss, advantage="reinforce", kl="exact")
    np.testing.assert_allclose(expected_gradient_W(loss_fn, 1), exact_gradient_W("reinforce", "exact", 1), atol=1e-6)


@pytest.mark.parametrize("kl", objective.KL_ESTIMATORS)
def test_measured_kl_is_unbiased_for_the_sequence_kl(kl):
    terms = policy_terms(jnp.asarray(LOGITS_PxV), np.arange(len(SUMMARIES)))
    terms.pop("reward_UxK")
    # One user per summary. All users but one are padding, which isolates each estimate.
    terms_ZxK = {key: jnp.swapaxes(value, 0, 1) for key, value in terms.items()}
    valid_ZxZ = jnp.eye(len(SUMMARIES), dtype=bool)
    total_Z, count_Z = jax.jit(jax.vmap(lambda valid_U: objective.kl_terms(kl, valid_U=valid_U, **terms_ZxK).estimate))(
        valid_ZxZ
    )
    np.testing.assert_array_equal(count_Z, np.ones(len(SUMMARIES)))
    np.testing.assert_allclose(np.exp(exact_logp_Z(LOGITS_PxV)) @ total_Z, exact_kl(LOGITS_PxV), rtol=1e-5)


def test_k1_in_the_loss_has_zero_expected_gradient():
    """The mistake that k1_reward avoids: E grad sum_t (log q - log q_0) = E grad log q = 0 for every q_0."""

    def k1_in_the_loss(logits_PxV, picks_K):
        terms = policy_terms(logits_PxV, picks_K)
        return objective.total_logp(terms["logp_UxKxS"] - terms["ref_logp_UxKxS"], terms["mask_UxKxS"]).mean()

    assert np.linalg.norm(gradient_W(exact_kl)) > 0.1
    # The tolerance allows for float32 accumulation in total_logp.
    np.testing.assert_allclose(expected_gradient_W(k1_in_the_loss, 1), np.zeros(LOGITS_PxV.size), atol=1e-6)


def test_k3_gradient_differs_from_the_exact_one_but_points_the_same_way():
    true_W, k3_W = gradient_W(exact_kl), gradient_W(forward_kl_on_fixed_prefixes)
    assert np.linalg.norm(true_W - k3_W) > 0.1 * np.linalg.norm(true_W)
    assert true_W @ k3_W > 0.5 * np.linalg.norm(true_W) * np.linalg.norm(k3_W)


def test_reward_baseline_lowers_the_variance():
    def total_variance(grads_JxW, prob_J):
        return prob_J @ np.sum(grads_JxW**2, axis=1) - np.sum((prob_J @ grads_JxW) ** 2)

    no_baseline = functools.partial(step_loss, advantage="reinforce", kl="exact", baseline=0.0)
    rloo = total_variance(*estimator_gradients("rloo", "exact", 3))
    assert rloo < 0.2 * total_variance(*gradients_JxW(no_baseline, 3))


def test_kl_baseline_lowers_the_variance_of_long_summaries(monkeypatch):
    """Markov chains of length 24 over 8 tokens, 4 summaries per user. At length 3 the baseline would not help."""
    n_tokens, length, n_users, n_samples = 8, 24, 500, 4
    rng = np.random.default_rng(3)
    logits_VxV = rng.normal(size=(n_tokens, n_tokens))
    ref_logits_VxV = logits_VxV + 0.5 * rng.normal(size=(n_tokens, n_tokens))
    chain_UxKxS1 = np.zeros((n_users, n_samples, length + 1), int)
    for t in range(length):
        gumbel = rng.gumbel(size=(n_users, n_samples, n_tokens))
        chain_UxKxS1[..., t + 1] = np.argmax(logits_VxV[chain_UxKxS1[..., t]] + gumbel, axis=-1)

    def user_loss(logits_VxV, chain_KxS1):
        logp_VxV, ref_VxV = jax.nn.log_softmax(logits_VxV), jax.nn.log_softmax(jnp.asarray(ref_logits_VxV))
        kl_V = jnp.sum(jnp.exp(logp_VxV) * (logp_VxV - ref_VxV), axis=-1)
        last, token = chain_KxS1[None, :, :-1], chain_KxS1[None, :, 1:]
        total, count = objective.kl_terms(
            "exact", logp_VxV[last, token], ref_VxV[last, token], jnp.ones(token.shape, bool), kl_V[last]
        ).loss
        return total / count

    def total_variance():
        # A new function each time: otherwise jit would reuse the first call's program for the second.
        per_user = jax.jit(jax.vmap(jax.grad(lambda logits, chain: user_loss(logits, chain)), in_axes=(None, 0)))
        return float(jnp.sum(jnp.var(per_user(jnp.asarray(logits_VxV), jnp.asarray(chain_UxKxS1)), axis=0)))

    with_baseline = total_variance()
    monkeypatch.setattr(objective, "_mean_of_others", jnp.zeros_like)
    assert with_baseline < 0.5 * total_variance()


# Mutations: faults that these tests must detect. Both the exact and the Monte-Carlo test detect each of them.


def _mean_with_own(values_UxK):
    return jnp.broadcast_to(jnp.mean(values_UxK, axis=1, keepdims=True), values_UxK.shape)


def _wrong_sign_of_the_score_function(original):
    def mutant(sum_logp_UxK, advantage_UxK, valid_U=None):
        total, count = original(sum_logp_UxK, advantage_UxK, valid_U)
        return -total, count

    return mutant


def _sum_over_k(original):
    def mutant(sum_logp_UxK, advantage_UxK, valid_U=None):
        total, count = original(sum_logp_UxK, advantage_UxK, valid_U)
        return total * sum_logp_UxK.shape[1], count

    return mutant


def _baseline_after_its_update(original):
    def mutant(name, reward_UxK, baseline, valid_U=None):
        reward = objective.weighted_total(reward_UxK, jnp.ones(reward_UxK.shape))
        updated = objective.update_baseline(jnp.asarray(baseline), reward, decay=0.5)
        return original(name, reward_UxK, updated, valid_U)

    return mutant


def _wrong_sign_of_the_penalty(original):
    def mutant(*args):
        terms = original(*args)
        return terms._replace(penalty_UxK=-terms.penalty_UxK)

    return mutant


def _k1_in_the_loss(original):
    def mutant(name, logp_UxKxS, ref_logp_UxKxS, mask_UxKxS, *args):
        terms = original(name, logp_UxKxS, ref_logp_UxKxS, mask_UxKxS, *args)
        ratio_UxK = objective.total_logp(logp_UxKxS - ref_logp_UxKxS, mask_UxKxS)
        return terms._replace(penalty_UxK=0.0 * terms.penalty_UxK, loss=(ratio_UxK.sum(), terms.loss[1]))

    return mutant


def _kl_without_the_score_function(original):
    return lambda kl_UxKxS, logp_UxKxS, mask_UxKxS: jnp.sum(kl_UxKxS, axis=-1)


def _kl_to_go_of_the_wrong_sign(original):
    def mutant(kl_UxKxS, logp_UxKxS, mask_UxKxS):
        return original(kl_UxKxS, -logp_UxKxS, mask_UxKxS)

    return mutant


def _kl_so_far_in_place_of_to_go(original):
    def mutant(kl_UxKxS, logp_UxKxS, mask_UxKxS):
        so_far_UxKxS = jax.lax.stop_gradient(jnp.cumsum(kl_UxKxS, axis=-1))
        return jnp.sum(kl_UxKxS + jnp.where(mask_UxKxS, logp_UxKxS * so_far_UxKxS, 0.0), axis=-1)

    return mutant


def _kl_of_the_wrong_direction(original):
    def mutant(name, logp_UxKxS, ref_logp_UxKxS, mask_UxKxS, *args):
        swapped_UxKxS = 2 * logp_UxKxS - ref_logp_UxKxS  # log q minus this is the negated log-ratio.
        return original(name, logp_UxKxS, jax.lax.stop_gradient(swapped_UxKxS), mask_UxKxS, *args)

    return mutant


def _mask_forgotten(original):
    def mutant(name, logp_UxKxS, ref_logp_UxKxS, mask_UxKxS, *args):
        return original(name, logp_UxKxS, ref_logp_UxKxS, jnp.ones_like(mask_UxKxS), *args)

    return mutant


MUTATIONS = [
    ("rloo", "exact", "_mean_of_others", lambda original: _mean_with_own),
    ("rloo", "k1_reward", "_mean_of_others", lambda original: lambda values_UxK: values_UxK / 2),
    ("rloo", "k1_reward", "score_function_loss", _wrong_sign_of_the_score_function),
    ("grpo", "k3_loss", "score_function_loss", _wrong_sign_of_the_score_function),
    ("rloo", "exact", "score_function_loss", _sum_over_k),
    ("reinforce", "exact", "advantages", _baseline_after_its_update),
    ("rloo", "k1_reward", "kl_terms", _wrong_sign_of_the_penalty),
    ("rloo", "k1_reward", "kl_terms", _k1_in_the_loss),
    ("rloo", "exact", "_exact_kl_loss", _kl_without_the_score_function),
    ("rloo", "exact", "_exact_kl_loss", _kl_to_go_of_the_wrong_sign),
    ("rloo", "exact", "_exact_kl_loss", _kl_so_far_in_place_of_to_go),
    ("rloo", "k3_loss", "kl_terms", _kl_of_the_wrong_direction),
    ("rloo", "exact", "kl_terms", _mask_forgotten),
    ("rloo", "k1_reward", "kl_terms", _mask_forgotten),
    ("rloo", "k3_loss", "kl_terms", _mask_forgotten),
]


@pytest.mark.parametrize(("advantage", "kl", "attribute", "mutate"), MUTATIONS)
def test_faults_are_detected(monkeypatch, advantage, kl, attribute, mutate):
    monkeypatch.setattr(objective, attribute, mutate(getattr(objective, attribute)))
    grads_JxW, prob_J = gradients_JxW(functools.partial(step_loss, advantage=advantage, kl=kl), 3)
    exact_W = exact_gradient_W(advantage, kl, 3)
    assert np.abs(prob_J @ grads_JxW - exact_W).max() > 0.01
    assert standard_errors_off(grads_JxW, exact_W, 3).max() > 5.0
