"""Each model reads what the method shows it: whole steps and an evaluation, on the stylebook checkpoint."""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.config import SUMMARIZED, Config, changed, parse
from popi_jax.configs import quickstart
from popi_jax.data.batch import Batch, GeneratorBatch, PackedBatch
from popi_jax.data.builders.stylebook import draw_example
from popi_jax.data.schema import Example, Query
from popi_jax.evaluation import faithfulness
from popi_jax.evaluation.evaluate import Evaluator
from popi_jax.model.attention import ROW
from popi_jax.modes import setup
from popi_jax.training import schedule
from popi_jax.training.batches import BatchMaker, WrittenSummaries, chosen_queries

STEP, K, M = 4, 3, 2  # Steps taken before; summaries and queries per user.


def user(split: str, index: int, kinds: tuple[str, ...], queries: int) -> Example:
    """A stylebook user with signals of these kinds alone, which have few tokens."""
    example = draw_example(5, split, index, signals=3, queries=queries)
    return dataclasses.replace(example, signals=tuple(s for s in example.signals if s.kind in kinds))


TRAIN = [
    user("train", 0, ("pair",), 4),  # More queries than M, so that some are drawn.
    user("train", 1, ("comment",), 1),
    user("train", 2, ("profile", "comment"), 3),
]
TEST = [user("test", i, (kind,), 2) for i, kind in enumerate(("pair", "comment", "profile", "pair"))]
LENGTH = 160  # Of every prompt and bin, so that there are few shapes.


def method_config(method: str, name: str, reference: str, k_generator: int) -> Config:
    values = {
        "method": method,
        "schedule.name": name,
        "schedule.n_phi": 0,
        "objective.reference_context": reference,
        "sampling.k": K,
        "sampling.k_generator": k_generator,
        "sampling.temperature": 0.7,
        "data.queries_per_user": M,
        "limits.summary": 6,
        "limits.bin": LENGTH,
        "limits.buckets": (LENGTH,),
        "train.users_per_step": len(TRAIN),
        "eval.users_per_batch": len(TRAIN),  # The test users take two batches.
        "eval.summaries_per_user": K,
        "eval.temperature": 0.7,
        "mesh.data": 1,
    }
    return changed(parse(quickstart.get_config("runlocal")), values)


def signals_text(example: Example) -> str:
    texts = {
        "pair": "Prompt: {0.prompt}\nPreferred: {0.chosen}\nRejected: {0.rejected}",
        "comment": "Prompt: {0.prompt}\nThe user wrote: {0.text}",
        "profile": "About the user: {0.text}",
    }
    shown = enumerate((texts[signal.kind].format(signal) for signal in example.signals), start=1)
    return "\n\n".join(f"### Example {i}\n{text}" for i, text in shown)


class Row(NamedTuple):
    """A query, what the generator is told of the user, and what the reference is."""

    query: Query
    told: str | None
    reference: str | None


class Recorder:
    """A program that keeps its second argument, the other arguments and the result of each call."""

    def __init__(self, program):
        self.program, self.calls = program, []

    def __call__(self, base, delta, *arguments, **options):
        result = self.program(base, delta, *arguments, **options)
        self.calls.append((delta, jax.device_get(arguments), jax.device_get(result)))
        return result


