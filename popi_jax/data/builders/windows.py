"""Cuts preference rows into windows: of some rows of one person, the first are a user's signals, the rest its queries.

Shared by the benchmarks elix, review and roleplay, whose files have one preference per row and many rows per person.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from popi_jax.config import Data
from popi_jax.data import tables
from popi_jax.data.disjoint import folded
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError, shown

_PUBLISHED_SEED = 42
_HELD_OUT_STREAM = 0
_STREAMS = {"train": 1, "test": 2}

Counts = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Triple:
    """One row: `person` prefers `chosen` to `rejected` as the response to `prompt`.

    Attributes:
        person: the level or persona id.
        prompt: the question, stripped like the responses.
        chosen: the preferred response.
        rejected: the other response.
        persona: the true description of the person.
        source: "FILE#ROW".
    """

    person: str
    prompt: str
    chosen: str
    rejected: str
    persona: str
    source: str


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What differs between the benchmarks.

    Attributes:
        name: data.dataset.
        rows: reads the rows of some files, such as `tables.rows`.
        parse: makes a triple of a row. Raises LeftOut for a row that makes none, and UserError for a mistake.
        passes: number of passes over the rows in the published code.
        persons: what the persons are, in the plural, for a message.
    """

    name: str
    rows: Callable[[Sequence[Path]], Iterator[tables.Row]]
    parse: Callable[[tables.Row], Triple]
    passes: int
    persons: str


class LeftOut(Exception):
    """A row that makes no triple. The message says why; it reads well after "rows"."""


class Blank(LeftOut):
    """A row whose label or a needed text is null or blank: left out with data.on_null = "drop", else an error."""

    def __init__(self, field: str):
        super().__init__(f"whose {field} is null or blank")
        self.field = field


def text(row: tables.Row, column: str) -> str:
    """Returns a text without the spaces around it; Blank if it is null or blank."""
    value = (row.values[column] or "").strip()
    if not value:
        raise Blank(column)
    return value


def level(row: tables.Row, column: str, known: Iterable[str]) -> str:
    """Returns a level; Blank if it is null or blank, UserError if it is not one of the known ones."""
    text(row, column)
    value = row.values[column]
    if value not in known:
        raise UserError(f"{row.where}: column {column!r} is {shown(value)}; use one of {', '.join(known)}")
    return value


def labelled(row: tables.Row, person: str, persona: str) -> Triple:
    """Makes a triple from the columns prompt, response_x, response_y and label (0: response_x is preferred; 1: y)."""
    label = row.values["label"]
    if label is None:
        raise Blank("label")
    if label not in (0, 1):
        raise UserError(
            f"{row.where}: column 'label' is {shown(label)}; use 0 (response_x is preferred) or 1 (response_y)"
        )
    chosen, rejected = ("response_x", "response_y") if label == 0 else ("response_y", "response_x")
    return Triple(person, text(row, "prompt"), text(row, chosen), text(row, rejected), persona, row.source)


def load(benchmark: Benchmark, data: Data, counts: Counts) -> dict[str, list[Example]]:
    """Reads config.data.path and cuts its rows into users.

    With data.protocol = "published", the users are those of the published code, in its order, unless on_null = "drop"
    leaves out rows that it keeps. Repeated rows stay, as do prompts that are in both splits. A user has
    data.signals_per_user signals and one query. The settings for seed, draws and queries change nothing.

    With data.protocol = "disjoint", no training user has a prompt of the test split. Rows that repeat or contradict
    another row are dropped. So are the training rows of test persons, if that leaves at least half of the training
    rows; otherwise a line says that both splits have the same persons. A window's prompts differ. If the data have no
    test split, data.test_fraction of the prompts are held out.

    Args:
        benchmark: what to read.
        data: config.data.
        counts: updated with the number of rows that are in no user, by reason. Every row is in a user or counted once.

    Returns:
        {"train": [...], "test": [...]}. A query's group is its prompt. An example's persona is that of the row of its
        first query. Its user is DATASET/SPLIT/PERSON/PASS/WINDOW, and its person the level or persona id.

    Raises:
        UserError: a bad file or setting, or too few rows.
    """
    files = _files(data)
    triples = {split: _read(benchmark, files[split], split, data.on_null, counts) for split in files}
    if data.protocol == "published":
        examples = {split: _published(benchmark, part, split, data.signals_per_user) for split, part in triples.items()}
    else:
        if "test" not in triples:
            triples = _hold_out(triples["train"], data)
        triples = {split: _consistent(part, split, counts) for split, part in triples.items()}
        triples["train"] = _unseen_by_test(benchmark, triples["train"], triples["test"], counts)
        examples = {split: _disjoint(benchmark, part, split, data) for split, part in triples.items()}
    for split, part in triples.items():
        _count_unused(part, examples[split], split, counts)
        if not examples[split]:
            setting = "data.queries_per_user" if split == "train" else "data.test_queries_per_user"
            dropped = ", ".join(f"{number} {reason}" for reason, number in counts.items() if reason.startswith(split))
            raise UserError(
                f"{data.path}: no {split} users can be made (dropped: {dropped or 'nothing, there are no rows'}); lower"
                f" data.signals_per_user or {setting}, or give more data"
            )
    return examples


