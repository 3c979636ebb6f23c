"""The optimizer of either role over a whole run, against AdamW and its schedule written out again in float64."""

import math

import jax
import numpy as np
import pytest

from popi_jax.config import changed, parse
from popi_jax.configs import base
from popi_jax.modes import programs
from popi_jax.training import optim
from tests import tiny

CONFIG = parse(base.get_config())


def rate(settings, peak, updates, count):
    """The learning rate of update `count`, from 0, of `updates` in all.

    It rises linearly up to the peak at update `warmup_steps`, then stays there or falls as half a cosine, to 0 where
    the update after the last one would be.
    """
    warmup = settings.warmup_steps
    if count < warmup:
        return peak * (count + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (count - warmup) / (updates - warmup))) / 2


def norm(leaves):
    """The global norm."""
    return math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in leaves))


def adamw(settings, peak, clip, updates, count, params, grads, moments):
    """One update, count updates after the first (Loshchilov and Hutter 2019, algorithm 2), of lists of arrays.

    Returns:
        What is added to the parameters, and the new moments, a list of (mean, mean of squares).
    """
    b1, b2 = settings.b1, settings.b2
    shrink = min(1.0, clip / norm(grads)) if clip else 1.0
    added, new = [], []
    for param, grad, (mean, square) in zip(params, grads, moments, strict=True):
        mean = b1 * mean + (1 - b1) * shrink * grad
        square = b2 * square + (1 - b2) * (shrink * grad) ** 2
        step = (mean / (1 - b1 ** (count + 1))) / (np.sqrt(square / (1 - b2 ** (count + 1))) + 1e-8)
        added.append(-rate(settings, peak, updates, count) * (step + settings.weight_decay * param))
        new.append((mean, square))
    return added, new


def follow(tx, settings, peak, clip, updates):
    """Holds every update of a run by tx against `adamw`. With `clip` between 0.5 and 5, some gradients are clipped."""
    rng = np.random.default_rng(0)
    params, moments = [rng.normal(size=(3, 2)), rng.normal(size=4)], [(0.0, 0.0)] * 2
    state = tx.init(jax.tree.map(np.float32, params))
    for count in range(updates):
        drawn = [rng.normal(size=param.shape) for param in params]
        grads = [(5.0, 0.5, 2.0)[count % 3] / norm(drawn) * grad for grad in drawn]
        added, state = tx.update(*(jax.tree.map(np.float32, tree) for tree in (grads, state, params)))
        expected, moments = adamw(settings, peak, clip, updates, count, params, grads, moments)
        for own, other in zip(added, expected, strict=True):
            np.testing.assert_allclose(own, other, rtol=2e-4, atol=1e-6 * peak, err_msg=f"update {count}")
        params = [param + update for param, update in zip(params, expected, strict=True)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "clip", "decay"),
    [("cosine", 0, 0.0, 0.1), ("cosine", 3, 1.0, 0.0), ("constant", 4, 1.0, 0.1), ("constant", 0, 0.0, 0.0)],
)
def test_a_run_of_updates(schedule, warmup, clip, decay):
    values = {"schedule": schedule, "warmup_steps": warmup, "b1": 0.7, "b2": 0.95, "weight_decay": decay}
    settings = changed(CONFIG, {f"optim.{key}": value for key, value in values.items()}).optim
    follow(optim.make_optimizer(settings, 0.03, clip, 9), settings, 0.03, clip, 9)


def test_a_run_that_ends_in_its_warmup():
    settings = changed(CONFIG, {"optim.schedule": "cosine", "optim.warmup_steps": 5}).optim
    follow(optim.make_optimizer(settings, 0.03, 0.0, 3), settings, 0.03, 0.0, 3)


@pytest.mark.parametrize("name", ["joint", "alternate", "two_phase"])
def test_each_role_has_its_own_rate_clip_and_number_of_updates(name):
    values = {"schedule.name": name, "schedule.steps": 9, "schedule.n_phi": 2, "schedule.n_theta": 4}
    roles = {"lr_inference": 0.03, "lr_generator": 0.2, "clip_inference": 1.0, "clip_generator": 3.0}
    config = changed(CONFIG, values | {f"optim.{key}": value for key, value in roles.items()})
    n_phi, n_theta = {"joint": (9, 9), "alternate": (4, 5), "two_phase": (2, 4)}[name]
    settings = programs.make_settings(config, tiny.policy())
    follow(settings.tx_phi, config.optim, 0.03, 1.0, n_phi)
    follow(settings.tx_theta, config.optim, 0.2, 3.0, n_theta)
