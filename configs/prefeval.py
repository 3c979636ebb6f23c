"""PrefEval: users with one stated preference each, which their choices and dialogues show, with SmolLM2-135M-Instruct.

    make smollm2
    python experiments/results_table.py --config=configs/prefeval.py --config.data.path=benchmark_dataset
        --workdir=runs/prefeval

The data are the folder `benchmark_dataset` of the repository amazon-science/PrefEval (CC BY-NC 4.0). The argument
`smoke` (or `runlocal`) takes the tiny model of quickstart.py and a few users in the same format.
--config.data.unseen=topics tests on topics that no training user has.
"""

import ml_collections

from popi_jax.configs.traits import small_model


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: "", `smoke` or `runlocal`, see above.

    Raises:
        UserError: for any other argument.
    """
    c = small_model("prefeval", arg)
    c.data.queries_per_user = 3
    c.data.test_queries_per_user = 3
    return c
