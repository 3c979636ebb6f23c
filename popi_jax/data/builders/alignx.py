"""Reads AlignX: posts with two comments each, the one that a user prefers, and what else is known of the user.

Source: Li et al. 2025 (arXiv 2503.15463). Training data: hf://datasets/JinaLeejnl/AlignX, 1.3 million rows in Parquet
files. Test data: hf://datasets/JinaLeejnl/AlignX-test, four JSON files with the same users in the same order, one for
each choice of signals. A row is a user, with one query (prompt, chosen, rejected) and up to three kinds of signals: a
demographic text, comments on other posts, and pairs of comments on other posts.

The public recipe for training draws 92,000 rows and then, for each row, what the user shows (`Draws`). It takes
Python's random numbers for a sample that is not public, so its very draws cannot be repeated. "published" therefore
means the same distribution, drawn with NumPy.
"""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from popi_jax.config import Data
from popi_jax.data import specs, tables
from popi_jax.data.disjoint import Shown, folded
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

_HISTORIES = {COMMENTS: ("comments", ("prompt", "comment")), PAIRS: ("pairs", ("prompt", "chosen", "rejected"))}
_QUERY: dict[str, Any] = {"prompt": str, "chosen": str, "rejected": str}
_COLUMNS: dict[str, Any] = {DEMOGRAPHICS: specs.Optional(str)} | {
    field: specs.Optional([dict.fromkeys(names, str)]) for field, (_, names) in _HISTORIES.items()
}
_HOLD_OUT_STREAM, _TRAIN_STREAM, _TEST_STREAM = range(3)

_TRAINING = {field: spec.spec for field, spec in _COLUMNS.items()}  # Only test files lack columns.

Signals = Mapping[str, tuple[Signal, ...]]  # By field.


@dataclasses.dataclass(frozen=True)
class User:
    """A row and its persona, the demographic text; "" if there is none. The row itself may lack it in test files."""

    row: tables.Row
    persona: str


