"""What a step reads: the summaries that it needs, drawn; the rows of both models, laid out on the mesh.

Shapes: U users, K summaries each, S tokens of a summary at most, M queries per user; R = U * K * M rows (u, k, m); a
step is given stacks of A micro-batches, see steps.py. Where signals are read and summaries drawn, the users are B lines
of T tokens and the summaries N branches (sampler.py); rows packed are C bins of L tokens (packing.py); x is any axis.
"""

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from popi_jax.data import packing
from popi_jax.data.schema import Example, Query
from popi_jax.errors import UserError
from popi_jax.evaluation import evaluate
from popi_jax.model import sharding
from popi_jax.modes import runfiles
from popi_jax.modes import setup as system_lib
from popi_jax.modes.setup import System
from popi_jax.rollout import pairs
from popi_jax.rollout import text as rollout
from popi_jax.rollout.pairs import Item
from popi_jax.rollout.references import References, reference_item
from popi_jax.rollout.text import Drawn
from popi_jax.training import steps
from popi_jax.training.scoring import PrefixBatch

_WRITTEN = ("user", "summary", "finished")  # The fields of a line of written_summaries.jsonl.


class WrittenSummaries:
    """One summary per example, drawn once and written out: what two_phase trains the generator on."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        try:
            self._known = {e["user"]: {name: e[name] for name in _WRITTEN} for e in runfiles.read_jsonl(path)}
        except KeyError as error:
            raise UserError(f"{path}: of another version ({error} is missing); choose another --workdir") from error

    def contexts(
        self, system: System, phi, examples: Sequence[Example], key: jax.Array
    ) -> tuple[list[list[str | None]], dict[str, float]]:
        """The examples' summaries, those that are not written yet drawn with phi, as in training; and what to log."""
        missing = [example for example in examples if example.user not in self._known]
        if missing:
            drawn = rollout.draw_summaries(system, phi, missing, key, rollout.in_training(system.config), k=1)
            fresh = [
                {"user": example.user, "summary": texts[0], "finished": finished}
                for example, texts, (finished,) in zip(
                    missing, drawn.texts_UxK, drawn.finished_UxK.tolist(), strict=True
                )
            ]
            self._known.update({entry["user"]: entry for entry in fresh})
            if jax.process_index() == 0:
                lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in fresh]
                # One write for the step: were some of its users known after a kill, the others would be drawn anew.
                with self._path.open("ab", buffering=0) as file:
                    file.write("".join(lines).encode())
        own = [self._known[example.user] for example in examples]
        return [[entry["summary"]] for entry in own], cut(np.array([entry["finished"] for entry in own]))


def make_batch(
    system: System,
    state: steps.TrainState,
    examples: Sequence[Example],
    step: int,
    kind: str,
    references: References,
    written: WrittenSummaries,
) -> tuple[Any, dict[str, Any]]:
    """Draws the summaries that this step needs and lays out its rows.

    Returns:
        The batch of the step `kind`, and counts to log: tokens scored (each once), summaries cut by the limit.
    """
    config = system.config
    k = system_lib.summaries_per_user(config, kind)
    key = system_lib.stream_key(config.seed, "sample", step)
    counts: dict[str, Any] = {}
    drawn = None
    if config.method == "popi" and kind == "generator" and config.schedule.name == "two_phase":
        contexts, counts = written.contexts(system, state.phi, examples, key)
    elif config.method in system_lib.SUMMARIZED:
        jax.block_until_ready(state.phi)  # What the step before still does is not sampling.
        started = time.perf_counter()
        drawn = rollout.draw_summaries(system, state.phi, examples, key, rollout.in_training(config), k=k)
        contexts = [list(texts) for texts in drawn.texts_UxK]
        counts = cut(drawn.finished_UxK) | {"sample_s": time.perf_counter() - started}
    else:
        contexts = [[own.text for own in some] for some in evaluate.contexts(system, None, examples, key)]
    queries = [chosen_queries(e, config.data.queries_per_user, config.seed, step, u) for u, e in enumerate(examples)]
    generator = generator_batch(system, examples, queries, contexts, references)
    tokens = generator.rows.token_count  # An array still: the host does not wait for it here.
    if kind == "generator":
        return generator, counts | {"tokens": tokens}
    assert drawn is not None  # An inference or joint step is popi's, and draws.
    inference = inference_batch(system, drawn)
    counts["tokens"] = tokens + inference.rows.token_count
    if kind == "inference":
        return (inference, generator), counts
    fewer = None
    learned = system_lib.summaries_per_user(config, "generator")
    if learned < k:
        # Their share of all bins, which varies less than their own number: few shapes.
        A, bins = generator.rows.tokens_CxL.shape[:2]
        few = [own[:learned] for own in contexts]
        least = A * bins * learned // k
        fewer = generator_batch(system, examples, queries, few, references, least)
    return (inference, generator, fewer), counts


