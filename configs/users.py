"""POPI on your own data: one user a line of users.jsonl (see README.md), SmolLM2-135M-Instruct for both models.

    make smollm2
    python -m popi_jax.main --config=configs/users.py --config.data.path=users.jsonl --workdir=runs/users

The settings are those of psoups_smollm2.py, but for what suits its data alone: here all signals are shown, and nothing
says what a summary is about. Longer signals or responses need higher config.limits.
"""

import ml_collections

from configs import base, psoups_smollm2, quickstart

EXAMPLE = "experiments/users_example.jsonl"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; `runlocal` takes the tiny model of quickstart and twelve made-up users."""
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
