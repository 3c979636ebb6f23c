"""Splits the loss into approximation error + conditional entropy (POPI section 2) where p* is known (stylebook).

The population is finite: the first USERS test users, equally likely; each user's z is one of their sampled contexts,
equally likely; and all users share a set of triples t. On this population every term is exact.
Summaries that name the same tastes count as one z, the first of them. Otherwise the wording would tell the users of a
small population apart: a serial number per user would be as informative as the signals themselves.
o = 1 means that a triple's `chosen` is preferred. Shape letters: docs/architecture.md.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from popi_jax.config import SUMMARIZED
from popi_jax.data import files
from popi_jax.data.builders import stylebook, stylebook_exact, stylebook_text
from popi_jax.data.schema import Example
from popi_jax.errors import UserError, first_line
from popi_jax.evaluation import stats, stored
from popi_jax.evaluation.evaluate import Evaluator
from popi_jax.model.weights import Tree
from popi_jax.rollout.pairs import Item
from popi_jax.training.rng import stream_key

USERS, TRIPLES = 64, 32


@dataclasses.dataclass(frozen=True)
class Measured:
    """One method's predictions on the common triples, and the true probabilities.

    Attributes:
        context_UxK: index of each user's contexts among the Z distinct ones.
        log_odds_ZxTr: beta h, the log-odds of p_theta(o=1 | t, z).
        label_UxTr: p*(o=1 | t, s) given each user's signals. For the oracle p*(o=1 | t, persona), because a persona is
            not a function of the signals.
    """

    context_UxK: np.ndarray
    log_odds_ZxTr: np.ndarray
    label_UxTr: np.ndarray

    def terms(self) -> dict[str, float]:
        """Returns the exact decomposition, in nats, under its names in results.json."""
        channel_UxZ = stylebook_exact.channel_from_ids(self.context_UxK)
        exact = stylebook_exact.decompose(self.label_UxTr, channel_UxZ, self.log_odds_ZxTr)
        return {f"exact_{name}_nats": value for name, value in dataclasses.asdict(exact).items()}


def measure(
    evaluator: Evaluator, phi: Tree | None, theta: Tree | None, examples: Sequence[Example], step: int
) -> Measured:
    """Scores every common triple under every distinct context of the users."""
    config, references = evaluator.config, evaluator.references
    users = list(examples)[:USERS]
    contexts = evaluator.contexts(phi, users, stream_key(config.seed, "evaluate", step))
    own = [[context.text for context in some] for some in contexts]
    if config.method in SUMMARIZED:
        own = one_wording(own)
    distinct = list(dict.fromkeys(text for texts in own for text in texts))
    place = {text: i for i, text in enumerate(distinct)}
    queries = stylebook.common_queries(config.data.seed, TRIPLES)
    told = {context.text: context.told for some in contexts for context in some}
    items = [Item(query, told[text]) for text in distinct for query in queries]
    logps_ZxTrx2 = evaluator.scorer.logps(theta, items).reshape(len(distinct), len(queries), 2)
    asked = [Item(query, None) for query in queries]
    references.remember(asked)
    ref_Trx2 = references.lookup(asked)
    ratio_ZxTrx2 = logps_ZxTrx2 - ref_Trx2[None]
    h_ZxTr = (ratio_ZxTrx2[..., 0] - ratio_ZxTrx2[..., 1]).astype(np.float64)
    label_of = stylebook_exact.label_given_persona if config.method == "oracle" else stylebook_exact.label_given_signals
    return Measured(
        context_UxK=np.array([[place[text] for text in texts] for texts in own]),
        log_odds_ZxTr=config.objective.beta * h_ZxTr,
        label_UxTr=label_of(users, queries),
    )


def one_wording(texts_UxK: Sequence[Sequence[str | None]]) -> list[list[str | None]]:
    """Replaces each summary by the first one that names the same tastes."""
    first: dict[tuple[tuple[int, int], ...], str | None] = {}
    return [
        [first.setdefault(tuple(stylebook_text.read_summary(text or "").items()), text) for text in texts]
        for texts in texts_UxK
    ]


def estimate_information(population: Measured, informed: Measured, resamples: int) -> stats.Interval:
    """Estimates I(o; z | t) as one would without knowing p*: from labels alone, one drawn per user and triple.

    The estimate is the population generator's loss minus the loss with z, in nats, with its interval over users. Its
    expectation is I(o; z | t) plus the population generator's approximation error minus the informed generator's.
    """
    label_UxTr = np.random.default_rng(0).random(informed.label_UxTr.shape) < informed.label_UxTr

    def nats(log_odds_UxTr: np.ndarray) -> np.ndarray:
        return stylebook_exact.cross_entropy(label_UxTr, log_odds_UxTr)

    without_UxTr = nats(np.broadcast_to(population.log_odds_ZxTr[0], label_UxTr.shape))
    with_UxTr = np.mean([nats(informed.log_odds_ZxTr[z_U]) for z_U in informed.context_UxK.T], axis=0)
    users = [user for user, row in enumerate(label_UxTr) for _ in row]
    return stats.paired_bootstrap_difference(without_UxTr.ravel(), with_UxTr.ravel(), users, resamples, seed=0)


def write(path: pathlib.Path, measured: Measured) -> None:
    """Writes the measurements to `path`; only process 0 does."""
    files.write_npz(path, **vars(measured))


def read(path: pathlib.Path) -> Measured:
    """Reads a file of `write`; UserError if it is damaged or another version of this code wrote it."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = Measured(**{name: arrays[name] for name in arrays.files})
        (_, K), (Z, Tr), (U, _) = (array.shape for array in vars(found).values())
        if found.label_UxTr.shape != (U, Tr) or found.context_UxK.shape != (U, K) or found.context_UxK.max() >= Z:
            raise ValueError("its arrays do not fit each other")
        return found
    except Exception as error:  # A broken file can make numpy and zipfile raise any exception.
        raise UserError(
            f"{path}: damaged, or written by another version ({first_line(error)}); {stored.REMEDY}"
        ) from error
