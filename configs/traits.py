"""Traits: users with two traits, who prefer statements that fit them, with SmolLM2-135M-Instruct for both models.

    make smollm2
    python experiments/results_table.py --config=configs/traits.py --config.data.path=persona --workdir=runs/traits

The data are the folder `persona` of the repository anthropics/evals. The argument `smoke` (or `runlocal`) takes the
tiny model of quickstart.py and a few statements in the same format. --config.data.unseen=topics tests on traits that
no training user has.
"""

import ml_collections

from configs import check_arg, psoups_smollm2, quickstart
from configs.base import get_config as base_config
from configs.elix import METHODS, SMALL, shrink


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: "", `smoke` or `runlocal`, see above.

    Raises:
        UserError: for any other argument.
    """
    c = small_model("traits", arg)
    c.data.traits_per_user = (2,)
    c.data.test_fraction = 0.3
    if arg in SMALL:
        return c
    c.data.train_users = 640
    c.data.test_users = 300
    c.data.test_queries_per_user = 4
    c.limits.signals, c.limits.prompt, c.limits.response, c.limits.bin = 320, 384, 64, 384
    return c


def small_model(name: str, arg: str) -> ml_collections.ConfigDict:
    """Returns the settings for SmolLM2-135M-Instruct, with free-text summaries.

    Args:
        name: of the config and of its data set.
        arg: see `get_config`.
    """
    check_arg(arg, name, *SMALL)
    c = quickstart.get_config("runlocal") if arg in SMALL else psoups_smollm2.get_config()
    c.name = name
    c.data.dataset = name
    c.data.on_null = "drop"
    c.data.signals_per_user = 4
    c.limits.on_overflow = "drop"
    if arg in SMALL:
        shrink(c)
        return c
    c.table.methods = METHODS
    c.prompts.update(base_config().prompts)
    c.limits.summary = 32
    c.limits.buckets = ()
    c.sampling.temperature = 1.0
    c.objective.kl_coef = 0.05
    c.schedule.name = "joint"
    c.schedule.steps = 80
    c.optim.lr_inference = 2e-4
    c.eval.temperature = 0.6
    return c
