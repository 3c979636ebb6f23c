"""Draws text: summaries of users, responses to prompts.

The two models are joined by text: a sampled summary is decoded, and the generator's prompt is tokenised afresh with it,
exactly as a user of the trained pair would do.
Shapes: U users, K summaries each, S tokens of a summary at most; B prompts, N texts each, T prompt length.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from popi_jax.data import packing
from popi_jax.data.schema import Example
from popi_jax.model import sharding
from popi_jax.model.policy import Policy
from popi_jax.modes.setup import System
from popi_jax.rollout import sampler


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How text is drawn, for at most `rows` prompts at a time (the batches are padded to as many)."""

    temperature: float
    top_p: float
    rows: int


def in_training(config: ml_collections.ConfigDict) -> Sampling:
    """From the whole distribution, as REINFORCE needs it."""
    return Sampling(config.sampling.temperature, 1.0, config.train.users_per_step)


def in_use(config: ml_collections.ConfigDict) -> Sampling:
    """As config.eval has it: evaluation, and everything that a trained run is used for."""
    return Sampling(config.eval.temperature, config.eval.top_p, config.eval.users_per_batch)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Summaries of U users, K each, with what the inference step needs; rows beyond U are padding. All numpy."""

    texts_UxK: list[list[str]]
    prefix_BxT: np.ndarray
    prefix_length_B: np.ndarray
    samples: sampler.Samples

    @property
    def finished_UxK(self) -> np.ndarray:
        """False where limits.summary cut a summary short."""
        return np.asarray(self.samples.finished_BxN)[: len(self.texts_UxK)]


def draw(base, delta, prompt_BxT, prompt_length_B, key, *, policy: Policy, **options) -> sampler.Samples:
    """What is jitted to draw text: `sampler.sample`, from weights."""
    return sampler.sample(policy.bind(base, delta), prompt_BxT, prompt_length_B, key, **options)


@functools.cache
def _jitted(mesh: jax.sharding.Mesh) -> Any:
    static = ("policy", "branches", "max_tokens", "temperature", "top_p", "stop_ids", "pad_id")
    return jax.jit(draw, static_argnames=static, compiler_options=sharding.compiler_options(mesh))


def draw_text(
    system: System,
    delta,
    prefixes: Sequence[list[int]],
    key: jax.Array,
    sampling: Sampling,
    *,
    branches: int,
    max_tokens: int,
    start: str = "",
    more_stop_ids: tuple[int, ...] = (),
) -> Drawn:
    """Draws `branches` texts after each prompt with the base model and this adapter.

    `start` is what the prompts end with of the text itself: the texts that are returned have it, the samples do not.
    `more_stop_ids` end a text, and belong to it, beside the tokens that always do.
    """
    tokenizer = system.tokenizer
    rows = padded_rows(system, sampling.rows)
    lines = packing.pad_rows(prefixes, system.buckets, tokenizer.pad_id, rows)
    samples = _jitted(system.mesh)(
        system.base,
        delta,
        *jax.device_put(lines, sharding.batch_sharding(system.mesh)),
        key,
        policy=system.policy,
        branches=branches,
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop_ids=tokenizer.stop_ids + more_stop_ids,
        pad_id=tokenizer.pad_id,
    )
    samples = sharding.to_host(samples)
    texts = [
        [
            (start + tokenizer.decode(samples.tokens_BxNxS[b, n, : samples.length_BxN[b, n]].tolist())).strip()
            for n in range(branches)
        ]
        for b in range(len(prefixes))
    ]
    return Drawn(texts, *lines, samples)


def draw_summaries(
    system: System, phi, examples: Sequence[Example], key: jax.Array, sampling: Sampling, *, k: int
) -> Drawn:
    """Draws K summaries z ~ q_phi(.|s) for each user; phi None is the untrained inference model q_0."""
    return draw_text(
        system,
        phi,
        [system.encoder.signals(example) for example in examples],
        key,
        sampling,
        branches=k,
        max_tokens=system.config.limits.summary,
        start=system.config.prompts.summary_start,
        more_stop_ids=system.encoder.summary_stop(),
    )


def padded_rows(system: System, rows: int) -> int:
    """How many rows a batch of `rows` has room for: as many on every device."""
    return packing.round_up(rows, sharding.row_shards(system.mesh))
