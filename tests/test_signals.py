"""SIGINT and SIGTERM at any moment: one line, exit code 130 or 143, and the same results when the run goes on."""

import re
import signal
import subprocess
import sys
import time

import pytest

from tests.test_train import ENV, ROOT, command, metrics, run

PROGRAM = """
import sys, time
from popi_jax.modes import signals
signals.listen()
from popi_jax.modes import cli

def say(*words):
    print(*words, flush=True)

def wait(seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)

def load(argv):
    signals.say(lambda: "DIR is safe")
    say("ready")
    time.sleep(20)

def steps(argv):
    with signals.Deferral() as stop:
        say("ready")
        for step in range(1, 200):
            time.sleep(0.05)
            if stop.reached(step):
                say("saves", step)
                break

def evaluation(argv):
    with signals.Deferral() as stop:
        stop.reached(1)
        found = stop.breakable(lambda: [say("ready"), wait()])
        say("saves", found)

def hangs(argv):
    with signals.Deferral() as stop:
        stop.reached(1)
        say("ready")
        wait()

def writes(argv):
    say("ready")
    while True:
        print("x" * 1000)

cli.run(globals()[sys.argv.pop(1)])
"""


def start(kind, **more):
    arguments = [sys.executable, "-c", PROGRAM, kind]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(arguments, cwd=ROOT, env=ENV | {"PYTHONPATH": str(ROOT)}, **pipes, **more)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("kind", "saved"), [("load", ""), ("steps", r"saves \d+\n"), ("evaluation", "saves None\n")])
def test_a_signal_ends_the_process_with_one_line(number, code, kind, saved):
    process = start(kind)
    time.sleep(0.3)  # Some steps.
    process.send_signal(number)
    started = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert process.returncode == code and time.monotonic() - started < 10
    assert re.fullmatch(saved, out), out
    safe = "DIR is safe" if kind == "load" else "nothing was written"
    assert err == f"stopped by {number.name}: {safe}; run the same command again to resume\n"


def test_a_second_signal_ends_a_step_that_hangs():
    process = start("hangs")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and err.count("\n") == 1


def test_a_closed_pipe_ends_the_process_quietly():
    process = start("writes")
    process.stdout.close()
    assert process.wait(20) == 141 and process.stderr.read() == ""


def interrupted(arguments, number, ready):
    """Starts a command and sends the signal when `ready()`; returns its exit code and stderr."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


FLAGS = ("--config.schedule.steps=3", "--config.eval.every=2", "--config.train.checkpoint_every=9")


def test_a_signal_in_an_evaluation_or_in_the_last_step_changes_no_result(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    out = run(whole, *FLAGS)
    assert out.returncode == 0, out.stderr

    def lines():
        path = cut / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    # At once: the imports are not even done. Then in the evaluation after step 2; then after the last step.
    for number, code, ready, saved in (
        (
            signal.SIGINT,
            130,
            (lambda end=time.monotonic() + 1: time.monotonic() > end),
            "nothing was written|no checkpoint",
        ),
        (signal.SIGTERM, 143, lambda: lines() >= 2, "the checkpoint of step [23]"),
        (signal.SIGINT, 130, lambda: lines() >= 4, "the checkpoint of step 3"),
    ):
        got, err = interrupted(command(cut, *FLAGS), number, ready)
        assert got == code and re.fullmatch(rf"stopped by {number.name}: .*({saved}).*\n", err), err
    again = run(cut, *FLAGS)
    assert again.returncode == 0, again.stderr
    assert metrics(cut) == metrics(whole)
    assert (cut / "eval_records.jsonl").read_text() == (whole / "eval_records.jsonl").read_text()


@pytest.mark.slow
def test_two_runs_in_one_workdir(tmp_path):
    """The second one names the first and touches nothing; a killed one holds no lock."""
    flags = ("--config.schedule.steps=3000",)
    with subprocess.Popen(command(tmp_path, *flags), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 300
        while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").stat().st_size:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        second = run(tmp_path, *flags)
        assert second.returncode == 2 and second.stderr.count("\n") == 1, second.stderr
        assert re.search(rf"{tmp_path}: another process .*process {first.pid}, since .*another folder", second.stderr)
        first.kill()
    shorter = run(tmp_path, *flags, "--config.data.path=~nobody-here/x")
    assert shorter.returncode == 2 and "config.data.path is '~nobody-here/x'" in shorter.stderr
    with subprocess.Popen(command(tmp_path, *flags), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL) as third:
        deadline = time.monotonic() + 300
        while f"process {third.pid}," not in (tmp_path / "lock").read_text():
            assert third.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        third.kill()
