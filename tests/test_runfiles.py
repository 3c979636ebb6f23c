"""config.json and environment.json of a workdir, and which configs may use the workdir."""

import json
import math

import pytest

from configs import quickstart
from popi_jax.config import changed, parse
from popi_jax.data import files
from popi_jax.errors import UserError
from popi_jax.evaluation import final
from popi_jax.modes import runfiles


def config(**values):
    return changed(parse(quickstart.get_config("runlocal")), {key.replace("__", "."): v for key, v in values.items()})


def finished(workdir, c):
    runfiles.claim(workdir, c)
    final.write_results(workdir, c, [{"method": "popi", "accuracy": 0.5}])


def test_finished_run_has_the_same_config(tmp_path):
    assert runfiles.finished_row(tmp_path, config()) is None
    finished(tmp_path, config())
    assert runfiles.finished_row(tmp_path, config())["accuracy"] == 0.5
    assert runfiles.finished_row(tmp_path, config(mesh__fsdp=2, train__checkpoint_every=7)) is not None
    assert runfiles.finished_row(tmp_path, config(model__remat="full")) is not None
    assert runfiles.finished_row(tmp_path, config(eval__temperature=0.1)) is None
    assert runfiles.finished_row(tmp_path, config(optim__lr_generator=1.0)) is None


def test_workdir_has_one_config(tmp_path):
    finished(tmp_path, config())
    with pytest.raises(UserError, match=r"another config: config.optim.lr_generator \(0.00025 there, 1.0 now\)"):
        runfiles.claim(tmp_path, config(optim__lr_generator=1.0))
    runfiles.claim(tmp_path, config(mesh__fsdp=2))
    assert (tmp_path / "results.json").exists()
    # If the run is killed before it evaluates again, it must not count as finished with the new eval settings.
    runfiles.claim(tmp_path, config(eval__temperature=0.1))
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    "key", ["method", "schedule__name", "lora__alpha", "objective__beta", "prompts__summary_start"]
)
def test_trained_run_needs_the_config_of_its_training(tmp_path, key):
    runfiles.claim(tmp_path, config())
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
    runfiles.describe(tmp_path, config())
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        quickstart.get_config("runlocal").to_json_best_effort()
    )
    assert json.loads((tmp_path / "environment.json").read_text())["devices"]["count"] >= 1
