"""Attention over packed sequences and, in decoding, over a prefix that all branches of a row share.

Neither function knows about the model, so a kernel with the same signature can replace either. Scores and softmax are
computed in float32. Query head h reads kv head h // G; kv heads are grouped in the products, never repeated in memory.
Scores exist for one block of queries at a time: the backward pass recomputes them from each query's log-sum-exp (Dao et
al. 2022, FlashAttention, algorithm 4).

Shape letters: docs/architecture.md.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from popi_jax.model import remat
from popi_jax.model.product import product

# Finite, so that a query with no visible key does not produce NaN.
_MASKED = -1e30

# Segment ids of consecutive rows of a bin are this far apart; a row has fewer branches.
ROW = 1024

# Queries are processed in blocks, each against the keys up to its end; later scores are neither computed nor stored.
# Forward pass of 2 x 512 tokens with 9 heads on CPU: 12 ms in blocks of 128, 37 ms in one block. The number of blocks
# is bounded to limit compile time.
_BLOCK = 128
_MAX_BLOCKS = 16


def attend(q_BxLxHxDh: jax.Array, k_BxLxKvxDh: jax.Array, v_BxLxKvxDh: jax.Array, segments_BxL: jax.Array) -> jax.Array:
    """Causal attention within segments.

    A query attends to every key that is at its own or an earlier index, is not padding, and belongs to its row's prefix
    or its own branch.

    Args:
        q_BxLxHxDh: queries, rope applied.
        k_BxLxKvxDh: keys, rope applied.
        v_BxLxKvxDh: values.
        segments_BxL: -1 at padding, r * ROW in row r's shared prefix, r * ROW + n in its branch n >= 1. A line with a
            single row uses row 0.

    Returns:
        out_BxLxHxDh in v's dtype; 0 at padding.
    """
    B, L, H, Dh = q_BxLxHxDh.shape
    Kv = k_BxLxKvxDh.shape[2]
    # Laid out as the products read them: otherwise the compiler transposes the scores, which costs more.
    q_BxKvxGxLxDh = (q_BxLxHxDh * Dh**-0.5).reshape(B, L, Kv, H // Kv, Dh).transpose(0, 2, 3, 1, 4)
    k_BxKvxLxDh = k_BxLxKvxDh.transpose(0, 2, 1, 3)
    v_BxKvxLxDh = v_BxLxKvxDh.transpose(0, 2, 1, 3)
    out_BxKvxGxLxDh, _ = _softmax_average(q_BxKvxGxLxDh, k_BxKvxLxDh, v_BxKvxLxDh, segments_BxL)
    return out_BxKvxGxLxDh.transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)


def _blocks(L: int) -> Iterator[tuple[int, int]]:
    """Yields the start and end of each block of queries."""
    size = max(_BLOCK, -(-L // _MAX_BLOCKS))
    for start in range(0, L, size):
        yield start, min(start + size, L)


def _scores(
    q_BxKvxGxLxDh: jax.Array, k_BxKvxLxDh: jax.Array, segments_BxL: jax.Array, start: int, end: int
) -> jax.Array:
    s_BxKvxGxQxE = product("bkgqd,bked->bkgqe", q_BxKvxGxLxDh[:, :, :, start:end], k_BxKvxLxDh[:, :, :end])
    # Added, not selected, so that the gradient of the scores needs no mask.
    bias_BxQxE = jnp.where(visible(segments_BxL, start, end), 0.0, _MASKED)
    return s_BxKvxGxQxE + bias_BxQxE[:, None, None]


def _softmax_average_and_log_sum(
    q_BxKvxGxLxDh: jax.Array, k_BxKvxLxDh: jax.Array, v_BxKvxLxDh: jax.Array, segments_BxL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the average of the values in v's dtype and each query's log-sum-exp in float32; queries come scaled."""
    out_blocks, log_sum_blocks = [], []
    for start, end in _blocks(q_BxKvxGxLxDh.shape[3]):
        s_BxKvxGxQxE = _scores(q_BxKvxGxLxDh, k_BxKvxLxDh, segments_BxL, start, end)
        # Kept above the mask value: a query with no visible key then has zero weights in both passes, not equal ones.
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
    dout_BxKvxGxLxDh, _ = gradients  # The caller discards the log-sums.
    # The softmax gradient subtracts the average of dp under p, which equals sum(dout * out).
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
        # The scores are the second operand: as the first they would be transposed, and they are the largest array.
        dk_BxKvxDhxE = product("bkgqd,bkgqe->bkde", q_BxKvxGxQxDh, ds_BxKvxGxQxE)
        dv_BxKvxDhxE = product("bkgqd,bkgqe->bkde", dout_BxKvxGxQxDh, p_BxKvxGxQxE.astype(v_BxKvxLxDh.dtype))
        dk_BxKvxDhxL = dk_BxKvxDhxL.at[..., :end].add(dk_BxKvxDhxE)
        dv_BxKvxDhxL = dv_BxKvxDhxL.at[..., :end].add(dv_BxKvxDhxE)
    dq_BxKvxGxLxDh = jnp.concatenate(dq_blocks, axis=3).astype(q_BxKvxGxLxDh.dtype)
    dk_BxKvxLxDh, dv_BxKvxLxDh = (x.swapaxes(2, 3).astype(k_BxKvxLxDh.dtype) for x in (dk_BxKvxDhxL, dv_BxKvxDhxL))
    return dq_BxKvxGxLxDh, dk_BxKvxLxDh, dv_BxKvxLxDh, None


_softmax_average.defvjp(_forward, _backward)


def visible(segments_BxL: jax.Array, start: int, end: int) -> jax.Array:
    """Returns booleans [B, Q, E]: whether each query in [start, end) attends to each key in [0, end)."""
    query_BxQx1 = segments_BxL[:, start:end, None]
    key_Bx1xE = segments_BxL[:, None, :end]
    causal_1xQxE = jnp.arange(end)[None, None, :] <= jnp.arange(start, end)[None, :, None]
    own_prefix_BxQx1 = query_BxQx1 // ROW * ROW  # -ROW at padding, which matches no key.
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
    """Attends from one query per branch to the row's prefix and the branch's own earlier tokens, in one softmax.

    Keys and values are laid out as the products read them, so that no array that grows with the prefix is transposed
    for every token.

    Args:
        q_BxNxHxDh: queries, rope applied.
        prefix_k_BxKvxDhxT: keys of the prefix, one copy for all branches, each a column.
        prefix_v_BxKvxTxDh: values of the prefix.
        prefix_valid_BxT: whether each slot of the prefix holds a token.
        own_k_BxKvxNxSxDh: keys of each branch; slots 0..index are filled.
        own_v_BxKvxNxSxDh: values of each branch.
        index: scalar, the slot of the query's token.

    Returns:
        out_BxNxHxDh in the dtype of the values.
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
