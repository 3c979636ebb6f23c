"""Whole runs on stylebook and its tiny model: their files, kill and resume, and mistakes in flags, config and data."""

import html
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from experiments import results_table
from popi_jax import checkpoint
from popi_jax.config import changed, parse
from popi_jax.configs import psoups_smollm2, quickstart
from popi_jax.configs import users as users_config
from popi_jax.data import prepared
from popi_jax.data.layouts import Told
from popi_jax.errors import UserError
from popi_jax.evaluation import evaluate
from popi_jax.modes import setup, train
from popi_jax.modes.evaluate import evaluate_checkpoint
from popi_jax.training import batches, schedule
from popi_jax.training.metrics import Profiler

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = f"--config={ROOT}/configs/quickstart.py:runlocal"
ENV = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"JAX_PLATFORMS": "cpu"}


def runlocal(**values):
    """Returns the quickstart's smallest settings with these keys changed."""
    return changed(parse(quickstart.get_config("runlocal")), values)


def command(workdir, *flags, mode="train", config=CONFIG):
    return [sys.executable, "-m", "popi_jax.main", config, f"--workdir={workdir}", f"--mode={mode}", *flags]


def run(workdir, *flags, mode="train", config=CONFIG):
    return subprocess.run(
        command(workdir, *flags, mode=mode, config=config),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENV,
        timeout=600,
    )


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


def interrupt(workdir, how, flags):
    """Starts a run and sends it a signal when metrics.jsonl has three lines; returns exit code and output."""
    process = subprocess.Popen(
        command(workdir, *flags), cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 300
    path = workdir / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= 3):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    shown, _ = process.communicate(timeout=300)
    return process.returncode, shown.decode()


FLAGS = ("--config.schedule.steps=6", "--config.eval.every=4", "--config.eval.users=4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run")
    out = run(workdir, *FLAGS)
    assert out.returncode == 0, out.stderr
    return workdir


def test_finished_run_has_all_files(finished):
    for name in ("config.json", "environment.json", "metrics.jsonl", "samples.jsonl", "results.json", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    results = json.loads((finished / "results.json").read_text())
    assert results["schema"] == 1 and results["dataset"] == "stylebook"
    (row,) = results["rows"]
    assert row["method"] == "popi" and row["n"] == 16 and 0 <= row["accuracy"] <= 1
    records = evaluate.read_records(finished / "eval_records.jsonl")
    assert row["summaries_cut"] == np.mean([not record.finished for record in records])
    low, high = row["accuracy_ci95"]
    assert low <= row["accuracy"] <= high
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6]
    assert {"eval_accuracy", "eval_accuracy_persona", "eval_accuracy_nothing"} <= set(lines[4])
    timed = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert timed[0]["compile_s"] > timed[-1]["compile_s"] >= 0 and timed[4]["evaluate_s"] > 0
    assert max(line["sampler_gap_max"] for line in lines if "sampler_gap_max" in line) < 1e-4


def test_row_describes_the_summaries(finished):
    found = json.loads((finished / "results.json").read_text())["rows"][0]["summaries"]
    texts, decisions = {}, {}  # Of each user, and of each test row.
    for record in evaluate.read_records(finished / "eval_records.jsonl"):
        texts.setdefault(record.user, []).append(record.context)
        decisions.setdefault(record.row, set()).add(record.h > 0)
    assert all(len(own) == 4 and own[:2] == own[2:] for own in texts.values())  # Two summaries, for two queries each.
    two = [own[:2] for own in texts.values()]
    words = [len(re.findall("[A-Za-z0-9]+", text)) for own in two for text in own]
    assert found["summary_length"]["mean"] == np.mean(words)
    different, per_user = len(set(sum(two, []))), np.mean([len(set(own)) for own in two])
    assert found["summaries_distinct"] == {"summaries": 16, "distinct": different, "per_user": per_user}
    assert found["stability"]["agreement"] == np.mean([len(seen) == 1 for seen in decisions.values()])
    pairs = [
        [s.kind for s in example.signals].count("pair") for example in prepared.load_examples(runlocal().data)["test"]
    ]
    own = found["faithfulness"]
    assert (own["users"], own["signals"], own["skipped"]) == (np.count_nonzero(pairs), sum(pairs), 0)
    assert 0 <= own["accuracy_ci95"][0] <= own["accuracy"] <= own["accuracy_ci95"][1] <= 1
    assert "<h2>Summaries</h2>" in (finished / "report.html").read_text()


