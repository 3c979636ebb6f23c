"""Preference losses, advantages and KL estimators of POPI: arrays in, (sum, count) or elementwise out.

POPI (arXiv 2510.17881), in equations numbered here; s are a user's signals, z a summary, x a prompt, y+ and y- answers:

    (1) h(x, z) = [log pi(y+|x,z) - log pi_ref(y+|x)] - [log pi(y-|x,z) - log pi_ref(y-|x)]
    (2) J(theta, phi) = E_s E_{z ~ q_phi(.|s)} mean_m l(h(x_m, z)) + lambda * E_s KL(q_phi(.|s) || q_0(.|s))
    (3) grad_phi J = - E_s E_{z_1..z_K} (1/K) sum_k A_k grad log q_phi(z_k|s) + lambda * grad_phi KL,
        with A_k an advantage of the reward r_k = - mean_m l(h(x_m, z_k))

Legend: U users, K summaries per user, S summary length; x any shape (of examples), x2 the two responses y+ and y-.

A term that is summed over examples comes as (sum, count): add both over micro-batches and devices, divide once. Every
term of the inference model counts one per summary of a valid user: its mean over U and K is the expectation in (2), and
lambda keeps its meaning whatever K is.
Log-probabilities of summaries are of the distribution sampled from: both q and q_0 at the sampling temperature,
untruncated (top_p = 1), the end token included and what follows it masked.
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

# Keeps grpo's quotient finite where all of a user's rewards are equal; the advantage is then 0 / 1e-4.
GRPO_EPSILON = 1e-4


# Sums and reductions.


def weighted_total(values: jax.Array, weight: jax.Array) -> SumCount:
    """Returns (weighted sum of values, sum of the weights); a mask is weights of 0 and 1. The two shapes are equal.

    What has no weight cannot leak, not even as NaN.
    """
    weight = weight.astype(jnp.float32)
    return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight), jnp.sum(weight)


def total_logp(logp_xS: jax.Array, mask_xS: jax.Array) -> jax.Array:
    """Sums the log-probabilities of the tokens that count, [..., S], over the last axis, in float32."""
    return jnp.sum(jnp.where(mask_xS, logp_xS.astype(jnp.float32), 0.0), axis=-1)


def reduce_logp(logp_x: jax.Array, length_x: jax.Array, reduction: str) -> jax.Array:
    """Makes log pi(y|x) of responses' summed log-probabilities, [...], in nats.

    Args:
        logp_x: log-probability of each response, summed over its tokens, the end token among them.
        length_x: how many tokens those are.
        reduction: "sum" is log pi(y|x), as POPI, DPO and IPO define h; "mean" divides by the number of tokens.
    """
    if reduction not in LOGP_REDUCTIONS:
        raise ValueError(f"logp_reduction is {reduction!r}; it must be one of {LOGP_REDUCTIONS}")
    return logp_x if reduction == "sum" else logp_x / jnp.maximum(length_x, 1)


# The generator's objective.


def implicit_reward_margin(policy_logp_x2: jax.Array, ref_logp_x2: jax.Array) -> jax.Array:
    """Returns h of (1), [...]: the two arguments are [..., 2], index 0 the chosen answer, index 1 the rejected."""
    ratio_x2 = policy_logp_x2 - ref_logp_x2
    return ratio_x2[..., 0] - ratio_x2[..., 1]


def dpo_loss(h: jax.Array, beta: float) -> jax.Array:
    """-log sigmoid(beta h) / beta, elementwise: DPO (Rafailov et al. 2023, eq. 7) over beta; slope -1/2 at h = 0."""
    return preference_nats(h, beta) / beta


def ipo_loss(h: jax.Array, beta: float) -> jax.Array:
    """(h - 1/(2 beta))^2 beta / 2, elementwise: IPO (Azar et al. 2023, eq. 17) times beta/2; slope -1/2 at h = 0."""
    return 0.5 * beta * (h - 0.5 / beta) ** 2


LOSSES: dict[str, LossFn] = {"dpo": dpo_loss, "ipo": ipo_loss}


def preference_loss(name: str) -> LossFn:
    """Returns l(h, beta), elementwise, by its name in the config."""
    if name not in LOSSES:
        raise ValueError(f"loss is {name!r}; it must be one of {tuple(LOSSES)}")
    return LOSSES[name]


def preference_nats(h: jax.Array, beta: float) -> jax.Array:
    """-log sigmoid(beta h), elementwise: nats that the observed label costs under Bradley-Terry with utility beta h."""
    return -jax.nn.log_sigmoid(beta * h)


def preference_accuracy(h: jax.Array) -> jax.Array:
    """1.0 where the chosen answer's implicit reward is strictly the greater, elementwise; a tie is an error."""
    return (h > 0).astype(jnp.float32)


