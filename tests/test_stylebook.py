"""stylebook: its text reads back, its splits are disjoint and balanced, its exact quantities match brute force."""

import itertools
import math
import types

import jax
import numpy as np
import pytest

from experiments import pretrain_stylebook
from popi_jax.configs import quickstart
from popi_jax.data.builders import stylebook
from popi_jax.data.builders import stylebook_exact as exact
from popi_jax.data.builders import stylebook_text as text
from popi_jax.data.layouts import PLAIN
from popi_jax.data.schema import Query, Signal
from popi_jax.errors import UserError
from popi_jax.model import hub
from popi_jax.model.policy import Policy
from popi_jax.model.tokenizer import Tokenizer
from popi_jax.rollout import sampler


def _config(**changes):
    fields = {
        "seed": 0,
        "signals_per_user": 5,
        "train_users": 96,
        "test_users": 64,
        "queries_per_user": 2,
        "test_queries_per_user": 3,
    }
    return types.SimpleNamespace(**(fields | changes))


@pytest.fixture(scope="module")
def data():
    return stylebook.load(_config())


def _tastes(examples):
    return {tuple(exact.truth(example).taste_6) for example in examples}


def test_splits_share_no_combination_and_cover_all_64(data):
    train, test = _tastes(data["train"]), _tastes(data["test"])
    assert len(train) == 48 and len(test) == 16
    assert not train & test


def test_every_pair_of_tastes_is_equally_frequent_in_both_splits():
    for personas_Pex6 in (stylebook.TRAIN_PERSONAS_48x6, stylebook.TEST_PERSONAS_16x6):
        for a, b in itertools.combinations(range(text.N_TASTES), 2):
            for values in itertools.product((1, -1), repeat=2):
                assert np.mean(np.all(personas_Pex6[:, [a, b]] == values, axis=1)) == 0.25


def test_load_is_repeatable_and_users_do_not_depend_on_their_number(data):
    again = stylebook.load(_config(train_users=10, test_users=5))
    assert again["train"] == data["train"][:10]
    assert again["test"] == data["test"][:5]
    assert stylebook.load(_config(seed=1, train_users=3))["train"] != data["train"][:3]


def test_examples_have_the_requested_signals_and_queries(data):
    for split, queries in (("train", 2), ("test", 3)):
        for example in data[split]:
            assert example.split == split and len(example.signals) == 5 and len(example.queries) == queries
            assert {signal.kind for signal in example.signals} == {"pair", "comment", "profile"}
            provenances = [item.provenance for item in (*example.signals, *example.queries)]
            assert len(set(provenances)) == 5 + queries
            assert all(provenance.startswith(example.user + "/") for provenance in provenances)


def test_no_query_is_a_signal(data):
    for example in data["train"] + data["test"]:
        seen = {(signal.chosen, signal.rejected) for signal in example.signals}
        assert not seen & {pair for q in example.queries for pair in ((q.chosen, q.rejected), (q.rejected, q.chosen))}


def test_a_bad_size_is_named_in_the_error():
    with pytest.raises(UserError, match="data.signals_per_user"):
        stylebook.load(_config(signals_per_user=0))


def test_every_style_reads_back():
    rng = np.random.default_rng(0)
    for style_6 in exact.PERSONAS_Pex6:
        for _ in range(3):
            assert np.array_equal(text.read_response(text.response(rng, "tea", style_6)), style_6)


def test_every_statement_and_summary_reads_back():
    rng = np.random.default_rng(1)
    for size in range(1, text.N_TASTES + 1):
        for tastes in itertools.combinations(range(text.N_TASTES), size):
            said = {taste: int(rng.choice((1, -1))) for taste in tastes}
            assert text.read_statements(text.comment(rng, said)) == said
            assert text.read_statements(text.profile(rng, said)) == said
            assert text.read_summary(text.summary(said)) == said


def test_no_phrase_is_part_of_another():
    for tables in ((text.STYLES,), (text.COMMENTS, text.PROFILES)):
        phrases = [phrase.lower() for table in tables for variants in table.values() for phrase in variants]
        for a, b in itertools.permutations(phrases, 2):
            assert a.replace("{topic} ", "") not in b.replace("{topic} ", "")


def test_foreign_text_is_refused():
    with pytest.raises(ValueError, match="not a response"):
        text.read_response("Bread is nice.")
    with pytest.raises(ValueError, match="neither a comment nor a profile"):
        text.read_statements("I like bread.")
    assert text.read_summary("This reader likes short and long answers, with examples.") == {3: 1}


