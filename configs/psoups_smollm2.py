"""POPI on real input: SmolLM2-135M-Instruct for both models, P-Soups (schoolchild or PhD student).

    make smollm2
    python -m popi_jax.main --config=configs/psoups_smollm2.py --config.data.path=student_phd.json --workdir=runs/psoups

Training takes an hour and a half to two hours on two cores in float32, by what runs beside it;
experiments/results/psoups_smollm2 has the results. The argument `eight_signals` shows eight signals of each user
instead of four, to evaluate the trained pair with.
"""

import ml_collections

from configs import base, quickstart


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the experiment; ValueError for an unknown argument.

    Args:
        arg: `runlocal` makes the same kinds of steps on the embedded world and model in a minute; `eight_signals`, see
            above.
    """
    if arg not in ("", "runlocal", "eight_signals"):
        raise ValueError(f"psoups_smollm2: argument {arg!r} is unknown; give eight_signals or runlocal")
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
    # float32 by default: on a CPU with bfloat16 matrix instructions (AMX) "bfloat16" is faster, on others far slower.
    c.lora.rank = 16
    c.lora.targets = ("q", "v")
    c.data.dataset = "psoups"
    c.data.path = "../shared/data/psoups/student_phd.json"
    c.data.signals = "disjoint"
    c.data.signals_per_user = 4
    c.data.train_draws = 8
    c.limits.signals = 384
    c.limits.prompt = 768
    c.limits.response = 384
    c.limits.on_overflow = "drop"
    c.limits.summary = 10
    c.limits.bin = 384
    c.limits.buckets = (48, 96, 384, 512, 640, 768, 1024)
    # Both responses are of opposite styles, so that with both shown only their labels tell the user's: hard at 135M.
    c.prompts.pair_fields = ("chosen",)
    # Before training, the model copies out one answer or the other, about as often, for every user: REINFORCE finds
    # what is drawn often, and a user's K summaries are few different texts, each scored once.
    c.prompts.inference_instruction = (
        "Does this user want answers in the technical language of scientists?"
        " Or does this user want answers in the simple language of children?"
    )
    c.prompts.summary_start = "This user wants answers in the"
    c.prompts.summary_stop = "."
    c.sampling.k = 8
    c.sampling.k_generator = 1
    # Sharper than the model: less of what is drawn is a text of its own, to be scored once and never again.
    c.sampling.temperature = 0.7
    c.objective.beta = 0.1
    # Weighed against a loss in nats / beta. Far lower, one answer wins for all users before the signals are read.
    c.objective.kl_coef = 0.3
    # The generator learns only once summaries are right: where half of them are wrong it learns to pass them over, and
    # a second time through the data it knows the prompts by heart.
    c.schedule.name = "two_phase"
    c.schedule.n_phi = 88
    c.schedule.n_theta = 56
    c.schedule.steps = 56  # Of the other methods: as many updates of the generator, once through the data.
    c.optim.lr_inference = 7e-4
    c.optim.lr_generator = 4e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 5
    c.train.users_per_step = 8
    c.train.checkpoint_every = 8
    c.eval.users_per_batch = 12
    c.eval.summaries_per_user = 1
    c.eval.temperature = 0.0  # A summary is inferred once: the likeliest.
    if arg == "eight_signals":
        c.data.signals_per_user = 8
        c.limits.signals = 1024
        c.limits.prompt = 1536
        c.limits.buckets = (48, 96, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
    return c
