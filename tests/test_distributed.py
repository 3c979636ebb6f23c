"""Two processes on loopback against one process with as many devices: the same run."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent


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
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
        "--config.schedule.steps=2",
        *flags,
    ]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes):
    for process in processes:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finish(start(tmp_path / "one", 4))
    finish(*(start(tmp_path / "two", 2, f"--distributed=127.0.0.1:{port},2,{i}") for i in range(2)))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [1, 2]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {name for name in a if name.endswith("_s")} - {"sampler_gap", "sampler_gap_max"}:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-5, err_msg=name)
    accuracy = [
        json.loads((tmp_path / run / "results.json").read_text())["rows"][0]["accuracy"] for run in ("one", "two")
    ]
    assert accuracy[0] == accuracy[1]