# The inference model's objective: the score function.


def advantages(
    name: str, reward_UxK: jax.Array, baseline: jax.Array | float, valid_U: jax.Array | None = None
) -> jax.Array:
    """Returns A_UxK of (3), a constant to the gradient, 0 for users that are padding.

    "rloo" A_k = r_k - mean_{j != k} r_j (Kool et al. 2019; Ahmadian et al. 2024). Unbiased: the equality in (3) holds.
    "reinforce" A_k = r_k - baseline (Williams 1992). Unbiased if the baseline is of earlier steps: `update_baseline`.
    "group_mean" A_k = r_k - mean_j r_j, own sample included: (K - 1)/K of rloo, and so is the expected gradient.
    "grpo" group_mean over (std + 1e-4), std with K - 1 in its denominator (Shao et al. 2024). Not the gradient of (2):
    each user's part is rescaled by the spread of that user's own rewards.

    Args:
        name: one of ADVANTAGES. All but "reinforce" compare a user's summaries with each other and need K >= 2.
        reward_UxK: r_k, greater is better; with k1_reward, after lambda times the penalty was subtracted.
        baseline: scalar, read by "reinforce" alone.
        valid_U: bool, False for padding; None if all are users.

    Raises:
        ValueError: an unknown name, or K < 2 where summaries are compared.
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
    """Returns the moving average of the rewards that the NEXT step's "reinforce" may use as its baseline.

    A baseline that has seen the samples it is subtracted from correlates with them and biases the gradient: compute
    this step's advantages with the old one. A step without a valid user leaves it as it is.
    """
    reward_sum, count = jax.lax.stop_gradient(reward)
    moved = decay * baseline + (1.0 - decay) * reward_sum / jnp.maximum(count, 1.0)
    return jnp.where(count > 0, moved, baseline)


def score_function_loss(
    sum_logp_UxK: jax.Array, advantage_UxK: jax.Array, valid_U: jax.Array | None = None
) -> SumCount:
    """Surrogate of the first term of (3): its gradient means something, its value does not.

    sum / count = - mean over users and over K of A_k log q(z_k|s). POPI section 3 writes the sum over k; each of its K
    terms alone is unbiased for the gradient of (2), so it is their mean that (3) and lambda call for.

    Args:
        sum_logp_UxK: log q(z_k|s), differentiable, summed over tokens whatever logp_reduction is.
        advantage_UxK: A_k, a constant here.
        valid_U: bool, False for padding; None if all are users.
    """
    return weighted_total(-jax.lax.stop_gradient(advantage_UxK) * sum_logp_UxK, _valid_UxK(sum_logp_UxK, valid_U))


# KL(q_phi || q_0) by name.


class KLTerms(NamedTuple):
    """What a KL estimator adds to a step. Use all three whatever its name is: the parts that it lacks are zeros."""

    penalty_UxK: jax.Array  # Subtract lambda times this from the reward, before the advantages. No gradient.
    loss: SumCount  # Add lambda times this to the loss; differentiable.
    estimate: SumCount  # The measured sequence KL, in nats per summary: for the log. No gradient.


def kl_terms(
    name: str,
    logp_UxKxS: jax.Array,
    ref_logp_UxKxS: jax.Array,
    mask_UxKxS: jax.Array,
    position_kl_UxKxS: jax.Array | None = None,
    valid_U: jax.Array | None = None,
) -> KLTerms:
    """Returns the terms of the KL estimator `name`, per sequence: summed over S, never averaged.

    "exact": sum_t KL_t + log q(z_t|z_<t) * stop_grad(KL-to-go strictly after t - baseline), KL_t the full-vocabulary
    KL at t. The first part differentiates the choice of token t, the second that of the prefix. Unbiased for grad KL.
    The baseline is the mean KL-to-go at t of the user's other summaries: independent of this one, so still unbiased
    (measured with K = 4 on Markov chains: 0.56 of the variance at 12 tokens, 0.31 at 17, 0.20 at 37).

    "k1_reward": sum_t log q - log q_0, a penalty on the reward; the score function makes it unbiased for grad KL. (The
    same term differentiated in the loss has expected gradient E[grad log q] = 0: no control at all.)

    "k3_loss": sum_t exp(d) - d - 1, d = log q_0 - log q, differentiated. Its value is unbiased for KL(q||q_0), but its
    expected gradient is E_{z ~ q} sum_t grad KL(q_0(.|z_<t) || q(.|z_<t)): the forward KL, the prefixes z_<t drawn from
    q and held fixed. It pulls q towards q_0; it is not the gradient of (2).

    The estimate is sum_t KL_t, k1 and k3 in turn, each unbiased for the sequence KL; the first has the least variance.

    Args:
        logp_UxKxS: log q(z_t|z_<t, s) of the sampled tokens; differentiable.
        ref_logp_UxKxS: the same under q_0.
        mask_UxKxS: bool, True for sampled tokens, the end token included.
        position_kl_UxKxS: sum_v q(v) (log q(v) - log q_0(v)) at each position; differentiable; for "exact" alone.
        valid_U: bool, False for users that are padding; None if all are users.
    """
    if name not in KL_ESTIMATORS:
        raise ValueError(f"kl is {name!r}; it must be one of {KL_ESTIMATORS}")
    # Cleared before any arithmetic: exp() of what lies in the padding could overflow and poison the gradient with NaN.
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
    """Returns, [U, K], the surrogate whose gradient is that of the sequence KL; see `kl_terms`."""
    constant_kl_UxKxS = jax.lax.stop_gradient(kl_UxKxS)
    # Strictly after t: KL_t and what precedes it do not depend on z_t and would add nothing but variance.
    to_go_UxKxS = jnp.cumsum(constant_kl_UxKxS[..., ::-1], axis=-1)[..., ::-1] - constant_kl_UxKxS
    coefficient_UxKxS = to_go_UxKxS
    if kl_UxKxS.shape[1] > 1:
        coefficient_UxKxS = to_go_UxKxS - _mean_of_others(to_go_UxKxS)
    score_UxKxS = jnp.where(mask_UxKxS, logp_UxKxS * coefficient_UxKxS, 0.0)
    return jnp.sum(kl_UxKxS + score_UxKxS, axis=-1)


# The inference model's whole loss.


class InferenceLoss(NamedTuple):
    """`inference_loss` of a batch."""

    loss: SumCount  # Surrogate: sum / count has the gradient (3).
    penalised_UxK: jax.Array  # The reward that the advantages saw, the KL penalty subtracted: for `update_baseline`.
    kl: SumCount  # The measured sequence KL, in nats per summary: for the log.


def inference_loss(
    *,
    advantage: str,
    kl: str,
    kl_coef: float,
    reward_UxK: jax.Array,
    baseline: jax.Array | float,
    logp_UxKxS: jax.Array,
    ref_logp_UxKxS: jax.Array,
    mask_UxKxS: jax.Array,
    position_kl_UxKxS: jax.Array | None = None,
    valid_U: jax.Array | None = None,
) -> InferenceLoss:
    """Puts (3) together: reward less penalty, advantages, score function, KL. Arguments as in the functions it calls.

    Args:
        advantage: one of ADVANTAGES.
        kl: one of KL_ESTIMATORS.
        kl_coef: lambda.
        reward_UxK: r_k = - mean_m l(h(x_m, z_k)); no gradient flows through it.
        baseline: scalar, of earlier steps, for "reinforce".
        logp_UxKxS: see `kl_terms`, as the rest.
        ref_logp_UxKxS: constant.
        mask_UxKxS: bool.
        position_kl_UxKxS: for "exact" alone.
        valid_U: bool.
    """
    terms = kl_terms(kl, logp_UxKxS, ref_logp_UxKxS, mask_UxKxS, position_kl_UxKxS, valid_U)
    penalised_UxK = jax.lax.stop_gradient(reward_UxK) - kl_coef * terms.penalty_UxK
    advantage_UxK = advantages(advantage, penalised_UxK, baseline, valid_U)
    score_sum, count = score_function_loss(total_logp(logp_UxKxS, mask_UxKxS), advantage_UxK, valid_U)
    return InferenceLoss((score_sum + kl_coef * terms.loss[0], count), penalised_UxK, terms.estimate)


def _mean_of_others(values_UxK: jax.Array) -> jax.Array:
    """Returns for each k the mean over j != k along axis 1."""
    total_Ux1 = jnp.sum(values_UxK, axis=1, keepdims=True)
    return (total_Ux1 - values_UxK) / (values_UxK.shape[1] - 1)


def _valid_UxK(values_UxK: jax.Array, valid_U: jax.Array | None) -> jax.Array:
    """Returns the users' validity for each of their K summaries."""
    if valid_U is None:
        return jnp.ones(values_UxK.shape, bool)
    return jnp.broadcast_to(valid_U.astype(bool)[:, None], values_UxK.shape)
