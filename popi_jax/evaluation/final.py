"""The final evaluation of a run, and the files that it writes."""

import json
import pathlib
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from popi_jax.config import Config
from popi_jax.data import files
from popi_jax.data.schema import Example
from popi_jax.evaluation import decomposition, evaluate, report
from popi_jax.evaluation.evaluate import Evaluator
from popi_jax.training.steps import TrainState

# The files that `finish` writes.
FILES = (
    "results.json",
    "eval_records.jsonl",
    "samples.jsonl",
    "decomposition.npz",
    "report.html",
    "results.png",
    "personas.png",
    "curves.png",
)


def finish(
    evaluator: Evaluator, workdir: pathlib.Path, state: TrainState, test: Sequence[Example], step: int
) -> dict[str, object]:
    """Evaluates on the test users and writes eval_records.jsonl, samples.jsonl, results.json and the report.

    Returns:
        The row of results.json.
    """
    config = evaluator.config
    theta = None if config.method == "base" else state.theta
    started = time.time()
    records = evaluator.records(state.phi, theta, test, step)
    row = evaluate.result_row(records, config, config.method)
    if (config.data.dataset, config.objective.reference_context) == ("stylebook", "prompt") and config.method != "base":
        measured = decomposition.measure(evaluator, state.phi, theta, test, step)
        decomposition.write(workdir / "decomposition.npz", measured)
        row |= measured.terms()
    row["evaluate_s"] = time.time() - started
    evaluate.write_records(workdir / "eval_records.jsonl", records)
    files.write_jsonl(workdir / "samples.jsonl", evaluator.respond(state.phi, theta, test, step))
    write_results(workdir, config, [row], checksum(workdir, [row]))
    if jax.process_index() == 0:
        report.write(workdir)
        print(f"{evaluator.sampler.encoder.overflow}\n{workdir / 'report.html'}")
    return row


def checksum(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Returns the CRC-32 of the rows and of the files with the values that they sum up."""
    crc = zlib.crc32(json.dumps(files.finite(rows)).encode())
    for name in ("eval_records.jsonl", "samples.jsonl", "decomposition.npz"):
        if (folder / name).exists():
            crc = zlib.crc32((folder / name).read_bytes(), crc)
    return crc


def write_results(
    workdir: pathlib.Path, config: Config, rows: Sequence[Mapping[str, Any]], crc32: int | None = None
) -> None:
    """Writes results.json, schema 1. A run's has a `checksum`."""
    results = {"schema": 1, "config": config.name, "dataset": config.data.dataset, "split": "test", "rows": list(rows)}
    files.write_json(workdir / "results.json", results if crc32 is None else results | {"crc32": crc32})
