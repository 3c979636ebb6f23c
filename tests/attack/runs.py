"""Starts the commands of a small run as a user would, and says what a finished folder holds."""

import csv
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
from orbax.checkpoint import v1

ROOT = pathlib.Path(__file__).parent.parent.parent
ENV = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"JAX_PLATFORMS": "cpu"}
CONFIG = (
    f"--config={ROOT}/configs/quickstart.py:runlocal",
    "--config.schedule.steps=4",
    "--config.train.checkpoint_every=1",
    "--config.eval.every=2",
    "--config.eval.users=4",
    "--config.eval.users_per_batch=8",
    "--config.eval.bootstrap=10",
)
ALTERNATE = ("--config.schedule.name=alternate", "--config.schedule.n_phi=1", "--config.schedule.n_theta=1")
TWO_PHASE = ("--config.schedule.name=two_phase", "--config.schedule.n_phi=2", "--config.schedule.n_theta=2")
# Files whose bytes depend on times, like the crc32 in results.json. Their presence is compared, not their contents.
TIMED = ("environment.json", "report.html", "dataset_info.json", "lock")
LEFT_OUT = ("tensorboard", "checkpoints", "cache")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command whose files are compared: `{run}` is a finished run, `{out}` the folder that the command fills."""

    arguments: tuple[str, ...]

    def start(self, out: pathlib.Path, run: pathlib.Path | None = None) -> subprocess.Popen[str]:
        """Starts it in a process group of its own, so that a kill reaches its children too."""
        filled = [argument.replace("{out}", str(out)).replace("{run}", str(run)) for argument in self.arguments]
        return subprocess.Popen(
            [sys.executable, *filled],
            cwd=ROOT,
            env=ENV,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def finish(self, out: pathlib.Path, run: pathlib.Path | None = None) -> str:
        """Runs it to its end, which must be a success; returns what it printed on stderr."""
        process = self.start(out, run)
        shown = process.communicate(timeout=900)[1]
        assert process.returncode == 0, f"exit {process.returncode}: {shown}"
        return shown


def main(mode: str, workdir: str, *flags: str) -> Command:
    """Returns a command of popi_jax.main."""
    return Command(("-m", "popi_jax.main", *CONFIG, f"--mode={mode}", f"--workdir={workdir}", *flags))


COMMANDS = {
    "joint": main("train", "{out}/run"),
    "alternate": main("train", "{out}/run", *ALTERNATE),
    "two_phase": main("train", "{out}/run", *TWO_PHASE),
    "evaluate": main("evaluate", "{run}", "--output={out}/evaluation"),
    "summarize": main("summarize", "{run}", "--input={run}/../users.jsonl", "--output={out}/summaries.jsonl"),
    "generate": main("generate", "{run}", "--input={run}/../prompts.jsonl", "--output={out}/responses.jsonl"),
    "export": main("export", "{run}", "--output={out}/exported"),
    "table": Command(("experiments/results_table.py", *CONFIG, "--workdir={out}/table", "--methods=base,popi")),
}


def make_inputs(folder: pathlib.Path) -> None:
    """Writes a users.jsonl and a prompts.jsonl of several batches."""
    users = [
        {"user": f"u{i}", "signals": [{"kind": "profile", "text": f"Likes short answers, and cats {i}."}]}
        for i in range(40)
    ]
    prompts = [{"prompt": f"How do I bake bread number {i}?", "summary": "Likes lists."} for i in range(40)]
    for name, rows in (("users.jsonl", users), ("prompts.jsonl", prompts)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what every file of a folder holds, by relative path, without times. Checkpoints give their checksums."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        assert not any(mark in str(name) for mark in (".tmp", "incomplete", "orbax-checkpoint-tmp")), f"left: {name}"
        if path.parent.name == "checkpoints" and path.name.isdigit():
            record = json.loads(v1.checkpointables_metadata(path).custom_metadata["record"])
            found[str(name)] = record["crc32c"]
        elif path.is_file() and not set(LEFT_OUT) & set(name.parts):
            found[str(name)] = _value(path)
    return found


def _value(path: pathlib.Path) -> Any:
    if path.name in TIMED or path.suffix == ".png" or ".array_record" in path.name:
        return "present"
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {key: arrays[key].tobytes() for key in arrays.files}
    if path.suffix == ".jsonl":
        return [_untimed(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as rows:
            return [_untimed(row) for row in csv.DictReader(rows)]
    if path.suffix == ".json":
        return _untimed(json.loads(path.read_text(encoding="utf-8")))
    return path.read_bytes()


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(entry) for key, entry in value.items() if not key.endswith("_s") and key != "crc32"}
    return [_untimed(entry) for entry in value] if isinstance(value, list) else value
