"""Logging of a run: metrics.jsonl (the primary record), TensorBoard, progress, a table of parameters, a profile.

Only process 0 writes. Keys that end in `_s` (wall_s, tokens_per_s, ...) are times and rates on this machine. Everything
else in metrics.jsonl is bitwise identical whether or not the run was interrupted.
"""

import collections
import contextlib
import json
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TextIO

import jax
import jax.numpy as jnp
import rich.progress
import tensorboardX
from absl import logging
from rich.console import Console
from rich.table import Column, Table

from popi_jax.data import files
from popi_jax.errors import UserError, shown

METRICS_FILE = "metrics.jsonl"
SHOWN = ("loss", "reward", "accuracy", "kl")  # The progress display shows those of them that the step has.


class MetricWriter:
    """Appends one JSON object per line to metrics.jsonl, and the same scalars to TensorBoard.

    Args:
        workdir: created if missing.
        resume_step: the step that the run resumes from. Later lines and an incomplete last line are dropped.
        wall_s: seconds that the run took before this start.
        written: the `written` at that step, as the checkpoint has it.
    """

    def __init__(
        self, workdir: pathlib.Path, resume_step: int, wall_s: float = 0.0, written: Sequence[int] | None = None
    ) -> None:
        self._started = time.monotonic() - wall_s
        self._paused_s = 0.0  # Time spent on evaluations and checkpoints.
        self._before = (resume_step, self._training_s())  # Step and time of the last line with tokens.
        self._file: TextIO | None = None
        self.written = (0, 0)  # The size of the file in bytes, and their CRC-32.
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            self._count(_drop_after(workdir / METRICS_FILE, resume_step, written))
            self._file = (workdir / METRICS_FILE).open("a", encoding="utf-8")
            self._board = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"),
                purge_step=resume_step + 1,
                # The file name has a resolution of one second: without a suffix a quick restart would overwrite it.
                filename_suffix=f".{resume_step}",
            )

    def wall_s(self) -> float:
        """Returns the seconds that the run has taken, over all its starts."""
        return time.monotonic() - self._started

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time within from tokens_per_s."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - started

    def _training_s(self) -> float:
        return self.wall_s() - self._paused_s

    def write(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Writes one line, {"step", "wall_s", ...values}, and flushes it. A value that is not finite becomes null.

        Returns:
            The values; with `tokens` among them, also the tokens_per_s of training since the last such line.
        """
        wall_s, training_s = self.wall_s(), self._training_s()
        values = dict(values)
        if "tokens" in values:
            step_before, training_before = self._before
            values["tokens_per_s"] = values["tokens"] * (step - step_before) / max(training_s - training_before, 1e-9)
            self._before = (step, training_s)
        if self._file is None:
            return values
        line: dict[str, Any] = {"step": step, "wall_s": round(wall_s, 3)}
        line |= {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        text = json.dumps(line, allow_nan=False) + "\n"  # A float's repr round-trips exactly.
        self._file.write(text)
        self._file.flush()
        self._count(text.encode())
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)
        return values

    def _count(self, data: bytes) -> None:
        size, crc = self.written
        self.written = (size + len(data), zlib.crc32(data, crc))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


class CompileClock:
    """Measures the seconds that this process spends on compiling, or on reading programs from the compilation cache."""

    _total_s = 0.0
    _listening = False

    def __init__(self) -> None:
        if not CompileClock._listening:  # A listener cannot be removed, so all clocks share one.
            jax.monitoring.register_event_duration_secs_listener(CompileClock._hear)
            CompileClock._listening = True
        self._started_s = CompileClock._total_s

    @staticmethod
    def _hear(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            CompileClock._total_s += duration_secs

    def seconds(self) -> float:
        """Returns the time since the clock was made."""
        return CompileClock._total_s - self._started_s


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, [] without such a file. UserError names a line that is damaged."""
    path, lines = workdir / METRICS_FILE, []
    if not path.exists():
        return []
    for number, line in files.numbered_objects(path, "remove the file", "remove the line"):
        if type(line.get("step")) is not int:
            raise UserError(f"{path}:{number}: field 'step' is missing or not an integer; remove the line")
        wrong = [name for name, value in line.items() if not isinstance(value, int | float | None)]
        if wrong:
            raise UserError(f"{path}:{number}: field {shown(wrong[0])} is not a number; remove the line")
        lines.append(line)
    return lines


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises UserError naming the step and the metrics that are NaN or infinite: such a run learns nothing more."""
    bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"step {step}: {', '.join(bad)}; this step was not saved: run again in another --workdir with a lower"
            " config.optim.lr_inference or .lr_generator, or a lower .clip_inference or .clip_generator"
        )


class Progress:
    """Shows the progress of the run: a bar on a terminal, elsewhere a line every ten seconds.

    Args:
        total: steps of the whole run.
        start: steps already taken.
        name: the run's name.
        console: where to print; stdout by default.
    """

    def __init__(self, total: int, start: int, name: str, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total, self._name = total, name
        # A moving window, so that slow compilation at the start soon drops out of the estimate.
        self._recent = collections.deque([(time.monotonic(), start)], maxlen=20)
        self._said = 0.0
        self._bar: rich.progress.Progress | None = None
        if jax.process_index() == 0 and self._console.is_terminal:
            widths = min(len(name), 20), 10, 2 * len(f"{total}") + 1
            rest = self._console.width - sum(widths) - len(widths)
            fixed = [Column(width=width, no_wrap=True) for width in widths]
            # What does not fit into the line is left out at its end.
            shown = Column(max_width=max(rest, 10), no_wrap=True, overflow="ellipsis")
            self._bar = rich.progress.Progress(
                # A name may look like markup.
                rich.progress.TextColumn("{task.description}", markup=False, table_column=fixed[0]),
                rich.progress.BarColumn(table_column=fixed[1]),
                rich.progress.TextColumn("{task.completed}/{task.total}", table_column=fixed[2]),
                rich.progress.TextColumn("{task.fields[shown]}", table_column=shown),
                console=self._console,
            )
            self._task = self._bar.add_task(name, total=total, completed=start, shown="compiling")

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of `step` (loss, reward, accuracy, kl, tokens_per_s) and the time left."""
        if jax.process_index() != 0:
            return
        now = time.monotonic()
        first, step_first = self._recent[0]
        self._recent.append((now, step))
        left = (now - first) / max(step - step_first, 1) * (self._total - step)
        parts = [f"{_duration(left)} left", *(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)]
        if "tokens_per_s" in values:
            parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
        shown = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
        elif now - self._said >= 10 or step == self._total:
            self._said = now
            line = f"{self._name} step {step}/{self._total}  {shown}"
            self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class Profiler:
    """Traces the steps first to last (0-based, inclusive) with JAX's profiler, if this start of the run takes them."""

    def __init__(self, folder: pathlib.Path, steps_traced: Sequence[int]):
        self._folder, self._span, self._tracing = folder, steps_traced, False

    def enter(self, step: int, state: Any = None) -> None:
        """Starts the trace before the first traced `step`, and ends it before the first one beyond.

        Before it ends, it waits for `state`, the result of the previous step, so that the trace has all of that step.
        """
        inside = bool(self._span) and self._span[0] <= step <= self._span[1]
        if inside and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
        elif self._tracing and not inside:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        self._tracing = inside

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.enter(-1)


def parameter_overview(params: Any, statistics: Callable[[list[jax.Array]], Any]) -> str:
    """Returns a table of all parameters (path, shape, type, mean, standard deviation) and their total size.

    `statistics` is `mean_and_std`, compiled. It runs on the parameters' devices, so every process must call this.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    stats = jax.device_get(statistics([leaf for _, leaf in leaves]))
    table = Table("parameter", "shape", "type", box=None, pad_edge=False)
    table.add_column("mean", justify="right")
    table.add_column("std", justify="right")
    for (path, leaf), (mean, std) in zip(leaves, stats, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        table.add_row(name, "x".join(map(str, leaf.shape)) or "scalar", leaf.dtype.name, f"{mean:.3g}", f"{std:.3g}")
    console = Console(width=120, color_system=None, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    count = sum(leaf.size for _, leaf in leaves)
    megabytes = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves) / 1e6
    return f"{capture.get()}{count:,} parameters, {megabytes:,.1f} MB"


def mean_and_std(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the mean and the standard deviation of each array, in float32."""
    wide = [leaf.astype(jnp.float32) for leaf in leaves]
    return [(leaf.mean(), leaf.std()) for leaf in wide]


def _drop_after(path: pathlib.Path, step: int, written: Sequence[int] | None) -> bytes:
    """Removes the lines of later steps, and a last line that a killed process left incomplete. Returns the rest.

    UserError if they are not those that were `written` up to the step.
    """
    data = path.read_bytes() if path.exists() else b""
    if written is not None and (min(len(data), written[0]), zlib.crc32(data[: written[0]])) == tuple(written):
        files.write_bytes(path, data[: written[0]])
        return data[: written[0]]
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step] if data else []
    if not kept and written is not None:
        logging.warning("%s is missing or cut; the run continues without the metrics up to step %d", path, step)
    elif written is not None:
        raise UserError(
            f"{path}: the lines up to step {step} are not those that the run wrote; restore the file, or remove it to"
            " continue without them"
        )
    if data:
        files.write_jsonl(path, kept)
    return path.read_bytes() if data else data


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
