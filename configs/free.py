"""Free-text summaries with SmolLM2-135M-Instruct for both models: one recipe for any data.

    make smollm2
    python experiments/results_table.py --config=configs/free.py --config.data.dataset=traits
        --config.data.path=persona --workdir=runs/free

Only data.dataset and data.path differ between data sets. The instruction names no taste, the model writes a summary of
up to 32 tokens as it likes, and only its own end token ends it. The argument `smoke` (or `runlocal`) makes the same
kinds of steps on stylebook, with the tiny model of quickstart.py.
"""

import ml_collections

from popi_jax.configs import base, check_arg, quickstart
from popi_jax.configs.elix import METHODS, SMALL


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: "", `smoke` or `runlocal`, see above.

    Raises:
        UserError: for any other argument.
    """
    check_arg(arg, "free", *SMALL)
    if arg in SMALL:
        c = quickstart.get_config("runlocal")
        c.name = "free"
        c.schedule.n_generator_warmup, c.schedule.n_warm_start = 1, 1
        c.train.accumulation_inference = 2
        c.objective.relative_reward = True
        return c
    c = base.get_config()
    c.name = "free"
    c.model.path = "checkpoints/SmolLM2-135M-Instruct"
    # model.compute_dtype stays float32: bfloat16 is faster on a CPU with AMX, and far slower on others.
    c.lora.rank = 16
    c.data.dataset = "traits"
    c.data.on_null = "drop"
    c.data.signals_per_user = 4
    # Queries of a user share one copy of the context, so that four take less time than four users with one each.
    c.data.queries_per_user = 4
    c.data.test_queries_per_user = 4
    # Lengths are padded to those of the data; a longer user loses the oldest signals.
    c.limits.signals, c.limits.prompt, c.limits.response, c.limits.bin = 1024, 1152, 384, 512
    c.limits.summary = 32
    c.limits.on_overflow = "drop"
    # With both responses shown, only their labels would tell which one the user likes. Prompts would be longer, too.
    c.prompts.pair_fields = ("chosen",)
    c.prompts.inference_instruction = "In one short sentence, what does this user prefer?"
    c.sampling.k = 8
    c.sampling.k_generator = 1  # The generator's backward pass reads an eighth of the rows.
    c.objective.beta = 0.1
    c.objective.kl_coef = 0.05
    c.objective.relative_reward = True
    # The untrained generator ignores what it is told, and rewards would be noise.
    c.schedule.n_generator_warmup = 60
    c.schedule.n_warm_start = 40
    c.schedule.steps = 20
    c.optim.lr_inference = 4e-4
    c.optim.lr_generator = 1e-3
    c.optim.warmup_steps = 5
    c.train.users_per_step = 8
    # Without micro-batches, activations take more than 16 GiB. They also tell the gradient's signal from its noise.
    c.train.accumulation_inference = 4
    c.train.accumulation_generator = 4
    c.train.checkpoint_every = 10
    c.eval.users_per_batch = 12
    c.eval.summaries_per_user = 1
    c.table.methods = METHODS
    return c