def test_killed_run_resumes_bitwise(finished, tmp_path):
    assert interrupt(tmp_path, signal.SIGKILL, FLAGS)[0] == -signal.SIGKILL
    again = run(tmp_path, *FLAGS)
    assert again.returncode == 0, again.stderr
    assert "resuming from the checkpoint of step" in again.stdout
    assert metrics(tmp_path) == metrics(finished)
    assert (tmp_path / "eval_records.jsonl").read_text() == (finished / "eval_records.jsonl").read_text()


def test_sigterm_saves_a_checkpoint(finished, tmp_path):
    code, shown = interrupt(tmp_path, signal.SIGTERM, FLAGS)
    (step,) = map(int, re.findall(r"stopped by SIGTERM: .* the checkpoint of step (\d+); run the same command", shown))
    assert code == 143 and max(checkpoint.steps(tmp_path / "checkpoints")) == step
    assert [line["step"] for line in metrics(tmp_path)][-1] == step
    again = run(tmp_path, *FLAGS)
    assert again.returncode == 0, again.stderr
    assert metrics(tmp_path) == metrics(finished)


def test_summarize_generate_export(finished, tmp_path):
    users = [{"user": f"u{i}", "signals": [{"kind": "profile", "text": "She likes short answers."}]} for i in range(3)]
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(user) + "\n" for user in users))
    flags = (f"--input={tmp_path / 'users.jsonl'}", f"--output={tmp_path / 'summaries.jsonl'}", *FLAGS)
    out = run(finished, *flags, mode="summarize")
    assert out.returncode == 0, out.stderr
    summaries = [json.loads(line) for line in (tmp_path / "summaries.jsonl").read_text().splitlines()]
    assert [entry["user"] for entry in summaries] == ["u0", "u1", "u2"]
    assert all(entry["signals_dropped"] == 0 for entry in summaries) and "no signals dropped" in out.stdout
    (tmp_path / "users.jsonl").write_text(json.dumps(users[0]) + "\n")
    fewer = run(finished, *flags, mode="summarize")  # Existing lines are not overwritten.
    assert fewer.returncode == 2, fewer.stderr
    assert re.search(r"summaries.jsonl:2: the input has no user 'u1'; choose another --output", fewer.stderr), (
        fewer.stderr
    )
    prompts = [{"prompt": "How do I bake bread?", "user": "u1"}, {"prompt": "Why?", "summary": "Likes lists."}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    flags = (f"--input={tmp_path / 'prompts.jsonl'}", f"--output={tmp_path / 'responses.jsonl'}", *FLAGS)
    out = run(finished, *flags, mode="generate")
    assert out.returncode == 0, out.stderr
    responses = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert responses[0]["summary"] == summaries[1]["summary"] and responses[1]["summary"] == "Likes lists."
    out = run(finished, f"--output={tmp_path / 'hub'}", *FLAGS, mode="export")
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "hub" / "generator" / "model.safetensors").exists()


def test_unknown_key_is_one_line_and_exit_code_2(tmp_path):
    out = run(tmp_path, "--config.no_such_key=1")
    assert out.returncode == 2 and out.stderr.startswith("error:") and "no_such_key" in out.stderr, out.stderr
    assert len(out.stderr.splitlines()) == 1