@dataclasses.dataclass(frozen=True)
class Pool:
    """The rows that a split is drawn from.

    Attributes:
        files: files with the rows.
        indices: the rows' numbers, counted through the files.
        mode: a key of FIELDS: what the users show. "": it is drawn for each user.
        demo: for a test file, the file with the personas of the same users. Users then show all that they have.
    """

    files: Sequence[pathlib.Path]
    indices: np.ndarray
    mode: str = ""
    demo: pathlib.Path | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that users may show."""
        return FIELDS[self.mode or "arbitrary"]

    def users(self) -> Iterator[User]:
        """Reads all rows of the files, in order."""
        if self.demo is None:
            for row in tables.rows(self.files, _QUERY | _TRAINING):
                yield User(row, _text(row.values[DEMOGRAPHICS]))
            return
        shown = tables.rows(self.files, _QUERY | {field: _COLUMNS[field] for field in self.fields})
        told = tables.rows([self.demo], _QUERY | {DEMOGRAPHICS: _COLUMNS[DEMOGRAPHICS]})
        for row, demo in zip(shown, told, strict=True):
            for field in _QUERY:
                if row.values[field] != demo.values[field]:
                    raise UserError(
                        f"{row.where}: field {field!r} differs from that of {demo.where}, which has the personas; take"
                        " both files from the same release, unsorted"
                    )
            yield User(row, _text(demo.values[DEMOGRAPHICS]))


class Draws:
    """Draws what users show, one after the other, as the public recipe does for its training sample.

    The mode is DEMO for a user with fewer than 4 comments and fewer than 4 pairs, UGC for one with fewer than 4 pairs
    only, and PAIR for one with fewer than 4 comments only. For any other it is the mode that was drawn least so far,
    of all users. DEMO shows the demographics, UGC 4 comments and PAIR 4 pairs. "arbitrary" shows 0 to 4 comments and 0
    to 4 pairs, and hides the demographics with probability one half if any history is shown.

    Args:
        rng: draws the entries of the histories. They are shown in the order drawn.
        mode: for all users; then histories may be short, and all that there is is shown. "": as above.
    """

    def __init__(self, rng: np.random.Generator, mode: str = ""):
        self.used: collections.Counter[str] = collections.Counter()
        self._rng, self._mode = rng, mode

    def __call__(self, signals: Signals) -> tuple[str, tuple[Signal, ...]]:
        """Returns the mode and the signals shown."""
        mode = self._mode or self._balanced(signals)
        self.used[mode] += 1
        if mode != "arbitrary":
            (field,) = FIELDS[mode]
            return mode, signals[field] if field == DEMOGRAPHICS else self._some(signals[field], SHOWN)
        history = tuple(
            signal for field in _HISTORIES for signal in self._some(signals[field], int(self._rng.integers(SHOWN + 1)))
        )
        hidden = bool(history) and self._rng.random() < 0.5
        return mode, history if hidden else signals[DEMOGRAPHICS] + history

    def _balanced(self, signals: Signals) -> str:
        few_comments, few_pairs = (len(signals[field]) < SHOWN for field in _HISTORIES)
        if few_comments and few_pairs:
            return "DEMO"
        if few_comments or few_pairs:
            return "PAIR" if few_comments else "UGC"
        return min(BALANCED, key=lambda mode: self.used[mode])

    def _some(self, signals: Sequence[Signal], count: int) -> tuple[Signal, ...]:
        chosen = self._rng.choice(len(signals), size=min(count, len(signals)), replace=False) if signals else ()
        return tuple(signals[i] for i in chosen)


def load(data: Data, counts: collections.Counter[str]) -> dict[str, list[Example]]:
    """Reads config.data.path and config.data.test_path. Both splits are in random order, determined by data.seed.

    Test users are the rows of data.variant's file in data.test_path, or else in data.path, and show what that file
    says; their personas are in the DEMO file. Without such files, they are the rows of a test split in data.path, or
    else a share of its rows, whose prompts are then in no training row. They show what `Draws` draws in the mode
    data.variant.

    "disjoint" leaves out rows that repeat another row, entries that repeat another one of the same history, signals
    that show their own query's prompt, and training rows and training signals with the prompt of a test query or that a
    test user shows. It
    draws first and then leaves out, so some users show fewer signals. "published" leaves out none of these.

    Rows are drawn without replacement until the split has data.train_users or data.test_users examples, or until none
    is left. Only the rows drawn are kept in memory, and only what they drop is counted. To draw more does not change
    the first examples.

    Args:
        data: config.data. It uses path, test_path, variant, protocol, on_null, test_fraction, train_users, test_users
            and seed.
        counts: updated with the number of dropped rows and signals, by reason.

    Returns:
        {"train": [...], "test": [...]}. Each example has one query, whose group is its prompt.

    Raises:
        UserError: a bad file or setting; with data.on_null = "error", a row drawn that has a null or blank text, equal
            responses or nothing to show; or an empty split.
    """
    if not data.path:
        raise UserError("config: data.path is empty, but data.dataset = 'alignx' reads files; set its path")
    pools = _pools(data)
    test = _Builder("test", data, pools["test"], frozenset(), Shown(()), counts).examples(data.test_users)
    prompts, shown = frozenset[bytes](), Shown(())
    if data.protocol == "disjoint":
        prompts, shown = _prompts(pools["test"]), Shown(test)
    train = _Builder("train", data, pools["train"], prompts, shown, counts).examples(data.train_users)
    return {"train": train, "test": test}


class _Builder:
    """Makes the examples of one split."""

    def __init__(
        self,
        split: str,
        data: Data,
        pool: Pool,
        test_prompts: frozenset[bytes],
        shown: Shown,
        counts: collections.Counter[str],
    ):
        self._split, self._pool, self._counts = split, pool, counts
        self._test_prompts, self._shown = test_prompts, shown  # What training users must not show.
        self._disjoint, self._on_null = data.protocol == "disjoint", data.on_null
        self._rng = np.random.default_rng((data.seed, {"train": _TRAIN_STREAM, "test": _TEST_STREAM}[split]))
        self._draws = Draws(self._rng, pool.mode)
        self._seen: set[bytes] = set()

    def examples(self, wanted: int) -> list[Example]:
        """Returns `wanted` examples, or as many as there are; 0: all.

        It reads the files once, and again only if many rows were dropped: then for as many more rows as it has drawn.
        """
        order = self._rng.permutation(self._pool.indices)
        wanted = wanted or len(order)
        examples: list[Example] = []
        start, stop = 0, wanted + wanted // 4 + 100
        while start < len(order) and len(examples) < wanted:
            for user in self._read(order[start:stop]):
                example = self._example(user)
                if example:
                    examples.append(example)
                if len(examples) == wanted:
                    break
            start, stop = stop, 2 * stop
        if not examples:
            why = [f"{number} {reason}" for reason, number in self._counts.items() if reason.startswith(self._split)]
            raise UserError(
                f"{self._pool.files[0]}: no {self._split} row can be used ({', '.join(why) or 'there are none'}); add"
                " other rows"
            )
        return examples

    def _read(self, indices: np.ndarray) -> list[User]:
        """Reads these rows, in this order, and keeps no other."""
        place = {int(index): i for i, index in enumerate(indices)}
        found = {place[index]: user for index, user in enumerate(self._pool.users()) if index in place}
        return [found[i] for i in range(len(indices))]

    def _example(self, user: User) -> Example | None:
        """Returns the user's example; None if the row is dropped."""
        row, values = user.row, user.row.values
        if self._flawed(values, tuple(_QUERY), row.where, "rows") or (self._disjoint and self._repeated(user)):
            return None
        prompt = values["prompt"]
        found = {field: self._signals(row, field) for field in self._pool.fields}
        if self._pool.demo:
            mode, signals = self._pool.mode, tuple(signal for signals in found.values() for signal in signals)
        else:
            mode, signals = self._draws(found)
        if not signals:
            what = f"nothing to show in mode {mode} ({', '.join(FIELDS[mode])})"
            self._leave_out(f"{row.where}: {what}", "rows without signals to show")
            return None
        if self._disjoint:
            signals = self._unleaked(signals, prompt)
            if not signals:
                self._drop("rows whose signals all show their own query's prompt or a test prompt")
                return None
            self._seen.add(_identity(user))
        query = Query(prompt, values["chosen"], values["rejected"], provenance=row.source, group=prompt)
        return Example(f"alignx/{self._split}/{row.source}", self._split, signals, (query,), user.persona)

    def _repeated(self, user: User) -> bool:
        """Whether to drop a row because of what is in another one."""
        if _key(user.row.values["prompt"]) in self._test_prompts:
            self._drop("rows whose prompt is a test prompt")
            return True
        if Query(*(user.row.values[field] for field in _QUERY)) in self._shown:
            self._drop("rows that a test user shows")
            return True
        if _identity(user) in self._seen:
            self._drop("rows that repeat another row")
            return True
        return False

    def _signals(self, row: tables.Row, field: str) -> tuple[Signal, ...]:
        """Returns what a row has in a field."""
        value = row.values[field]
        if field == DEMOGRAPHICS:
            text = _text(value)
            return (Signal("profile", text=text, provenance=f"{row.source}/demographics"),) if text else ()
        name, fields = _HISTORIES[field]
        signals, seen = [], set()
        for i, entry in enumerate(value or ()):
            if self._flawed(entry, fields, f"{row.where}: {field}[{i}]", name):
                continue
            texts = tuple(entry[name] for name in fields)
            if self._disjoint and texts in seen:
                self._drop(f"{name} that repeat another one of their row")
                continue
            seen.add(texts)
            provenance = f"{row.source}/{name}/{i}"
            if field == COMMENTS:
                signals.append(Signal("comment", prompt=entry["prompt"], text=entry["comment"], provenance=provenance))
            else:
                signals.append(Signal("pair", **{name: entry[name] for name in fields}, provenance=provenance))
        return tuple(signals)

    def _unleaked(self, signals: Sequence[Signal], prompt: str) -> tuple[Signal, ...]:
        """Returns the signals that show neither the query's prompt nor a test prompt."""
        kept = []
        for signal in signals:
            if signal.kind != "profile" and _key(signal.prompt) == _key(prompt):
                self._drop("signals that show their own query's prompt")
            elif signal.kind != "profile" and _key(signal.prompt) in self._test_prompts:
                self._drop("signals that show a test prompt")
            elif signal in self._shown:
                self._drop("signals that a test user shows, too")
            else:
                kept.append(signal)
        return tuple(kept)

    def _flawed(self, record: Mapping[str, Any] | None, fields: Sequence[str], where: str, kind: str) -> bool:
        """Whether a row or an entry states nothing, because it has null or blank texts or equal responses."""
        if record is None:
            return self._leave_out(f"{where}: the entry is null", f"{kind} that are null")
        for field in fields:
            if not _text(record[field]):
                return self._leave_out(
                    f"{where}: field {field!r} is null or blank", f"{kind} whose {field} is null or blank"
                )
        if "chosen" in fields and record["chosen"] == record["rejected"]:
            return self._leave_out(
                f"{where}: fields 'chosen' and 'rejected' are the same text",
                f"{kind} whose responses are the same text",
            )
        return False

    def _leave_out(self, message: str, reason: str) -> bool:
        """Drops something that states nothing; UserError if data.on_null is "error"."""
        if self._on_null == "error":
            raise UserError(f"{message}; correct it, or set data.on_null = 'drop' to leave out and count {reason}")
        self._drop(reason)
        return True

    def _drop(self, reason: str) -> None:
        self._counts[f"{self._split} {reason}"] += 1


