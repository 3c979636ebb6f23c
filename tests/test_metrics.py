"""metrics.jsonl survives interruptions; NaN stops a run; progress display and parameter overview show the values."""

import io
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from popi_jax.errors import UserError
from popi_jax.modes import runfiles
from popi_jax.training import metrics


def values(step: int) -> dict[str, float]:
    return {"loss": float(np.float32(1 / step)), "accuracy": 0.5}


def without_times(workdir):
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in metrics.read_metrics(workdir)]


def events(workdir):
    """Returns (step, tag, value) triples and purge steps, parsed from TensorBoard's record format."""
    scalars, purged = [], []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        raw = path.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            event = event_pb2.Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]
            scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.session_log.status == event.session_log.START:
                purged.append(event.step)
    return scalars, purged


def test_interrupted_run_leaves_the_same_lines(tmp_path):
    with metrics.MetricWriter(tmp_path / "whole", resume_step=0) as log:
        for step in range(1, 7):
            log.write(step, values(step))
    with metrics.MetricWriter(tmp_path / "cut", resume_step=0) as log:
        for step in range(1, 6):
            log.write(step, values(step))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # A kill cuts the line short; the newest checkpoint is of step 4.
    with metrics.MetricWriter(tmp_path / "cut", resume_step=4, wall_s=100.0) as log:
        for step in (5, 6):
            log.write(step, values(step))
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")
    walls = [line["wall_s"] for line in metrics.read_metrics(tmp_path / "cut")]
    assert walls[3] < 100 <= walls[4] <= walls[5]


def test_tokens_per_second_covers_the_steps_since_the_last_line(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with metrics.MetricWriter(tmp_path, resume_step=2, wall_s=50.0) as log:
        clock[0] = 104.0
        assert log.write(3, {"tokens": 800.0})["tokens_per_s"] == 200.0
        assert log.write(3, {"eval_loss": 1.0}) == {"eval_loss": 1.0}  # A line without tokens has no rate.
        with log.pause():  # An evaluation of 6 seconds is not training.
            clock[0] = 110.0
        clock[0] = 120.0
        log.write(5, {"tokens": 1000.0})
    assert metrics.read_metrics(tmp_path)[-1] == {"step": 5, "wall_s": 70.0, "tokens": 1000.0, "tokens_per_s": 200.0}


def test_lines_of_the_resume_step_are_kept(tmp_path):
    for start in (0, 1):
        with metrics.MetricWriter(tmp_path, resume_step=start) as log:
            log.write(start + 1, {"loss": 1.0})
            log.write(start + 1, {"eval_accuracy": 0.5})
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 1, 2, 2]