def _files(data: Data) -> dict[str, list[Path]]:
    """Returns the training files, and the test files if there are any. Other splits are left alone."""
    splits = tables.splits(data.path)
    if "train" not in splits:
        raise UserError(f"{data.path}: has no train split, only {', '.join(splits)}; set data.path to one that has")
    files = {"train": splits["train"]}
    if "validation" in splits:
        logging.warning("%s: the validation split is not used", data.path)
    if data.test_path and data.test_path == data.path:
        raise UserError("config: data.test_path is data.path; leave it empty, or set it to other data")
    if data.test_path:
        found = tables.splits(data.test_path, flag="data.test_path")
        if "test" not in found and len(found) != 1:
            raise UserError(
                f"{data.test_path}: has no test split, only {', '.join(found)}; set data.test_path to files"
            )
        files["test"] = found["test"] if "test" in found else next(iter(found.values()))
    elif "test" in splits:
        files["test"] = splits["test"]
    elif data.protocol == "published":
        raise UserError(f"{data.path}: has no test split; set data.test_path or use data.protocol = 'disjoint'")
    return files


def _read(benchmark: Benchmark, files: Sequence[Path], split: str, on_null: str, counts: Counts) -> list[Triple]:
    """Reads the rows in order, and counts those that make no triple."""
    triples = []
    for row in benchmark.rows(files):
        try:
            triples.append(benchmark.parse(row))
        except LeftOut as reason:
            if isinstance(reason, Blank) and on_null == "error":
                raise UserError(
                    f"{row.where}: column {reason.field!r} is null or blank; give it a value or set data.on_null ="
                    " 'drop' to leave out such rows"
                ) from None
            counts[f"{split} rows {reason}"] += 1
    return triples


def _hold_out(triples: Sequence[Triple], data: Data) -> dict[str, list[Triple]]:
    """Splits by prompt: data.test_fraction of the prompts, drawn by data.seed, are tested on."""
    prompts = list(dict.fromkeys(folded(triple.prompt) for triple in triples))
    n_test = round(data.test_fraction * len(prompts))
    if not 0 < n_test < len(prompts):
        raise UserError(
            f"{data.path}: {len(prompts)} prompts cannot be split at data.test_fraction = {data.test_fraction}; add"
            " rows, change the fraction or set data.test_path"
        )
    order = np.random.default_rng((data.seed, _HELD_OUT_STREAM)).permutation(len(prompts))
    taken = {prompts[i] for i in order[:n_test]}
    return {
        "train": [triple for triple in triples if folded(triple.prompt) not in taken],
        "test": [triple for triple in triples if folded(triple.prompt) in taken],
    }


def _consistent(triples: Sequence[Triple], split: str, counts: Counts) -> list[Triple]:
    """Returns each different row once, without those that state no preference or the opposite of another row."""
    rows: dict[tuple[str, str, str, str], Triple] = {}
    for triple in triples:
        rows.setdefault((triple.person, triple.prompt, triple.chosen, triple.rejected), triple)
    different = [triple for triple in rows.values() if triple.chosen != triple.rejected]
    kept = [t for t in different if (t.person, t.prompt, t.rejected, t.chosen) not in rows]
    _add(counts, f"{split} rows that repeat another row", len(triples) - len(rows))
    _add(counts, f"{split} rows whose two responses are the same", len(rows) - len(different))
    _add(counts, f"{split} rows that contradict another row", len(different) - len(kept))
    return kept


def _unseen_by_test(
    benchmark: Benchmark, train: Sequence[Triple], test: Sequence[Triple], counts: Counts
) -> list[Triple]:
    """Drops the training rows of test prompts, and those of test persons if at least half of the rows remain."""
    prompts = {folded(triple.prompt) for triple in test}
    rows = [triple for triple in train if folded(triple.prompt) not in prompts]
    _add(counts, "train rows whose prompt is in the test split", len(train) - len(rows))
    tested = {triple.person for triple in test}
    others = [triple for triple in rows if triple.person not in tested]
    if 2 * len(others) >= len(rows):
        _add(counts, "train rows whose person is in the test split", len(rows) - len(others))
        return others
    persons = {triple.person for triple in rows}
    shared = persons & tested
    if shared == persons == tested:
        overlap = f"the data have {len(persons)} persons, all of them in both splits"
    else:
        overlap = f"{len(shared)} of {len(persons | tested)} persons are in both splits"
    logging.warning("%s: %s: test users are new, but not their %s", benchmark.name, overlap, benchmark.persons)
    return rows


