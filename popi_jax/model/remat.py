"""Rematerialisation: what the backward pass recomputes instead of storing."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

# The name that `keepable` gives to values, and that kernels give to their residuals, for jax.checkpoint.
DOTS = "dots"
# The scope of everything that a gradient recomputes. It is jax.checkpoint's own name, so that traces and FLOP counts
# recognise all recomputation by one name.
RECOMPUTED = "rematted_computation"


# config.model.remat: what is stored of each layer, from most memory and least recomputation to the reverse. All compute
# the same function. None of them stores attention's scores, which grow with the square of the length.
CHOICES: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    # The products with weights, which are most of a layer's work, and attention's output. Selected by name: JAX's own
    # policies look for dot_general, which `product`'s custom derivative hides, and would store nothing.
    "dots": jax.checkpoint_policies.save_only_these_names(DOTS),
    "full": jax.checkpoint_policies.nothing_saveable,  # Except the layer's input.
}


def of_layer(choice: str, body: Callable) -> Callable:
    """Returns `body`, that of the scan over layers, which stores what `choice`, a name in CHOICES, says."""
    return body if choice == "none" else remat(body, looped=True, kept=CHOICES[choice])


def keepable(product: jax.Array) -> jax.Array:
    """Marks a product of activations with a weight, or attention's output, as a value that "dots" stores."""
    return checkpoint_name(product, DOTS)


def remat(fn: Callable, *, looped: bool, kept: Callable[..., bool] | None = None) -> Callable:
    """Returns the same function, which its gradient recomputes from the arguments.

    Args:
        fn: the function.
        looped: whether it is the body of a scan. If not, the compiler must be prevented from merging the two
            computations into one whose result is stored.
        kept: a policy of jax.checkpoint_policies: what is stored nonetheless.
    """
    return jax.checkpoint(fn, prevent_cse=not looped, policy=kept)