def test_summary_is_english():
    assert text.summary({0: 1, 1: -1, 2: 1, 3: 1, 4: -1, 5: 1}) == (
        "This reader likes short formal answers in lists, with examples, using plain words, making firm claims."
    )
    assert text.summary({5: -1}) == "This reader likes answers making careful claims."


def test_preference_by_hand():
    persona = np.array([[1, 1, 1, 1, 1, 1]])
    gaps = np.array([[1, 0, 0, 0, 0, 0], [1, -1, -1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    odds = math.exp(exact.UTILITY_GAP)
    np.testing.assert_allclose(exact.preference(persona, gaps)[0], [odds / (1 + odds), 1 / (1 + odds), 0.5], rtol=1e-12)


def test_posterior_by_hand():
    """A comment and a profile agree on taste 0, so their odds multiply."""
    rng = np.random.default_rng(2)
    signals = [
        Signal("comment", "Why?", text=text.comment(rng, {0: 1})),
        Signal("profile", text=text.profile(rng, {0: 1})),
        Signal("comment", "Why?", text=text.comment(rng, {3: -1})),
    ]
    posterior_Pe = exact.posterior(signals)
    odds = (1 - exact.STATEMENT_ERROR) / exact.STATEMENT_ERROR
    assert posterior_Pe[exact.PERSONAS_Pex6[:, 0] == 1].sum() == pytest.approx(odds**2 / (1 + odds**2))
    assert posterior_Pe[exact.PERSONAS_Pex6[:, 3] == 1].sum() == pytest.approx(1 / (1 + odds))
    assert posterior_Pe[exact.PERSONAS_Pex6[:, 1] == 1].sum() == pytest.approx(0.5)


def test_posterior_weighs_a_pair_by_bradley_terry():
    rng = np.random.default_rng(3)
    pair = Signal(
        "pair", "Why?", text.response(rng, "tea", (1, 1, 1, 1, 1, 1)), text.response(rng, "tea", (-1, 1, 1, 1, 1, 1))
    )
    p_short = exact.posterior([pair])[exact.PERSONAS_Pex6[:, 0] == 1].sum()
    assert p_short == pytest.approx(1 / (1 + math.exp(-exact.UTILITY_GAP)))


def test_posterior_is_calibrated_by_brute_force():
    """Over users of all 64 combinations, a share p of the tastes and labels believed with probability p is right."""
    rng = np.random.default_rng(4)
    believed, right, predicted, labels = [], [], [], []
    for i in range(1500):
        taste_6 = exact.PERSONAS_Pex6[rng.integers(64)]
        posterior_Pe = exact.posterior(stylebook.signals_of(rng, taste_6, 3, f"u{i}"))
        believed.append(posterior_Pe @ (exact.PERSONAS_Pex6 == 1))
        right.append(taste_6 == 1)
        query = stylebook.labelled_query(rng, taste_6)
        flip = rng.random() < 0.5  # The order of the responses must not reveal the label.
        gap_6 = exact.difference(query) * (-1 if flip else 1)
        predicted.append(posterior_Pe @ exact.preference(exact.PERSONAS_Pex6, gap_6[None])[:, 0])
        labels.append(not flip)
    for p, outcome in ((np.ravel(believed), np.ravel(right)), (np.array(predicted), np.array(labels))):
        for low in np.arange(0, 1, 0.2):
            chosen = (p >= low) & (p < low + 0.2)
            sigma = math.sqrt(np.sum(p[chosen] * (1 - p[chosen]))) / chosen.sum()
            assert abs(p[chosen].mean() - outcome[chosen].mean()) < 3.5 * sigma


def test_bayes_accuracies_are_in_range():
    """The persona predicts labels better than the signals do, and both are as accurate as they claim."""
    examples = stylebook.load(_config(train_users=1, test_users=400, test_queries_per_user=4))["test"]
    truths = [exact.truth(example) for example in examples]
    persona = np.concatenate([truth.given_persona_Tr for truth in truths])
    signals = np.concatenate([truth.given_signals_Tr for truth in truths])
    assert 0.92 < np.mean(persona > 0.5) < 0.96
    assert 0.86 < np.mean(signals > 0.5) < 0.91
    assert np.mean(persona > 0.5) == pytest.approx(np.maximum(persona, 1 - persona).mean(), abs=0.02)
    assert np.mean(signals > 0.5) == pytest.approx(np.maximum(signals, 1 - signals).mean(), abs=0.02)


def test_label_given_signals_is_truth_on_a_common_set(data):
    queries = stylebook.common_queries(seed=0, n=4)
    label_UxTr = exact.label_given_signals(data["test"][:5], queries)
    for u, example in enumerate(data["test"][:5]):
        for t, query in enumerate(queries):
            expected = 0.0
            for p, persona in zip(exact.truth(example).posterior_Pe, exact.PERSONAS_Pex6, strict=True):
                gap = exact.UTILITY_GAP * sum(
                    persona[j] * (text.read_response(query.chosen)[j] - text.read_response(query.rejected)[j]) / 2
                    for j in range(6)
                )
                expected += p / (1 + math.exp(-gap))
            assert label_UxTr[u, t] == pytest.approx(expected)


def test_common_queries_belong_to_no_user(data):
    queries = stylebook.common_queries(seed=0, n=50)
    known = {(q.chosen, q.rejected) for example in data["train"] + data["test"] for q in example.queries}
    assert len({(q.chosen, q.rejected) for q in queries}) == 50
    assert not known & {(q.chosen, q.rejected) for q in queries}


def _brute_force(label_UxTr, channel_UxZ, model_ZxTr):
    """H(o|t), H(o|t,z), I, loss and KL from the full joint table p(i, z, o | t), by loops."""
    U, Tr = label_UxTr.shape
    Z = channel_UxZ.shape[1]
    totals = np.zeros(5)
    for t in range(Tr):
        joint = np.zeros((Z, 2))
        loss = 0.0
        for i, z, o in itertools.product(range(U), range(Z), range(2)):
            p = channel_UxZ[i, z] / U * (label_UxTr[i, t] if o else 1 - label_UxTr[i, t])
            joint[z, o] += p
            loss -= p * math.log(model_ZxTr[z, t] if o else 1 - model_ZxTr[z, t])
        p_z, p_o = joint.sum(1), joint.sum(0)
        h_o = -sum(p * math.log(p) for p in p_o if p)
        h_o_z = -sum(joint[z, o] * math.log(joint[z, o] / p_z[z]) for z in range(Z) for o in range(2) if joint[z, o])
        information = sum(
            joint[z, o] * math.log(joint[z, o] / (p_z[z] * p_o[o])) for z in range(Z) for o in range(2) if joint[z, o]
        )
        kl = sum(
            joint[z, o] * math.log(joint[z, o] / p_z[z] / (model_ZxTr[z, t] if o else 1 - model_ZxTr[z, t]))
            for z in range(Z)
            for o in range(2)
            if joint[z, o]
        )
        totals += np.array([loss, h_o, h_o_z, information, kl]) / Tr
    return totals


def test_decomposition_against_the_joint_table():
    rng = np.random.default_rng(5)
    label_UxTr, model_ZxTr = rng.uniform(0.05, 0.95, (6, 3)), rng.uniform(0.05, 0.95, (4, 3))
    channel_UxZ = rng.dirichlet(np.ones(4), size=6)
    got = exact.decompose(label_UxTr, channel_UxZ, np.log(model_ZxTr / (1 - model_ZxTr)))
    loss, label_entropy, conditional_entropy, information, approximation_error = _brute_force(
        label_UxTr, channel_UxZ, model_ZxTr
    )
    assert got.loss == pytest.approx(loss)
    assert got.label_entropy == pytest.approx(label_entropy)
    assert got.conditional_entropy == pytest.approx(conditional_entropy)
    assert got.information == pytest.approx(information)
    assert got.approximation_error == pytest.approx(approximation_error)
    assert got.loss == pytest.approx(got.conditional_entropy + got.approximation_error, abs=1e-12)


def test_information_by_hand():
    """For two users with opposite certain labels, a summary that identifies the user has log 2 nats, another has 0."""
    label_UxTr = np.array([[1.0], [0.0]])
    undecided_ZxTr = np.zeros((2, 1))
    told = exact.decompose(label_UxTr, np.eye(2), undecided_ZxTr)
    assert told.information == pytest.approx(math.log(2)) and told.conditional_entropy == pytest.approx(0.0)
    assert told.loss == pytest.approx(math.log(2)) and told.approximation_error == pytest.approx(math.log(2))
    untold = exact.decompose(label_UxTr, np.full((2, 2), 0.5), undecided_ZxTr)
    assert untold.information == pytest.approx(0.0) and untold.approximation_error == pytest.approx(0.0)


def test_channel_of_sampled_ids():
    channel = exact.channel_from_ids(np.array([[0, 0, 2, 1], [2, 2, 2, 2]]))
    np.testing.assert_allclose(channel, [[0.5, 0.25, 0.25], [0, 0, 1]])


def test_a_very_confident_generator_has_a_finite_loss():
    label_UxTr = np.array([[1.0], [0.25]])
    sure = exact.decompose(label_UxTr, np.eye(2), np.array([[800.0], [800.0]]))
    assert sure.loss == pytest.approx(0.5 * 0.75 * 800)
    assert sure.loss == pytest.approx(sure.conditional_entropy + sure.approximation_error)


def test_truth_refuses_a_persona_that_does_not_name_all_tastes(data):
    example = types.SimpleNamespace(**vars(data["test"][0]) | {"persona": text.summary({0: 1})})
    with pytest.raises(ValueError, match="does not name all tastes"):
        exact.truth(example)


def test_difference_is_chosen_minus_rejected():
    rng = np.random.default_rng(6)
    query = Query("?", text.response(rng, "tea", (1, 1, 1, 1, 1, 1)), text.response(rng, "tea", (1, -1, 1, 1, 1, 1)))
    assert exact.difference(query).tolist() == [0, 1, 0, 0, 0, 0]


@pytest.fixture(scope="module")
def base():
    checkpoint = hub.load("stylebook")
    return checkpoint, Tokenizer.load(checkpoint.tokenizer_path)


def test_the_shipped_base_is_small_and_its_tokenizer_suits_the_world(base, data):
    checkpoint, tokenizer = base
    assert sum(path.stat().st_size for path in hub.STYLEBOOK.iterdir()) < 8e6
    ratios = []
    for example in data["test"]:
        signals = PLAIN.signals_text(example.signals)
        assert tokenizer.decode(tokenizer.encode(signals)) == signals
        ratios.append(len(tokenizer.encode(example.persona)) / len(tokenizer.encode(signals)))
    assert np.mean(ratios) < 1 / 8
    assert tokenizer.vocab_size <= checkpoint.config.vocab_size


def test_untrained_summaries_are_well_formed_but_often_wrong(base):
    """Over 90% are sentences that the world can write. They name about half of the tastes, 60-80% correctly."""
    checkpoint, tokenizer = base
    examples = stylebook.load(_config(train_users=1, test_users=48))["test"]
    prompts = quickstart.get_config().prompts
    rows = [tokenizer.render(PLAIN.inference_messages(e.signals, prompts.inference_instruction)) for e in examples]
    length_B = np.array([len(row) for row in rows])
    prompt_BxT = np.zeros((len(rows), length_B.max()), np.int32)
    for b, row in enumerate(rows):
        prompt_BxT[b, : len(row)] = row
    policy = Policy(checkpoint.config)

    @jax.jit
    def draw(prompt_BxT, length_B):
        options = {"branches": 2, "max_tokens": 24, "temperature": 1.0, "top_p": 1.0}
        stops = {"stop_ids": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
        decoder = policy.bind(checkpoint.params, None)
        return sampler.sample(decoder, prompt_BxT, length_B, jax.random.key(0), **options, **stops)

    samples = jax.device_get(draw(prompt_BxT, length_B))
    named, right, english = [], [], []
    for b, example in enumerate(examples):
        taste_6 = exact.truth(example).taste_6
        for n in range(2):
            summary = tokenizer.decode(samples.tokens_BxNxS[b, n, : samples.length_BxN[b, n]])
            statements = text.read_summary(summary)
            english.append(bool(statements) and text.summary(statements) == summary)
            named.append(len(statements))
            right += [value == taste_6[taste] for taste, value in statements.items()]
    assert np.mean(english) > 0.9
    assert 2.5 < np.mean(named) < 4.5
    assert 0.6 < np.mean(right) < 0.8


def test_pretraining_uses_only_training_users(base, monkeypatch):
    splits = []
    draw = stylebook.draw_example

    def spy(seed, split, index, signals, queries):
        splits.append(split)
        return draw(seed, split, index, signals, queries)

    monkeypatch.setattr(stylebook, "draw_example", spy)
    teacher = pretrain_stylebook.Teacher(base[1], quickstart.get_config().prompts, 1.0)
    rows = {task: 2 for task in pretrain_stylebook.SHAPES}
    batch = next(pretrain_stylebook.batches(teacher, rows, seed=0))
    assert set(splits) == {"train"} and len(splits) >= 12
    assert all((rows.prefix_length_B > 0).all() and (rows.branch_length_BxN > 0).all() for rows in batch.values())
    tokenizer, compare = base[1], batch["compare"]
    fits, other = (
        text.read_response(tokenizer.decode(ids[:length]))
        for ids, length in zip(compare.branches_BxNxS[0, :2], compare.branch_length_BxN[0, :2], strict=True)
    )
    summary = text.read_summary(tokenizer.decode(compare.prefix_BxT[0, : compare.prefix_length_B[0]]))
    assert all(fits[taste] == value for taste, value in summary.items())
    assert 1 <= sum(other[taste] != value for taste, value in summary.items()) <= 3
