"""The train steps: pure functions of (state, frozen base, batch). modes/programs.py jits each of them once.

A batch has U users with K summaries each and M queries per user, so R = U * K * M generator rows in user-major order:
row (u, k, m) shows the generator query m and summary k of user u. Without summaries (e.g. population) K is 1.
A step takes stacks of micro-batches: each array has the shape named here with an axis A in front. The inference model
and the generator may have different A. A micro-batch of the inference model has consecutive users. One of the generator
has bins of rows, and weight 0 for every row of the step that its bins do not hold.
Shape letters: docs/architecture.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from popi_jax.config import StepKind
from popi_jax.data.batch import Batch, GeneratorBatch, InferenceBatch
from popi_jax.model.policy import Policy
from popi_jax.training import objective, rng, rounding, scoring

Params = Any
Terms = dict[str, objective.SumCount]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static settings of a step; configs/base.py documents each.

    tx_phi is None for a method without an inference model of its own, see TrainState.
    """

    policy: Policy
    tx_phi: optax.GradientTransformation | None
    tx_theta: optax.GradientTransformation
    loss: str
    beta: float
    logp_reduction: str
    advantage: str
    baseline_decay: float
    kl: str
    kl_coef: float
    kl_decay: float
    total_steps: int  # Of the run; kl_decay refers to it.
    least_reward: float  # Of a summary that is imitated, see `objective.best_of_k`.
    temperature: float
    seed: int  # For stochastic rounding, see model.trained_dtype.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes. phi is q_phi's adapter (or weights), theta is pi_theta's; see Policy.bind.

    phi and opt_phi are None for a method without an inference model of its own, which saves their memory.
    The fields are typed Any because a TrainState also holds trees of shardings or shapes.
    """

    step: Any  # int32 scalar: the number of steps taken.
    phi: Params | None
    theta: Params
    opt_phi: Any
    opt_theta: Any
    baseline: Any  # float32 scalar: the moving average of the rewards; only advantage = "reinforce" reads it.


def init_state(key: jax.Array, base: Params, settings: Settings) -> TrainState:
    """Returns the state before the first step. Both roles start as the base model."""
    key_phi, key_theta = jax.random.split(key)
    phi, opt_phi, theta = None, None, settings.policy.init_delta(base, key_theta)
    if settings.tx_phi is not None:
        phi = settings.policy.init_delta(base, key_phi)
        opt_phi = settings.tx_phi.init(_float32(phi))
    return TrainState(
        step=jnp.int32(0),
        phi=phi,
        theta=theta,
        opt_phi=opt_phi,
        opt_theta=settings.tx_theta.init(_float32(theta)),
        # The reward of a generator with h = 0. Starting from 0 would make all early advantages far too low.
        baseline=-objective.preference_loss(settings.loss)(jnp.float32(0.0), settings.beta),
    )


def generator_loss(
    theta: Params, base: Params, batch: GeneratorBatch, settings: Settings
) -> tuple[jax.Array, tuple[jax.Array, Terms]]:
    """Returns the weighted sum of l(h_theta(x, z)) over the rows, the loss of each row, and (sum, count)s to log."""
    logp_Rx2 = scoring.response_logps(settings.policy.bind(base, theta), batch.bins, settings.logp_reduction)
    ref_logp_Rx2, weight_R = jnp.asarray(batch.ref_logp_Rx2), jnp.asarray(batch.weight_R)
    h_R = objective.implicit_reward_margin(logp_Rx2, ref_logp_Rx2)
    loss_R = objective.preference_loss(settings.loss)(h_R, settings.beta)
    terms = {
        "loss": objective.weighted_total(loss_R, weight_R),
        "accuracy": objective.weighted_total(objective.preference_accuracy(h_R), weight_R),
        "nats": objective.weighted_total(objective.preference_nats(h_R, settings.beta), weight_R),
        "margin": objective.weighted_total(h_R, weight_R),
    }
    return terms["loss"][0], (loss_R, terms)


def summary_rewards(loss_R: jax.Array, weight_R: jax.Array, users: int, summaries: int) -> jax.Array:
    """Returns r_k = - mean over the user's queries of l(h(x_m, z_k)), [U, K] (POPI section 3); 0 without queries."""
    loss_UxKxM, weight_UxKxM = (x_R.reshape(users, summaries, -1) for x_R in (loss_R, weight_R))
    total_UxK = jnp.sum(jnp.where(weight_UxKxM > 0, loss_UxKxM, 0.0) * weight_UxKxM, axis=-1)
    return -total_UxK / jnp.maximum(jnp.sum(weight_UxKxM, axis=-1), 1.0)


