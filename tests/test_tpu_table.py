"""The table of TPU slices: what the documentation and its folder show is what the files of results hold."""

import json
import pathlib

import pytest

from experiments import tpu_table
from popi_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "tpu"


@pytest.fixture(scope="module")
def reports():
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    assert sorted(report["case"] for report in found) == sorted(tpu_table.CASES)
    return sorted(found, key=lambda report: tpu_table.CASES.index(report["case"]))


def joint(reports, case):
    (report,) = (report for report in reports if report["case"] == case)
    (row,) = (row for row in report["steps"] if row["name"] == "joint_step")
    return row


def test_documentation_shows_what_was_compiled(reports):
    assert tpu_table.short(reports) in (ROOT / "docs" / "howto" / "tpu-slice.md").read_text(encoding="utf-8")
    assert tpu_table.markdown(reports) in (RESULTS / "README.md").read_text(encoding="utf-8")


def test_documentation_names_the_smallest_slices(reports):
    for case, fits in {
        "llama3_3b:lora@v5e:2x2": True,
        "llama3_3b:full@v5e:2x4": False,
        "llama3_3b:full@v5e:4x4": True,
        "llama3_8b:lora@v5e:2x2": False,
        "llama3_8b:lora@v5e:2x4": True,
        "llama3_8b:full@v5e:4x8": False,
        "llama3_8b:full@v5e:8x8": True,
        "llama3_8b:full@v5p:2x2x1": True,
    }.items():
        assert joint(reports, case)["fits"] == fits, case


def test_more_chips_cost_no_more(reports):
    cases = ("llama3_3b:full@v5e:4x4", "llama3_3b:full@v5e:8x8@16", "llama3_3b:full@v5e:16x16@16")
    bounds = [joint(reports, case)["bound_s"] for case in cases]
    assert max(bounds) < 1.01 * min(bounds)


@pytest.mark.parametrize("case", ["llama3_3b", "llama3_3b:full@v5e:4x4@x", "none:full@v5e:4x4", "llama3_3b:x@v5e:4x4"])
def test_what_is_no_case_is_one_line(case, tmp_path):
    with pytest.raises(UserError, match=f"--cases: {case!r}"):
        tpu_table.run_case(case, tmp_path)
