"""What is known exactly about stylebook: posteriors over tastes by enumeration, p*, entropies, mutual information.

Letters: U users, T triples (x, a, b), Z summaries, P = 64 personas, 6 tastes. o = 1 means that a is preferred to b.
Natural logarithms throughout. Equations are those of POPI section 2, on a finite population: users uniform, each with a
known probability of each of a finite set of summaries.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from popi_jax.data import stylebook_text as text
from popi_jax.data.schema import Example, Query, Signal

PERSONAS_Px6 = np.array(list(itertools.product((1, -1), repeat=text.N_TASTES)))
UTILITY_GAP = 2.6  # u(a) - u(b) for two responses that differ in one taste, a being to the user's taste.
STATEMENT_ERROR = 0.05  # A statement in a comment or a profile is wrong this often.


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def preference(personas_Px6: np.ndarray, difference_Tx6: np.ndarray) -> np.ndarray:
    """Bradley-Terry with the known utility: p*(o=1 | t, persona) of each persona and triple, [P, T].

    `difference` is (style(a) - style(b)) / 2: +1 or -1 where the two responses differ, else 0.
    """
    return _sigmoid(UTILITY_GAP * (personas_Px6 @ difference_Tx6.T))


def difference(query: Query) -> np.ndarray:
    """Reads difference_6 of a triple whose a is `chosen` and b is `rejected`."""
    return (text.read_response(query.chosen) - text.read_response(query.rejected)) // 2


def posterior(signals: Sequence[Signal]) -> np.ndarray:
    """Exact p(persona | s) over the 64 personas, by enumeration, of signals read from their text.

    The prior is uniform over all 64: what an ideal reader believes who knows the world but not which combinations of
    tastes were held out.
    """
    log_p_P = np.zeros(len(PERSONAS_Px6))
    for signal in signals:
        if signal.kind == "pair":
            gap_6 = difference(Query(signal.prompt, signal.chosen, signal.rejected))
            log_p_P = log_p_P + np.log(preference(PERSONAS_Px6, gap_6[None])[:, 0])
        else:
            for taste, value in text.read_statements(signal.text).items():
                right_P = PERSONAS_Px6[:, taste] == value
                log_p_P = log_p_P + np.log(np.where(right_P, 1.0 - STATEMENT_ERROR, STATEMENT_ERROR))
    p_P = np.exp(log_p_P - log_p_P.max())
    return p_P / p_P.sum()


def taste(example: Example) -> np.ndarray:
    """The user's true tastes, [6], +1 or -1, read from the persona; ValueError where it does not name them all."""
    named = text.read_summary(example.persona)
    if len(named) < text.N_TASTES:
        raise ValueError(f"stylebook: persona of user {example.user} does not name all tastes: {example.persona!r}")
    return np.array([named[i] for i in range(text.N_TASTES)])


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is known exactly of one Example, T its queries.

    Attributes:
        taste_6: the user's true tastes, +1 or -1.
        posterior_P: p(persona | s).
        given_persona_T: p*(chosen preferred | t, persona).
        given_signals_T: p*(chosen preferred | t, s).
    """

    taste_6: np.ndarray
    posterior_P: np.ndarray
    given_persona_T: np.ndarray
    given_signals_T: np.ndarray


def truth(example: Example) -> Truth:
    """Reads an Example's text back: deterministic, no side table. ValueError where the text is not of this world."""
    taste_6 = taste(example)
    posterior_P = posterior(example.signals)
    difference_Tx6 = np.stack([difference(query) for query in example.queries])
    return Truth(
        taste_6=taste_6,
        posterior_P=posterior_P,
        given_persona_T=preference(taste_6[None], difference_Tx6)[0],
        given_signals_T=posterior_P @ preference(PERSONAS_Px6, difference_Tx6),
    )


