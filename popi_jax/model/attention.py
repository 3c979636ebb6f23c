"""Attention over packed sequences and, in decoding, over a prefix that all branches of a row share.

Both functions know nothing of the model, so that a kernel with the same signature can stand in for either. Scores and
softmax are in float32. Query head h reads kv head h // G (G = H / Kv); kv heads are grouped in the products, never
repeated in memory. No scores outlive their block of queries: the backward pass computes them again from each query's
log-sum of exponentials (Dao et al. 2022, FlashAttention, algorithm 4).
Shapes: B lines of L tokens, H query heads, Kv kv heads, G = H / Kv, Dh head width; Q queries of a block, which see the
first E keys; in decoding T prefix length, N branches, S slots of a branch, L = T + S.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from popi_jax.model import remat
from popi_jax.model.product import product

# Finite, so that a query with nothing to attend to gives no NaN.
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
        out_BxLxHxDh in the type of v; 0 at padding.
    """
    B, L, H, Dh = q_BxLxHxDh.shape
    Kv = k_BxLxKvxDh.shape[2]
    # In the order of the products: the compiler would transpose the scores instead, which costs more.
    q_BxKvxGxLxDh = (q_BxLxHxDh * Dh**-0.5).reshape(B, L, Kv, H // Kv, Dh).transpose(0, 2, 3, 1, 4)
    k_BxKvxLxDh = k_BxLxKvxDh.transpose(0, 2, 1, 3)
    v_BxKvxLxDh = v_BxLxKvxDh.transpose(0, 2, 1, 3)
    out_BxKvxGxLxDh, _ = _softmax_average(q_BxKvxGxLxDh, k_BxKvxLxDh, v_BxKvxLxDh, segments_BxL)
    return out_BxKvxGxLxDh.transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)


