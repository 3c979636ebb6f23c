"""Every setting reaches the step that it is for: whole steps against POPI's equations, written out again.

Shapes: U users, K summaries, M queries per user, S tokens of a summary or a response, V vocabulary; B lines of N
branches, as in data/batch.py.
"""

import collections
import dataclasses
import functools
import itertools
import math
import typing
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popi_jax.config import Config, Method, changed, parse
from popi_jax.configs import base as base_config
from popi_jax.data.batch import Batch, GeneratorBatch, InferenceBatch, PrefixBatch
from popi_jax.data.schema import Example, Query
from popi_jax.evaluation.evaluate import Record, informativeness, result_row
from popi_jax.modes import programs
from popi_jax.training import objective, schedule, steps
from popi_jax.training.batches import chosen_queries
from popi_jax.training.steps import Settings, TrainState
from tests import test_optim, tiny

# One step in the middle of a run. One of its users has one query, one is padding.
STEP, UPDATES_BEFORE, BASELINE = 4, 3, -6.5
QUERIES_U = np.array([2, 1, 2, 0])
U, K, M, S = len(QUERIES_U), 3, 2, 4

SCHEDULES = {
    "joint": {"schedule.name": "joint"},
    "learned": {"schedule.name": "joint", "sampling.k_generator": 2},
    "inference_only": {"schedule.name": "inference_only"},
    "generator_only": {"schedule.name": "generator_only"},
    # Step 4 of these updates the inference model, or the generator.
    "alternate_phi": {"schedule.name": "alternate", "schedule.n_phi": 5, "schedule.n_theta": 2},
    "alternate_theta": {"schedule.name": "alternate", "schedule.n_phi": 1, "schedule.n_theta": 4},
    "two_phase_phi": {"schedule.name": "two_phase", "schedule.n_phi": 9, "schedule.n_theta": 8},
    "two_phase_theta": {"schedule.name": "two_phase", "schedule.n_phi": 3, "schedule.n_theta": 17},
    # Step 4 comes before the schedule.
    "generator_warmup": {"schedule.n_generator_warmup": 5},
    "best_of_k": {"schedule.n_generator_warmup": 2, "schedule.n_warm_start": 3},
    "best_of_k_relative": {"schedule.n_warm_start": 5, "objective.relative_reward": True},
    "imitation": {"schedule.n_warm_start": 5, "schedule.warm_start": "persona"},
    # Step 4 is the first one after it, and of 25 steps.
    "decayed": {"schedule.n_generator_warmup": 3, "schedule.n_warm_start": 1, "objective.kl_decay": 0.6},
}
TABLE = [
    # loss, logp_reduction, advantage, kl, schedule, method
    ("dpo", "sum", "rloo", "exact", "joint", "popi"),
    ("ipo", "mean", "rloo", "k1_reward", "learned", "popi"),
    ("dpo", "mean", "rloo", "k3_loss", "inference_only", "popi"),
    ("ipo", "sum", "reinforce", "exact", "learned", "popi"),
    ("dpo", "mean", "reinforce", "k1_reward", "alternate_phi", "popi"),
    ("ipo", "sum", "reinforce", "k3_loss", "joint", "popi"),
    ("ipo", "sum", "group_mean", "exact", "two_phase_phi", "popi"),
    ("dpo", "sum", "group_mean", "k1_reward", "joint", "popi"),
    ("dpo", "mean", "group_mean", "k3_loss", "learned", "popi"),
    ("ipo", "mean", "grpo", "exact", "joint", "popi"),
    ("dpo", "sum", "grpo", "k1_reward", "learned", "popi"),
    ("ipo", "mean", "grpo", "k3_loss", "inference_only", "popi"),
    ("dpo", "mean", "rloo", "exact", "generator_only", "popi"),
    ("ipo", "sum", "rloo", "exact", "alternate_theta", "popi"),
    ("dpo", "sum", "rloo", "exact", "two_phase_theta", "popi"),
    ("dpo", "sum", "rloo", "exact", "joint", "population"),
    ("ipo", "mean", "rloo", "exact", "joint", "population"),
    ("dpo", "mean", "rloo", "exact", "joint", "raw_signals"),
    ("ipo", "sum", "rloo", "exact", "joint", "raw_signals"),
    ("dpo", "sum", "rloo", "exact", "joint", "oracle"),
    ("ipo", "mean", "rloo", "exact", "joint", "oracle"),
    ("dpo", "mean", "rloo", "exact", "joint", "zero_shot_summary"),
    ("ipo", "sum", "rloo", "exact", "joint", "zero_shot_summary"),
    ("ipo", "mean", "rloo", "exact", "generator_warmup", "popi"),
    ("dpo", "sum", "rloo", "exact", "best_of_k", "popi"),
    ("ipo", "mean", "grpo", "k1_reward", "best_of_k_relative", "popi"),
    ("dpo", "mean", "rloo", "exact", "imitation", "popi"),
    ("dpo", "sum", "rloo", "exact", "decayed", "popi"),
]
# The kinds of steps that update each role.
UPDATES = {"phi": ("joint", "inference", "best_of_k", "imitation"), "theta": ("joint", "generator", "generator_warmup")}