def label_given_signals(examples: Sequence[Example], queries: Sequence[Query]) -> np.ndarray:
    """p*(o=1 | t, s) of every user's signals and every query of a common set (o = 1: `chosen` is preferred), [U, T]."""
    difference_Tx6 = np.stack([difference(query) for query in queries])
    posterior_UxP = np.stack([posterior(example.signals) for example in examples])
    return posterior_UxP @ preference(PERSONAS_Px6, difference_Tx6)


def label_given_persona(examples: Sequence[Example], queries: Sequence[Query]) -> np.ndarray:
    """p*(o=1 | t, persona) of every user and every query of a common set, [U, T]."""
    taste_Ux6 = np.stack([taste(example) for example in examples])
    return preference(taste_Ux6, np.stack([difference(query) for query in queries]))


def channel_from_ids(ids_UxK: np.ndarray) -> np.ndarray:
    """p(z | s) when each user's z is one of their K samples, uniformly: from summary ids in 0..Z-1, [U, Z]."""
    channel_UxZ = np.zeros((len(ids_UxK), int(ids_UxK.max()) + 1))
    for user, ids_K in enumerate(ids_UxK):
        np.add.at(channel_UxZ[user], ids_K, 1.0 / len(ids_K))
    return channel_UxZ


def entropy(p: np.ndarray) -> np.ndarray:
    """H of Bernoulli(p) in nats, elementwise; 0 at p = 0 and 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, -p * np.log(p), 0.0) + np.where(p < 1, -(1 - p) * np.log1p(-p), 0.0)


def cross_entropy(p: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """E_{o ~ Bernoulli(p)}[-log p_theta(o)] in nats, elementwise, the model by its log-odds: finite however sure."""
    return p * np.logaddexp(0.0, -log_odds) + (1 - p) * np.logaddexp(0.0, log_odds)


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """POPI section 2's identity, each a mean over triples, in nats.

    loss = conditional_entropy + approximation_error, and conditional_entropy = label_entropy - information.

    Attributes:
        loss: E[-log p_theta(o | t, z)], the expected loss itself.
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


def label_given_summary(label_UxT: np.ndarray, channel_UxZ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p(z), [Z], and p*(o=1 | t, z) = sum_i w_i(z) p*(o=1 | t, s_i) with w_i(z) proportional to p(z | s_i), [Z, T]."""
    joint_UxZ = channel_UxZ / len(channel_UxZ)
    p_Z = joint_UxZ.sum(axis=0)
    weight_UxZ = joint_UxZ / np.maximum(p_Z, 1e-300)[None]
    return p_Z, weight_UxZ.T @ label_UxT


def decompose(label_UxT: np.ndarray, channel_UxZ: np.ndarray, log_odds_ZxT: np.ndarray) -> Decomposition:
    """The exact decomposition of the loss of a generator on a finite population of users.

    Args:
        label_UxT: p*(o=1 | t, s_i), e.g. from label_given_signals.
        channel_UxZ: p(z | s_i), rows sum to 1, e.g. from channel_from_ids.
        log_odds_ZxT: the generator's: p_theta(o=1 | t, z) = sigmoid(beta h), so beta h.

    The loss is summed user by user, as training does; the other terms go through p*(o | t, z).
    """
    n_users = len(label_UxT)
    p_Z, given_ZxT = label_given_summary(label_UxT, channel_UxZ)
    loss_UxT = sum(
        channel_UxZ[:, z, None] * cross_entropy(label_UxT, log_odds_ZxT[z]) for z in range(channel_UxZ.shape[1])
    )
    label_entropy = float(entropy(label_UxT.mean(axis=0)).mean())
    conditional_entropy = float((p_Z @ entropy(given_ZxT)).mean())
    kl_ZxT = cross_entropy(given_ZxT, log_odds_ZxT) - entropy(given_ZxT)
    return Decomposition(
        loss=float(np.sum(loss_UxT) / (n_users * label_UxT.shape[1])),
        label_entropy=label_entropy,
        conditional_entropy=conditional_entropy,
        information=label_entropy - conditional_entropy,
        approximation_error=float((p_Z @ kl_ZxT).mean()),
    )
