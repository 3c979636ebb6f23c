"""The final evaluation of a run, and the files that it writes."""

import json
import pathlib
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from popi_jax.config import SUMMARIZED, Config
from popi_jax.data import files
from popi_jax.data.schema import Example
from popi_jax.evaluation import decomposition, evaluate, faithfulness, naming, published, report, summaries
from popi_jax.evaluation.evaluate import Evaluator, Record
from popi_jax.model.weights import Tree
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
    row = evaluate.result_row(records, config, config.method) | published.figures(config, config.method)
    if (config.data.dataset, config.objective.reference_context) == ("stylebook", "prompt") and config.method != "base":
        measured = decomposition.measure(evaluator, state.phi, theta, test, step)
        decomposition.write(workdir / "decomposition.npz", measured)
        row |= measured.terms()
    if config.method in SUMMARIZED:
        row["summaries"] = describe_summaries(evaluator, theta, test, records)
    row["evaluate_s"] = time.time() - started
    evaluate.write_records(workdir / "eval_records.jsonl", records)
    files.write_jsonl(workdir / "samples.jsonl", evaluator.respond(state.phi, theta, test, step))
    write_results(workdir, config, [row], checksum(workdir, [row]))
    if jax.process_index() == 0:
        report.write(workdir)
        print(_told(row, config.limits.summary), evaluator.sampler.encoder.overflow, workdir / "report.html", sep="\n")
    return row


def _told(row: Mapping[str, Any], limit: int) -> str:
    """Returns the result in a line or two, for the end of a run."""
    low, high = (100 * value for value in row["accuracy_ci95"])
    told = f"{row['method']}: accuracy {100 * row['accuracy']:.1f}% [{low:.1f}, {high:.1f}] on {row['n']} test pairs"
    if row.get("context_tokens_mean"):
        told += f", with {row['context_tokens_mean']:.0f} tokens of context"
    if row.get("summaries_cut"):
        told += f"\n{100 * row['summaries_cut']:.0f}% of the summaries were cut at limits.summary = {limit} tokens"
    return told


def describe_summaries(
    evaluator: Evaluator, theta: Tree | None, test: Sequence[Example], records: Sequence[Record]
) -> dict[str, object]:
    """Returns the field `summaries` of a row: what `summaries`, `faithfulness` and `naming` say of the test summaries.

    Args:
        evaluator: the one that made the records.
        theta: the generator.
        test: the test users.
        records: of the test users, by `Evaluator.records`.
    """
    by_user: dict[str, dict[int, list[Record]]] = {}
    for record in records:
        by_user.setdefault(record.user, {}).setdefault(record.row, []).append(record)
    texts_UxK = [[r.context or "" for r in next(iter(by_user[example.user].values()))] for example in test]
    h_RxK = np.array([[record.h for record in own] for rows in by_user.values() for own in rows.values()])
    prompts = evaluator.config.prompts
    told = f"{prompts.inference_instruction}\n{prompts.summary_start}"
    described = summaries.describe(texts_UxK, h_RxK, [example.signals for example in test], told)
    return {
        **described,
        "faithfulness": faithfulness.measure(evaluator, theta, test, texts_UxK),
        "naming": naming.measure(evaluator, test, texts_UxK),
    }


def checksum(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """Returns the CRC-32 of the rows and of the files with the values that they sum up."""
    crc = zlib.crc32(json.dumps(files.finite(rows)).encode())
    for name in ("eval_records.jsonl", "samples.jsonl", "decomposition.npz"):
        if (folder / name).exists():
            crc = zlib.crc32((folder / name).read_bytes(), crc)
    return crc


def write_results(
    workdir: pathlib.Path,
    config: Config,
    rows: Sequence[Mapping[str, Any]],
    crc32: int | None = None,
    by_signals: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes results.json, schema 1. A run's has a `checksum`; a table may have rows by number of signals."""
    results = {"schema": 1, "config": config.name, "dataset": config.data.dataset, "split": "test", "rows": list(rows)}
    if config.data.dataset == "alignx":
        results["variant"] = config.data.variant
    if by_signals:
        results["by_signals"] = list(by_signals)
    files.write_json(workdir / "results.json", results if crc32 is None else results | {"crc32": crc32})
