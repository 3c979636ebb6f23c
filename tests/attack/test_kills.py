"""kill -9 at random moments, a hundred times: the same command then leaves what one without kills leaves."""

import os
import pathlib
import random
import signal
import subprocess
import time

import pytest

from tests.attack.runs import COMMANDS, contents

pytestmark = pytest.mark.attack

KILLS = {
    "joint": 20,
    "alternate": 12,
    "two_phase": 12,
    "checkpoint": 16,  # Joint, killed while a checkpoint is being written.
    "evaluate": 8,
    "table": 12,
    "summarize": 8,
    "generate": 4,
    "export": 8,
}


def wait_for(process: subprocess.Popen, seconds: float, writes: pathlib.Path | None) -> None:
    """Waits for this time, or until a checkpoint under `writes` has been in the writing for a random moment."""
    deadline = time.monotonic() + (300 if writes else seconds)
    while process.poll() is None and time.monotonic() < deadline:
        if writes and any(not path.name.isdigit() for path in writes.glob("run/checkpoints/*")):
            time.sleep(seconds / 1000)
            return
        time.sleep(0.001)


def kill(process: subprocess.Popen) -> bool:
    """Kills a command; returns whether it was still running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate(timeout=60)
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_command_resumes_bitwise(name, finished, tmp_path):
    command = COMMANDS["joint" if name == "checkpoint" else name]
    rng = random.Random(name)
    (tmp_path / "whole").mkdir()
    command.finish(tmp_path / "whole", finished)
    expected = contents(tmp_path / "whole")
    started = time.monotonic()
    (tmp_path / "timed").mkdir()
    command.finish(tmp_path / "timed", finished)
    assert contents(tmp_path / "timed") == expected  # Twice the same, before anything is killed.
    seconds = time.monotonic() - started
    left, round_ = KILLS[name], 0
    while left:
        out = tmp_path / f"round{round_}"
        out.mkdir()
        for _ in range(4):  # Up to four kills on one folder, as on a preemptible machine.
            process = command.start(out, finished)
            wait_for(process, rng.uniform(0.1, 1.1) * seconds, out if name == "checkpoint" else None)
            if not kill(process) or not (left := left - 1):
                break
        command.finish(out, finished)
        assert contents(out) == expected, f"{name}, round {round_}"
        round_ += 1
