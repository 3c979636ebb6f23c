"""POPI: personalizing language models through optimized natural-language preference summaries (arXiv 2510.17881)."""

__version__ = "0.1.0"