class Bigram:
    """A policy and a decoder in one, whose logits depend on the last token alone.

    The steps cannot tell it from a transformer, with which compiling one of them takes ten times as long.
    """

    mesh = None
    config = tiny.CONFIG

    def __init__(self, weights=None):
        self.weights = weights

    def bind(self, base, delta):
        return Bigram(base if delta is None else jax.tree.map(jnp.add, base, delta))

    def __call__(self, tokens_BxL, positions_BxL, segments_BxL):
        return self.weights["table"][tokens_BxL]

    def logits(self, hidden):
        return hidden + jnp.expand_dims(self.weights["bias"], range(hidden.ndim - 1))


class World(NamedTuple):
    """Two models in the middle of a run, and what a step reads, row by row."""

    base: dict
    state: TrainState
    pairs: PrefixBatch  # Line (u, k, m): a prompt with y+ and y-.
    ref_logp_UxKxMx2: np.ndarray
    summaries: PrefixBatch  # Line u: signals with K summaries.
    sampler_logp_UxKxS: np.ndarray
    more_reward_UxK: np.ndarray


def world(settings: Settings) -> World:
    rng = np.random.default_rng(0)
    V = tiny.CONFIG.vocab_size

    def noise(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def weights():
        return {"table": noise(V, V), "bias": noise(V)}

    def used(tx, params):
        """An optimizer's state after some updates."""
        state = jax.tree.map(lambda x: noise(*x.shape) if x.ndim else np.int32(UPDATES_BEFORE), tx.init(params))
        return optax.tree.set(state, nu=jax.tree.map(np.square, optax.tree.get(state, "nu")))

    phi, theta = None if settings.tx_phi is None else weights(), weights()
    state = TrainState(
        step=np.int32(STEP),
        phi=phi,
        theta=theta,
        opt_phi=None if phi is None else used(settings.tx_phi, phi),
        opt_theta=used(settings.tx_theta, theta),
        baseline=np.float32(BASELINE),
    )
    pairs, summaries = tiny.rows(rng, U * K * M, 2, 5, S), tiny.rows(rng, U, K, 6, S)
    for lines, real in ((pairs, np.repeat(real_UxM()[:, None], K, axis=1).ravel()), (summaries, QUERIES_U > 0)):
        lines.prefix_length_B[~real] = lines.branch_length_BxN[~real] = 0
    return World(weights(), state, pairs, noise(U, K, M, 2) * 2 - 9, summaries, noise(U, K, S) - 3, noise(U, K))


def real_UxM():
    """Which queries are no padding."""
    return np.arange(M) < QUERIES_U[:, None]


def rows(own: World, first: int) -> GeneratorBatch:
    """The rows of each user's `first` summaries, as one micro-batch."""
    chosen_R = np.arange(U * K * M).reshape(U, K, M)[:, :first].ravel()
    packed = tiny.packed(jax.tree.map(lambda x: x[chosen_R], own.pairs), 24, micros=1)
    weight_UxM = real_UxM() * M / np.maximum(QUERIES_U, 1)[:, None]
    weight_R = np.repeat(weight_UxM[:, None], first, axis=1).ravel().astype(np.float32)
    return GeneratorBatch(packed, own.ref_logp_UxKxMx2[:, :first].reshape(1, -1, 2), weight_R[None])


def batch(own: World, kind: str, shown: int, learned: int) -> Batch:
    """What a step reads that shows the generator `shown` summaries of each user."""
    inference = InferenceBatch(own.summaries, own.sampler_logp_UxKxS, own.more_reward_UxK)
    if kind == "imitation":  # One text for each user.
        lines = dataclasses.replace(own.summaries, **{
            name: getattr(own.summaries, name)[:, :1] for name in ("branches_BxNxS", "branch_length_BxN")
        })  # fmt: skip
        inference = InferenceBatch(lines, own.sampler_logp_UxKxS[:, :1], own.more_reward_UxK[:, :1])
    return Batch(
        generator=rows(own, shown),
        inference=jax.tree.map(lambda x: x[None], inference) if kind in UPDATES["phi"] else None,
        learned=rows(own, learned) if kind == "joint" and learned < shown else None,
    )


# The same from the equations.


def log_softmax(base, delta, lines: PrefixBatch, temperature):
    """Log of the next-token distribution at each branch token, [B, N, S, V]."""
    weights = base if delta is None else jax.tree.map(jnp.add, base, delta)
    last_B = lines.prefix_BxT[np.arange(len(lines.prefix_BxT)), lines.prefix_length_B - 1]
    before_BxNxS = np.roll(lines.branches_BxNxS, 1, axis=-1)
    before_BxNxS[:, :, 0] = last_B[:, None]
    return jax.nn.log_softmax((weights["table"][before_BxNxS] + weights["bias"][None, None, None]) / temperature)


def chosen(log_softmax_BxNxSxV, lines: PrefixBatch):
    """The log-probability of each branch token, [B, N, S]; 0 at padding."""
    logp_BxNxS = jnp.take_along_axis(log_softmax_BxNxSxV, lines.branches_BxNxS[..., None], axis=-1)[..., 0]
    return jnp.where(lines.mask_BxNxS, logp_BxNxS, 0.0)


def of_users(values_UxK):
    """The mean over users and their summaries, without padding."""
    return jnp.mean(values_UxK[QUERIES_U > 0])


def of_queries(values_UxKxM):
    """The mean over a user's queries, [U, K]."""
    return jnp.sum(values_UxKxM * real_UxM()[:, None], axis=-1) / np.maximum(QUERIES_U, 1)[:, None]


def generator_reference(config: Config, own: World, shown: int, learned: int):
    """The metrics of the rows shown, every row's reward, and theta's gradient of the loss of those learned from."""
    beta = config.objective.beta
    length_UxKxMx2 = np.maximum(own.pairs.branch_length_BxN, 1).reshape(U, K, M, 2)

    def terms(theta):
        """Of each row: [U, K, M]."""
        logp_BxNxS = chosen(log_softmax(own.base, theta, own.pairs, 1.0), own.pairs)
        logp_UxKxMx2 = jnp.sum(logp_BxNxS, axis=-1).reshape(U, K, M, 2)
        if config.objective.logp_reduction == "mean":
            logp_UxKxMx2 /= length_UxKxMx2
        ratio_UxKxMx2 = logp_UxKxMx2 - own.ref_logp_UxKxMx2
        h_UxKxM = ratio_UxKxMx2[..., 0] - ratio_UxKxMx2[..., 1]
        nats_UxKxM = jnp.log1p(jnp.exp(-beta * h_UxKxM))
        loss_UxKxM = {"dpo": nats_UxKxM / beta, "ipo": (h_UxKxM - 1 / (2 * beta)) ** 2 * beta / 2}
        found = {"loss": loss_UxKxM[config.objective.loss], "accuracy": h_UxKxM > 0, "nats": nats_UxKxM}
        return found | {"margin": h_UxKxM}

    found = terms(own.state.theta)
    grads = jax.grad(lambda theta: of_users(of_queries(terms(theta)["loss"])[:, :learned]))(own.state.theta)
    metrics = {name: of_users(of_queries(values)[:, :shown]) for name, values in found.items()}
    return metrics, -np.asarray(found["loss"])[:, :shown], grads


def reward_metrics(reward_UxKxM, reward_UxK):
    """What a step logs of the rewards: of those of single queries, and of their means with what is added to them."""
    several = [reward_KxM for reward_KxM, count in zip(reward_UxKxM, QUERIES_U, strict=True) if count > 1]
    noise = []
    for reward_KxM in several:  # Analysis of variance with summaries and queries as factors, M = 2 in full.
        by_summary_Kx1, by_query_1xM = reward_KxM.mean(1, keepdims=True), reward_KxM.mean(0, keepdims=True)
        rest_KxM = reward_KxM - by_summary_Kx1 - by_query_1xM + reward_KxM.mean()
        noise.append((rest_KxM**2).sum() / max(len(reward_KxM) - 1, 1) / (M - 1) / M)
    one = reward_UxK.shape[1] == 1
    return {
        "reward_variance": 0.0 if one else np.mean([reward_KxM.mean(1).var(ddof=1) for reward_KxM in several]),
        "reward_noise": np.mean(noise),
        "reward": of_users(reward_UxK),
        "reward_std": of_users(np.std(reward_UxK, axis=1, keepdims=True)),
    }


def imitation_reference(config: Config, own: World, kind: str, reward_UxK):
    """The metrics, and phi's gradient of the negative log-likelihood of the texts to imitate."""
    lines, shown = own.summaries, reward_UxK.shape[1]
    weight_UxK = np.zeros((U, shown))
    for u, reward_K in enumerate(reward_UxK):
        helps = reward_K.max() > 0 or not config.objective.relative_reward
        weight_UxK[u, reward_K.argmax()] = QUERIES_U[u] > 0 and (kind == "imitation" or helps)

    def loss(phi):
        q_UxKxSxV = log_softmax(own.base, phi, lines, config.sampling.temperature)
        return -jnp.sum(weight_UxK * jnp.sum(chosen(q_UxKxSxV, lines), axis=-1)[:, :shown]) / weight_UxK.sum()

    metrics = {
        "surrogate": loss(own.state.phi),
        "imitated": weight_UxK.sum() / (QUERIES_U > 0).sum(),
        "reward_imitated": (reward_UxK * weight_UxK).sum() / weight_UxK.sum(),
        "summary_tokens": of_users(lines.branch_length_BxN[:, :shown]),
    }
    return metrics, jax.grad(loss)(own.state.phi)


def advantages(config: Config, reward_UxK):
    """A_k of equation (3), summary by summary."""
    advantage_UxK = np.zeros((U, K))
    for u, reward_K in enumerate(np.asarray(reward_UxK, np.float64)):
        for k, reward in enumerate(reward_K):
            advantage_UxK[u, k] = {
                "rloo": reward - np.delete(reward_K, k).mean(),
                "reinforce": reward - BASELINE,
                "group_mean": reward - reward_K.mean(),
                "grpo": (reward - reward_K.mean()) / (reward_K.std(ddof=1) + 1e-4),
            }[config.objective.advantage]
    return advantage_UxK


def kl_to_go(kl_UxKxS):
    """The KL after each token, less the mean of that of the user's other summaries."""
    after_UxKxS = np.array([[[sum(kl_S[t + 1 :]) for t in range(S)] for kl_S in kl_KxS] for kl_KxS in kl_UxKxS])
    return np.stack([after_UxKxS[:, k] - np.delete(after_UxKxS, k, axis=1).mean(axis=1) for k in range(K)], axis=1)


def inference_reference(config: Config, own: World, reward_UxK):
    """The metrics, and phi's gradient of the surrogate of equation (3)."""
    lines, temperature = own.summaries, config.sampling.temperature
    kl, kl_coef = config.objective.kl, config.objective.kl_coef
    if config.objective.kl_decay:
        kl_coef *= 1 - 0.6 * STEP / 24  # 3 + 1 + 20 steps.
    untrained_UxKxSxV = log_softmax(own.base, None, lines, temperature)
    ref_logp_UxKxS = chosen(untrained_UxKxSxV, lines)

    def terms(phi):
        """Of each token its log-probability and the KL at its place, [U, K, S]; of each summary its KL, [U, K]."""
        q_UxKxSxV = log_softmax(own.base, phi, lines, temperature)
        logp_UxKxS = chosen(q_UxKxSxV, lines)
        kl_UxKxS = jnp.sum(jnp.exp(q_UxKxSxV) * (q_UxKxSxV - untrained_UxKxSxV), axis=-1) * lines.mask_BxNxS
        d_UxKxS = ref_logp_UxKxS - logp_UxKxS
        estimates = {"exact": kl_UxKxS, "k1_reward": -d_UxKxS, "k3_loss": jnp.exp(d_UxKxS) - d_UxKxS - 1}
        return logp_UxKxS, kl_UxKxS, jnp.sum(estimates[kl], axis=-1)

    logp_UxKxS, kl_UxKxS, estimate_UxK = terms(own.state.phi)
    penalised_UxK = reward_UxK - kl_coef * estimate_UxK if kl == "k1_reward" else reward_UxK
    advantage_UxK, to_go_UxKxS = advantages(config, penalised_UxK), kl_to_go(np.asarray(kl_UxKxS))

    def surrogate(phi):
        logp_UxKxS, _, estimate_UxK = terms(phi)
        loss_UxK = -advantage_UxK * jnp.sum(logp_UxKxS, axis=-1)
        if kl == "exact":
            loss_UxK += kl_coef * (estimate_UxK + jnp.sum(logp_UxKxS * to_go_UxKxS, axis=-1))
        elif kl == "k3_loss":
            loss_UxK += kl_coef * estimate_UxK
        return of_users(loss_UxK)

    gaps = np.abs(logp_UxKxS - own.sampler_logp_UxKxS)[np.asarray(lines.mask_BxNxS)]
    metrics = {
        "reward_less_kl": of_users(penalised_UxK),
        "kl": of_users(estimate_UxK),
        "surrogate": surrogate(own.state.phi),
        "summary_tokens": of_users(lines.branch_length_BxN),
        "summary_logp": of_users(jnp.sum(logp_UxKxS, axis=-1)),
        "sampler_gap": gaps.mean(),
        "sampler_gap_max": gaps.max(),
    }
    return metrics, jax.grad(surrogate)(own.state.phi)


def assert_updated(config: Config, role: str, old: TrainState, new: TrainState, grads) -> dict[str, float]:
    """Holds the role's weights and optimizer state against AdamW with the role's own rate, clip and updates.

    Returns:
        The metrics of the update.
    """
    name = {"phi": "inference", "theta": "generator"}[role]
    kinds = [schedule.step_kind(config, step) for step in range(schedule.total_steps(config))]
    peak, clip = (getattr(config.optim, f"{key}_{name}") for key in ("lr", "clip"))
    grads = [np.asarray(grad, np.float64) for grad in jax.tree.leaves(grads)]

    def parts(state):
        opt = getattr(state, f"opt_{role}")
        moments = (jax.tree.leaves(optax.tree.get(opt, moment)) for moment in ("mu", "nu"))
        return jax.tree.leaves(getattr(state, role)), list(zip(*moments, strict=True)), opt

    (params, moments, _), (new_params, new_moments, new_opt) = parts(old), parts(new)
    updates = sum(kind in UPDATES[role] for kind in kinds)
    added, expected = test_optim.adamw(config.optim, peak, clip, updates, UPDATES_BEFORE, params, grads, moments)
    for param, before, update in zip(new_params, params, added, strict=True):
        np.testing.assert_allclose(param - before, update, rtol=1e-3, atol=1e-4 * peak)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new_moments, expected)
    counts = optax.tree.get_all_with_path(new_opt, "count")
    assert {int(count) for _, count in counts} == {UPDATES_BEFORE + 1}
    return {f"grad_norm_{name}": test_optim.norm(grads), f"update_norm_{name}": test_optim.norm(added)}


