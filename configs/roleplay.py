"""Roleplay: questions asked by many personas, eight signals each, with the settings of elix.py.

    python experiments/results_table.py --config=configs/roleplay.py --workdir=runs/roleplay

The arguments are those of elix.py.
"""

import ml_collections

from popi_jax.configs.elix import SMALL, published


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: "", `lora`, `smoke` or `runlocal`, see elix.py.

    Raises:
        UserError: for any other argument.
    """
    c = published("roleplay", arg)
    c.data.signals_per_user = 8
    if arg not in SMALL:
        c.data.path = "hf://datasets/sher222/persona-iterative-responses"
    return c
