"""Stochastic rounding picks one of the two neighbours, and keeps the sum of small updates."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from popi_jax.model.policy import Policy
from popi_jax.training import rng, rounding, steps
from tests import test_steps, tiny

ADAM = optax.adam(1e-3)


def neighbours(x):
    """Returns the two bfloat16 numbers around each float32: the one with the lower half cut off, and the next."""
    low = (x.view(np.uint32) & 0xFFFF0000).astype(np.uint32)
    return low.view(np.float32), np.where(low == x.view(np.uint32), low, low + 0x10000).astype(np.uint32).view(
        np.float32
    )


def test_rounds_to_a_neighbour_and_is_unbiased():
    generator = np.random.default_rng(0)
    x_8 = (generator.normal(size=8) * 10.0 ** generator.integers(-6, 6, 8)).astype(np.float32)
    draws = 20_000
    rounded = rounding.stochastic_round(jnp.asarray(np.tile(x_8, (draws, 1))), jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    rounded_x8 = np.asarray(rounded, np.float64)
    near_8, far_8 = neighbours(x_8)
    assert np.all((rounded_x8 == near_8) | (rounded_x8 == far_8))
    error_8 = np.abs(rounded_x8.mean(axis=0) - x_8)
    assert np.all(error_8 < 4 * rounded_x8.std(axis=0) / np.sqrt(draws))
    assert np.all(np.abs(far_8 - near_8) > 100 * error_8 / 4)  # The check above could have failed.


def test_bfloat16_numbers_are_unchanged():
    x = np.array([0.0, -0.0, 1.0, -3.5, 2.0**-100, np.inf, -np.inf, np.nan], ml_dtypes.bfloat16).astype(np.float32)
    rounded = np.asarray(rounding.stochastic_round(jnp.asarray(x), jax.random.key(1)), np.float32)
    np.testing.assert_array_equal(rounded, x)


def test_updates_too_small_for_bfloat16_add_up():
    params = {"w": jnp.ones((4096,), jnp.bfloat16), "kept": jnp.ones((3,), jnp.float32)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-11, jnp.float32), params)
    assert optax.apply_updates(params, updates)["w"].sum() == 4096  # Rounding to nearest loses all of them.
    add = jax.jit(rounding.add)
    for step in range(64):
        params = add(params, updates, rng.stream_key(0, "round_phi", step))
    np.testing.assert_array_equal(params["kept"], 1 + 64 * 2.0**-11)
    moved = float(params["w"].astype(jnp.float32).mean()) - 1
    assert abs(moved - 64 * 2.0**-11) < 0.05 * 64 * 2.0**-11


def test_step_keeps_weights_in_bfloat16_and_moments_in_float32():
    """Its gradients equal those of the float32 step from the same weights, up to the rounding of bfloat16 products."""
    config = test_steps.settings(None, tx_phi=ADAM, tx_theta=ADAM)
    half = dataclasses.replace(config, policy=Policy(dataclasses.replace(tiny.CONFIG, trained_dtype="bfloat16"), None))
    base, state, batch = test_steps.world(config, micros=(1, 2))
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (state.phi, state.theta))
    there = dataclasses.replace(state, phi=cast[0], theta=cast[1])
    back = jax.tree.map(lambda x: x.astype(jnp.float32), cast)
    here = dataclasses.replace(state, phi=back[0], theta=back[1])
    after_half, _ = test_steps.jitted(steps.joint_step, half)(there, base, batch)
    after, _ = test_steps.jitted(steps.joint_step, config)(here, base, batch)
    assert {x.dtype for x in jax.tree.leaves((after_half.phi, after_half.theta))} == {jnp.dtype("bfloat16")}
    floats = [x for x in jax.tree.leaves((after_half.opt_phi, after_half.opt_theta)) if x.ndim]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    for a, b in zip(floats, [x for x in jax.tree.leaves((after.opt_phi, after.opt_theta)) if x.ndim], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.01 * float(jnp.abs(b).max()) + 1e-12)
    fresh = steps.init_state(jax.random.key(0), base, half)
    assert jax.tree.map(lambda x: x.dtype, fresh) == jax.tree.map(lambda x: x.dtype, after_half)
