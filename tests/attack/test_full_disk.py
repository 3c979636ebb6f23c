"""A disk that fills up at every kind of write: one line, exit 2, nothing lost, and the same command then finishes."""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

from tests.attack.runs import COMMANDS, contents

pytestmark = [
    pytest.mark.attack,
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a small file system"),
]

# KiB. The finished folders take 6 to 20 MiB, exports 1 MiB, and texts a few KiB.
SIZES = {
    "joint": (64, 512, 1500, 3000, 5000, 7000),
    "table": (256, 2000, 4500),
    "evaluate": (4, 16, 48),
    "summarize": (4, 8),
    "generate": (4, 8),
    "export": (64, 400, 1000),
}


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kib: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("name", SIZES)
def test_a_full_disk_is_one_line_and_the_command_resumes(name, finished, tmp_path):
    command, failed = COMMANDS[name], 0
    (tmp_path / "whole").mkdir()
    command.finish(tmp_path / "whole", finished)
    expected = contents(tmp_path / "whole")
    for kib in SIZES[name]:
        out = tmp_path / f"disk{kib}"
        with small_disk(out, kib):
            process = command.start(out, finished)
            shown = process.communicate(timeout=900)[1]
            failed += process.returncode != 0
            if process.returncode:
                assert process.returncode == 2 and "Traceback" not in shown, f"{kib} KiB: {shown}"
                last = shown.splitlines()[-1]
                assert "disk is full" in last or "No space left" in last, f"{kib} KiB: {shown}"
            subprocess.run(["mount", "-o", "remount,size=200m", str(out)], check=True)
            command.finish(out, finished)
            assert contents(out) == expected, f"{kib} KiB"
    assert failed, "no disk was too small"
