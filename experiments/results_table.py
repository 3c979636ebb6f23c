"""Makes the results table of a config: every method with every seed, resumable, with paired comparisons.

    python experiments/results_table.py --config=configs/NAME.py --workdir=DIR [--methods=base,popi] [--seeds=0,1,2]
        [--nodata_texts] [--trained=DIR] [--signals=1,2,4]

Each method and seed is a separate run in DIR/METHOD_seedN. A finished run is not repeated; an interrupted one resumes.
DIR/results.json has all rows. DIR/report.html shows them with popi's curves and samples. results.md, results.tex and
results.csv have the table for other documents.
--nodata_texts is for data that may not be redistributed. It leaves the data set's texts out of the report and the
samples, and writes DIR/without_texts, which may be redistributed: copied into another DIR, its runs count as finished.
--trained=DIR trains nothing: it evaluates the runs of another table with this config, e.g. on other data.
--signals=1,2,4 also evaluates the finished runs with only the last 1, 2 and 4 signals of each test user, in
DIR/METHOD_seedN/signals_K. A user with fewer keeps all.
"""
# ruff: noqa: E402

if __name__ == "__main__":  # The other imports take seconds, in which a signal may come, too.
    from popi_jax.modes import signals

    signals.listen()

import dataclasses
import itertools
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from popi_jax import config as config_lib
from popi_jax.config import Config
from popi_jax.data import files, locks, prepared
from popi_jax.data.builders import stylebook_exact
from popi_jax.data.schema import Example
from popi_jax.errors import UserError, shown
from popi_jax.evaluation import decomposition, evaluate, final, published, report, stats, stored, tables
from popi_jax.modes import cli, compilation_cache, runfiles, setup, signals, train
from popi_jax.modes import evaluate as evaluate_mode

# The names of popi with other schedules. "popi" itself uses the config's schedule.
SCHEDULES = {
    "popi_joint": "joint",
    "popi_two_phase": "two_phase",
    "popi_alternate": "alternate",
    "inference_only": "inference_only",
    "generator_only": "generator_only",
}
# The fields of samples.jsonl with texts of the data set. A response is one of them because it may repeat its prompt.
DATA_TEXTS = ("persona", "signals", "prompt", "chosen", "rejected", "response")
WRITTEN = ("zero_shot_summary", "popi", *SCHEDULES)  # Their contexts are texts that the model wrote.
TRAINED = ("base", "population", "raw_signals", "zero_shot_summary", "oracle", "popi", *SCHEDULES)
READERS = ("raw_signals", *WRITTEN)  # Their contexts depend on the user's signals.
BY_SIGNALS = ("method", "seed", "n", "accuracy", "accuracy_ci95", "context_tokens_mean")
BAYES = ("bayes_signals", "bayes_persona")


def method_config(config: Config, method: str, seed: int) -> Config:
    """Returns the config of one method's run: the table's config with another method, schedule and seed."""
    changed: dict[str, Any] = {"seed": seed, "method": "popi" if method in SCHEDULES else method}
    schedule: dict[str, Any] = {"name": SCHEDULES.get(method, config.schedule.name)}
    # Each model gets the same number of updates as with the joint schedule.
    steps = config.schedule.steps
    if method == "popi_two_phase":
        schedule |= {"n_phi": steps, "n_theta": steps}
    if method == "popi_alternate":
        schedule |= {"n_phi": 1, "n_theta": 1, "steps": 2 * steps}
    return config_lib.changed(config, changed | {f"schedule.{key}": value for key, value in schedule.items()})


