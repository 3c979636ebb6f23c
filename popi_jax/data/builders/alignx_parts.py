"""Puts the files of AlignX together: which rows are drawn, which of the examples are kept, and what was dropped.

Each file is a job of its own, see `alignx.Job`. `load` keeps all examples in memory. `prepare` has several processes
write a part for each file; parts that a killed preparation finished are not made again.
"""

import array
import collections
import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from popi_jax.config import Data
from popi_jax.data import disjoint, parts, tables, workers
from popi_jax.data.builders import alignx
from popi_jax.data.builders.alignx import TEST_FILES, Dropped, Job
from popi_jax.data.card import Counts, Tested
from popi_jax.data.counting import Made
from popi_jax.data.disjoint import Shown, Texts
from popi_jax.data.parts import Part
from popi_jax.data.schema import Example
from popi_jax.data.workers import Told
from popi_jax.errors import UserError

_TOLD = 1000  # Examples between two updates of the progress.
_SMALL = 64 * 2**20  # Bytes of files that are read faster than processes start.


@dataclasses.dataclass(frozen=True)
class Pool:
    """The rows that a split is drawn from.

    Attributes:
        files: files with the rows.
        counts: the number of rows of each.
        indices: the rows' numbers, counted through the files.
        mode: as for `alignx.Job`.
        demo: as for `alignx.Job`.
        prompts: the prompts of these rows, if they were read already.
    """

    files: Sequence[pathlib.Path]
    counts: Sequence[int]
    indices: np.ndarray
    mode: str = ""
    demo: pathlib.Path | None = None
    prompts: Texts | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a job made.

    Attributes:
        ranks: of its examples.
        resemblances: of its examples, by `alignx.resemblance`.
        dropped_ranks: the ranks of rows of which something was dropped.
        dropped_reasons: why.
        made: the examples, or the part that has them.
        counts: of the examples, for the data card, if they were made just now.
    """

    ranks: np.ndarray
    resemblances: np.ndarray
    dropped_ranks: np.ndarray
    dropped_reasons: Sequence[str]
    made: Any
    counts: Counts | None = None


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples that are kept, in the order of the draw: `record_N` of `results[result_N]`."""

    results: Sequence[Result]
    result_N: np.ndarray
    record_N: np.ndarray


Runner = Callable[[Sequence[Job]], list[Result]]


def load(data: Data, counts: collections.Counter[str]) -> dict[str, list[Example]]:
    """Reads config.data.path and config.data.test_path. Both splits are in random order, determined by data.seed.

    Test users are the rows of data.variant's file in data.test_path, or else in data.path, and show what that file
    says; their personas are in the DEMO file. Without such files, they are the rows of a test split in data.path, or
    else a share of its rows, whose prompts are then in no training row. They show what `alignx.Draws` draws in the mode
    data.variant.

    "disjoint" leaves out rows that repeat another row, entries that repeat another one of the same history, signals
    that show their own query's prompt, and training rows and training signals with the prompt of a test query or that a
    test user shows. It draws first and then leaves out, so some users show fewer signals. "published" leaves out none
    of these.

    Rows are drawn without replacement until the split has data.train_users or data.test_users examples, or until none
    is left. Only what rows up to the last one drop is counted. To draw more does not change the first examples.

    Args:
        data: config.data. It uses path, test_path, variant, protocol, on_null, test_fraction, train_users, test_users
            and seed.
        counts: updated with the number of dropped rows and signals, by reason.

    Returns:
        {"train": [...], "test": [...]}. Each example has one query, whose group is its prompt.

    Raises:
        UserError: a bad file or setting; as `alignx.examples`; or an empty split.
    """

    def run(jobs: Sequence[Job]) -> list[Result]:
        return [_collected(job) for job in jobs]

    splits = _splits(data, counts, run, lambda split: Shown(_examples(split)), processes=1)
    return {name: _examples(splits[name]) for name in ("train", "test")}


