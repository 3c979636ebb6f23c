"""Exact quantities of stylebook: posteriors over tastes by enumeration, p*, entropies and mutual information.

There are Pe = 64 personas of 6 tastes. A triple t is (x, a, b), and o = 1 means that a is preferred to b. Logarithms
are natural. The equations are those of POPI section 2 on a finite population: users are uniform, and each has a known
distribution over a finite set of summaries z. Shape letters: docs/architecture.md.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from popi_jax.data.builders import stylebook_text as text
from popi_jax.data.schema import Example, Query, Signal

PERSONAS_Pex6 = np.array(list(itertools.product((1, -1), repeat=text.N_TASTES)))
UTILITY_GAP = 2.6  # u(a) - u(b) if a and b differ in one taste and a matches the user's.
STATEMENT_ERROR = 0.05  # Probability that a statement in a comment or a profile is wrong.


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def preference(personas_Pex6: np.ndarray, difference_Trx6: np.ndarray) -> np.ndarray:
    """Bradley-Terry with the known utility: p*(o=1 | t, persona) for each persona and triple, [Pe, Tr].

    `difference` is (style(a) - style(b)) / 2: +1 or -1 where the responses differ, else 0.
    """
    return _sigmoid(UTILITY_GAP * (personas_Pex6 @ difference_Trx6.T))


def difference(query: Query) -> np.ndarray:
    """Reads difference_6 of a triple in which a is `chosen` and b is `rejected`."""
    return (text.read_response(query.chosen) - text.read_response(query.rejected)) // 2


def posterior(signals: Sequence[Signal]) -> np.ndarray:
    """Exact p(persona | s), [Pe], by enumeration, from the text of the signals.

    The prior is uniform over all 64 personas. This is the belief of an ideal reader who knows the world, but not which
    combinations of tastes were held out.
    """
    log_p_Pe = np.zeros(len(PERSONAS_Pex6))
    for signal in signals:
        if signal.kind == "pair":
            gap_6 = difference(Query(signal.prompt, signal.chosen, signal.rejected))
            log_p_Pe = log_p_Pe + np.log(preference(PERSONAS_Pex6, gap_6[None])[:, 0])
        else:
            for taste, value in text.read_statements(signal.text).items():
                right_Pe = PERSONAS_Pex6[:, taste] == value
                log_p_Pe = log_p_Pe + np.log(np.where(right_Pe, 1.0 - STATEMENT_ERROR, STATEMENT_ERROR))
    p_Pe = np.exp(log_p_Pe - log_p_Pe.max())
    return p_Pe / p_Pe.sum()


def taste(example: Example) -> np.ndarray:
    """The user's true tastes, [6], +1 or -1, read from the persona; ValueError if it does not name them all."""
    named = text.read_summary(example.persona)
    if len(named) < text.N_TASTES:
        raise ValueError(f"stylebook: persona of user {example.user} does not name all tastes: {example.persona!r}")
    return np.array([named[i] for i in range(text.N_TASTES)])


@dataclasses.dataclass(frozen=True)
class Truth:
    """Exact quantities of one Example, whose queries are the Tr triples.

    Attributes:
        taste_6: the user's true tastes, +1 or -1.
        posterior_Pe: p(persona | s).
        given_persona_Tr: p*(chosen preferred | t, persona).
        given_signals_Tr: p*(chosen preferred | t, s).
    """

    taste_6: np.ndarray
    posterior_Pe: np.ndarray
    given_persona_Tr: np.ndarray
    given_signals_Tr: np.ndarray


def truth(example: Example) -> Truth:
    """Computes an Example's exact quantities from its text alone; ValueError if the text is not from this world."""
    taste_6 = taste(example)
    posterior_Pe = posterior(example.signals)
    difference_Trx6 = np.stack([difference(query) for query in example.queries])
    return Truth(
        taste_6=taste_6,
        posterior_Pe=posterior_Pe,
        given_persona_Tr=preference(taste_6[None], difference_Trx6)[0],
        given_signals_Tr=posterior_Pe @ preference(PERSONAS_Pex6, difference_Trx6),
    )


