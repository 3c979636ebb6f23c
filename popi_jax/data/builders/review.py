"""Review: pairs of reviews, one of which a reader of some taste prefers (Singh et al. 2025, arXiv 2502.19312).

Published as Asap7772/steered_reviews_full_autolabel_gpt4o_pref on the hub.
"""

import collections
import functools
import itertools

from popi_jax.config import Data
from popi_jax.data import specs, tables
from popi_jax.data.builders import windows
from popi_jax.data.schema import Example

LEVELS = ("positive", "negative", "concise", "verbose")
COMPOUND_LEVELS = tuple(map("+".join, itertools.product(("positive", "negative"), ("concise", "verbose"))))
COLUMNS: dict[str, specs.Spec] = {
    "prompt": str,
    "response_x": str,
    "response_y": str,
    "scorer_level": str,
    "label": float,
}


def load(data: Data, counts: collections.Counter[str]) -> dict[str, list[Example]]:
    """Makes users of the rows of each simple scorer level, see `windows.load`.

    In both protocols, rows of the compound levels, such as positive+concise, are left out, as in the published code.
    The persona is its sentence: "This user prefers LEVEL reviews."

    Args:
        data: config.data.
        counts: updated with the number of rows that are in no user, by reason.

    Returns:
        {"train": [...], "test": [...]}.

    Raises:
        UserError: a bad file or setting, or too few rows.
    """
    rows = functools.partial(tables.rows, columns=COLUMNS)
    return windows.load(windows.Benchmark("review", rows, triple, passes=1, persons="levels"), data, counts)


def triple(row: tables.Row) -> windows.Triple:
    """Makes a triple of a row; LeftOut if it makes none, UserError for an unknown level or label."""
    scorer = windows.level(row, "scorer_level", LEVELS + COMPOUND_LEVELS)
    if scorer in COMPOUND_LEVELS:
        raise windows.LeftOut("whose scorer_level is a compound")
    return windows.labelled(row, scorer, f"This user prefers {scorer} reviews.")
