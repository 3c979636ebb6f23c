"""AlignX in parts: the same examples as in memory, whatever was killed, damaged or prepared before."""

import collections
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from popi_jax.config import Data, parse
from popi_jax.configs import alignx as alignx_config
from popi_jax.configs import base
from popi_jax.data import card, counting, parts, prepared, progress, specs, tables, workers
from popi_jax.data.builders import alignx, alignx_parts
from popi_jax.errors import UserError
from popi_jax.modes import prepare
from tests.test_alignx import Rows, random_rows, row, write_parquet, write_tests

ROOT = pathlib.Path(__file__).parent.parent


def shards(folder: pathlib.Path, rows: Rows, count: int = 4) -> pathlib.Path:
    """Writes the rows in several files, beside test files."""
    for i in range(count):
        write_parquet(folder / f"train-{i:05}-of-{count:05}.parquet", rows[i::count])
    return write_tests(folder, [row("a"), row("b", 5, 5), row("a")])


def settings(folder: pathlib.Path, **changes: object) -> Data:
    config = base.get_config()
    config.data.update({"dataset": "alignx", "path": str(folder), "on_null": "drop", **changes})
    return parse(config).data


def files_of(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("protocol", ["disjoint", "published"])
@pytest.mark.parametrize("train_users", [0, 1, 40])
def test_parts_hold_what_is_loaded_in_memory(tmp_path, monkeypatch, protocol, train_users):
    monkeypatch.setattr(alignx, "BLOCK", 16)
    rows = random_rows(0, 120) + [row(f"z{i % 9}", demo="d", chosen="" if i % 5 == 0 else "y") for i in range(80)]
    data = settings(shards(tmp_path / "source", rows), protocol=protocol, train_users=train_users)
    counts: collections.Counter[str] = collections.Counter()
    loaded = alignx_parts.load(data, counts)
    found = prepared.find(data, tmp_path / "run")
    assert {split: list(part) for split, part in found.examples.items()} == loaded
    assert found.dropped == counts
    assert (protocol == "disjoint" and train_users != 1) == bool(counts["train rows that repeat another row"])
    expected = card.make(data, loaded, counts, None)
    for made in (found.card, expected):
        for part in made["splits"].values():  # Of equally long texts, any one may be named.
            part["longest"] = {field: longest["words"] for field, longest in part["longest"].items()}
    assert found.card == expected
    # The place of each example is its place in the draw, so that a run's order depends on the seed alone.
    assert found.examples["train"][0] == loaded["train"][0] and found.examples["train"][:1] == loaded["train"][:1]
    fewer = settings(tmp_path / "source", protocol=protocol, train_users=train_users, seed=1)
    assert prepared.find(fewer, tmp_path / "run").examples["train"][:3] != loaded["train"][:3]


def test_what_is_left_out_of_the_counts_of_a_part_is_counted_by_hand(tmp_path):
    """Even if it was the longest text, the only one of a kind, or the only one that the test split has, too."""
    loaded = alignx_parts.load(settings(shards(tmp_path, random_rows(3, 200))), collections.Counter())["train"]
    examples = [dataclasses.replace(example, persona="w " * (i % 97)) for i, example in enumerate(loaded)]
    for seed in range(8):
        rng = np.random.default_rng(seed)
        test = card.Tested(examples[i] for i in rng.integers(0, len(examples), 9))
        with parts.Writer(tmp_path / f"part{seed}", "train") as writer:
            counts = card.Counts(test)
            for example in examples:
                writer.add(example)
                counts.add(example)
            part = writer.finish()
        kept = np.flatnonzero(rng.random(len(examples)) < rng.choice([0.02, 0.5, 0.98, 1.0]))
        brute = card.Counts(test)
        brute.count(examples[i] for i in kept)
        for known in (counts, None):
            found = counting.count("train", counting.Made([part], kept, [known]), test)
            summaries = [own.summary() for own in (found, brute)]
            for summary in summaries:
                summary["longest"] = {name: longest["words"] for name, longest in summary["longest"].items()}
            assert summaries[0] == summaries[1] and test.shared(found.met) == test.shared(brute.met)


def test_a_killed_preparation_goes_on_with_the_parts_that_are_missing(tmp_path, monkeypatch):
    data = settings(shards(tmp_path / "source", random_rows(0, 80)))
    whole = prepared.find(data, tmp_path / "whole")
    write, written = alignx_parts._write, []

    def killed(job, told):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job[0].number)
        return write(job, told)

    with monkeypatch.context() as patch:
        patch.setattr(alignx_parts, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared.find(data, tmp_path / "killed")
    before = files_of(tmp_path / "killed")
    left = next((tmp_path / "killed/data").glob("*/*")) / f"{parts.UNFINISHED}x"
    left.mkdir()
    monkeypatch.setattr(alignx_parts, "_write", lambda job, told: written.append(job[0].number) or write(job, told))
    found = prepared.find(data, tmp_path / "killed")
    assert written == [0, 0, 1, 2, 3]  # The test file, and each of the training files once.
    assert before.items() <= files_of(tmp_path / "killed").items() and not left.exists()
    for split, part in found.examples.items():
        assert part.fingerprint == whole.examples[split].fingerprint and list(part) == list(whole.examples[split])
    assert (found.card, found.dropped) == (whole.card, whole.dropped)
    prepared.find(data, tmp_path / "killed")
    assert len(written) == 5


@pytest.mark.parametrize("name", ["*.array_record*", "part.json", "keys.npz", "dataset_info.json"])
def test_a_damaged_part_alone_is_made_again(tmp_path, caplog, name):
    data = settings(shards(tmp_path / "source", random_rows(0, 80)))
    first = {split: list(part) for split, part in prepared.find(data, tmp_path).examples.items()}
    before = files_of(tmp_path / "data")
    damaged = sorted((tmp_path / "data").rglob(f"train-*/{name}"))[1]
    raw = damaged.read_bytes()
    damaged.write_bytes(raw[:90] + bytes([raw[90] ^ 1]) + raw[91:])
    found = prepared.find(data, tmp_path)
    assert "the prepared data are damaged" in caplog.text
    assert {split: list(part) for split, part in found.examples.items()} == first
    changed = {path.parent.name for path, time in files_of(tmp_path / "data").items() if before.get(path) != time}
    assert changed == {damaged.parent.name, found.folder.name}


def test_a_changed_file_is_prepared_anew(tmp_path):
    data = settings(shards(tmp_path / "source", random_rows(0, 80)))
    first = prepared.find(data, tmp_path)
    before = files_of(tmp_path / "data")
    assert prepared.find(data, tmp_path).folder == first.folder and files_of(tmp_path / "data") == before
    (tmp_path / "source/README.md").write_text("---\nlicense: mit\n---\n")
    assert (first.card["licence"], prepared.find(data, tmp_path).card["licence"]) == (None, "mit")
    write_parquet(tmp_path / "source/train-00002-of-00004.parquet", random_rows(9, 20))
    other = prepared.find(data, tmp_path)
    assert other.folder != first.folder
    assert other.examples["train"].fingerprint != first.examples["train"].fingerprint


def test_more_rows_are_drawn_if_too_few_are_left_and_no_part_of_the_first_draw_stays(tmp_path):
    rows = [row(str(i), chosen="" if i % 9 else "y") for i in range(900)]
    data = settings(shards(tmp_path / "source", rows), train_users=60)
    found = prepared.find(data, tmp_path)
    assert (
        len(found.examples["train"]) == 60
        and list(found.examples["train"]) == alignx_parts.load(data, collections.Counter())["train"]
    )
    assert len(list(found.folder.glob("train-*"))) == 4


def test_several_processes_make_the_same_parts(tmp_path, monkeypatch, capfd):
    data = settings(shards(tmp_path / "source", random_rows(0, 80)))
    here = prepared.find(data, tmp_path / "here")
    monkeypatch.setattr(alignx_parts, "_SMALL", 0)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    there = prepared.find(data, tmp_path / "there")
    assert not multiprocessing.active_children()
    for split, part in there.examples.items():
        assert part.fingerprint == here.examples[split].fingerprint
    assert there.card == here.card
    broken = random_rows(0, 40)
    for number in (2, 3):
        write_parquet(tmp_path / f"source/train-0000{number}-of-00004.parquet", [*broken, row("x", chosen=None)])
    with pytest.raises(UserError, match=r"train-00002-of-00004.parquet: row 40: field 'chosen' is null"):
        prepared.find(data.model_copy(update={"on_null": "error"}), tmp_path / "there")


def _killed(job: int, told: workers.Told) -> None:
    if job == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # As the kernel does when memory is full.


def test_a_process_that_is_killed_is_a_mistake_in_one_line(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 2)
    with pytest.raises(UserError, match=r"^reading: a process was killed, perhaps because the memory was full"):
        workers.run(_killed, [0, 1, 2], "reading", 3)


def test_the_progress_says_rows_rate_and_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = io.StringIO()
    with progress.Progress("preparing", 1000, Console(file=shown, width=200)) as bar:
        for seconds, rows in ((0.0, 100), (0.9, 200), (20.0, 500), (25.0, 600), (40.0, 1000)):
            now[0] = seconds
            bar.update(rows)
    assert shown.getvalue().splitlines() == [
        "preparing: 500/1,000 rows  20 rows/s  25 s left",
        "preparing: 1,000/1,000 rows  22 rows/s  0 s left",
    ]
    terminal = io.StringIO()
    with progress.Progress("preparing", 1000, Console(file=terminal, width=200, force_terminal=True)) as bar:
        for seconds, rows in ((40.0, 0), (50.0, 500)):
            now[0] = seconds
            bar.update(rows)
    assert "500/1,000 rows  50 rows/s  10 s left" in terminal.getvalue()


def main(workdir: pathlib.Path, folder: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "popi_jax.main", "--mode=prepare", "--config=configs/alignx.py:smoke"]
    sources = (f"--config.data.path={folder}", f"--config.data.test_path={folder}")
    counts = ("--config.data.train_users=0", "--config.data.test_users=0")
    return subprocess.run(
        [*command, *sources, *counts, f"--workdir={workdir}", *flags], cwd=ROOT, capture_output=True, text=True
    )


def test_the_mode_prepares_what_a_run_reads(tmp_path, monkeypatch):
    folder = shards(tmp_path / "source", [row(str(i), i % 6, i % 5) for i in range(40)])
    done = main(tmp_path / "run", folder)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "run/data_card.json").read_text())
    assert made["splits"]["train"]["users"] == 40 and made["dataset"] == "alignx"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data", "data_card.json"]
    before = files_of(tmp_path / "run/data")
    monkeypatch.setitem(prepared.PREPARERS, "alignx", lambda *_: pytest.fail("prepared again"))
    config = alignx_config.get_config("smoke")
    config.data.update({"path": str(folder), "test_path": str(folder), "train_users": 0, "test_users": 0})
    prepare.prepare(parse(config), tmp_path / "run")
    assert files_of(tmp_path / "run/data") == before