def inference_loss(
    phi: Params,
    base: Params,
    batch: InferenceBatch,
    reward_UxK: jax.Array,
    baseline: jax.Array,
    kl_coef: jax.Array | float,
    settings: Settings,
) -> tuple[jax.Array, tuple[Terms, dict[str, jax.Array]]]:
    """Computes the score-function surrogate plus lambda KL, summed over summaries (POPI section 3).

    Returns:
        The sum; the terms to log as (sum, count), where "surrogate" has the loss's own count; and the terms to log as
        maxima.
    """
    policy, lines = settings.policy, batch.lines
    valid_U, mask_UxKxS = lines.valid_B, lines.mask_BxNxS
    scores = scoring.score(
        policy.bind(base, phi), lines, temperature=settings.temperature, reference=policy.bind(base, None)
    )
    assert scores.ref_logp_BxNxS is not None  # A reference was given.
    out = objective.inference_loss(
        advantage=settings.advantage,
        kl=settings.kl,
        kl_coef=kl_coef,
        reward_UxK=reward_UxK,
        baseline=baseline,
        logp_UxKxS=scores.logp_BxNxS,
        ref_logp_UxKxS=scores.ref_logp_BxNxS,
        mask_UxKxS=mask_UxKxS,
        position_kl_UxKxS=scores.kl_BxNxS,
        valid_U=valid_U,
    )
    gap_UxKxS = jnp.where(mask_UxKxS, jnp.abs(scores.logp_BxNxS - batch.sampler_logp_UxKxS), 0.0)
    valid_UxK = jnp.broadcast_to(valid_U[:, None], reward_UxK.shape)
    terms = _reward_terms(reward_UxK, valid_UxK) | {
        "reward_less_kl": objective.weighted_total(out.penalised_UxK, valid_UxK),
        "kl": out.kl,
        "surrogate": out.loss,
        "summary_tokens": objective.weighted_total(jnp.asarray(lines.branch_length_BxN, jnp.float32), valid_UxK),
        "summary_logp": objective.weighted_total(jnp.sum(scores.logp_BxNxS, axis=-1), valid_UxK),
        "sampler_gap": objective.weighted_total(gap_UxKxS, mask_UxKxS),
    }
    return out.loss[0], (terms, {"sampler_gap_max": gap_UxKxS.max()})


def _reward_terms(reward_UxK: jax.Array, valid_UxK: jax.Array) -> Terms:
    spread_UxK = jnp.broadcast_to(jnp.std(reward_UxK, axis=1, keepdims=True), reward_UxK.shape)
    return {
        "reward": objective.weighted_total(reward_UxK, valid_UxK),
        "reward_std": objective.weighted_total(spread_UxK, valid_UxK),
    }


