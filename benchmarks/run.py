"""Measures popi_jax and its peers side by side and records how they compare.

    python -m benchmarks.run [--cases=dpo_signals,sampling,...] [--data=student_phd.json] [--smallest]

`make bench` also makes the peers' environments. Each side of a case is a process of its own. Both load and warm up, and
then they take turns: ours, theirs, ours, theirs. Ratios compare neighbouring turns. bench.json, table.md and speed.png
go into OUTPUT. Run nothing else meanwhile: times from a busy machine mean little, and `load_before` shows it.
"""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import flags

from benchmarks import agreement, cases, machine, rows, summary
from benchmarks.process import MALLOC, Worker, WorkerError
from benchmarks.worker import GIVE_BACK
from popi_jax.data import files
from popi_jax.errors import UserError
from popi_jax.modes import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
NO_PEERS = "skipped: {} is missing; make bench makes it"
NO_MEMORY = "skipped: takes {} GiB"
# For every worker. The empty ones remove the tests' settings, which split the CPU into many devices, and the cache of
# compiled programs, which would hide the time that compiling takes.
ENVIRONMENT = MALLOC | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "NPROC": "",
    "JAX_COMPILATION_CACHE_DIR": "",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": str(machine.cores()),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """One run.

    Attributes:
        sizes: of its cases.
        work: the folder for its files.
        environments: the Python environment of each of the peers' sides.
        gives_back: whether a side returns freed memory to the system while it waits.
    """

    sizes: cases.Sizes
    work: pathlib.Path
    environments: Mapping[str, pathlib.Path]
    gives_back: bool = False

    def python(self, peer: str) -> pathlib.Path:
        """The interpreter that a peer runs in."""
        return self.environments[cases.side(peer)].absolute() / "bin" / "python"

    def beside(self, case: str, peer: str) -> "Bench":
        """This run for a row with the peer: both sides of Tunix's rows read what `rows.write_tunix_rows` wrote."""
        work = self.work / "tunix" if cases.side(peer) == "tunix" else self.work
        short = machine.memory_gib() < cases.GIVE_BACK_BELOW.get((case, peer), 0)
        return dataclasses.replace(self, work=work, gives_back=short)

    def worker(self, case: str, peer: str = "", *more: str) -> Worker:
        """The worker of a peer, or ours without one."""
        side, python = (cases.side(peer), str(self.python(peer))) if peer else ("ours", sys.executable)
        command = [python, "-m", "benchmarks.worker", f"--side={side}", f"--work={self.work}", f"--case={case}"]
        name = "_".join((case.replace(":", "_"), peer or side, *(flag.strip("-") for flag in more)))
        environment = ENVIRONMENT | {"HF_HOME": str(self.work / "hf"), GIVE_BACK: "1" if self.gives_back else ""}
        return Worker([*command, f"--peer={peer}", *more], self.work / "logs" / f"{name}.log", environment)


def take_turns(workers: list[Worker], repeats: int) -> list[tuple[dict, list[dict], dict]]:
    """Starts the workers one after the other, lets them take turns, and ends them.

    Returns:
        The first event, the measurements and the last event of each worker.

    Raises:
        WorkerError: one of them died.
    """
    with contextlib.ExitStack() as stack:
        ready = []
        for worker in workers:
            stack.callback(worker.stop)
            worker.start()
            ready.append(worker.read())  # The next one loads when this one has warmed up.
        turns: list[list[dict]] = [[] for _ in workers]
        for _ in range(repeats):
            for worker, own in zip(workers, turns, strict=True):
                own.append(worker.run())
        return [(first, own, worker.finish()) for first, own, worker in zip(ready, turns, workers, strict=True)]


def measure(bench: Bench, case: str, peer: str = "", note: str = "") -> dict[str, Any]:
    """One row: a case beside a peer, or alone."""
    items, unit = cases.items(case.partition(":")[0], bench.sizes)
    row: dict[str, Any] = {"case": case, "peer": peer, "unit": unit, "roofline": {}}
    if peer:
        bench = bench.beside(case, peer)
    workers = [bench.worker(case, side) for side in dict.fromkeys(("", peer))]
    try:
        found = take_turns(workers, cases.repeats(case, bench.sizes))
    except WorkerError as error:
        return row | {"note": f"failed: {error}"}
    row["ours"] = summary.side(*found[0], items)
    if not peer:
        return row | {"note": note}
    row["theirs"] = summary.side(*found[1], items)
    row["peer_versions"] = found[1][2]["versions"]
    row["gives_back"] = bench.gives_back
    return row | summary.compare(row["ours"], row["theirs"])


def check(bench: Bench, case: str, peer: str) -> dict[str, Any]:
    """Whether both sides compute the same on the same rows; see agreement.py."""
    bench = bench.beside(case, peer)
    try:
        for side in ("", peer):  # Ours first: it makes the adapters that the peer's check starts from.
            take_turns([bench.worker(case, side, "--check")], 0)
    except WorkerError as error:
        return {"agrees": False, "failed": str(error)}
    return agreement.compare(bench.work / "check", case)