class Watched:
    """A run whose programs are recorded; beside it, what they should read and score, without the pipeline."""

    def __init__(self, config: Config, folder: pathlib.Path):
        self.config, self.folder = config, folder
        self.run = setup.load(config).fitted({"train": TRAIN, "test": TEST})
        self.draws, self.scores = Recorder(self.run.programs.sample), Recorder(self.run.programs.score)
        self.sampler = dataclasses.replace(self.run.sampler, sample=self.draws)
        self.references = self.run.references(folder)
        state = self.run.initial_state()
        self.state = dataclasses.replace(state, phi=noisy(state.phi, 1), theta=noisy(state.theta, 2))

    def batch(self, kind: str) -> Batch:
        written = WrittenSummaries(self.folder / "written_summaries.jsonl")
        maker = BatchMaker(self.config, self.sampler, self.run.scorer, self.references, written)
        return maker.make(self.state.phi, self.state.theta, TRAIN, STEP, kind)[0]

    def evaluator(self) -> Evaluator:
        scorer = dataclasses.replace(self.run.scorer, score=self.scores)
        return Evaluator(self.config, self.sampler, scorer, self.references)

    def told(self, phi, examples: list[Example]) -> list[list[str | None]]:
        """What the generator should be told of each user: of summaries, those that were drawn with phi."""
        if self.config.method not in SUMMARIZED:
            assert not self.draws.calls
            texts = {"raw_signals": signals_text, "oracle": lambda example: example.persona}
            return [[texts.get(self.config.method, lambda _: None)(example)] for example in examples]
        instruction, tokenizer = self.config.prompts.inference_instruction, self.run.encoder.tokenizer
        users = {self._render(f"{signals_text(example)}\n\n{instruction}"): example.user for example in examples}
        drawn = {}
        for delta, (prompt_BxT, length_B, _), samples in self.draws.calls:
            assert delta is (phi if self.config.method == "popi" else None)
            for b in np.flatnonzero(length_B):
                own = zip(samples.tokens_BxNxS[b], samples.length_BxN[b], strict=True)
                prompt = tuple(prompt_BxT[b, : length_B[b]].tolist())
                drawn[users[prompt]] = [tokenizer.decode(ids[:length]).strip() for ids, length in own]
        self.draws.calls.clear()
        return [drawn[example.user] for example in examples]

    def row(self, example: Example, query: Query, told: str | None) -> Row:
        contexts = {"prompt": None, "summary": told, "signals": signals_text(example)}
        return Row(query, told, contexts[self.config.objective.reference_context])

    def prompt(self, query: Query, told: str | None) -> tuple[int, ...]:
        if told is None:
            return self._render(query.prompt)
        instruction = self.config.prompts.generator_instruction
        return self._render(f"About the user:\n{told}\n\n{instruction}\n\nPrompt: {query.prompt}")

    def read(self, query: Query, told: str | None) -> tuple[tuple[int, ...], ...]:
        """The prompt with y+, and with y-."""
        prompt, tokenizer = self.prompt(query, told), self.run.encoder.tokenizer
        return tuple((*prompt, *tokenizer.encode(y), tokenizer.end_id) for y in (query.chosen, query.rejected))

    def logps(self, delta, query: Query, told: str | None) -> tuple[float, ...]:
        """The log-probabilities of y+ and y-, each a plain sequence with its prompt."""
        start, both = len(self.prompt(query, told)), self.read(query, told)
        tokens_2xL = np.array([[*ids, *[0] * (LENGTH - len(ids))] for ids in both])
        logp_2xL = np.asarray(next_logps(self.run.programs.policy)(self.run.base, delta, tokens_2xL))
        return tuple(logp_L[start - 1 : len(ids) - 1].sum() for logp_L, ids in zip(logp_2xL, both, strict=True))

    def margin(self, delta, row: Row) -> float:
        """Equation (1); without a reference for the base method, whose policy it would be."""
        chosen, rejected = self.logps(delta, row.query, row.told)
        ref_chosen, ref_rejected = (0, 0)
        if self.config.method != "base":
            ref_chosen, ref_rejected = self.logps(None, row.query, row.reference)
        return (chosen - ref_chosen) - (rejected - ref_rejected)

    def assert_reads(self, generator: GeneratorBatch, row_UxKxM) -> None:
        """Holds the generator's rows, and the reference's log-probabilities of them, against those expected."""
        rows = [row for row_KxM in row_UxKxM for row_M in row_KxM for row in row_M]
        generator = jax.tree.map(lambda x: np.asarray(x)[0], generator)
        assert read_rows(generator.bins) == [row and self.read(row.query, row.told) for row in rows]
        for row, ref_logp_2 in zip(rows, generator.ref_logp_Rx2, strict=True):
            expected = self.logps(None, row.query, row.reference) if row else (0, 0)
            np.testing.assert_allclose(ref_logp_2, expected, rtol=1e-4)

    def _render(self, content: str) -> tuple[int, ...]:
        return tuple(self.run.encoder.tokenizer.render([{"role": "user", "content": content}]))


