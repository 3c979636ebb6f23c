"""Preference accuracy on test users with its interval, over several summaries per user, and the cost in context.

A row is a test triple. Its values are means over its user's summaries.
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import pydantic

from popi_jax.config import SUMMARIZED, Config, Method
from popi_jax.data import files
from popi_jax.data.schema import Example, Query
from popi_jax.evaluation import stats, stored
from popi_jax.model.weights import Tree
from popi_jax.rollout import contexts, text
from popi_jax.rollout.contexts import Context
from popi_jax.rollout.pairs import Item, PairScorer
from popi_jax.rollout.references import References, reference_item
from popi_jax.rollout.text import TextSampler
from popi_jax.training.rng import stream_key


@dataclasses.dataclass(frozen=True)
class Record:
    """One test triple scored under one context.

    Attributes:
        row: the index of the triple in the evaluation. Records of the same row differ only in their summary.
        finished: see Context.
        h: h_theta(x, z), in nats. objective.reference_context says what the reference reads (POPI section 2).
        h_signals_ref: h with a reference that reads the raw signals (AlignX's convention).
        context_tokens: tokens of the context's text.
        person: whose triple it is, if several users of the data are one person.
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
    person: str = ""  # Runs of older versions do not have it.

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates a generator and an inference model on users.

    Attributes:
        config: the run's settings.
        sampler: draws summaries and responses.
        scorer: scores pairs.
        references: holds log pi_ref.
    """

    config: Config
    sampler: TextSampler
    scorer: PairScorer
    references: References

    def contexts(self, phi: Tree | None, examples: Sequence[Example], key: jax.Array) -> list[list[Context]]:
        """Returns the generator's contexts of each user, see `rollout.contexts.of_users`."""
        return contexts.of_users(self.config, self.sampler, phi, examples, key)

    def records(self, phi: Tree | None, theta: Tree | None, examples: Sequence[Example], step: int) -> list[Record]:
        """Scores every query of every example under every context of its user.

        The base method has no implicit reward, because its policy is the reference. Its h is log pi_ref(y+|x) -
        log pi_ref(y-|x): it prefers the likelier response.
        """
        config, encoder = self.config, self.sampler.encoder
        user_contexts = self.contexts(phi, examples, stream_key(config.seed, "evaluate", step))
        found: list[tuple[int, Example, Query, Context]] = []
        row = 0
        for example, own in zip(examples, user_contexts, strict=True):
            for query in example.queries:
                found += [(row, example, query, context) for context in own]
                row += 1
        items = [Item(query, context.told) for _, _, query, context in found]
        signals = {example.user: encoder.raw_signals(example) for example in examples}
        logps = self.scorer.logps(theta, items)
        which = config.objective.reference_context
        asked = [
            reference_item(which, item, signals[example.user])
            for (_, example, *_), item in zip(found, items, strict=True)
        ]
        shown_signals = [Item(query, signals[example.user]) for _, example, query, _ in found]
        # A later evaluation samples other summaries, so references on these are not worth caching.
        self.references.remember(shown_signals + (asked if which != "summary" else []))
        ref_logps, signal_ref_logps = self.references.lookup(asked), self.references.lookup(shown_signals)
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
                signal_tokens=encoder.cost(signals[example.user].text),
                h=float(h[i]),
                h_signals_ref=float(h_signals_ref[i]),
                person=example.person,
            )
            for i, (row, example, query, context) in enumerate(found)
        ]

    def periodic(self, phi: Tree | None, theta: Tree | None, test: Sequence[Example], step: int) -> dict[str, float]:
        """Returns the metrics of a periodic evaluation on the first eval.users test users (0: all).

        With method popi, they include the generator's accuracy if it is told the persona, where all have one, and if it
        is told nothing: how much it could gain now from what it is told.
        """
        users = self.config.eval.users
        examples = [test[i] for i in range(min(users, len(test)) if users else len(test))]
        row = result_row(self.records(phi, theta, examples, step), self.config, self.config.method)
        names = ("accuracy", "accuracy_signals_ref", "loss", "nats", "summary_tokens_mean")
        found = {f"eval_{name}": float(row[name]) for name in names}  # type: ignore[arg-type]
        if self.config.method == "popi":
            if all(example.persona for example in examples):
                found["eval_accuracy_persona"] = self._accuracy(theta, examples, "oracle")
            found["eval_accuracy_nothing"] = self._accuracy(theta, examples, "population")
        return found

    def _accuracy(self, theta: Tree | None, examples: Sequence[Example], method: Method) -> float:
        """Returns the share of queries with h > 0 if the generator is told what it is with another method."""
        encoder, which = self.sampler.encoder, self.config.objective.reference_context
        items, asked = [], []
        for example in examples:
            context = contexts.told(method, encoder, example).told
            own = [Item(query, context) for query in example.queries]
            items += own
            asked += [reference_item(which, item, encoder.raw_signals(example)) for item in own]
        if which != "summary":
            self.references.remember(asked)
        h = (self.scorer.logps(theta, items) - self.references.lookup(asked)) @ (1, -1)
        return float(np.mean(h > 0))

    def respond(
        self, phi: Tree | None, theta: Tree | None, examples: Sequence[Example], step: int
    ) -> list[dict[str, object]]:
        """Returns the lines of samples.jsonl: users, their summaries, and sampled responses beside y+ and y-."""
        config, encoder = self.config, self.sampler.encoder
        examples = [e for e in examples if e.queries][: config.eval.samples]
        if not examples:
            return []
        context_key, response_key = jax.random.split(stream_key(config.seed, "respond", step))
        first = [own[0] for own in self.contexts(phi, examples, context_key)]
        queries = [example.queries[0] for example in examples]
        items = [Item(query, context.told) for query, context in zip(queries, first, strict=True)]
        drawn = self.sampler.draw(
            theta,
            [encoder.prompt(item.query.prompt, item.told) for item in items],
            response_key,
            dataclasses.replace(text.in_use(config), batch_size=len(queries)),
            branches=1,
            max_tokens=config.eval.response_tokens,
        )
        logps = self.scorer.logps(theta, items, len(items))
        told = [encoder.raw_signals(example) for example in examples]
        which = config.objective.reference_context
        asked = [reference_item(which, item, signals) for item, signals in zip(items, told, strict=True)]
        # As in `records`: method base has no implicit reward.
        h = (logps - (0 if config.method == "base" else self.references.lookup(asked))) @ (1, -1)
        return [
            {
                "user": example.user,
                "persona": example.persona,
                "signals": signals.text,
                "signal_tokens": encoder.cost(signals.text),
                "summary": context.text if config.method in SUMMARIZED else "",
                "prompt": query.prompt,
                "response": response[0],
                "chosen": query.chosen,
                "rejected": query.rejected,
                "logp_chosen": float(logp[0]),
                "logp_rejected": float(logp[1]),
                "h": float(own),
            }
            for example, signals, context, query, response, logp, own in zip(
                examples, told, first, queries, drawn.texts_UxK, logps, h, strict=True
            )
        ]


