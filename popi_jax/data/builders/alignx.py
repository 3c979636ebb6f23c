"""Reads AlignX: posts with two comments each, the one that a user prefers, and what else is known of the user.

Source: Li et al. 2025 (arXiv 2503.15463). Training data: hf://datasets/JinaLeejnl/AlignX, 1.3 million rows in Parquet
files. Test data: hf://datasets/JinaLeejnl/AlignX-test, four JSON files with the same users in the same order, one for
each choice of signals. A row is a user, with one query (prompt, chosen, rejected) and up to three kinds of signals: a
demographic text, comments on other posts, and pairs of comments on other posts.

The public recipe for training draws 92,000 rows and then, for each row, what the user shows (`Draws`). It takes
Python's random numbers for a sample that is not public, so its very draws cannot be repeated. "published" therefore
means the same distribution, drawn with NumPy.

Each file is read by itself, block by block, so that several processes can share the work and memory stays small: see
`Job`. `alignx_parts.py` puts the files together.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from popi_jax.data import disjoint, specs, tables
from popi_jax.data.disjoint import Shown, Texts
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError

DEMOGRAPHICS = "Demographic Information"
COMMENTS = "User-Generated Content"
PAIRS = "Pair-wise Comparative Feedback"
# What a user shows, by mode or variant, in the order of the published prompts. The test files' column `profile` is
# never read: in Reddit_arbitrary.json it is made from the demographics, even of users who do not show them.
FIELDS = {
    "DEMO": (DEMOGRAPHICS,),
    "UGC": (COMMENTS,),
    "PAIR": (PAIRS,),
    "arbitrary": (DEMOGRAPHICS, COMMENTS, PAIRS),
}
TEST_FILES = {variant: f"Reddit_{variant}.json" for variant in FIELDS}
BALANCED = ("UGC", "PAIR", "DEMO", "arbitrary")  # Of the modes used least so far, the first one is next.
SHOWN = 4  # The recipe shows at most 4 comments and 4 pairs.
BLOCK = 2048  # Rows that are in memory at a time, and over which modes are balanced.
NUMBERS = 3 + 2 * SHOWN  # The random numbers of a row.

_HISTORIES = {COMMENTS: ("comments", ("prompt", "comment")), PAIRS: ("pairs", ("prompt", "chosen", "rejected"))}
_QUERY: dict[str, Any] = {"prompt": str, "chosen": str, "rejected": str}
_COLUMNS: dict[str, Any] = {DEMOGRAPHICS: specs.Optional(str)} | {
    field: specs.Optional([dict.fromkeys(names, str)]) for field, (_, names) in _HISTORIES.items()
}
_TRAINING = {field: spec.spec for field, spec in _COLUMNS.items()}  # Only test files lack columns.
HOLD_OUT_STREAM, TRAIN_STREAM, TEST_STREAM = range(3)


class Draws:
    """Draws what users show, one after the other, as the public recipe does for its training sample.

    The mode is DEMO for a user with fewer than 4 comments and fewer than 4 pairs, UGC for one with fewer than 4 pairs
    only, and PAIR for one with fewer than 4 comments only. For any other it is the mode that was drawn least so far,
    of all users. DEMO shows the demographics, UGC 4 comments and PAIR 4 pairs. "arbitrary" shows 0 to 4 comments and 0
    to 4 pairs, and hides the demographics with probability one half if any history is shown.

    Args:
        mode: for all users; then histories may be short, and all that there is is shown. "": as above.
        order: of the modes drawn least so far, the first one is next.
    """

    def __init__(self, mode: str = "", order: Sequence[str] = BALANCED):
        self.used: collections.Counter[str] = collections.Counter()
        self._mode, self._order = mode, order

    def __call__(self, comments: int, pairs: int, numbers: Sequence[float]) -> tuple[str, bool, list[int], list[int]]:
        """Returns the mode, whether the demographics are shown, and the places of the comments and pairs shown.

        Args:
            comments: how many the user has.
            pairs: how many the user has.
            numbers: NUMBERS random numbers from [0, 1). The entries are shown in the order drawn.
        """
        mode = self._mode or self._balanced(comments, pairs)
        self.used[mode] += 1
        of_comments, of_pairs = numbers[3 : 3 + SHOWN], numbers[3 + SHOWN :]
        if mode != "arbitrary":
            return (
                mode,
                mode == "DEMO",
                _some(comments, SHOWN, of_comments) if mode == "UGC" else [],
                _some(pairs, SHOWN, of_pairs) if mode == "PAIR" else [],
            )
        some_comments = _some(comments, int(numbers[0] * (SHOWN + 1)), of_comments)
        some_pairs = _some(pairs, int(numbers[1] * (SHOWN + 1)), of_pairs)
        return mode, numbers[2] < 0.5 or not (some_comments or some_pairs), some_comments, some_pairs

    def _balanced(self, comments: int, pairs: int) -> str:
        few_comments, few_pairs = comments < SHOWN, pairs < SHOWN
        if few_comments and few_pairs:
            return "DEMO"
        if few_comments or few_pairs:
            return "PAIR" if few_comments else "UGC"
        return min(self._order, key=lambda mode: self.used[mode])


def _some(entries: int, count: int, numbers: Sequence[float]) -> list[int]:
    """Draws places of entries without replacement, one per number."""
    places = list(range(entries))
    for i in range(min(count, entries)):
        j = i + int(numbers[i] * (entries - i))
        places[i], places[j] = places[j], places[i]
    return places[:count]


@dataclasses.dataclass(frozen=True)
class Job:
    """The rows of one file that are drawn for a split.

    What becomes of a row depends on the rows of its block that are drawn before it, and on no other: they share the
    modes. So a smaller sample is the start of a larger one.

    Attributes:
        split: "train" or "test".
        file: the file.
        number: its place among the files of the split, which determines its random numbers with the seed.
        rows_N: the numbers of the rows in the file, in the order in which they were drawn.
        ranks_N: their ranks in the draw, ascending.
        seed: data.seed.
        disjoint: whether training must show nothing of the test split.
        on_null: data.on_null.
        mode: a key of FIELDS: what the users show. "": it is drawn for each user.
        demo: for a test file, the file with the personas of the same users. Users then show all that they have.
        prompts: what training must not show: the prompts of test users.
        shown: what training must not show: what test users show and answer.
    """

    split: str
    file: pathlib.Path
    number: int
    rows_N: np.ndarray
    ranks_N: np.ndarray
    seed: int
    disjoint: bool
    on_null: str
    mode: str = ""
    demo: pathlib.Path | None = None
    prompts: Texts = dataclasses.field(default_factory=Texts)
    shown: Shown = dataclasses.field(default_factory=Shown)


@dataclasses.dataclass
class Dropped:
    """The rows and signals that were dropped: the row's rank in the draw, and why."""

    ranks: list[int] = dataclasses.field(default_factory=list)
    reasons: list[str] = dataclasses.field(default_factory=list)


