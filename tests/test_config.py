"""Settings and what they name: the same keys as configs/base.py, the same choices as the registries."""

import typing

import pytest

from popi_jax import config as settings
from popi_jax.config import Config, Section
from popi_jax.configs import base
from popi_jax.data import layouts
from popi_jax.model import kernels, remat
from popi_jax.model.config import LORA_TARGETS
from popi_jax.model.lora import INPUT_DIMS
from popi_jax.training import objective, steps


def choices(section, field):
    """The values that a field takes; of a tuple, those of its elements."""
    annotation = section.model_fields[field].annotation
    if typing.get_origin(annotation) is tuple:
        annotation, _ = typing.get_args(annotation)
    return typing.get_args(annotation)


@pytest.mark.parametrize(
    ("section", "field", "registry"),
    [
        (settings.Objective, "loss", objective.LOSSES),
        (settings.Objective, "advantage", objective.ADVANTAGES),
        (settings.Objective, "kl", objective.KL_ESTIMATORS),
        (settings.Objective, "logp_reduction", objective.LOGP_REDUCTIONS),
        (settings.Model, "remat", remat.CHOICES),
        (settings.Model, "attention", kernels.CHOICES),
        (settings.Lora, "targets", LORA_TARGETS),
        (settings.Lora, "targets", INPUT_DIMS),
        (settings.Prompts, "pair_fields", layouts.PAIR_FIELDS),
    ],
)
def test_choices_equal_their_registry(section, field, registry):
    assert choices(section, field) == tuple(registry)


def test_every_kind_of_step_has_a_function():
    assert typing.get_args(settings.StepKind) == tuple(steps.STEPS)


def keys(section, prefix=""):
    """The path of every setting of a section class."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def keys_of_base(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from keys_of_base(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_settings_and_base_have_the_same_keys():
    assert sorted(keys(Config)) == sorted(keys_of_base(base.get_config().to_dict()))