def jitted(kind: str, settings: Settings):
    return jax.jit(functools.partial(steps.STEPS[kind], settings=settings))


def step_config(loss, reduction, advantage, kl, name, method) -> Config:
    values = {
        "objective.loss": loss,
        "objective.logp_reduction": reduction,
        "objective.advantage": advantage,
        "objective.kl": kl,
        "objective.kl_coef": 0.7,
        "objective.beta": 0.3,
        "objective.baseline_decay": 0.8,
        "method": method,
        "sampling.k": K,
        "sampling.temperature": 0.7,
        "schedule.steps": 20,
        "optim.lr_inference": 0.02,
        "optim.lr_generator": 0.05,
        "optim.warmup_steps": 2,
        "optim.b1": 0.8,
        "optim.b2": 0.95,
        "optim.weight_decay": 0.1,
        "optim.clip_inference": 0.5,
        "optim.clip_generator": 0.3,
    }
    return changed(parse(base_config.get_config()), values | SCHEDULES[name])


@pytest.mark.parametrize(("loss", "reduction", "advantage", "kl", "name", "method"), TABLE)
def test_a_step_is_that_of_the_equations(loss, reduction, advantage, kl, name, method):
    """The new models, optimizer states and baseline, and every metric, for the settings of TABLE."""
    config = step_config(loss, reduction, advantage, kl, name, method)
    kind = schedule.step_kind(config, STEP)
    settings = programs.make_settings(config, Bigram())
    own = world(settings)
    one = method in ("population", "raw_signals", "oracle") or name in (
        "two_phase_theta",
        "generator_warmup",
        "imitation",
    )
    shown = 1 if one else K
    learned = min(shown, config.sampling.k_generator or K)
    new, metrics = jitted(kind, settings)(own.state, own.base, batch(own, kind, shown, learned))

    expected, reward_UxKxM, theta_grads = generator_reference(config, own, shown, learned)
    if kind in UPDATES["theta"]:
        expected |= assert_updated(config, "theta", own.state, new, theta_grads)
    else:
        assert_equal((new.theta, new.opt_theta), (own.state.theta, own.state.opt_theta))
    if kind in UPDATES["phi"]:
        reward_UxK = of_queries(reward_UxKxM) + own.more_reward_UxK[:, :shown]
        expected |= reward_metrics(reward_UxKxM, reward_UxK)
        if kind in ("best_of_k", "imitation"):
            more, phi_grads = imitation_reference(config, own, kind, reward_UxK)
        else:
            more, phi_grads = inference_reference(config, own, reward_UxK)
        expected |= more | assert_updated(config, "phi", own.state, new, phi_grads)
        rewards = expected.get("reward_less_kl", expected["reward"])
        np.testing.assert_allclose(new.baseline, 0.8 * BASELINE + 0.2 * rewards, rtol=1e-5)
    else:
        assert_equal((new.phi, new.opt_phi, new.baseline), (own.state.phi, own.state.opt_phi, own.state.baseline))
    assert int(new.step) == STEP + 1
    assert set(metrics) == set(expected)
    for key, value in metrics.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-5, err_msg=key)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_table_has_every_pair_of_settings():
    """Of those that a step of the inference model reads; and every method with every loss and reduction."""
    kinds = {"joint": "joint", "learned": "learned"}
    kinds |= dict.fromkeys(("inference_only", "alternate_phi", "two_phase_phi"), "inference")
    found = [(*row[:4], kinds[row[4]]) for row in TABLE if row[4] in kinds and row[5] == "popi"]
    losses, reductions = tuple(objective.LOSSES), objective.LOGP_REDUCTIONS
    values = losses, reductions, objective.ADVANTAGES, objective.KL_ESTIMATORS, ("joint", "learned", "inference")
    for i, j in itertools.combinations(range(len(values)), 2):
        assert {(row[i], row[j]) for row in found} == set(itertools.product(values[i], values[j]))
    methods = set(typing.get_args(Method)) - {"base"}  # It takes no step.
    for i, of_loss in ((0, losses), (1, reductions)):
        assert {(row[i], row[5]) for row in TABLE} == set(itertools.product(of_loss, methods))
    assert {row[4] for row in TABLE} == set(SCHEDULES)


