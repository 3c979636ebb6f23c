"""Measures how AlignX-like data of many rows are prepared: speed, memory, and what a kill costs.

    python -m benchmarks.prepare [--rows=1000000] [--shards=20] [--output=FILE.json]

It generates the rows in parquet files, and then
- times a bare loop over them, `for batch in pq.ParquetFile(file).iter_batches(): batch.to_pylist()`,
- times `--mode=prepare`, and sums the peaks of resident memory of its processes,
- kills a preparation into another folder with SIGKILL when half of the parts are there, and resumes it,
- compares what both folders hold.

The bare loop decodes each row to Python objects and does nothing else, in one process. The ratio of the two speeds says
what the rest costs: hashing the files, checks, draws, leaks, writing, counting for the data card, and Python's imports.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import machine
from popi_jax.data.builders.alignx import COMMENTS, DEMOGRAPHICS, PAIRS, TEST_FILES

ROOT = pathlib.Path(__file__).parents[1]
TESTED = 1000  # Test users.
REPEATED, NULLS = 0.01, 0.002  # Shares of rows that repeat an earlier one, and of texts that are null.
_POLL = 0.1  # Seconds between two looks at memory.


class Texts:
    """Draws texts like those of AlignX from pools of made-up ones."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        lengths = self._rng.integers(2, 10, 20_000)
        self._words = ["".join(map(chr, self._rng.integers(97, 123, length))) for length in lengths]
        self._pools = {
            name: pa.array([self._text(least, most) for _ in range(number)])
            for name, number, least, most in (
                ("post", 20_000, 20, 60),
                ("response", 20_000, 30, 90),
                ("person", 5_000, 20, 80),
                ("entry", 20_000, 15, 40),
            )
        }

    def _text(self, least: int, most: int) -> str:
        return " ".join(
            self._words[i] for i in self._rng.integers(0, len(self._words), self._rng.integers(least, most))
        )

    def draw(self, pool: str, count: int, nulls: float = 0.0) -> pa.Array:
        """Draws texts, some of them null."""
        places = self._rng.integers(0, len(self._pools[pool]), count)
        return self._pools[pool].take(pa.array(places, mask=self._rng.random(count) < nulls))

    def history(self, count: int, names: Sequence[str]) -> pa.Array:
        """Draws up to five entries for each row."""
        starts = np.concatenate([[0], np.cumsum(self._rng.integers(0, 6, count))])
        entries = [self.draw("entry", int(starts[-1]), NULLS) for _ in names]
        return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.StructArray.from_arrays(entries, list(names)))

    def table(self, first: int, count: int, nulls: float = NULLS) -> pa.Table:
        """Draws rows whose prompts end with their numbers, except for those that repeat another row."""
        numbers = pa.array([f"{first + i:09d}" for i in range(count)])
        table = pa.table(
            {
                "prompt": pc.binary_join_element_wise(self.draw("post", count), numbers, " "),
                "chosen": self.draw("response", count, nulls),
                "rejected": self.draw("response", count),
                DEMOGRAPHICS: self.draw("person", count, nulls),
                COMMENTS: self.history(count, ("prompt", "comment")),
                PAIRS: self.history(count, ("prompt", "chosen", "rejected")),
            }
        )
        places = np.arange(count)
        repeats = self._rng.random(count) < (REPEATED if nulls else 0)
        places[repeats] = self._rng.integers(0, count, np.count_nonzero(repeats))
        return table.take(pa.array(places))


def generate(folder: pathlib.Path, rows: int, shards: int) -> int:
    """Writes the training files and the test files; returns the bytes of the former."""
    texts = Texts(0)
    (folder / "train").mkdir(parents=True)
    (folder / "test").mkdir()
    for shard in range(shards):
        start, stop = rows * shard // shards, rows * (shard + 1) // shards
        path = folder / "train" / f"train-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(
            texts.table(start, stop - start), path, compression="none", use_dictionary=False, row_group_size=10_000
        )
    tests = json.dumps(texts.table(rows, TESTED, nulls=0.0).to_pylist())
    for name in TEST_FILES.values():
        (folder / "test" / name).write_text(tests, encoding="utf-8")
    return sum(path.stat().st_size for path in (folder / "train").iterdir())


