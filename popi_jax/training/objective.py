"""POPI's preference losses, advantages and KL estimators. They take arrays and return arrays or (sum, count) pairs.

The objective of POPI (arXiv 2510.17881), with our own equation numbers. s is a user's signals, z a summary, x a prompt,
y+ the chosen response and y- the rejected one:

    (1) h(x, z) = [log pi(y+|x,z) - log pi_ref(y+|x)] - [log pi(y-|x,z) - log pi_ref(y-|x)]
    (2) J(theta, phi) = E_s E_{z ~ q_phi(.|s)} mean_m l(h(x_m, z)) + lambda * E_s KL(q_phi(.|s) || q_0(.|s))
    (3) grad_phi J = - E_s E_{z_1..z_K} (1/K) sum_k A_k grad log q_phi(z_k|s) + lambda * grad_phi KL,
        with A_k an advantage of the reward r_k = - mean_m l(h(x_m, z_k))

Legend: U users, K summaries per user, S summary length; x any shape (of examples), x2 the two responses y+ and y-.

A term summed over examples is a (sum, count) pair. Add up both over micro-batches and devices, then divide once.
The inference model's terms count each summary of a valid user once. Their mean over U and K is the expectation in (2),
so lambda means the same for every K.
Summaries are scored under the distribution that they were sampled from. Both q and q_0 are taken at the sampling
temperature, without truncation (top_p = 1). The end token counts; what follows it is masked.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LossFn = Callable[[jax.Array, float], jax.Array]
SumCount = tuple[jax.Array, jax.Array]

ADVANTAGES = ("rloo", "reinforce", "group_mean", "grpo")
KL_ESTIMATORS = ("exact", "k1_reward", "k3_loss")
LOGP_REDUCTIONS = ("sum", "mean")

# Keeps grpo's quotient finite where a user's rewards are all equal. Their advantages are then close to 0, but not
# always exactly 0: the float32 mean of K equal rewards r may be off by (K + 1) |r| / 2^24, and this epsilon divides
# that error. With r = -log(2) / 0.1 the advantage stays within 0.021 at K = 4 and 0.071 at K = 16. At K = 2 it is 0.
GRPO_EPSILON = 1e-4


# Sums and reductions.


def weighted_total(values: jax.Array, weight: jax.Array) -> SumCount:
    """Returns (weighted sum of the values, sum of the weights). Both arrays have the same shape; a mask is a weight.

    A value of weight 0 adds nothing, even if it is NaN.
    """
    weight = weight.astype(jnp.float32)
    return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight), jnp.sum(weight)


def total_logp(logp_xS: jax.Array, mask_xS: jax.Array) -> jax.Array:
    """Sums the log-probabilities of unmasked tokens, [..., S], over the last axis, in float32."""
    return jnp.sum(jnp.where(mask_xS, logp_xS.astype(jnp.float32), 0.0), axis=-1)


def reduce_logp(logp_x: jax.Array, length_x: jax.Array, reduction: str) -> jax.Array:
    """Returns the log-probability of each response that h is made of, [...], in nats.

    Args:
        logp_x: log-probability of each response, summed over its tokens, including the end token.
        length_x: number of those tokens.
        reduction: "sum" gives log pi(y|x), as in POPI, DPO and IPO; "mean" divides it by the number of tokens.

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction not in LOGP_REDUCTIONS:
        raise ValueError(f"logp_reduction is {reduction!r}; it must be one of {LOGP_REDUCTIONS}")
    return logp_x if reduction == "sum" else logp_x / jnp.maximum(length_x, 1)


# The generator's objective.


def implicit_reward_margin(policy_logp_x2: jax.Array, ref_logp_x2: jax.Array) -> jax.Array:
    """Returns h of (1), [...], in nats. Both arguments are [..., 2]: the chosen response, then the rejected one."""
    ratio_x2 = policy_logp_x2 - ref_logp_x2
    return ratio_x2[..., 0] - ratio_x2[..., 1]


def dpo_loss(h: jax.Array, beta: float) -> jax.Array:
    """-log sigmoid(beta h) / beta, elementwise: DPO (Rafailov et al. 2023, eq. 7) / beta. Slope -1/2 at h = 0."""
    return preference_nats(h, beta) / beta


