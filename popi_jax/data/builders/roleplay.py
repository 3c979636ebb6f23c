"""Roleplay: pairs of answers, one of which a synthetic persona prefers (Singh et al. 2025, arXiv 2502.19312).

Published as sher222/persona-iterative-responses on the hub.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from popi_jax.config import Data
from popi_jax.data import specs, tables
from popi_jax.data.builders import windows
from popi_jax.data.schema import Example
from popi_jax.errors import UserError

COLUMNS: dict[str, specs.Spec] = {
    "x": str,
    "yw": str,
    "yl": str,
    "level": str,
    "score_persona": {"persona_description": str},
}


def load(data: Data, counts: collections.Counter[str]) -> dict[str, list[Example]]:
    """Makes users of the rows of each persona, whose id is in the column `level`; see `windows.load`.

    The persona that the oracle reads is `persona_description`. With data.protocol = "published", it is the whole of the
    struct `score_persona`, with all of its fields, as Python prints a dict. The published code shows that, braces and
    quotes included, so figures that are to compare with its figures need the same text. It is the same for fields of
    text; pandas, which the published code reads with, prints lists and whole numbers beside nulls in another way.

    Args:
        data: config.data.
        counts: updated with the number of rows that are in no user, by reason.

    Returns:
        {"train": [...], "test": [...]}.

    Raises:
        UserError: a bad file or setting, or too few rows.
    """
    published = data.protocol == "published"
    benchmark = windows.Benchmark(
        "roleplay",
        rows=_rows_with_structs if published else functools.partial(tables.rows, columns=COLUMNS),
        parse=functools.partial(triple, published=published),
        passes=1,
        persons="personas",
    )
    return windows.load(benchmark, data, counts)


def triple(row: tables.Row, published: bool) -> windows.Triple:
    """Makes a triple of a row; LeftOut if it makes none."""
    struct = row.values["score_persona"]
    if struct is None:
        raise windows.Blank("score_persona")
    description = (struct["persona_description"] or "").strip()
    if not description:
        raise windows.Blank("score_persona.persona_description")
    return windows.Triple(
        person=windows.text(row, "level"),
        prompt=windows.text(row, "x"),
        chosen=windows.text(row, "yw"),
        rejected=windows.text(row, "yl"),
        persona=str(struct) if published else description,
        source=row.source,
    )


def _rows_with_structs(files: Sequence[Path]) -> Iterator[tables.Row]:
    """Yields the rows with all fields of score_persona, in the order of the file, and not only the declared one."""
    for row, struct in zip(tables.rows(files, COLUMNS), _structs(files), strict=True):
        yield dataclasses.replace(row, values=row.values | {"score_persona": struct})


def _structs(files: Sequence[Path]) -> Iterator[dict[str, Any] | None]:
    for path in files:
        if not path.name.lower().endswith(".parquet"):
            raise UserError(
                f"{path}: not a Parquet file, so the order of the fields of score_persona may be another; give the"
                " Parquet files as published, or use data.protocol = 'disjoint'"
            )
        for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(256, columns=["score_persona"]):
            yield from batch.column("score_persona").to_pylist()