def test_stochastic_rounding_has_noise_of_its_own_for_each_seed_role_and_step():
    config = step_config("dpo", "sum", "rloo", "exact", "joint", "popi")
    # Each update is a fixed quarter to half of the distance to the next bfloat16 number.
    small = optax.stateless(lambda _, params: jax.tree.map(lambda p: p.astype(jnp.float32) * 2.0**-9, params))
    own = world(programs.make_settings(config, Bigram()))
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), own.state.theta)

    def program(kind, seed):
        settings = programs.make_settings(changed(config, {"seed": seed}), Bigram())
        return jitted(kind, dataclasses.replace(settings, tx_phi=small, tx_theta=small))

    def after(step, number):
        """Which weights of each role go to the next number in this step."""
        state = TrainState(np.int32(number), start, start, small.init(start), small.init(start), np.float32(0))
        new, _ = step(state, own.base, batch(own, "joint", K, K))
        return {role: moved(getattr(new, role)) for role in ("phi", "theta")}

    def moved(tree):
        return np.concatenate([np.ravel(a != b) for a, b in zip(*map(jax.tree.leaves, (tree, start)), strict=True)])

    noise = {}
    for seed in (0, 1):
        step = program("joint", seed)
        for number in (4, 5):
            noise |= {(seed, number, role): found for role, found in after(step, number).items()}
    for found in noise.values():
        assert 0.25 < found.mean() < 0.5
    for one, other in itertools.combinations(noise, 2):
        assert (noise[one] == noise[other]).mean() < 0.7, (one, other)  # Independent noise agrees in 0.5 to 0.63.
    np.testing.assert_array_equal(after(program("generator", 0), 4)["theta"], noise[0, 4, "theta"])


