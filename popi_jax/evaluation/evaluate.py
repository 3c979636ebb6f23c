"""Preference accuracy on test users, with several summaries per user, intervals, and what personalization costs.

Shapes: R test triples (a value averages over the triple's summaries).
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from popi_jax.data.schema import Example, Query
from popi_jax.errors import UserError
from popi_jax.evaluation import stats
from popi_jax.modes import runfiles
from popi_jax.modes.setup import SUMMARIZED, System, stream_key
from popi_jax.rollout import pairs
from popi_jax.rollout import text as rollout
from popi_jax.rollout.pairs import Item
from popi_jax.rollout.references import References, reference_item


@dataclasses.dataclass(frozen=True)
class Context:
    """What the generator is told of a user (None: nothing); not finished where limits.summary cut a summary short."""

    text: str | None
    finished: bool = True


@dataclasses.dataclass(frozen=True)
class Record:
    """One test triple scored under one context.

    Attributes:
        row: which triple of the evaluation: records of the same row differ in their summary alone.
        finished: see Context.
        h: h_theta(x, z), in nats, the reference shown what objective.reference_context says (POPI section 2).
        h_signals_ref: h with the reference shown the raw signals (AlignX's convention).
        context_tokens: tokens of the context's text.
    """

    row: int
    user: str
    group: str
    persona: str
    provenance: str
    context: str | None
    context_tokens: int
    finished: bool
    signal_tokens: int
    h: float
    h_signals_ref: float


def contexts(system: System, phi, examples: Sequence[Example], key: jax.Array) -> list[list[Context]]:
    """What the generator is told of each user under config.method; several entries where summaries are sampled."""
    config = system.config
    method = config.method
    if method in ("base", "population"):
        return [[Context(None)]] * len(examples)
    if method == "oracle":
        nameless = next((example.user for example in examples if not example.persona), None)
        if nameless is not None:
            raise UserError(f"user {nameless!r} has no persona, which method oracle shows; give one or leave it out")
        return [[Context(example.persona)] for example in examples]
    if method == "raw_signals":
        return [[Context(system.encoder.raw_signals(example))] for example in examples]
    delta = None if method == "zero_shot_summary" else phi
    order = sorted(range(len(examples)), key=lambda i: len(system.encoder.signals(examples[i])))
    out: list[list[Context]] = [[] for _ in examples]
    sampling = rollout.in_use(config)
    for batch, start in enumerate(range(0, len(order), sampling.rows)):
        part = order[start : start + sampling.rows]
        drawn = rollout.draw_summaries(
            system,
            delta,
            [examples[i] for i in part],
            jax.random.fold_in(key, batch),
            sampling,
            k=config.eval.summaries_per_user,
        )
        for i, texts, finished in zip(part, drawn.texts_UxK, drawn.finished_UxK.tolist(), strict=True):
            out[i] = [Context(*own) for own in zip(texts, finished, strict=True)]
    return out


def evaluate(
    system: System, phi, theta, examples: Sequence[Example], references: References, step: int
) -> list[Record]:
    """Scores every query of every example under every context of its user.

    The base method has no implicit reward (its policy is the reference): its h is log pi_ref(y+|x) - log pi_ref(y-|x),
    the response that it finds likelier.
    """
    config, encoder = system.config, system.encoder
    user_contexts = contexts(system, phi, examples, stream_key(config.seed, "evaluate", step))
    found: list[tuple[int, Example, Query, Context]] = []
    row = 0
    for example, own in zip(examples, user_contexts, strict=True):
        for query in example.queries:
            found += [(row, example, query, context) for context in own]
            row += 1
    items = [Item(query, context.text) for _, _, query, context in found]
    signals = {example.user: encoder.raw_signals(example) for example in examples}
    logps = pairs.pair_logps(system, theta, items, config.eval.users_per_batch * config.eval.summaries_per_user)
    asked = [
        reference_item(system, item, signals[example.user]) for (_, example, *_), item in zip(found, items, strict=True)
    ]
    shown_signals = [Item(query, signals[example.user]) for _, example, query, _ in found]
    # References on sampled summaries are of no use to a later evaluation.
    references.remember(shown_signals + (asked if config.objective.reference_context != "summary" else []))
    ref_logps, signal_ref_logps = references.lookup(asked), references.lookup(shown_signals)
    if config.method == "base":
        ref_logps, signal_ref_logps = np.zeros_like(ref_logps), np.zeros_like(signal_ref_logps)
    h, h_signals_ref = (logps - ref_logps) @ (1, -1), (logps - signal_ref_logps) @ (1, -1)
    return [
        Record(
            row=row,
            user=example.user,
            group=query.group or example.user,
            persona=example.persona,
            provenance=query.provenance,
            context=context.text,
            context_tokens=encoder.cost(context.text),
            finished=context.finished,
            signal_tokens=encoder.cost(signals[example.user]),
            h=float(h[i]),
            h_signals_ref=float(h_signals_ref[i]),
        )
        for i, (row, example, query, context) in enumerate(found)
    ]


def row_values(records: Sequence[Record], values: Sequence[float]) -> tuple[np.ndarray, list[str]]:
    """Averages values over the records (summaries) of each row; also returns the rows' groups."""
    by_row: dict[int, list[float]] = collections.defaultdict(list)
    groups: dict[int, str] = {}
    for record, value in zip(records, values, strict=True):
        by_row[record.row].append(value)
        groups[record.row] = record.group
    rows = sorted(by_row)
    return np.array([np.mean(by_row[row]) for row in rows]), [groups[row] for row in rows]


def correct(records: Sequence[Record]) -> tuple[np.ndarray, list[str]]:
    """The accuracy of every row (mean over its summaries; strict, a tie is wrong), and the rows' groups."""
    return row_values(records, [float(record.h > 0) for record in records])


def nats(records: Sequence[Record], beta: float) -> tuple[np.ndarray, list[str]]:
    """-log sigmoid(beta h) of every row, mean over its summaries, in nats; and the rows' groups."""
    return row_values(records, [float(np.logaddexp(0.0, -beta * record.h)) for record in records])


def result_row(records: Sequence[Record], config, method: str) -> dict[str, object]:
    """One row of results.json."""
    accuracy_R, groups_R = correct(records)
    interval = stats.bootstrap_mean_ci(accuracy_R, groups_R, config.eval.bootstrap, seed=0)
    signals_ref_R, _ = row_values(records, [float(record.h_signals_ref > 0) for record in records])
    beta = config.objective.beta
    nats_R, _ = nats(records, beta)
    loss_R = nats_R / beta
    if config.objective.loss == "ipo":
        loss_R, _ = row_values(records, [(record.h - 0.5 / beta) ** 2 * beta / 2 for record in records])
    context_mean = float(np.mean([record.context_tokens for record in records]))
    by_persona = collections.defaultdict(list)
    for record in records:
        by_persona[record.persona].append(float(record.h > 0))
    return {
        "method": method,
        "seed": config.seed,
        "n": len(accuracy_R),
        "accuracy": interval.mean,
        "accuracy_ci95": [interval.low, interval.high],
        "accuracy_signals_ref": float(signals_ref_R.mean()),
        "context_tokens_mean": context_mean,
        "summary_tokens_mean": context_mean if method in SUMMARIZED else 0.0,
        "summaries_cut": float(np.mean([not record.finished for record in records])),
        "raw_signal_tokens_mean": float(np.mean([record.signal_tokens for record in records])),
        "loss": float(loss_R.mean()),
        "nats": float(nats_R.mean()),
        "informativeness_nats": None,
        "reference_context": config.objective.reference_context,
        "logp_reduction": config.objective.logp_reduction,
        "accuracy_by_persona": {k: float(np.mean(v)) for k, v in sorted(by_persona.items())}
        if 1 < len(by_persona) <= 16
        else {},
    }


def respond(system: System, phi, theta, examples: Sequence[Example], step: int) -> list[dict[str, object]]:
    """What samples.jsonl holds: users with their summary, and the generator's own response beside y+ and y-."""
    config = system.config
    examples = [e for e in examples if e.queries][: config.eval.samples]
    if not examples:
        return []
    context_key, response_key = jax.random.split(stream_key(config.seed, "respond", step))
    texts = [own[0].text for own in contexts(system, phi, examples, context_key)]
    queries = [example.queries[0] for example in examples]
    items = [Item(query, text) for query, text in zip(queries, texts, strict=True)]
    drawn = rollout.draw_text(
        system,
        theta,
        [system.encoder.prompt(query.prompt, text) for query, text in zip(queries, texts, strict=True)],
        response_key,
        dataclasses.replace(rollout.in_use(config), rows=len(queries)),
        branches=1,
        max_tokens=config.eval.response_tokens,
    )
    logps = pairs.pair_logps(system, theta, items, len(items))
    return [
        {
            "user": example.user,
            "persona": example.persona,
            "signals": system.encoder.raw_signals(example),
            "signal_tokens": system.encoder.cost(system.encoder.raw_signals(example)),
            "summary": text if config.method in SUMMARIZED else "",
            "prompt": query.prompt,
            "response": response[0],
            "chosen": query.chosen,
            "rejected": query.rejected,
            "logp_chosen": float(logp[0]),
            "logp_rejected": float(logp[1]),
        }
        for example, text, query, response, logp in zip(examples, texts, queries, drawn.texts_UxK, logps, strict=True)
    ]


def write_records(path: pathlib.Path, records: Sequence[Record]) -> None:
    """Writes records as JSON lines: what paired comparisons between runs read."""
    runfiles.write_jsonl(path, [dataclasses.asdict(record) for record in records])


def read_records(path: pathlib.Path) -> list[Record]:
    """Reads what `write_records` wrote; UserError where another version of this code did."""
    try:
        return [Record(**record) for record in runfiles.read_jsonl(path)]
    except TypeError as error:
        raise UserError(f"{path}: of another version ({error}); choose another --workdir") from error


def informativeness(
    population: Sequence[Record], informed: Sequence[Record], beta: float, resamples: int
) -> stats.Interval:
    """I(o; z|t) in nats: the population generator's loss minus the loss with z, paired by row (POPI section 2)."""
    without_R, groups_R = nats(population, beta)
    with_R, _ = nats(informed, beta)
    if len(without_R) != len(with_R):
        return stats.Interval(math.nan, math.nan, math.nan)
    return stats.paired_bootstrap_difference(without_R, with_R, groups_R, resamples, seed=0)
