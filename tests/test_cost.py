"""FLOPs of traces, peaks of chips and bounds, against values computed by hand."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from popi_jax.errors import UserError
from popi_jax.model import sharding
from popi_jax.modes.cost import bound, chips, flops, traffic
from popi_jax.modes.cost.traffic import Collective

X, W = jnp.zeros((8, 16)), jnp.zeros((16, 16))
PRODUCT = 2 * 8 * 16 * 16
STACK_7 = jnp.zeros((7, 16, 16))


def counted(f, *args, **kwargs):
    return flops.count(jax.make_jaxpr(f)(*args), **kwargs)


def layers(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


# FLOPs ---------------------------------------------------------------------------------------------------------------


def test_flops_of_products():
    assert counted(lambda x, w: x @ w, X, W) == PRODUCT
    batched = counted(
        lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), jnp.zeros((3, 5, 2, 7)), jnp.zeros((3, 11, 2, 7))
    )
    assert batched == 2 * 3 * 2 * 5 * 11 * 7
    assert counted(lambda x: jnp.sum(jnp.exp(x)), X) == 0


def test_flops_of_loops():
    assert counted(layers, X, STACK_7) == 7 * PRODUCT
    nested = counted(lambda x, stack: jax.lax.scan(lambda x, _: (layers(x, stack), None), x, length=3)[0], X, STACK_7)
    assert nested == 3 * 7 * PRODUCT

    def decode(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x @ w) < 1, lambda x: x @ w, x)

    assert counted(decode, X, W) == 2 * PRODUCT
    assert counted(decode, X, W, while_trips=(5,)) == 5 * 2 * PRODUCT
    assert counted(lambda x, w: decode(layers(decode(x, w), STACK_7), w), X, W, while_trips=(5, 0)) == 17 * PRODUCT


def test_flops_of_a_conditional_are_those_of_its_heaviest_branch():
    def choose(i, x, w):
        return jax.lax.switch(i, [lambda x, w: x, lambda x, w: x @ w @ w, lambda x, w: x @ w], x, w)

    assert counted(choose, 1, X, W) == 2 * PRODUCT


def test_flops_of_gradients():
    def loss(x, w):
        return jnp.sum(jnp.sin(x @ w))

    assert counted(jax.value_and_grad(loss, argnums=1), X, W) == 2 * PRODUCT
    assert counted(jax.value_and_grad(loss, argnums=(0, 1)), X, W) == 3 * PRODUCT
    # The forward product is computed again in the backward pass.
    assert counted(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1)), X, W) == 4 * PRODUCT
    assert counted(jax.jit(jax.value_and_grad(jax.jit(loss), argnums=1)), X, W) == 2 * PRODUCT


def test_flops_of_functions_with_custom_derivatives():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (f(x, w), (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

    @jax.custom_jvp
    def h(x, w):
        return x @ w

    h.defjvp(lambda primals, tangents: (h(*primals), tangents[0] @ primals[1]))
    assert counted(f, X, W) == PRODUCT
    assert counted(h, X, W) == PRODUCT
    assert counted(jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), argnums=(0, 1)), X, W) == 3 * PRODUCT
    # The rule also computes a gradient of w, which is not needed: in a loop, and with recomputation.
    assert counted(jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w)))), X, W) == 2 * PRODUCT

    def frozen(x, stack, layer):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.sin(layer(x, w)), None), x, stack)[0])

    assert counted(jax.jit(jax.grad(lambda x, stack: frozen(x, stack, f))), X, STACK_7) == 7 * 2 * PRODUCT
    again = jax.checkpoint(lambda x, w: jnp.sin(f(x, w)))
    assert counted(jax.grad(lambda x, stack: frozen(x, stack, again)), X, STACK_7) == 7 * 3 * PRODUCT


def test_flops_in_a_shard_map_count_all_devices():
    mesh = sharding.make_mesh(2, 2, 2)
    rows = PartitionSpec(("data", "fsdp"))
    f = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)
    # Rows are split over four devices; the two devices of the tensor axis do the same work.
    assert counted(f, X, W) == 2 * PRODUCT
    f = jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh,
        in_specs=(rows, PartitionSpec()),
        out_specs=rows,
        axis_names={"data", "fsdp"},
        check_vma=False,
    )
    assert counted(jax.jit(f), X, W) == PRODUCT


@pytest.mark.parametrize(("estimate", "expected"), [(None, PRODUCT), (123, 123)])
def test_flops_of_a_kernel(estimate, expected):
    def kernel(x_ref, w_ref, o_ref):
        o_ref[...] = x_ref[...] @ w_ref[...]

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 16), jnp.float32),
        grid=(4, 2),
        in_specs=[pl.BlockSpec((2, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 8), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((2, 8), lambda i, j: (i, j)),
        cost_estimate=estimate and pl.CostEstimate(flops=estimate, transcendentals=0, bytes_accessed=0),
    )
    assert counted(call, X, W) == expected


# Chips and bounds ----------------------------------------------------------------------------------------------------


def test_peaks_are_per_device():
    v5e = chips.chip("TPU v5 lite")
    assert (v5e.flops, v5e.hbm_bytes, v5e.hbm_bandwidth, v5e.link_bandwidth) == (197e12, 16 * 2**30, 819e9, 200e9)
    v4, ironwood = chips.chip("TPU v4"), chips.chip("TPU7x")
    assert (v4.flops, v4.hbm_bytes, v4.hbm_bandwidth, v4.link_bandwidth) == (275e12, 32 * 2**30, 1228e9, 300e9)
    assert (ironwood.flops, ironwood.hbm_bytes) == (1153.5e12, 96 * 2**30)  # Two devices per chip.
    with pytest.raises(UserError, match="TPU v9.*TPU v4, TPU v5 lite"):
        chips.chip("TPU v9")


@pytest.mark.parametrize(
    ("work", "hbm", "sent", "binding", "seconds"),
    [
        (8 * 197e12, 819e9, 200e9, "compute", 2.0),
        (4 * 197e12, 3 * 819e9, 200e9, "HBM", 3.0),
        (4 * 197e12, 819e9, 5 * 200e9, "interconnect", 5.0),
    ],
)
def test_the_slowest_resource_binds(work, hbm, sent, binding, seconds):
    halves = {"all-gather": Collective(1, sent / 2), "all-reduce": Collective(3, sent / 2)}
    found = bound.bound(work, traffic.Traffic(hbm, halves, [], []), chips.chip("TPU v5 lite"), devices=4)
    assert found.binding == binding
    assert math.isclose(found.seconds, seconds)
    assert math.isclose(found.mfu(2 * 197e12), 0.5 / seconds)
    assert bound.advice(found).count(".") == 1
    assert bound.advice(found).lower().startswith(binding.lower())
