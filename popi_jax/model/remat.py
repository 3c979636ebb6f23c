"""Rematerialisation: what a backward pass computes again instead of keeping it."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

DOTS = "dots"  # What keepable marks, for jax.checkpoint and for kernels that mark their own.
# The scope of everything that a gradient computes a second time: jax.checkpoint's own name, so that a trace or a count
# of products tells all of it by one name.
RECOMPUTED = "rematted_computation"


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


def remat(fn: Callable, *, looped: bool, kept: Callable[..., bool] | None = None) -> Callable:
    """The same function; its gradient computes it again from its arguments.

    Args:
        fn: the function.
        looped: it is the body of a scan. Elsewhere the compiler must be kept from merging both computations into one
            whose result is kept.
        kept: of jax.checkpoint_policies: what is kept nonetheless.
    """
    return jax.checkpoint(fn, prevent_cse=not looped, policy=kept)