def run_method(
    config: Config,
    table: pathlib.Path,
    method: str,
    seed: int,
    trained: pathlib.Path | None,
    inputs: Mapping[str, str],
    count: int | None = None,
) -> dict[str, Any]:
    """Returns the row of the method's finished run, or runs it. With `trained`, evaluates that table's run instead.

    With `count`, evaluates the finished run with that many signals of each test user. `inputs` are the fingerprints of
    `setup.read_inputs`. A run or an evaluation is finished only with the same ones.
    """
    name = f"{method}_seed{seed}"
    workdir, shared = table / name / ("" if count is None else f"signals_{count}"), table / "shared"
    own = method_config(config, method, seed)
    trains = method == "base" or (trained is None and count is None)  # base is never trained: it has no checkpoint.
    evaluates = None if trains else (trained or table) / name
    if evaluates is not None:
        inputs = {**inputs, **evaluate_mode.checkpoint_input(evaluates)}
    row = runfiles.finished_row(workdir, own, inputs)
    if row is None:
        print(f"\n== {method}, seed {seed}" + ("" if count is None else f", signals {count}"), flush=True)
        if evaluates is None:
            row = train.train(own, workdir, shared)
        else:
            runfiles.claim(workdir, own, inputs)
            row = evaluate_mode.evaluate_checkpoint(own, evaluates, workdir, shared=shared, signals=count)
    elif not (workdir / "report.html").exists():  # The run was killed just before it.
        report.write(workdir)
    return row | {"method": method}


