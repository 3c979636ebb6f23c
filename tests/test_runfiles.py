"""config.json and environment.json of a workdir, and which configs may use the workdir."""

import json
import math
import pathlib

import pytest

from popi_jax.config import changed, parse
from popi_jax.configs import quickstart, recorded
from popi_jax.data import files
from popi_jax.errors import UserError
from popi_jax.evaluation import final
from popi_jax.modes import runfiles


def config(**values):
    return changed(parse(quickstart.get_config("runlocal")), {key.replace("__", "."): v for key, v in values.items()})


INPUTS = {"model": "m", "test": "t"}


def finished(workdir, c):
    runfiles.claim(workdir, c, INPUTS)
    files.write_jsonl(workdir / "eval_records.jsonl", [{"h": 0.25}])
    files.write_npz(workdir / "decomposition.npz", x=[1.0])
    rows = [{"method": "popi", "seed": 0, "accuracy": 0.5, "loss": math.nan}]
    final.write_results(workdir, c, rows, final.checksum(workdir, rows))


def test_finished_run_has_the_same_config(tmp_path, capsys):
    assert runfiles.finished_row(tmp_path, config(), INPUTS) is None
    finished(tmp_path, config())
    assert runfiles.finished_row(tmp_path, config(), INPUTS)["accuracy"] == 0.5
    assert runfiles.finished_row(tmp_path, config(mesh__fsdp=2, train__checkpoint_every=7), INPUTS) is not None
    assert runfiles.finished_row(tmp_path, config(model__remat="full"), INPUTS) is not None
    capsys.readouterr()
    assert runfiles.finished_row(tmp_path, config(eval__temperature=0.1), INPUTS) is None
    assert (
        "of another config: config.eval.temperature (0.6 there, 0.1 now); running it again" in capsys.readouterr().out
    )
    assert runfiles.finished_row(tmp_path, config(optim__lr_generator=1.0), INPUTS) is None


def test_workdir_has_one_config(tmp_path):
    finished(tmp_path, config())
    with pytest.raises(UserError, match=r"another config: config.optim.lr_generator \(0.00025 there, 1.0 now\)"):
        runfiles.claim(tmp_path, config(optim__lr_generator=1.0), INPUTS)
    runfiles.claim(tmp_path, config(mesh__fsdp=2), INPUTS)
    assert (tmp_path / "results.json").exists()
    # If the run is killed before it evaluates again, it must not count as finished with the new eval settings.
    runfiles.claim(tmp_path, config(eval__temperature=0.1), INPUTS)
    assert not (tmp_path / "results.json").exists()


def test_a_finished_run_has_the_same_inputs(tmp_path, capsys):
    finished(tmp_path, config())
    other = INPUTS | {"test": "others"}
    assert runfiles.finished_row(tmp_path, config(), other) is None
    assert capsys.readouterr().out.strip().endswith("its inputs changed (test); running it again")
    runfiles.claim(tmp_path, config(), other)  # If this start is killed, the old row must not count as of the new data.
    assert not (tmp_path / "results.json").exists()
    finished(tmp_path, config())
    environment = json.loads((tmp_path / "environment.json").read_text())
    del environment["inputs"]  # An earlier version wrote none.
    files.write_json(tmp_path / "environment.json", environment)
    assert runfiles.finished_row(tmp_path, config(), other)["accuracy"] == 0.5
    assert "taken unchecked" in capsys.readouterr().out
    files.write_json(tmp_path / "results.json", {"rows": []})
    with pytest.raises(UserError, match=r"results.json: damaged, or written by another version .*; remove the file"):
        runfiles.finished_row(tmp_path, config(), INPUTS)


@pytest.mark.parametrize("name", ["results.json", "eval_records.jsonl", "decomposition.npz"])
def test_a_row_whose_files_changed_is_run_again(tmp_path, capsys, name):
    finished(tmp_path, config())
    assert runfiles.finished_row(tmp_path, config(), INPUTS)["accuracy"] == 0.5
    assert capsys.readouterr().out == ""
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data.replace(b"0.5", b"0.7").replace(b"0.25", b"0.27").replace(b"\xf0?", b"\xf1?"))
    assert (tmp_path / name).read_bytes() != data
    assert runfiles.finished_row(tmp_path, config(), INPUTS) is None
    assert "results.json or a file that it sums up changed; running it again" in capsys.readouterr().out
    if name != "results.json":
        (tmp_path / name).unlink()
        assert runfiles.finished_row(tmp_path, config(), INPUTS) is None
    final.write_results(tmp_path, config(), [{"method": "popi", "accuracy": 0.5}])  # As an earlier version wrote it.
    assert runfiles.finished_row(tmp_path, config(), INPUTS)["accuracy"] == 0.5
    assert "no checksum; its row is taken unchecked" in capsys.readouterr().out