def _blocks(L: int) -> Iterator[tuple[int, int]]:
    """Start and end of each block of queries."""
    size = max(_BLOCK, -(-L // _MAX_BLOCKS))
    for start in range(0, L, size):
        yield start, min(start + size, L)


def _scores(
    q_BxKvxGxLxDh: jax.Array, k_BxKvxLxDh: jax.Array, segments_BxL: jax.Array, start: int, end: int
) -> jax.Array:
    s_BxKvxGxQxE = product("bkgqd,bked->bkgqe", q_BxKvxGxLxDh[:, :, :, start:end], k_BxKvxLxDh[:, :, :end])
    # Added rather than selected: the scores' gradient then needs no mask of its own.
    bias_BxQxE = jnp.where(visible(segments_BxL, start, end), 0.0, _MASKED)
    return s_BxKvxGxQxE + bias_BxQxE[:, None, None]


def _softmax_average_and_log_sum(
    q_BxKvxGxLxDh: jax.Array, k_BxKvxLxDh: jax.Array, v_BxKvxLxDh: jax.Array, segments_BxL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The average of the values in v's type, and log(sum(exp(scores))) of each query, float32; queries are scaled."""
    out_blocks, log_sum_blocks = [], []
    for start, end in _blocks(q_BxKvxGxLxDh.shape[3]):
        s_BxKvxGxQxE = _scores(q_BxKvxGxLxDh, k_BxKvxLxDh, segments_BxL, start, end)
        # Above what is masked, so that a query without a key has no weights, forward and backward, not equal ones.
        max_BxKvxGxQx1 = jnp.maximum(jnp.max(s_BxKvxGxQxE, axis=-1, keepdims=True), _MASKED / 2)
        w_BxKvxGxQxE = jnp.exp(s_BxKvxGxQxE - jax.lax.stop_gradient(max_BxKvxGxQx1))
        sum_BxKvxGxQx1 = jnp.maximum(jnp.sum(w_BxKvxGxQxE, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        out_BxKvxGxQxDh = product("bkgqe,bked->bkgqd", w_BxKvxGxQxE.astype(v_BxKvxLxDh.dtype), v_BxKvxLxDh[:, :, :end])
        out_blocks.append((out_BxKvxGxQxDh / sum_BxKvxGxQx1).astype(v_BxKvxLxDh.dtype))
        log_sum_blocks.append(max_BxKvxGxQx1 + jnp.log(sum_BxKvxGxQx1))
    return jnp.concatenate(out_blocks, axis=3), jnp.concatenate(log_sum_blocks, axis=3)


_softmax_average = jax.custom_vjp(_softmax_average_and_log_sum)


def _forward(*args: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    out_BxKvxGxLxDh, log_sum_BxKvxGxLx1 = map(remat.keepable, _softmax_average_and_log_sum(*args))
    return (out_BxKvxGxLxDh, log_sum_BxKvxGxLx1), (*args, out_BxKvxGxLxDh, log_sum_BxKvxGxLx1)


def _backward(kept: tuple[jax.Array, ...], gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array | None, ...]:
    q_BxKvxGxLxDh, k_BxKvxLxDh, v_BxKvxLxDh, segments_BxL, out_BxKvxGxLxDh, log_sum_BxKvxGxLx1 = kept
    dout_BxKvxGxLxDh, _ = gradients  # Nothing reads the log-sums.
    # What the softmax's normalisation takes from each weight's gradient: its average under the weights.
    common_BxKvxGxLx1 = jnp.sum(
        dout_BxKvxGxLxDh.astype(jnp.float32) * out_BxKvxGxLxDh.astype(jnp.float32), axis=-1, keepdims=True
    )
    B, Kv, L, Dh = k_BxKvxLxDh.shape
    dq_blocks = []
    dk_BxKvxDhxL, dv_BxKvxDhxL = jnp.zeros((2, B, Kv, Dh, L), jnp.float32)
    for start, end in _blocks(L):
        q_BxKvxGxQxDh, dout_BxKvxGxQxDh, common_BxKvxGxQx1, log_sum_BxKvxGxQx1 = (
            x[:, :, :, start:end] for x in (q_BxKvxGxLxDh, dout_BxKvxGxLxDh, common_BxKvxGxLx1, log_sum_BxKvxGxLx1)
        )
        with jax.named_scope(remat.RECOMPUTED):
            s_BxKvxGxQxE = _scores(q_BxKvxGxLxDh, k_BxKvxLxDh, segments_BxL, start, end)
        p_BxKvxGxQxE = jnp.exp(s_BxKvxGxQxE - log_sum_BxKvxGxQx1)
        dp_BxKvxGxQxE = product("bkgqd,bked->bkgqe", dout_BxKvxGxQxDh, v_BxKvxLxDh[:, :, :end])
        ds_BxKvxGxQxE = (p_BxKvxGxQxE * (dp_BxKvxGxQxE - common_BxKvxGxQx1)).astype(q_BxKvxGxLxDh.dtype)
        dq_blocks.append(product("bkgqe,bked->bkgqd", ds_BxKvxGxQxE, k_BxKvxLxDh[:, :, :end]))
        # The scores as the second operand: as the first they would be transposed, and they are the largest of all.
        dk_BxKvxDhxE = product("bkgqd,bkgqe->bkde", q_BxKvxGxQxDh, ds_BxKvxGxQxE)
        dv_BxKvxDhxE = product("bkgqd,bkgqe->bkde", dout_BxKvxGxQxDh, p_BxKvxGxQxE.astype(v_BxKvxLxDh.dtype))
        dk_BxKvxDhxL = dk_BxKvxDhxL.at[..., :end].add(dk_BxKvxDhxE)
        dv_BxKvxDhxL = dv_BxKvxDhxL.at[..., :end].add(dv_BxKvxDhxE)
    dq_BxKvxGxLxDh = jnp.concatenate(dq_blocks, axis=3).astype(q_BxKvxGxLxDh.dtype)
    dk_BxKvxLxDh, dv_BxKvxLxDh = (x.swapaxes(2, 3).astype(k_BxKvxLxDh.dtype) for x in (dk_BxKvxDhxL, dv_BxKvxDhxL))
    return dq_BxKvxGxLxDh, dk_BxKvxLxDh, dv_BxKvxLxDh, None


_softmax_average.defvjp(_forward, _backward)


def visible(segments_BxL: jax.Array, start: int, end: int) -> jax.Array:
    """Which of the keys [0, end) each of the queries [start, end) attends to, [B, Q, E] booleans."""
    query_BxQx1 = segments_BxL[:, start:end, None]
    key_Bx1xE = segments_BxL[:, None, :end]
    causal_1xQxE = jnp.arange(end)[None, None, :] <= jnp.arange(start, end)[None, :, None]
    own_prefix_BxQx1 = query_BxQx1 // ROW * ROW  # -ROW at padding: no key's segment.
    return ((key_Bx1xE == own_prefix_BxQx1) | ((key_Bx1xE == query_BxQx1) & (key_Bx1xE >= 0))) & causal_1xQxE


def attend_decode(
    q_BxNxHxDh: jax.Array,
    prefix_k_BxKvxDhxT: jax.Array,
    prefix_v_BxKvxTxDh: jax.Array,
    prefix_valid_BxT: jax.Array,
    own_k_BxKvxNxSxDh: jax.Array,
    own_v_BxKvxNxSxDh: jax.Array,
    index: jax.Array,
) -> jax.Array:
    """One query of each of N branches per row: one softmax over the row's prefix and the branch's own earlier tokens.

    Keys and values come as the products read them, so that nothing that grows with the prefix is transposed per token.

    Args:
        q_BxNxHxDh: queries, rope applied.
        prefix_k_BxKvxDhxT: keys of the prefix, one copy for all branches, each a column.
        prefix_v_BxKvxTxDh: its values.
        prefix_valid_BxT: which slots of the prefix hold a token.
        own_k_BxKvxNxSxDh: keys of each branch; the slots 0..index are filled.
        own_v_BxKvxNxSxDh: its values.
        index: scalar, the slot of the query's own token.

    Returns:
        out_BxNxHxDh in the type of the values.
    """
    B, N, H, Dh = q_BxNxHxDh.shape
    Kv, T = prefix_v_BxKvxTxDh.shape[1:3]
    S = own_k_BxKvxNxSxDh.shape[3]
    q_BxKvxNxGxDh = (q_BxNxHxDh * Dh**-0.5).reshape(B, N, Kv, H // Kv, Dh).transpose(0, 2, 1, 3, 4)
    prefix_s_BxKvxNxGxT = product("bkngd,bkdt->bkngt", q_BxKvxNxGxDh, prefix_k_BxKvxDhxT)
    own_s_BxKvxNxGxS = product("bkngd,bknsd->bkngs", q_BxKvxNxGxDh, own_k_BxKvxNxSxDh)
    prefix_s_BxKvxNxGxT = jnp.where(prefix_valid_BxT[:, None, None, None], prefix_s_BxKvxNxGxT, _MASKED)
    own_s_BxKvxNxGxS = jnp.where(jnp.arange(S) <= index, own_s_BxKvxNxGxS, _MASKED)
    s_BxKvxNxGxL = jnp.concatenate([prefix_s_BxKvxNxGxT, own_s_BxKvxNxGxS], axis=-1)
    p_BxKvxNxGxL = jax.nn.softmax(s_BxKvxNxGxL, axis=-1).astype(own_v_BxKvxNxSxDh.dtype)
    out_BxKvxNxGxDh = product("bkngt,bktd->bkngd", p_BxKvxNxGxL[..., :T], prefix_v_BxKvxTxDh)
    out_BxKvxNxGxDh += product("bkngs,bknsd->bkngd", p_BxKvxNxGxL[..., T:], own_v_BxKvxNxSxDh)
    out_BxNxKvxGxDh = out_BxKvxNxGxDh.astype(own_v_BxKvxNxSxDh.dtype).transpose(0, 2, 1, 3, 4)
    return out_BxNxKvxGxDh.reshape(B, N, H, Dh)
