"""The paper's setting: Llama-3.2-3B-Instruct for both models, on a TPU slice, with your own users.jsonl.

    python -m popi_jax.main --config=configs/llama3_3b.py:full --config.data.path=users.jsonl --workdir=runs/llama3_3b
    python -m popi_jax.main --config=configs/llama3_3b.py:lora --mode=compile --topology=v5e:4x4

The first command needs access to the model on the hub. The second needs neither the model nor the slice. The argument
is `full` (both models are fine-tuned in full; the default), `lora` (an adapter per model) or `runlocal` (the same as
users.py:runlocal, in under a minute).
"""

import pathlib

import ml_collections

from popi_jax.configs import base, check_arg, users

ARGS = ("full", "lora", "runlocal")
SHAPES = pathlib.Path(__file__).resolve().parent / "shapes"


def get_config(arg: str = "full") -> ml_collections.ConfigDict:
    """Returns the experiment.

    Args:
        arg: one of ARGS, see above; "" is `full`.

    Raises:
        UserError: for any other argument.
    """
    check_arg(arg, "llama3_3b", *ARGS)
    if arg == "runlocal":
        c = users.get_config(arg)
        c.name = "llama3_3b"
        return c
    c = base.get_config()
    c.name = "llama3_3b"
    c.model.path = "meta-llama/Llama-3.2-3B-Instruct"
    c.model.shape = str(SHAPES / "llama-3.2-3b.json")
    c.model.compute_dtype = "bfloat16"
    c.model.frozen_dtype = "bfloat16"  # The type that the checkpoint is stored in.
    c.model.remat = "full"
    if arg == "lora":
        c.lora.rank = 64
        c.lora.alpha = 64.0
    c.data.dataset = "users"
    c.limits.signals = 8192
    c.limits.summary = 2048
    c.limits.response = 1024
    c.limits.prompt = 4096  # A summary and a question with the text around them.
    c.limits.bin = 6144  # The longest prompt with its two longest responses.
    c.limits.buckets = (512, 1024, 2048, 4096, 6144, 8192)
    c.sampling.k = 8
    c.objective.beta = 0.01
    c.objective.kl_coef = 2e-3
    c.schedule.steps = 1000
    c.optim.lr_inference = 1e-6
    c.optim.lr_generator = 1e-6
    c.optim.warmup_steps = 150
    if arg == "lora":  # An adapter starts from zero and can learn at a higher rate than the weights themselves.
        c.optim.lr_inference = 1e-5
        c.optim.lr_generator = 1e-5
    c.train.users_per_step = 16  # One user per device of a slice of 16.
    c.train.accumulation_generator = 8
    c.eval.users_per_batch = 16
    c.eval.temperature = 0.6
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c
