"""What a compiled program is said to cost, against counts by hand; on a CPU's own programs and on a TPU's text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from popi_jax import sharding
from popi_jax.cost import chips, flops, hlo, traffic
from popi_jax.cost.bound import Bound
from popi_jax.errors import UserError
from popi_jax.model.remat import nothing_twice, remat

A, B, C = 8, 16, 32
X, W = jnp.ones((A, B)), jnp.ones((B, B))


def counted(fn, *args, **options) -> float:
    return flops.count(jax.make_jaxpr(fn)(*args), **options)


def seven(x, w):
    return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ w), None), x, None, length=7)[0]


ONE = 2 * A * B * B


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x, w: x @ w, ONE),
        (seven, 7 * ONE),
        (jax.jit(seven), 7 * ONE),
        (lambda x, w: jax.lax.scan(lambda c, _: (seven(c, w), None), x, None, length=3)[0], 21 * ONE),
        (jax.grad(lambda x, w: seven(x, w).sum(), argnums=(0, 1)), 3 * 7 * ONE),
        (jax.grad(lambda w, x: seven(x, w).sum()), None),
        (lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w), 2 * ONE),
    ],
    ids=["product", "scan", "jit", "nested", "gradients", "one_gradient", "cond"],
)
def test_products_of_a_trace(fn, expected):
    if expected is None:  # The first product's input needs no gradient, in the last of the backward steps alone.
        assert counted(fn, W, X) == pytest.approx(3 * 7 * ONE, rel=0.05)
    else:
        assert counted(fn, X, W) == expected


def test_loops_without_a_known_end_run_as_often_as_is_said():
    def fn(x, w):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x)

    assert counted(fn, X, W, while_trips=5) == 5 * ONE


def test_what_is_computed_again_counts_unless_nothing_is():
    def loss(w, x):
        body = remat(lambda c, _: (jnp.tanh(c @ w), None), looped=True)
        return jax.lax.scan(body, x, None, length=7)[0].sum()

    again = counted(jax.grad(loss), W, X)
    with nothing_twice():
        once = counted(jax.grad(loss), W, X)
    assert once == counted(jax.grad(lambda w, x: seven(x, w).sum()), W, X)
    assert again == once + 7 * ONE


def test_shapes():
    assert hlo.nbytes("f32[8,128]{1,0:T(8,128)}") == 8 * 128 * 4
    assert hlo.nbytes("(bf16[4,2]{1,0:T(2,128)(2,1)}, pred[3], s4[8], f8e4m3fn[5], u32[], token[])") == (
        16 + 3 + 4 + 5 + 4
    )
    layout = "(f32[10]{0:T(256)S(1)}, f32[6]{0})"
    assert hlo.nbytes(layout) == 64 and hlo.nbytes(layout, hbm_only=True) == 24


def compiled_text(fn, *args, **options) -> str:
    return jax.jit(fn, **options).lower(*args).compile().as_text()


def test_a_scan_moves_a_slice_of_its_weights_each_time():
    n, width = 7, 256
    stacked = jnp.ones((n, width, width))

    def fn(x, ws):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, ws)[0]

    moved = traffic.measure(compiled_text(fn, jnp.ones((4, width)), stacked))
    assert moved.unknown_loops == 0
    # Each slice is read once or, where it is copied out first, moved three times; the whole stack never is.
    assert 1.0 <= moved.hbm_bytes / stacked.nbytes <= 3.5


def placed(mesh, x, *axes):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))


@pytest.mark.parametrize(
    ("kind", "layouts", "out", "sent"),
    [
        # x [16, 64] w [64, 32], over 8 devices: the sums of partial products, twice the result less its own part.
        ("all-reduce", ((None, "fsdp"), ("fsdp", None)), (), 2 * 16 * 32 * 4 * 7 / 8),
        # A device sends its piece of w to each of the others, in turn.
        ("all-gather", ((None, None), ("fsdp", None)), (), 8 * 32 * 4 * 7),
    ],
)
def test_collectives(kind, layouts, out, sent):
    mesh = sharding.make_mesh(1, 8, 1)
    x, w = placed(mesh, jnp.ones((16, 64)), *layouts[0]), placed(mesh, jnp.ones((64, 32)), *layouts[1])
    whole = NamedSharding(mesh, PartitionSpec(*out))

    def fn(x, w):
        w = jax.lax.with_sharding_constraint(w, whole) if kind == "all-gather" else w
        return jax.lax.scan(lambda c, _: (c + x @ w, None), jnp.zeros((16, 32)), None, length=1)[0]

    moved = traffic.measure(compiled_text(fn, x, w, out_shardings=whole))
    assert set(moved.collectives) == {kind}
    assert moved.collectives[kind] == traffic.Collective(1.0, sent)


def test_a_callback_is_seen():
    def fn(x):
        return x + jax.pure_callback(lambda y: np.asarray(y), jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    assert traffic.measure(compiled_text(fn, X)).host_transfers
    assert not traffic.measure(compiled_text(lambda x: x + 1, X)).host_transfers


TPU_TEXT = """HloModule jit_fn, is_scheduled=true, num_partitions=4

