"""Attention by the accelerators' own kernels, for `attention.attend`: splash attention on TPUs, cuDNN's on NVIDIA GPUs.

`resolve` says which one a config means, `bind` gives the function; all have the signature of `attention.attend` and
its result, but for rounding and at padding. Pallas is imported when splash attention is first traced, not before.
Shapes: B lines of L tokens, padded to P = C * block tokens in C blocks; H query heads, Kv kv heads, Dh head width; E
keys of the splash kernel, which are given twice, E = 2 * P.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from popi_jax.errors import UserError
from popi_jax.model import attention, remat, sharding

# (q_BxLxHxDh, k_BxLxKvxDh, v_BxLxKvxDh, segments_BxL) -> out_BxLxHxDh
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

CHOICES = ("auto", "xla", "splash", "cudnn")

# The largest block of queries and of keys that the splash kernel works on. It holds block x block float32 scores in
# the chip's vector memory, 1 MiB here.
_BLOCK = 512
_LANES = 128  # Blocks are multiples of the vector unit's width.

# A query's own index and its branch's first index share one int32.
_INDEX_BITS = 16

_NO_QUERY = -2  # The segment id of a key that no query has: rows count from 0, padding is -1.


def resolve(name: str, platform: str, compute_dtype: str) -> str:
    """Which attention runs: "xla", "splash" or "cudnn".

    Args:
        name: config.model.attention, one of CHOICES. "auto" is splash on TPUs, cuDNN on GPUs in bfloat16, else XLA.
        platform: of the devices that the program is for: "cpu", "gpu" or "tpu".
        compute_dtype: config.model.compute_dtype.

    Raises:
        UserError: a choice that these devices or this type cannot run.
    """
    if name == "auto":
        if platform == "tpu":
            return "splash"
        return "cudnn" if platform == "gpu" and compute_dtype == "bfloat16" else "xla"
    needs = {"splash": "tpu", "cudnn": "gpu"}.get(name, platform)
    if platform != needs:
        raise UserError(
            f"config.model.attention is {name!r}, which needs a {needs.upper()}, and this program is for"
            f" {platform.upper()}; set it to 'auto' or 'xla'"
        )
    if name == "cudnn" and compute_dtype != "bfloat16":
        raise UserError(
            f"config.model.attention is 'cudnn', which needs config.model.compute_dtype 'bfloat16', not"
            f" {compute_dtype!r}; set one of the two, config.model.attention to 'auto' or 'xla'"
        )
    return name


def bind(name: str, mesh: Mesh | None) -> Attend:
    """The attention of this resolved name, on this mesh or on one device.

    XLA's is split by the compiler. A kernel is opaque to it, so the others run on each device's own lines and heads.

    Raises:
        UserError: (when traced) lines or heads that do not divide over the mesh.
    """
    return {"xla": attention.attend, "splash": per_device(splash, mesh), "cudnn": per_device(cudnn, mesh)}[name]


def per_device(attend: Attend, mesh: Mesh | None) -> Attend:
    """`attend` on each device's share of the lines and heads (sharding.RULES); no communication.

    Query heads and their kv heads are split alike, so that a device holds whole groups of them.
    """
    if mesh is None:
        return attend

    @functools.wraps(attend)
    def split(q_BxLxHxDh: jax.Array, k_BxLxKvxDh: jax.Array, v_BxLxKvxDh: jax.Array, segments_BxL: jax.Array) -> Any:
        def spec(x: jax.Array, *axes: str) -> jax.sharding.PartitionSpec:
            return sharding.spec(axes, x.shape, mesh, "attention")

        q_spec = spec(q_BxLxHxDh, "batch", "length", "heads", "head_dim")
        kv_spec = spec(k_BxLxKvxDh, "batch", "length", "kv_heads", "head_dim")
        in_specs = (q_spec, kv_spec, kv_spec, spec(segments_BxL, "batch", "length"))
        # Unchecked: a kernel does not say over which axes its result varies.
        split_attend = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=q_spec, check_vma=False)
        return split_attend(q_BxLxHxDh, k_BxLxKvxDh, v_BxLxKvxDh, segments_BxL)

    return split


def splash(
    q_BxLxHxDh: jax.Array,
    k_BxLxKvxDh: jax.Array,
    v_BxLxKvxDh: jax.Array,
    segments_BxL: jax.Array,
    *,
    block: int = _BLOCK,
    interpret: bool = False,
) -> jax.Array:
    """`attention.attend` by JAX's splash attention, a Pallas kernel for TPUs; nothing of size L x L is ever stored.

    The kernel's mask is an equality of segment ids AND a function of the two indices, ours a union. So every key is
    given twice: once as a prefix's, to all of its row, once as a branch's. The ids keep rows apart; the function keeps
    a query to prefix keys up to its own index, or to branch keys from its branch's start up to its own index. It is
    still one softmax. Blocks in which no query attends to any key are skipped, as the segments say at run time.

    Memory: keys and values twice (4 * P * Kv * Dh numbers a line), their gradients likewise; the log-sums of one line,
    H * P * 128 float32, while the kernel that writes them runs, as lines go one after another; two tables of 2 * C^2
    int32 in scalar memory.

    Args:
        q_BxLxHxDh: queries, rope applied.
        k_BxLxKvxDh: keys, rope applied.
        v_BxLxKvxDh: values.
        segments_BxL: see `attention.attend`. Here a branch's tokens lie side by side, with nothing but padding between
            them, as `scoring.layout` and `packing.pack_bins` put them; a row's prefix may lie anywhere.
        block: tokens of the largest block, a multiple of 128.
        interpret: run on the CPU, step by step, for tests.

    Returns:
        out_BxLxHxDh in the type of q. Rows of padding attend to themselves.

    Raises:
        ValueError: lines of more than 65,536 tokens.
    """
    _, L, _, Dh = q_BxLxHxDh.shape
    # Of nearly equal blocks, so that little is added to fill the last.
    count = -(-L // block)
    size = -(-L // (count * _LANES)) * _LANES
    P = count * size
    if P > 1 << _INDEX_BITS:
        raise ValueError(f"splash attention over {L} tokens; at most {1 << _INDEX_BITS}")

    def pad(x_BxLx: jax.Array, value: int = 0) -> jax.Array:
        widths = [(0, 0), (0, P - L)] + [(0, 0)] * (x_BxLx.ndim - 2)
        return jnp.pad(x_BxLx, widths, constant_values=value)

    scaled_BxLxHxDh = (q_BxLxHxDh.astype(jnp.float32) * Dh**-0.5).astype(q_BxLxHxDh.dtype)
    q_BxHxPxDh, k_BxKvxPxDh, v_BxKvxPxDh = (
        pad(x).transpose(0, 2, 1, 3) for x in (scaled_BxLxHxDh, k_BxLxKvxDh, v_BxLxKvxDh)
    )
    line = functools.partial(_splash_line, block=size, interpret=interpret)
    out_BxHxPxDh = jax.vmap(line)(q_BxHxPxDh, k_BxKvxPxDh, v_BxKvxPxDh, pad(segments_BxL, -1))
    return out_BxHxPxDh.transpose(0, 2, 1, 3)[:, :L]


def _splash_line(
    q_HxPxDh: jax.Array,
    k_KvxPxDh: jax.Array,
    v_KvxPxDh: jax.Array,
    segments_P: jax.Array,
    *,
    block: int,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    P = segments_P.shape[0]
    row_P, prefix_P = segments_P // attention.ROW, _is_prefix(segments_P)
    start_P = _starts(segments_P)
    packed_P: Any = start_P << _INDEX_BITS | jnp.arange(P)
    key_row_E = jnp.concatenate([jnp.where(prefix_P, row_P, _NO_QUERY), jnp.where(prefix_P, _NO_QUERY, row_P)])
    run_CxC2 = _blocks(segments_P, start_P, block).astype(jnp.int32)

    def mask_info(axis: int) -> Any:
        # A skipped block repeats the last one that ran, which is in fast memory already: nothing is fetched for it.
        index_CxC2 = jax.lax.broadcasted_iota(jnp.int32, run_CxC2.shape, axis)
        fetched_CxC2 = jax.lax.cummax(run_CxC2 * index_CxC2, axis=axis)
        return MaskInfo(fetched_CxC2[None], None, run_CxC2[None], None, packed_P)

    over_keys, over_queries = mask_info(1), mask_info(0)
    kernel = kernel_lib.SplashAttentionKernel(
        over_keys,  # Forward.
        over_keys,  # The queries' gradient.
        over_queries,  # The keys' and values' gradients.
        block_sizes=kernel_lib.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dq=block,
            block_kv_dq=block,
            block_q_dkv=block,
            block_kv_dkv=block,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernel_lib.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=remat.DOTS,
        mask_function=_mask_function(P),
        interpret=interpret,
    )
    k_KvxExDh, v_KvxExDh = (jnp.concatenate([x, x], axis=1) for x in (k_KvxPxDh, v_KvxPxDh))
    out_HxPxDh: Any = kernel(q_HxPxDh, k_KvxExDh, v_KvxExDh, kernel_lib.SegmentIds(q=row_P, kv=key_row_E))
    return out_HxPxDh


def _is_prefix(segments_P: jax.Array) -> jax.Array:
    return (segments_P >= 0) & (segments_P % attention.ROW == 0)


def _starts(segments_P: jax.Array) -> jax.Array:
    """The index from which on each token sees its branch; its own at a prefix's tokens and at padding."""
    index_P = jnp.arange(segments_P.shape[0])
    real_P = segments_P >= 0
    # Of each token, the last one before it that is not padding: padding within a branch does not end it.
    before_P = jnp.roll(jax.lax.cummax(jnp.where(real_P, index_P, 0)), 1)
    begins_P = (segments_P != segments_P[before_P]) | (index_P == 0)
    start_P = jax.lax.cummax(jnp.where(real_P & begins_P, index_P, 0))
    return jnp.where(real_P & ~_is_prefix(segments_P), start_P, index_P)


