"""Two processes on loopback equal one process with the same number of devices, and each can resume the other's run."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from popi_jax import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 3


def start(workdir, devices, *flags):
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "NPROC": "16",
        "JAX_PLATFORMS": "cpu",
    }
    command = [
        sys.executable,
        "-m",
        "popi_jax.main",
        f"--config={ROOT}/configs/quickstart.py:runlocal",
        f"--workdir={workdir}",
        f"--config.schedule.steps={STEPS}",
        "--config.train.checkpoint_every=1",
        f"--config.train.checkpoints_kept={STEPS}",
        "--config.data.test_users=4",
        "--config.eval.samples=0",
        *flags,
    ]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes(count, workdir, devices, *flags):
    """Starts `count` processes with `devices` in total."""
    if count == 1:
        return [start(workdir, devices, *flags)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [start(workdir, devices // count, f"--distributed={address},{count},{i}", *flags) for i in range(count)]


def finish(started, code=0):
    for process in started:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == code, out


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def accuracy(workdir):
    return json.loads((workdir / "results.json").read_text())["rows"][0]["accuracy"]


def assert_same_run(got, want):
    lines = list(zip(metrics(got), metrics(want), strict=True))
    for a, b in lines:
        assert a.keys() == b.keys()
        for name in b.keys() - {name for name in b if name.endswith("_s")} - {"sampler_gap", "sampler_gap_max"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} of step {b['step']}")
    assert accuracy(got) == accuracy(want)


def stopped(workdir, step, copy):
    """Copies the workdir as a kill right after the checkpoint of `step` would have left it."""
    shutil.copytree(workdir, copy)
    for later in checkpoint.steps(copy / "checkpoints"):
        if later > step:
            shutil.rmtree(copy / "checkpoints" / str(later))
    for name in ("results.json", "report.html", "eval_records.jsonl"):
        (copy / name).unlink()


FOUR = (4, "--config.mesh.data=2", "--config.mesh.fsdp=2")
EIGHT = (8, "--config.mesh.data=2", "--config.mesh.fsdp=4")


@pytest.mark.parametrize(
    ("devices", "flags"), [(FOUR[0], FOUR[1:]), pytest.param(EIGHT[0], EIGHT[1:], marks=pytest.mark.slow)]
)
def test_two_processes_equal_one_and_resume_its_run(devices, flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(processes(1, one, devices, *flags))
    finish(processes(2, two, devices, *flags))
    assert [line["step"] for line in metrics(two)] == list(range(1, STEPS + 1))
    assert_same_run(two, one)
    for count, left in ((2, one), (1, two)):
        again = tmp_path / f"{count}_again"
        stopped(left, STEPS - 1, again)
        finish(processes(count, again, devices, *flags))
        assert checkpoint.steps(again / "checkpoints") == list(range(1, STEPS + 1))
        # The other run wrote the earlier steps. This one took the last step and evaluated.
        assert metrics(again)[:-1] == metrics(left)[:-1] and metrics(again)[-1] != metrics(left)[-1]
        assert_same_run(again, one)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_and_one_process_resumes(tmp_path):
    devices, *flags = FOUR
    long = "--config.schedule.steps=40"
    one, two = tmp_path / "one", tmp_path / "two"
    finish(processes(1, one, devices, *flags, long))
    started = processes(2, two, devices, *flags, long)
    deadline = time.monotonic() + 300
    while not (two / "metrics.jsonl").exists() or len(metrics(two)) < 3:
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.01)
    started[1].send_signal(signal.SIGTERM)
    finish(started, code=143)
    step = max(checkpoint.steps(two / "checkpoints"))
    assert 3 <= step < 40 and metrics(two)[-1]["step"] == step
    finish(processes(1, two, devices, *flags, long))
    assert_same_run(two, one)