def columns(mode: str, demo: bool) -> dict[str, Any]:
    """Returns the columns to read of a file whose users show a mode, see `Job`; "" is the mode of training files."""
    return _QUERY | ({field: _COLUMNS[field] for field in FIELDS[mode]} if demo else _TRAINING)


def examples(job: Job, dropped: Dropped) -> Iterator[tuple[int, Example]]:
    """Yields the examples of the file, each with its rank.

    Args:
        job: what to read.
        dropped: updated with what is dropped. Rows that repeat another one are left in.

    Raises:
        UserError: bad data; with data.on_null = "error", a row drawn that has a null or blank text, equal responses or
            nothing to show.
    """
    stream = {"train": TRAIN_STREAM, "test": TEST_STREAM}[job.split]
    rng = np.random.default_rng((job.seed, stream, job.number))
    told = _personas(job)
    by_row = np.argsort(job.rows_N)
    sorted_N = job.rows_N[by_row]
    for block in tables.blocks(job.file, columns(job.mode, job.demo is not None), BLOCK):
        numbers_BxN = rng.random((block.count, NUMBERS))  # For all rows, so that the others' do not depend on the draw.
        order = np.random.default_rng((job.seed, stream, job.number, block.start)).permutation(len(BALANCED))
        start, stop = np.searchsorted(sorted_N, (block.start, block.start + block.count))
        drawn = np.sort(by_row[start:stop])  # In the order of the draw.
        places = job.rows_N[drawn] - block.start
        rows = block.take(places)
        personas = [_text(row.values[DEMOGRAPHICS]) for row in rows] if told is None else told(rows, places)
        maker = _Maker(job, dropped, Draws(job.mode, [BALANCED[i] for i in order]))
        for rank, row, persona, numbers in zip(
            job.ranks_N[drawn].tolist(), rows, personas, numbers_BxN[places].tolist(), strict=True
        ):
            example = maker.example(rank, row, persona, numbers)
            if example:
                yield rank, example


