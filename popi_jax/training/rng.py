"""All JAX randomness: one key per stream and step of a run, so that a restart repeats the same draws."""

import jax

# Do not reorder: the index of a name is part of each of its keys.
STREAMS = ("init", "sample", "queries", "evaluate", "respond", "personalize", "round_phi", "round_theta", "withhold")


def stream_key(seed: int, stream: str, step: int | jax.Array) -> jax.Array:
    """Returns fold_in(fold_in(key(seed), stream), step)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream)), step)