BAD = [
    ("limits.summary", 0, "config.limits.summary is 0"),
    ("limits.prompt", 8, "limits.prompt is 8"),
    ("limits.prompt", 100000, "exceed the context"),
    ("model.path", "no/such/folder/here", "no/such/folder/here"),
    ("data.dataset", "users", "data.path is empty"),
    ("data.dataset", "stylebok", "config.data.dataset is 'stylebok'"),
    ("schedule.name", "sideways", "sideways"),
    ("sampling.k", 1, "config.sampling.k is 1"),
    ("sampling.k_generator", 7, "config.sampling.k_generator is 7"),
    ("eval.top_p", 0.0, "config.eval.top_p is 0.0; it must be greater than 0"),
    ("eval.temperature", float("inf"), "config.eval.temperature is inf; it should be a finite number"),
    ("optim.b2", float("nan"), "config.optim.b2 is nan"),
    ("seed", 2**32, "config.seed is 4294967296; it must be less than 4294967296"),
    ("seed", None, "config.seed is None; it should be a valid integer"),
    ("limits.buckets", (64, 0), "config.limits.buckets.1 is 0"),
    ("limits.buckets", ("a",), "config.limits.buckets.0 is 'a'"),
    ("prompts.pair_fields", ("prompt",), "config.prompts.pair_fields is ('prompt',)"),
    ("prompts.summary_stop", "two words", "config.prompts.summary_stop is"),
    ("train.accumulation_inference", 3, "config.train.accumulation_inference is 3"),
    ("train.accumulation_generator", 700, "config.train.accumulation_generator is 700"),
    ("mesh.fsdp", 3, "mesh.fsdp=3"),
    ("optim.clip_generator", -1.0, "config.optim.clip_generator is -1.0"),
    ("data.seed", -1, "config.data.seed is -1"),
    ("train.profile_steps", (3,), "config.train.profile_steps is (3,)"),
]


@pytest.mark.parametrize(("key", "value", "shown"), BAD, ids=[f"{key}={value}" for key, value, _ in BAD])
def test_error_names_the_invalid_key_and_value(key, value, shown, tmp_path):
    with pytest.raises(UserError) as error:
        train.train(runlocal(**{key: value}), tmp_path)
    assert shown in str(error.value) and "\n" not in str(error.value)


def test_micro_batches_are_at_most_the_rows_of_any_step():
    """The second phase of two_phase has one summary per user; zero_shot_summary draws the same number as popi."""
    config = runlocal(
        **{"train.users_per_step": 4, "data.queries_per_user": 2, "sampling.k": 2, "sampling.k_generator": 0},
        **{"train.accumulation_generator": 16, "mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1},
    )
    setup.make_mesh(config)
    phases = {"schedule.name": "two_phase", "schedule.n_phi": 1, "schedule.n_theta": 1}
    with pytest.raises(UserError, match="16, more than the 8 rows of a step: 4 users .* x 1 summaries x 2 queries"):
        setup.make_mesh(changed(config, phases))
    setup.make_mesh(changed(config, {"method": "zero_shot_summary"}))


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"user": "a", "signals": [], "queries": []}', "signals"),
        ('{"user": "a", "signals"', "not JSON"),
    ],
)
def test_error_in_users_file_names_file_and_line(line, shown, tmp_path):
    path = tmp_path / "users.jsonl"
    path.write_text(line + "\n")
    out = run(tmp_path / "run", "--config.data.dataset=users", f"--config.data.path={path}")
    assert out.returncode == 2 and f"{path}:1" in out.stderr and shown in out.stderr, out.stderr


def test_mistakes_in_the_flags_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for workdir, flag, shown in [
        (
            "file",
            "--config.seed=0",
            f"--workdir={tmp_path / 'file'}: {tmp_path / 'file'} is not a folder; choose another --workdir",
        ),
        ("broken", "--config.seed=0", f"{tmp_path / 'broken' / 'config.json'}:1: not JSON"),
        ("new", "--config.seed=-1", "config.seed is -1; it must be at least 0"),
        ("new", "--topology=v5e:2x2", "--topology is for --mode=compile"),
        ("new", "--temperature=0.5", "--temperature is for --mode=summarize and generate; leave it out"),
        ("new", "--format=peft", "--format is for --mode=export; leave it out"),
        ("new", "--distributed=host:1,2,5", "--distributed=host:1,2,5: give auto, or HOST:PORT,COUNT,INDEX"),
    ]:
        out = run(tmp_path / workdir, flag)
        assert out.returncode == 2 and shown in out.stderr, out.stderr
        assert len(out.stderr.splitlines()) == 1, out.stderr


def test_checkpoint_of_another_model_is_refused(finished, tmp_path):
    out = run(finished, *FLAGS, "--config.lora.rank=4")
    assert out.returncode == 2 and "config.lora.rank" in out.stderr, out.stderr


