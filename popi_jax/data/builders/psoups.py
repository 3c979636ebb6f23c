"""Reads a P-Soups file: a JSON list of preference rows, each with a persona and pairs that show its preferences.

Source: Jang et al. 2023 (arXiv 2310.11564), in the format that AlignX (arXiv 2503.15463) evaluates on. Both protocols
split by query prompt. A prompt rarely occurs under more than one persona, so it can give the persona away.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from popi_jax.config import Data
from popi_jax.data import checks
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError, shown

FEEDBACK = "Pair-wise Comparative Feedback"
PERSONA = "ground_truth_persona"
_SPLIT_STREAM, _TRAIN_STREAM, _TEST_STREAM = range(3)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the file: its query triple, its persona and the signals that ship with it."""

    index: int
    query: Query
    persona: str
    shipped: tuple[Signal, ...]


@dataclasses.dataclass(frozen=True)
class Draws:
    """How the rows of one split become examples.

    Attributes:
        protocol: "disjoint" or "published".
        signals_per_user: number of signals to draw; disjoint only.
        draws: number of passes over the rows, each with new signals and new groups of queries; "published" makes one.
        queries_per_user: the largest number of queries in an example.
    """

    protocol: str
    signals_per_user: int
    draws: int
    queries_per_user: int

    def __post_init__(self) -> None:
        """Raises UserError for settings that no data can satisfy."""
        if self.protocol not in ("disjoint", "published"):
            raise UserError(f"data.protocol = {self.protocol!r} is unknown; use 'disjoint' or 'published'")
        for name in ("signals_per_user", "draws", "queries_per_user"):
            if getattr(self, name) < 1:
                raise UserError(f"data: {name} = {getattr(self, name)} is too small for psoups; use 1 or more")


def load(data: Data, counts: collections.Counter[str]) -> dict[str, list[Example]]:
    """Reads config.data.path, see `read_psoups`."""
    if not data.path:
        raise UserError("config: data.path is empty, but data.dataset = 'psoups' reads a file; set its path")
    return read_psoups(
        data.path,
        protocol=data.protocol,
        seed=data.seed,
        test_fraction=data.test_fraction,
        signals_per_user=data.signals_per_user,
        train_draws=data.train_draws,
        test_draws=data.test_draws,
        queries_per_user=data.queries_per_user,
        test_queries_per_user=data.test_queries_per_user,
        counts=counts,
    )


def read_psoups(
    path: str | pathlib.Path,
    *,
    protocol: str = "disjoint",
    seed: int = 0,
    test_fraction: float = 0.3,
    signals_per_user: int = 4,
    train_draws: int = 1,
    test_draws: int = 1,
    queries_per_user: int = 1,
    test_queries_per_user: int = 1,
    counts: collections.Counter[str] | None = None,
) -> dict[str, list[Example]]:
    """Reads a P-Soups file into training and test examples that share no query prompt.

    The split depends only on the file, `seed` and `test_fraction`. Both protocols, with any number of draws or queries
    per user, are therefore tested on the same rows. Within a draw, each row is a query of one example. Examples are in
    random order within each draw, so the first n are a fair sample.

    Args:
        path: the file.
        protocol: "disjoint" draws a user's signals from query rows of the same persona in the same split, with prompts
            that differ from each other and from the example's queries. "published" uses the feedback pairs of the
            example's first row, except pairs that show one of its own queries, since they would reveal the answer.
        seed: for drawing the split and the signals.
        test_fraction: the share of rows to test on, in (0, 1). Prompts that no shipped signal shows are taken first. If
            there are too few of them, "published" drops the training rows whose signals show a test prompt.
        signals_per_user: see `Draws`.
        train_draws: see `Draws`.
        test_draws: see `Draws`.
        queries_per_user: queries of a training example, all from one persona and with distinct prompts. See `Draws`.
        test_queries_per_user: the same for test examples.
        counts: updated with the number of dropped rows and signals, by reason.

    Returns:
        {"train": [...], "test": [...]}. A query's group is its prompt, even if an example has several queries.

    Raises:
        UserError: a bad file or setting, or too few rows.
    """
    counts = collections.Counter() if counts is None else counts
    path = pathlib.Path(path)
    plans = {
        "train": Draws(protocol, signals_per_user, train_draws, queries_per_user),
        "test": Draws(protocol, signals_per_user, test_draws, test_queries_per_user),
    }
    rows = split_rows(read_rows(path), test_fraction, seed, path)
    if protocol == "published":
        rows["train"] = _unseen_by_test(rows["train"], rows["test"], counts)
        if not rows["train"]:
            raise UserError(
                f"{path}: every training row shows a test prompt in its signals; use data.protocol = 'disjoint'"
            )
    streams = {"train": _TRAIN_STREAM, "test": _TEST_STREAM}
    return {
        split: _examples(rows[split], split, plans[split], np.random.default_rng((seed, streams[split])), path, counts)
        for split in ("train", "test")
    }


def read_rows(path: pathlib.Path) -> list[Row]:
    """Reads and checks the file. Provenance is "FILE#ROW", or "FILE#ROW/feedback/I" for a shipped signal."""
    text = checks.read_text(path, "set data.path to the P-Soups JSON file, which is not part of this package")
    records = checks.parse_json(text, str(path), remedy="give one JSON list of rows")
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: expected a JSON list of rows with prompt, chosen, rejected, {PERSONA}, {FEEDBACK}")
    rows = []
    for index, value in enumerate(records):
        where = f"{path}: row {index}"
        record = checks.as_object(value, where)
        pair = checks.pair_fields(record, where)
        query = Query(**pair, provenance=f"{path.name}#{index}", group=pair["prompt"])
        shipped = []
        for i, value in enumerate(checks.list_field(record, FEEDBACK, where)):
            pair_where = f"{where}: {FEEDBACK}[{i}]"
            fields = checks.pair_fields(checks.as_object(value, pair_where), pair_where)
            shipped.append(Signal("pair", provenance=f"{query.provenance}/feedback/{i}", **fields))
        rows.append(Row(index, query, checks.text_field(record, PERSONA, where), tuple(shipped)))
    return rows


