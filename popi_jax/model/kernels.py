"""Attention kernels that can replace `attention.attend`: splash attention on TPUs, cuDNN's on NVIDIA GPUs.

`resolve` chooses the kernel of a config, `bind` returns the function. All have the signature of `attention.attend` and
its result, except for rounding and at padding. Pallas is not imported until splash attention is first traced.

Shape letters: docs/architecture.md.
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

# The largest block of queries and of keys in the splash kernel, which holds block x block float32 scores in the chip's
# vector memory: 1 MiB here.
_BLOCK = 512
_LANES = 128  # Blocks are multiples of the vector unit's width.

# A query's index and the first index of its branch are packed into one int32.
_INDEX_BITS = 16

_NO_QUERY = -2  # Segment id of a key that no query matches: rows count from 0, padding is -1.


def resolve(name: str, platform: str, compute_dtype: str) -> str:
    """Returns the attention to run: "xla", "splash" or "cudnn".

    Args:
        name: config.model.attention, one of CHOICES. "auto" is splash on TPUs, cuDNN on GPUs in bfloat16, else XLA.
        platform: platform of the target devices: "cpu", "gpu" or "tpu".
        compute_dtype: config.model.compute_dtype.

    Raises:
        UserError: the choice does not support this platform or dtype.
    """
    if name == "auto":
        if platform == "tpu":
            return "splash"
        return "cudnn" if platform == "gpu" and compute_dtype == "bfloat16" else "xla"
    needs = {"splash": "tpu", "cudnn": "gpu"}.get(name, platform)
    if platform != needs:
        raise UserError(
            f"config.model.attention is {name!r}, which needs a {needs.upper()}, but this program is for"
            f" {platform.upper()}; set it to 'auto' or 'xla'"
        )
    if name == "cudnn" and compute_dtype != "bfloat16":
        raise UserError(
            f"config.model.attention is 'cudnn', which needs config.model.compute_dtype 'bfloat16', not"
            f" {compute_dtype!r}; change the dtype or set config.model.attention to 'auto' or 'xla'"
        )
    return name


def bind(name: str, mesh: Mesh | None) -> Attend:
    """Returns the attention of a resolved name, for this mesh or, without one, for a single device.

    The compiler splits XLA's attention. Kernels are opaque to it, so they run on each device's own lines and heads.

    Raises:
        UserError: (when traced) the lines or heads do not divide over the mesh.
    """
    return {"xla": attention.attend, "splash": per_device(splash, mesh), "cudnn": per_device(cudnn, mesh)}[name]


def per_device(attend: Attend, mesh: Mesh | None) -> Attend:
    """Returns `attend`, run on each device's share of the lines and heads (sharding.RULES) without communication.

    Query heads and kv heads are split alike, so that each device holds whole groups.
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
        # Unchecked: a kernel does not declare over which axes its result varies.
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
    """Computes `attention.attend` with JAX's splash attention, a Pallas kernel for TPUs; stores no L x L array.

    The kernel's mask is an equality of segment ids AND a function of the two indices; ours is a union. So every key is
    passed twice: once as a prefix key, for its whole row, and once as a branch key. The ids separate rows; the function
    restricts a query to prefix keys up to its own index and to branch keys from its branch's start to its own index. It
    is still one softmax. Blocks in which no query attends to any key are skipped, based on the segments at run time.

    Memory: two copies of keys and values (4 * Lp * Kv * Dh numbers per line) and of their gradients; the log-sums of
    one line, H * Lp * 128 float32, while the kernel that writes them runs, since lines run one after another; two
    tables of 2 * Cb^2 int32 in scalar memory.

    Args:
        q_BxLxHxDh: queries, rope applied.
        k_BxLxKvxDh: keys, rope applied.
        v_BxLxKvxDh: values.
        segments_BxL: see `attention.attend`. In addition, only padding may lie between the tokens of a branch, as in
            the output of `scoring.layout` and `packing.pack_bins`; a row's prefix may lie anywhere.
        block: largest block size in tokens, a multiple of 128.
        interpret: whether to interpret the kernel on the CPU, for tests.

    Returns:
        out_BxLxHxDh in q's dtype. Padding attends to itself.

    Raises:
        ValueError: lines have more than 65,536 tokens.
    """
    _, L, _, Dh = q_BxLxHxDh.shape
    # The smallest block size that keeps the number of blocks, so that the last one needs little padding.
    count = -(-L // block)
    size = -(-L // (count * _LANES)) * _LANES
    Lp = count * size
    if Lp > 1 << _INDEX_BITS:
        raise ValueError(f"splash attention takes lines of at most {1 << _INDEX_BITS} tokens, not {L}")

    def pad(x_BxLx: jax.Array, value: int = 0) -> jax.Array:
        widths = [(0, 0), (0, Lp - L)] + [(0, 0)] * (x_BxLx.ndim - 2)
        return jnp.pad(x_BxLx, widths, constant_values=value)

    scaled_BxLxHxDh = (q_BxLxHxDh.astype(jnp.float32) * Dh**-0.5).astype(q_BxLxHxDh.dtype)
    q_BxHxLpxDh, k_BxKvxLpxDh, v_BxKvxLpxDh = (
        pad(x).transpose(0, 2, 1, 3) for x in (scaled_BxLxHxDh, k_BxLxKvxDh, v_BxLxKvxDh)
    )
    line = functools.partial(_splash_line, block=size, interpret=interpret)
    out_BxHxLpxDh = jax.vmap(line)(q_BxHxLpxDh, k_BxKvxLpxDh, v_BxKvxLpxDh, pad(segments_BxL, -1))
    return out_BxHxLpxDh.transpose(0, 2, 1, 3)[:, :L]


def _splash_line(
    q_HxLpxDh: jax.Array,
    k_KvxLpxDh: jax.Array,
    v_KvxLpxDh: jax.Array,
    segments_Lp: jax.Array,
    *,
    block: int,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    Lp = segments_Lp.shape[0]
    row_Lp, prefix_Lp = segments_Lp // attention.ROW, _is_prefix(segments_Lp)
    start_Lp = _starts(segments_Lp)
    packed_Lp: Any = start_Lp << _INDEX_BITS | jnp.arange(Lp)
    key_row_E = jnp.concatenate([jnp.where(prefix_Lp, row_Lp, _NO_QUERY), jnp.where(prefix_Lp, _NO_QUERY, row_Lp)])
    run_Cbx2Cb = _blocks(segments_Lp, start_Lp, block).astype(jnp.int32)

    def mask_info(axis: int) -> Any:
        # A skipped block points to the last one that ran, which is already in fast memory: nothing is fetched.
        index_Cbx2Cb = jax.lax.broadcasted_iota(jnp.int32, run_Cbx2Cb.shape, axis)
        fetched_Cbx2Cb = jax.lax.cummax(run_Cbx2Cb * index_Cbx2Cb, axis=axis)
        return MaskInfo(fetched_Cbx2Cb[None], None, run_Cbx2Cb[None], None, packed_Lp)

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
        mask_function=_mask_function(Lp),
        interpret=interpret,
    )
    k_KvxExDh, v_KvxExDh = (jnp.concatenate([x, x], axis=1) for x in (k_KvxLpxDh, v_KvxLpxDh))
    out_HxLpxDh: Any = kernel(q_HxLpxDh, k_KvxExDh, v_KvxExDh, kernel_lib.SegmentIds(q=row_Lp, kv=key_row_E))
    return out_HxLpxDh


def _is_prefix(segments_Lp: jax.Array) -> jax.Array:
    return (segments_Lp >= 0) & (segments_Lp % attention.ROW == 0)


def _starts(segments_Lp: jax.Array) -> jax.Array:
    """Returns the first index that each token sees of its branch; its own index in prefixes and at padding."""
    index_Lp = jnp.arange(segments_Lp.shape[0])
    real_Lp = segments_Lp >= 0
    # The last earlier token that is not padding: padding within a branch does not end it.
    before_Lp = jnp.roll(jax.lax.cummax(jnp.where(real_Lp, index_Lp, 0)), 1)
    begins_Lp = (segments_Lp != segments_Lp[before_Lp]) | (index_Lp == 0)
    start_Lp = jax.lax.cummax(jnp.where(real_Lp & begins_Lp, index_Lp, 0))
    return jnp.where(real_Lp & ~_is_prefix(segments_Lp), start_Lp, index_Lp)


@functools.cache  # JAX compiles the kernel once per function object: keep one per length.
def _mask_function(Lp: int) -> Callable[[Any, Any], Any]:
    """Returns the mask: whether a query (packed start and index) may see the key at an index of E, ids aside."""

    def mask(packed: Any, key: Any) -> Any:
        start, index = packed >> _INDEX_BITS & (1 << _INDEX_BITS) - 1, packed & (1 << _INDEX_BITS) - 1
        return (key <= index) | ((key >= start + Lp) & (key <= index + Lp))

    return mask


def _blocks(segments_Lp: jax.Array, start_Lp: jax.Array, block: int) -> jax.Array:
    """Returns the blocks of queries and (doubled) keys to process: all that are needed, and at least one per query."""
    row_Cbxb = (segments_Lp // attention.ROW).reshape(-1, block)
    real_Cbxb = segments_Lp.reshape(-1, block) >= 0
    prefix_Cbxb = _is_prefix(segments_Lp).reshape(-1, block)
    Cb = row_Cbxb.shape[0]
    most = jnp.iinfo(jnp.int32).max

    def span(values_Cbxb: jax.Array, of_Cbxb: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the least and greatest marked value of each block; least > greatest if none is marked."""
        least_Cb = jnp.min(jnp.where(of_Cbxb, values_Cbxb, most), axis=1)
        return least_Cb, jnp.max(jnp.where(of_Cbxb, values_Cbxb, -1), axis=1)

    query_least_Cb, query_greatest_Cb = span(row_Cbxb, real_Cbxb)
    key_least_Cb, key_greatest_Cb = span(row_Cbxb, prefix_Cbxb)
    start_least_Cb, _ = span(start_Lp.reshape(-1, block), ~prefix_Cbxb)
    block_Cb = jnp.arange(Cb)
    causal_CbxCb = block_Cb[None] <= block_Cb[:, None]
    same_row_CbxCb = (query_least_Cb[:, None] <= key_greatest_Cb[None]) & (
        key_least_Cb[None] <= query_greatest_Cb[:, None]
    )
    begun_CbxCb = start_least_Cb[:, None] < (block_Cb[None] + 1) * block
    return jnp.concatenate([causal_CbxCb & same_row_CbxCb, causal_CbxCb & begun_CbxCb], axis=1)


def cudnn(
    q_BxLxHxDh: jax.Array,
    k_BxLxKvxDh: jax.Array,
    v_BxLxKvxDh: jax.Array,
    segments_BxL: jax.Array,
    *,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Computes `attention.attend` with cuDNN's fused attention, for NVIDIA GPUs.

    Scores are not stored, but the mask is, since cuDNN cannot compute it on the fly: L x L bfloat16 numbers per line,
    shared by all heads, and its gradient of the same size in the backward pass. At L = 4,096 each takes 32 MiB.

    Args:
        q_BxLxHxDh: queries, rope applied, bfloat16.
        k_BxLxKvxDh: keys, rope applied.
        v_BxLxKvxDh: values.
        segments_BxL: see `attention.attend`.
        implementation: that of jax.nn.dot_product_attention; "xla" runs the same mask on other devices.

    Returns:
        out_BxLxHxDh in q's dtype. Padding attends to itself.
    """
    L = q_BxLxHxDh.shape[1]
    more = -L % 64  # The backward kernel needs an even length; its tiles have 64 tokens.

    def pad(x_BxLx: jax.Array, value: int = 0) -> jax.Array:
        return jnp.pad(x_BxLx, [(0, 0), (0, more)] + [(0, 0)] * (x_BxLx.ndim - 2), constant_values=value)

    segments_BxLp = pad(segments_BxL, -1)
    Lp = L + more
    itself_BxLpxLp = jnp.eye(Lp, dtype=bool)[None] & (segments_BxLp < 0)[:, :, None]
    mask_BxLpxLp = attention.visible(segments_BxLp, 0, Lp) | itself_BxLpxLp
    out_BxLpxHxDh = jax.nn.dot_product_attention(
        pad(q_BxLxHxDh),
        pad(k_BxLxKvxDh),
        pad(v_BxLxKvxDh),
        mask=mask_BxLpxLp[:, None],
        implementation=implementation,
    )
    return out_BxLpxHxDh[:, :L]