def test_evaluation_does_not_change_the_files_of_the_run(finished, tmp_path):
    config = runlocal(**{"schedule.steps": 6, "eval.every": 4, "eval.users": 4})
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir() if path.is_file()}
    evaluate_checkpoint(config, finished, None, None)
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir() if path.is_file()} == before
    own, again = (json.loads((p / "results.json").read_text()) for p in (finished, finished / "evaluation_step6"))
    assert again["rows"][0]["accuracy"] == own["rows"][0]["accuracy"]
    evaluate_checkpoint(changed(config, {"data.test_users": 5}), finished, tmp_path / "fewer", 6)
    (row,) = json.loads((tmp_path / "fewer" / "results.json").read_text())["rows"]
    assert row["n"] == 10 and (tmp_path / "fewer" / "report.html").exists()
    config = changed(config, {"prompts.generator_instruction": "Answer."})
    with pytest.raises(UserError, match="was trained with another config: config.prompts.generator_instruction"):
        evaluate_checkpoint(config, finished, tmp_path / "other", None)


@pytest.mark.parametrize(
    ("method", "limits", "shown"),
    [
        ("popi", {"signals": 30}, "limits.signals is 30"),
        ("popi", {"prompt": 100}, "limits.prompt is 100"),  # Every evaluation scores prompts with raw signals.
        ("popi", {"summary": 260}, "with a summary of limits.summary = 260 takes"),
        ("population", {"response": 2}, "limits.response is 2"),
    ],
)
def test_exceeded_limit_is_reported_before_the_first_step(method, limits, shown, tmp_path):
    config = runlocal(method=method, **{f"limits.{name}": value for name, value in limits.items()})
    with pytest.raises(UserError) as error:
        train.train(config, tmp_path)
    assert shown in str(error.value) and not (tmp_path / "metrics.jsonl").exists()


def test_oracle_needs_personas(tmp_path):
    config = parse(users_config.get_config("runlocal"))
    lines = [json.loads(line) for line in (ROOT / users_config.EXAMPLE).read_text().splitlines()]
    for line in lines:
        line.pop("persona", None)
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = changed(config, {"data.path": str(tmp_path / "users.jsonl")})
    with pytest.raises(UserError, match=r"--methods: user .* has no persona"):
        results_table.make_table(config, tmp_path / "table", ["base", "oracle"], [0])
    with pytest.raises(UserError, match="has no persona, which method oracle shows"):
        train.train(changed(config, {"method": "oracle"}), tmp_path / "run")


def test_run_resumes_only_with_the_same_examples(tmp_path):
    config = changed(
        parse(users_config.get_config("runlocal")), {"eval.samples": 0, "data.path": str(tmp_path / "users.jsonl")}
    )
    text = (ROOT / users_config.EXAMPLE).read_text()
    (tmp_path / "users.jsonl").write_text(text)
    train.train(config, tmp_path / "run")
    (tmp_path / "users.jsonl").write_text(text.replace("the", "one", 1))
    with pytest.raises(UserError, match="other examples than config.data"):
        train.train(config, tmp_path / "run")


def test_users_divide_into_micro_batches_and_devices(tmp_path):
    config = runlocal(**{"train.accumulation_inference": 2, "mesh.data": 8, "mesh.tensor": 1})
    with pytest.raises(UserError, match="config.train.accumulation_inference is 2: 8 users .* mesh.fsdp = 8 devices"):
        train.train(config, tmp_path)