def imitation_loss(
    phi: Params, base: Params, batch: InferenceBatch, reward_UxK: jax.Array, settings: Settings
) -> tuple[jax.Array, tuple[Terms, dict[str, jax.Array]]]:
    """Computes the negative log-likelihood of each user's text, or of the best of K, summed over users.

    Returns:
        As `inference_loss`. "surrogate" is the loss in nats per text; "imitated" is the share of users who have one.
    """
    lines = batch.lines
    valid_U, K = lines.valid_B, reward_UxK.shape[1]
    weight_UxK = valid_U[:, None].astype(jnp.float32)
    if K > 1:
        weight_UxK = objective.best_of_k(reward_UxK, valid_U, settings.least_reward)
    scores = scoring.score(settings.policy.bind(base, phi), lines, temperature=settings.temperature)
    loss = objective.imitation_loss(objective.total_logp(scores.logp_BxNxS, lines.mask_BxNxS), weight_UxK)
    valid_UxK = jnp.broadcast_to(valid_U[:, None], reward_UxK.shape)
    terms = _reward_terms(reward_UxK, valid_UxK) | {
        "surrogate": loss,
        "imitated": objective.weighted_total(jnp.sum(weight_UxK, axis=1), valid_U),
        "reward_imitated": objective.weighted_total(reward_UxK, weight_UxK),
        "summary_tokens": objective.weighted_total(jnp.asarray(lines.branch_length_BxN, jnp.float32), valid_UxK),
    }
    return loss[0], (terms, {})


def generator_step(state: TrainState, base: Params, batch: Batch, *, settings: Settings) -> tuple[TrainState, Metrics]:
    """Updates theta once, by the preference loss. Pure."""
    grads, terms, _ = _generator_sums(state, base, batch.generator, settings)
    state, norms = _update_theta(state, grads, terms, settings)
    return dataclasses.replace(state, step=state.step + 1), _means(terms) | norms


def inference_step(state: TrainState, base: Params, batch: Batch, *, settings: Settings) -> tuple[TrainState, Metrics]:
    """Updates phi once, by REINFORCE. The generator only provides the rewards. Pure."""
    terms, loss_R = _generator_losses(state, base, batch.generator, settings)
    grads, phi_terms, maxima = _inference_sums(state, base, batch, loss_R, settings)
    state, norms = _update_phi(state, grads, phi_terms, settings)
    return dataclasses.replace(state, step=state.step + 1), _means(terms | phi_terms) | maxima | norms


def imitation_step(state: TrainState, base: Params, batch: Batch, *, settings: Settings) -> tuple[TrainState, Metrics]:
    """Updates phi once, by imitation: of each user's text, or of the best of K by the generator's losses. Pure."""
    terms, loss_R = _generator_losses(state, base, batch.generator, settings)
    grads, phi_terms, maxima = _inference_sums(state, base, batch, loss_R, settings, imitates=True)
    state, norms = _update_phi(state, grads, phi_terms, settings)
    return dataclasses.replace(state, step=state.step + 1), _means(terms | phi_terms) | maxima | norms


def joint_step(state: TrainState, base: Params, batch: Batch, *, settings: Settings) -> tuple[TrainState, Metrics]:
    """Updates both models once from the same summaries: phi's reward is minus theta's loss. Pure.

    All rows give rewards. Theta learns from all of them, or only from `batch.learned`: the rows of each user's first
    few summaries, which give an unbiased estimate of the same loss with a cheaper backward pass.
    """
    if batch.learned is None:
        theta_grads, terms, loss_R = _generator_sums(state, base, batch.generator, settings)
        learned_terms = terms
    else:
        terms, loss_R = _generator_losses(state, base, batch.generator, settings)
        theta_grads, learned_terms, _ = _generator_sums(state, base, batch.learned, settings)
    grads, phi_terms, maxima = _inference_sums(state, base, batch, loss_R, settings)
    state, phi_norms = _update_phi(state, grads, phi_terms, settings)
    state, theta_norms = _update_theta(state, theta_grads, learned_terms, settings)
    return dataclasses.replace(state, step=state.step + 1), _means(terms | phi_terms) | maxima | phi_norms | theta_norms


