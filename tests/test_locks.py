"""A folder has one writer, and a killed writer leaves no lock."""

import re
import signal
import subprocess
import sys
import time

import pytest

from popi_jax.data import locks, parts
from popi_jax.errors import UserError
from tests.test_prepared import make, prepare

HOLDER = """
import pathlib, sys, time
from popi_jax.data import locks
with locks.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder, seconds):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), seconds], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_told_who_the_first_one_is(tmp_path):
    with holder(tmp_path / "run", "60") as first:
        said = rf"^{tmp_path / 'run'}: another process .*host \S+, process {first.pid}, since 20\S+Z\); wait .*another"
        with pytest.raises(UserError, match=said), locks.held(tmp_path / "run"):
            pytest.fail("two writers")
        first.send_signal(signal.SIGKILL)
    with locks.held(tmp_path / "run"), locks.held(tmp_path / "run" / "inner"):
        assert re.match(r"host \S+, process \d+, since \S+\n$", (tmp_path / "run" / "lock").read_text())
    with locks.held(tmp_path / "run"):  # It is free again.
        pass


KILLED = """
import os, pathlib, sys
from popi_jax.data import files
pathlib.Path.replace = lambda *_: os.kill(os.getpid(), 9)  # Before the last step of a write.
files.write_text(pathlib.Path(sys.argv[1]), "new")
"""


def test_what_a_killed_writer_had_not_finished_is_removed(tmp_path):
    kept = [tmp_path / "results.json", tmp_path / ".mine.tmp"]
    for path in kept:
        path.write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, kept[0]], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    with locks.held(tmp_path):
        assert {*tmp_path.iterdir()} == {*kept, tmp_path / "lock"}
    assert kept[0].read_text() == "old"


def test_a_waiting_writer_gets_the_lock(tmp_path):
    with holder(tmp_path, "1"):
        started = time.monotonic()
        with locks.held(tmp_path, wait=True):
            assert time.monotonic() - started > 0.3


PREPARES = """
import sys
import pathlib
from tests.test_prepared import make, prepare
sys.stdin.readline()
print(len(prepare({"train": make(50)}, pathlib.Path(sys.argv[1]))["train"]))
"""


def test_processes_that_prepare_the_same_data_share_them(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", PREPARES, str(tmp_path)], **pipes) for _ in range(3)]
    for process in started:  # They read this after their imports, and so start together.
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in started] == ["50\n"] * 3
    assert len(list(tmp_path.rglob("*.array_record*"))) == 1


def test_what_a_killed_preparation_left_is_removed(tmp_path):
    data = {"train": make(4)}
    prepare(data, tmp_path)
    (done,) = tmp_path.glob("*/fake_k/train")
    left = done.rename(done.with_name(f"{parts.UNFINISHED}ab12"))
    assert list(prepare(data, tmp_path)["train"]) == data["train"]
    assert not left.exists() and done.exists()


@pytest.mark.parametrize(
    "damage", ["truncate", "empty", "flip", "dataset_info.json", "part.json", "prepared.json", "missing"]
)
def test_damaged_prepared_data_are_prepared_again(tmp_path, caplog, damage):
    data = {"train": make(4), "test": make(2, "test")}
    prepare(data, tmp_path)
    path = next(tmp_path.rglob("*train.array_record*"))
    whole = path.read_bytes()
    if damage.endswith(".json"):
        place = path.parent / damage if (path.parent / damage).exists() else path.parents[1] / damage
        place.write_text("{" if damage != "part.json" else place.read_text().replace('"examples": 4', '"examples": 5'))
    elif damage == "missing":
        path.unlink()
    elif damage == "flip":
        place = next(i for i in range(200, len(whole)) if whole[i])  # Not in the padding.
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    else:
        path.write_bytes(whole[:100] if damage == "truncate" else b"")
    found = prepare(data, tmp_path)
    assert {split: list(source) for split, source in found.items()} == data
    assert "the prepared data are damaged" in caplog.text