def bayes_rows(config: Config, seed: int, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Returns the rows of the best possible decisions given a user's signals or persona, where p* is known."""
    truths = [stylebook_exact.truth(example) for example in examples]
    rows = []
    for method, known in (
        ("bayes_signals", [truth.given_signals_Tr for truth in truths]),
        ("bayes_persona", [truth.given_persona_Tr for truth in truths]),
    ):
        correct = best_decision(np.concatenate(known))
        groups = [query.group or example.user for example in examples for query in example.queries]
        interval = stats.bootstrap_mean_ci(correct, groups, config.eval.bootstrap, seed=0)
        nats = float(np.mean(-np.log(np.concatenate(known))))
        row = {"method": method, "seed": seed, "n": len(correct), "accuracy": interval.mean, "nats": nats}
        rows.append(row | {"accuracy_ci95": [interval.low, interval.high]})
    return rows


def best_decision(p_Tr: np.ndarray) -> np.ndarray:
    """Returns 1 where the preferred response is the likelier one, 0 where it is not, and 1/2 in a tie.

    Ties are common, because signals may carry no information about a triple. Without the tolerance, rounding would
    decide them.
    """
    return np.where(np.isclose(p_Tr, 0.5, rtol=0, atol=1e-9), 0.5, p_Tr > 0.5)


def compare(config: Config, table: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds to each row its difference from popi of the same seed, and its informativeness; both are paired by row."""
    records = {
        (row["method"], row["seed"]): evaluate.read_records(
            table / f"{row['method']}_seed{row['seed']}" / "eval_records.jsonl"
        )
        for row in rows
        if row["method"] not in BAYES
    }
    for row in rows:
        own = records.get((row["method"], row["seed"]))
        popi, population = records.get(("popi", row["seed"])), records.get(("population", row["seed"]))
        if own and popi and row["method"] != "popi":
            (popi_R, groups_R), (own_R, _) = evaluate.correct(popi), evaluate.correct(own)
            gain = stats.paired_bootstrap_difference(popi_R, own_R, groups_R, config.eval.bootstrap, seed=0)
            row |= {"popi_minus_this": gain.mean, "popi_minus_this_ci95": [gain.low, gain.high]}
        if own and population and row["method"] not in ("base", "population"):
            told = evaluate.informativeness(population, own, config.objective.beta, config.eval.bootstrap)
            row |= {"informativeness_nats": told.mean, "informativeness_ci95": [told.low, told.high]}
            places = [table / f"{m}_seed{row['seed']}" / "decomposition.npz" for m in ("population", row["method"])]
            if all(place.exists() for place in places):
                blind, informed = (decomposition.read(place) for place in places)
                told = decomposition.estimate_information(blind, informed, config.eval.bootstrap)
                row |= {"estimated_information_nats": told.mean, "estimated_information_ci95": [told.low, told.high]}


def _numbered(kind: str, texts: Iterable[str]) -> dict[str, str]:
    """Returns a numbered name for each distinct text, from 1. The names sort in the order of the texts."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts), start=1)}
    width = len(str(len(places)))
    return {text: f"{kind} {place:0{width}}" for text, place in places.items()}


def _number_personas(row: dict[str, Any]) -> None:
    """Replaces the texts of the personas, which belong to the data set, by numbers in alphabetical order."""
    accuracies = row.get("accuracy_by_persona", {})
    names = _numbered("persona", sorted(accuracies))
    row["accuracy_by_persona"] = {names[text]: accuracies[text] for text in names}


def _write_without_texts(table: pathlib.Path, name: str, row: dict[str, Any]) -> None:
    """Writes the files of a finished run that this tool needs to use it in another folder, without the data's texts.

    Users, groups and personas become numbers, the same in every run of a table, so that rows can still be paired.
    """
    run, folder = table / name, table / "without_texts" / name
    records = evaluate.read_records(run / "eval_records.jsonl")
    users = _numbered("user", [record.user for record in records])
    groups = _numbered("group", [record.group for record in records])
    personas = _numbered("persona", sorted({record.persona for record in records}))
    persons = _numbered("person", sorted({record.person for record in records} - {""})) | {"": ""}
    numbered = [
        dataclasses.replace(
            record,
            user=users[record.user],
            group=groups[record.group],
            persona=personas[record.persona],
            person=persons[record.person],
            context=record.context if row["method"] in WRITTEN else None,
        )
        for record in records
    ]
    evaluate.write_records(folder / "eval_records.jsonl", numbered)
    for kept in ("config.json", "environment.json", "decomposition.npz"):
        if (run / kept).exists():
            shutil.copy(run / kept, folder / kept)
    results = stored.results(run) or {"rows": []}
    for own in results["rows"]:
        _number_personas(own)
    results["crc32"] = final.checksum(folder, results["rows"])
    files.write_json(folder / "results.json", results)


def make_table(
    config: Config,
    table: pathlib.Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    data_texts: bool = True,
    trained: pathlib.Path | None = None,
    counts: Sequence[int] = (),
) -> None:
    """Runs the missing methods and seeds, then writes and prints the table.

    Args:
        config: the table's config.
        table: the table's folder.
        methods: the methods to run.
        seeds: the seeds to run each method with.
        data_texts: False leaves DATA_TEXTS out of samples and results, and writes each run to without_texts/ in a form
            that this tool can use again.
        trained: the folder of another table. Its runs are evaluated, and nothing is trained.
        counts: the numbers of signals per test user to evaluate the finished runs of READERS with.

    Raises:
        UserError: an unknown method, oracle with users who have no persona, counts without a method that reads signals,
            or another process writes the folder.
    """
    unknown = [method for method in methods if method not in TRAINED + BAYES]
    if unknown:
        raise UserError(f"--methods: {shown(unknown[0])} is unknown; choose from {', '.join(TRAINED + BAYES)}")
    if counts and not set(methods) & set(READERS):
        raise UserError(f"--signals: no method of --methods reads signals; add one of {', '.join(READERS)}")
    # Read before the hours of training that the methods take.
    examples = prepared.find(config.data, table / "shared").examples
    inputs = setup.read_inputs(config, examples)
    tests = {count: {"test": evaluate_mode.with_signals(examples["test"], count)} for count in counts}
    fewer = {count: inputs | {"test": prepared.content_hash(test)} for count, test in tests.items()}
    if "oracle" in methods:
        nameless = [e.user for part in examples.values() for e in part if not e.persona]
        if nameless:
            raise UserError(
                f"--methods: user {shown(nameless[0])} has no persona, which oracle needs; leave out oracle"
            )
    signals.say(lambda: f"{table} has the finished runs and the checkpoints of the others")
    with locks.held(table):
        rows: list[dict[str, Any]] = []
        by_signals: list[dict[str, Any]] = []
        for seed in seeds:
            rows += [run_method(config, table, name, seed, trained, inputs) for name in methods if name in TRAINED]
            if config.data.dataset == "stylebook":
                rows += [row for row in bayes_rows(config, seed, examples["test"]) if row["method"] in methods]
            for name, count in itertools.product([name for name in methods if name in READERS], counts):
                row = run_method(config, table, name, seed, trained, fewer[count], count)
                by_signals.append({"signals": count} | {field: row[field] for field in BY_SIGNALS})
        _write_table(config, table, rows, by_signals, seeds, data_texts)


def _write_table(
    config: Config,
    table: pathlib.Path,
    rows: list[dict[str, Any]],
    by_signals: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    data_texts: bool,
) -> None:
    """Compares the rows and writes the files of the table."""
    for row in rows:  # A run's own figures may be of another name: popi_joint is a run of popi.
        for field in published.FIELDS:
            row.pop(field, None)
        row |= published.figures(config, row["method"])
    compare(config, table, rows)
    if not data_texts:
        for row in rows:
            _number_personas(row)
            if row["method"] not in BAYES:
                _write_without_texts(table, f"{row['method']}_seed{row['seed']}", row)
    final.write_results(table, config, rows, by_signals=by_signals)
    shown = table / f"popi_seed{seeds[0]}"
    for name in ("metrics.jsonl", "environment.json", "config.json"):
        if (shown / name).exists():
            shutil.copy(shown / name, table / name)
    if samples := stored.samples(shown):
        left_out = () if data_texts else DATA_TEXTS
        kept = [{key: value for key, value in sample.items() if key not in left_out} for sample in samples]
        files.write_jsonl(table / "samples.jsonl", kept)
    tables.write(table)
    report.write(table)
    tables.show({"rows": rows, "by_signals": by_signals})
    print(f"\n{table / 'report.html'}")


def _define_flags() -> None:
    # Not defined at import, because popi_jax.main has flags of the same names.
    config_flags.DEFINE_config_file("config", None, "The experiment: configs/NAME.py[:arg].", lock_config=True)
    flags.DEFINE_string("workdir", None, "The table's folder.")
    flags.DEFINE_list("methods", None, "The methods to run; config.table.methods by default.")
    flags.DEFINE_list("seeds", None, "The seeds to run; config.table.seeds by default.")
    flags.DEFINE_string("trained", None, "Another table's folder. Its runs are evaluated, and nothing is trained.")
    flags.DEFINE_list("signals", None, "Evaluates the runs with the last 1, 2, ... signals of each test user, too.")
    flags.DEFINE_bool("data_texts", True, "Whether samples and report show the data set's texts.")


def _integers(texts: Sequence[str], least: int, most: int, message: str) -> list[int]:
    """Returns the integers that a flag lists; UserError with `message` for the first text that is none or too large."""
    for text in texts:
        if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise UserError(message.format(shown(text)))
    return [int(text) for text in texts]


def _main(argv: list[str]) -> None:
    values = flags.FLAGS
    if values.config is None or values.workdir is None:
        raise UserError("--config or --workdir is missing; give both")
    config = config_lib.parse(values.config)
    if config.data.dataset != "stylebook" and set(values.methods or ()) & set(BAYES):
        raise UserError(
            f"--methods: {', '.join(BAYES)} need true probabilities, which only stylebook has; leave them out"
        )
    methods = list(config.table.methods) if values.methods is None else values.methods
    seeds, counts = list(config.table.seeds), []
    if values.seeds is not None:
        seeds = _integers(
            values.seeds, 0, 2**32 - 1, "--seeds: {} is not a seed; give integers below 2**32, such as 0,1,2"
        )
    if values.signals is not None:
        counts = _integers(
            values.signals,
            1,
            4096,
            "--signals: {} is not a number of signals; give integers from 1 to 4096, such as 1,2,4",
        )
    for flag, given in (("methods", methods), ("seeds", seeds), ("signals", counts)):
        if (not given and getattr(values, flag) is not None) or len(set(given)) < len(given):
            raise UserError(f"--{flag}: {shown(given)}; give at least one, and each only once")
    trained = None if values.trained is None else config_lib.local_path(values.trained, "--trained")
    workdir = config_lib.local_path(values.workdir, "--workdir")
    compilation_cache.enable()
    make_table(config, workdir, methods, seeds, values.data_texts, trained, counts)


if __name__ == "__main__":
    _define_flags()
    cli.run(_main)
