"""The decoder's product against einsum, and the dtypes of its gradient's products."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.model.product import product

SPECS = {
    "ri,io->ro": ((5, 7), (7, 3)),
    "rd,vd->rv": ((5, 7), (3, 7)),
    "bkgqd,bksd->bkgqs": ((2, 2, 3, 4, 5), (2, 2, 6, 5)),
}


def operands(spec, dtype):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in SPECS[spec])


def value_and_grads(fn, x, y):
    return jax.value_and_grad(lambda x, y: jnp.sum(jnp.sin(fn(x, y))), argnums=(0, 1))(x, y)


@pytest.mark.parametrize("spec", SPECS)
def test_float32_equals_einsum(spec):
    x, y = operands(spec, jnp.float32)
    got = value_and_grads(lambda x, y: product(spec, x, y), x, y)
    expected = value_and_grads(lambda x, y: jnp.einsum(spec, x, y), x, y)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-5, rtol=1e-5), got, expected)


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_has_float32_sums_and_close_gradients(spec):
    x, y = operands(spec, jnp.bfloat16)
    exact = value_and_grads(lambda x, y: jnp.einsum(spec, x, y), x.astype(jnp.float32), y.astype(jnp.float32))
    value, grads = value_and_grads(lambda x, y: product(spec, x, y), x, y)
    assert value.dtype == jnp.float32 and {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(value, exact[0], rtol=1e-5)
    for got, expected in zip(grads, exact[1], strict=True):
        # The cotangent and the result are each rounded to 8 bits.
        np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=0.02, atol=0.02 * float(abs(expected).max()))


def dots(fn, x, y):
    """Returns the operand dtypes of every product in the lowered value and gradients of fn."""
    program = jax.jit(lambda x, y: value_and_grads(fn, x, y)).lower(x, y).as_text()
    found = re.findall(r"dot_general.*: \(tensor<([^>]*)>, tensor<([^>]*)>\)", program)
    return [{shape.split("x")[-1] for shape in shapes} for shapes in found]


def test_bfloat16_gradients_take_no_float32_operand():
    x, y = operands("ri,io->ro", jnp.bfloat16)
    assert dots(lambda x, y: product("ri,io->ro", x, y), x, y) == [{"bf16"}] * 3
    plain = dots(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32), x, y)
    assert {"bf16", "f32"} in plain or {"f32"} in plain
