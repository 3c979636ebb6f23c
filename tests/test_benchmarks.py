"""The benchmark: its statistics by hand, its smallest form without torch, and, with torch, that both sides agree."""

import ast
import json
import os
import pathlib
import platform
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import agreement, cases, machine, protocol, rows, run, summary

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
    # Samples say themselves how many tokens they have.
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
    # Of 7 seconds the prefill takes 2, and five steps one each.
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
    assert found["gradient_norm_peer"] == 5
    assert agreement.compare_gradients({"a": peer["a"]}, peer)["gradient"] == float("inf")


def test_tokens_are_compared_one_by_one():
    found = agreement.compare_tokens([[1, 2], [3, 4, 5]], [[1, 2], [3, 9, 5]])
    assert found == {"identical_rows": 1, "rows": 2, "first_difference_at": 1, "agrees": False}
    assert agreement.compare_tokens([[1]], [[1]])["agrees"]


def test_rewards_are_compared_one_by_one():
    found = agreement.compare_rewards([-2.0, -4.0], [-2.0, -4.001])
    assert found == {"rewards": pytest.approx(2.5e-4, rel=1e-3), "agrees": False}
    assert agreement.compare_rewards([-2.0, -4.0], [-2.0, -4.0001])["agrees"]


def test_the_command_is_told_without_folders():
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


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (("cases", "peer_reward", "protocol", "roofline", "trl_peer", "trl_popi"), ("jax", "popi_jax")),
        (("cases", "peer_reward", "protocol", "tunix_peer", "tunix_popi"), ("torch", "trl", "popi_jax")),
    ],
)
def test_the_peers_sides_need_nothing_that_their_environments_lack(modules, absent):
    for name in modules:
        tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())
        # Inside functions imports are lazy: roofline's own of JAX.
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            assert not any(str(n).split(".")[0] in absent for n in names), name


def make_environment(folder: pathlib.Path) -> pathlib.Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    return folder


def test_a_peer_s_name_chooses_worker_and_environment(tmp_path, monkeypatch):
    trl, tunix = make_environment(tmp_path / "trl"), tmp_path / "tunix"
    bench = run.Bench(cases.SMALLEST, tmp_path, {"trl_peer": trl, "tunix_peer": tunix})
    assert bench.has("trl_precomputed") and bench.has("transformers")
    assert not bench.has("tunix") and not bench.has("tunix_micro")
    python, _, module, *rest = bench.theirs("sampling", "tunix").command
    assert (python, module) == (str(tunix / "bin" / "python"), "benchmarks.tunix_peer")
    assert "--variant=tunix" in rest
    assert bench.theirs("dpo_signals", "trl_checkpointing").command[2] == "benchmarks.trl_peer"
    # Where memory is short both sides give theirs back, and nowhere else.
    for peer, memory, given in (("tunix", 24.0, "1"), ("tunix", 64.0, None), ("trl", 24.0, None)):
        monkeypatch.setattr(machine, "memory_gib", lambda memory=memory: memory)
        beside = bench.beside("popi_iteration", peer)
        for worker in (beside.ours("popi_iteration"), beside.theirs("popi_iteration", peer)):
            assert worker.environment.get(protocol.GIVE_BACK) == given


def test_a_peer_without_its_environment_is_skipped_beside_one_that_has(tmp_path, monkeypatch):
    made = {"trl_peer": make_environment(tmp_path / "trl"), "tunix_peer": tmp_path / ".venv-tunix"}
    checked: list[str] = []

    def measure(bench: run.Bench, case: str, peer: str | None, note: str = "") -> dict:
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
    # Where no peer is left ours is measured alone.
    (alone,) = run.run_case(bench, "dpo_signals", ["tunix"])
    assert (alone["peer"], alone["note"]) == (None, note)
    # Each worker is checked once, for the first of its peers that did not fail.
    make_environment(made["tunix_peer"])
    assert len(run.run_case(bench, "dpo_signals", [])) == len(cases.DPO_PEERS)
    assert checked == ["trl_precomputed", "trl_precomputed", "tunix"]


