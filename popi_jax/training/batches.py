"""Makes the Batch of a train step: draws the summaries that it needs and lays out the rows of both models.

There are R = U * K * M rows, in the order (user, summary, query). Shape letters: docs/architecture.md.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from popi_jax.config import SUMMARIZED, Config, StepKind
from popi_jax.data import files
from popi_jax.data.batch import Batch, GeneratorBatch, InferenceBatch, PrefixBatch
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example, Query
from popi_jax.data.shapes import Measured, Shapes, shardings_of
from popi_jax.errors import UserError, shown
from popi_jax.model.weights import Tree
from popi_jax.rollout import contexts, text
from popi_jax.rollout.pairs import Item, Packer, PairScorer, Planted
from popi_jax.rollout.references import References, reference_item
from popi_jax.rollout.text import Drawn, TextSampler
from popi_jax.training import rewards
from popi_jax.training.rng import STREAMS, stream_key

# The fields of each line of written_summaries.jsonl.
_WRITTEN = {"user": str, "summary": str, "finished": bool, "step": int}


class WrittenSummaries:
    """One summary per example, drawn once and kept in a file. The second phase of two_phase trains on them.

    Args:
        path: the file.
        start: the step that the run resumes from. Summaries of later steps are drawn again; None keeps all.
        digest: the `digest` at that step, as the checkpoint has it.
    """

    def __init__(self, path: pathlib.Path, start: int | None = None, digest: str | None = None):
        self._path = path
        text = path.read_bytes() if path.exists() else b"\n"
        if not text.endswith(b"\n"):  # A kill or a full disk left an incomplete line.
            files.write_text(path, text[: text.rfind(b"\n") + 1].decode(errors="replace"))
        remedy = "restore the file, or choose another --workdir"
        there = list(files.numbered_objects(path, remedy, remedy)) if path.exists() else []
        for number, entry in there:
            wrong = next((name for name, kind in _WRITTEN.items() if type(entry.get(name)) is not kind), None)
            if wrong is not None:
                raise UserError(
                    f"{path}:{number}: damaged, or written by another version: {wrong} is {shown(entry.get(wrong))};"
                    f" {remedy}"
                )
        entries = [{name: entry[name] for name in _WRITTEN} for _, entry in there]
        later = [start is not None and entry["step"] >= start for entry in entries]
        kept = [entry for entry, drop in zip(entries, later, strict=True) if not drop]
        self._known = {entry["user"]: entry for entry in kept}
        if digest is not None and self.digest() != digest:
            raise UserError(
                f"{path}: these are not the summaries that the checkpoint of step {start} was trained on; restore the"
                " file, or choose another --workdir"
            )
        if len(kept) < len(entries):
            files.write_jsonl(path, kept)

    def digest(self) -> str:
        """Returns a hash of all summaries, for the checkpoint."""
        return hashlib.sha256(json.dumps(list(self._known.values())).encode()).hexdigest()

    def contexts(
        self,
        sampler: TextSampler,
        phi: Tree,
        examples: Sequence[Example],
        key: jax.Array,
        sampling: text.Sampling,
        step: int,
    ) -> tuple[list[list[Told | None]], dict[str, float]]:
        """Returns the examples' summaries and values to log. Draws the summaries that the file lacks with phi."""
        missing = [example for example in examples if example.user not in self._known]
        if missing:
            drawn = sampler.summaries(phi, missing, key, sampling, k=1)
            fresh = [
                {"user": example.user, "summary": texts[0], "finished": finished, "step": step}
                for example, texts, (finished,) in zip(
                    missing, drawn.texts_UxK, drawn.finished_UxK.tolist(), strict=True
                )
            ]
            self._known.update({entry["user"]: entry for entry in fresh})
            if jax.process_index() == 0:
                lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in fresh]
                # One write for all users of the step, so that a kill rarely leaves an incomplete line.
                with self._path.open("ab", buffering=0) as file:
                    file.write("".join(lines).encode())
        own = [self._known[example.user] for example in examples]
        return [[Told(entry["summary"])] for entry in own], cut(np.array([entry["finished"] for entry in own]))


