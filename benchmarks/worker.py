"""Measures one case on one side, each time the driver says so.

    python -m benchmarks.worker --side=ours|trl|tunix --work=DIR --case=CASE [--peer=PEER] [--check]

The worker runs in the environment of its side. It imports the side by name, because no environment has the packages of
all sides. A side is a module of `benchmarks.sides` that defines:

    PACKAGES    the distributions whose versions to record
    CASES       how to prepare and to check each kind of case, see `cases.Cases`

A `cases.Measure` calls back after each measurement, rather than being called for each, because the trainers of TRL and
Tunix have loops of their own and a measurement must be one turn of such a loop.

The worker loads and warms up, says "ready", answers each "run" with "done", and says "end" when its input ends. Two
workers that take turns in this way are measured under the same conditions.
"""

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.cases import Job

GIVE_BACK = "BENCHMARK_GIVE_BACK"  # If set, the worker returns freed memory to the system before it waits.
TRIES = 3


def peak_bytes() -> int:
    """The most memory that this process has held, bytes."""
    # Linux keeps ru_maxrss over exec, so that a worker would start with its driver's.
    try:
        lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Returns freed memory to the system; does nothing unless malloc is glibc's."""
    if platform.libc_ver()[0] == "glibc":
        time.sleep(1)  # XLA's threads may still be freeing buffers.
        ctypes.CDLL(None).malloc_trim(0)


class Channel:
    """The worker's end of the pipes. Everything else that is printed goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, event: str, **values: Any) -> None:
        """Sends an event."""
        self._out.write(json.dumps({"event": event} | values) + "\n")
        self._out.flush()

    def wait(self, event: str, **values: Any) -> bool:
        """Sends an event and waits for the driver; returns whether it wants another measurement."""
        if os.environ.get(GIVE_BACK):
            give_back()  # Before the event, which lets the other side start.
        self.say(event, **values)
        return sys.stdin.readline().strip() == "run"


class CompileClock:
    """Counts the seconds that JAX spends compiling; they stay 0 on a side that has not imported JAX."""

    def __init__(self) -> None:
        self.seconds = 0.0
        if "jax" in sys.modules:
            sys.modules["jax"].monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs


class Turns:
    """The `cases.Turn` of one worker. The first measurement is the warm-up.

    A measurement in which JAX compiled is taken again: a drawn length may come up for the first time, and some trainers
    compile their second step anew. The last of TRIES is reported in any case, with its `compile_s`.

    Args:
        setup: what to record beside the warm-up.
        clock: runs since before the side prepared its case.
    """

    def __init__(self, channel: Channel, clock: CompileClock, setup: Mapping[str, Any]):
        self.peak_bytes = 0
        self._channel, self._clock, self._setup = channel, clock, setup
        self._warm, self._tries = False, 0
        self._start()

    def _start(self) -> None:
        self._compiled_s, self._started = self._clock.seconds, time.perf_counter()

    def __call__(self, values: Mapping[str, Any]) -> bool:
        seconds = time.perf_counter() - self._started
        if not self._warm:
            self._warm = True
            times = {"warmup_s": seconds, "compile_s": self._clock.seconds}
            wanted = self._channel.wait("ready", **self._setup, **times, first=values)
        else:
            self._tries += 1
            compile_s = self._clock.seconds - self._compiled_s
            if compile_s > 0 and self._tries < TRIES:
                self._start()
                return True
            self._tries = 0
            wanted = self._channel.wait("done", seconds=seconds, compile_s=compile_s, **values)
        self.peak_bytes = peak_bytes()  # Now, because what a side does after its last turn is not part of the case.
        self._start()
        return wanted


def write_check(job: Job, side: str, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Writes the result of a side's check where agreement.py reads it."""
    job.check_file(f"{side}.json").write_text(json.dumps(values), encoding="utf-8")
    np.savez(job.check_file(f"{side}.npz"), **arrays)  # type: ignore[arg-type]


def main() -> None:
    """Serves the driver."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--case", required=True)
    parser.add_argument("--peer", default="")
    parser.add_argument("--check", action="store_true")
    flags = parser.parse_args()
    channel = Channel()
    side = importlib.import_module(f"benchmarks.sides.{flags.side}")
    job = Job.read(flags.case, flags.peer, flags.work)
    prepare, check = side.CASES[job.kind]
    last: dict[str, Any] = {}
    if flags.check:
        write_check(job, "peer" if job.peer else "ours", *check(job))
        channel.say("ready")
    else:
        clock, started = CompileClock(), time.perf_counter()
        measure, setup = prepare(job)
        turns = Turns(channel, clock, setup | {"load_s": time.perf_counter() - started})
        last = measure(turns) | {"peak_bytes": turns.peak_bytes}
    channel.say("end", versions={name: importlib.metadata.version(name) for name in side.PACKAGES}, **last)


if __name__ == "__main__":
    main()