def _cpu() -> float:
    """Returns the CPU seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bare_loop(folder: pathlib.Path) -> dict[str, float]:
    """Decodes the training rows in a process of its own; returns its seconds, and its CPU seconds with the start."""
    loop = (
        "import pathlib, sys, time, pyarrow.parquet as pq\n"
        "start = time.perf_counter()\n"
        "for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    for batch in pq.ParquetFile(file).iter_batches():\n"
        "        for row in batch.to_pylist():\n"
        "            pass\n"
        "print(time.perf_counter() - start)\n"
    )
    command = [sys.executable, "-c", loop, str(folder / "train")]
    before = _cpu()
    seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"seconds": seconds, "cpu_seconds": _cpu() - before}


def prepare(folder: pathlib.Path, workdir: pathlib.Path, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Runs --mode=prepare, and kills it when `stop` says so; returns times, peak memory in GiB and exit code."""
    command = [
        *(sys.executable, "-m", "popi_jax.main", "--mode=prepare", "--config=configs/alignx.py"),
        *(f"--config.data.path={folder / 'train'}", f"--config.data.test_path={folder / 'test'}"),
        *("--config.data.train_users=0", "--config.data.test_users=0", "--config.data.on_null=drop"),
        "--config.data.protocol=disjoint",
        f"--workdir={workdir}",
    ]
    start, before = time.perf_counter(), _cpu()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    most = 0
    while process.poll() is None:
        for pid in _family(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), _resident(pid, "VmHWM"))
        most = max(most, sum(_resident(pid, "VmRSS") for pid in _family(process.pid)))
        if stop():
            process.send_signal(signal.SIGKILL)
        time.sleep(_POLL)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": _cpu() - before,
        "processes": len(peaks),
        # Of all processes at one time; and the sum of each one's own peak, which is never less.
        "resident_gib": most / 2**20,
        "sum_of_peaks_gib": sum(peaks.values()) / 2**20,
        "exit_code": process.returncode,
    }


def _family(pid: int) -> list[int]:
    """Returns a process and all that it started."""
    try:
        tasks = list(pathlib.Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # It has ended.
        return [pid]
    return [pid, *(own for child in children for own in _family(child))]


def _resident(pid: int, field: str) -> int:
    """Returns a field of a process's memory in KiB; 0 if it has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def parts(workdir: pathlib.Path) -> dict[str, int]:
    """Returns when each finished part of the training split was written, by name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("data/*/*/train-*/part.json")}


def content(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns what identifies the prepared data: parts and their hashes, the index and the counts."""
    (done,) = workdir.glob("data/*/*/prepared.json")
    described = json.loads(done.read_text())
    names = [name for split in described["splits"].values() for name in split]
    hashes = {name: json.loads((done.parent / name / "part.json").read_text())["content"] for name in names}
    return {"parts": hashes, "index": described["index"], "card": described["card"]}


def measure(folder: pathlib.Path, rows: int, shards: int) -> dict[str, Any]:
    """Returns the record."""
    start = time.perf_counter()
    size = generate(folder / "source", rows, shards)
    print(f"generated {size / 2**30:.2f} GiB in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    bare = [bare_loop(folder / "source")]
    whole = prepare(folder / "source", folder / "whole")
    bare.append(bare_loop(folder / "source"))
    killed = prepare(folder / "source", folder / "killed", lambda: len(parts(folder / "killed")) >= shards // 2)
    kept = parts(folder / "killed")
    resumed = prepare(folder / "source", folder / "killed")
    again = prepare(folder / "source", folder / "killed")
    both = content(folder / "whole"), content(folder / "killed")
    seconds = sum(loop["seconds"] for loop in bare) / len(bare)
    return {
        "schema": 1,
        "rows": rows,
        "files": shards,
        "source_gib": size / 2**30,
        "bare_loops": bare,
        "bare_rows_per_s": rows / seconds,
        "prepare": whole | {"rows_per_s": rows / whole["seconds"], "examples": _examples(both[0])},
        "ratio": seconds / whole["seconds"],
        "cores": machine.cores(),
        "killed": killed | {"parts": len(kept)},
        "resumed": resumed | {"parts_kept": len(kept.items() & parts(folder / "killed").items())},
        "prepared_already": again,
        "same_content": both[0] == both[1],
        "dropped": both[0]["card"]["dropped"],
    }


def _examples(found: dict[str, Any]) -> dict[str, int]:
    return {split: own["users"] for split, own in found["card"]["splits"].items()}


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="prepare-"))
    try:
        record = measure(folder, options.rows, options.shards)
    finally:
        shutil.rmtree(folder)
    described = machine.describe([])
    described["command"] = f"python -m benchmarks.prepare --rows={options.rows} --shards={options.shards}"
    text = json.dumps(record | {"machine": described}, indent=2) + "\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
