"""Every benchmark's `smoke`: the same command and table as at full scale, on the fixtures and the tiny model."""

import json
import pathlib
import subprocess
import sys

import pytest

from configs import elix

ROOT = pathlib.Path(__file__).parent.parent
BENCHMARKS = ("elix", "review", "roleplay", "alignx", "prefeval", "traits")
# Every method once. This one draws summaries, trains on them and scores the raw signals, and it compiles fast.
METHODS = {"elix": elix.METHODS}
FEWER = ("zero_shot_summary",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_smoke(name, folder):
    methods = METHODS.get(name, FEWER)
    table = folder / name
    command = [sys.executable, "experiments/results_table.py", f"--config=configs/{name}.py:smoke"]
    ran = subprocess.run(
        [*command, f"--workdir={table}", f"--methods={','.join(methods)}"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = json.loads((table / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(methods)
    assert all(row["n"] >= 8 for row in rows)
    signals = {row["raw_signal_tokens_mean"] for row in rows}
    assert len(signals) == 1 and signals.pop() > 50
    card = json.loads((table / f"{methods[0]}_seed0" / "data_card.json").read_text())
    assert card["dataset"] == name and card["splits"]["train"]["users"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS[1:])
def test_every_method(name, folder):
    command = [sys.executable, "experiments/results_table.py", f"--config=configs/{name}.py:smoke"]
    ran = subprocess.run([*command, f"--workdir={folder / name}"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = json.loads((folder / name / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(elix.METHODS)
