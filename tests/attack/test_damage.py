"""Two thousand damages to checkpoints and to the files beside them. None is loaded as if it were whole."""

import collections
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from popi_jax import checkpoint
from popi_jax.config import parse
from popi_jax.configs import recorded
from popi_jax.data import prepared
from popi_jax.errors import UserError
from popi_jax.evaluation import evaluate, stored
from popi_jax.modes import runfiles, setup
from popi_jax.training import metrics
from tests.attack.runs import COMMANDS

pytestmark = pytest.mark.attack

CHECKPOINT_DAMAGES = 1200
FILE_DAMAGES = 800


def damage(path: pathlib.Path, rng: random.Random) -> str:
    """Changes a file in one of the ways in which disks, copies and crashes do; says how."""
    data = bytearray(path.read_bytes())
    how = rng.choice(["bit", "sign bits", "zeros", "cut", "emptied", "gone", "longer", "doubled", "swapped"])
    place = rng.randrange(len(data)) if data else 0
    if how == "bit" and data:
        data[place] ^= 1 << rng.randrange(8)
    elif how == "sign bits":  # An even number of them, which a plain sum of the bits would not see.
        for _ in range(2):
            if data:
                data[rng.randrange(len(data))] ^= 0x80
    elif how == "zeros":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif how == "cut":
        del data[place:]
    elif how == "emptied":
        data.clear()
    elif how == "longer":
        data += bytes(rng.randrange(256) for _ in range(16))
    elif how == "doubled":
        data[place:place] = data[place : place + 64]
    elif how == "swapped" and len(data) > 128:
        a, b = sorted(rng.sample(range(len(data) - 32), 2))
        data[a : a + 32], data[b : b + 32] = data[b : b + 32], data[a : a + 32]
    path.unlink() if how == "gone" else path.write_bytes(bytes(data))
    return f"{path.name}: {how} at {place}"


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def same(a: object, b: object) -> bool:
    leaves = [jax.tree.leaves(jax.tree.map(np.asarray, tree)) for tree in (a, b)]
    return len(leaves[0]) == len(leaves[1]) and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(*leaves, strict=True)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, loaded, and the state and record of each of its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    COMMANDS["joint"].finish(folder)
    workdir = folder / "run"
    run = setup.load(parse(recorded.get_config(str(workdir / "config.json"))))
    truth = {step: run.restore(workdir, step) for step in checkpoint.steps(workdir / "checkpoints")}
    assert len(truth) > 1  # There is one before the newest to fall back to.
    return workdir, run, truth


@pytest.fixture(scope="module")
def used(whole):
    """Reads every file beside the checkpoints as the next start of a run or a table does; returns what it uses."""
    _, run, truth = whole
    inputs, meta = run.inputs(prepared.load_examples(run.config.data)), truth[max(truth)][1]

    def read(workdir: pathlib.Path) -> dict[str, object]:
        sources = prepared.from_config(run.config.data, workdir)
        references = run.references(workdir / "cache")
        with metrics.MetricWriter(workdir, max(truth), 0.0, meta["metrics"]):
            pass
        row = runfiles.finished_row(workdir, run.config, inputs)
        return {
            "data": {split: list(source) for split, source in sources.items()},
            "references": {key: value.tobytes() for key, value in references._known.items()},
            "metrics": (workdir / metrics.METRICS_FILE).read_bytes(),
            "row": row,
            "records": row and evaluate.read_records(workdir / "eval_records.jsonl"),
            "samples": row and stored.samples(workdir),
        }

    return read


def test_no_damaged_checkpoint_is_loaded(whole, tmp_path, caplog):
    workdir, run, truth = whole
    rng, passed, refused = random.Random(0), 0, 0
    for _ in range(CHECKPOINT_DAMAGES):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(workdir / "checkpoints", tmp_path / "run" / "checkpoints")
        how = damage(rng.choice(files_of(tmp_path / "run")), rng)
        caplog.clear()
        try:
            restored = run.restore(tmp_path / "run")
        except UserError as error:
            assert "\n" not in str(error), how
            refused += 1
            continue
        assert restored is not None, how
        state, meta = restored
        step = int(state.step)
        assert same(state, truth[step][0]) and meta == truth[step][1], how
        if step != max(truth):
            assert "damaged" in caplog.text, how
            passed += 1
    assert passed > CHECKPOINT_DAMAGES / 10, (passed, refused)  # Most damages are seen, and the one before is used.


def test_no_damaged_file_beside_the_checkpoints_is_used(whole, used, tmp_path, caplog, capsys):
    workdir, rng, outcomes = whole[0], random.Random(1), collections.Counter()
    expected = used(workdir)
    assert all(expected.values())
    for _ in range(FILE_DAMAGES):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "*.png"))
        how = damage(rng.choice(files_of(tmp_path / "run")), rng)
        caplog.clear()
        capsys.readouterr()
        try:
            found = used(tmp_path / "run")
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), how
            outcomes["refused"] += 1
            continue
        changed = [name for name, value in found.items() if value != expected[name]]
        outcomes["as before"] += not changed  # The file is only shown, or was made again from its source.
        outcomes["made again"] += bool(changed)
        # What may differ is gone, with a line that says so; it is never another value.
        assert not any(found[name] for name in changed), (how, changed)
        # A file that is gone looks like one that was never written: by a stopped run, or in a cache.
        assert not changed or caplog.text or capsys.readouterr().out or ": gone at" in how, how
    assert min(outcomes.values()) > FILE_DAMAGES / 50 and len(outcomes) == 3, outcomes
