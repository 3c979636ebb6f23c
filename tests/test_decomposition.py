"""The logged decomposition equals sums written out, and the estimate of I(o; z) agrees with the exact value."""

import dataclasses
import json
import types

import numpy as np
import pytest

from popi_jax.config import changed, parse
from popi_jax.configs import base
from popi_jax.data.builders import stylebook, stylebook_exact, stylebook_text
from popi_jax.data.layouts import Told
from popi_jax.errors import UserError
from popi_jax.evaluation import decomposition, evaluate
from popi_jax.evaluation.decomposition import Measured, estimate_information, one_wording
from popi_jax.rollout.contexts import Context
from popi_jax.training import batches


def population(users=400, triples=6, seed=0):
    """Users of two kinds, a z that names the kind correctly 9 times in 10, and p* given z."""
    rng = np.random.default_rng(seed)
    kind_U = rng.integers(0, 2, users)
    label_UxTr = np.where(kind_U[:, None] == 1, 0.9, 0.2) + rng.uniform(-0.05, 0.05, (users, triples))
    context_UxK = np.where(rng.random((users, 4)) < 0.9, kind_U[:, None], 1 - kind_U[:, None])
    given_ZxTr = np.stack(
        [
            np.average(np.repeat(label_UxTr, 4, 0), axis=0, weights=(context_UxK.ravel() == z).astype(float))
            for z in range(2)
        ]
    )
    return label_UxTr, context_UxK, given_ZxTr


def log_odds(p):
    return np.log(p) - np.log1p(-p)


def entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


def nats(p, q):
    return -(p * np.log(q) + (1 - p) * np.log(1 - q))


def test_terms_add_up_to_the_loss_written_out():
    label_UxTr, context_UxK, _ = population()
    model_ZxTr = np.random.default_rng(1).uniform(0.1, 0.9, (2, label_UxTr.shape[1]))
    terms = Measured(context_UxK, log_odds(model_ZxTr), label_UxTr).terms()
    loss = np.mean([nats(label_UxTr, model_ZxTr[z_U]) for z_U in context_UxK.T])
    np.testing.assert_allclose(terms["exact_loss_nats"], loss, atol=1e-10)
    parts = terms["exact_approximation_error_nats"] + terms["exact_conditional_entropy_nats"]
    np.testing.assert_allclose(parts, loss, atol=1e-10)
    assert terms["exact_approximation_error_nats"] > 0.01


def test_calibrated_generators_have_no_error_and_the_estimate_covers_the_information():
    label_UxTr, context_UxK, given_ZxTr = population()
    informed = Measured(context_UxK, log_odds(given_ZxTr), label_UxTr)
    blind = Measured(np.zeros_like(context_UxK[:, :1]), log_odds(label_UxTr.mean(0, keepdims=True)), label_UxTr)
    terms = informed.terms()
    np.testing.assert_allclose(terms["exact_approximation_error_nats"], 0, atol=1e-9)
    estimate = estimate_information(blind, informed, 500)
    assert estimate.low < terms["exact_information_nats"] < estimate.high
    assert estimate.high - estimate.low < 0.1
    assert not estimate.low < 0 < estimate.high  # An interval that always covers would prove nothing.


def test_summaries_with_the_same_tastes_are_one_context():
    """Two wordings of one taste are one z, and so are all texts that name no taste."""
    likes_short, plain = stylebook_text.summary({0: 1}), stylebook_text.summary({0: 1, 1: -1})
    texts = [[likes_short, "Reader 1."], [f"So: {likes_short}", "Reader 2."], [plain, likes_short.upper()]]
    assert one_wording(texts) == [[likes_short, "Reader 1."], [likes_short, "Reader 1."], [plain, likes_short]]


def test_files_of_another_version_are_refused(tmp_path):
    np.savez(tmp_path / "old.npz", context_UxK=np.zeros((2, 1)), model_ZxTr=np.zeros((1, 3)))
    with pytest.raises(UserError, match=r"old.npz: .*another version .*model_ZxTr"):
        decomposition.read(tmp_path / "old.npz")
    (tmp_path / "old.jsonl").write_text('{"row": 0, "h": 1.0}\n')
    with pytest.raises(UserError, match=r"old.jsonl:1: .*another version .*user: Field required"):
        evaluate.read_records(tmp_path / "old.jsonl")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "old.npz").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cut.npz: damaged, .*run again"):
        decomposition.read(tmp_path / "cut.npz")
    record = evaluate.Record(0, "u", "g", "", "", None, 0, True, 3, 0.5, 0.5)
    for field, value in (("h", None), ("h", "1"), ("row", 0.5), ("finished", 1), ("context", 3)):
        line = dataclasses.asdict(record) | {field: value}
        (tmp_path / "damaged.jsonl").write_text(json.dumps(dataclasses.asdict(record)) + "\n" + json.dumps(line) + "\n")
        with pytest.raises(UserError, match=rf"damaged.jsonl:2: damaged, .*{field}: .*run again"):
            evaluate.read_records(tmp_path / "damaged.jsonl")
    (tmp_path / "old.jsonl").write_text('{"user": "u", "summary": "s"}\n')
    with pytest.raises(UserError, match=r"old.jsonl:1: .*another version: finished is None"):
        batches.WrittenSummaries(tmp_path / "old.jsonl")


def test_oracle_labels_are_given_the_persona():
    """A true persona carries more information than the signals. With labels given the signals it would carry less."""
    examples = [stylebook.draw_example(0, "test", i, 2, 1) for i in range(24)]
    information = {}
    for method in ("oracle", "raw_signals"):
        evaluator = types.SimpleNamespace(
            config=changed(parse(base.get_config()), {"method": method}),
            contexts=lambda phi, users, key: [[Context(Told(str(u)))] for u in range(len(users))],
            scorer=types.SimpleNamespace(logps=lambda theta, items: np.zeros((len(items), 2))),
            references=types.SimpleNamespace(
                remember=lambda items: None, lookup=lambda items: np.zeros((len(items), 2))
            ),
        )
        measured = decomposition.measure(evaluator, None, None, examples, 0)
        information[method] = measured.terms()["exact_information_nats"]
    taste_Ux6 = np.stack([stylebook_exact.truth(example).taste_6 for example in examples])
    gap_Trx6 = np.stack([stylebook_exact.difference(q) for q in stylebook.common_queries(0, decomposition.TRIPLES)])
    label_UxTr = 1 / (1 + np.exp(-stylebook_exact.UTILITY_GAP * taste_Ux6 @ gap_Trx6.T))
    by_hand = np.mean(entropy(label_UxTr.mean(0)) - entropy(label_UxTr).mean(0))
    assert abs(information["oracle"] - by_hand) < 1e-9
    assert information["oracle"] > information["raw_signals"] + 0.05