def noisy(tree, seed: int):
    """The tree with other weights, so that its texts and scores are not those of the checkpoint that it comes from."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x * (1 + 0.3 * rng.normal(size=x.shape)), x.dtype), tree)


@functools.cache
def next_logps(policy):
    @jax.jit
    def logps(base, delta, tokens_BxL):
        """The log-probability of the token after each."""
        index_BxL = jnp.broadcast_to(jnp.arange(LENGTH)[None], tokens_BxL.shape)
        decoder = policy.bind(base, delta)
        logp_BxLxV = jax.nn.log_softmax(decoder.logits(decoder(tokens_BxL, index_BxL, jnp.zeros_like(index_BxL))))
        return jnp.take_along_axis(logp_BxLxV, jnp.roll(tokens_BxL, -1, axis=1)[..., None], axis=-1)[..., 0]

    return logps


def read_rows(bins: PackedBatch) -> list[tuple[tuple[int, ...], ...] | None]:
    """The two sequences that are read of each row, as the predictor of its last token sees them; None at padding."""
    L, N = bins.tokens_CxL.shape[1], bins.length_RxN.shape[1]
    found = {}
    # A branch's tokens are in order: its last one stays.
    for predictor, target, branch in zip(bins.predictor_ShxW[0], bins.target_ShxW[0], bins.branch_ShxW[0], strict=True):
        c, i = divmod(int(predictor), L)
        own = int(bins.segments_CxL[c, i])
        visible_L = np.isin(bins.segments_CxL[c], (own, own // ROW * ROW)) & (np.arange(L) <= i)
        found[int(branch)] = (*bins.tokens_CxL[c, visible_L].tolist(), int(target))
    real_R = (bins.length_RxN > 0).any(axis=1).tolist()
    return [
        tuple(found[int(first) * N + n] for n in range(N)) if real else None
        for first, real in zip(bins.first_R, real_R, strict=True)
    ]


def checked_batch(own: Watched, kind: str, shown: int, learned: int):
    """The batch of a step, and its rows [U, K, M], which it was held against; None where a user has fewer queries."""
    batch = own.batch(kind)
    row_UxKxM = []
    for place, (example, told_K) in enumerate(zip(TRAIN, own.told(own.state.phi, TRAIN), strict=True)):
        queries = chosen_queries(example, M, own.config.seed, STEP, place)
        padding = [None] * (M - len(queries))
        row_UxKxM.append([[own.row(example, query, told) for query in queries] + padding for told in told_K])
    assert {len(row_KxM) for row_KxM in row_UxKxM} == {shown}
    own.assert_reads(batch.generator, row_UxKxM)
    assert (batch.learned is not None) == (learned < shown)
    if batch.learned is not None:
        own.assert_reads(batch.learned, [row_KxM[:learned] for row_KxM in row_UxKxM])
    return batch, row_UxKxM


@pytest.mark.parametrize(
    ("method", "name", "reference", "k_generator", "shown", "learned"),
    [
        ("population", "joint", "prompt", 0, 1, 1),
        ("raw_signals", "joint", "summary", 0, 1, 1),
        ("oracle", "joint", "signals", 0, 1, 1),
        ("zero_shot_summary", "joint", "summary", 0, K, K),
        ("popi", "joint", "signals", 2, K, 2),
        ("popi", "two_phase", "prompt", 0, 1, 1),
        ("base", "joint", "summary", 0, 1, 1),
    ],
)
def test_each_model_reads_what_the_method_shows_it(method, name, reference, k_generator, shown, learned, tmp_path):
    """In a train step and in an evaluation: the texts, token for token, and the margins that they give."""
    own = Watched(method_config(method, name, reference, k_generator), tmp_path)
    state = own.state
    if method != "base":
        kind = schedule.step_kind(own.config, STEP)
        batch, row_UxKxM = checked_batch(own, kind, shown, learned)
        margin_U = [
            np.mean([own.margin(state.theta, row) for row_M in row_KxM for row in row_M if row])
            for row_KxM in row_UxKxM
        ]
        state, metrics = own.run.programs.train_steps[kind](state, own.run.base, batch)
        np.testing.assert_allclose(metrics["margin"], np.mean(margin_U), rtol=1e-3, atol=1e-3)
        if kind == "joint":
            assert metrics["sampler_gap_max"] < 1e-4

    phi = noisy(own.run.base, 3) if state.phi is None else state.phi  # zero_shot_summary must not draw with it.
    theta = None if method == "base" else state.theta
    records = own.evaluator().records(phi, theta, TEST, STEP)
    told_UxK = own.told(phi, TEST)
    asked = [
        (example, query, told)
        for example, told_K in zip(TEST, told_UxK, strict=True)
        for query in example.queries
        for told in told_K
    ]
    assert [(record.user, record.context) for record in records] == [(example.user, told) for example, _, told in asked]
    read = {row for delta, (bins,), _ in own.scores.calls if delta is theta for row in read_rows(bins) if row}
    assert read >= {own.read(query, told) for _, query, told in asked}
    for record, (example, query, told) in zip(records, asked, strict=True):
        h = own.margin(theta, own.row(example, query, told))
        h_signals_ref = own.margin(theta, Row(query, told, signals_text(example)))
        np.testing.assert_allclose((record.h, record.h_signals_ref), (h, h_signals_ref), rtol=1e-3, atol=1e-3)
    if method in SUMMARIZED:
        pairs = [
            own.row(example, Query(signal.prompt, signal.chosen, signal.rejected), told)
            for example, told_K in zip(TEST, told_UxK, strict=True)
            for signal in example.signals
            if signal.kind == "pair"
            for told in told_K
        ]
        found = faithfulness.measure(own.evaluator(), theta, TEST, told_UxK)
        assert found["accuracy"] == np.mean([own.margin(theta, row) > 0 for row in pairs])
        assert len(pairs) == K * found["signals"] > 0 == found["skipped"]


@pytest.mark.parametrize(
    ("name", "reference", "k_generator", "shown"),
    [("inference_only", "prompt", 2, K), ("generator_only", "summary", 1, 1)],
)
def test_a_step_of_one_model_shows_as_many_summaries_as_it_learns_from(name, reference, k_generator, shown, tmp_path):
    own = Watched(method_config("popi", name, reference, k_generator), tmp_path)
    checked_batch(own, schedule.step_kind(own.config, STEP), shown, shown)