Step = Callable[..., tuple[TrainState, Metrics]]
STEPS: dict[StepKind, Step] = {
    "joint": joint_step,
    "inference": inference_step,
    "generator": generator_step,
    "generator_warmup": generator_step,
    "best_of_k": imitation_step,
    "imitation": imitation_step,
}


def _generator_losses(
    state: TrainState, base: Params, batch: GeneratorBatch, settings: Settings
) -> tuple[Terms, jax.Array]:
    """Returns the terms to log and the loss of each row, without a gradient."""

    def one(micro: GeneratorBatch):
        _, (loss_R, terms) = generator_loss(state.theta, base, micro, settings)
        return (terms, {}), loss_R

    (terms, _), loss_AxR = _accumulate(one, batch)
    return terms, _of_each_row(loss_AxR, batch)


def _generator_sums(
    state: TrainState, base: Params, batch: GeneratorBatch, settings: Settings
) -> tuple[Params, Terms, jax.Array]:
    """Returns the gradient of the rows' weighted sum, then the same as `_generator_losses`."""

    def one(micro: GeneratorBatch):
        (_, (loss_R, terms)), grads = jax.value_and_grad(generator_loss, has_aux=True)(
            _differentiated(state.theta), base, micro, settings
        )
        return ((grads, terms), {}), loss_R

    ((grads, terms), _), loss_AxR = _accumulate(one, batch)
    return grads, terms, _of_each_row(loss_AxR, batch)


def _of_each_row(loss_AxR: jax.Array, batch: GeneratorBatch) -> jax.Array:
    """Returns the loss of each row, taken from the micro-batch that holds it, [R]; 0 at padding."""
    return jnp.sum(jnp.where(batch.weight_R > 0, loss_AxR, 0.0), axis=0)


def _inference_sums(
    state: TrainState, base: Params, batch: Batch, loss_R: jax.Array, settings: Settings, imitates: bool = False
) -> tuple[Params, Terms, dict[str, jax.Array]]:
    """Returns the gradient of the summaries' summed loss, the (sum, count) terms to log and the maxima to log."""
    inference = batch.inference
    assert inference is not None  # Only a generator step has none.
    A, U, K = inference.lines.branch_length_BxN.shape
    weight_R = jnp.sum(batch.generator.weight_R, axis=0)
    reward_AxUxK = summary_rewards(loss_R, weight_R, A * U, K).reshape(A, U, K) + inference.more_reward_UxK
    kl_coef = settings.kl_coef
    if settings.kl_decay:
        kl_coef *= 1.0 - settings.kl_decay * state.step / settings.total_steps

    def one(micro: tuple[InferenceBatch, jax.Array]):
        def loss(phi: Params):
            if imitates:
                return imitation_loss(phi, base, *micro, settings)
            return inference_loss(phi, base, *micro, state.baseline, kl_coef, settings)

        (_, (terms, maxima)), grads = jax.value_and_grad(loss, has_aux=True)(_differentiated(state.phi))
        if A > 1:
            terms |= {"squares": (optax.tree.norm(grads, squared=True), jnp.float32(1.0))}
        return ((grads, terms), maxima), ()

    ((grads, terms), maxima), _ = _accumulate(one, (inference, reward_AxUxK))
    loss_UxKxM, weight_UxKxM = (x_R.reshape(A * U, K, -1) for x_R in (loss_R, weight_R))
    if loss_UxKxM.shape[2] > 1:
        variance, noise = objective.reward_variance(loss_UxKxM, weight_UxKxM[:, 0] > 0)
        terms |= {"reward_variance": variance, "reward_noise": noise}
    return grads, terms, maxima


