"""Turns token ids into padded arrays of a few static shapes: lines of one prompt each, or bins of many rows.

Shape letters: docs/architecture.md.
"""

import dataclasses
import os.path
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from popi_jax.data.batch import PackedBatch
from popi_jax.model.attention import ROW

Ids = list[int]


def bucket(length: int, buckets: Sequence[int]) -> int:
    """Returns the smallest bucket that holds `length` tokens, so that few shapes are compiled.

    Beyond the largest bucket, lengths round up in steps of an eighth of it; rounding to its next multiple could double
    the memory for a few tokens. Without buckets, lengths round up in steps of an eighth of the next power of two.
    Buckets do not limit lengths; config.limits does.
    """
    largest = max(buckets, default=1 << max(0, length - 1).bit_length())
    return min((size for size in buckets if size >= length), default=round_up(length, -(-largest // 8)))


def choose_buckets(lengths: Sequence[int], most: int, step: int = 16) -> tuple[int, ...]:
    """Chooses the buckets that minimise total padding when each item is padded to the smallest bucket that holds it.

    Args:
        lengths: of the items, in tokens.
        most: the largest number of buckets.
        step: every bucket is a multiple of it.

    Returns:
        The buckets, ascending; () without lengths.
    """
    sizes_n, counts_n = np.unique([round_up(length, step) for length in lengths], return_counts=True)
    count_n, taken_n = np.cumsum(counts_n), np.cumsum(counts_n * sizes_n)
    # For the items up to each size: the least padding, and the buckets that give it. Start with one bucket, then add
    # one at a time.
    best_n = count_n * sizes_n - taken_n
    chosen: list[tuple[int, ...]] = [(int(size),) for size in sizes_n]
    # Padding of the items above size i in a bucket of size j.
    pads_jxi = (count_n[:, None] - count_n) * sizes_n[:, None] - (taken_n[:, None] - taken_n)
    earlier_jxi = np.tri(len(sizes_n), k=-1, dtype=bool)
    for _ in range(min(most, len(sizes_n)) - 1):
        total_jxi = np.where(earlier_jxi, best_n + pads_jxi, np.inf)
        before_n, total_n = np.argmin(total_jxi, axis=1), np.min(total_jxi, axis=1)
        chosen = [
            (*chosen[i], int(size)) if total < best else own
            for i, size, total, best, own in zip(before_n, sizes_n, total_n, best_n, chosen, strict=True)
        ]
        best_n = np.minimum(best_n, total_n)
    return chosen[-1] if chosen else ()


def round_up(count: int, step: int) -> int:
    """Rounds count up to a multiple of step, at least one step."""
    return max(1, -(-count // step)) * step


def pad_rows(prompts: Sequence[Ids], shape: tuple[int, int], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads prompts to `shape` (B, T) and returns ids [B, T] and lengths [B], int32.

    Rows beyond the prompts have length 0. Any `pad_id` works, since the lengths tell which tokens are real.

    Raises:
        ValueError: more prompts than rows.
    """
    if len(prompts) > shape[0]:
        raise ValueError(f"{len(prompts)} prompts do not fit into {shape[0]} rows")
    length_B = np.zeros(shape[0], np.int32)
    length_B[: len(prompts)] = [len(ids) for ids in prompts]
    ids_BxT = np.full(shape, pad_id, np.int32)
    for row, ids in enumerate(prompts):
        ids_BxT[row, : len(ids)] = ids
    return ids_BxT, length_B


def coarse(count: int) -> int:
    """Rounds up to a number with three significant bits: 1, 2, ... 8, 10, 12, 14, 16, 20, ...

    Compiling a step for a new shape takes as long as many steps, so a few empty bins are cheaper.
    """
    unit = 1 << max(0, (count - 1).bit_length() - 3)
    return round_up(count, unit)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row to pack: a prefix and its branches, as token ids. A row without tokens is padding and keeps its index."""

    prefix: Ids
    branches: list[Ids]

    @property
    def tokens(self) -> int:
        """The number of tokens that the row takes in a bin by itself."""
        return len(self.prefix) + sum(map(len, self.branches))


class Branch(NamedTuple):
    """A branch of a tree: tokens that are only read, then the scored tokens, which are branch `n` of row `r`."""

    read: Ids
    scored: Ids
    r: int
    n: int


@dataclasses.dataclass(frozen=True)
class Tree:
    """One or several rows that share a start: the tokens that are read once, and the branches that follow them."""

    start: Ids
    branches: list[Branch]

    @property
    def tokens(self) -> int:
        """The number of tokens that the tree takes in a bin."""
        return len(self.start) + sum(len(branch.read) for branch in self.branches) + self.scored_tokens

    @property
    def scored_tokens(self) -> int:
        """The number of scored tokens."""
        return sum(len(branch.scored) for branch in self.branches)

    @property
    def members(self) -> list[int]:
        """The indices of the tree's rows, each once."""
        return list(dict.fromkeys(branch.r for branch in self.branches))

    def renumbered(self, place: Mapping[int, int]) -> "Tree":
        """The same tree with its rows renumbered by `place`."""
        return Tree(self.start, [branch._replace(r=place[branch.r]) for branch in self.branches])


def plant(rows: Sequence[Row], groups: Iterable[Sequence[int]], capacity: int) -> list[Tree]:
    """Builds trees from rows. Rows of a group share their common start, if that leaves fewer tokens to read.

    The rest of a row's prefix is then read once per branch. A user's M queries after a long context therefore share the
    context, while one question after many summaries is not shared. Each token attends to the same tokens either way.

    Args:
        rows: all rows; a row in no group is in no tree.
        groups: indices of rows that may have a start in common; each row is in at most one group.
        capacity: the largest tree, in tokens; a longer row is a tree by itself.
    """

    def tree(members: Sequence[int], common: int | None = None) -> Tree:
        return Tree(
            rows[members[0]].prefix[:common],
            [
                Branch([] if common is None else rows[r].prefix[common:], ids, r, n)
                for r in members
                for n, ids in enumerate(rows[r].branches)
            ],
        )

    trees = []
    for group in groups:
        common = len(os.path.commonprefix([rows[r].prefix for r in group]))
        own = {r: tree([r], common).tokens - common for r in group}
        together: list[list[int]] = []
        for r in group:
            if together and common + sum(own[m] for m in together[-1]) + own[r] <= capacity:
                together[-1].append(r)
            else:
                together.append([r])
        for members in together:
            shared = tree(members, common)
            fewer = shared.tokens < sum(rows[r].tokens for r in members) and len(shared.branches) < ROW
            trees += [shared] if fewer else [tree([r]) for r in members]
    return trees


def fill_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into bins by first-fit decreasing.

    Args:
        lengths: of the items; items of length 0 go in no bin.
        capacity: of a bin; no item is longer.

    Returns:
        The indices of each bin's items.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[item] == 0:
            break
        place = next((i for i, left in enumerate(room) if left >= lengths[item]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= lengths[item]
    return bins


def first_equals(keys: Sequence[Hashable]) -> list[int]:
    """For each key, the index of the first equal key, which may be its own."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(key, i) for i, key in enumerate(keys)]


def pack_bins(
    rows: Sequence[Row],
    bins: Sequence[Sequence[Tree]],
    like: PackedBatch,
    *,
    pad_id: int,
    first_R: Sequence[int] | None = None,
) -> PackedBatch:
    """Lays rows out in bins.

    Args:
        rows: R rows of N branches each.
        bins: the trees of each bin; see `plant` and `fill_bins`.
        like: the result's shapes; leading axes are ignored. It has room for these bins (the rest stay empty) and for
            every shard's scored tokens.
        pad_id: fills unused tokens; any id works.
        first_R: for each row, the equal row that is packed in its place (see `first_equals`); None: each row itself.
    """
    (N,) = {len(row.branches) for row in rows}
    (n_bins, length), (shards, scored) = like.tokens_CxL.shape[-2:], like.target_ShxW.shape[-2:]
    size = n_bins // shards
    tokens_CxL = np.full((n_bins, length), pad_id, np.int32)
    positions_CxL, segments_CxL = np.zeros((n_bins, length), np.int32), np.full((n_bins, length), -1, np.int32)
    predictor_ShxW, target_ShxW = np.zeros((shards, scored), np.int32), np.full((shards, scored), pad_id, np.int32)
    branch_ShxW = np.full((shards, scored), len(rows) * N, np.int32)
    for c, members in enumerate(bins):
        shard, start = c // size, 0
        if c % size == 0:  # The first bin of a shard.
            first = 0
        for place, tree in enumerate(members):
            own = slice(start, start + len(tree.start))
            tokens_CxL[c, own], positions_CxL[c, own] = tree.start, np.arange(len(tree.start))
            segments_CxL[c, own] = place * ROW
            last, start = own.stop - 1, own.stop
            for number, (read, ids, r, n) in enumerate(tree.branches, start=1):
                own = slice(start, start + len(read) + len(ids))
                tokens_CxL[c, own], segments_CxL[c, own] = [*read, *ids], place * ROW + number
                positions_CxL[c, own] = len(tree.start) + np.arange(own.stop - start)
                asked = slice(first, first + len(ids))
                # The last token of the start predicts a branch's first token; each other token is predicted by the one
                # before it.
                predictors = [last, *range(start, own.stop - 1)][len(read) : len(read) + len(ids)]
                predictor_ShxW[shard, asked] = np.array(predictors, np.int32) + c % size * length
                target_ShxW[shard, asked], branch_ShxW[shard, asked] = ids, r * N + n
                start, first = own.stop, asked.stop
    own_R = np.asarray(range(len(rows)) if first_R is None else first_R, np.int32)
    here = {r for members in bins for tree in members for r in tree.members}
    length_RxN = np.array(
        [[len(ids) * (own in here) for ids in row.branches] for row, own in zip(rows, own_R.tolist(), strict=True)],
        np.int32,
    )
    return PackedBatch(
        tokens_CxL, positions_CxL, segments_CxL, predictor_ShxW, target_ShxW, branch_ShxW, length_RxN, own_R
    )
