"""Schedules by enumeration: the kind of every step by hand, and the counts that follow from it."""

import collections
import itertools

import pytest

from popi_jax.config import changed, parse
from popi_jax.configs import base
from popi_jax.training import schedule

CONFIG = parse(base.get_config())
J, P, G, W, B, T = "joint", "inference", "generator", "generator_warmup", "best_of_k", "imitation"


def config(name="joint", steps=0, n_phi=0, n_theta=0, method="popi", **more):
    keys = {"name": name, "steps": steps, "n_phi": n_phi, "n_theta": n_theta} | more
    return changed(CONFIG, {"method": method} | {f"schedule.{key}": value for key, value in keys.items()})


def kinds(own):
    """The kind of each step of the run, in order."""
    return [schedule.step_kind(own, step) for step in range(schedule.total_steps(own))]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (config("joint", 3), [J, J, J]),
        (config("inference_only", 3), [P, P, P]),
        (config("generator_only", 3), [G, G, G]),
        (config("alternate", 5, 1, 1), [P, G, P, G, P]),
        (config("alternate", 8, 2, 1), [P, P, G, P, P, G, P, P]),
        (config("alternate", 7, 1, 3), [P, G, G, G, P, G, G]),
        (config("alternate", 3, 0, 2), [G, G, G]),
        (config("alternate", 3, 2, 0), [P, P, P]),
        (config("two_phase", 9, 2, 3), [P, P, G, G, G]),  # It takes n_phi + n_theta steps, whatever `steps` is.
        (config("two_phase", 9, 0, 2), [G, G]),
        (config("two_phase", 9, 2, 0), [P, P]),
        (config("joint", 2, n_generator_warmup=1, n_warm_start=2), [W, B, B, J, J]),
        (config("alternate", 3, 1, 1, n_warm_start=2, warm_start="persona"), [T, T, P, G, P]),
        (config("two_phase", 9, 1, 2, n_generator_warmup=2), [W, W, P, G, G]),
        (config("generator_only", 1, n_warm_start=1), [B, G]),
        (config("joint", 2, method="oracle", n_generator_warmup=3, n_warm_start=2), [G] * 5),
    ],
)
def test_order_of_the_steps_by_hand(own, expected):
    assert kinds(own) == expected


@pytest.mark.parametrize("method", ["population", "raw_signals", "zero_shot_summary", "oracle"])
@pytest.mark.parametrize("name", ["joint", "alternate", "two_phase", "inference_only", "generator_only"])
def test_other_methods_train_the_generator_alone(method, name):
    assert kinds(config(name, 4, 1, 1, method)) == [G] * 4


def test_base_trains_nothing():
    own = config("joint", 4, method="base")
    assert kinds(own) == [] and schedule.update_counts(own) == (0, 0) and schedule.step_kinds(own) == set()


@pytest.mark.parametrize("method", ["popi", "population"])
@pytest.mark.parametrize("name", ["joint", "alternate", "two_phase", "inference_only", "generator_only"])
def test_counts_are_those_of_the_steps(name, method):
    for n_phi, n_theta, steps, before in itertools.product(range(4), range(4), range(0, 10, 3), range(3)):
        if n_phi + n_theta == 0:
            continue  # Refused for the schedules that read them.
        own = config(name, steps, n_phi, n_theta, method, n_generator_warmup=before, n_warm_start=2 * before)
        count = collections.Counter(kinds(own))
        phi, theta = count[J] + count[P] + count[B], count[J] + count[G] + count[W]
        assert schedule.update_counts(own) == (phi, theta), own.schedule
        assert schedule.step_kinds(own) == set(count), own.schedule
