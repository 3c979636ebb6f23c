"""The logged decomposition against sums written out, and the estimate of I(o; z) against the exact one."""

import numpy as np

from popi_jax.decomposition import Measured, estimate_information


def population(users=400, triples=6, seed=0):
    """Users of two kinds, z naming the kind rightly 9 times in 10; generators that know p* given what they see."""
    rng = np.random.default_rng(seed)
    kind_U = rng.integers(0, 2, users)
    label_UxT = np.where(kind_U[:, None] == 1, 0.9, 0.2) + rng.uniform(-0.05, 0.05, (users, triples))
    context_UxK = np.where(rng.random((users, 4)) < 0.9, kind_U[:, None], 1 - kind_U[:, None])
    given_ZxT = np.stack(
        [
            np.average(np.repeat(label_UxT, 4, 0), axis=0, weights=(context_UxK.ravel() == z).astype(float))
            for z in range(2)
        ]
    )
    return label_UxT, context_UxK, given_ZxT


def nats(p, q):
    return -(p * np.log(q) + (1 - p) * np.log(1 - q))


def test_terms_add_up_to_the_loss_written_out():
    label_UxT, context_UxK, _ = population()
    model_ZxT = np.random.default_rng(1).uniform(0.1, 0.9, (2, label_UxT.shape[1]))
    terms = Measured(context_UxK, model_ZxT, label_UxT).terms()
    loss = np.mean([nats(label_UxT, model_ZxT[z_U]) for z_U in context_UxK.T])
    np.testing.assert_allclose(terms["exact_loss_nats"], loss, atol=1e-10)
    parts = terms["exact_approximation_error_nats"] + terms["exact_conditional_entropy_nats"]
    np.testing.assert_allclose(parts, loss, atol=1e-10)
    assert terms["exact_approximation_error_nats"] > 0.01


def test_calibrated_generators_have_no_error_and_their_estimate_covers_the_information():
    label_UxT, context_UxK, given_ZxT = population()
    informed = Measured(context_UxK, given_ZxT, label_UxT)
    blind = Measured(np.zeros_like(context_UxK[:, :1]), label_UxT.mean(0, keepdims=True), label_UxT)
    terms = informed.terms()
    np.testing.assert_allclose(terms["exact_approximation_error_nats"], 0, atol=1e-9)
    estimate = estimate_information(blind, informed, 500)
    assert estimate.low < terms["exact_information_nats"] < estimate.high
    assert estimate.high - estimate.low < 0.1
    assert not estimate.low < 0 < estimate.high  # An estimate that always covers would tell nothing.