# Which queries a user shows.


@pytest.mark.parametrize("axis", ["seed", "step", "place"])
def test_every_choice_of_queries_is_as_frequent(axis):
    example = Example("u", "train", (), tuple(Query(str(i), "y", "n") for i in range(5)))
    draws = 2000
    found = [
        tuple(
            int(query.prompt)
            for query in chosen_queries(example, 2, **({"seed": 3, "step": 7, "place": 1} | {axis: i}))
        )
        for i in range(draws)
    ]
    count = collections.Counter(found)
    pairs = set(itertools.combinations(range(5), 2))
    assert set(count) == pairs  # No query twice, and in their order.
    expected = draws / len(pairs)
    chi_square = sum((count[pair] - expected) ** 2 / expected for pair in pairs)
    assert chi_square < 27.9  # Exceeded by one in 1,000 fair draws, with 9 degrees of freedom.
    repeated = np.mean([one == other for one, other in itertools.pairwise(found)])
    assert abs(repeated - 1 / len(pairs)) < 0.03  # 4 standard deviations.


def test_few_queries_are_all_shown_in_order():
    queries = tuple(Query(str(i), "y", "n") for i in range(3))
    example = Example("u", "train", (), queries)
    assert all(chosen_queries(example, 3, seed, 0, 0) == list(queries) for seed in range(5))
    assert chosen_queries(example, 8, 0, 0, 0) == list(queries)


