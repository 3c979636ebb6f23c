"""Every benchmark's `smoke`: the same command and table as at full scale, on the fixtures and the tiny model."""

import collections
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

from popi_jax.config import parse
from popi_jax.configs import elix
from popi_jax.data import prepared
from popi_jax.data.encoding import Encoder
from popi_jax.model import hub
from popi_jax.model.tokenizer import Tokenizer
from popi_jax.rollout import limits

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
    assert not any("published_accuracy" in row for row in rows)  # Other data and another model than the paper's.
    card = json.loads((table / f"{methods[0]}_seed0" / "data_card.json").read_text())
    assert card["dataset"] == name and card["splits"]["train"]["users"] == 16


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_full_config_reads_the_same_files(name):
    """The whole input pipeline at the published lengths, except for the model's own tokenizer."""
    full, small = (importlib.import_module(f"popi_jax.configs.{name}").get_config(arg) for arg in ("", "smoke"))
    full.data.path, full.data.test_path = small.data.path, small.data.test_path
    full.data.train_users = 0 if name != "traits" else 20
    full.data.test_users = 0 if name != "traits" else 10
    settings = parse(full)
    encoder = Encoder(Tokenizer.load(hub.resolve("stylebook")), settings.prompts, settings.limits)
    dropped = collections.Counter()
    examples = prepared.load_examples(settings.data, dropped)
    for split, part in examples.items():
        kept = limits.usable(encoder, split, part, dropped)
        assert len(kept) >= len(part) - 1 > 7, (split, dropped)
        assert all(encoder.raw_signals(example).raw_signals for example in kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS[1:])
def test_every_method(name, folder):
    command = [sys.executable, "experiments/results_table.py", f"--config=configs/{name}.py:smoke"]
    ran = subprocess.run([*command, f"--workdir={folder / name}"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = json.loads((folder / name / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(elix.METHODS)