def split_rows(rows: Sequence[Row], test_fraction: float, seed: int, path: pathlib.Path) -> dict[str, list[Row]]:
    """Splits by query prompt. Whole prompts go to test, in random order, as long as they fit in `test_fraction`."""
    if not 0 < test_fraction < 1:
        raise UserError(f"data.test_fraction = {test_fraction}; use a fraction between 0 and 1, such as 0.3")
    sizes = collections.Counter(row.query.prompt for row in rows)
    shown = {signal.prompt for row in rows for signal in row.shipped}
    rng = np.random.default_rng((seed, _SPLIT_STREAM))
    prompts = [list(sizes)[i] for i in rng.permutation(len(sizes))]
    unshown = [prompt for prompt in prompts if prompt not in shown]
    target = round(test_fraction * len(rows))
    if sum(sizes[prompt] for prompt in unshown) < target:
        unshown += [prompt for prompt in prompts if prompt in shown]
    taken: set[str] = set()
    room = target
    for prompt in unshown:
        if sizes[prompt] <= room:
            taken.add(prompt)
            room -= sizes[prompt]
    test = [row for row in rows if row.query.prompt in taken]
    train = [row for row in rows if row.query.prompt not in taken]
    if not test or not train:
        raise UserError(
            f"{path}: {len(rows)} rows of {len(sizes)} prompts cannot be split at data.test_fraction = {test_fraction};"
            " add rows or change the fraction"
        )
    return {"train": train, "test": test}


def _unseen_by_test(train: list[Row], test: list[Row], counts: collections.Counter[str]) -> list[Row]:
    """Drops the training rows whose signals show a test prompt."""
    test_prompts = {row.query.prompt for row in test}
    kept = [row for row in train if not any(signal.prompt in test_prompts for signal in row.shipped)]
    if len(kept) < len(train):
        counts["training rows whose signals show a test prompt"] += len(train) - len(kept)
    return kept


def _examples(
    rows: Sequence[Row],
    split: str,
    plan: Draws,
    rng: np.random.Generator,
    path: pathlib.Path,
    counts: collections.Counter[str],
) -> list[Example]:
    """Makes the examples of one split, draw by draw, each draw in random order."""
    by_persona: dict[str, list[Row]] = {}
    for row in rows:
        by_persona.setdefault(row.persona, []).append(row)
    examples = []
    for draw in range(1 if plan.protocol == "published" else plan.draws):
        drawn = []
        for persona, persona_rows in by_persona.items():
            for group in _groups(persona_rows, plan.queries_per_user, rng):
                prompts = {row.query.prompt for row in group}
                if plan.protocol == "disjoint":
                    signals = _drawn_signals(persona_rows, prompts, plan.signals_per_user, rng, f"{path}: {split} rows")
                else:
                    signals = _shipped_signals(group[0], prompts, counts)
                if not signals:
                    counts[f"{split} examples whose shipped signals all show their own queries"] += 1
                    continue
                user = f"{group[0].query.provenance}/draw/{draw}"
                queries = tuple(row.query for row in group)
                drawn.append(Example(user, split, signals, queries, persona))
        examples += [drawn[i] for i in rng.permutation(len(drawn))]
    return examples


def _groups(rows: Sequence[Row], size: int, rng: np.random.Generator) -> list[list[Row]]:
    """Deals rows into random groups of nearly equal size, at most `size`, without repeating a prompt in a group.

    Rows of one prompt are adjacent and dealt round-robin. There are at least as many groups as the most frequent prompt
    has rows, so two rows of a prompt never share a group.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.query.prompt, []).append(row)
    prompts = list(by_prompt)
    ordered = []
    for p in rng.permutation(len(prompts)):
        same = by_prompt[prompts[p]]
        ordered += [same[i] for i in rng.permutation(len(same))]
    n_groups = max(-(-len(rows) // size), max(len(same) for same in by_prompt.values()))
    return [ordered[start::n_groups] for start in range(n_groups)]


def _drawn_signals(
    rows: Sequence[Row], query_prompts: set[str], count: int, rng: np.random.Generator, where: str
) -> tuple[Signal, ...]:
    """Draws `count` prompts other than the queries' prompts, and one row for each of them."""
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        if row.query.prompt not in query_prompts:
            by_prompt.setdefault(row.query.prompt, []).append(row)
    if len(by_prompt) < count:
        raise UserError(
            f"{where} of persona {shown(rows[0].persona)} have {len(by_prompt)} other prompts, too few for"
            f" data.signals_per_user = {count}; lower it or add rows"
        )
    prompts = list(by_prompt)
    signals = []
    for p in rng.choice(len(prompts), size=count, replace=False):
        same = by_prompt[prompts[p]]
        query = same[rng.integers(len(same))].query
        signals.append(Signal("pair", query.prompt, query.chosen, query.rejected, provenance=query.provenance))
    return tuple(signals)


def _shipped_signals(row: Row, query_prompts: set[str], counts: collections.Counter[str]) -> tuple[Signal, ...]:
    """Returns the row's shipped signals, except those that show one of the queries."""
    signals = tuple(signal for signal in row.shipped if signal.prompt not in query_prompts)
    if len(signals) < len(row.shipped):
        counts["shipped signals that show their own query"] += len(row.shipped) - len(signals)
    return signals
