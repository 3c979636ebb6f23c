"""The decoder's matrix product: operands in the compute dtype, sums in float32, forward and backward."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns einsum(spec, x, y) in float32, with float32 sums.

    The products of its gradient take the cotangent in the operands' dtype. Under plain autodiff, a bfloat16 product
    with float32 sums has a float32 cotangent, so both products of the backward pass run in float32 and cannot use the
    hardware's bfloat16 instructions. With float32 operands, this function and its gradient are those of einsum.

    Args:
        spec: an einsum spec of two operands; each index occurs in at least two of the operands and the result, and at
            most once in each.
        x: first operand, in the compute dtype.
        y: second operand, in x's dtype.
    """
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _forward(spec: str, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(spec, x, y), (x, y)


def _backward(spec: str, operands: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = operands
    indices, out = spec.split("->")
    of_x, of_y = indices.split(",")
    g = g.astype(x.dtype)
    dx = jnp.einsum(f"{out},{of_y}->{of_x}", g, y, preferred_element_type=jnp.float32)
    dy = jnp.einsum(f"{of_x},{out}->{of_y}", x, g, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dy.astype(y.dtype)


product.defvjp(_forward, _backward)
