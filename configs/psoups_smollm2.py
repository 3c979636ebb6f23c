"""POPI on P-Soups (schoolchild or PhD student), with SmolLM2-135M-Instruct for both models.

    make smollm2
    python -m popi_jax.main --config=configs/psoups_smollm2.py --config.data.path=student_phd.json --workdir=runs/psoups

Training takes an hour and a half to two hours on two cores in float32, depending on what else runs there;
experiments/results/psoups_smollm2 has the results. The argument `eight_signals` shows eight signals of each user
instead of four, for evaluating a trained pair. `runlocal` makes the same kinds of steps on stylebook in a minute.
"""

import ml_collections

from popi_jax.configs import base, check_arg, quickstart


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: "", `eight_signals` or `runlocal`, see above.

    Raises:
        UserError: for any other argument.
    """
    check_arg(arg, "psoups_smollm2", "eight_signals", "runlocal")
    if arg == "runlocal":
        c = quickstart.get_config("runlocal")
        c.name = "psoups_smollm2"
        c.lora.rank = 4
        c.lora.targets = ("q", "v")
        c.schedule.name, c.schedule.n_phi, c.schedule.n_theta = "two_phase", 1, 2
        return c
    c = base.get_config()
    c.name = "psoups_smollm2"
    c.model.path = "checkpoints/SmolLM2-135M-Instruct"
    # model.compute_dtype stays float32: bfloat16 is faster on a CPU with AMX, and far slower on others.
    c.lora.rank = 16
    c.lora.targets = ("q", "v")
    c.data.dataset = "psoups"
    c.data.path = ""  # To be given on the command line: the data does not come with this package.
    c.data.protocol = "disjoint"
    c.data.signals_per_user = 4
    c.data.train_draws = 8
    c.limits.signals = 384
    c.limits.prompt = 768
    c.limits.response = 384
    c.limits.on_overflow = "drop"
    c.limits.summary = 10
    c.limits.bin = 384
    c.limits.buckets = (48, 96, 384, 512, 640, 768, 1024)
    # The two responses of a pair are of opposite styles. With both shown, only their labels would tell which style the
    # user likes, and that is hard to learn for a model of this size.
    c.prompts.pair_fields = ("chosen",)
    # With this instruction, the untrained model gives either of the two answers about equally often, whoever the user
    # is. REINFORCE can only strengthen what is sampled. A user's K summaries are then few different texts, and each
    # text is scored only once.
    c.prompts.inference_instruction = (
        "Does this user want answers in the technical language of scientists?"
        " Or does this user want answers in the simple language of children?"
    )
    c.prompts.summary_start = "This user wants answers in the"
    c.prompts.summary_stop = "."
    c.sampling.k = 8
    c.sampling.k_generator = 1
    # Below 1, fewer of the sampled summaries are texts that occur only once.
    c.sampling.temperature = 0.7
    c.objective.beta = 0.1
    # Much lower, and one of the two answers wins for all users before the model learns to read the signals.
    c.objective.kl_coef = 0.3
    # The generator starts once the summaries are right, because it learns to ignore summaries of which half are wrong.
    # It sees the data once, because the second time it knows the prompts by heart.
    c.schedule.name = "two_phase"
    c.schedule.n_phi = 88
    c.schedule.n_theta = 56
    c.schedule.steps = 56  # For the other methods: as many updates of the generator.
    c.optim.lr_inference = 7e-4
    c.optim.lr_generator = 4e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 5
    c.train.users_per_step = 8
    c.train.checkpoint_every = 8
    c.eval.users_per_batch = 12
    c.eval.summaries_per_user = 1
    c.eval.temperature = 0.0  # One summary per user: the most likely tokens.
    if arg == "eight_signals":
        c.data.signals_per_user = 8
        c.limits.signals = 1024
        c.limits.prompt = 1536
        c.limits.buckets = (48, 96, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
    return c
