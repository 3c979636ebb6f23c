"""A tiny model for tests, and rows of random tokens for it."""

import jax
import numpy as np

from popi_jax.data import packing
from popi_jax.data.batch import PackedBatch, PrefixBatch
from popi_jax.data.shapes import abstract_bins
from popi_jax.model.config import LoraConfig, ModelConfig
from popi_jax.model.policy import Policy

CONFIG = ModelConfig(
    vocab_size=30,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    d_ff=24,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    max_length=256,
    compute_dtype="float32",
)
LORA = LoraConfig(rank=3, alpha=6.0, targets=("q", "v", "o", "down"))


def policy(lora: LoraConfig | None = None) -> Policy:
    """Returns the tiny model, fine-tuned in full or with adapters."""
    return Policy(CONFIG, lora)


def perturbed(tree, seed: int, scale: float = 0.3):
    """Returns the tree with noise on every leaf: an adapter whose b is zero would hide mistakes."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + scale * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def rows(rng: np.random.Generator, B: int, N: int, T: int, S: int, least: int = 1) -> PrefixBatch:
    """Returns B rows of N branches of random lengths, with garbage at padding, so that a leak would show."""
    return PrefixBatch(
        prefix_BxT=rng.integers(0, CONFIG.vocab_size, (B, T)).astype(np.int32),
        prefix_length_B=rng.integers(least, T + 1, B).astype(np.int32),
        branches_BxNxS=rng.integers(0, CONFIG.vocab_size, (B, N, S)).astype(np.int32),
        branch_length_BxN=rng.integers(1, S + 1, (B, N)).astype(np.int32),
    )


def packed(
    lines: PrefixBatch, length: int, micros: int = 0, n_bins: int = 0, shards: int = 1, groups_of: int = 1
) -> PackedBatch:
    """Packs the rows into bins of `length` tokens: one batch, or a stack of `micros` > 0 micro-batches.

    Each has `n_bins` bins, by default the number that the first needs. Equal rows are packed once. `shards` as in
    shapes.abstract_bins; `groups_of` consecutive rows may share the start of their prefixes.
    """
    rows = [
        packing.Row(prefix[:at].tolist(), [ids[:n].tolist() for ids, n in zip(branches, lengths, strict=True)])
        for prefix, at, branches, lengths in zip(
            lines.prefix_BxT,
            lines.prefix_length_B,
            lines.branches_BxNxS,
            lines.branch_length_BxN,
            strict=True,
        )
    ]
    first_R = packing.first_equals([repr(row) for row in rows])
    real = [i for i in sorted(set(first_R)) if rows[i].tokens]
    trees = packing.plant(rows, [real[i : i + groups_of] for i in range(0, len(real), groups_of)], length)
    bins = [[trees[i] for i in own] for own in packing.fill_bins([tree.tokens for tree in trees], length)]
    parts = [bins[start :: max(micros, 1)] for start in range(max(micros, 1))]
    n_bins = n_bins or len(parts[0])
    size = n_bins // shards
    scored = max(
        sum(tree.scored_tokens for own in part[start : start + size] for tree in own)
        for part in parts
        for start in range(0, n_bins, size)
    )
    shape = abstract_bins(len(rows), n_bins, length, shards, scored)
    filled = [packing.pack_bins(rows, part, shape, pad_id=0, first_R=first_R) for part in parts]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *filled) if micros else filled[0]