# The figures of an evaluation.


def records(h_by_row, h_signals_ref=0.0):
    """Records of one user per row, with one margin per summary."""
    fixed = dict(group="", persona="", provenance="", context="z", context_tokens=1, finished=True, signal_tokens=2)
    return [
        Record(row=row, user=f"u{row}", h=h, h_signals_ref=h_signals_ref, **(fixed | {"group": f"u{row}"}))
        for row, own in enumerate(h_by_row)
        for h in own
    ]


MARGINS = ((2.5, -4.0), (7.0, 0.5), (-1.5, -6.0))


@pytest.mark.parametrize("loss", objective.LOSSES)
def test_results_are_those_of_the_objective(loss):
    beta, h_RxK = 0.3, jnp.array(MARGINS)
    config = changed(parse(base_config.get_config()), {"objective.loss": loss, "objective.beta": beta})
    row = result_row(records(MARGINS, h_signals_ref=-1.0), config, "popi")
    np.testing.assert_allclose(row["loss"], jnp.mean(objective.preference_loss(loss)(h_RxK, beta)), rtol=1e-6)
    np.testing.assert_allclose(row["nats"], jnp.mean(objective.preference_nats(h_RxK, beta)), rtol=1e-6)
    np.testing.assert_allclose(row["accuracy"], jnp.mean(objective.preference_accuracy(h_RxK)), rtol=1e-6)
    assert row["accuracy_signals_ref"] == 0.0 and row["n"] == 3


