"""Schedules by enumeration: the kind of every step by hand, and the counts that follow from it."""

import collections
import itertools

import pytest

from configs import base
from popi_jax.config import changed, parse
from popi_jax.training import schedule

CONFIG = parse(base.get_config())
J, P, G = "joint", "inference", "generator"


def config(name="joint", steps=0, n_phi=0, n_theta=0, method="popi"):
    keys = {"name": name, "steps": steps, "n_phi": n_phi, "n_theta": n_theta}
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
    for n_phi, n_theta, steps in itertools.product(range(4), range(4), range(10)):
        if n_phi + n_theta == 0:
            continue  # Refused for the schedules that read them.
        own = config(name, steps, n_phi, n_theta, method)
        count = collections.Counter(kinds(own))
        assert schedule.update_counts(own) == (count[J] + count[P], count[J] + count[G]), own.schedule
        assert schedule.step_kinds(own) == set(count), own.schedule