@pytest.mark.parametrize("kept", ["results.json", "metrics.jsonl", "checkpoints/3/x"])
def test_a_workdir_is_claimed_by_the_first_thing_worth_keeping(tmp_path, kept):
    runfiles.claim(tmp_path, config(), INPUTS)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    corrected = config(optim__lr_generator=1.0)
    runfiles.claim(tmp_path, corrected, INPUTS)
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr_generator"] == 1.0
    (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / kept).write_text("{}")
    with pytest.raises(UserError, match="another config"):
        runfiles.claim(tmp_path, config(), INPUTS)


def test_a_checkpoint_knows_its_config(tmp_path):
    trained = config().model_dump(mode="json")
    runfiles.check_trained("run", trained, config(eval__temperature=0.1, mesh__fsdp=2))
    with pytest.raises(UserError, match=r"run: its checkpoint was trained with another config: config.seed \(0 there"):
        runfiles.check_trained("run", trained, config(seed=1))


@pytest.mark.parametrize(
    "key", ["method", "schedule__name", "lora__alpha", "objective__beta", "prompts__summary_start"]
)
def test_trained_run_needs_the_config_of_its_training(tmp_path, key):
    runfiles.claim(tmp_path, config(), INPUTS)
    runfiles.check_use(tmp_path, config(data__seed=1, limits__prompt=300, model__compute_dtype="bfloat16"))
    other = {"method": "oracle", "name": "alternate", "alpha": 2.0, "beta": 0.5, "summary_start": "She"}
    c = config(**{key: other[key.split("__")[-1]]})
    with pytest.raises(UserError, match="was trained with another config: config." + key.replace("__", ".")):
        runfiles.check_use(tmp_path, c)


def test_only_newlines_separate_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "one\u2028two\u0085three\x0bfour"}, {"text": "\r\n"}]
    files.write_jsonl(path, rows)
    assert files.read_jsonl(path) == rows
    files.write_jsonl(path, [])
    assert files.read_jsonl(path) == [] == files.read_jsonl(tmp_path / "none.jsonl")


def test_values_that_are_not_finite_become_null(tmp_path):
    final.write_results(tmp_path, config(), [{"accuracy": 0.5, "accuracy_ci95": [math.nan, math.inf], "n": 3}])
    (row,) = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert row == {"accuracy": 0.5, "accuracy_ci95": [None, None], "n": 3}
    files.write_jsonl(tmp_path / "rows.jsonl", [{"h": -math.inf}])
    assert (tmp_path / "rows.jsonl").read_text() == '{"h": null}\n'


@pytest.mark.parametrize(
    ("text", "shown"),
    [('{"a": 1}\n{"a"', ":2: not JSON"), ('{"a": 1}\n3\n', ":2: expected an object in braces, found a number")],
)
def test_error_names_a_bad_line(tmp_path, text, shown):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        files.read_jsonl(path)
    assert f"{path}{shown}" in str(error.value)


def test_config_json_has_the_whole_config(tmp_path):
    runfiles.describe(tmp_path, config(), INPUTS)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        quickstart.get_config("runlocal").to_json_best_effort()
    )
    assert json.loads((tmp_path / "environment.json").read_text())["devices"]["count"] >= 1


def test_a_run_of_an_older_version_is_still_finished(capsys):
    """Its config.json lacks the keys that came later, and has one under its older name."""
    folder = pathlib.Path(__file__).parents[1] / "experiments/results/psoups_smollm2/runs/base_seed0"
    assert "signals" in files.read_json(folder / "config.json")["data"]
    config = parse(recorded.get_config(str(folder / "config.json")))
    assert runfiles.finished_row(folder, config, {})["method"] == "base"
    assert "another config" not in capsys.readouterr().out