def ipo_loss(h: jax.Array, beta: float) -> jax.Array:
    """(h - 1/(2 beta))^2 beta / 2, elementwise: IPO (Azar et al. 2023, eq. 17) * beta / 2. Slope -1/2 at h = 0."""
    return 0.5 * beta * (h - 0.5 / beta) ** 2


LOSSES: dict[str, LossFn] = {"dpo": dpo_loss, "ipo": ipo_loss}


def preference_loss(name: str) -> LossFn:
    """Returns the elementwise loss l(h, beta) with this name in the config.

    Raises:
        ValueError: an unknown name.
    """
    if name not in LOSSES:
        raise ValueError(f"loss is {name!r}; it must be one of {tuple(LOSSES)}")
    return LOSSES[name]


def preference_nats(h: jax.Array, beta: float) -> jax.Array:
    """-log sigmoid(beta h), elementwise: the label's negative log-likelihood under Bradley-Terry, in nats."""
    return -jax.nn.log_sigmoid(beta * h)


def preference_accuracy(h: jax.Array) -> jax.Array:
    """1.0 where the chosen response has the strictly greater implicit reward, elementwise. A tie counts as wrong."""
    return (h > 0).astype(jnp.float32)


# The inference model's objective: the score function.


def advantages(
    name: str, reward_UxK: jax.Array, baseline: jax.Array | float, valid_U: jax.Array | None = None
) -> jax.Array:
    """Returns A_UxK of (3). No gradient flows through it. Padding gets 0.

    "rloo": A_k = r_k - mean_{j != k} r_j (Kool et al. 2019; Ahmadian et al. 2024). Unbiased: the equality in (3) holds.
    "reinforce": A_k = r_k - baseline (Williams 1992). Unbiased if the baseline comes from earlier steps; see
    `update_baseline`.
    "group_mean": A_k = r_k - mean_j r_j, own sample included. It is (K - 1)/K of rloo, and so is its expected gradient.
    "grpo": group_mean / (std + 1e-4), where std has K - 1 in its denominator (Shao et al. 2024). This is not the
    gradient of (2): each user's part is rescaled by the spread of that user's rewards.

    Args:
        name: one of ADVANTAGES. All but "reinforce" compare a user's summaries with each other and need K >= 2.
        reward_UxK: r_k; greater is better. With k1_reward, lambda times the penalty is already subtracted.
        baseline: scalar. Only "reinforce" uses it.
        valid_U: bool, False for padding. None means that every row is a user.

    Raises:
        ValueError: an unknown name, or K < 2 for an advantage that compares summaries.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"advantage is {name!r}; it must be one of {ADVANTAGES}")
    n_samples = reward_UxK.shape[1]
    if name != "reinforce" and n_samples < 2:
        raise ValueError(f"advantage {name!r} compares the summaries of a user and needs K >= 2, got K = {n_samples}")
    reward_UxK = jax.lax.stop_gradient(reward_UxK)
    if name == "reinforce":
        advantage_UxK = reward_UxK - baseline
    elif name == "rloo":
        advantage_UxK = reward_UxK - _mean_of_others(reward_UxK)
    else:
        advantage_UxK = reward_UxK - jnp.mean(reward_UxK, axis=1, keepdims=True)
        if name == "grpo":
            advantage_UxK = advantage_UxK / (jnp.std(reward_UxK, axis=1, ddof=1, keepdims=True) + GRPO_EPSILON)
    return jnp.where(_valid_UxK(reward_UxK, valid_U), advantage_UxK, 0.0)


def update_baseline(baseline: jax.Array, reward: SumCount, decay: float) -> jax.Array:
    """Returns the moving average of rewards: the baseline of "reinforce" in the NEXT step.

    Compute this step's advantages with the old baseline. A baseline that already contains this step's samples
    correlates with them and biases the gradient. A step without a valid user leaves the baseline unchanged.
    """
    reward_sum, count = jax.lax.stop_gradient(reward)
    moved = decay * baseline + (1.0 - decay) * reward_sum / jnp.maximum(count, 1.0)
    return jnp.where(count > 0, moved, baseline)


def score_function_loss(
    sum_logp_UxK: jax.Array, advantage_UxK: jax.Array, valid_U: jax.Array | None = None
) -> SumCount:
    """Returns the surrogate for the first term of (3). Only its gradient has a meaning; its value has none.

    sum / count = - mean over users and over K of A_k log q(z_k|s). Section 3 of POPI sums over k. Each of the K terms
    alone is already unbiased for the gradient of (2), so (3) takes their mean and lambda means the same for every K.

    Args:
        sum_logp_UxK: log q(z_k|s), differentiable. Always summed over tokens, whatever logp_reduction is.
        advantage_UxK: A_k. No gradient flows through it.
        valid_U: bool, False for padding. None means that every row is a user.
    """
    return weighted_total(-jax.lax.stop_gradient(advantage_UxK) * sum_logp_UxK, _valid_UxK(sum_logp_UxK, valid_U))


# The warm start of the inference model.


def best_of_k(reward_UxK: jax.Array, valid_U: jax.Array, least: float) -> jax.Array:
    """Returns 1 for the best of each user's K summaries and 0 for the others, [U, K].

    A user whose summaries are all equally good has none to imitate, nor has one whose best is not above `least`.
    """
    best_U = jnp.max(reward_UxK, axis=1)
    chosen_UxK = jax.nn.one_hot(jnp.argmax(reward_UxK, axis=1), reward_UxK.shape[1])
    tells_U = valid_U & (best_U > jnp.min(reward_UxK, axis=1)) & (best_U > least)
    return jnp.where(tells_U[:, None], chosen_UxK, 0.0)


def imitation_loss(sum_logp_UxK: jax.Array, weight_UxK: jax.Array) -> SumCount:
    """Returns the negative log-likelihood of the texts to imitate, in nats, as (weighted sum, sum of the weights).

    With the weights of `best_of_k` it is a step of expert iteration (Anthony et al. 2017). That is not the gradient of
    (2): the chosen summary counts alike however much better it is. So it serves as a start.
    """
    return weighted_total(-sum_logp_UxK, weight_UxK)


# How far the rewards tell one summary from another.


def reward_variance(loss_UxKxM: jax.Array, real_UxM: jax.Array) -> tuple[SumCount, SumCount]:
    """Returns the variance of the rewards r_k of a user's K summaries, and the part of it that is noise of M queries.

    Query m may favour summary k for reasons of its own: l_km = a_k + b_m + e_km. The rewards' variance estimates that
    of a_k plus var(e) / M. The residuals of the two-way table estimate the latter (analysis of variance), so that
    1 - noise / variance is the share that is due to the summaries. Both have K - 1 in the denominator. They are over
    the users with two or more queries, without which there are no residuals.

    Args:
        loss_UxKxM: l(h(x_m, z_k)).
        real_UxM: False for padding.
    """
    K = loss_UxKxM.shape[1]
    real_UxKxM = jnp.broadcast_to(real_UxM[:, None], loss_UxKxM.shape)
    queries_U = jnp.sum(real_UxM, axis=-1)
    loss_UxKxM = jnp.where(real_UxKxM, loss_UxKxM, 0.0)
    reward_UxK = -jnp.sum(loss_UxKxM, axis=-1) / jnp.maximum(queries_U, 1)[:, None]
    counts_U = queries_U > 1
    mean_U = jnp.mean(reward_UxK, axis=1)
    variance_U = jnp.sum((reward_UxK - mean_U[:, None]) ** 2, axis=1) / max(K - 1, 1)
    of_query_UxM = jnp.mean(loss_UxKxM, axis=1)
    rest_UxKxM = loss_UxKxM + reward_UxK[:, :, None] - of_query_UxM[:, None] - mean_U[:, None, None]
    freedom_U = max(K - 1, 1) * jnp.maximum(queries_U - 1, 1)
    noise_U = jnp.sum(jnp.where(real_UxKxM, rest_UxKxM, 0.0) ** 2, axis=(1, 2)) / freedom_U / jnp.maximum(queries_U, 1)
    return weighted_total(variance_U, counts_U), weighted_total(noise_U, counts_U)


# KL(q_phi || q_0) by name.


class KLTerms(NamedTuple):
    """The terms that a KL estimator adds to a step. Use all three for every estimator: a term that it lacks is zero."""

    penalty_UxK: jax.Array  # Subtract lambda times this from the reward before computing advantages. No gradient.
    loss: SumCount  # Add lambda times this to the loss. Differentiable.
    estimate: SumCount  # The estimated sequence KL, in nats per summary, for the log. No gradient.


def kl_terms(
    name: str,
    logp_UxKxS: jax.Array,
    ref_logp_UxKxS: jax.Array,
    mask_UxKxS: jax.Array,
    position_kl_UxKxS: jax.Array | None = None,
    valid_U: jax.Array | None = None,
) -> KLTerms:
    """Returns the terms of the KL estimator `name`. They are per sequence: summed over S, never averaged.

    "exact": sum_t KL_t + log q(z_t|z_<t) * stop_grad(KL-to-go strictly after t - baseline), where KL_t is the
    full-vocabulary KL at t. The first part differentiates the choice of token t, the second the choice of the prefix.
    Together they are unbiased for grad KL. The baseline is the mean KL-to-go at t over the user's other summaries. It
    is independent of this summary, so the estimate stays unbiased. (Variance with the baseline, as a share of that
    without it, measured with K = 4 on Markov chains: 0.56 at 12 tokens, 0.31 at 17, 0.20 at 37.)

    "k1_reward": sum_t log q - log q_0, a penalty on the reward. The score function makes it unbiased for grad KL.
    (The same term in the loss would have the expected gradient E[grad log q] = 0 and would control nothing.)

    "k3_loss": sum_t exp(d) - d - 1 with d = log q_0 - log q, differentiated. Its value is unbiased for KL(q||q_0). Its
    expected gradient is E_{z ~ q} sum_t grad KL(q_0(.|z_<t) || q(.|z_<t)), the forward KL, with the prefixes z_<t drawn
    from q and held fixed. It pulls q towards q_0, but is not the gradient of (2).

    The logged estimate is sum_t KL_t for "exact", k1 for "k1_reward" and k3 for "k3_loss". All three are unbiased for
    the sequence KL; sum_t KL_t has the least variance.

    Args:
        name: one of KL_ESTIMATORS.
        logp_UxKxS: log q(z_t|z_<t, s) of the sampled tokens. Differentiable.
        ref_logp_UxKxS: the same under q_0.
        mask_UxKxS: bool, True for sampled tokens, including the end token.
        position_kl_UxKxS: sum_v q(v) (log q(v) - log q_0(v)) at each position. Differentiable. Only "exact" uses it.
        valid_U: bool, False for padding. None means that every row is a user.

    Raises:
        ValueError: an unknown name, or "exact" without position_kl_UxKxS.
    """
    if name not in KL_ESTIMATORS:
        raise ValueError(f"kl is {name!r}; it must be one of {KL_ESTIMATORS}")
    # Mask before any arithmetic: exp() of values in the padding could overflow and turn the gradient into NaN.
    log_ratio_UxKxS = jnp.where(mask_UxKxS, logp_UxKxS - jax.lax.stop_gradient(ref_logp_UxKxS), 0.0)
    zeros_UxK = jnp.zeros(mask_UxKxS.shape[:2], jnp.float32)
    valid_UxK = _valid_UxK(zeros_UxK, valid_U)
    penalty_UxK = loss_UxK = zeros_UxK
    if name == "exact":
        if position_kl_UxKxS is None:
            raise ValueError("kl 'exact' needs position_kl_UxKxS, the full-vocabulary KL at each position")
        kl_UxKxS = jnp.where(mask_UxKxS, position_kl_UxKxS, 0.0)
        loss_UxK = _exact_kl_loss(kl_UxKxS, logp_UxKxS, mask_UxKxS)
        estimate_UxK = jnp.sum(kl_UxKxS, axis=-1)
    elif name == "k1_reward":
        estimate_UxK = jnp.sum(log_ratio_UxKxS, axis=-1)
        penalty_UxK = jnp.where(valid_UxK, jax.lax.stop_gradient(estimate_UxK), 0.0)
    else:
        loss_UxK = estimate_UxK = jnp.sum(jnp.expm1(-log_ratio_UxKxS) + log_ratio_UxKxS, axis=-1)
    return KLTerms(
        penalty_UxK, weighted_total(loss_UxK, valid_UxK), weighted_total(jax.lax.stop_gradient(estimate_UxK), valid_UxK)
    )


def _exact_kl_loss(kl_UxKxS: jax.Array, logp_UxKxS: jax.Array, mask_UxKxS: jax.Array) -> jax.Array:
    """Returns the surrogate whose gradient is that of the sequence KL, [U, K]; see `kl_terms`."""
    constant_kl_UxKxS = jax.lax.stop_gradient(kl_UxKxS)
    # Strictly after t: KL_t and the KL before it do not depend on z_t, and would only add variance.
    to_go_UxKxS = jnp.cumsum(constant_kl_UxKxS[..., ::-1], axis=-1)[..., ::-1] - constant_kl_UxKxS
    coefficient_UxKxS = to_go_UxKxS
    if kl_UxKxS.shape[1] > 1:
        coefficient_UxKxS = to_go_UxKxS - _mean_of_others(to_go_UxKxS)
    score_UxKxS = jnp.where(mask_UxKxS, logp_UxKxS * coefficient_UxKxS, 0.0)
    return jnp.sum(kl_UxKxS + score_UxKxS, axis=-1)


# The inference model's whole loss.


class InferenceLoss(NamedTuple):
    """The result of `inference_loss`."""

    loss: SumCount  # The surrogate: the gradient of sum / count is (3).
    penalised_UxK: jax.Array  # The reward less the KL penalty, which the advantages are computed from.
    kl: SumCount  # The estimated sequence KL, in nats per summary, for the log.


def inference_loss(
    *,
    advantage: str,
    kl: str,
    kl_coef: float | jax.Array,
    reward_UxK: jax.Array,
    baseline: jax.Array | float,
    logp_UxKxS: jax.Array,
    ref_logp_UxKxS: jax.Array,
    mask_UxKxS: jax.Array,
    position_kl_UxKxS: jax.Array | None = None,
    valid_U: jax.Array | None = None,
) -> InferenceLoss:
    """Returns the loss whose gradient is (3): penalised rewards, their advantages, the score function and the KL.

    Args:
        advantage: one of ADVANTAGES.
        kl: one of KL_ESTIMATORS.
        kl_coef: lambda, in the unit of the reward per nat of KL.
        reward_UxK: r_k = - mean_m l(h(x_m, z_k)), in nats / beta. No gradient flows through it.
        baseline: scalar, from earlier steps. Only "reinforce" uses it.
        logp_UxKxS: see `kl_terms`, also for the arguments below.
        ref_logp_UxKxS: no gradient flows through it.
        mask_UxKxS: bool.
        position_kl_UxKxS: only "exact" uses it.
        valid_U: bool.

    Raises:
        ValueError: see `advantages` and `kl_terms`.
    """
    terms = kl_terms(kl, logp_UxKxS, ref_logp_UxKxS, mask_UxKxS, position_kl_UxKxS, valid_U)
    penalised_UxK = jax.lax.stop_gradient(reward_UxK) - kl_coef * terms.penalty_UxK
    advantage_UxK = advantages(advantage, penalised_UxK, baseline, valid_U)
    score_sum, count = score_function_loss(total_logp(logp_UxKxS, mask_UxKxS), advantage_UxK, valid_U)
    return InferenceLoss((score_sum + kl_coef * terms.loss[0], count), penalised_UxK, terms.estimate)


def _mean_of_others(values_UxK: jax.Array) -> jax.Array:
    """Returns, for each k, the mean over all j != k along axis 1."""
    total_Ux1 = jnp.sum(values_UxK, axis=1, keepdims=True)
    return (total_Ux1 - values_UxK) / (values_UxK.shape[1] - 1)


def _valid_UxK(values_UxK: jax.Array, valid_U: jax.Array | None) -> jax.Array:
    """Returns whether each summary belongs to a valid user, [U, K]."""
    if valid_U is None:
        return jnp.ones(values_UxK.shape, bool)
    return jnp.broadcast_to(valid_U.astype(bool)[:, None], values_UxK.shape)