def test_the_lines_of_earlier_steps_are_those_of_the_checkpoint(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricWriter(tmp_path, resume_step=0) as log:
        log.write(1, {"loss": 1.5})
        log.write(2, {"loss": 2.5})
        saved = log.written
        whole = path.read_bytes()
        log.write(2, {"eval_loss": 3.5})  # The evaluation follows the checkpoint, and is repeated.

    def resumed():
        with metrics.MetricWriter(tmp_path, resume_step=2, written=json.loads(json.dumps(saved))) as log:
            return log.written

    for rest in (b"", b'{"step": 3, "lo'):
        path.write_bytes(path.read_bytes() + rest)
        assert resumed() == saved and path.read_bytes() == whole
    for damaged in (whole.replace(b"1.5", b"1.7"), whole[: whole.index(b"\n") + 1], whole[:-5]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"metrics.jsonl: the lines up to step 2 are not those that the run wrote"):
            resumed()
    path.unlink()
    assert resumed() == (0, 0)
    path.write_bytes(whole[: whole.index(b"\n")])  # No line is whole.
    assert resumed() == (0, 0) and path.read_bytes() == b""
    assert caplog.text.count("is missing or cut; the run continues without the metrics up to step 2") == 2
    path.write_text('{"step": 3}\n')  # Written after the file was removed, and before the next checkpoint.
    assert resumed() == (0, 0) and path.read_bytes() == b""


def test_compile_clock_does_not_count_execution():
    double = jax.jit(lambda x: 2 * x + 41)
    clock = metrics.CompileClock()
    double(jnp.ones(3))
    first = clock.seconds()
    assert first > 0
    double(jnp.zeros(3))
    assert clock.seconds() == first
    assert metrics.CompileClock().seconds() == 0


def test_floats_round_trip_bitwise(tmp_path):
    numbers = np.random.default_rng(0).normal(size=50).astype(np.float32) * np.float32(10) ** np.arange(-25, 25)
    with metrics.MetricWriter(tmp_path, resume_step=0) as log:
        log.write(1, {str(i): float(x) for i, x in enumerate(numbers)} | {"nan": float("nan")})
    (line,) = metrics.read_metrics(tmp_path)
    assert [np.float64(line[str(i)]).tobytes() for i in range(50)] == [np.float64(x).tobytes() for x in numbers]
    assert line["nan"] is None
    assert list(line)[:2] == ["step", "wall_s"]


def test_tensorboard_has_the_same_scalars_and_purges_repeated_steps(tmp_path):
    with metrics.MetricWriter(tmp_path, resume_step=0) as log:
        log.write(1, {"loss": 0.25})
        log.write(2, {"loss": 0.125})
    with metrics.MetricWriter(tmp_path, resume_step=1) as log:
        log.write(2, {"loss": 0.5})
    scalars, purged = events(tmp_path)
    assert scalars == [(1, "loss", 0.25), (2, "loss", 0.125), (2, "loss", 0.5)]
    assert purged[-1] == 2


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.MetricWriter(tmp_path / "run", resume_step=0) as log:
        log.write(1, {"loss": 1.0})
    runfiles.write_environment(tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_error_names_a_broken_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not JSON .*remove the line"):
        metrics.MetricWriter(tmp_path, resume_step=1)
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not JSON"):
        metrics.read_metrics(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_error_names_the_metrics_that_are_not_finite(bad):
    metrics.check_finite(3, {"loss": 1.0})
    with pytest.raises(UserError, match=rf"step 4: kl = {bad}, reward = nan;") as error:
        metrics.check_finite(4, {"loss": 1.0, "kl": bad, "reward": float("nan")})
    assert "\n" not in str(error.value)


def show(terminal: bool, clock, monkeypatch, width: int = 160) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with metrics.Progress(total=10, start=2, name="run", console=console) as progress:
        for step in range(3, 11):
            clock[0] += 12.0
            progress.update(step, {"loss": 0.5, "reward": -0.25, "kl": 0.1, "tokens_per_s": 200.0, "other": 1.0})
    return out.getvalue()


def test_progress_prints_lines_without_a_terminal(monkeypatch):
    lines = show(False, [0.0], monkeypatch).splitlines()
    assert lines[0] == "run step 3/10  1:24 left  loss 0.5  reward -0.25  kl 0.1  200 tokens/s"
    assert len(lines) == 8
    assert "  0:00 left  " in lines[-1]


def test_progress_shows_a_bar_on_a_terminal(monkeypatch):
    shown = show(True, [0.0], monkeypatch)
    assert "10/10" in shown and "200 tokens/s" in shown and "loss 0.5" in shown


def test_a_narrow_terminal_shows_step_and_time_left(monkeypatch):
    shown = show(True, [0.0], monkeypatch, width=60)
    assert "run ━━━━━━━━━━ 10/10 0:00 left  loss 0.5" in shown


def test_parameter_overview():
    params = {"layers": {"q": {"kernel": jnp.asarray([[1.0, 5.0]]), "bias": jnp.zeros((4,), jnp.bfloat16)}}}
    lines = metrics.parameter_overview(params, metrics.mean_and_std).splitlines()
    assert lines[0].split() == ["parameter", "shape", "type", "mean", "std"]
    assert lines[1].split() == ["layers/q/bias", "4", "bfloat16", "0", "0"]
    assert lines[2].split() == ["layers/q/kernel", "1x2", "float32", "3", "2"]
    assert lines[3] == "6 parameters, 0.0 MB"


def test_environment_has_versions_devices_and_commit(tmp_path):
    runfiles.write_environment(tmp_path, {})
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8}
    assert environment["git"] is None or len(environment["git"].rstrip("+")) == 40


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", ["sweep[/b]", "[red]a", "a:smile:b", "[/]", "a\\[b"])
def test_a_name_is_shown_as_it_is(name, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with metrics.Progress(total=2, start=0, name=name, console=console) as progress:
        progress.update(2, {"loss": 1.0})
    assert name in out.getvalue()