@functools.cache  # The kernel is compiled per function: one for each length, not for each call.
def _mask_function(P: int) -> Callable[[Any, Any], Any]:
    """Whether a query (its start and index, packed) may see the key at an index of E; ids are compared elsewhere."""

    def mask(packed: Any, key: Any) -> Any:
        start, index = packed >> _INDEX_BITS & (1 << _INDEX_BITS) - 1, packed & (1 << _INDEX_BITS) - 1
        return (key <= index) | ((key >= start + P) & (key <= index + P))

    return mask


def _blocks(segments_P: jax.Array, start_P: jax.Array, block: int) -> jax.Array:
    """Which blocks of queries and (twice) keys the kernel must look at; never too few, and at least one per query."""
    row_Cxb = (segments_P // attention.ROW).reshape(-1, block)
    real_Cxb = segments_P.reshape(-1, block) >= 0
    prefix_Cxb = _is_prefix(segments_P).reshape(-1, block)
    C = row_Cxb.shape[0]
    most = jnp.iinfo(jnp.int32).max

    def span(values_Cxb: jax.Array, of_Cxb: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Least and greatest in each block, of those marked; least > greatest where there are none."""
        least_C = jnp.min(jnp.where(of_Cxb, values_Cxb, most), axis=1)
        return least_C, jnp.max(jnp.where(of_Cxb, values_Cxb, -1), axis=1)

    query_least_C, query_greatest_C = span(row_Cxb, real_Cxb)
    key_least_C, key_greatest_C = span(row_Cxb, prefix_Cxb)
    start_least_C, _ = span(start_P.reshape(-1, block), ~prefix_Cxb)
    block_C = jnp.arange(C)
    causal_CxC = block_C[None] <= block_C[:, None]
    same_row_CxC = (query_least_C[:, None] <= key_greatest_C[None]) & (key_least_C[None] <= query_greatest_C[:, None])
    begun_CxC = start_least_C[:, None] < (block_C[None] + 1) * block
    return jnp.concatenate([causal_CxC & same_row_CxC, causal_CxC & begun_CxC], axis=1)


def cudnn(
    q_BxLxHxDh: jax.Array,
    k_BxLxKvxDh: jax.Array,
    v_BxLxKvxDh: jax.Array,
    segments_BxL: jax.Array,
    *,
    implementation: Any = "cudnn",
) -> jax.Array:
    """`attention.attend` by cuDNN's fused attention, for NVIDIA GPUs.

    Scores are not stored, but the mask is, as cuDNN takes none that is computed: L x L bfloat16 numbers per line,
    whatever the heads, and in the backward pass as many again, its gradient. At L = 4,096 either takes 32 MiB.

    Args:
        q_BxLxHxDh: queries, rope applied, bfloat16.
        k_BxLxKvxDh: keys, rope applied.
        v_BxLxKvxDh: values.
        segments_BxL: see `attention.attend`.
        implementation: of jax.nn.dot_product_attention; "xla" shows elsewhere what the mask does.

    Returns:
        out_BxLxHxDh in the type of q. Rows of padding attend to themselves.
    """
    L = q_BxLxHxDh.shape[1]
    more = -L % 64  # The backward kernel wants an even length; its tiles are of 64 tokens.

    def pad(x_BxLx: jax.Array, value: int = 0) -> jax.Array:
        return jnp.pad(x_BxLx, [(0, 0), (0, more)] + [(0, 0)] * (x_BxLx.ndim - 2), constant_values=value)

    segments_BxP = pad(segments_BxL, -1)
    P = L + more
    itself_BxPxP = jnp.eye(P, dtype=bool)[None] & (segments_BxP < 0)[:, :, None]
    mask_BxPxP = attention.visible(segments_BxP, 0, P) | itself_BxPxP
    out_BxPxHxDh = jax.nn.dot_product_attention(
        pad(q_BxLxHxDh),
        pad(k_BxLxKvxDh),
        pad(v_BxLxKvxDh),
        mask=mask_BxPxP[:, None],
        implementation=implementation,
    )
    return out_BxPxHxDh[:, :L]