def test_what_the_memory_does_not_hold_is_not_started(tmp_path, monkeypatch):
    here = {name: make_environment(tmp_path / name) for name in ("trl_peer", "tunix_peer")}
    monkeypatch.setattr(run, "measure", lambda bench, case, peer, note="": {"case": case, "peer": peer, "note": note})
    monkeypatch.setattr(machine, "memory_gib", lambda: 24.0)

    def notes(sizes: cases.Sizes) -> list[str]:
        return [row["note"] for row in run.run_case(run.Bench(sizes, tmp_path, here), "dpo_signals", [])]

    assert notes(cases.Sizes(repeats=1)) == ["", "", "", "skipped: takes 28 GiB", ""]
    assert notes(cases.SMALLEST) == [""] * 5


def test_tunix_s_rows_are_the_same_on_its_own_rotary_base(tmp_path):
    built = rows.build("stylebook", cases.SMALLEST, None)
    for _ in range(2):  # The second time in a folder that has been used.
        rows.write_tunix_rows(tmp_path / "tunix", built)
    written = json.loads((tmp_path / "tunix" / "rows.json").read_text())
    assert written | {"model": built["model"]} == json.loads(json.dumps(built))
    theirs, ours = (pathlib.Path(each["model"]) for each in (written, built))
    config, given = (json.loads((folder / "config.json").read_text()) for folder in (theirs, ours))
    assert config == given | {"rope_theta": 1e6, "rope_parameters": None}
    assert given["rope_theta"] == 1e4
    assert (theirs / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()


def test_a_worker_that_dies_is_told_with_its_last_line(tmp_path):
    worker = protocol.Worker([sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path / "log")
    worker.start()
    with pytest.raises(protocol.WorkerError, match="exit code 1: no such model"):
        worker.read()


WORKER = """
import pathlib, sys, time
from benchmarks.protocol import Channel
log = pathlib.Path(sys.argv[1])
channel = Channel()
print("chatter that is no part of the protocol")
channel.ready(name=sys.argv[2])
while channel.wait():
    with log.open("a") as file:
        file.write(sys.argv[2])
    channel.done(1.0, name=sys.argv[2])
channel.end()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_a_worker_that_waits_gives_back_what_it_freed(tmp_path):
    """64 MiB in pieces that malloc keeps: the last piece lies above them."""
    code = """
import ctypes, pathlib
from benchmarks.protocol import Channel
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [libc.malloc(2**16) for _ in range(2**10)]
for piece in pieces:
    ctypes.memset(ctypes.c_void_p(piece), 1, 2**16)
for piece in pieces[:-1]:
    libc.free(piece)
channel = Channel()
channel.ready()
held = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
channel.wait()
channel.done(1.0, held=held)
"""
    held = {}
    for given in ("1", ""):
        environment = {"PYTHONPATH": str(ROOT), protocol.GIVE_BACK: given}
        worker = protocol.Worker([sys.executable, "-c", code], tmp_path / "log", environment)
        worker.start()
        worker.read()
        held[given] = worker.run()["held"]
        worker.stop()
    assert held[""] - held["1"] > 2**25


def test_workers_take_turns(tmp_path):
    workers = [
        protocol.Worker(
            [sys.executable, "-c", WORKER, str(tmp_path / "order"), name], tmp_path / name, {"PYTHONPATH": str(ROOT)}
        )
        for name in "ab"
    ]
    found = run.take_turns(workers, 3)
    assert (tmp_path / "order").read_text() == "ababab"
    for name, (ready, turns, end) in zip("ab", found, strict=True):
        assert ready == {"event": "ready", "name": name}
        assert turns == [{"event": "done", "seconds": 1.0, "name": name}] * 3
        assert end["peak_bytes"] > 2**20
        assert "chatter" in (tmp_path / name).read_text()


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
    """TRL's losses, gradients and log-probabilities, transformers' greedy tokens, the composed iteration's rewards."""
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
    """Its losses, gradients and log-probabilities, greedy tokens of the same ids, the composed iteration's rewards."""
    # The other DPO steps differ in their rows alone.
    wanted = ("dpo_signals", "dpo_summaries_lora", "sampling", "evaluation", "popi_iteration")
    flags = (f"--cases={','.join(wanted)}", "--versus=tunix", f"--tunix={TUNIX}", f"--work={tmp_path / 'w'}")
    done = run_bench(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["case"]: row for row in json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]}
    for case in wanted:
        assert found[case]["agreement"]["agrees"], found[case]
        assert "speed" in found[case]
    assert json.loads((tmp_path / "w" / "tunix" / "check" / "sampling_peer.json").read_text())["tokens_identical"]
