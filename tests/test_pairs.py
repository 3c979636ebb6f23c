"""Pairs that are scored together share the common start of their prompts, and their scores do not change."""

import dataclasses

import jax
import numpy as np
import pytest

from popi_jax.config import changed, parse
from popi_jax.configs import quickstart
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.data.shapes import Measured
from popi_jax.errors import UserError
from popi_jax.modes import setup
from popi_jax.rollout import references, text
from popi_jax.rollout.pairs import Item


def test_queries_of_a_user_share_one_copy_of_the_context():
    config = quickstart.get_config("runlocal")
    config.limits.prompt, config.limits.bin = 256, 256
    run = setup.load(parse(config))
    packer, scorer = run.scorer.packer, run.scorer
    told = Told("I like short answers about the sea and dislike long ones about the land. " * 3)
    questions = ["What is a tide?", "Who lives there?", "Why is it blue?"]
    items = [Item(Query(prompt=q, chosen="Salt water.", rejected="Sand."), told) for q in questions]
    planted = packer.plant(items)
    once = sum(tree.tokens for own in planted.trees for tree in own)
    each = sum(packer.row(item).tokens for item in items)
    assert once < each - 1.5 * len(run.encoder.tokenizer.encode(told.text))
    alone = np.concatenate([scorer.logps(None, [item], 1) for item in items])
    np.testing.assert_allclose(scorer.logps(None, items, 3), alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_figure_comes_from_weights_that_are_not_finite(value):
    """A comparison with NaN is false: it would count as an accuracy of 0."""
    run = setup.load(parse(quickstart.get_config("runlocal")))
    base = jax.tree.map(lambda x: x, run.base)
    base["final_norm"]["scale"] = base["final_norm"]["scale"].at[0].set(value)
    item = Item(Query("Why?", "Yes.", "No.", "f#1"), None)
    with pytest.raises(UserError, match=r"^query f#1: the log-probabilities .* not finite"):
        dataclasses.replace(run.scorer, base=base).logps(None, [item])
    example = Example("u", "test", (Signal("profile", text="Short answers."),), (item.query,))
    run = run.fitted({"test": [example]})
    with pytest.raises(UserError, match="log-probabilities of sampled tokens are not finite"):
        sampler = dataclasses.replace(run.sampler, base=base)
        sampler.summaries(None, [example], jax.random.key(0), text.in_use(run.config), k=1)


def test_micro_batches_divide_the_bins_of_all_rows():
    config = quickstart.get_config("runlocal")
    config.train.accumulation_generator, config.limits.bin = 3, 64
    run = setup.load(parse(config))
    packer = run.scorer.packer
    items = [Item(Query(prompt=f"Why {n}?", chosen="Yes.", rejected="No."), None) for n in range(5)]
    planted = packer.plant([*items, items[0], None])
    like = run.shapes.step("generator", Measured(planted.bins)).generator.bins
    packed = packer.pack(planted, like)
    assert packed.tokens_CxL.shape == like.tokens_CxL.shape and like.tokens_CxL.shape[0] == 3
    assert like.tokens_CxL.shape[1] % 8 == 0  # A multiple of the 8 devices.
    lengths_AxR = packed.length_RxN.sum(axis=-1)
    # Each row has its lengths in one micro-batch, the sixth in that of the equal first row, the padding row in none.
    assert (lengths_AxR > 0).sum(axis=0).tolist() == [1] * 6 + [0]
    assert (lengths_AxR[:, 5] == lengths_AxR[:, 0]).all()


def test_an_interrupted_reference_pass_goes_on_where_it_stopped(tmp_path, monkeypatch):
    run = setup.load(changed(parse(quickstart.get_config("runlocal")), {"eval.users_per_batch": 2}))
    items = [Item(Query(f"What is {n} times {n}?", f"It is {n * n}.", "Who knows?"), None) for n in range(200)]
    expected = run.references(tmp_path / "whole")
    expected.remember(items)
    monkeypatch.setattr(references, "_SAVE_EVERY", -1.0)
    scored = []

    def score(*arguments):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(arguments)
        return run.programs.score(*arguments)

    scorer = dataclasses.replace(run.scorer, score=score)
    half = references.References(scorer, tmp_path / "half", expected._identity)
    with pytest.raises(KeyboardInterrupt):
        half.remember(items)
    (left,) = (tmp_path / "half").iterdir()
    assert left.name.startswith("unfinished_")
    counts = {}
    for name in ("half", "other"):
        calls: list[int] = []
        counting = dataclasses.replace(
            run.scorer, score=lambda *given, calls=calls: calls.append(1) or run.programs.score(*given)
        )
        whole = references.References(counting, tmp_path / name, expected._identity)
        whole.remember(items)
        counts[name] = len(calls)
    assert counts["half"] == counts["other"] - 2 > 0  # Two parts were kept.
    whole = references.References(run.scorer, tmp_path / "half", expected._identity)
    np.testing.assert_array_equal(whole.lookup(items), expected.lookup(items))
    assert [path.name.startswith("reference_") for path in (tmp_path / "half").iterdir()] == [True]