def _pools(data: Data) -> dict[str, Pool]:
    """Returns the rows to train and to test on."""
    names = tuple(TEST_FILES.values())
    # The test files' names state no split, which would be refused if those of the files beside them do.
    splits = tables.splits(data.path, without=names)
    files = splits.get("train", [])
    if not files:
        raise UserError(f"{data.path}: no training files; set data.path to a folder with those of AlignX")
    source, flag = (data.test_path, "data.test_path") if data.test_path else (data.path, "data.path")
    named = tables.named(source, names, flag)
    if named or data.test_path:
        return {"train": _all(files), "test": _variant(named, source, data.variant)}
    if splits.get("test"):
        return {"train": _all(files), "test": _all(splits["test"], data.variant)}
    if data.protocol == "published":
        raise UserError(f"{data.path}: has no test files; set data.test_path or use data.protocol = 'disjoint'")
    held = _held_out(files, data)
    return {"train": Pool(files, np.flatnonzero(~held)), "test": Pool(files, np.flatnonzero(held), data.variant)}


def _all(files: Sequence[pathlib.Path], mode: str = "") -> Pool:
    return Pool(files, np.arange(tables.count(files)), mode)


def _variant(named: Mapping[str, pathlib.Path], source: str, variant: str) -> Pool:
    """Returns the rows of a variant's test file, with the personas of the DEMO file."""
    for name in (TEST_FILES[variant], TEST_FILES["DEMO"]):
        if name not in named:
            raise UserError(
                f"{source}: no file {name}, which data.variant = {variant!r} needs; add it, or set data.test_path to"
                " the folder or hub id that has it"
            )
    shown, demo = named[TEST_FILES[variant]], named[TEST_FILES["DEMO"]]
    rows, personas = tables.count([shown]), tables.count([demo])
    if rows != personas:
        raise UserError(f"{shown}: {rows} rows, but {demo} has {personas}; take both files from the same release")
    return Pool([shown], np.arange(rows), variant, demo)


