"""POPI in minutes: stylebook, and the tiny base model that ships with the package (0.2 million weights).

    make quickstart

The whole table takes ten minutes on two cores of a server CPU in float32; experiments/results/quickstart has it. The
argument `runlocal` shrinks the experiment to under a minute.
"""

import ml_collections

from popi_jax.configs import base, check_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: "" or `runlocal`, see above.

    Raises:
        UserError: for any other argument.
    """
    check_arg(arg, "quickstart", "runlocal")
    c = base.get_config()
    c.name = "quickstart"

    c.data.signals_per_user = 5
    c.data.train_users = 1600
    c.data.test_users = 192
    c.data.queries_per_user = 2
    c.data.test_queries_per_user = 4

    c.limits.signals = 256
    c.limits.prompt = 272
    c.limits.response = 32
    c.limits.summary = 24
    c.limits.bin = 256
    c.limits.buckets = (32, 56, 256, 320)  # They fit the lengths of stylebook's texts.
    c.prompts.inference_instruction = "In one sentence, what does this reader like?"
    c.prompts.generator_instruction = "Answer as this reader likes."

    c.sampling.k = 6
    c.sampling.k_generator = 1  # The generator's backward pass reads a sixth of the rows.
    c.objective.beta = 1.0  # The base model's log-odds are already close to those of stylebook.
    c.objective.kl_coef = 0.03  # With 0.01 the summaries become short before they become right.
    c.schedule.steps = 80
    c.optim.lr_inference = 4e-4
    c.optim.lr_generator = 2.5e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 5
    c.train.users_per_step = 20
    c.train.checkpoint_every = 50
    c.eval.users_per_batch = 64
    c.eval.summaries_per_user = 2
    c.eval.response_tokens = 32
    if arg == "runlocal":
        c.data.train_users = 16
        c.data.test_users = 8
        c.data.test_queries_per_user = 2
        c.schedule.steps = 3
        c.train.users_per_step = 4
        c.train.checkpoint_every = 2
        c.eval.samples = 2
    return c