def prepare(data: Data, folder: pathlib.Path, counts: collections.Counter[str]) -> tuple[dict[str, Made], Tested]:
    """Does what `load` does, in several processes, and writes the examples into parts in this folder.

    Returns:
        The examples of each split, and what the data card looks for in training.
    """
    parts.remove_unfinished(folder)
    tested = Tested(())

    def run(jobs: Sequence[Job]) -> list[Result]:
        return _written(jobs, folder, tested)

    def shown(test: Split) -> Shown:
        found = Shown()
        for number, result in enumerate(test.results):
            for example in result.made.read(np.sort(test.record_N[test.result_N == number])):
                found.add(example)
                tested.add(example)
        return found

    found = {}
    for name, split in _splits(data, counts, run, shown).items():
        own = [result.made for result in split.results]
        starts = np.cumsum([0, *(part.examples for part in own)])
        found[name] = Made(own, starts[split.result_N] + split.record_N, [result.counts for result in split.results])
    used = {part.folder for made in found.values() for part in made.parts}
    for left in set(folder.iterdir()) - used:  # Of draws that were too small.
        if left.is_dir():
            shutil.rmtree(left)
    return {name: found[name] for name in ("train", "test")}, tested


def _splits(
    data: Data,
    counts: collections.Counter[str],
    run: Runner,
    shown: Callable[[Split], Shown],
    processes: int | None = None,
) -> dict[str, Split]:
    """Makes both splits. `shown` returns what test users show and answer."""
    if not data.path:
        raise UserError("config: data.path is empty, but data.dataset = 'alignx' reads files; set its path")
    pools = _pools(data, processes)
    test = _split("test", data, pools["test"], Texts(), Shown(), counts, run)
    prompts, own = Texts(), shown(test)
    if data.protocol == "disjoint":
        prompts = pools["test"].prompts or _prompts_of(pools["test"])
    else:
        own = Shown()
    return {"train": _split("train", data, pools["train"], prompts, own, counts, run), "test": test}


def _split(
    split: str,
    data: Data,
    pool: Pool,
    prompts: Texts,
    shown: Shown,
    counts: collections.Counter[str],
    run: Runner,
) -> Split:
    """Draws rows until the split has data.train_users or data.test_users examples; 0: all.

    It draws a quarter more at first, and reads the files again only if many rows are dropped.
    """
    wanted = data.train_users if split == "train" else data.test_users
    stream = {"train": alignx.TRAIN_STREAM, "test": alignx.TEST_STREAM}[split]
    order = np.random.default_rng((data.seed, stream)).permutation(pool.indices)
    wanted = wanted or len(order)
    stop = wanted + wanted // 4 + 100
    while True:
        results = run(list(_jobs(split, data, pool, order[:stop], prompts, shown)))
        result_N = np.repeat(np.arange(len(results)), [len(result.ranks) for result in results])
        record_N = np.concatenate([np.arange(len(result.ranks)) for result in results] or [np.zeros(0, int)])
        ranks_N = np.concatenate([result.ranks for result in results] or [np.zeros(0, int)])
        kept = np.argsort(ranks_N)
        if data.protocol == "disjoint":
            identities_N = _identities(results, result_N, record_N)
            kept = kept[np.sort(np.unique(identities_N[kept], return_index=True)[1])]  # The first of equal ones.
        if len(kept) >= wanted or stop >= len(order):
            break
        stop *= 2
    kept = kept[:wanted]
    last = ranks_N[kept[-1]] if len(kept) == wanted > 0 else len(order)
    for result in results:
        reasons = zip(result.dropped_ranks.tolist(), result.dropped_reasons, strict=True)
        counts.update(collections.Counter(reason for rank, reason in reasons if rank <= last))
    if repeats := np.count_nonzero(ranks_N <= last) - len(kept):
        counts[f"{split} rows that repeat another row"] += int(repeats)
    if not len(kept):
        why = [f"{number} {reason}" for reason, number in counts.items() if reason.startswith(split)]
        raise UserError(
            f"{pool.files[0]}: no {split} row can be used ({', '.join(why) or 'there are none'}); add other rows"
        )
    return Split(results, result_N[kept], record_N[kept])


def _jobs(split: str, data: Data, pool: Pool, drawn: np.ndarray, prompts: Texts, shown: Shown) -> Any:
    """Yields a job for each file that has rows drawn."""
    starts = np.cumsum([0, *pool.counts])
    file_of_row = np.searchsorted(starts, drawn, side="right") - 1
    for number, file in enumerate(pool.files):
        ranks = np.flatnonzero(file_of_row == number)
        if len(ranks):
            rows = drawn[ranks] - starts[number]
            yield Job(
                split,
                file,
                number,
                rows,
                ranks,
                data.seed,
                data.protocol == "disjoint",
                data.on_null,
                pool.mode,
                pool.demo,
                prompts,
                shown,
            )


