"""ELIX: pairs of explanations, one of which a reader of some level prefers (Singh et al. 2025, arXiv 2502.19312).

Published as Asap7772/elix_generations_autolabel on the hub.
"""

import collections
import functools

from popi_jax.config import Data
from popi_jax.data import specs, tables
from popi_jax.data.builders import windows
from popi_jax.data.schema import Example

LEVELS = ("child", "preteen", "teenager", "young adult", "expert")
COLUMNS: dict[str, specs.Spec] = {
    "prompt": str,
    "response_x": str,
    "response_y": str,
    "level_x": str,
    "level_y": str,
    "scorer_level": str,
    "label": float,
}


def load(data: Data, counts: collections.Counter[str]) -> dict[str, list[Example]]:
    """Makes users of the rows of each scorer level, see `windows.load`.

    In both protocols, rows whose responses were both written for other levels than the scorer's are left out, as in the
    published code. The persona is its sentence: "The user is LEVEL."

    Args:
        data: config.data.
        counts: updated with the number of rows that are in no user, by reason.

    Returns:
        {"train": [...], "test": [...]}.

    Raises:
        UserError: a bad file or setting, or too few rows.
    """
    rows = functools.partial(tables.rows, columns=COLUMNS)
    return windows.load(windows.Benchmark("elix", rows, triple, passes=2, persons="levels"), data, counts)


def triple(row: tables.Row) -> windows.Triple:
    """Makes a triple of a row; LeftOut if it makes none, UserError for an unknown level or label."""
    scorer = windows.level(row, "scorer_level", LEVELS)
    levels = {column: row.values[column] for column in ("level_x", "level_y")}
    matches = scorer in levels.values()
    for column, value in levels.items():
        if value is not None or not matches:  # If one level matches, a null in the other changes nothing.
            windows.level(row, column, LEVELS)
    if not matches:
        raise windows.LeftOut("whose scorer_level is neither level_x nor level_y")
    return windows.labelled(row, scorer, f"The user is {scorer}.")
