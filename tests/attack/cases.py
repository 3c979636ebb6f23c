"""Runs every case of a folder in two checkouts and writes a table of how each ended, before and after.

    python tests/attack/cases.py --cases=DIR --before=CHECKOUT --after=CHECKOUT --python=PY --output=FILE.md

A case is a folder with a run.sh, which runs in the checkout with PY set to the interpreter and T to a new empty folder.
--runs=DIR keeps a finished run of each checkout, for the cases that ask for one in RUN.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

TRACE = re.compile(r"^Traceback \(most recent call last\)|^Fatal Python error", re.MULTILINE)
EXIT = re.compile(r"\b(?:exit|rc)[ :=]+(\d+)")  # Many cases print the exit codes of the commands that they try.
TRAIN = ("-m", "popi_jax.main", "--config=configs/quickstart.py:runlocal")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a case ended: its exit code (None: stopped after the timeout), the codes it printed, a trace, last lines."""

    code: int | None
    printed: list[str]
    traced: bool
    lines: list[str]

    def cell(self) -> str:
        """Returns the outcome for a cell of a Markdown table."""
        code = "no end" if self.code is None else f"exit {self.code}"
        parts = [code, *([f"prints {' '.join(self.printed)}"] if self.printed else [])]
        parts += ["**trace**"] if self.traced else []
        shown = "<br>".join(_escaped(line[:160]) for line in self.lines)
        return f"{', '.join(parts)}<br>{shown}"


def run_case(script: pathlib.Path, checkout: pathlib.Path, python: str, run: pathlib.Path, timeout: float) -> Ended:
    """Runs one case; kills it and all that it started after `timeout` seconds."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        environment = os.environ | {"PY": python, "T": folder, "RUN": str(run), "PYTHONPATH": str(checkout)}
        process = subprocess.Popen(
            ["bash", str(script)],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace").replace(folder, "T").replace(str(run), "RUN")
    lines = [line.split("\r")[-1].strip() for line in text.splitlines()]
    return Ended(code, EXIT.findall(text), bool(TRACE.search(text)), [line for line in lines if line][-3:])


def finished_run(checkout: pathlib.Path, python: str, folder: pathlib.Path) -> pathlib.Path:
    """Returns a finished run of the checkout; trains it if the folder has none."""
    if not (folder / "report.html").exists():
        command = [python, *TRAIN, f"--workdir={folder}"]
        subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, check=True)
    return folder


def _escaped(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return "".join(char if char.isprintable() else "?" for char in text)


def main() -> int:
    """Runs the cases; returns 1 if one of them ends with a trace, or not at all, in the checkout after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cases", "before", "after", "output"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of both checkouts")
    parser.add_argument("--only", default="", help="names of cases, or their beginnings, with commas; all by default")
    parser.add_argument("--runs", type=pathlib.Path, help="where finished runs are kept; a new folder by default")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each case")
    args = parser.parse_args()
    wanted = tuple(args.only.split(","))
    scripts = [path.resolve() for path in sorted(args.cases.glob("*/run.sh")) if path.parent.name.startswith(wanted)]
    rows, bad = ["| case | before | after |", "|---|---|---|"], []
    with tempfile.TemporaryDirectory() as scratch:
        runs = (args.runs or pathlib.Path(scratch)).resolve()
        sides = {name: getattr(args, name).resolve() for name in ("before", "after")}
        finished = {name: finished_run(checkout, args.python, runs / name) for name, checkout in sides.items()}
        for script in scripts:
            name, python = script.parent.name, args.python
            ended = {s: run_case(script, sides[s], python, finished[s], args.timeout) for s in sides}
            rows.append(f"| {name} | {ended['before'].cell()} | {ended['after'].cell()} |")
            bad += [name] if ended["after"].traced or ended["after"].code is None else []
            print(f"{name}: {ended['before'].code} -> {ended['after'].code}", flush=True)
            args.output.write_text("\n".join(rows) + "\n", encoding="utf-8")  # Kept if a later case is interrupted.
    print(f"{len(scripts)} cases, trace or no end after: {', '.join(bad) or 'none'}; {args.output}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
