"""Rematerialisation: what a backward pass computes again instead of keeping it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

_OFF = contextvars.ContextVar("_OFF", default=False)


def remat(fn: Callable, *, looped: bool) -> Callable:
    """The same function; its gradient computes it again from its arguments.

    Args:
        fn: the function.
        looped: it is the body of a scan. Elsewhere the compiler must be kept from merging both computations into one
            whose result is kept.
    """
    return fn if _OFF.get() else jax.checkpoint(fn, prevent_cse=not looped)


@contextlib.contextmanager
def nothing_twice() -> Iterator[None]:
    """Within, what is traced computes nothing again: its products are the model's own, to be counted."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)
