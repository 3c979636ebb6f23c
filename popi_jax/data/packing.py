"""From token ids to padded arrays of a few static shapes: lines of one prompt each, or bins of many rows.

Shapes: B lines, T their length; R rows with N branches in C bins of L tokens, in G groups with at most W scored tokens
each.
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
    """Returns the smallest bucket that holds `length` tokens, so that few shapes are ever compiled.

    Beyond the largest, in steps of an eighth of it: its next multiple could need twice the memory for a few tokens.
    Without buckets, in steps of an eighth of the next power of two. Buckets are shapes; limits say what is too long.
    """
    largest = max(buckets, default=1 << max(0, length - 1).bit_length())
    return min((size for size in buckets if size >= length), default=round_up(length, -(-largest // 8)))


def choose_buckets(lengths: Sequence[int], most: int, step: int = 16) -> tuple[int, ...]:
    """The buckets that hold items of these lengths with the least padding in all, each padded to its own bucket.

    Args:
        lengths: in tokens, of what is to be padded.
        most: how many buckets there are at most.
        step: buckets are multiples of it.

    Returns:
        The buckets, ascending; () without lengths.
    """
    sizes_n, counts_n = np.unique([round_up(length, step) for length in lengths], return_counts=True)
    count_n, taken_n = np.cumsum(counts_n), np.cumsum(counts_n * sizes_n)
    # Of the items up to each size: what one bucket pads, and that bucket. Then what more of them pad, one by one.
    best_n = count_n * sizes_n - taken_n
    chosen: list[tuple[int, ...]] = [(int(size),) for size in sizes_n]
    # What a bucket of size j pads of the items above size i.
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
    """The smallest multiple of step that is at least count, and at least step."""
    return max(1, -(-count // step)) * step


def pad_rows(prompts: Sequence[Ids], shape: tuple[int, int], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads prompts: ids [B, T], lengths [B], int32, with B and T from `shape`.

    Rows beyond the prompts have length 0. Any `pad_id` does: lengths tell which tokens are real.
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
    """Rounds up to a number of three significant bits: 1, 2, ... 8, 10, 12, 14, 16, 20, ...

    A step of another shape is compiled anew, which takes as long as many steps: better some empty bins.
    """
    unit = 1 << max(0, (count - 1).bit_length() - 3)
    return round_up(count, unit)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row to pack: a prefix and its branches, as token ids. Without tokens it is padding that keeps its place."""

    prefix: Ids
    branches: list[Ids]

    @property
    def tokens(self) -> int:
        """The length that the row takes in a bin by itself."""
        return len(self.prefix) + sum(map(len, self.branches))


class Branch(NamedTuple):
    """Of a tree: tokens that are read, then those that are scored, which are branch `n` of row `r`."""

    read: Ids
    scored: Ids
    r: int
    n: int


@dataclasses.dataclass(frozen=True)
class Tree:
    """What lies together in a bin: tokens that are read once, and all that follows them. One row, or several."""

    start: Ids
    branches: list[Branch]

    @property
    def tokens(self) -> int:
        """The length that it takes in a bin."""
        return len(self.start) + sum(len(branch.read) for branch in self.branches) + self.scored_tokens

    @property
    def scored_tokens(self) -> int:
        """How many of its tokens are scored."""
        return sum(len(branch.scored) for branch in self.branches)

    @property
    def members(self) -> list[int]:
        """The rows that are in it, each once."""
        return list(dict.fromkeys(branch.r for branch in self.branches))

    def renumbered(self, place: Mapping[int, int]) -> "Tree":
        """The same with other numbers for its rows."""
        return Tree(self.start, [branch._replace(r=place[branch.r]) for branch in self.branches])


def plant(rows: Sequence[Row], groups: Iterable[Sequence[int]], capacity: int) -> list[Tree]:
    """Makes trees of rows: those of a group share the start that they have in common, where fewer tokens are then read.

    What a row's prefix has beyond that start is read once per branch of it: a user's M queries after a long context
    share it, while one question under many summaries is left as it is. Nothing changes in what any token attends to.

    Args:
        rows: all; those of no group are in no tree.
        groups: rows that may have a start in common, by index; each row in one group.
        capacity: tokens of a tree at most; a row that is longer is a tree by itself.
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
    """Puts items into bins, first-fit decreasing: each, the longest first, into the first bin with room for it.

    Args:
        lengths: of the items; those of length 0 are in no bin.
        capacity: of a bin; no item is longer.

    Returns:
        The items of each bin, by index.
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


@dataclasses.dataclass(frozen=True)
class PairShape:
    """Packed rows: R rows in C = n_bins bins of L = length tokens, in G = groups, each with W = scored positions."""

    rows: int
    n_bins: int
    length: int
    groups: int
    scored: int

    @property
    def group_bins(self) -> int:
        """How many bins are in a group."""
        return self.n_bins // self.groups


def first_equals(keys: Sequence[Hashable]) -> list[int]:
    """For each of them the index of the first that is equal to it: its own where there is none before."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(key, i) for i, key in enumerate(keys)]


def pack_bins(
    rows: Sequence[Row],
    bins: Sequence[Sequence[Tree]],
    shape: PairShape,
    *,
    pad_id: int,
    first_R: Sequence[int] | None = None,
) -> PackedBatch:
    """Lays rows out in bins.

    Args:
        rows: R rows of N branches each.
        bins: the trees of each bin; see `plant` and `fill_bins`.
        shape: at least as many bins, the added ones empty, no shorter than the tokens of any, with room for the scored
            tokens of every group.
        pad_id: fills what is left; any id does.
        first_R: for each row the one that is packed for it, see `first_equals`; None: each for itself.
    """
    (N,) = {len(row.branches) for row in rows}
    n_bins, length, groups, size, scored = shape.n_bins, shape.length, shape.groups, shape.group_bins, shape.scored
    tokens_CxL = np.full((n_bins, length), pad_id, np.int32)
    positions_CxL, segments_CxL = np.zeros((n_bins, length), np.int32), np.full((n_bins, length), -1, np.int32)
    predictor_GxW, target_GxW = np.zeros((groups, scored), np.int32), np.full((groups, scored), pad_id, np.int32)
    branch_GxW = np.full((groups, scored), len(rows) * N, np.int32)
    for c, members in enumerate(bins):
        g, start = c // size, 0
        if c % size == 0:  # A group begins: so do its scored positions.
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
                # A branch's first token is predicted by the last of the start, any other by the one before it.
                predictors = [last, *range(start, own.stop - 1)][len(read) : len(read) + len(ids)]
                predictor_GxW[g, asked] = np.array(predictors, np.int32) + c % size * length
                target_GxW[g, asked], branch_GxW[g, asked] = ids, r * N + n
                start, first = own.stop, asked.stop
    own_R = np.asarray(range(len(rows)) if first_R is None else first_R, np.int32)
    here = {r for members in bins for tree in members for r in tree.members}
    length_RxN = np.array(
        [[len(ids) * (own in here) for ids in row.branches] for row, own in zip(rows, own_R.tolist(), strict=True)],
        np.int32,
    )
    return PackedBatch(
        tokens_CxL, positions_CxL, segments_CxL, predictor_GxW, target_GxW, branch_GxW, length_RxN, own_R
    )