@dataclasses.dataclass(frozen=True)
class BatchMaker:
    """Makes batches: `sampler` draws summaries, `scorer` packs and scores rows, `references` holds log pi_ref."""

    config: Config
    sampler: TextSampler
    scorer: PairScorer
    references: References
    written: WrittenSummaries

    @property
    def packer(self) -> Packer:
        """Packs rows."""
        return self.scorer.packer

    @property
    def shapes(self) -> Shapes:
        """The shapes of the run's arrays."""
        return self.packer.shapes

    def make(
        self, phi: Tree | None, theta: Tree, examples: Sequence[Example], step: int, kind: StepKind
    ) -> tuple[Batch, dict[str, Any]]:
        """Draws the summaries that this step needs and lays out its rows on the mesh.

        Args:
            phi: the inference model's adapter or weights; None for a method without one.
            theta: the generator's; objective.relative_reward alone needs it.
            examples: the step's users.
            step: the number of steps taken so far; it selects the random draws.
            kind: the kind of step.

        Returns:
            The batch, and values to log: the tokens scored (each once), the share of summaries cut by the limit.
        """
        examples = [self._asked(example, step, place, kind) for place, example in enumerate(examples)]
        drawn, told_UxK, counts = self._contexts(phi, examples, step, kind)
        M = self.shapes.queries(kind)
        rows = _Rows.of(self, examples, told_UxK, M)
        learned, fewer = self.shapes.learned(kind), None
        if learned < self.shapes.summaries(kind):
            fewer = _Rows.of(self, examples, [told[:learned] for told in told_UxK], M)
        measured = Measured(
            generator=rows.planted.bins,
            signals=0 if drawn is None else drawn.prefix_BxT.shape[1],
            summary=0 if drawn is None else int(drawn.samples.length_BxN.max()),
            learned=None if fewer is None else fewer.planted.bins,
        )
        like = self.shapes.step(kind, measured)
        batch = Batch(
            generator=self._generator(rows, like.generator),
            inference=None
            if drawn is None or like.inference is None
            else self._inference(drawn, like.inference, examples, theta),
            learned=None if fewer is None or like.learned is None else self._generator(fewer, like.learned),
        )
        batch = jax.device_put(batch, shardings_of(like))
        # token_count stays an array, so that the host does not wait for it here.
        return batch, counts | {"tokens": batch.token_count}

    def _contexts(
        self, phi: Tree | None, examples: Sequence[Example], step: int, kind: StepKind
    ) -> tuple[Drawn | None, list[list[Told | None]], dict[str, Any]]:
        """Returns the summaries drawn in this step, if any, each user's K contexts, and values to log."""
        config, encoder = self.config, self.sampler.encoder
        key, sampling = stream_key(config.seed, "sample", step), text.in_training(config)
        if config.method not in SUMMARIZED or kind == "generator_warmup":
            method = contexts.in_training(config, kind)
            return None, [[contexts.told(method, encoder, example).told] for example in examples], {}
        if kind == "imitation":
            told = [[contexts.told("oracle", encoder, example).told] for example in examples]
            return self.sampler.personas(examples, sampling), told, {}
        if config.method == "popi" and kind == "generator" and config.schedule.name == "two_phase":
            return None, *self.written.contexts(self.sampler, phi, examples, key, sampling, step)
        jax.block_until_ready(phi)  # So that sample_s does not include the rest of the previous step.
        started = time.perf_counter()
        drawn = self.sampler.summaries(phi, examples, key, sampling, k=self.shapes.summaries(kind))
        counts = cut(drawn.finished_UxK) | {"sample_s": time.perf_counter() - started}
        counts["summaries_distinct"] = float(np.mean([len(set(texts)) / len(texts) for texts in drawn.texts_UxK]))
        return drawn, [[Told(text) for text in texts] for texts in drawn.texts_UxK], counts

    def _asked(self, example: Example, step: int, place: int, kind: StepKind) -> Example:
        """Returns the example with the queries of this step, and without the signals that are asked in their place."""
        config = self.config
        queries = chosen_queries(example, config.data.queries_per_user, config.seed, step, place)
        asked = dataclasses.replace(example, queries=tuple(queries))
        withheld = self.shapes.queries(kind) - config.data.queries_per_user
        return rewards.withhold(asked, withheld, config.seed, step, place) if withheld else asked

    def _generator(self, rows: "_Rows", like: GeneratorBatch) -> GeneratorBatch:
        bins = self.packer.pack(rows.planted, like.bins)
        # A row has its weight in the micro-batch that holds it, and 0 in the others.
        weight_AxR = rows.weight_R * np.any(bins.length_RxN > 0, axis=-1)
        ref_logp_AxRx2 = np.broadcast_to(rows.ref_logp_Rx2, (*weight_AxR.shape, 2))
        return GeneratorBatch(bins, ref_logp_AxRx2, weight_AxR)

    def _inference(
        self, drawn: Drawn, like: InferenceBatch, examples: Sequence[Example], theta: Tree
    ) -> InferenceBatch:
        """Stacks micro-batches of the users' signals. The branches are the sampled summaries, token for token."""
        samples = drawn.samples
        A, _, _, S = like.sampler_logp_UxKxS.shape
        tokens_BxNxS, logp_BxNxS = samples.tokens_BxNxS[:, :, :S], samples.logp_BxNxS[:, :, :S]
        lines = PrefixBatch(drawn.prefix_BxT, drawn.prefix_length_B, tokens_BxNxS, samples.length_BxN)
        more_UxK = np.zeros(samples.length_BxN.shape, np.float32)
        more_UxK[: len(examples)] = rewards.more(self.config, self.scorer, self.references, theta, examples, drawn)
        return jax.tree.map(lambda x: x.reshape(A, -1, *x.shape[1:]), InferenceBatch(lines, logp_BxNxS, more_UxK))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a step, assigned to bins but not laid out: each user's queries under each of the user's contexts."""

    planted: Planted
    ref_logp_Rx2: np.ndarray
    weight_R: np.ndarray

    @classmethod
    def of(
        cls,
        maker: BatchMaker,
        examples: Sequence[Example],
        told: Sequence[Sequence[Told | None]],
        M: int,
    ) -> "_Rows":
        """Makes the rows of these users.

        Args:
            maker: its packer and references are used.
            examples: the users.
            told: each user's contexts; every user has the same number.
            M: the most queries of a user; missing ones become rows of padding.
        """
        which = maker.config.objective.reference_context
        R = maker.shapes.users * len(told[0]) * M  # The inference batch has the same number of users.
        items: list[Item | None] = [None] * R
        weight_R, ref_logp_Rx2 = np.zeros(R, np.float32), np.zeros((R, 2), np.float32)
        asked: dict[int, Item] = {}
        r = 0
        for example, own_told in zip(examples, told, strict=True):
            signals = maker.sampler.encoder.raw_signals(example) if which == "signals" else None
            for context in own_told:
                for place, query in enumerate(example.queries, start=r):
                    items[place] = item = Item(query, context)
                    asked[place] = reference_item(which, item, signals)
                    weight_R[place] = M / len(example.queries)
                r += M
        if asked:
            ref_logp_Rx2[list(asked)] = maker.references.lookup(list(asked.values()))
        return cls(maker.packer.plant(items), ref_logp_Rx2, weight_R)


def cut(finished_x: np.ndarray) -> dict[str, float]:
    """Returns the share of summaries that limits.summary cut short, to log."""
    return {"summaries_cut": float(np.mean(~finished_x))}


def chosen_queries(example: Example, count: int, seed: int, step: int, place: int) -> list[Query]:
    """Draws `count` of the example's queries, anew for each step; returns all, in order, if there are no more."""
    if len(example.queries) <= count:
        return list(example.queries)
    rng = np.random.default_rng((seed, STREAMS.index("queries"), step, place))
    return [example.queries[i] for i in sorted(rng.choice(len(example.queries), count, replace=False))]
