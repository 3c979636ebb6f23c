"""POPI: personalizing language models through optimized natural-language preference summaries (arXiv 2510.17881)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Personalizer", "__version__"]

if TYPE_CHECKING:
    from popi_jax.modes.personalizer import Personalizer


def __getattr__(name: str) -> Any:
    """Imports Personalizer, and JAX with it, when it is first used."""
    if name == "Personalizer":
        from popi_jax.modes.personalizer import Personalizer

        return Personalizer
    raise AttributeError(f"module 'popi_jax' has no attribute {name!r}")
