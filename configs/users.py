"""POPI on your own data: a users.jsonl with one user per line, SmolLM2-135M-Instruct for both models.

    make smollm2
    python -m popi_jax.main --config=configs/users.py --config.data.path=users.jsonl --workdir=runs/users

The settings are those of psoups_smollm2.py, except those that suit its data alone: here the inference model sees all
signals in full, and its instruction does not say what a summary should be about. Longer signals or responses need
higher config.limits. The argument `runlocal` takes the tiny model of quickstart.py and a dozen made-up users instead.
"""

import pathlib

import ml_collections

import popi_jax
from popi_jax.configs import base, check_arg, psoups_smollm2, quickstart

EXAMPLE = str(pathlib.Path(popi_jax.__file__).parent / "assets/examples/users.jsonl")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: "" or `runlocal`, see above.

    Raises:
        UserError: for any other argument.
    """
    check_arg(arg, "users", "runlocal")
    if arg == "runlocal":
        c = quickstart.get_config(arg)
    else:
        c = psoups_smollm2.get_config(arg)
        c.prompts.update(base.get_config().prompts)
        c.limits.summary = 48
        c.limits.on_overflow = "error"
    c.name = "users"
    c.data.dataset = "users"
    c.data.path = EXAMPLE if arg == "runlocal" else ""
    c.data.train_users = 0
    c.data.test_users = 0
    return c