def test_informativeness_is_what_the_context_takes_off_the_loss():
    beta, population = 0.3, ((0.0,), (1.0,), (-2.0,))
    found = informativeness(records(population), records(MARGINS), beta, resamples=100)
    nats = [[math.log1p(math.exp(-beta * h)) for h in own] for own in (*population, *MARGINS)]
    means = [sum(own) / len(own) for own in nats]
    np.testing.assert_allclose(found.mean, sum(means[:3]) / 3 - sum(means[3:]) / 3, rtol=1e-12)
    told = informativeness(records(population), records(((9.0,), (9.0,), (9.0,))), beta, resamples=100)
    assert 0 < told.low <= told.mean  # Better told than not.


def test_the_interval_by_user_resamples_persons():
    """Ten prompts each of a person who is always right and of one who never is."""
    margins = [(1.0,)] * 10 + [(-1.0,)] * 10
    two = [
        dataclasses.replace(record, person="right" if record.h > 0 else "wrong", group=str(record.row))
        for record in records(margins)
    ]
    config = parse(base_config.get_config())
    row = result_row(two, config, "popi")
    assert row["accuracy_ci95_by_user"] == [0.0, 1.0]  # Both draws are of one person in half of the cases.
    low, high = row["accuracy_ci95"]
    assert 0.2 < low < 0.4 and 0.6 < high < 0.8  # Binomial: 0.5 +- 1.96 * sqrt(0.25 / 20).
    alone = result_row([dataclasses.replace(record, person="") for record in two], config, "popi")
    assert alone["accuracy_ci95_by_user"] == alone["accuracy_ci95"]
