"""Runs popi_jax and its peers side by side on the same rows, in turns, and says how they compare.

    python -m benchmarks.run [--cases=dpo_signals,sampling,...] [--data=student_phd.json] [--smallest]

`make bench` also makes the peers' environments. Every side of every case is a process of its own, which loads and warms
up first; then they take turns: ours, theirs, ours, theirs. Ratios are of one run's turns. OUTPUT gets bench.json,
table.md and speed.png. Times of a machine that does anything else say little: `load_before` is in the results.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import flags

from benchmarks import agreement, cases, machine, rows, summary
from benchmarks.protocol import GIVE_BACK, Worker, WorkerError
from popi_jax.errors import UserError
from popi_jax.modes import cli, runfiles

ROOT = pathlib.Path(__file__).resolve().parents[1]
NO_PEERS = "skipped: {} is missing; make bench makes it"
NO_MEMORY = "skipped: takes {} GiB"
# Of every worker. On the CPU; without the settings of tests, which make many devices of one, and without compiled
# programs of another time, which would hide what compiling takes.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "NPROC": "", "JAX_COMPILATION_CACHE_DIR": ""}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT)}


@dataclasses.dataclass(frozen=True)
class Bench:
    """One run: how large, where its files lie, the environment of each of the peers' workers, and whether a side that
    waits gives freed memory back.
    """

    sizes: cases.Sizes
    work: pathlib.Path
    environments: Mapping[str, pathlib.Path]
    gives_back: bool = False

    def environment(self, peer: str) -> pathlib.Path:
        """The environment that a peer's worker runs in."""
        return self.environments[cases.worker(peer)]

    def has(self, peer: str) -> bool:
        """Whether the peer's environment is there."""
        return (self.environment(peer) / "bin" / "python").exists()

    def beside(self, case: str, peer: str) -> "Bench":
        """This run beside a peer: both sides of Tunix's rows work on what `rows.write_tunix_rows` leaves."""
        work = self.work / "tunix" if cases.worker(peer) == "tunix_peer" else self.work
        short = machine.memory_gib() < cases.GIVE_BACK_BELOW.get((case, peer), 0)
        return dataclasses.replace(self, work=work, gives_back=short)

    def ours(self, case: str, *more: str) -> Worker:
        """Our worker for this case."""
        command = [sys.executable, "-m", "benchmarks.ours", f"--work={self.work}", f"--case={case}", *more]
        return Worker(command, self._log(case, "ours", more), ENVIRONMENT | self._memory())

    def theirs(self, case: str, peer: str, *more: str) -> Worker:
        """The peer's worker for this case."""
        command = [str(self.environment(peer).absolute() / "bin" / "python"), "-m", f"benchmarks.{cases.worker(peer)}"]
        command += [f"--work={self.work}", f"--case={case}", f"--variant={peer}", *more]
        environment = ENVIRONMENT | self._memory()
        environment |= {
            "OMP_NUM_THREADS": str(machine.cores()),
            "HF_HOME": str(self.work / "hf"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
        }
        return Worker(command, self._log(case, peer, more), environment)

    def _memory(self) -> dict[str, str]:
        return {GIVE_BACK: "1"} if self.gives_back else {}

    def _log(self, case: str, side: str, more: tuple[str, ...]) -> pathlib.Path:
        name = "_".join((case.replace(":", "_"), side, *(flag.strip("-") for flag in more)))
        return self.work / "logs" / f"{name}.log"


def take_turns(workers: list[Worker], repeats: int) -> list[tuple[dict, list[dict], dict]]:
    """Starts the workers one after the other, lets them take turns, and ends them.

    Returns:
        Of each worker its "ready", its measurements and its last word.

    Raises:
        WorkerError: one of them died.
    """
    with contextlib.ExitStack() as stack:
        ready = []
        for worker in workers:
            stack.callback(worker.stop)
            worker.start()
            ready.append(worker.read())  # The next one loads when this one is at rest.
        turns: list[list[dict]] = [[] for _ in workers]
        for _ in range(repeats):
            for worker, own in zip(workers, turns, strict=True):
                own.append(worker.run())
        return [(first, own, worker.finish()) for first, own, worker in zip(ready, turns, workers, strict=True)]


def measure(bench: Bench, case: str, peer: str | None, note: str = "") -> dict[str, Any]:
    """One row: a case against a peer, or alone."""
    kind, repeats = case.partition(":")[0], cases.repeats(case, bench.sizes)
    items, unit = cases.items(kind, bench.sizes)
    row: dict[str, Any] = {"case": case, "peer": peer or "", "unit": unit, "roofline": {}}
    workers = [bench.ours(case)]
    if peer is not None:
        bench = bench.beside(case, peer)
        workers = [bench.ours(case), bench.theirs(case, peer)]
    try:
        found = take_turns(workers, repeats)
    except WorkerError as error:
        return row | {"note": f"failed: {error}"}
    row["ours"] = summary.side(*found[0], items)
    if peer is None:
        return row | {"note": note}
    row["theirs"] = summary.side(*found[1], items)
    row["peer_versions"] = found[1][2]["versions"]
    row["gives_back"] = bench.gives_back
    return row | summary.compare(row["ours"], row["theirs"])


def check(bench: Bench, case: str, peer: str) -> dict[str, Any]:
    """Whether both sides compute the same on the same rows; see agreement.py."""
    bench = bench.beside(case, peer)
    try:
        for worker in (bench.ours(case, "--check"), bench.theirs(case, peer, "--check")):
            take_turns([worker], 0)
    except WorkerError as error:
        return {"agrees": False, "failed": str(error)}
    return agreement.compare(bench.work / "check", case)


def run_case(bench: Bench, case: str, versus: list[str]) -> list[dict[str, Any]]:
    """All rows of one case: one for each peer, or ours alone."""
    peers = [peer for peer in cases.PEERS.get(case, ()) if not versus or peer in versus or case == "roofline"]
    notes = {peer: NO_PEERS.format(bench.environment(peer).name) for peer in peers if not bench.has(peer)}
    if len(notes) == len(peers):
        print(f"== {case}", flush=True)
        return [measure(bench, case, None, "; ".join(dict.fromkeys(notes.values())))]
    found: list[dict[str, Any]] = []
    checked: set[str] = set()
    for peer in peers:
        print(f"== {case}, {peer}", flush=True)
        if (needs := cases.needs_gib(case, peer, bench.sizes)) > machine.memory_gib():
            notes[peer] = NO_MEMORY.format(needs)
        if peer in notes:
            found.append({"case": case, "peer": peer, "note": notes[peer]})
            continue
        row = measure(bench, case, peer)
        found.append(row)
        # One of a worker's peers, which differ in speed and memory alone; not one that has just failed.
        if case != "roofline" and "theirs" in row and cases.worker(peer) not in checked:
            checked.add(cases.worker(peer))
            row["agreement"] = check(bench, case, peer)
    return found


def run(bench: Bench, wanted: list[str], versus: list[str], largest_signals: int, output: pathlib.Path) -> None:
    """Runs the cases; writes what is there after each, so that an end before its time loses little."""
    model = bench_rows(bench)
    runs, left_out = cases.expand(wanted, bench.sizes, largest_signals)
    results: dict[str, Any] = {
        "schema": 1,
        "machine": machine.describe(sys.argv[1:]),
        "model": pathlib.Path(model["model"]).name,
        "data": model["data"],
        "lengths": model["lengths"],
        "sizes": dataclasses.asdict(bench.sizes),
        "roofline": {},
        "rows": [],
        "left_out": left_out,
    }
    for case in ["roofline", *runs]:
        for row in run_case(bench, case, versus):
            results["rows"].append(row)
            if case == "roofline" and "ours" in row:
                sides = {"ours": row["ours"], row["peer"] or "ours": row.get("theirs", row["ours"])}
                results["roofline"] = {n: summary.best_roofline(s["turns"]) for n, s in sides.items()}
            elif "ours" in row and results["roofline"]:
                # Against the faster of both: it is the machine's. (XLA's copy pays for fresh memory each time.)
                row["roofline"] = summary.roofline_fractions(
                    row["ours"], summary.best_roofline([*results["roofline"].values()])
                )
            if "note" in row and row["note"]:
                print(f"   {row['note']}", flush=True)
        write(output, results)
    print("\n" + summary.table(results))
    print(output / "bench.json")


def bench_rows(bench: Bench) -> dict[str, Any]:
    """The rows that `main` wrote."""
    return json.loads((bench.work / "rows.json").read_text(encoding="utf-8"))


def write(output: pathlib.Path, results: dict[str, Any]) -> None:
    """The files of a run."""
    runfiles.write_text(output / "bench.json", json.dumps(results, indent=1) + "\n")
    runfiles.write_text(output / "table.md", summary.table(results))
    summary.plot(results, output / "speed.png")


def _define_flags() -> None:
    flags.DEFINE_list("cases", list(cases.CASES[1:]), "Which, of " + ", ".join(cases.CASES[1:]) + ".")
    flags.DEFINE_list("versus", [], "Which peers; all by default.")
    flags.DEFINE_string("peers", ".venv-peers", "The environment of TRL and transformers; without it they are skipped.")
    flags.DEFINE_string("tunix", ".venv-tunix", "The environment of Tunix, likewise.")
    flags.DEFINE_string("model", "checkpoints/SmolLM2-135M-Instruct", "A hub folder; make smollm2 makes this one.")
    flags.DEFINE_string("data", None, "P-Soups' json file; random words of the same lengths by default.")
    flags.DEFINE_integer("repeats", None, "Turns of each side; the sizes' own by default.")
    flags.DEFINE_integer("largest_signals", 8192, "Leaves larger sizes out of scaling_signals.")
    flags.DEFINE_bool("smallest", False, "The tiny model of the package, one turn: seconds, and of no meaning.")
    flags.DEFINE_string("output", None, "A folder; benchmarks/results by default, runs/bench for --smallest.")
    flags.DEFINE_string("work", None, "Keeps rows and logs here, data texts included; else they are removed.")


def main(argv: list[str]) -> None:
    """Reads the flags and runs."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"argument {argv[1]!r} is not a flag; write --name=value")
    unknown = [case for case in values.cases if case not in cases.CASES]
    if unknown:
        raise UserError(f"--cases: {unknown[0]!r} is unknown; choose from {', '.join(cases.CASES[1:])}")
    known = sorted({peer for peers in cases.PEERS.values() for peer in peers})
    unknown = [peer for peer in values.versus if peer not in known]
    if unknown:
        raise UserError(f"--versus: {unknown[0]!r} is unknown; choose from {', '.join(known)}")
    if values.repeats is not None and values.repeats < 1:
        raise UserError(f"--repeats is {values.repeats}; it must be at least 1")
    sizes = cases.SMALLEST if values.smallest else cases.Sizes()
    if values.repeats is not None:
        sizes = dataclasses.replace(sizes, repeats=values.repeats, long_repeats=values.repeats)
    model = "stylebook" if values.smallest else values.model
    default = "runs/bench" if values.smallest else "benchmarks/results"
    output = pathlib.Path(values.output or default)
    data = None if values.data is None else pathlib.Path(values.data)
    with contextlib.ExitStack() as stack:
        work = pathlib.Path(values.work or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
        given = rows.build(model, sizes, data) | {"sizes": dataclasses.asdict(sizes), "threads": machine.cores()}
        rows.write(work / "rows.json", given)
        rows.write_tunix_rows(work / "tunix", given)
        wanted = [case for case in values.cases if case != "roofline"]
        environments = {"trl_peer": pathlib.Path(values.peers), "tunix_peer": pathlib.Path(values.tunix)}
        run(Bench(sizes, work, environments), wanted, values.versus, values.largest_signals, output)


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
