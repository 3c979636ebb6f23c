"""Samples text: summaries of users and responses to prompts.

Text connects the two models. A sampled summary is decoded, and the generator's prompt is tokenised again with it, just
as in use of the trained pair. Shape letters: docs/architecture.md.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from popi_jax.config import Config
from popi_jax.data import packing
from popi_jax.data.encoding import Encoder
from popi_jax.data.schema import Example
from popi_jax.data.shapes import Shapes
from popi_jax.errors import UserError
from popi_jax.model import sharding
from popi_jax.model.weights import Tree
from popi_jax.rollout import sampler


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Every batch is padded to `batch_size` prompts, the most that are sampled together."""

    temperature: float
    top_p: float
    batch_size: int


def in_training(config: Config) -> Sampling:
    """Samples from the full distribution, as REINFORCE requires."""
    return Sampling(config.sampling.temperature, 1.0, config.train.users_per_step)


def in_use(config: Config) -> Sampling:
    """Samples as config.eval says, for evaluation and every use of a trained run."""
    return Sampling(config.eval.temperature, config.eval.top_p, config.eval.users_per_batch)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """K summaries for each of U users, and the inputs of the inference step. Rows beyond U are padding. All numpy."""

    texts_UxK: list[list[str]]
    prefix_BxT: np.ndarray
    prefix_length_B: np.ndarray
    samples: sampler.Samples

    @property
    def finished_UxK(self) -> np.ndarray:
        """False for summaries that limits.summary cut short."""
        return np.asarray(self.samples.finished_BxN)[: len(self.texts_UxK)]


@dataclasses.dataclass(frozen=True)
class TextSampler:
    """Draws text with the base model and an adapter.

    Attributes:
        sample: programs.sample, the compiled `sampler.draw`.
        base: the frozen weights.
        encoder: encodes users; its tokenizer has the ids that end a text.
        shapes: the lengths and batch sizes to pad prompts to.
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
        """Draws `branches` texts after each prompt, with one key or with one for each prompt.

        `start` is the end of the prompts that belongs to the text: returned texts begin with it, samples do not.
        `more_stop_ids` also end a text, in addition to the tokenizer's stop ids, and are part of it.
        """
        tokenizer, mesh = self.encoder.tokenizer, self.shapes.mesh
        shape = self.shapes.lines(sampling.batch_size, max(map(len, prefixes)))
        lines = packing.pad_rows(prefixes, shape, tokenizer.pad_id)
        if key.ndim:  # Padding gets the last prompt's.
            key = key[np.minimum(np.arange(shape[0]), len(prefixes) - 1)]
        samples = self.sample(
            self.base,
            delta,
            *jax.device_put(lines, sharding.batch_sharding(mesh)),
            key,
            branches=branches,
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_ids=tokenizer.stop_ids + more_stop_ids,
            pad_id=tokenizer.pad_id,
        )
        samples = sharding.to_host(samples)
        if not np.isfinite(samples.logp_BxNxS).all():
            raise UserError(
                "log-probabilities of sampled tokens are not finite; the weights have values that are not finite, or"
                " model.compute_dtype is too narrow for them"
            )
        texts = [
            [
                (start + tokenizer.decode(samples.tokens_BxNxS[b, n, : samples.length_BxN[b, n]].tolist())).strip()
                for n in range(branches)
            ]
            for b in range(len(prefixes))
        ]
        return Drawn(texts, *lines, samples)

    def personas(self, examples: Sequence[Example], sampling: Sampling) -> Drawn:
        """Returns the users' personas in the form of drawn summaries, for the inference model to imitate."""
        prefixes = [self.encoder.signals(example) for example in examples]
        shape = self.shapes.lines(sampling.batch_size, max(map(len, prefixes)))
        lines = packing.pad_rows(prefixes, shape, self.encoder.tokenizer.pad_id)
        B, S = len(lines[0]), self.encoder.limits.summary
        tokens_BxNxS = np.full((B, 1, S), self.encoder.tokenizer.pad_id, np.int32)
        length_BxN = np.zeros((B, 1), np.int32)
        for b, example in enumerate(examples):
            ids = self.encoder.summary(example)
            tokens_BxNxS[b, 0, : len(ids)], length_BxN[b] = ids, len(ids)
        of_numpy: Any = (tokens_BxNxS, length_BxN, np.zeros((B, 1, S), np.float32), length_BxN > 0)
        return Drawn([[example.persona] for example in examples], *lines, sampler.Samples(*of_numpy))

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
