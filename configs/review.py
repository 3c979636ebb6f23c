"""Review: film reviews, positive or negative, concise or verbose, with the settings of elix.py.

    python experiments/results_table.py --config=configs/review.py --workdir=runs/review

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
    c = published("review", arg)
    if arg not in SMALL:
        c.data.path = "hf://datasets/Asap7772/steered_reviews_full_autolabel_gpt4o_pref"
    return c
