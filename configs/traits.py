"""Traits: users with two traits, who prefer statements that fit them, with SmolLM2-135M-Instruct for both models.

    make smollm2
    python experiments/results_table.py --config=configs/traits.py --config.data.path=persona --workdir=runs/traits

The recipe is that of configs/free.py. The data are the folder `persona` of the repository anthropics/evals.
--config.data.unseen=topics tests on traits that no training user has. The argument `smoke` (or `runlocal`) takes the
tiny model of quickstart.py and a few statements in the same format.
"""

import ml_collections

from popi_jax.configs import check_arg, free, quickstart
from popi_jax.configs.elix import SMALL, shrink


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: "", `smoke` or `runlocal`, see above.

    Raises:
        UserError: for any other argument.
    """
    return small_model("traits", arg)


def small_model(name: str, arg: str) -> ml_collections.ConfigDict:
    """Returns the settings of configs/free.py for a data set, or those of the benchmarks' smoke tests.

    Args:
        name: of the config and of its data set.
        arg: see `get_config`.
    """
    check_arg(arg, name, *SMALL)
    if arg not in SMALL:
        c = free.get_config()
        c.name = c.data.dataset = name
        return c
    c = quickstart.get_config("runlocal")
    c.name = c.data.dataset = name
    c.data.on_null = "drop"
    c.data.signals_per_user = 4
    c.limits.on_overflow = "drop"
    shrink(c)
    return c