def _published(benchmark: Benchmark, triples: Sequence[Triple], split: str, signals: int) -> list[Example]:
    """Cuts windows like the published code does, which shuffles with pandas and with datasets.

    One generator shuffles the rows of each person in turn, the persons in the order of their names, pass by pass. From
    each shuffled list, consecutive windows are cut: the signals and one query. In the end, all users are shuffled.
    Prompts may repeat in a window.
    """
    rng = np.random.RandomState(_PUBLISHED_SEED)
    examples = []
    for draw in range(benchmark.passes):
        for person, rows in _by_person(triples).items():
            order = rng.choice(len(rows), size=len(rows), replace=False)  # DataFrame.sample(frac=1) of pandas.
            shuffled = [rows[i] for i in order]
            for i in range(len(rows) // (signals + 1)):
                window = shuffled[i * (signals + 1) : (i + 1) * (signals + 1)]
                examples.append(_example(f"{benchmark.name}/{split}/{person}/{draw}/{i}", split, window, signals))
    order = np.random.default_rng(_PUBLISHED_SEED).permutation(len(examples))  # Dataset.shuffle(seed) of datasets.
    return [examples[i] for i in order]


def _disjoint(benchmark: Benchmark, triples: Sequence[Triple], split: str, data: Data) -> list[Example]:
    """Deals each person's rows into windows with distinct prompts, pass by pass, each in random order."""
    if split == "train":
        draws, queries = data.train_draws, data.queries_per_user
    else:
        draws, queries = data.test_draws, data.test_queries_per_user
    examples: list[Example] = []
    for draw in range(draws):
        rng = np.random.default_rng((data.seed, _STREAMS[split], draw))
        drawn = [
            _example(f"{benchmark.name}/{split}/{person}/{draw}/{i}", split, window, data.signals_per_user)
            for person, rows in _by_person(triples).items()
            for i, window in enumerate(_deal(rows, data.signals_per_user + queries, rng))
        ]
        examples += [drawn[i] for i in rng.permutation(len(drawn))]
    return examples


def _by_person(triples: Sequence[Triple]) -> dict[str, list[Triple]]:
    """Groups the rows by person, in the order of their names."""
    rows: dict[str, list[Triple]] = {person: [] for person in sorted({triple.person for triple in triples})}
    for triple in triples:
        rows[triple.person].append(triple)
    return rows


def _deal(rows: Sequence[Triple], size: int, rng: np.random.Generator) -> list[list[Triple]]:
    """Deals rows into as many random windows of `size` rows as their prompts allow, all distinct within a window.

    Of n windows, each can take a prompt once, so a prompt fills at most n places. Rows of one prompt are adjacent and
    dealt round-robin, so no two of them share a window.
    """
    by_prompt: dict[str, list[Triple]] = {}
    for triple in rows:
        by_prompt.setdefault(triple.prompt, []).append(triple)
    n = len(rows) // size
    while (filled := sum(min(len(same), n) for same in by_prompt.values()) // size) < n:
        n = filled
    prompts = list(by_prompt)
    ordered = []
    for p in rng.permutation(len(prompts)):
        same = by_prompt[prompts[p]]
        ordered += [same[i] for i in rng.permutation(len(same))[:n]]
    return [ordered[i : n * size : n] for i in range(n)]


def _example(user: str, split: str, window: Sequence[Triple], signals: int) -> Example:
    """Makes a user of a window: the first rows are the signals, the others the queries."""
    shown_rows, asked = window[:signals], window[signals:]
    return Example(
        user,
        split,
        tuple(Signal("pair", t.prompt, t.chosen, t.rejected, provenance=t.source) for t in shown_rows),
        tuple(Query(t.prompt, t.chosen, t.rejected, provenance=t.source, group=t.prompt) for t in asked),
        asked[0].persona,
        asked[0].person,
    )


def _count_unused(triples: Sequence[Triple], examples: Sequence[Example], split: str, counts: Counts) -> None:
    """Counts the rows that are in no user of any pass."""
    used = {part.provenance for example in examples for part in example.signals + example.queries}
    persons = {example.person for example in examples}
    unused = [triple for triple in triples if triple.source not in used]
    left_over = sum(triple.person in persons for triple in unused)
    _add(counts, f"{split} rows left over from their person's users", left_over)
    _add(counts, f"{split} rows of persons with too few rows for one user", len(unused) - left_over)


def _add(counts: Counts, reason: str, number: int) -> None:
    """Adds to the counts. A reason without rows gets no entry, since each entry is reported."""
    if number:
        counts[reason] += number
