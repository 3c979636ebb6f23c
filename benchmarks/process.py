"""A worker process, as the driver sees it: JSON lines over pipes; worker.py has the other end."""

import dataclasses
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

# By default glibc returns each large buffer to the system when it is freed, and the next one arrives page by page, each
# page cleared on first touch. With these settings malloc keeps freed memory, in one arena that all threads share. They
# are variables rather than calls to mallopt because they must be in force before a library starts its threads.
MALLOC = {"GLIBC_TUNABLES": f"glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**64 - 1}"}
if platform.libc_ver()[0] != "glibc":
    MALLOC = {}


class WorkerError(Exception):
    """A worker ended too early; the message is the last line of its log."""


@dataclasses.dataclass
class Worker:
    """One worker.

    Attributes:
        command: what to run.
        log: the file for everything that it prints.
        environment: variables to set; an empty value removes the driver's.
    """

    command: Sequence[str]
    log: pathlib.Path
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def start(self) -> None:
        """Starts the process, whose first event is "ready"."""
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
        """The next event. Raises WorkerError if the worker has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise WorkerError(f"exit code {code}: {last_line(self.log)}")
        return json.loads(line)

    def run(self) -> dict[str, Any]:
        """Takes one measurement."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `read` reports the cause.
        return self.read()

    def finish(self) -> dict[str, Any]:
        """Ends the worker and returns its last event."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        last = self.read()
        self._process.wait()
        return last

    def stop(self) -> None:
        """Kills the process if it is running."""
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def last_line(path: pathlib.Path) -> str:
    """The last line of a log that isn't empty, cut to 200 characters."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"