def _identities(results: Sequence[Result], result_N: np.ndarray, record_N: np.ndarray) -> np.ndarray:
    """Returns numbers that are the same for rows that repeat one another. Only rows that resemble one are read."""
    own_N = np.concatenate([result.resemblances for result in results] or [np.zeros(0, np.uint64)])
    _, place, count = np.unique(own_N, return_inverse=True, return_counts=True)
    alike_N = count[place] > 1
    identities_N = np.arange(len(own_N), dtype=np.uint64)  # Keys of 64 bits are as good as never among them.
    for number, result in enumerate(results):
        chosen = np.flatnonzero(alike_N & (result_N == number))
        examples = _of_result(result, record_N[chosen])
        identities_N[chosen] = np.array([alignx.identity(example) for example in examples], np.uint64)
    return identities_N


def _of_result(result: Result, records: np.ndarray) -> Iterable[Example]:
    """Reads the examples at these places."""
    if isinstance(result.made, Part):
        return result.made.read(records)
    return [result.made[record] for record in records.tolist()]


def _collected(job: Job) -> Result:
    """Keeps the examples of a job in memory."""
    dropped = Dropped()
    found = list(alignx.examples(job, dropped))
    return Result(
        np.array([rank for rank, _ in found], int),
        np.array([alignx.resemblance(example) for _, example in found], np.uint64),
        np.array(dropped.ranks, int),
        dropped.reasons,
        [example for _, example in found],
    )


def _examples(split: Split) -> list[Example]:
    pairs = zip(split.result_N.tolist(), split.record_N.tolist(), strict=True)
    return [split.results[result].made[record] for result, record in pairs]


def _written(jobs: Sequence[Job], folder: pathlib.Path, tested: Tested) -> list[Result]:
    """Writes the parts of the jobs, except for those that are there already."""
    places = [folder / f"{job.split}-{job.number:05d}-{_digest(job)}" for job in jobs]
    found = [Part.find(place) for place in places]
    found = [None if part is None or part.damage() else part for part in found]
    left = [(job, place, tested) for job, place, part in zip(jobs, places, found, strict=True) if part is None]
    done = sum(len(job.rows_N) for job, part in zip(jobs, found, strict=True) if part is not None)
    total = sum(len(job.rows_N) for job in jobs)
    name = f"preparing {jobs[0].split}" if jobs else ""
    made = iter(workers.run(_write, left, name, total, done, _processes(jobs)))
    return [_result(*next(made)) if part is None else _result(part) for part in found]


