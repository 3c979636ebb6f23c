"""What this machine can do at most, measured: a large float32 matrix product, and a large copy.

Both frameworks measure the same; each side's cases are held against its own. Imports JAX or torch when asked to.
"""

import time
from collections.abc import Callable
from typing import Any


def best_seconds(fn: Callable[[], Any], least_s: float = 0.5, most: int = 50) -> float:
    """The fastest of several calls: a roofline is what the machine can do, not what it does on average."""
    fn()
    best, spent, calls = float("inf"), 0.0, 0
    while calls < 3 or (spent < least_s and calls < most):
        started = time.perf_counter()
        fn()
        taken = time.perf_counter() - started
        best, spent, calls = min(best, taken), spent + taken, calls + 1
    return best


def rates(product: Callable[[], Any], width: int, copy: Callable[[], Any], array_bytes: int) -> dict[str, float]:
    """FLOP/s of the product of two square matrices, and bytes/s of a copy, read and written bytes together."""
    return {
        "flops": 2 * width**3 / best_seconds(product),
        "copy_bytes": 2 * array_bytes / best_seconds(copy),
    }


def with_jax(width: int, copy_mb: int) -> dict[str, float]:
    """Measured with JAX."""
    import jax
    import jax.numpy as jnp

    matrix = jax.random.normal(jax.random.key(0), (width, width), jnp.float32)
    array = jnp.ones(copy_mb * 2**20 // 4, jnp.float32)
    # A plain copy would be XLA's own memcpy; what a program moves goes through its loops, as this does.
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    return rates(
        lambda: product(matrix, matrix).block_until_ready(),
        width,
        lambda: copy(array).block_until_ready(),
        array.nbytes,
    )


def with_torch(width: int, copy_mb: int) -> dict[str, float]:
    """Measured with torch, into memory that is there already."""
    import torch

    matrix, out = torch.randn(width, width), torch.empty(width, width)
    array = torch.ones(copy_mb * 2**20 // 4)
    target = torch.empty_like(array)
    with torch.inference_mode():
        return rates(
            lambda: torch.matmul(matrix, matrix, out=out),
            width,
            lambda: torch.add(array, 1, out=target),
            array.numel() * 4,
        )
