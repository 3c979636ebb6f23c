"""The optimizer of both roles: AdamW with linear warm-up, then cosine decay to 0 or a constant rate."""

import optax

from popi_jax.config import Optim


def make_optimizer(optim: Optim, learning_rate: float, clip: float, updates: int) -> optax.GradientTransformation:
    """Returns the optimizer of a role that gets `updates` updates in total. `clip` = 0 disables clipping."""
    warmup = optim.warmup_steps
    first = learning_rate / (warmup + 1)  # The first update has count 0. At rate 0 it would be wasted.
    if optim.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(first, learning_rate, warmup, max(updates, warmup + 1))
    else:
        rate = optax.warmup_constant_schedule(first, learning_rate, warmup)
    adamw = optax.adamw(rate, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw
