"""The one source of randomness in JAX: a key for each stream and step of a run, so that a restart replays it."""

import jax

# In this order for good: the place of a name is part of every key.
STREAMS = ("init", "sample", "queries", "evaluate", "respond", "personalize", "round_phi", "round_theta")


def stream_key(seed: int, stream: str, step: int | jax.Array) -> jax.Array:
    """fold_in(fold_in(key(seed), stream), step)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream)), step)
