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
from popi_jax.model import sharding


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
        """The number of contexts per user that a step of this kind draws or reads, and shows the generator."""
        config = self.config
        if config.method not in SUMMARIZED or kind in ("generator_warmup", "imitation"):
            return 1
        if kind == "best_of_k":
            return config.k_of_warm_start
        if kind != "generator":
            return config.sampling.k
        if config.method == "popi" and config.schedule.name == "two_phase":
            return 1  # Written once; see batches.WrittenSummaries.
        return config.sampling.k_generator or config.sampling.k

    def learned(self, kind: StepKind) -> int:
        """The number of them that the generator learns from, if it learns: in a joint step as in a generator step."""
        return min(self.summaries(kind), self.summaries("generator")) if kind == "joint" else self.summaries(kind)

    def queries(self, kind: StepKind) -> int:
        """M, the most queries of a user in a step of this kind; a step of the inference model asks own signals, too."""
        more = self.config.objective.reward_signals if kind in ("joint", "inference", "best_of_k") else 0
        return self.config.data.queries_per_user + more

    def lines(self, count: int, longest: int) -> tuple[int, int]:
        """B and T for sampling from `count` prompts, the longest of which has `longest` tokens."""
        return self._per_device(count), packing.bucket(longest, self.buckets)

    def step(self, kind: StepKind, measured: Measured | None = None) -> Batch:
        """A train step's Batch as abstract arrays with their shardings.

        Args:
            kind: of the step.
            measured: the size of its texts; None: every text is as long as its limit.
        """
        config, train = self.config, self.config.train
        k, learned = self.summaries(kind), self.learned(kind)
        rows, learned_rows = (self.users * count * self.queries(kind) for count in (k, learned))
        if measured is None:
            parts = self._full(rows), self._full(learned_rows)
            measured = Measured(parts[0], config.limits.signals, config.limits.summary, parts[1])
        generator = self._train_pairs(rows, measured.generator)
        inference = fewer = None
        if kind not in ("generator", "generator_warmup"):
            A, T = train.accumulation_inference, packing.bucket(measured.signals, self.buckets)
            # A user has K summaries. Padded to a bucket that was chosen for prompts, they could outweigh the signals.
            S = min(packing.bucket(measured.summary, self.buckets), config.limits.summary)
            U = self.users // A
            lines = PrefixBatch(_int32(A, U, T), _int32(A, U), _int32(A, U, k, S), _int32(A, U, k))
            inference = InferenceBatch(lines, _float32(A, U, k, S), _float32(A, U, k))
        if learned < k:
            assert measured.learned is not None
            # Their share of all bins varies less than their own count, which keeps shapes few.
            A, n_bins = generator.bins.tokens_CxL.shape[:2]
            fewer = self._train_pairs(learned_rows, measured.learned, least=A * n_bins * learned // k)
        batch = Batch(generator, inference, fewer)
        return placed(batch, batch_shardings(batch, self.mesh))

    def scoring(self, rows: int | None = None, n_bins: int = 0, parts: Sequence[Bins] = ()) -> PackedBatch:
        """The abstract arrays, with their shardings, of a program that scores pairs one part at a time.

        Args:
            rows: the most rows in a part; None: an evaluation batch in which every text is as long as its limit.
            n_bins: the most bins in a part.
            parts: the bins of each part.
        """
        if rows is None:
            rows = self._per_device(self.config.eval.rows)
            parts = [self._full(rows)]
            n_bins = len(parts[0].scored)
        bins = self._bins((), rows, n_bins, parts[0].length, [part.scored for part in parts])
        return placed(bins, _bins_shardings(sharding.batch_sharding(self.mesh), self.mesh))

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

    def _full(self, rows: int) -> Bins:
        """Bins for this many rows, each with the longest prompt and two responses of the longest length."""
        limits = self.config.limits
        longest = limits.prompt + 2 * limits.response
        length = max(limits.bin, packing.bucket(longest, self.buckets))
        per_bin = length // longest
        return Bins(length, [per_bin * 2 * limits.response] * -(-rows // per_bin))

    def _train_pairs(self, R: int, bins: Bins, least: int = 0) -> GeneratorBatch:
        A = self.config.train.accumulation_generator
        # Rounded up to keep shapes few.
        n_bins = packing.coarse(-(-max(least, len(bins.scored)) // A))
        packed = self._bins((A,), R, n_bins, bins.length, [bins.scored[a::A] for a in range(A)])
        return GeneratorBatch(packed, _float32(A, R, 2), _float32(A, R))

    def _bins(
        self, stack: tuple[int, ...], rows: int, n_bins: int, length: int, scored: Sequence[Sequence[int]]
    ) -> PackedBatch:
        shards, n_bins = sharding.row_shards(self.mesh), self._per_device(n_bins)
        size = n_bins // shards
        fullest = max(sum(part[start : start + size]) for part in scored for start in range(0, n_bins, size))
        # Rounded up to a quarter of a shard's tokens to keep shapes few.
        return abstract_bins(rows, n_bins, length, shards, packing.round_up(fullest, -(-size * length // 4)), stack)


def abstract_bins(
    rows: int, n_bins: int, length: int, shards: int, scored: int, stack: tuple[int, ...] = ()
) -> PackedBatch:
    """The shapes and dtypes of R = rows packed in C = n_bins bins of L = length tokens, with W = scored tokens a shard.

    `stack` are leading axes.
    """
    tokens, positions = _int32(*stack, n_bins, length), _int32(*stack, shards, scored)
    lengths = _int32(*stack, rows, 2), _int32(*stack, rows)
    return PackedBatch(tokens, tokens, tokens, positions, positions, positions, *lengths)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """The shardings of a Batch or a part of one: users' lines and bins are split, per-row arrays are replicated."""
    split: Any = sharding.stack_sharding(mesh)
    everywhere: Any = sharding.replicated(mesh)

    def place(part: Any) -> Any:
        if isinstance(part, GeneratorBatch):
            return GeneratorBatch(_bins_shardings(split, mesh), everywhere, everywhere)
        return jax.tree.map(lambda _: split, part)

    return jax.tree.map(place, batch, is_leaf=lambda part: isinstance(part, GeneratorBatch | InferenceBatch))


def _bins_shardings(bins: Any, mesh: Mesh) -> PackedBatch:
    everywhere: Any = sharding.replicated(mesh)
    names = [field.name for field in dataclasses.fields(PackedBatch)]
    return PackedBatch(**{name: everywhere if name in ("length_RxN", "first_R") else bins for name in names})


def shardings_of(abstract: Any) -> Any:
    """The shardings of abstract arrays: where to put real ones."""
    return jax.tree.map(lambda x: x.sharding, abstract)


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