def cut(finished_x: np.ndarray) -> dict[str, float]:
    """The share of summaries that limits.summary cut short, to log."""
    return {"summaries_cut": float(np.mean(~finished_x))}


def inference_batch(system: System, drawn: Drawn) -> steps.InferenceBatch:
    """The users' signals with their sampled summaries as branches, token for token as they were drawn; a stack."""
    samples = drawn.samples
    # K branches a user: padded to a bucket made for prompts, they could outweigh the signals.
    S = min(packing.bucket(int(samples.length_BxN.max()), system.buckets), system.config.limits.summary)
    rows = PrefixBatch(drawn.prefix_BxT, drawn.prefix_length_B, samples.tokens_BxNxS[:, :, :S], samples.length_BxN)
    batch = steps.InferenceBatch(rows, samples.logp_BxNxS[:, :, :S])
    A = system.config.train.accumulation_inference
    stack = jax.tree.map(lambda x: x.reshape(A, -1, *x.shape[1:]), batch)
    return jax.device_put(stack, sharding.stack_sharding(system.mesh))


def generator_batch(
    system: System,
    examples: Sequence[Example],
    queries: Sequence[Sequence[Query]],
    contexts: Sequence[Sequence[str | None]],
    references: References,
    least_bins: int = 0,
) -> steps.GeneratorBatch:
    """The rows (u, k, m) of a step, a stack: each user's queries under each of the user's contexts.

    Args:
        examples: the users.
        queries: of each user, at most M; where they are fewer, rows of padding keep the place of those missing.
        contexts: of each user, the same number for all.
        references: where the reference's log-probabilities come from.
        least_bins: see `pairs.pack_pairs`.
    """
    config = system.config
    M = config.data.queries_per_user
    # As many users as the inference batch has.
    R = rollout.padded_rows(system, config.train.users_per_step) * len(contexts[0]) * M
    items: list[Item | None] = [None] * R
    weight_R, ref_logp_Rx2 = np.zeros(R, np.float32), np.zeros((R, 2), np.float32)
    asked: dict[int, Item] = {}
    r = 0
    for example, own_queries, own_contexts in zip(examples, queries, contexts, strict=True):
        signals = system.encoder.raw_signals(example) if config.objective.reference_context == "signals" else ""
        for context in own_contexts:
            for place, query in enumerate(own_queries, start=r):
                items[place] = item = Item(query, context)
                asked[place] = reference_item(system, item, signals)
                weight_R[place] = M / len(own_queries)
            r += M
    if asked:
        ref_logp_Rx2[list(asked)] = references.lookup(list(asked.values()))
    packed = pairs.pack_pairs(system, items, least_bins)
    # A row counts in the micro-batch that holds it.
    weight_AxR = weight_R * np.any(packed.length_RxN > 0, axis=-1)
    ref_logp_AxRx2 = np.broadcast_to(ref_logp_Rx2, (*weight_AxR.shape, 2))
    own = jax.device_put((ref_logp_AxRx2, weight_AxR), sharding.replicated(system.mesh))
    rows = jax.device_put(packed, pairs.packed_shardings(system.mesh, sharding.stack_sharding(system.mesh)))
    return steps.GeneratorBatch(rows, *own)


def chosen_queries(example: Example, count: int, seed: int, step: int, place: int) -> list[Query]:
    """`count` of the example's queries, another draw each step; all of them, in order, where there are no more."""
    if len(example.queries) <= count:
        return list(example.queries)
    rng = np.random.default_rng((seed, system_lib.STREAMS.index("queries"), step, place))
    return [example.queries[i] for i in sorted(rng.choice(len(example.queries), count, replace=False))]