def _personas(job: Job) -> Any:
    """Returns a function of a block's rows and places that gives the personas in the DEMO file; None without one."""
    if job.demo is None:
        return None
    blocks = tables.blocks(job.demo, columns("DEMO", True), BLOCK)

    def told(rows: Sequence[tables.Row], places: np.ndarray) -> list[str]:
        demos = next(blocks).take(places)
        for row, demo in zip(rows, demos, strict=True):
            for field in _QUERY:
                if row.values[field] != demo.values[field]:
                    raise UserError(
                        f"{row.where}: field {field!r} differs from that of {demo.where}, which has the personas; take"
                        " both files from the same release, unsorted"
                    )
        return [_text(demo.values[DEMOGRAPHICS]) for demo in demos]

    return told


class _Maker:
    """Makes the examples of one block."""

    def __init__(self, job: Job, dropped: Dropped, draws: Draws):
        self._job, self._dropped, self._draws = job, dropped, draws
        self._rank = 0
        # Nothing of which the prompt begins otherwise is in either.
        self._beginnings = job.prompts.beginnings | job.shown.beginnings

    def example(self, rank: int, row: tables.Row, persona: str, numbers: Sequence[float]) -> Example | None:
        """Returns the row's example; None if the row is dropped."""
        job, values = self._job, row.values
        self._rank = rank
        if (flaw := _flaw(values, _QUERY)) is not None:
            self._leave_out(row.where, flaw, "rows")
            return None
        query = Query(values["prompt"], values["chosen"], values["rejected"], row.source, values["prompt"])
        if job.disjoint and self._leaks(query):
            return None
        fields = FIELDS[job.mode or "arbitrary"]
        profile = _text(values[DEMOGRAPHICS]) if DEMOGRAPHICS in fields else ""
        of_comments, of_pairs = (self._entries(row, field) if field in fields else [] for field in _HISTORIES)
        if job.demo:
            mode, shows_profile, comments, pairs = job.mode, True, of_comments, of_pairs
        else:
            mode, shows_profile, some_comments, some_pairs = self._draws(len(of_comments), len(of_pairs), numbers)
            comments, pairs = [of_comments[i] for i in some_comments], [of_pairs[i] for i in some_pairs]
        signals = []
        if shows_profile and profile:
            signals.append(Signal("profile", text=profile, provenance=f"{row.source}/demographics"))
        signals += [_comment(row, i) for i in comments]
        signals += [_pair(row, i) for i in pairs]
        if not signals:
            shows = f"nothing to show in mode {mode} ({', '.join(FIELDS[mode])})"
            self._leave_out(row.where, (shows, "without signals to show"), "rows")
            return None
        if job.disjoint:
            signals = self._unleaked(signals, query.prompt)
            if not signals:
                self._drop("rows whose signals all show their own query's prompt or a test prompt")
                return None
        return Example(f"alignx/{job.split}/{row.source}", job.split, tuple(signals), (query,), persona)

    def _leaks(self, query: Query) -> bool:
        """Whether to drop a row because of what test users have."""
        if disjoint.beginning(query.prompt) not in self._beginnings:
            return False
        if self._job.prompts.found(query.prompt) is not None:
            self._drop("rows whose prompt is a test prompt")
        elif query in self._job.shown:
            self._drop("rows that a test user shows")
        else:
            return False
        return True

    def _entries(self, row: tables.Row, field: str) -> list[int]:
        """Returns the places of the entries of a history that state something."""
        name, fields = _HISTORIES[field]
        places: list[int] = []
        seen: set[tuple[str, ...]] = set()
        for i, entry in enumerate(row.values[field] or ()):
            if (flaw := _flaw(entry, fields)) is not None:
                self._leave_out(f"{row.where}: {field}[{i}]", flaw, name)
                continue
            if self._job.disjoint:
                texts = tuple(entry.values())
                if texts in seen:
                    self._drop(f"{name} that repeat another one of their row")
                    continue
                seen.add(texts)
            places.append(i)
        return places

    def _unleaked(self, signals: Sequence[Signal], prompt: str) -> list[Signal]:
        """Returns the signals that show neither the query's prompt nor a test prompt."""
        own, kept = disjoint.beginning(prompt), []
        for signal in signals:
            begun = None if signal.kind == "profile" else disjoint.beginning(signal.prompt)
            if begun is None or (begun != own and begun not in self._beginnings):
                kept.append(signal)
            elif begun == own and disjoint.folded(signal.prompt) == disjoint.folded(prompt):
                self._drop("signals that show their own query's prompt")
            elif self._job.prompts.found(signal.prompt) is not None:
                self._drop("signals that show a test prompt")
            elif signal in self._job.shown:
                self._drop("signals that a test user shows, too")
            else:
                kept.append(signal)
        return kept

    def _leave_out(self, where: str, flaw: tuple[str, str], kind: str) -> None:
        """Drops something that states nothing; UserError if data.on_null is "error"."""
        what, reason = flaw
        if self._job.on_null == "error":
            raise UserError(
                f"{where}: {what}; correct it, or set data.on_null = 'drop' to leave out and count {kind} {reason}"
            )
        self._drop(f"{kind} {reason}")

    def _drop(self, reason: str) -> None:
        self._dropped.ranks.append(self._rank)
        self._dropped.reasons.append(f"{self._job.split} {reason}")


