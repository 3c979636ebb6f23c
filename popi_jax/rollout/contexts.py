"""The context about a user that the generator reads, for each method."""

import dataclasses
from collections.abc import Sequence

import jax

from popi_jax.config import SUMMARIZED, Config, Method, StepKind
from popi_jax.data.encoding import Encoder
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example
from popi_jax.errors import UserError, shown
from popi_jax.model.weights import Tree
from popi_jax.rollout import text
from popi_jax.rollout.text import TextSampler


@dataclasses.dataclass(frozen=True)
class Context:
    """What the generator is told of a user (None: nothing). `finished` is False if limits.summary cut it short."""

    told: Told | None
    finished: bool = True

    @property
    def text(self) -> str | None:
        """Its text."""
        return None if self.told is None else self.told.text


def told(method: Method, encoder: Encoder, example: Example) -> Context:
    """The context of a method that draws no summary; UserError if method oracle meets a user without a persona."""
    if method in ("base", "population"):
        return Context(None)
    if method == "oracle":
        if not example.persona:
            raise UserError(
                f"user {shown(example.user)} has no persona, which method oracle shows; add one or leave the user out"
            )
        return Context(Told(example.persona))
    assert method == "raw_signals", f"{method} draws summaries"
    return Context(encoder.raw_signals(example))


def in_training(config: Config, kind: StepKind) -> Method:
    """The method whose contexts the generator is told in a step that draws no summary."""
    if kind != "generator_warmup":
        return config.method
    return "oracle" if config.schedule.generator_warmup == "persona" else "raw_signals"


def of_users(
    config: Config, sampler: TextSampler, phi: Tree | None, examples: Sequence[Example], key: jax.Array
) -> list[list[Context]]:
    """Each user's contexts under config.method: eval.summaries_per_user of them if it draws summaries, else one."""
    if config.method not in SUMMARIZED:
        return [[told(config.method, sampler.encoder, example)] for example in examples]
    delta = None if config.method == "zero_shot_summary" else phi
    order = sorted(range(len(examples)), key=lambda i: len(sampler.encoder.signals(examples[i])))
    out: list[list[Context]] = [[] for _ in examples]
    sampling = text.in_use(config)
    for batch, start in enumerate(range(0, len(order), sampling.batch_size)):
        part = order[start : start + sampling.batch_size]
        drawn = sampler.summaries(
            delta,
            [examples[i] for i in part],
            jax.random.fold_in(key, batch),
            sampling,
            k=config.eval.summaries_per_user,
        )
        for i, texts, finished in zip(part, drawn.texts_UxK, drawn.finished_UxK.tolist(), strict=True):
            out[i] = [Context(Told(own), ended) for own, ended in zip(texts, finished, strict=True)]
    return out
