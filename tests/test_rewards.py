"""Rewards by hand: withheld signals, the loss of a generator that is told nothing, penalties; and the warm start."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from popi_jax.config import changed, parse
from popi_jax.configs import quickstart
from popi_jax.data.builders.stylebook import draw_example
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError
from popi_jax.modes import setup
from popi_jax.rollout.pairs import Item
from popi_jax.rollout.sampler import Samples
from popi_jax.rollout.text import Drawn
from popi_jax.training import rewards
from popi_jax.training.batches import BatchMaker, WrittenSummaries

PAIRS = tuple(Signal("pair", f"x{i}", f"y{i}", f"n{i}", provenance=f"f#{i}") for i in range(4))
COMMENT = Signal("comment", "x", text="w")
USER = Example("u", "train", (*PAIRS[:2], COMMENT, *PAIRS[2:]), (Query("q", "a", "b"),))
CONFIG = changed(
    parse(quickstart.get_config("runlocal")),
    {"train.users_per_step": 3, "sampling.k": 2, "data.queries_per_user": 2, "mesh.data": 1, "limits.summary": 8},
)


def test_withheld_pairs_become_queries_and_are_no_longer_shown():
    taken = collections.Counter()
    for step in range(600):
        example = rewards.withhold(USER, 2, 0, step, 0)
        moved = [s for s in USER.signals if s not in example.signals]
        assert [(s.prompt, s.chosen, s.rejected, s.provenance) for s in moved] == [
            (q.prompt, q.chosen, q.rejected, q.provenance) for q in example.queries[1:]
        ]
        assert example.queries[0] == USER.queries[0] and COMMENT in example.signals and len(moved) == 2
        taken[tuple(s.prompt for s in moved)] += 1
    assert len(taken) == 6 and min(taken.values()) > 60  # All pairs of pairs are equally likely.
    assert rewards.withhold(USER, 2, 1, 0, 0) != rewards.withhold(USER, 2, 0, 0, 0)


@pytest.mark.parametrize(("signals", "count", "left"), [(PAIRS, 9, 1), ((COMMENT,), 1, 1), (PAIRS[:1], 1, 1)])
def test_one_signal_always_stays(signals, count, left):
    example = rewards.withhold(dataclasses.replace(USER, signals=signals), count, 0, 0, 0)
    assert len(example.signals) == left
    assert len(example.signals) + len(example.queries) == len(signals) + 1


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a B c", 1.0),
        ("so a b c!", 0.75),
        ("a b x c d", 0.0),  # Runs of two words.
        ("b c d", 0.0),  # Across two fields.
        ("c d e and a b c", 6 / 7),
        ("", 0.0),
    ],
)
def test_copied_share_by_hand(text, share):
    assert rewards.copied_share(text, [Signal("pair", "a, b c", "d", "c d e")]) == pytest.approx(share)


@pytest.fixture(scope="module")
def run():
    return setup.load(CONFIG).fitted({"train": users()})


def users() -> list[Example]:
    return [draw_example(5, "train", i, signals=3, queries=i) for i in (2, 1)]


def drawn(texts, lengths) -> Drawn:
    samples = Samples(None, np.array(lengths, np.int32), None, None)
    return Drawn(texts, None, None, samples)


def test_more_by_hand(run, tmp_path):
    """The loss of a generator that is told nothing, minus what each token and each copied word cost."""
    keys = {"objective.relative_reward": True, "objective.length_penalty": 0.5, "objective.copy_penalty": 3.0}
    config = changed(CONFIG, keys)
    theta = jax.tree.map(lambda x: x + 0.02, run.initial_state().theta)
    examples = users()
    copied = next(s for s in examples[0].signals if s.kind == "pair").chosen
    texts = [[copied, "zebra"], ["zebra zebra", "likes zebras"]]
    more_UxK = rewards.more(
        config, run.scorer, run.references(tmp_path), theta, examples, drawn(texts, [[4, 1], [2, 3], [0, 0]])
    )
    beta, untold = config.objective.beta, []
    for example in examples:
        items = [Item(query, None) for query in example.queries]
        h = (run.scorer.logps(theta, items) - run.scorer.logps(None, items)) @ (1, -1)
        untold.append(np.mean(np.log1p(np.exp(-beta * h)) / beta))
    expected = np.array([[untold[0] - 2 - 3, untold[0] - 0.5], [untold[1] - 1, untold[1] - 1.5]])
    np.testing.assert_allclose(more_UxK, expected, rtol=1e-5)
    assert not rewards.more(
        CONFIG, run.scorer, run.references(tmp_path), theta, examples, drawn(texts, [[4, 1]] * 2)
    ).any()


def test_the_batch_has_withheld_pairs_as_rows_and_the_reward_as_a_field(run, tmp_path):
    config = changed(CONFIG, {"objective.reward_signals": 2, "objective.length_penalty": 1.0})
    own = dataclasses.replace(run, config=config)
    state = own.initial_state()
    maker = BatchMaker(
        config, own.sampler, own.scorer, own.references(tmp_path), WrittenSummaries(tmp_path / "written.jsonl")
    )
    batch, _ = maker.make(state.phi, state.theta, users(), 0, "joint")
    weight_UxKxM = np.asarray(batch.generator.weight_R).reshape(-1, 2, 4)  # M = 2 + 2.
    pairs = [sum(s.kind == "pair" for s in example.signals) for example in users()]
    asked = [len(e.queries) + min(2, n, len(e.signals) - 1) for e, n in zip(users(), pairs, strict=True)]
    assert [int((w > 0).sum()) for w in weight_UxKxM[:2, 0]] == asked
    assert not weight_UxKxM[2:].any()
    length_UxK = np.asarray(batch.inference.lines.branch_length_BxN[0])
    np.testing.assert_array_equal(batch.inference.more_reward_UxK[0], -length_UxK)
    generator, _ = maker.make(state.phi, state.theta, users(), 0, "generator")
    # The generator is told of one summary here (sampling.k_generator), which has seen all signals.
    assert generator.generator.weight_R.shape[1] == weight_UxKxM.shape[0] * 1 * 2


def test_the_warm_start_imitates_the_personas(run, tmp_path):
    config = changed(CONFIG, {"schedule.n_warm_start": 1, "schedule.warm_start": "persona", "limits.summary": 24})
    own = dataclasses.replace(
        run, config=config, encoder=dataclasses.replace(run.encoder, limits=config.limits)
    ).fitted({"train": users()})
    state = own.initial_state()
    maker = BatchMaker(
        config, own.sampler, own.scorer, own.references(tmp_path), WrittenSummaries(tmp_path / "written.jsonl")
    )
    batch, _ = maker.make(state.phi, state.theta, users(), 0, "imitation")
    tokenizer, lines = own.encoder.tokenizer, batch.inference.lines
    for u, example in enumerate(users()):
        ids = lines.branches_BxNxS[0, u, 0, : int(lines.branch_length_BxN[0, u, 0])].tolist()
        assert ids == [*tokenizer.encode(example.persona), tokenizer.end_id]
        prefix = lines.prefix_BxT[0, u, : int(lines.prefix_length_B[0, u])].tolist()
        assert prefix == own.encoder.signals(example)
    told = own.scorer.packer.row(Item(users()[0].queries[0], Told(users()[0].persona)))
    assert batch.generator.bins.tokens_CxL.shape[0] == 1
    packed = np.asarray(batch.generator.bins.tokens_CxL).ravel().tolist()
    assert any(packed[i : i + len(told.prefix)] == told.prefix for i in range(len(packed)))


@pytest.mark.parametrize("name", ["persona", "raw_signals"])
def test_the_warm_up_tells_the_generator_what_informs(run, tmp_path, name):
    config = changed(CONFIG, {"schedule.n_generator_warmup": 1, "schedule.generator_warmup": name})
    own = dataclasses.replace(run, config=config)
    state = own.initial_state()
    maker = BatchMaker(
        config, own.sampler, own.scorer, own.references(tmp_path), WrittenSummaries(tmp_path / "written.jsonl")
    )
    batch, _ = maker.make(state.phi, state.theta, users(), 0, "generator_warmup")
    assert batch.inference is None and batch.learned is None
    assert batch.generator.weight_R.shape[1] == own.shapes.users * 1 * 2  # One context, two queries.
    packed = np.asarray(batch.generator.bins.tokens_CxL).ravel().tolist()
    for example in users():
        told = Told(example.persona) if name == "persona" else own.encoder.raw_signals(example)
        prefix = own.scorer.packer.row(Item(example.queries[0], told)).prefix
        assert any(packed[i : i + len(prefix)] == prefix for i in range(len(packed)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule.n_warm_start": 1, "schedule.warm_start": "persona", "limits.summary": 4}, "limits.summary is 4"),
        ({"schedule.n_generator_warmup": 1, "limits.prompt": 24}, "limits.prompt is 24"),
    ],
)
def test_what_the_first_steps_lack_is_said_before_the_first_step(run, keys, message):
    config = changed(CONFIG, keys)
    own = dataclasses.replace(run, config=config, encoder=dataclasses.replace(run.encoder, limits=config.limits))
    with pytest.raises(UserError, match=message):
        own.fitted({"train": users()})
    nameless = [dataclasses.replace(example, persona="") for example in users()]
    plain = changed(CONFIG, {key: value for key, value in keys.items() if key.startswith("schedule")})
    with pytest.raises(UserError, match="has no persona"):
        dataclasses.replace(run, config=plain).fitted({"train": nameless})
