"""Attention over packed sequences and, in decoding, over a prefix that all branches of a row share.

Both functions know nothing of the model, so that a kernel with the same signature can stand in for either. Scores and
softmax are in float32. Query head h reads kv head h // G (G = H / Kv); kv heads are grouped in the products, never
repeated in memory.
Shapes: B lines of L tokens, H query heads, Kv kv heads, G = H / Kv, Dh head width; Q queries of a block, which see the
first E keys; in decoding T prefix length, N branches, S slots of a branch, L = T + S.
"""

import jax
import jax.numpy as jnp

from popi_jax.model.product import product

# Finite, so that a row with nothing to attend to gives an average of values, not NaN, and finite gradients.
_MASKED = -1e30

# Segments count up by this from one row of a bin to the next: a row has fewer branches.
ROW = 1024

# Queries go in blocks, each against the keys up to its end: what lies after is neither computed nor stored. Forward of
# 2 x 512 tokens, 9 heads, in ms of CPU time: 12 in blocks of 128, 37 in one. The number of blocks is bounded for the
# compiler's sake.
_BLOCK = 128
_MAX_BLOCKS = 16


def attend(q_BxLxHxDh: jax.Array, k_BxLxKvxDh: jax.Array, v_BxLxKvxDh: jax.Array, segments_BxL: jax.Array) -> jax.Array:
    """Causal attention within segments.

    A query attends to the keys at its own or an earlier index that are not padding and belong to its row's prefix or to
    its own branch.

    Args:
        q_BxLxHxDh: queries, rope applied.
        k_BxLxKvxDh: keys, rope applied.
        v_BxLxKvxDh: values.
        segments_BxL: -1 padding; row r's shared prefix r * ROW, its branch n >= 1 r * ROW + n. A line of one row has
            row 0 alone.

    Returns:
        out_BxLxHxDh in the type of v. Rows of padding are finite and mean nothing.
    """
    B, L, H, Dh = q_BxLxHxDh.shape
    Kv = k_BxLxKvxDh.shape[2]
    # In the order of the products: the compiler would transpose the scores instead, which costs more.
    q_BxKvxGxLxDh = q_BxLxHxDh.reshape(B, L, Kv, H // Kv, Dh).transpose(0, 2, 3, 1, 4)
    k_BxKvxLxDh = k_BxLxKvxDh.transpose(0, 2, 1, 3)
    v_BxKvxLxDh = v_BxLxKvxDh.transpose(0, 2, 1, 3)
    size = max(_BLOCK, -(-L // _MAX_BLOCKS))
    blocks = []
    for start in range(0, L, size):
        end = min(start + size, L)
        s_BxKvxGxQxE = product("bkgqd,bked->bkgqe", q_BxKvxGxLxDh[:, :, :, start:end], k_BxKvxLxDh[:, :, :end])
        # Added rather than selected: the scores' gradient then needs no mask of its own.
        bias_BxQxE = jnp.where(visible(segments_BxL, start, end), 0.0, _MASKED)
        s_BxKvxGxQxE = s_BxKvxGxQxE * Dh**-0.5 + bias_BxQxE[:, None, None]
        p_BxKvxGxQxE = jax.nn.softmax(s_BxKvxGxQxE, axis=-1).astype(v_BxLxKvxDh.dtype)
        out_BxKvxGxQxDh = product("bkgqe,bked->bkgqd", p_BxKvxGxQxE, v_BxKvxLxDh[:, :, :end])
        blocks.append(out_BxKvxGxQxDh.astype(v_BxLxKvxDh.dtype))
    out_BxKvxGxLxDh = jnp.concatenate(blocks, axis=3)
    return out_BxKvxGxLxDh.transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)


def visible(segments_BxL: jax.Array, start: int, end: int) -> jax.Array:
    """Which of the keys [0, end) each of the queries [start, end) attends to, [B, Q, E] booleans."""
    query_BxQx1 = segments_BxL[:, start:end, None]
    key_Bx1xE = segments_BxL[:, None, :end]
    causal_1xQxE = jnp.arange(end)[None, None, :] <= jnp.arange(start, end)[None, :, None]
    own_prefix_BxQx1 = query_BxQx1 // ROW * ROW  # -ROW at padding: no key's segment.
    return ((key_Bx1xE == own_prefix_BxQx1) | ((key_Bx1xE == query_BxQx1) & (key_Bx1xE >= 0))) & causal_1xQxE


def attend_decode(
    q_BxNxHxDh: jax.Array,
    prefix_k_BxTxKvxDh: jax.Array,
    prefix_v_BxTxKvxDh: jax.Array,
    prefix_valid_BxT: jax.Array,
    own_k_BxNxSxKvxDh: jax.Array,
    own_v_BxNxSxKvxDh: jax.Array,
    index: jax.Array,
) -> jax.Array:
    """One query of each of N branches per row: one softmax over the row's prefix and the branch's own earlier tokens.

    Args:
        q_BxNxHxDh: queries, rope applied.
        prefix_k_BxTxKvxDh: keys of the prefix, one copy for all branches.
        prefix_v_BxTxKvxDh: its values.
        prefix_valid_BxT: which slots of the prefix hold a token.
        own_k_BxNxSxKvxDh: keys of each branch; the slots 0..index are filled.
        own_v_BxNxSxKvxDh: its values.
        index: scalar, the slot of the query's own token.

    Returns:
        out_BxNxHxDh in the type of the values.
    """
    B, N, H, Dh = q_BxNxHxDh.shape
    T, Kv = prefix_k_BxTxKvxDh.shape[1:3]
    S = own_k_BxNxSxKvxDh.shape[2]
    q_BxNxKvxGxDh = q_BxNxHxDh.reshape(B, N, Kv, H // Kv, Dh)
    prefix_s_BxNxKvxGxT = jnp.einsum(
        "bnkgd,btkd->bnkgt", q_BxNxKvxGxDh, prefix_k_BxTxKvxDh, preferred_element_type=jnp.float32
    )
    own_s_BxNxKvxGxS = jnp.einsum(
        "bnkgd,bnskd->bnkgs", q_BxNxKvxGxDh, own_k_BxNxSxKvxDh, preferred_element_type=jnp.float32
    )
    prefix_s_BxNxKvxGxT = jnp.where(prefix_valid_BxT[:, None, None, None], prefix_s_BxNxKvxGxT * Dh**-0.5, _MASKED)
    written_S = jnp.arange(S) <= index
    own_s_BxNxKvxGxS = jnp.where(written_S[None, None, None, None], own_s_BxNxKvxGxS * Dh**-0.5, _MASKED)
    s_BxNxKvxGxL = jnp.concatenate([prefix_s_BxNxKvxGxT, own_s_BxNxKvxGxS], axis=-1)
    p_BxNxKvxGxL = jax.nn.softmax(s_BxNxKvxGxL, axis=-1).astype(own_v_BxNxSxKvxDh.dtype)
    out_BxNxKvxGxDh = jnp.einsum("bnkgt,btkd->bnkgd", p_BxNxKvxGxL[..., :T], prefix_v_BxTxKvxDh)
    out_BxNxKvxGxDh += jnp.einsum("bnkgs,bnskd->bnkgd", p_BxNxKvxGxL[..., T:], own_v_BxNxSxKvxDh)
    return out_BxNxKvxGxDh.reshape(B, N, H, Dh)
