"""The most that this machine can do: a large float32 matrix product and a large copy, measured by each framework."""

import time
from collections.abc import Callable
from typing import Any


def best_seconds(fn: Callable[[], Any], least_s: float = 0.5, most: int = 50) -> float:
    """The fastest of several calls, because a roofline is a bound and not an average."""
    fn()
    best, spent, calls = float("inf"), 0.0, 0
    while calls < 3 or (spent < least_s and calls < most):
        started = time.perf_counter()
        fn()
        taken = time.perf_counter() - started
        best, spent, calls = min(best, taken), spent + taken, calls + 1
    return best


def rates(product: Callable[[], Any], width: int, copy: Callable[[], Any], array_bytes: int) -> dict[str, float]:
    """FLOP/s of a product of two square matrices, and bytes/s of a copy, counting bytes read and bytes written."""
    return {
        "flops": 2 * width**3 / best_seconds(product),
        "copy_bytes": 2 * array_bytes / best_seconds(copy),
    }
