"""Log-probabilities of branches that share a prefix. The prefix is read once; logits are computed in chunks.

A row is one prefix with N branches (y+ and y- under a prompt; K summaries under a user's signals). A branch attends to
the prefix and to itself, so its log-probabilities and gradients equal those of the sequence prefix + branch.
`data/batch.py` describes the two layouts, PrefixBatch and PackedBatch. Shape letters: docs/architecture.md.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from popi_jax.data.batch import Array, PackedBatch, PrefixBatch
from popi_jax.model import attention, sharding
from popi_jax.model.decoder import Decoder
from popi_jax.model.remat import remat
from popi_jax.training import objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Per-token scores of the branches, in float32; 0 at padding.

    Attributes:
        logp_BxNxS: log-probability of each branch token, in nats.
        ref_logp_BxNxS: the same under the reference; None without a reference.
        kl_BxNxS: KL(policy || reference) of the next-token distribution at each position, in nats, or None.
    """

    logp_BxNxS: jax.Array
    ref_logp_BxNxS: jax.Array | None = None
    kl_BxNxS: jax.Array | None = None


def layout(batch: PrefixBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the tokens, rope positions and segments (see Decoder) of the lines, each [B, L] with L = T + N * S."""
    B, T = batch.prefix_BxT.shape
    _, N, S = batch.branches_BxNxS.shape
    if N >= attention.ROW:
        raise ValueError(f"{N} branches in a row; at most {attention.ROW - 1}")
    prefix_index_1xT, branch_index_1x1xS = jnp.arange(T)[None, :], jnp.arange(S)[None, None, :]
    prefix_segment_BxT = jnp.where(prefix_index_1xT < batch.prefix_length_B[:, None], 0, -1)
    branch_segment_BxNxS = jnp.where(batch.mask_BxNxS, 1 + jnp.arange(N)[None, :, None], -1)
    branch_position_BxNxS = jnp.broadcast_to(batch.prefix_length_B[:, None, None] + branch_index_1x1xS, (B, N, S))

    def join(prefix_BxT: Array, branches_BxNxS: Array) -> jax.Array:
        return jnp.concatenate([prefix_BxT, branches_BxNxS.reshape(B, N * S)], axis=1)

    tokens_BxL = join(batch.prefix_BxT, batch.branches_BxNxS)
    positions_BxL = join(jnp.broadcast_to(prefix_index_1xT, (B, T)), branch_position_BxNxS)
    return tokens_BxL, positions_BxL, join(prefix_segment_BxT, branch_segment_BxNxS)


def predictors(decoder: Decoder, batch: PrefixBatch) -> jax.Array:
    """Returns the hidden state that predicts each branch token, [B, N, S, D].

    The prefix's last hidden state predicts a branch's first token; the branch's own states predict the rest.
    """
    B, T = batch.prefix_BxT.shape
    _, N, S = batch.branches_BxNxS.shape
    hidden_BxLxD = decoder(*layout(batch))
    last_B = jnp.maximum(batch.prefix_length_B - 1, 0)
    # In float32, so that the gradients of the branches are summed in float32.
    last_Bx1xD = jnp.take_along_axis(hidden_BxLxD.astype(jnp.float32), last_B[:, None, None], axis=1)
    first_BxNx1xD = jnp.broadcast_to(last_Bx1xD[:, None], (B, N, 1, hidden_BxLxD.shape[-1])).astype(hidden_BxLxD.dtype)
    rest_BxNxSxD = hidden_BxLxD[:, T:].reshape(B, N, S, -1)[:, :, :-1]
    return jnp.concatenate([first_BxNx1xD, rest_BxNxSxD], axis=2)


def score(
    decoder: Decoder,
    batch: PrefixBatch,
    *,
    temperature: float = 1.0,
    reference: Decoder | None = None,
    chunk: int | None = None,
) -> TokenScores:
    """Scores every branch token under its prefix.

    Args:
        temperature: log-probabilities are of softmax(logits / temperature), the distribution that is sampled from.
        reference: another decoder that scores the same tokens. With it, the KL to it is computed too.
        chunk: the number of positions whose logits a device holds at once, forward and backward. By default their
            logits take 256 MiB, and they are at most 1,024.
    """
    chunk = chunk or _default_chunk(decoder)
    shape = batch.branches_BxNxS.shape
    hidden_JxPxD = _flatten(predictors(decoder, batch))
    target_JxP = jnp.asarray(batch.branches_BxNxS).reshape(shape[0], -1)
    mask_BxNxS = batch.mask_BxNxS

    def unflatten(values_JxP: jax.Array) -> jax.Array:
        return jnp.where(mask_BxNxS, values_JxP.reshape(shape), 0.0)

    if reference is None:

        def one(hidden_JxXxD: jax.Array, target_JxX: jax.Array) -> jax.Array:
            return _gather(_log_softmax(decoder, hidden_JxXxD, temperature), target_JxX)

        return TokenScores(unflatten(_in_chunks(one, chunk, decoder.mesh, hidden_JxPxD, target_JxP)))

    ref_hidden_JxPxD = _flatten(predictors(reference, batch))

    def both(hidden_JxXxD: jax.Array, ref_hidden_JxXxD: jax.Array, target_JxX: jax.Array) -> tuple[jax.Array, ...]:
        logp_JxXxV = _log_softmax(decoder, hidden_JxXxD, temperature)
        ref_logp_JxXxV = _log_softmax(reference, ref_hidden_JxXxD, temperature)
        kl_JxX = jnp.sum(jnp.exp(logp_JxXxV) * (logp_JxXxV - ref_logp_JxXxV), axis=-1)
        return _gather(logp_JxXxV, target_JxX), _gather(ref_logp_JxXxV, target_JxX), kl_JxX

    hidden = (hidden_JxPxD, ref_hidden_JxPxD)
    logp_JxP, ref_logp_JxP, kl_JxP = _in_chunks(both, chunk, decoder.mesh, *hidden, target_JxP)
    return TokenScores(unflatten(logp_JxP), unflatten(ref_logp_JxP), unflatten(kl_JxP))


def score_packed(decoder: Decoder, batch: PackedBatch, *, chunk: int | None = None) -> jax.Array:
    """Returns the log-probability of every branch under its prefix, summed over its tokens, [R, N], float32, in nats.

    Args:
        chunk: as for `score`.
    """
    read = (jnp.asarray(x) for x in (batch.tokens_CxL, batch.positions_CxL, batch.segments_CxL))
    hidden_CxLxD = decoder(*read)
    # Each shard gathers from its own bins only, so that devices need not communicate.
    predictor_ShxW = jnp.asarray(batch.predictor_ShxW)
    by_shard = hidden_CxLxD.reshape(len(predictor_ShxW), -1, hidden_CxLxD.shape[-1])
    # In float32, since a state that predicts several branches sums their gradients.
    hidden_ShxWxD = jnp.take_along_axis(by_shard.astype(jnp.float32), predictor_ShxW[:, :, None], axis=1)
    hidden_ShxWxD = hidden_ShxWxD.astype(hidden_CxLxD.dtype)

    def one(hidden_JxXxD: jax.Array, target_JxX: jax.Array) -> jax.Array:
        return _gather(_log_softmax(decoder, hidden_JxXxD, 1.0), target_JxX)

    chunk = chunk or _default_chunk(decoder)
    logp_ShxW = _in_chunks(one, chunk, decoder.mesh, hidden_ShxWxD, jnp.asarray(batch.target_ShxW))
    R, N = batch.length_RxN.shape
    branch_ShW = jnp.asarray(batch.branch_ShxW).reshape(-1)
    packed_RxN = jax.ops.segment_sum(logp_ShxW.reshape(-1), branch_ShW, R * N + 1)[:-1].reshape(R, N)
    return packed_RxN[jnp.asarray(batch.first_R)]


def response_logps(decoder: Decoder, bins: PackedBatch, reduction: str) -> jax.Array:
    """Returns log pi(y|x, z) of every response, [R, N], in nats, reduced over its tokens by objective.reduce_logp."""
    return objective.reduce_logp(score_packed(decoder, bins), jnp.asarray(bins.length_RxN), reduction)


def _flatten(hidden_BxNxSxD: jax.Array) -> jax.Array:
    return hidden_BxNxSxD.reshape(hidden_BxNxSxD.shape[0], -1, hidden_BxNxSxD.shape[-1])


def _log_softmax(decoder: Decoder, hidden_JxXxD: jax.Array, temperature: float) -> jax.Array:
    with jax.named_scope("logits"):
        return jax.nn.log_softmax(decoder.logits(hidden_JxXxD) / temperature, axis=-1)


def _gather(logp_JxXxV: jax.Array, target_JxX: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logp_JxXxV, target_JxX[..., None], axis=-1)[..., 0]


def _default_chunk(decoder: Decoder) -> int:
    return max(1, min(1024, (1 << 26) // decoder.config.vocab_size))


def _in_chunks(fn, chunk: int, mesh: Mesh | None, *args_JxPx: jax.Array):
    """Maps fn over chunks of the second axis with rematerialisation, so that no full [J, P, V] array exists.

    The first axis stays whole because it is sharded: every device processes its own lines in parallel.
    """
    J, P = args_JxPx[0].shape[:2]
    held = -(-J // sharding.row_shards(mesh))
    count = -(-held * P // chunk)
    size = -(-P // count)  # Nearly equal chunks need little padding in the last one.
    if size == P:
        return remat(fn, looped=False)(*args_JxPx)
    count = -(-P // size)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - P)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(J, count, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda xs: remat(fn, looped=True)(*xs), tuple(split(x) for x in args_JxPx))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(J, count * size, *y.shape[3:])[:, :P], out)
