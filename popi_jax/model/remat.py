"""Rematerialisation: what a backward pass computes again instead of keeping it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
from jax.ad_checkpoint import checkpoint_name

_OFF = contextvars.ContextVar("_OFF", default=False)
DOTS = "dots"  # What keepable marks, for jax.checkpoint and for kernels that mark their own.


# config.model.remat: what is kept of each layer. From most memory to least, and from the least computed again to the
# most; each is the same function. None keeps attention's scores, which grow with the square of the length.
CHOICES: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    # The products with weights, which are most of what a layer computes, and what attention gives. By name: jax's own
    # policies look for dot_general, which the products' own derivative hides from them, and keep nothing.
    "dots": jax.checkpoint_policies.save_only_these_names(DOTS),
    "full": jax.checkpoint_policies.nothing_saveable,  # But the layer's input.
}


def of_layer(choice: str, body: Callable) -> Callable:
    """`body` of the scan over layers, of which a name of CHOICES says what is kept."""
    return body if choice == "none" else remat(body, looped=True, kept=CHOICES[choice])


def keepable(product: jax.Array) -> jax.Array:
    """The product of activations with a weight, or an attention's result, which "dots" keeps."""
    return checkpoint_name(product, DOTS)


def computes_again() -> bool:
    """Whether a gradient may compute again what it could have kept: not within `nothing_twice`."""
    return not _OFF.get()


def remat(fn: Callable, *, looped: bool, kept: Callable[..., bool] | None = None) -> Callable:
    """The same function; its gradient computes it again from its arguments.

    Args:
        fn: the function.
        looped: it is the body of a scan. Elsewhere the compiler must be kept from merging both computations into one
            whose result is kept.
        kept: of jax.checkpoint_policies: what is kept nonetheless.
    """
    return jax.checkpoint(fn, prevent_cse=not looped, policy=kept) if computes_again() else fn


@contextlib.contextmanager
def nothing_twice() -> Iterator[None]:
    """Within, what is traced computes nothing again: its products are the model's own, to be counted."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)
