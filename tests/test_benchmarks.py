"""The benchmark: statistics by hand, its smallest form without peers, and with them that all sides agree."""

import ast
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import agreement, cases, machine, process, rows, run, summary, worker

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PEERS = ROOT / ".venv-peers"
TUNIX = ROOT / ".venv-tunix"


def run_bench(folder: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.run", "--smallest", f"--output={folder / 'out'}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


def turn(seconds: float, **values) -> dict:
    return {"event": "done", "seconds": seconds, **values}


def test_a_side_s_rates_by_hand():
    ready = {"event": "ready", "warmup_s": 9.0}
    one = summary.side(ready, [turn(2.0), turn(4.0), turn(1.0)], {"peak_bytes": 2**30}, items=4)
    assert one["rates"] == [2.0, 1.0, 4.0]
    assert one["rate_spread"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    assert one["seconds_spread"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    assert one["before"] == {"warmup_s": 9.0}
    # Each measurement of sampling counts its own tokens.
    drawn = summary.side(ready, [turn(2.0, items=10), turn(1.0, items=8)], {"peak_bytes": 1}, items=0)
    assert drawn["rates"] == [5.0, 8.0]


def test_a_ratio_is_of_turns_side_by_side():
    ours = {"rates": [4.0, 2.0, 9.0], "peak_bytes": 1}
    theirs = {"rates": [2.0, 2.0, 3.0], "peak_bytes": 4}
    assert summary.compare(ours, theirs) == {"speed": {"median": 2.0, "low": 1.0, "high": 3.0}, "memory": 0.25}


def test_shares_of_the_roofline_by_hand():
    peak = summary.best_roofline([turn(1, flops=90.0, copy_bytes=10.0), turn(1, flops=100.0, copy_bytes=8.0)])
    assert peak == {"flops": 100.0, "copy_bytes": 10.0}
    step = {"before": {"flops": 120.0, "filled": 0.5}, "seconds_spread": {"median": 2.0}}
    assert summary.roofline_fractions(step, peak) == {"step": 0.6, "step on tokens": 0.3}
    # Of 7 seconds, the prefill takes 2 and each of five steps takes 1.
    before = {"prefill_flops": 100.0, "prefill_s": 2.0, "decode_flops": 20.0, "decode_bytes": 5.0, "filled": 0.8}
    sampled = {"before": before, "seconds_spread": {"median": 7.0}, "turns": [turn(7.0, decode_steps=5)]}
    assert summary.roofline_fractions(sampled, peak) == {
        "prefill": 0.5,
        "prefill on tokens": 0.4,
        "decode, copy rate": 0.5,
        "decode, products": 0.2,
    }


def test_the_table_by_hand():
    ours = summary.side({"compile_s": 3.0}, [turn(1.0)], {"peak_bytes": 2**30}, 4)
    theirs = summary.side({}, [turn(2.0)], {"peak_bytes": 2**31}, 4)
    row = {"case": "dpo_signals", "peer": "trl", "unit": "pairs", "roofline": {"step": 0.6}, "ours": ours}
    alone = row | {"note": "skipped: .venv-peers is missing"}
    compared = row | {"theirs": theirs, "agreement": {"agrees": False}} | summary.compare(ours, theirs)
    assert summary.cells(compared) == (
        "dpo_signals", "trl", "4 pairs/s", "2 pairs/s", "2.00 [2.00, 2.00]", "1.00", "2.00", "0.50", "3.0", "step 60%",
        "NO",
    )  # fmt: skip
    assert summary.cells(alone)[3] == "skipped: .venv-peers is missing"
    assert len(summary.cells(alone)) == len(summary.HEADERS) == len(summary.cells(compared))
    failed = {"case": "sampling", "peer": "transformers", "note": "failed: exit code 1: no memory"}
    assert len(summary.cells(failed)) == len(summary.HEADERS)


def test_scaling_is_shown_against_the_size_before():
    def row(case: str, seconds: float, flops: float) -> dict:
        known = {"signal_tokens": 64.0, "k": 4, "compile_s": 1.0, "update_flops": flops}
        return {"case": case, "ours": summary.side(known, [turn(seconds)], {"peak_bytes": 0}, 1)}

    failed = {"case": "scaling_k:4", "note": "failed: exit code 1: no memory"}
    table = summary.scaling_cells(
        [
            row("scaling_signals:256", 2.0, 8e9),
            row("scaling_signals:512", 3.0, 10e9),
            row("scaling_k:2", 1, 1e9),
            failed,
        ]
    )
    assert [line[5] for line in table] == ["", "1.50", "", ""]
    assert [line[6] for line in table] == ["", "1.25", "", ""]
    assert {len(line) for line in table} == {len(summary.SCALING_HEADERS)}


def test_sizes_that_are_left_out_are_told():
    runs, left_out = cases.expand(["sampling", "scaling_signals", "scaling_k"], cases.SMALLEST, 128)
    assert runs == ["sampling", "scaling_signals:128", "scaling_k:2", "scaling_k:4"]
    assert left_out == ["scaling_signals at 256 tokens: --largest_signals is 128"]
    assert cases.expand(["scaling_k_long"], cases.SMALLEST, 128) == (["scaling_k_long:2", "scaling_k_long:4"], [])
    left_out = ["scaling_k_long at 128 tokens: --largest_signals is 64"]
    assert cases.expand(["scaling_k_long"], cases.SMALLEST, 64) == ([], left_out)


def test_gradients_are_compared_as_vectors():
    peer = {"a": np.array([3.0, 0.0]), "b": np.array([4.0])}
    found = agreement.compare_gradients({"a": np.array([3.0, 0.3]), "b": np.array([4.0])}, peer)
    assert found["gradient"] == pytest.approx(0.3 / 5)
    assert (found["worst_tensor"], found["worst_tensor_name"]) == (pytest.approx(0.1), "a")
    assert found["gradient_norm"] == 5
    assert agreement.compare_gradients({"a": peer["a"]}, peer)["gradient"] == float("inf")


def test_tokens_are_compared_one_by_one():
    found = agreement.compare_tokens([[1, 2], [3, 4, 5]], [[1, 2], [3, 9, 5]])
    assert found == {"identical_rows": 1, "rows": 2, "first_difference_at": 1, "agrees": False}
    assert agreement.compare_tokens([[1]], [[1]])["agrees"]


def test_numbers_are_compared_one_by_one(tmp_path):
    def compare(ours: dict, peer: dict, gradient: float = 1.0) -> dict:
        for side, values, own in (("ours", ours, 1.0), ("peer", peer, gradient)):
            job = cases.Job("dpo_signals", "", tmp_path, {}, cases.SMALLEST)
            worker.write_check(job, side, values, {"w": np.array([own])})
        return agreement.compare(tmp_path / "check", "dpo_signals")

    found = compare({"rewards": [-2.0, -4.0]}, {"rewards": [-2.0, -4.001]})
    assert found["rewards"] == pytest.approx(2.5e-4, rel=1e-3) and not found["agrees"]
    assert compare({"rewards": [-2.0, -4.0]}, {"rewards": [-2.0, -4.0001]})["agrees"]
    assert not compare({"rewards": [-2.0]}, {"rewards": [-2.0, -2.0]})["agrees"]
    # Losses that agree do not excuse gradients that differ.
    assert compare({"loss": 1.0}, {"loss": 1.0})["agrees"]
    assert not compare({"loss": 1.0}, {"loss": 1.0}, gradient=1.001)["agrees"]


def test_the_command_is_recorded_without_folders():
    told = machine.describe(["--data=data/of/mine/student_phd.json", "--repeats=3"])
    assert told["command"] == "python -m benchmarks.run --data=student_phd.json --repeats=3"


def test_rows_are_the_same_for_both_sides():
    built = rows.build("stylebook", cases.SMALLEST, None)
    for name in ("dpo_signals", "dpo_summaries", "evaluation"):
        for pair in built[name]:
            assert pair["prompt_ids"] and pair["chosen_ids"] and pair["rejected_ids"]
    assert len(built["evaluation"]) == len(built["examples"]["evaluation"]) == cases.SMALLEST.evaluation_pairs
    (first, *_) = rows.read_examples(json.loads(json.dumps(built)), "dpo")
    assert first.queries[0].chosen == built["dpo_signals"][0]["chosen"]
    assert all(user["query_message"].count(rows.MARK) == 1 for user in built["popi"])


def imports(path: pathlib.Path) -> set[str]:
    """The modules that a file imports, inside functions too; with "from a import b", both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def closure(module: str) -> set[str]:
    """A module of the package with everything that it imports, directly or not."""
    found, names = set(), [module]
    while names:
        name = names.pop()
        if name in found:
            continue
        found.add(name)
        path = ROOT / f"{name.replace('.', '/')}.py"
        if name.startswith("benchmarks.") and path.exists():
            names += imports(path)
    return found


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if path.name != "__init__.py"
]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_itself(module):
    direct = imports(ROOT / f"{module.replace('.', '/')}.py")
    assert not any(module in closure(name) for name in direct)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("worker", {"jax", "torch", "popi_jax", "benchmarks.sides"}),
        ("sides.trl", {"jax", "popi_jax", "benchmarks.worker"}),
        ("sides.tunix", {"torch", "trl", "popi_jax", "benchmarks.worker"}),
        ("sides.ours", {"torch", "trl", "tunix", "benchmarks.worker"}),
    ],
)
def test_a_side_imports_nothing_that_its_environment_lacks(module, absent):
    found = closure(f"benchmarks.{module}")
    assert len(found) > 3 and not {name for name in found if name in absent or name.split(".")[0] in absent}


def make_environment(folder: pathlib.Path) -> pathlib.Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    return folder


def test_a_peer_s_name_chooses_side_and_environment(tmp_path):
    bench = run.Bench(cases.SMALLEST, tmp_path, {"trl": tmp_path / "a", "tunix": tmp_path / "b"})
    for peer, side, python in (
        ("", "ours", sys.executable),
        ("tunix_micro", "tunix", str(tmp_path / "b" / "bin" / "python")),
        ("trl_checkpointing", "trl", str(tmp_path / "a" / "bin" / "python")),
        ("transformers", "trl", str(tmp_path / "a" / "bin" / "python")),
    ):
        command = bench.worker("sampling", peer).command
        assert command[:4] == [python, "-m", "benchmarks.worker", f"--side={side}"]
        assert f"--peer={peer}" in command


def test_all_sides_run_under_the_same_variables(tmp_path, monkeypatch):
    bench = run.Bench(cases.SMALLEST, tmp_path, {"trl": tmp_path, "tunix": tmp_path})
    # Both sides return freed memory where there is little of it, and nowhere else.
    for peer, memory, given in (("tunix", 24.0, "1"), ("tunix", 64.0, ""), ("trl", 24.0, "")):
        monkeypatch.setattr(machine, "memory_gib", lambda memory=memory: memory)
        beside = bench.beside("popi_iteration", peer)
        ours, theirs = (beside.worker("popi_iteration", name).environment for name in ("", peer))
        assert ours == theirs and ours[worker.GIVE_BACK] == given
        assert process.MALLOC.items() <= ours.items()


def test_a_peer_without_its_environment_is_skipped_beside_one_that_has(tmp_path, monkeypatch):
    made = {"trl": make_environment(tmp_path / "trl"), "tunix": tmp_path / ".venv-tunix"}
    checked: list[str] = []

    def measure(bench: run.Bench, case: str, peer: str = "", note: str = "") -> dict:
        if peer == "trl":
            return {"case": case, "peer": peer, "note": "failed: exit code -9: it printed nothing"}
        return {"case": case, "peer": peer, "note": note, "theirs": {}}

    def check(bench: run.Bench, case: str, peer: str) -> dict:
        checked.append(peer)
        return {"agrees": True}

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "check", check)
    bench = run.Bench(cases.SMALLEST, tmp_path, made)
    note = "skipped: .venv-tunix is missing; make bench makes it"
    failed, _, last = run.run_case(bench, "dpo_signals", ["trl", "trl_precomputed", "tunix"])
    assert failed["note"].startswith("failed") and "agreement" not in failed
    assert last == {"case": "dpo_signals", "peer": "tunix", "note": note}
    assert summary.cells(last)[2] == note
    # Without any peer, our side is measured alone.
    (alone,) = run.run_case(bench, "dpo_signals", ["tunix"])
    assert (alone["peer"], alone["note"]) == ("", note)
    # Each side is checked once, with the first of its variants that did not fail.
    make_environment(made["tunix"])
    assert len(run.run_case(bench, "dpo_signals", [])) == len(cases.DPO_PEERS)
    assert checked == ["trl_precomputed", "trl_precomputed", "tunix"]


def test_rows_that_exceed_the_memory_are_not_started(tmp_path, monkeypatch):
    here = {name: make_environment(tmp_path / name) for name in ("trl", "tunix")}
    monkeypatch.setattr(
        run, "measure", lambda bench, case, peer="", note="": {"case": case, "peer": peer, "note": note}
    )
    monkeypatch.setattr(machine, "memory_gib", lambda: 24.0)

    def notes(sizes: cases.Sizes) -> list[str]:
        return [row["note"] for row in run.run_case(run.Bench(sizes, tmp_path, here), "dpo_signals", [])]

    assert notes(cases.Sizes(repeats=1)) == ["", "", "", "skipped: takes 28 GiB", ""]
    assert notes(cases.SMALLEST) == [""] * 5


def test_tunix_s_rows_are_the_same_with_its_rotary_base(tmp_path):
    built = rows.build("stylebook", cases.SMALLEST, None)
    for _ in range(2):  # The second time, the folder is there already.
        rows.write_tunix_rows(tmp_path / "tunix", built)
    written = json.loads((tmp_path / "tunix" / "rows.json").read_text())
    assert written | {"model": built["model"]} == json.loads(json.dumps(built))
    theirs, ours = (pathlib.Path(each["model"]) for each in (written, built))
    config, given = (json.loads((folder / "config.json").read_text()) for folder in (theirs, ours))
    assert config == given | {"rope_theta": 1e6, "rope_parameters": None}
    assert given["rope_theta"] == 1e4
    assert (theirs / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()


def test_a_worker_that_dies_is_reported_with_its_last_line(tmp_path):
    dying = process.Worker([sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path / "log")
    dying.start()
    with pytest.raises(process.WorkerError, match="exit code 1: no such model"):
        dying.read()


def start(code: str, tmp_path: pathlib.Path, name: str = "log", **environment: str) -> process.Worker:
    """A worker that runs this code, which finds the channel of its driver."""
    head = "import ctypes, pathlib, sys\nfrom benchmarks import worker\nchannel = worker.Channel()\n"
    command = [sys.executable, "-c", head + code]
    return process.Worker(command, tmp_path / name, {"PYTHONPATH": str(ROOT)} | environment)


HEAP = """
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def allocate(size):
    pieces = [libc.malloc(size) for _ in range(2**26 // size)]
    for piece in pieces:
        ctypes.memset(ctypes.c_void_p(piece), 1, size)
    return pieces
def held():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_malloc_keeps_freed_memory_under_the_recorded_settings(tmp_path):
    code = f"{HEAP}\n(piece,) = allocate(2**26)\nlibc.free(piece)\nchannel.wait('ready', held=held())"
    held = {}
    for settings in (process.MALLOC, {}):
        freeing = start(code, tmp_path, **(settings or {"GLIBC_TUNABLES": ""}))
        freeing.start()
        held[bool(settings)] = freeing.read()["held"]
        freeing.stop()
    assert held[True] - held[False] > 2**25


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_a_worker_that_waits_returns_freed_memory(tmp_path):
    """64 MiB in pieces that malloc keeps, because the last piece lies above them."""
    code = HEAP + "for piece in allocate(2**16)[:-1]:\n    libc.free(piece)\n"
    code += "channel.wait('ready')\nchannel.wait('done', held=held())"
    held = {}
    for given in ("1", ""):
        waiting = start(code, tmp_path, **{worker.GIVE_BACK: given}, **process.MALLOC)
        waiting.start()
        waiting.read()
        held[given] = waiting.run()["held"]
        waiting.stop()
    assert held[""] - held["1"] > 2**25


def test_workers_take_turns(tmp_path):
    code = """
print("this is not part of the protocol")
wanted = channel.wait("ready", name=NAME)
while wanted:
    with open(PATH, "a") as file:
        file.write(NAME)
    wanted = channel.wait("done", name=NAME)
channel.say("end", peak_bytes=worker.peak_bytes())
"""
    workers = [start(f"NAME, PATH = {name!r}, {str(tmp_path / 'order')!r}\n{code}", tmp_path, name) for name in "ab"]
    found = run.take_turns(workers, 3)
    assert (tmp_path / "order").read_text() == "ababab"
    for name, (ready, turns, end) in zip("ab", found, strict=True):
        assert ready == {"event": "ready", "name": name}
        assert turns == [{"event": "done", "name": name}] * 3
        assert end["peak_bytes"] > 2**20
        assert "not part of the protocol" in (tmp_path / name).read_text()


class FakeChannel:
    """Wants a number of measurements and keeps the events."""

    def __init__(self, wanted: int):
        self.wanted, self.events = wanted, []

    def wait(self, event: str, **values) -> bool:
        self.events.append({"event": event, **values})
        return len(self.events) <= self.wanted


@pytest.mark.parametrize(
    ("compiles", "reported"),
    [([0.0, 0.0], [1, 2]), ([5.0, 0.0, 5.0, 0.0], [2, 4]), ([5.0, 5.0, 5.0, 5.0, 5.0, 5.0], [3, 6])],
)
def test_a_measurement_in_which_something_was_compiled_is_taken_again(compiles, reported):
    channel, clock, measured = FakeChannel(2), worker.CompileClock(), iter(range(10))
    turns = worker.Turns(channel, clock, {"load_s": 1.0})

    def measurement() -> dict:
        number = next(measured)  # 0 is the warm-up.
        clock.seconds += compiles[number - 1] if number else 7.0
        return {"number": number}

    cases.repeat(measurement)(turns)
    ready, *done = channel.events
    assert (ready["load_s"], ready["compile_s"], ready["first"]) == (1.0, 7.0, {"number": 0})
    assert [turn["number"] for turn in done] == reported
    assert [turn["compile_s"] for turn in done] == [compiles[number - 1] for number in reported]
    assert all(turn["seconds"] >= 0 for turn in done) and turns.peak_bytes > 2**20


def test_the_compile_clock_hears_jax():
    clock = worker.CompileClock()
    jax.jit(lambda x: x + 3)(jnp.ones(5))
    assert clock.seconds > 0


def test_a_warm_up_may_be_shorter_than_a_measurement():
    taken, answers = [], iter([True, True, False])
    measure = cases.repeat(lambda: {"whole": True}, lambda: {"whole": False})
    assert measure(lambda values: taken.append(values["whole"]) or next(answers)) == {}
    assert taken == [False, True, True]


def test_the_smallest_form_runs_without_peers(tmp_path):
    nowhere = (f"--peers={tmp_path / 'nothing'}", f"--tunix={tmp_path / 'nowhere'}")
    done = run_bench(tmp_path, "--cases=dpo_summaries_lora,sampling,scaling_k_long", *nowhere)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "skipped: nothing is missing; make bench makes it" in done.stdout
    assert "skipped: nowhere is missing; make bench makes it" in done.stdout
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    dpo, sampling, *scaling = results["rows"][1:]
    assert [row["case"] for row in (dpo, sampling)] == ["dpo_summaries_lora", "sampling"]
    assert [row["case"] for row in scaling] == ["scaling_k_long:2", "scaling_k_long:4"]
    few, many = (row["ours"]["before"] for row in scaling)
    assert (few["k"], many["k"]) == (2, 4) and few["update_flops"] < many["update_flops"] < 2 * few["update_flops"]
    assert few["signal_tokens"] == many["signal_tokens"] > cases.SMALLEST.long_signals / 2
    for row in (dpo, sampling):
        assert row["ours"]["rates"][0] > 0 and row["ours"]["peak_bytes"] > 0
        assert all(value > 0 for value in row["roofline"].values()) and row["roofline"]
        profile = row["ours"]["profile"]
        assert 0 < profile["busy"] <= 1 and profile["kinds"]["products"] > 0
        assert sum(profile["kinds"].values()) == pytest.approx(1) == pytest.approx(sum(profile["parts"].values()))
    assert {"mlp", "backward mlp"} <= dpo["ours"]["profile"]["parts"].keys()
    assert {"prefill mlp", "decode logits"} <= sampling["ours"]["profile"]["parts"].keys()
    assert results["machine"]["dtype"] == "float32" and results["data"] == "synthetic"
    assert results["malloc"] == process.MALLOC
    assert all(setting in (tmp_path / "out" / "table.md").read_text() for setting in process.MALLOC.values())
    assert (tmp_path / "out" / "speed.png").stat().st_size > 0
    assert str(ROOT) not in (tmp_path / "out" / "bench.json").read_text()


@pytest.mark.parametrize(
    "folder", [".", "evaluation", "adapters", "tunix_evaluation", "tunix_iteration", "growth", "avx2"]
)
def test_page_shows_what_was_measured(folder):
    results = json.loads((ROOT / "benchmarks" / "results" / folder / "bench.json").read_text())
    assert summary.short(results) in PAGE.read_text(encoding="utf-8")
    compared = [row for row in results["rows"] if "theirs" in row and row["case"] != "roofline"]
    assert all(row.get("agreement", {"agrees": True})["agrees"] for row in compared) and compared


def test_page_shows_what_tunix_was_measured_on():
    def iteration(folder: str, peer: str) -> dict:
        results = json.loads((ROOT / "benchmarks" / "results" / folder / "bench.json").read_text())
        return next(row for row in results["rows"] if (row["case"], row["peer"]) == ("popi_iteration", peer))

    tunix, trl = iteration("tunix_iteration", "tunix"), iteration("", "trl")
    assert tunix["gives_back"] and len({turn["width"] for turn in tunix["theirs"]["turns"]}) == 1
    page = PAGE.read_text(encoding="utf-8").replace("\n", " ")
    for folder in ("tunix_evaluation", "tunix_iteration"):
        roofline = json.loads((ROOT / "benchmarks" / "results" / folder / "bench.json").read_text())["roofline"]
        rates = " and ".join(f"{roofline[side]['flops'] / 1e9:.0f}" for side in ("ours", "torch"))
        assert f"; {rates} GFLOP/s)" in page
    assert f"Tunix takes {tunix['theirs']['peak_bytes'] / 2**30:.1f} GiB for that iteration" in page
    assert f"ours takes {tunix['ours']['seconds_spread']['median']:.1f} s an iteration" in page
    assert f"instead of {trl['ours']['seconds_spread']['median']:.1f} s beside TRL" in page


def test_page_shows_how_time_grows():
    results = json.loads((ROOT / "benchmarks" / "results" / "growth" / "bench.json").read_text())
    rows = [row for row in results["rows"] if row["case"].startswith("scaling")]
    table = summary.scaling_cells(rows)
    page = PAGE.read_text(encoding="utf-8")
    for kind in ("scaling_k", "scaling_k_long", "scaling_signals"):
        own = [line for line in table if line[0].partition(":")[0] == kind]
        assert f"| {', '.join(line[5] for line in own[1:])} | {', '.join(line[6] for line in own[1:])} |" in page
    first, last = (row["ours"] for row in (rows[-6], rows[-1]))
    for key, times in (("seconds_spread", "median"), ("before", "signal_tokens")):
        assert f"{last[key][times] / first[key][times]:.1f} times" in page.replace("\n", " ")
    attention = sum(share for part, share in last["profile"]["parts"].items() if part.endswith("attend"))
    assert f"there attention is {attention:.0%} of the time" in page


@pytest.mark.parametrize("flags", [("--cases=speed",), ("--versus=nobody",), ("--repeats=0",)])
def test_mistakes_are_one_line(tmp_path, flags):
    done = run_bench(tmp_path, *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --") and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.skipif(not PEERS.exists(), reason=".venv-peers is missing; make bench makes it")
def test_both_sides_compute_the_same(tmp_path):
    """TRL's losses, gradients, log-probabilities and rewards, and transformers' greedy tokens."""
    wanted = (*cases.DPO, "sampling", "evaluation", "popi_iteration")
    flags = (f"--cases={','.join(wanted)}", "--versus=trl,transformers", f"--peers={PEERS}", f"--work={tmp_path / 'w'}")
    done = run_bench(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["case"]: row for row in json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]}
    for case in wanted:
        assert found[case]["agreement"]["agrees"], found[case]
        assert "speed" in found[case]
    assert all(found[case]["theirs"]["before"]["tokens_identical"] for case in cases.DPO)
    assert os.listdir(tmp_path / "w")


@pytest.mark.slow
@pytest.mark.skipif(not TUNIX.exists(), reason=".venv-tunix is missing; make bench makes it")
def test_tunix_computes_the_same(tmp_path):
    """Its losses, gradients, log-probabilities, rewards and greedy tokens."""
    # The other DPO cases differ only in their rows.
    wanted = ("dpo_signals", "dpo_summaries_lora", "sampling", "evaluation", "popi_iteration")
    flags = (f"--cases={','.join(wanted)}", "--versus=tunix", f"--tunix={TUNIX}", f"--work={tmp_path / 'w'}")
    done = run_bench(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["case"]: row for row in json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]}
    for case in wanted:
        assert found[case]["agreement"]["agrees"], found[case]
        assert "speed" in found[case]