def test_a_bad_row_in_the_third_file_leaves_nothing(tmp_path):
    folder = shards(tmp_path / "source", [row(str(i)) for i in range(40)])
    write_parquet(folder / "train-00002-of-00004.parquet", [row("x"), row("y", prompt=None)])
    done = main(tmp_path / "some/run", folder, "--config.data.on_null=error")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder}/train-00002-of-00004.parquet: row 1: field 'prompt' is null")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "some").exists()


FINDS = """
import sys, pathlib
from popi_jax.data import prepared
from tests.test_prepare import settings
sys.stdin.readline()
found = prepared.find(settings(pathlib.Path(sys.argv[1])), sys.argv[2])
print(found.examples["train"].fingerprint)
"""


def test_processes_that_need_the_same_data_share_them(tmp_path):
    folder = shards(tmp_path / "source", random_rows(0, 80))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", FINDS, str(folder), str(tmp_path / "run")]
    started = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = {process.communicate()[0].splitlines()[-1] for process in started}
    assert len(said) == 1 and all(process.returncode == 0 for process in started)
    assert len(list((tmp_path / "run").rglob("*.array_record*"))) == 5


def test_a_row_that_is_not_text_is_told_with_its_place(tmp_path, monkeypatch):
    """Values of a file whose types are exact are not looked at one by one, except for what they may still be."""
    columns = functools.partial(tables.blocks, columns=alignx.columns("", False), size=8)
    folder = shards(tmp_path, [row(str(i)) for i in range(20)])
    (block,) = columns(folder / "train-00001-of-00004.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(specs, "checked", lambda *_: pytest.fail("a value was looked at"))
        taken = block.take(np.array([3, 0]))
    assert [found.source for found in taken] == [f"train-00001-of-00004.parquet#{i}" for i in (3, 0)]
    assert [found.values["prompt"] for found in taken] == ["13 post", "1 post"]
    assert set(taken[0].values[alignx.COMMENTS][0]) == {"prompt", "comment"}  # Not the direction, of 90 numbers.
    other = tmp_path / "rows.jsonl"
    other.write_text(json.dumps(row("a")) + "\n" + json.dumps(row("b") | {"prompt": 7}) + "\n")
    (block,) = columns(other)
    assert block.take(np.array([0]))[0].values["prompt"] == "a post"
    with pytest.raises(UserError, match=r"rows.jsonl:2: column 'prompt': expected a string, found 7"):
        block.take(np.array([1]))
