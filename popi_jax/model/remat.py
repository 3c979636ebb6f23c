"""Rematerialisation: what a backward pass computes again instead of keeping it."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator

import jax
from jax.ad_checkpoint import checkpoint_name

_OFF = contextvars.ContextVar("_OFF", default=False)
_PRODUCT = "product"


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What is computed again of each layer: this part of it, but for what `kept` is true of."""

    part: str
    kept: Callable[..., bool] | None = None


# config.model.remat. From most memory to least, and from the least computed again to the most; each is the same
# function. "attention" is for the plain one, whose scores are what grows with the square of the length: the kernels of
# model/kernels.py keep none, and "attention" would run them a second time for nothing.
CHOICES: dict[str, _Choice] = {
    "none": _Choice("nothing"),
    "attention": _Choice("attention"),  # Its scores and their softmax.
    # All but the products with weights, which are most of what a layer computes. By name: jax's own policies look for
    # dot_general, which the products' own derivative hides from them, and would keep nothing.
    "dots": _Choice("layer", jax.checkpoint_policies.save_only_these_names(_PRODUCT)),
    "full": _Choice("layer"),  # From the layer's input, which alone is kept.
}


def part_of_layer(choice: str, part: str, fn: Callable) -> Callable:
    """`fn` in the scan over layers, computed again if the choice, of CHOICES, says so of its part.

    Args:
        choice: config.model.remat.
        part: what fn is: "layer" or "attention".
        fn: the function.
    """
    chosen = CHOICES[choice]
    return remat(fn, looped=True, kept=chosen.kept) if chosen.part == part else fn


def keepable(product: jax.Array) -> jax.Array:
    """The product of activations with a weight, which "dots" keeps."""
    return checkpoint_name(product, _PRODUCT)


def remat(fn: Callable, *, looped: bool, kept: Callable[..., bool] | None = None) -> Callable:
    """The same function; its gradient computes it again from its arguments.

    Args:
        fn: the function.
        looped: it is the body of a scan. Elsewhere the compiler must be kept from merging both computations into one
            whose result is kept.
        kept: of jax.checkpoint_policies: what is kept nonetheless.
    """
    return fn if _OFF.get() else jax.checkpoint(fn, prevent_cse=not looped, policy=kept)


@contextlib.contextmanager
def nothing_twice() -> Iterator[None]:
    """Within, what is traced computes nothing again: its products are the model's own, to be counted."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)
