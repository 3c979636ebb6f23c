"""The decoder's one matrix product: operands in the compute type, sums in float32, forward and backward."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns einsum(spec, x, y) with float32 sums, in float32.

    Its gradient's products take the cotangent in the operands' type. Left to autodiff, a bfloat16 product summed in
    float32 has a float32 cotangent, and both products of the backward pass run in float32, without the hardware's
    bfloat16 instructions. With float32 operands it is einsum, and so is its gradient.

    Args:
        spec: as einsum's, with two operands; each index occurs in at least two of operands and result, once in each.
        x: first operand, in the compute type.
        y: second operand, of x's type.
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
