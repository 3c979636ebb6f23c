"""AlignX: Reddit users with demographics, comments and preference pairs, with the settings of elix.py.

    python experiments/results_table.py --config=configs/alignx.py --workdir=runs/alignx
    python experiments/results_table.py --config=configs/alignx.py --config.data.variant=DEMO --trained=runs/alignx
        --workdir=runs/alignx_demo

The first command tests on users with any mix of signals, the second evaluates the same runs on another of the four test
sets: DEMO, UGC, PAIR or arbitrary. The arguments are those of elix.py.
"""

import ml_collections

from popi_jax.configs.elix import FIXTURES, SMALL, published


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: "", `lora`, `smoke` or `runlocal`, see elix.py.

    Raises:
        UserError: for any other argument.
    """
    c = published("alignx", arg)
    c.data.variant = "arbitrary"
    c.prompts.layout = "published_alignx"
    if arg in SMALL:
        c.data.test_path = f"{FIXTURES}/alignx_test"
        return c
    c.data.path = "hf://datasets/JinaLeejnl/AlignX"
    c.data.test_path = "hf://datasets/JinaLeejnl/AlignX-test"
    c.prompts.inference_instruction = (
        "Write a concise, well-ordered summary of the user described above, from which another language model could"
        " write comments in this user's place."
    )
    c.prompts.generator_instruction = "Comment on the post below as the user described above would on Reddit."
    return c