def _write(job_and_place: tuple[Job, pathlib.Path, Tested], told: Told) -> tuple[Part, Counts]:
    """Writes the part of one job, and counts its examples, because to read them again takes as long."""
    job, folder, tested = job_and_place
    dropped, ranks, resemblances = Dropped(), array.array("q"), array.array("Q")
    counts = Counts(tested if job.split == "train" else None)
    with parts.Writer(folder, job.split) as writer:
        for rank, example in alignx.examples(job, dropped):
            writer.add(example)
            counts.add(example)
            ranks.append(rank)
            resemblances.append(alignx.resemblance(example))
            if len(ranks) % _TOLD == 0:
                told(_TOLD)
        told(len(job.rows_N) - len(ranks) // _TOLD * _TOLD)
        names = sorted(set(dropped.reasons))
        number_of = {name: number for number, name in enumerate(names)}
        part = writer.finish(
            {"reasons": names},
            ranks=np.array(ranks, np.int64),
            resemblances=np.array(resemblances, np.uint64),
            dropped_ranks=np.array(dropped.ranks, np.int64),
            dropped_reasons=np.array([number_of[reason] for reason in dropped.reasons], np.int64),
        )
        return part, counts


def _result(part: Part, counts: Counts | None = None) -> Result:
    arrays = part.keys()
    names = part.notes["reasons"]
    reasons = [names[i] for i in arrays.pop("dropped_reasons").tolist()]
    return Result(**arrays, dropped_reasons=reasons, made=part, counts=counts)


def _digest(job: Job) -> str:
    """Returns what tells a job from others on the same file with the same settings."""
    digest = hashlib.sha256(f"{job.mode}|{job.demo}|{job.disjoint}".encode())
    for numbers in (job.rows_N, job.ranks_N, sorted(job.prompts.keys), sorted(job.shown.keys)):
        digest.update(np.asarray(numbers, np.uint64).tobytes())
    return digest.hexdigest()[:16]


def _processes(jobs: Sequence[Job]) -> int | None:
    """Returns how many processes to use: one for small files, else None."""
    return 1 if sum(job.file.stat().st_size for job in jobs) < _SMALL else None


def _pools(data: Data, processes: int | None) -> dict[str, Pool]:
    """Returns the rows to train and to test on."""
    names = tuple(TEST_FILES.values())
    # The test files' names state no split, which would be refused if those of the files beside them do.
    splits = tables.splits(data.path, without=names)
    files = splits.get("train", [])
    if not files:
        raise UserError(f"{data.path}: no training files; set data.path to a folder with those of AlignX")
    source, flag = (data.test_path, "data.test_path") if data.test_path else (data.path, "data.path")
    named = tables.named(source, names, flag)
    tables.check([*files, *splits.get("test", [])], alignx.columns("", False))
    if named or data.test_path:
        return {"train": _all(files), "test": _variant(named, source, data.variant)}
    if splits.get("test"):
        return {"train": _all(files), "test": _all(splits["test"], data.variant)}
    if data.protocol == "published":
        raise UserError(f"{data.path}: has no test files; set data.test_path or use data.protocol = 'disjoint'")
    return _held_out(files, data, processes)


def _counts(files: Sequence[pathlib.Path]) -> list[int]:
    return [tables.count([file]) for file in files]


def _all(files: Sequence[pathlib.Path], mode: str = "") -> Pool:
    counts = _counts(files)
    return Pool(files, counts, np.arange(sum(counts)), mode)


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
    return Pool([shown], [rows], np.arange(rows), variant, demo)


def _held_out(files: Sequence[pathlib.Path], data: Data, processes: int | None) -> dict[str, Pool]:
    """Returns the pools of rows of which some are held out. Whole prompts are, in random order, as long as they fit."""
    counts = _counts(files)
    keys_N, beginnings_N = _read_prompts(files, counts, processes)
    _, first, prompt_of_row = np.unique(keys_N, return_index=True, return_inverse=True)
    prompt_of_row = np.argsort(np.argsort(first))[prompt_of_row]  # Numbered in the order of the rows.
    sizes = np.bincount(prompt_of_row)
    held = np.zeros(len(sizes), bool)
    room = round(data.test_fraction * len(prompt_of_row))
    for prompt in np.random.default_rng((data.seed, alignx.HOLD_OUT_STREAM)).permutation(len(sizes)):
        if sizes[prompt] <= room:
            held[prompt] = True
            room -= sizes[prompt]
    if not held.any() or held.all():
        raise UserError(
            f"{data.path}: {len(prompt_of_row)} rows of {len(sizes)} prompts cannot be split at data.test_fraction ="
            f" {data.test_fraction}; change it, add rows or set data.test_path"
        )
    held_N = held[prompt_of_row]
    prompts = Texts(keys_N[held_N].tolist(), beginnings_N[held_N].tolist())
    return {
        "train": Pool(files, counts, np.flatnonzero(~held_N)),
        "test": Pool(files, counts, np.flatnonzero(held_N), data.variant, prompts=prompts),
    }


def _prompts_of(own: Pool) -> Texts:
    """Returns the prompts of a pool's rows."""
    keys_N, beginnings_N = _read_prompts(own.files, own.counts, 1)
    return Texts(keys_N[own.indices].tolist(), beginnings_N[own.indices].tolist())


def _read_prompts(
    files: Sequence[pathlib.Path], counts: Sequence[int], processes: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the key and the beginning of the prompt of each row of the files, see `disjoint.Texts`."""
    if sum(file.stat().st_size for file in files) < _SMALL:
        processes = 1
    found = workers.run(_prompts, files, "reading prompts", sum(counts), processes=processes)
    numbers_Nx2 = np.concatenate(found)
    return numbers_Nx2[:, 0], numbers_Nx2[:, 1]


def _prompts(file: pathlib.Path, told: Told) -> np.ndarray:
    found: list[tuple[int, int]] = []
    for block in tables.blocks(file, {"prompt": str}, alignx.BLOCK):
        prompts = [row.values["prompt"] or "" for row in block.take(np.arange(block.count))]
        found += [(disjoint.key(prompt), disjoint.beginning(prompt)) for prompt in prompts]
        told(block.count)
    return np.array(found, np.uint64).reshape(-1, 2)
