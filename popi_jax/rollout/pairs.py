"""Packs preference pairs for a train step, and scores them: log pi(y+|x, z) and log pi(y-|x, z)."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from popi_jax.data import packing
from popi_jax.data.batch import PackedBatch
from popi_jax.data.encoding import Encoder
from popi_jax.data.layouts import Told
from popi_jax.data.packing import Row, Tree
from popi_jax.data.schema import Query
from popi_jax.data.shapes import Bins, Shapes, shardings_of
from popi_jax.errors import UserError
from popi_jax.model import sharding, weights


@dataclasses.dataclass(frozen=True)
class Item:
    """A query to score, with what the generator is told of the user (None: nothing)."""

    query: Query
    told: Told | None


@dataclasses.dataclass(frozen=True)
class Planted:
    """Rows assigned to bins but not laid out: all rows, each row's first equal row, and the trees of each bin.

    `length` is the length of a bin in tokens.
    """

    rows: list[Row]
    first_R: list[int]
    trees: list[list[Tree]]
    length: int

    @property
    def bins(self) -> Bins:
        """The bin length and scored tokens, which determine the shape of the arrays."""
        return Bins(self.length, [sum(tree.scored_tokens for tree in own) for own in self.trees])


@dataclasses.dataclass(frozen=True)
class Packer:
    """Packs pairs into bins. Equal items are packed once, and queries of a user can share one copy of the context."""

    encoder: Encoder
    shapes: Shapes

    def row(self, item: Item | None) -> Row:
        """The row of a prompt with y+ and y-; None gives a padding row."""
        if item is None:
            return Row([], [[], []])
        prefix, chosen, rejected = self.encoder.pair(item.query, item.told)
        return Row(prefix, [chosen, rejected])

    def plant(self, items: Sequence[Item | None]) -> Planted:
        """Distributes the items' rows over bins.

        Queries after the same context share one copy of it, if that leaves fewer tokens to read.
        """
        rows = [self.row(item) for item in items]
        first_R = packing.first_equals(items)
        chosen = sorted(set(first_R))
        longest, limit = max(rows[r].tokens for r in chosen), self.encoder.limits.bin
        capacity = limit if longest <= limit else packing.bucket(longest, self.shapes.buckets)
        sharing: dict[Told | None, list[int]] = {}
        for r in chosen:
            item = items[r]
            if item is not None:
                sharing.setdefault(item.told, []).append(r)
        trees = packing.plant(rows, sharing.values(), capacity)
        length = self.shapes.bin_length([tree.tokens for tree in trees])
        bins = packing.fill_bins([tree.tokens for tree in trees], length)
        return Planted(rows, first_R, [[trees[i] for i in own] for own in bins], length)

    def pack(self, planted: Planted, like: PackedBatch) -> PackedBatch:
        """Lays out a train step's rows on the host, as a stack of micro-batches.

        The bins are divided among the micro-batches. Each of them lists all rows, but has non-zero lengths only for the
        rows in its own bins.
        """
        A = like.tokens_CxL.shape[0]
        # Dealt round-robin, since the first bins are the fullest.
        packed = [
            packing.pack_bins(planted.rows, planted.trees[a::A], like, pad_id=self._pad_id, first_R=planted.first_R)
            for a in range(A)
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *packed)

    def pack_rows(self, rows: Sequence[Row], trees: Sequence[Sequence[Tree]], like: PackedBatch) -> PackedBatch:
        """Lays out only these rows, each once, and adds the padding rows that `like` has room for."""
        padding = [self.row(None)] * (len(like.first_R) - len(rows))
        return packing.pack_bins([*rows, *padding], trees, like, pad_id=self._pad_id)

    @property
    def _pad_id(self) -> int:
        return self.encoder.tokenizer.pad_id


@dataclasses.dataclass(frozen=True)
class PairScorer:
    """Computes log-probabilities of pairs.

    Attributes:
        score: programs.score, the compiled `scoring.response_logps`.
        base: the frozen weights.
        packer: packs pairs into bins.
    """

    score: Callable[..., jax.Array]
    base: weights.Tree
    packer: Packer

    def logps(
        self,
        theta: weights.Tree | None,
        items: Sequence[Item],
        at_a_time: int | None = None,
        known: np.ndarray | None = None,
        done: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Log pi(y+|x,z) and log pi(y-|x,z) of each item, [items, 2], in nats; theta None is the reference.

        UserError if one is not finite: as a number in a table it would be an accuracy of 0 or a missing figure. Equal
        items are scored once, since a trained model writes many equal summaries.

        Args:
            theta: the generator's weights or adapter.
            items: the pairs.
            at_a_time: about how many items are scored together; None: eval.rows. All parts have one shape.
            known: what an interrupted call had found, NaN elsewhere. The parts that it has are not scored again, and
                the others are the same as without it.
            done: called with what is found so far, NaN elsewhere, after each part.
        """
        shapes = self.packer.shapes
        planted = self.packer.plant(items)
        unique = sorted(set(planted.first_R))
        n_bins = shapes.scoring_bins(len(planted.trees), len(unique), at_a_time or shapes.config.eval.rows)
        parts = [planted.trees[start : start + n_bins] for start in range(0, len(planted.trees), n_bins)]
        members = [[r for own in part for tree in own for r in tree.members] for part in parts]
        bins = [Bins(planted.length, planted.bins.scored[i * n_bins : (i + 1) * n_bins]) for i in range(len(parts))]
        # Rounded up, so that other calls have the same number of rows.
        like = shapes.scoring(packing.coarse(max(map(len, members))), n_bins, bins)
        logps = np.full((len(items), 2), np.nan, np.float32) if known is None else known.copy()
        for part, chosen in zip(parts, members, strict=True):
            if np.isfinite(logps[chosen]).all():
                continue
            place = {r: n for n, r in enumerate(chosen)}
            own = [[tree.renumbered(place) for tree in part_bin] for part_bin in part]
            packed = self.packer.pack_rows([planted.rows[r] for r in chosen], own, like)
            out = self.score(self.base, theta, jax.device_put(packed, shardings_of(like)))
            logps[chosen] = sharding.to_host(out)[: len(chosen)]
            if done is not None:
                done(logps)
        logps = logps[planted.first_R]
        for item, logp in zip(items, logps, strict=True):
            if not np.isfinite(logp).all():
                raise UserError(
                    f"query {item.query.provenance or repr(item.query.prompt[:40])}: the log-probabilities of its"
                    f" responses are {logp.tolist()}; the weights have values that are not finite, or"
                    f" model.compute_dtype is too narrow for them"
                )
        return logps
