"""Scores preference pairs: log pi(y+|x, z) and log pi(y-|x, z) of queries under what the generator is told of a user.

Shapes: R rows for the generator, user-major as in steps.py; C bins of L tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from popi_jax.data import packing
from popi_jax.data.schema import Query
from popi_jax.model import sharding
from popi_jax.modes.setup import System
from popi_jax.training import steps
from popi_jax.training.scoring import PackedBatch


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to score: a query, and what the generator is told of the user (None: nothing)."""

    query: Query
    context: str | None


@functools.cache
def _jitted(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(
        steps.pair_logps,
        static_argnames=("policy", "reduction"),
        compiler_options=sharding.compiler_options(mesh),
    )


def pair_row(system: System, item: Item | None) -> packing.Row:
    """A prompt with y+ and y-; None is a row of padding."""
    if item is None:
        return packing.Row([], [[], []])
    prefix, chosen, rejected = system.encoder.pair(item.query, item.context)
    return packing.Row(prefix, [chosen, rejected])


def planted_bins(
    system: System, items: Sequence[Item | None], rows: Sequence[packing.Row], chosen: Sequence[int]
) -> tuple[list[list[packing.Tree]], int]:
    """The trees of the chosen rows, bin by bin, and the bins' length: see `bin_length`.

    What is told of a user is read once for all queries that follow it, where that is less to read.
    """
    limit = system.config.limits.bin
    longest = max(rows[r].tokens for r in chosen)
    capacity = limit if longest <= limit else packing.bucket(longest, system.buckets)
    told: dict[str | None, list[int]] = {}
    for r in chosen:
        item = items[r]
        if item is not None:
            told.setdefault(item.context, []).append(r)
    trees = packing.plant(rows, told.values(), capacity)
    length = bin_length(system, [tree.tokens for tree in trees])
    return [[trees[i] for i in own] for own in packing.fill_bins([tree.tokens for tree in trees], length)], length


def bin_length(system: System, lengths: Sequence[int]) -> int:
    """The length of bins for such rows: limits.bin, or a bucket that holds the longest where that pads far less."""
    limit = system.config.limits.bin
    longest = max(lengths, default=0)
    if longest > limit:
        return packing.bucket(longest, system.buckets)
    positions = {
        size: len(packing.fill_bins(lengths, size)) * size
        for size in (limit, *system.buckets)
        if longest <= size <= limit
    }
    best = min(positions, key=lambda size: positions[size])
    # Not for a little less: another length is another shape to compile.
    return best if positions[best] < 0.9 * positions[limit] else limit


def packed_shardings(mesh: jax.sharding.Mesh, bins: Any) -> PackedBatch:
    """Where a PackedBatch lies: its bins as `bins` says, what there is of each row on all devices."""
    everywhere: Any = sharding.replicated(mesh)
    names = [field.name for field in dataclasses.fields(PackedBatch)]
    return PackedBatch(**{name: everywhere if name in ("length_RxN", "first_R") else bins for name in names})


def pack_pairs(system: System, items: Sequence[Item | None], least_bins: int = 0) -> PackedBatch:
    """Packs a train step's rows, in `least_bins` bins or more in all, as a stack of micro-batches; still on the host.

    Of rows that are the same, as those of a user's summaries of the same text, one is read. It is the bins that the
    micro-batches share out: each knows of all rows, and has the lengths of those that its bins hold.
    """
    rows = [pair_row(system, item) for item in items]
    first_R = packing.first_equals(items)
    bins, length = planted_bins(system, items, rows, sorted(set(first_R)))
    micro_batches = system.config.train.accumulation_generator
    # Dealt out in turn, for the first are the fullest. Rounded up, so that steps have few shapes, and every device has
    # as many bins.
    parts = [bins[start::micro_batches] for start in range(micro_batches)]
    shards = sharding.row_shards(system.mesh)
    n_bins = packing.round_up(packing.coarse(-(-max(least_bins, len(bins)) // micro_batches)), shards)
    shape = packing.BinShape(n_bins, length, shards)
    scored = max(packing.most_scored(part, shape) for part in parts)
    packed = [
        packing.pack_bins(rows, part, shape, scored=scored, pad_id=system.tokenizer.pad_id, first_R=first_R)
        for part in parts
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *packed)


def pair_logps(system: System, theta, items: Sequence[Item], rows: int) -> np.ndarray:
    """Log pi(y+|x,z) and log pi(y-|x,z) of every item, [n, 2]; about `rows` of them at a time, all in one shape.

    Many summaries of a trained model are the same text: equal items are scored once.
    """
    first_R = packing.first_equals(items)
    unique = sorted(set(first_R))
    encoded = [pair_row(system, items[i]) for i in unique]
    bins, length = planted_bins(system, [items[i] for i in unique], encoded, range(len(unique)))
    shards = sharding.row_shards(system.mesh)
    n_bins = packing.round_up(-(-len(bins) * min(rows, len(unique)) // len(unique)), shards)
    parts = [bins[start : start + n_bins] for start in range(0, len(bins), n_bins)]
    placed = packed_shardings(system.mesh, sharding.batch_sharding(system.mesh))
    shape = packing.BinShape(n_bins, length, shards)
    scored = max(packing.most_scored(part, shape) for part in parts)
    members = [[r for own in part for tree in own for r in tree.rows] for part in parts]
    most = packing.coarse(max(map(len, members)))  # Of rows, so that other calls have as many.
    score = _jitted(system.mesh)
    logps = np.zeros((len(unique), 2), np.float32)
    for part, chosen in zip(parts, members, strict=True):
        place = {r: n for n, r in enumerate(chosen)}
        own = [[tree.renumbered(place) for tree in part_bin] for part_bin in part]
        some = [encoded[r] for r in chosen] + [pair_row(system, None)] * (most - len(chosen))
        packed = packing.pack_bins(some, own, shape, scored=scored, pad_id=system.tokenizer.pad_id)
        rows_placed = jax.device_put(packed, placed)
        reduction = system.config.objective.logp_reduction
        out = score(policy=system.policy, base=system.base, theta=theta, rows=rows_placed, reduction=reduction)
        logps[chosen] = sharding.to_host(out)[: len(chosen)]
    return logps[np.searchsorted(unique, first_R)]