@pytest.mark.parametrize(("start", "end", "calls"), [(0, 9, "+2-4"), (3, 9, "+3-4"), (0, 3, "+2-"), (5, 9, "")])
def test_profiler_stops_wherever_the_run_starts_and_ends(start, end, calls, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: said.append("+"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: said.append("-"))
    with Profiler(tmp_path, (2, 3)) as profiler:
        for step in range(start, end):
            before = len(said)
            profiler.enter(step)
            said += [str(step)] * (len(said) > before)
    assert "".join(said) == calls


def test_two_phases_with_adapters(tmp_path):
    start = {"prompts.summary_start": "This reader likes", "prompts.summary_stop": ",", "eval.samples": 1}
    config = changed(parse(psoups_smollm2.get_config("runlocal")), start)
    row = train.train(config, tmp_path)
    assert row["method"] == "popi"
    summaries = [record.context for record in evaluate.read_records(tmp_path / "eval_records.jsonl")]
    assert all(summary.startswith("This reader likes") for summary in summaries)
    assert all("," not in summary[:-1] for summary in summaries) and any(summary[-1] == "," for summary in summaries)
    kinds = [
        {name for name in ("grad_norm_inference", "grad_norm_generator") if name in line} for line in metrics(tmp_path)
    ]
    assert kinds == [{"grad_norm_inference"}, {"grad_norm_generator"}, {"grad_norm_generator"}]
    cut = ["summaries_cut" in line for line in metrics(tmp_path)]
    assert cut == [True, True, True]  # The generator's phase draws summaries too.
    written = [json.loads(line) for line in (tmp_path / "written_summaries.jsonl").read_text().splitlines()]
    assert len({entry["user"] for entry in written}) == len(written) == 8  # Two steps of four users, each drawn once.
    # A resumed run reads them from the file and logs the same values.
    users = [types.SimpleNamespace(user=entry["user"]) for entry in written[:4]]
    found = batches.WrittenSummaries(tmp_path / "written_summaries.jsonl")
    contexts, counts = found.contexts(sampler=None, phi=None, examples=users, key=None, sampling=None, step=1)
    assert contexts == [[Told(entry["summary"])] for entry in written[:4]]
    assert counts == {"summaries_cut": metrics(tmp_path)[1]["summaries_cut"]}


def test_popi_uses_the_schedule_of_its_name_or_of_the_config():
    config = parse(psoups_smollm2.get_config())
    own, joint, twice, turns = (
        results_table.method_config(config, method, 3)
        for method in ("popi", "popi_joint", "popi_two_phase", "popi_alternate")
    )
    assert own.schedule == config.schedule and own.schedule.n_phi != own.schedule.n_theta
    assert joint.schedule.name == "joint" and joint.seed == 3
    assert twice.schedule.n_phi == twice.schedule.n_theta == config.schedule.steps
    assert schedule.update_counts(turns) == schedule.update_counts(twice) == schedule.update_counts(joint)
    assert {c.method for c in (own, joint, twice, turns)} == {"popi"}


@pytest.mark.slow  # The time limit needs an otherwise idle machine.
@pytest.mark.parametrize("name", ["quickstart", "psoups_smollm2", "free", "users", "llama3_3b", "llama3_8b"])
def test_runlocal_takes_less_than_a_minute(name, tmp_path):
    started = time.monotonic()
    out = run(tmp_path, config=f"--config={ROOT}/configs/{name}.py:runlocal")
    assert out.returncode == 0, out.stderr
    assert time.monotonic() - started < 60


def test_best_decision_counts_a_tie_as_half():
    p_Tr = np.array([0.2, 0.5, 0.5 - 1e-16, np.nextafter(0.5, 1), 0.500001, 0.9])
    np.testing.assert_array_equal(results_table.best_decision(p_Tr), [0, 0.5, 0.5, 0.5, 1, 1])


def test_results_table_and_its_resumption(tmp_path, capsys):
    config = runlocal()
    methods = ["base", "population", "popi", "bayes_signals"]
    results_table.make_table(config, tmp_path, methods, [0])
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == methods
    assert rows["base"]["popi_minus_this"] == pytest.approx(rows["popi"]["accuracy"] - rows["base"]["accuracy"])
    loss = rows["popi"]["exact_conditional_entropy_nats"] + rows["popi"]["exact_approximation_error_nats"]
    assert loss == pytest.approx(rows["popi"]["exact_loss_nats"], abs=1e-3)
    assert rows["bayes_signals"]["accuracy"] > 0.6
    assert (tmp_path / "report.html").exists() and "POPI" in capsys.readouterr().out.upper()
    (tmp_path / "popi_seed0" / "results.json").unlink()  # As after a kill during the final evaluation.
    before = (tmp_path / "population_seed0" / "results.json").stat().st_mtime_ns
    results_table.make_table(config, tmp_path, methods, [0])
    again = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (tmp_path / "population_seed0" / "results.json").stat().st_mtime_ns == before
    assert again[2]["accuracy"] == rows["popi"]["accuracy"]
    shown = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    results_table.make_table(config, tmp_path, methods, [0], data_texts=False)
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [set(full) - set(own) for full, own in zip(shown, kept, strict=True)] == [
        set(results_table.DATA_TEXTS)
    ] * len(shown)
    page = html.unescape((tmp_path / "report.html").read_text())
    assert shown[0]["summary"] in page and shown[0]["prompt"] not in page
    _check_without_texts(tmp_path, config)
    _check_trained(tmp_path, rows)
    _check_signals(tmp_path, rows["popi"])


def _check_without_texts(table, config):
    """Checks that without_texts/ gives the same table in another folder, and has no text of the data set."""
    methods = ["base", "population", "popi"]
    results_table.make_table(config, table, methods, [0], data_texts=False)
    elsewhere = table / "elsewhere"
    shutil.copytree(table / "without_texts", elsewhere)
    results_table.make_table(config, elsewhere, methods, [0], data_texts=False)
    first, again = (json.loads((folder / "results.json").read_text()) for folder in (table, elsewhere))
    assert first == again and "popi_minus_this_ci95" in again["rows"][0]
    assert not (elsewhere / "popi_seed0" / "checkpoints").exists()
    full = evaluate.read_records(table / "popi_seed0" / "eval_records.jsonl")
    kept = evaluate.read_records(elsewhere / "popi_seed0" / "eval_records.jsonl")
    assert [(r.row, r.h, r.context) for r in kept] == [(r.row, r.h, r.context) for r in full]
    for kind in ("user", "group", "persona"):
        pairs = {(getattr(a, kind), getattr(b, kind)) for a, b in zip(full, kept, strict=True)}
        numbers = range(1, len(pairs) + 1)
        assert {name for _, name in pairs} == {f"{kind} {i:0{len(str(len(pairs)))}}" for i in numbers}
    for told in ("population_seed0", "popi_seed0"):
        row = json.loads((elsewhere / told / "results.json").read_text())["rows"][0]
        assert all(name.startswith("persona ") for name in row["accuracy_by_persona"])
    population = evaluate.read_records(elsewhere / "population_seed0" / "eval_records.jsonl")
    assert {record.context for record in population} == {None}


def _check_trained(trained, rows):
    """Checks that --trained evaluates the same runs with fewer signals, trains nothing and keeps finished rows."""
    config, table = runlocal(**{"data.signals_per_user": 2}), trained / "two"
    methods = ["base", "population", "popi"]
    results_table.make_table(config, table, methods, [0], trained=trained)
    results = (table / "popi_seed0" / "results.json").stat().st_mtime_ns
    found = {row["method"]: row for row in json.loads((table / "results.json").read_text())["rows"]}
    assert list(found) == methods and "popi_minus_this_ci95" in found["population"]
    assert found["popi"]["raw_signal_tokens_mean"] < 0.6 * rows["popi"]["raw_signal_tokens_mean"]
    assert not (table / "popi_seed0" / "checkpoints").exists() and (table / "shared" / "cache").exists()
    results_table.make_table(config, table, methods, [0], trained=trained)
    assert (table / "popi_seed0" / "results.json").stat().st_mtime_ns == results
    with pytest.raises(UserError, match="another config: config.lora.rank"):
        results_table.make_table(changed(config, {"lora.rank": 1}), trained / "other", ["popi"], [0], trained=trained)


def _check_signals(table, row):
    """Checks that counts evaluate the finished run with each user's last signal, and keep the finished evaluation."""
    config, folder = runlocal(), table / "popi_seed0" / "signals_1"
    results_table.make_table(config, table, ["popi"], [0], counts=[1])
    results = json.loads((table / "results.json").read_text())
    assert results["rows"][0]["accuracy"] == row["accuracy"]
    (one,) = results["by_signals"]
    assert (one["method"], one["seed"], one["signals"], one["n"]) == ("popi", 0, 1, row["n"])
    records = evaluate.read_records(folder / "eval_records.jsonl")
    assert one["accuracy"] == np.mean([record.h > 0 for record in records])
    everything = {r.user: r.signal_tokens for r in evaluate.read_records(table / "popi_seed0" / "eval_records.jsonl")}
    # A user's four signals are of about the same length.
    assert all(0.1 < record.signal_tokens / everything[record.user] < 0.5 for record in records)
    before = (folder / "results.json").stat().st_mtime_ns
    results_table.make_table(config, table, ["popi"], [0], counts=[1])
    assert (folder / "results.json").stat().st_mtime_ns == before
    assert json.loads((table / "results.json").read_text())["by_signals"] == [one]
    with pytest.raises(UserError, match="--signals: no method of --methods reads signals; add one of raw_signals"):
        results_table.make_table(config, table, ["base", "oracle"], [0], counts=[1])