%compare.1 (p.0: s32[], p.1: s32[]) -> pred[] {
  %p.0 = s32[]{:T(128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  ROOT %lt.1 = pred[]{:T(512)} compare(%p.0, %p.1), direction=LT
}

%sliced (p.0: s32[], p.1: bf16[5,64,128]) -> bf16[64,128] {
  %p.0 = s32[]{:T(128)} parameter(0)
  %p.1 = bf16[5,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %part.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.1, %p.0, %zero.1, %zero.1), dynamic_slice_sizes={1}
  ROOT %own.1 = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%part.1)
}

%body (state.1: (s32[], bf16[5,64,128])) -> (s32[], bf16[5,64,128]) {
  %state.1 = (s32[]{:T(128)}, /*index=1*/bf16[5,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %w.1 = bf16[5,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %fusion.1 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%i.1, /*index=1*/%w.1), kind=kLoop, calls=%sliced
  %gather.1 = (bf16[64,128], bf16[256,128]) all-gather-start(%fusion.1), replica_groups=[1,4]<=[4]
  %gather.2 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather-done(%gather.1)
  %one.1 = s32[]{:T(128)} constant(1)
  %next.1 = s32[]{:T(128)} add(%i.1, %one.1)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[5,64,128]{2,1,0:T(8,128)(2,1)}) tuple(%next.1, %w.1)
}

%condition (state.2: (s32[], bf16[5,64,128])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, bf16[5,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %five.1 = s32[]{:T(128)} constant(5)
  ROOT %fusion.2 = pred[]{:T(512)} fusion(%i.2, %five.1), kind=kLoop, calls=%compare.1
}

ENTRY %main (w.2: bf16[5,64,128]) -> (s32[], bf16[5,64,128]) {
  %w.2 = bf16[5,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %zero.2 = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, bf16[5,64,128]{2,1,0:T(8,128)(2,1)}) tuple(%zero.2, %w.2)
  ROOT %while.1 = (s32[], bf16[5,64,128]{2,1,0}) while(%tuple.2), condition=%condition, body=%body
}
"""


def test_a_tpus_text():
    moved = traffic.measure(TPU_TEXT)
    piece = 64 * 128 * 2
    assert moved.unknown_loops == 0  # Five times, as the condition's constant says.
    assert moved.collectives == {"all-gather": traffic.Collective(5.0, 5 * 3 * piece)}
    # Each time: the slice is read and written, and read and written by the gather; the counter, and what compares it.
    assert moved.hbm_bytes == 5 * (2 * piece + 4 + 2 * piece + 12 + 9)
    for groups in ("{{0,1},{2,3}}", "[2,2]<=[2,2]T(1,0)", "mesh['a'=2,'b'=2] {'b'}", "mesh['a'=4] {'a':(1)2}"):
        pairs = TPU_TEXT.replace("replica_groups=[1,4]<=[4]", f"replica_groups={groups}")
        assert traffic.measure(pairs).collectives["all-gather"].bytes == 5 * piece
    unknown = TPU_TEXT.replace("%five.1 = s32[]{:T(128)} constant(5)", "%five.1 = s32[]{:T(128)} parameter(1)")
    assert traffic.measure(unknown, unknown_trips=2).collectives["all-gather"].count == 2
    assert traffic.measure(unknown).unknown_loops == 1


def test_bounds_by_hand():
    moved = traffic.Traffic(819e9 * 2, {"all-gather": traffic.Collective(1, 200e9)}, [], 0)
    found = Bound.of(197e12 * 0.5, dataclasses.asdict(moved), chips.chip("TPU v5 lite"))
    assert (found.compute_s, found.memory_s, found.interconnect_s) == pytest.approx((0.5, 2.0, 1.0))
    assert found.binding == "HBM" and found.seconds == pytest.approx(2.0)
    with pytest.raises(UserError, match="'TPU v1'"):
        chips.chip("TPU v1")
