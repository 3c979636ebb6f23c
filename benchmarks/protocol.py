"""How the driver and a worker talk: JSON lines over pipes. Standard library only: the peers' environment has no JAX.

A worker loads, warms up and says "ready"; for each "run" it takes one measurement and says "done"; at the end of its
input it says "end" with its peak memory. Two workers that take turns are measured under the same conditions.
"""

import ctypes
import dataclasses
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Measure = Callable[[], dict[str, Any]]
# Set where both sides fit a machine only if each, once measured, gives the memory that it has freed back to the system.
GIVE_BACK = "BENCHMARK_GIVE_BACK"


class WorkerError(Exception):
    """A worker ended before its time; the message is the last line that it left in its log."""


def peak_bytes() -> int:
    """The most memory that this process has held, bytes."""
    # Not ru_maxrss first: Linux keeps it over exec, so that a worker would inherit its driver's.
    try:
        lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Gives back what malloc keeps for later; with another C library than glibc nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class Channel:
    """A worker's end. What a library prints goes to stderr, so that it cannot break the protocol."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def _make_room(self) -> None:
        if os.environ.get(GIVE_BACK):
            time.sleep(1)  # Threads of XLA's may still be freeing buffers of what has been measured.
            give_back()

    def _say(self, event: str, values: dict[str, Any]) -> None:
        self._out.write(json.dumps({"event": event} | values) + "\n")
        self._out.flush()

    def ready(self, **values: Any) -> None:
        """Loaded and warmed up; `values` say what that took."""
        self._make_room()
        self._say("ready", values)

    def wait(self) -> bool:
        """Waits for the driver; False when it wants no more measurements."""
        return sys.stdin.readline().strip() == "run"

    def done(self, seconds: float, **values: Any) -> None:
        """One measurement."""
        self._make_room()
        self._say("done", {"seconds": seconds} | values)

    def serve(self, started: float, measure: Measure, warm_up: Measure | None = None, warm_ups: int = 1) -> None:
        """Warms up, by `measure` itself unless told otherwise, and measures as often as the driver wants.

        Args:
            started: when the worker began to load, by time.perf_counter.
            measure: one measurement; returns what to say of it.
            warm_up, warm_ups: what to do before, and how often.
        """
        load_s = time.perf_counter() - started
        began = time.perf_counter()
        first = [(warm_up or measure)() for _ in range(warm_ups)]
        self.ready(load_s=load_s, warmup_s=time.perf_counter() - began, first=first[0])
        while self.wait():
            began = time.perf_counter()
            values = measure()
            self.done(time.perf_counter() - began, **values)

    def end(self, **values: Any) -> None:
        """The last word."""
        self._say("end", {"peak_bytes": peak_bytes()} | values)


@dataclasses.dataclass
class Worker:
    """The driver's end.

    Attributes:
        command: of the worker.
        log: the file that gets all that it prints.
        environment: variables to set beside the driver's own; an empty one takes the driver's away.
    """

    command: Sequence[str]
    log: pathlib.Path
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def start(self) -> None:
        """Starts the process; `read` then gives its "ready"."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={name: value for name, value in (os.environ | self.environment).items() if value},
            )

    def read(self) -> dict[str, Any]:
        """The next event; WorkerError where the worker has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise WorkerError(f"exit code {code}: {last_line(self.log)}")
        return json.loads(line)

    def run(self) -> dict[str, Any]:
        """One measurement."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `read` says why.
        return self.read()

    def finish(self) -> dict[str, Any]:
        """Ends the worker and gives its last word."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        last = self.read()
        self._process.wait()
        return last

    def stop(self) -> None:
        """Ends the process, whatever it does; nothing where it has ended, or was not started."""
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def last_line(path: pathlib.Path) -> str:
    """The last line of a log that is not empty, at most 200 characters."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"