def _flaw(record: Mapping[str, Any] | None, fields: Sequence[str] | Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns what is wrong with a row or an entry that states nothing, in two wordings; None if it states something.

    It has null or blank texts or equal responses.
    """
    if record is None:
        return "the entry is null", "that are null"
    for field in fields:
        text = record[field]
        if not text or text.isspace():
            return f"field {field!r} is null or blank", f"whose {field} is null or blank"
    if "chosen" in fields and record["chosen"] == record["rejected"]:
        return "fields 'chosen' and 'rejected' are the same text", "whose responses are the same text"
    return None


def _comment(row: tables.Row, place: int) -> Signal:
    entry = row.values[COMMENTS][place]
    provenance = f"{row.source}/comments/{place}"
    return Signal("comment", entry["prompt"], text=entry["comment"], provenance=provenance)


def _pair(row: tables.Row, place: int) -> Signal:
    entry = row.values[PAIRS][place]
    provenance = f"{row.source}/pairs/{place}"
    return Signal("pair", entry["prompt"], entry["chosen"], entry["rejected"], provenance=provenance)


def identity(example: Example) -> int:
    """Returns the key of what two rows have in common if one repeats the other. Their histories may differ."""
    (query,) = example.queries
    return disjoint.key(query.prompt, query.chosen, query.rejected, example.persona)


def resemblance(example: Example) -> int:
    """Returns a number that is the same for rows that repeat another, and for few others. It takes less time."""
    (query,) = example.queries
    prompt, chosen, rejected = map(disjoint.beginning, (query.prompt, query.chosen, query.rejected))
    return (prompt << 32) ^ (chosen << 16) ^ rejected


def _text(value: str | None) -> str:
    """Returns a text as it is; "" if it is null or blank."""
    return value if value and not value.isspace() else ""