def row_values(records: Sequence[Record], values: Sequence[float]) -> tuple[np.ndarray, list[str]]:
    """Averages values over the records (summaries) of each row, [R]; also returns the rows' groups."""
    by_row: dict[int, list[float]] = collections.defaultdict(list)
    groups: dict[int, str] = {}
    for record, value in zip(records, values, strict=True):
        by_row[record.row].append(value)
        groups[record.row] = record.group
    rows = sorted(by_row)
    return np.array([np.mean(by_row[row]) for row in rows]), [groups[row] for row in rows]


def correct(records: Sequence[Record]) -> tuple[np.ndarray, list[str]]:
    """Returns the accuracy of every row (mean over its summaries; a tie is wrong), [R], and the rows' groups."""
    return row_values(records, [float(record.h > 0) for record in records])


def nats(records: Sequence[Record], beta: float) -> tuple[np.ndarray, list[str]]:
    """Returns -log sigmoid(beta h) of every row (mean over its summaries), [R], in nats, and the rows' groups."""
    return row_values(records, [float(np.logaddexp(0.0, -beta * record.h)) for record in records])


def result_row(records: Sequence[Record], config: Config, method: str) -> dict[str, object]:
    """Returns one row of results.json."""
    accuracy_R, groups_R = correct(records)
    interval = stats.bootstrap_mean_ci(accuracy_R, groups_R, config.eval.bootstrap, seed=0)
    persons = {record.row: record.person or record.user for record in records}
    persons_R = [persons[row] for row in sorted(persons)]
    by_user = stats.bootstrap_mean_ci(accuracy_R, persons_R, config.eval.bootstrap, seed=0)
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
        "accuracy_ci95_by_user": [by_user.low, by_user.high],
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


def write_records(path: pathlib.Path, records: Sequence[Record]) -> None:
    """Writes records as JSON lines. Paired comparisons between runs read them."""
    files.write_jsonl(path, [dataclasses.asdict(record) for record in records])


def read_records(path: pathlib.Path) -> list[Record]:
    """Reads a file of `write_records`; UserError if it is damaged or another version of this code wrote it."""
    if not path.exists():
        return []
    lines = files.numbered_objects(path, stored.REMEDY, stored.REMEDY)
    return [stored.checked(line, Record, f"{path}:{number}") for number, line in lines]


def informativeness(
    population: Sequence[Record], informed: Sequence[Record], beta: float, resamples: int
) -> stats.Interval:
    """Estimates I(o; z|t), in nats: the population generator's loss minus the loss with z (POPI section 2).

    The difference is paired by row. Its interval is NaN if the two evaluations have different numbers of rows.
    """
    without_R, groups_R = nats(population, beta)
    with_R, _ = nats(informed, beta)
    if len(without_R) != len(with_R):
        return stats.Interval(math.nan, math.nan, math.nan)
    return stats.paired_bootstrap_difference(without_R, with_R, groups_R, resamples, seed=0)
