"""The shapes and shardings of everything that a program reads, for runs and --mode=compile alike.

A run passes the lengths that it has measured. --mode=compile passes none, and every text is as long as its limit.
Shape letters: docs/architecture.md.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from popi_jax.config import SUMMARIZED, Config, StepKind
from popi_jax.data import packing
from popi_jax.data.batch import Batch, GeneratorBatch, InferenceBatch, PackedBatch, PrefixBatch
from popi_jax.data.packing import PairShape
from popi_jax.model import sharding


def abstract_bins(shape: PairShape, *stack: int) -> PackedBatch:
    """The shapes and dtypes of packed rows; `stack` are leading axes."""
    bins, scored = _int32(*stack, shape.n_bins, shape.length), _int32(*stack, shape.shards, shape.scored)
    return PackedBatch(
        tokens_CxL=bins,
        positions_CxL=bins,
        segments_CxL=bins,
        predictor_ShxW=scored,
        target_ShxW=scored,
        branch_ShxW=scored,
        length_RxN=_int32(*stack, shape.rows, 2),
        first_R=_int32(*stack, shape.rows),
    )


@dataclasses.dataclass(frozen=True)
class SummaryShape:
    """U = users lines of T = signals tokens, each with K = summaries branches of S = summary tokens.

    `users` counts all micro-batches together.
    """

    users: int
    signals: int
    summaries: int
    summary: int


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The shapes of a Batch's parts, and the number of micro-batches of either model."""

    generator: PairShape
    inference: SummaryShape | None
    learned: PairShape | None
    accumulation_generator: int
    accumulation_inference: int

    def abstract(self, mesh: Mesh) -> Batch:
        """The Batch as abstract arrays with their shardings."""
        inference = None if self.inference is None else self._summaries(self.inference)
        learned = None if self.learned is None else self._pairs(self.learned)
        batch = Batch(self._pairs(self.generator), inference, learned)
        return placed(batch, batch_shardings(batch, mesh))

    def _pairs(self, pairs: PairShape) -> GeneratorBatch:
        A = self.accumulation_generator
        return GeneratorBatch(abstract_bins(pairs, A), _float32(A, pairs.rows, 2), _float32(A, pairs.rows))

    def _summaries(self, shape: SummaryShape) -> InferenceBatch:
        A, K, S = self.accumulation_inference, shape.summaries, shape.summary
        U = shape.users // A
        lines = PrefixBatch(_int32(A, U, shape.signals), _int32(A, U), _int32(A, U, K, S), _int32(A, U, K))
        return InferenceBatch(lines, _float32(A, U, K, S))


