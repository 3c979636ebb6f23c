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

from popi_jax import rollout, runfiles, stats
from popi_jax.data.schema import Example, Query
from popi_jax.errors import UserError
from popi_jax.rollout import Item, References
from popi_jax.system import SUMMARIZED, System, stream_key


@dataclasses.dataclass(frozen=True)
class Record:
    """One test triple scored under one context.

    Attributes:
        row: which triple of the evaluation: records of the same row differ in their summary alone.
        h: h_theta(x, z), in nats, the reference on the question only (POPI section 2).
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
    signal_tokens: int
    h: float
    h_signals_ref: float


def contexts(system: System, phi, examples: Sequence[Example], key: jax.Array) -> list[list[str | None]]:
    """What the generator is told of each user under config.method; several entries where summaries are sampled."""
    config = system.config
    method = config.method
    if method in ("base", "population"):
        return [[None]] * len(examples)
    if method == "oracle":
        nameless = next((example.user for example in examples if not example.persona), None)
        if nameless is not None:
            raise UserError(f"user {nameless!r} has no persona, which method oracle shows; give one or leave it out")
        return [[example.persona] for example in examples]
    if method == "raw_signals":
        return [[rollout.signals_context(system, example)] for example in examples]
    delta = None if method == "zero_shot_summary" else phi
    order = sorted(range(len(examples)), key=lambda i: len(rollout.encode_signals(system, examples[i])))
    out: list[list[str | None]] = [[] for _ in examples]
    rows = config.eval.users_per_batch
    for batch, start in enumerate(range(0, len(order), rows)):
        part = order[start : start + rows]
        drawn = rollout.draw_summaries(
            system,
            delta,
            [examples[i] for i in part],
            jax.random.fold_in(key, batch),
            k=config.eval.summaries_per_user,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            rows=rows,
        )
        for i, texts in zip(part, drawn.texts_UxK, strict=True):
            out[i] = list(texts)
    return out


def evaluate(
    system: System, phi, theta, examples: Sequence[Example], references: References, step: int
) -> list[Record]:
    """Scores every query of every example under every context of its user.

    The base method has no implicit reward (its policy is the reference): its h is log pi_ref(y+|x) - log pi_ref(y-|x),
    the response that it finds likelier.
    """
    config = system.config
    key = stream_key(config.seed, "evaluate", step)
    user_contexts = contexts(system, phi, examples, key)
    found: list[tuple[int, Example, Query, str | None]] = []
    row = 0
    for example, texts in zip(examples, user_contexts, strict=True):
        for query in example.queries:
            found += [(row, example, query, text) for text in texts]
            row += 1
    signals = {example.user: rollout.signals_context(system, example) for example in examples}
    # Many summaries of a trained model are the same text: each pair is scored once under each.
    unique = list(dict.fromkeys(Item(query, text) for _, _, query, text in found))
    rows = config.eval.users_per_batch * config.eval.summaries_per_user
    logps = dict(zip(unique, rollout.pair_logps(system, theta, unique, rows), strict=True))
    question = [rollout.reference_item(system, q, text, signals[e.user]) for _, e, q, text in found]
    shown_signals = [Item(query, signals[example.user]) for _, example, query, _ in found]
    references.remember([Item(item.query, None) for item in unique] + shown_signals)
    ref_logps, signal_ref_logps = references.lookup(question), references.lookup(shown_signals)
    costs = {text: rollout.context_tokens(system, text) for text in {text for *_, text in found}}
    signal_costs = {user: rollout.context_tokens(system, text) for user, text in signals.items()}
    records = []
    for (row, example, query, text), ref, signal_ref in zip(found, ref_logps, signal_ref_logps, strict=True):
        logp = logps[Item(query, text)]
        if config.method == "base":
            ref = signal_ref = np.zeros(2, np.float32)
        records.append(
            Record(
                row=row,
                user=example.user,
                group=example.group or example.user,
                persona=example.persona,
                provenance=query.provenance,
                context=text,
                context_tokens=costs[text],
                signal_tokens=signal_costs[example.user],
                h=float((logp - ref)[0] - (logp - ref)[1]),
                h_signals_ref=float((logp - signal_ref)[0] - (logp - signal_ref)[1]),
            )
        )
    return records


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
    is_summary = method in SUMMARIZED
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
        "summary_tokens_mean": context_mean if is_summary else 0.0,
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
    texts = [own[0] for own in contexts(system, phi, examples, context_key)]
    queries = [example.queries[0] for example in examples]
    items = [Item(query, text) for query, text in zip(queries, texts, strict=True)]
    prompts = [rollout.encode_item(system, item)[0] for item in items]
    delta = None if config.method == "base" else theta
    responses, _ = rollout.draw_text(
        system,
        delta,
        prompts,
        response_key,
        branches=1,
        max_tokens=config.eval.response_tokens,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        rows=len(prompts),
    )
    logps = rollout.pair_logps(system, delta, items, len(items))
    return [
        {
            "user": example.user,
            "persona": example.persona,
            "signals": rollout.signals_context(system, example),
            "signal_tokens": rollout.context_tokens(system, rollout.signals_context(system, example)),
            "summary": text if config.method in SUMMARIZED else "",
            "prompt": query.prompt,
            "response": response[0],
            "chosen": query.chosen,
            "rejected": query.rejected,
            "logp_chosen": float(logp[0]),
            "logp_rejected": float(logp[1]),
        }
        for example, text, query, response, logp in zip(examples, texts, queries, responses, logps, strict=True)
    ]


def write_records(path: pathlib.Path, records: Sequence[Record]) -> None:
    """Writes records as JSON lines: what paired comparisons between runs read."""
    runfiles.write_jsonl(path, [dataclasses.asdict(record) for record in records])


def read_records(path: pathlib.Path) -> list[Record]:
    """Reads what `write_records` wrote."""
    return [Record(**record) for record in runfiles.read_jsonl(path)]


def informativeness(
    population: Sequence[Record], informed: Sequence[Record], beta: float, resamples: int
) -> stats.Interval:
    """I(o; z|t) in nats: the population generator's loss minus the loss with z, paired by row (POPI section 2)."""
    without_R, groups_R = nats(population, beta)
    with_R, _ = nats(informed, beta)
    if len(without_R) != len(with_R):
        return stats.Interval(math.nan, math.nan, math.nan)
    return stats.paired_bootstrap_difference(without_R, with_R, groups_R, resamples, seed=0)