def run_case(bench: Bench, case: str, versus: list[str]) -> list[dict[str, Any]]:
    """All rows of one case: one for each peer, or our side alone."""
    peers = [peer for peer in cases.PEERS.get(case, ()) if not versus or peer in versus or case == "roofline"]
    missing = {peer: bench.environments[cases.side(peer)].name for peer in peers if not bench.python(peer).exists()}
    notes = {peer: NO_PEERS.format(name) for peer, name in missing.items()}
    if len(notes) == len(peers):
        print(f"== {case}", flush=True)
        return [measure(bench, case, note="; ".join(dict.fromkeys(notes.values())))]
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
        # Once for each side, because its variants differ in speed and memory alone, and not after a failure.
        if case != "roofline" and "theirs" in row and cases.side(peer) not in checked:
            checked.add(cases.side(peer))
            row["agreement"] = check(bench, case, peer)
    return found


def run(bench: Bench, results: dict[str, Any], runs: list[str], versus: list[str], output: pathlib.Path) -> None:
    """Runs the cases. Writes the results after each, so that an interrupted run loses little."""
    for case in dict.fromkeys(["roofline", *runs]):
        for row in run_case(bench, case, versus):
            results["rows"].append(row)
            if case == "roofline" and "ours" in row:
                sides = {"ours": row["ours"], row["peer"] or "ours": row.get("theirs", row["ours"])}
                results["roofline"] = {n: summary.best_roofline(s["turns"]) for n, s in sides.items()}
            elif "ours" in row and results["roofline"]:
                # Beside the faster of both sides, which is the machine's. XLA's copy allocates memory each time.
                row["roofline"] = summary.roofline_fractions(
                    row["ours"], summary.best_roofline([*results["roofline"].values()])
                )
            if row.get("note"):
                print(f"   {row['note']}", flush=True)
        files.write_json(output / "bench.json", results)
        files.write_text(output / "table.md", summary.table(results))
        summary.plot(results, output / "speed.png")
    print("\n" + summary.table(results))
    print(output / "bench.json")


def _define_flags() -> None:
    flags.DEFINE_list("cases", list(cases.CASES[1:]), "Which cases: " + ", ".join(cases.CASES[1:]) + ".")
    flags.DEFINE_list("versus", [], "Which peers; all by default.")
    flags.DEFINE_string("peers", ".venv-peers", "The environment of TRL and transformers; without it they are skipped.")
    flags.DEFINE_string("tunix", ".venv-tunix", "The environment of Tunix; without it Tunix is skipped.")
    flags.DEFINE_string("model", "checkpoints/SmolLM2-135M-Instruct", "A hub folder; make smollm2 makes this one.")
    flags.DEFINE_string("data", None, "P-Soups' json file; random words of the same lengths by default.")
    flags.DEFINE_integer("repeats", None, "Turns of each side; the sizes' own by default.")
    flags.DEFINE_integer("largest_signals", 8192, "Leaves longer signals out of the scaling cases.")
    flags.DEFINE_bool("smallest", False, "Tries everything out on the package's tiny model; the times mean nothing.")
    flags.DEFINE_string("output", None, "A folder; benchmarks/results by default, runs/bench with --smallest.")
    flags.DEFINE_string("work", None, "Keeps rows and logs here, including the data's texts; by default removes them.")


def _check_names(flag: str, names: list[str], known: list[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--{flag}: {unknown[0]!r} is unknown; choose from {', '.join(known)}")


def main(argv: list[str]) -> None:
    """Reads the flags and runs."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"argument {argv[1]!r} is not a flag; write --name=value")
    _check_names("cases", values.cases, list(cases.CASES))
    _check_names("versus", values.versus, sorted({peer for peers in cases.PEERS.values() for peer in peers}))
    if values.repeats is not None and values.repeats < 1:
        raise UserError(f"--repeats is {values.repeats}; it must be at least 1")
    sizes = cases.SMALLEST if values.smallest else cases.Sizes()
    if values.repeats is not None:
        sizes = dataclasses.replace(sizes, repeats=values.repeats, long_repeats=values.repeats)
    model = "stylebook" if values.smallest else values.model
    output = pathlib.Path(values.output or ("runs/bench" if values.smallest else "benchmarks/results"))
    runs, left_out = cases.expand(values.cases, sizes, values.largest_signals)
    with contextlib.ExitStack() as stack:
        work = pathlib.Path(values.work or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
        given = rows.build(model, sizes, None if values.data is None else pathlib.Path(values.data))
        rows.write(work, given)
        rows.write_tunix_rows(work / "tunix", given)
        results: dict[str, Any] = {
            "schema": 2,
            "machine": machine.describe(sys.argv[1:]),
            "malloc": MALLOC,
            "model": pathlib.Path(given["model"]).name,
            **{name: given[name] for name in ("data", "lengths", "sizes")},
            "roofline": {},
            "rows": [],
            "left_out": left_out,
        }
        environments = {"trl": pathlib.Path(values.peers), "tunix": pathlib.Path(values.tunix)}
        run(Bench(sizes, work, environments), results, runs, values.versus, output)


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
