"""The paper's setting: Llama-3.2-3B-Instruct for both models, on a TPU slice, for users.jsonl of your own.

    python -m popi_jax.main --config=configs/llama3_3b.py:full --config.data.path=users.jsonl --workdir=runs/llama3_3b
    python -m popi_jax.main --config=configs/llama3_3b.py:lora --mode=compile --topology=v5e:4x4

The first needs access to the model on the hub; the second needs nothing, not even the slice. Arguments: `full`
(fine-tuning of both models, the default), `lora`, `runlocal`.
"""

import pathlib

import ml_collections

from configs import base, users

SHAPES = pathlib.Path(__file__).resolve().parent / "shapes"


def get_config(arg: str = "full") -> ml_collections.ConfigDict:
    """Returns the experiment; ValueError for another argument."""
    if arg == "runlocal":
        c = users.get_config(arg)
        c.name = "llama3_3b"
        return c
    if arg not in ("", "full", "lora"):
        raise ValueError(f"llama3_3b: argument {arg!r} is unknown; give full, lora or runlocal")
    c = base.get_config()
    c.name = "llama3_3b"
    c.model.path = "meta-llama/Llama-3.2-3B-Instruct"
    c.model.shape = str(SHAPES / "llama-3.2-3b.json")
    c.model.compute_dtype = "bfloat16"
    c.model.frozen_dtype = "bfloat16"  # As the checkpoint is stored.
    c.model.remat = "full"
    if arg == "lora":
        c.lora.rank = 64
        c.lora.alpha = 64.0
    c.data.dataset = "users"
    c.limits.signals = 8192
    c.limits.summary = 2048
    c.limits.response = 1024
    c.limits.prompt = 4096  # A summary and a question.
    c.limits.bin = 6144  # The longest prompt with its two longest responses.
    c.limits.buckets = (512, 1024, 2048, 4096, 6144, 8192)
    c.sampling.k = 8
    c.objective.beta = 0.01
    c.objective.kl_coef = 2e-3
    c.schedule.steps = 1000
    c.optim.lr_inference = 1e-6
    c.optim.lr_generator = 1e-6
    c.optim.warmup_steps = 150
    if arg == "lora":  # An adapter's entries start from zero: it learns at a higher rate than weights do.
        c.optim.lr_inference = 1e-5
        c.optim.lr_generator = 1e-5
    c.train.users_per_step = 16  # 8 for every 8 devices.
    c.train.accumulation_generator = 8
    c.eval.users_per_batch = 16
    c.eval.temperature = 0.6
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c