def _held_out(files: Sequence[pathlib.Path], data: Data) -> np.ndarray:
    """Returns for each row whether it is held out. Whole prompts are, in random order, as long as they fit."""
    number_of: dict[bytes, int] = {}
    prompts = (_key(row.values["prompt"]) for row in tables.rows(files, {"prompt": str}))
    prompt_of_row = np.array([number_of.setdefault(prompt, len(number_of)) for prompt in prompts], int)
    sizes = np.bincount(prompt_of_row)
    held = np.zeros(len(sizes), bool)
    room = round(data.test_fraction * len(prompt_of_row))
    for prompt in np.random.default_rng((data.seed, _HOLD_OUT_STREAM)).permutation(len(sizes)):
        if sizes[prompt] <= room:
            held[prompt] = True
            room -= sizes[prompt]
    if not held.any() or held.all():
        raise UserError(
            f"{data.path}: {len(prompt_of_row)} rows of {len(sizes)} prompts cannot be split at data.test_fraction ="
            f" {data.test_fraction}; change it, add rows or set data.test_path"
        )
    return held[prompt_of_row]


def _prompts(pool: Pool) -> frozenset[bytes]:
    """Returns the keys of the prompts of a pool's rows."""
    wanted = set(pool.indices.tolist())
    rows = enumerate(tables.rows(pool.files, {"prompt": str}))
    return frozenset(_key(row.values["prompt"]) for index, row in rows if index in wanted)


def _identity(user: User) -> bytes:
    """Returns the key of what two rows have in common if one repeats the other. Their histories may differ."""
    return _key(*(user.row.values[field] for field in _QUERY), user.persona)


def _key(*texts: str | None) -> bytes:
    """Returns 16 bytes that stand for the folded texts, which are too long to keep for every row."""
    plain = [text and folded(text) for text in texts]
    return hashlib.blake2b(repr(plain).encode(), digest_size=16).digest()


def _text(value: str | None) -> str:
    """Returns a text as it is; "" if it is null or blank."""
    return value if value and value.strip() else ""