def label_given_signals(examples: Sequence[Example], queries: Sequence[Query]) -> np.ndarray:
    """p*(o=1 | t, s) for each user's signals and each query, [U, Tr]; o = 1 means that `chosen` is preferred."""
    difference_Trx6 = np.stack([difference(query) for query in queries])
    posterior_UxPe = np.stack([posterior(example.signals) for example in examples])
    return posterior_UxPe @ preference(PERSONAS_Pex6, difference_Trx6)


def label_given_persona(examples: Sequence[Example], queries: Sequence[Query]) -> np.ndarray:
    """p*(o=1 | t, persona) for each user and each query, [U, Tr]."""
    taste_Ux6 = np.stack([taste(example) for example in examples])
    return preference(taste_Ux6, np.stack([difference(query) for query in queries]))


def channel_from_ids(ids_UxK: np.ndarray) -> np.ndarray:
    """p(z | s), [U, Z], if each user's z is drawn uniformly from K samples, given as summary ids in 0..Z-1."""
    channel_UxZ = np.zeros((len(ids_UxK), int(ids_UxK.max()) + 1))
    for user, ids_K in enumerate(ids_UxK):
        np.add.at(channel_UxZ[user], ids_K, 1.0 / len(ids_K))
    return channel_UxZ


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy of Bernoulli(p) in nats, elementwise; 0 at p = 0 and 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, -p * np.log(p), 0.0) + np.where(p < 1, -(1 - p) * np.log1p(-p), 0.0)


def cross_entropy(p: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """E_{o ~ Bernoulli(p)}[-log p_theta(o)] in nats, elementwise. Log-odds keep it finite for a very sure model."""
    return p * np.logaddexp(0.0, -log_odds) + (1 - p) * np.logaddexp(0.0, log_odds)


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """The terms of the identity in POPI section 2, in nats, each a mean over triples.

    loss = conditional_entropy + approximation_error, and conditional_entropy = label_entropy - information.

    Attributes:
        loss: E[-log p_theta(o | t, z)], the expected loss.
        label_entropy: H(o | t).
        conditional_entropy: H(o | t, z).
        information: I(o; z | t).
        approximation_error: E KL(p*(o | t, z) || p_theta(o | t, z)).
    """

    loss: float
    label_entropy: float
    conditional_entropy: float
    information: float
    approximation_error: float


def label_given_summary(label_UxTr: np.ndarray, channel_UxZ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p(z), [Z], and p*(o=1 | t, z), [Z, Tr].

    p*(o=1 | t, z) = sum_i w_i(z) p*(o=1 | t, s_i), with w_i(z) proportional to p(z | s_i).
    """
    joint_UxZ = channel_UxZ / len(channel_UxZ)
    p_Z = joint_UxZ.sum(axis=0)
    weight_UxZ = joint_UxZ / np.maximum(p_Z, 1e-300)[None]
    return p_Z, weight_UxZ.T @ label_UxTr


def decompose(label_UxTr: np.ndarray, channel_UxZ: np.ndarray, log_odds_ZxTr: np.ndarray) -> Decomposition:
    """Decomposes a generator's loss exactly, on a finite population of users.

    The loss is summed user by user, as in training. The other terms are computed from p*(o | t, z).

    Args:
        label_UxTr: p*(o=1 | t, s_i), e.g. from label_given_signals.
        channel_UxZ: p(z | s_i), whose rows sum to 1, e.g. from channel_from_ids.
        log_odds_ZxTr: the generator's log-odds beta h, where p_theta(o=1 | t, z) = sigmoid(beta h).
    """
    n_users = len(label_UxTr)
    p_Z, given_ZxTr = label_given_summary(label_UxTr, channel_UxZ)
    loss_UxTr = sum(
        channel_UxZ[:, z, None] * cross_entropy(label_UxTr, log_odds_ZxTr[z]) for z in range(channel_UxZ.shape[1])
    )
    label_entropy = float(entropy(label_UxTr.mean(axis=0)).mean())
    conditional_entropy = float((p_Z @ entropy(given_ZxTr)).mean())
    kl_ZxTr = cross_entropy(given_ZxTr, log_odds_ZxTr) - entropy(given_ZxTr)
    return Decomposition(
        loss=float(np.sum(loss_UxTr) / (n_users * label_UxTr.shape[1])),
        label_entropy=label_entropy,
        conditional_entropy=conditional_entropy,
        information=label_entropy - conditional_entropy,
        approximation_error=float((p_Z @ kl_ZxTr).mean()),
    )