def _accumulate(one: Callable, batch: Any) -> Any:
    """Calls `one`, which returns ((sums, maxima), own), on each micro-batch of a stack.

    Returns:
        The same structure: sums and counts added up (which stays exact for unequal micro-batches), the largest of the
        maxima, and the micro-batches' own values stacked.
    """
    first = jax.tree.map(lambda x: x[0], batch)
    if len(jax.tree.leaves(batch)[0]) == 1:
        reduced, own = one(first)
        return reduced, jax.tree.map(lambda x: x[None], own)
    # bfloat16 gradients are summed in float32 as well. No maximum is below 0.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(one, first)[0])

    def add(carry, micro):
        (sums, maxima), ((more_sums, more_maxima), own) = carry, one(micro)
        return (jax.tree.map(jnp.add, sums, more_sums), jax.tree.map(jnp.maximum, maxima, more_maxima)), own

    return jax.lax.scan(add, zeros, batch)


def _update_phi(state: TrainState, sums: Params, terms: Terms, settings: Settings):
    assert settings.tx_phi is not None
    phi, opt_phi, norms = _update("phi", state, settings.tx_phi, sums, terms["surrogate"], settings.seed)
    norms |= _signal_and_noise(sums, terms.pop("squares", None), terms["surrogate"][1])
    rewards = terms.get("reward_less_kl", terms["reward"])  # Imitation has no KL term.
    baseline = objective.update_baseline(state.baseline, rewards, settings.baseline_decay)
    state = dataclasses.replace(state, phi=phi, opt_phi=opt_phi, baseline=baseline)
    return state, {f"{name}_inference": norm for name, norm in norms.items()}


def _signal_and_noise(sums: Params, squares: objective.SumCount | None, count: jax.Array) -> Metrics:
    """Returns estimates of |E g|^2 and of E |g - E g|^2, where g is the mean gradient of this step.

    They follow from the A micro-batches' gradients g_a, which are independent: with G = sum_a g_a,
    E |G|^2 = A^2 |m|^2 + A v and E sum_a |g_a|^2 = A |m|^2 + A v, for the mean m and variance v of g_a. One micro-batch
    gives none. The estimate of the signal is unbiased, so it may be negative; divide only means over many steps.
    """
    if squares is None:
        return {}
    total, (each, A) = optax.tree.norm(sums, squared=True), squares
    scale = jnp.maximum(count, 1.0) ** 2
    signal = (total - each) * A / (A - 1) / scale
    return {"grad_signal": signal, "grad_noise": (total / scale) - signal}


def _update_theta(state: TrainState, sums: Params, terms: Terms, settings: Settings):
    theta, opt_theta, norms = _update("theta", state, settings.tx_theta, sums, terms["loss"], settings.seed)
    state = dataclasses.replace(state, theta=theta, opt_theta=opt_theta)
    return state, {f"{name}_generator": norm for name, norm in norms.items()}


def _update(
    role: str, state: TrainState, tx: optax.GradientTransformation, sums: Params, loss: objective.SumCount, seed: int
) -> tuple[Params, Any, Metrics]:
    """Updates one role by the mean gradient. Returns its parameters, optimizer state, and gradient and update norms."""
    params, opt = getattr(state, role), getattr(state, f"opt_{role}")
    with jax.named_scope("optimizer"):
        grads = jax.tree.map(lambda g: g / jnp.maximum(loss[1], 1.0), sums)
        updates, opt = tx.update(grads, opt, params)
        params = rounding.add(params, updates, rng.stream_key(seed, f"round_{role}", state.step))
        return params, opt, {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}


def _differentiated(params: Params) -> Params:
    """Returns the weights as the loss is differentiated: the embedding and the head in float32, all else as stored.

    A gradient has its weight's type. These two are sums of many parts, one for each token or chunk of tokens, and a sum
    in bfloat16 stops growing at 256 times its terms. The function is the same, since both are cast before use.
    """
    return {name: _float32(own) if name in ("embed", "head") else own for name, own in params.items()}


def _float32(params: Params) -> Params:
    """Returns a float32 copy: the optimizer keeps its moments in the type of the parameters that it is given."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def _means(terms: Terms) -> dict[str, jax.Array]:
    return {name: total / jnp.maximum(count, 1.0) for name, (total, count) in terms.items()}
