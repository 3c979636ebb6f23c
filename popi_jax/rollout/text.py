"""Draws text: summaries of users, responses to prompts.

The two models are joined by text: a sampled summary is decoded, and the generator's prompt is tokenized afresh with it,
exactly as a user of the trained pair would do.
Shapes: U users, K summaries each, S tokens of a summary at most; B prompts, N texts each, T prompt length.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from popi_jax.config import Config
from popi_jax.data import packing
from popi_jax.data.encoding import Encoder
from popi_jax.data.schema import Example
from popi_jax.data.shapes import Shapes
from popi_jax.model import sharding
from popi_jax.model.weights import Tree
from popi_jax.rollout import sampler


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How text is drawn, for at most `batch_size` prompts at a time (every batch is padded to as many)."""

    temperature: float
    top_p: float
    batch_size: int


def in_training(config: Config) -> Sampling:
    """From the whole distribution, as REINFORCE needs it."""
    return Sampling(config.sampling.temperature, 1.0, config.train.users_per_step)


def in_use(config: Config) -> Sampling:
    """As config.eval says: for evaluation, and for everything that a trained run is used for."""
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


@dataclasses.dataclass(frozen=True)
class TextSampler:
    """Draws text with the base model and an adapter.

    Attributes:
        sample: programs.sample, the compiled `sampler.draw`.
        base: the frozen weights.
        encoder: its tokenizer gives the ids that end a text.
        shapes: what prompts are padded to.
    """

    sample: Callable[..., sampler.Samples]
    base: Tree
    encoder: Encoder
    shapes: Shapes

    def draw(
        self,
        delta: Tree | None,
        prefixes: Sequence[list[int]],
        key: jax.Array,
        sampling: Sampling,
        *,
        branches: int,
        max_tokens: int,
        start: str = "",
        more_stop_ids: tuple[int, ...] = (),
    ) -> Drawn:
        """Draws `branches` texts after each prompt.

        `start` is how the prompts end that belongs to the text: the returned texts begin with it, the samples do not.
        `more_stop_ids` end a text, and belong to it, beside the tokens that always do.
        """
        tokenizer, mesh = self.encoder.tokenizer, self.shapes.mesh
        shape = self.shapes.lines(sampling.batch_size, max(map(len, prefixes)))
        lines = packing.pad_rows(prefixes, shape, tokenizer.pad_id)
        samples = self.sample(
            self.base,
            delta,
            *jax.device_put(lines, sharding.batch_sharding(mesh)),
            jax.device_put(key, sharding.replicated(mesh)),
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

    def summaries(
        self, phi: Tree | None, examples: Sequence[Example], key: jax.Array, sampling: Sampling, *, k: int
    ) -> Drawn:
        """Draws K summaries z ~ q_phi(.|s) for each user; phi None is the untrained inference model q_0."""
        return self.draw(
            phi,
            [self.encoder.signals(example) for example in examples],
            key,
            sampling,
            branches=k,
            max_tokens=self.encoder.limits.summary,
            start=self.encoder.prompts.summary_start,
            more_stop_ids=self.encoder.summary_stop(),
        )