@dataclasses.dataclass(frozen=True)
class Bins:
    """How rows fill bins: the length of a bin, and the number of scored tokens in each bin."""

    length: int
    scored: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measured size of a step's texts: the longest signals and summary in tokens, and the bins of its rows."""

    generator: Bins
    signals: int = 0
    summary: int = 0
    learned: Bins | None = None


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All shapes of a run with this config on this mesh. Lengths are rounded up to `buckets`."""

    config: Config
    mesh: Mesh
    buckets: tuple[int, ...]

    @property
    def users(self) -> int:
        """Users per train step, rounded up so that every device has the same number."""
        return self._per_device(self.config.train.users_per_step)

    def summaries(self, kind: StepKind) -> int:
        """The number of summaries per user that a step of this kind draws or reads, and shows the generator.

        In a joint step, the generator learns from the same number of them as in a generator step.
        """
        config = self.config
        if config.method not in SUMMARIZED:
            return 1
        if kind != "generator":
            return config.sampling.k
        if config.method == "popi" and config.schedule.name == "two_phase":
            return 1  # Written once; see batches.WrittenSummaries.
        return config.sampling.k_generator or config.sampling.k

    def lines(self, count: int, longest: int) -> tuple[int, int]:
        """B and T for sampling from `count` prompts, the longest of which has `longest` tokens."""
        return self._per_device(count), packing.bucket(longest, self.buckets)

    def step(self, kind: StepKind, measured: Measured | None = None) -> StepShape:
        """The shapes of a train step's Batch.

        Args:
            kind: of the step.
            measured: the size of its texts; None: every text is as long as its limit.
        """
        config, train = self.config, self.config.train
        k, learned = self.summaries(kind), self.summaries("generator")
        if measured is None:
            parts = self._full(self._rows(k)), self._full(self._rows(learned))
            measured = Measured(parts[0], config.limits.signals, config.limits.summary, parts[1])
        generator = self._train_pairs(k, measured.generator)
        inference = fewer = None
        if kind != "generator":
            T = packing.bucket(measured.signals, self.buckets)
            # A user has K summaries. Padded to a bucket that was chosen for prompts, they could outweigh the signals.
            S = min(packing.bucket(measured.summary, self.buckets), config.limits.summary)
            inference = SummaryShape(self.users, T, k, S)
        if kind == "joint" and learned < k:
            assert measured.learned is not None
            # Their share of all bins varies less than their own count, which keeps shapes few.
            least = train.accumulation_generator * generator.n_bins * learned // k
            fewer = self._train_pairs(learned, measured.learned, least)
        return StepShape(generator, inference, fewer, train.accumulation_generator, train.accumulation_inference)

    def scoring(self, rows: int | None = None, n_bins: int = 0, parts: Sequence[Bins] = ()) -> PairShape:
        """The shape of a program that scores pairs, one part at a time.

        Args:
            rows: the most rows in a part; None: an evaluation batch in which every text is as long as its limit.
            n_bins: the most bins in a part.
            parts: the bins of each part.
        """
        if rows is None:
            rows = self._per_device(self.config.eval.rows)
            parts = [self._full(rows)]
            n_bins = len(parts[0].scored)
        return self._pairs(rows, n_bins, parts[0].length, [part.scored for part in parts])

    def scoring_bins(self, n_bins: int, items: int, at_a_time: int) -> int:
        """How many of `n_bins` bins with `items` pairs to score together, for about `at_a_time` pairs at a time."""
        return self._per_device(-(-n_bins * min(at_a_time, items) // items))

    def bin_length(self, lengths: Sequence[int]) -> int:
        """The bin length for rows of these lengths: limits.bin, or a bucket that needs far less padding."""
        limit = self.config.limits.bin
        longest = max(lengths, default=0)
        if longest > limit:
            return packing.bucket(longest, self.buckets)
        positions = {
            size: len(packing.fill_bins(lengths, size)) * size
            for size in (limit, *self.buckets)
            if longest <= size <= limit
        }
        best = min(positions, key=lambda size: positions[size])
        # A small saving is not worth compiling another shape.
        return best if positions[best] < 0.9 * positions[limit] else limit

    def _per_device(self, count: int) -> int:
        return packing.round_up(count, sharding.row_shards(self.mesh))

    def _rows(self, summaries: int) -> int:
        return self.users * summaries * self.config.data.queries_per_user

    def _full(self, rows: int) -> Bins:
        """Bins for this many rows, each with the longest prompt and two responses of the longest length."""
        limits = self.config.limits
        longest = limits.prompt + 2 * limits.response
        length = max(limits.bin, packing.bucket(longest, self.buckets))
        per_bin = length // longest
        return Bins(length, [per_bin * 2 * limits.response] * -(-rows // per_bin))

    def _train_pairs(self, summaries: int, bins: Bins, least: int = 0) -> PairShape:
        A = self.config.train.accumulation_generator
        # Rounded up to keep shapes few.
        n_bins = packing.coarse(-(-max(least, len(bins.scored)) // A))
        return self._pairs(self._rows(summaries), n_bins, bins.length, [bins.scored[a::A] for a in range(A)])

    def _pairs(self, rows: int, n_bins: int, length: int, scored: Sequence[Sequence[int]]) -> PairShape:
        shards, n_bins = sharding.row_shards(self.mesh), self._per_device(n_bins)
        size = n_bins // shards
        fullest = max(sum(part[start : start + size]) for part in scored for start in range(0, n_bins, size))
        # Rounded up to a quarter of a shard's tokens to keep shapes few.
        return PairShape(rows, n_bins, length, shards, packing.round_up(fullest, -(-size * length // 4)))


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """The shardings of a Batch or a part of one: users' lines and bins are split, per-row arrays are replicated."""
    split: Any = sharding.stack_sharding(mesh)
    everywhere: Any = sharding.replicated(mesh)

    def place(part: Any) -> Any:
        if isinstance(part, GeneratorBatch):
            return GeneratorBatch(bins_shardings(split, mesh), everywhere, everywhere)
        return jax.tree.map(lambda _: split, part)

    return jax.tree.map(place, batch, is_leaf=lambda part: isinstance(part, GeneratorBatch | InferenceBatch))


def bins_shardings(bins: Any, mesh: Mesh) -> PackedBatch:
    """The shardings of a PackedBatch: arrays over bins get `bins`, arrays over rows are replicated."""
    everywhere: Any = sharding.replicated(mesh)
    names = [field.name for field in dataclasses.fields(PackedBatch)]
    return PackedBatch(**{name: everywhere if name in ("length_RxN", "first_R") else bins for name in names})


def placed(tree: Any, shardings: Any) -> Any:
    """Attaches shardings to abstract arrays; `shardings` is a tree, or one sharding for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _float32(*shape: int) -> Any:  # Any, because it stands in for an array.
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _int32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, np.int32)
