"""stylebook: a synthetic personalization world that ships with the package and whose p* is known exactly.

A user has six binary tastes, and a response expresses each taste one way or the other. Preferences follow Bradley-Terry
with a utility that counts the satisfied tastes. Signals are noisy: pairs through Bradley-Terry, statements in comments
and profiles through a known error rate. 16 of the 64 combinations are held out for the test users. They form an
orthogonal fraction, so every taste, and every pair of tastes, is equally frequent in training and test.
"""

from typing import Protocol

import numpy as np

from popi_jax.data.builders import stylebook_text as text
from popi_jax.data.builders.stylebook_exact import STATEMENT_ERROR, PERSONAS_Pex6, preference
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError

# Before the order is shuffled, signal i of a user has kind SIGNAL_KINDS[i % 6].
SIGNAL_KINDS = ("comment", "profile", "pair", "comment", "comment", "pair")
STATEMENTS = {"comment": 2, "profile": 3}
DIFFERING = (1, 3)  # The number of tastes in which two responses differ; odd, so that utilities never tie.
_SPLIT_STREAM = {"train": 0, "test": 1, "common": 2}


class StylebookConfig(Protocol):
    """The fields of config.data that stylebook reads."""

    seed: int
    signals_per_user: int
    train_users: int
    test_users: int
    queries_per_user: int
    test_queries_per_user: int


def _held_out(personas_Pex6: np.ndarray) -> np.ndarray:
    """True for the personas of test users, [Pe]: the 2^(6-2) fraction of resolution IV with ABCE = BCDF = I."""
    a, b, c, d, e, f = personas_Pex6.T
    return (a * b * c * e == 1) & (b * c * d * f == 1)


TEST_PERSONAS_16x6 = PERSONAS_Pex6[_held_out(PERSONAS_Pex6)]
TRAIN_PERSONAS_48x6 = PERSONAS_Pex6[~_held_out(PERSONAS_Pex6)]


def two_responses(rng: np.random.Generator, topic: str) -> tuple[tuple[str, str], np.ndarray]:
    """Draws two responses about `topic` and difference_6 = (style(a) - style(b)) / 2."""
    style_6 = rng.choice((1, -1), text.N_TASTES)
    differs = rng.permutation(text.N_TASTES) < rng.choice(DIFFERING)
    other_6 = np.where(differs, -style_6, style_6)
    return (text.response(rng, topic, style_6), text.response(rng, topic, other_6)), (style_6 - other_6) // 2


def labelled_query(rng: np.random.Generator, taste_6: np.ndarray, provenance: str = "") -> Query:
    """Draws a triple and labels it with the response that this user states to prefer, by Bradley-Terry."""
    topic, prompt = text.question(rng)
    (a, b), difference_6 = two_responses(rng, topic)
    if rng.random() >= preference(taste_6[None], difference_6[None])[0, 0]:
        a, b = b, a
    return Query(prompt, a, b, provenance)


class _Deck:
    """Deals tastes to state, all six before any repeats. The deal does not depend on the user's tastes."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._left: list[int] = []

    def deal(self, n: int) -> list[int]:
        dealt: list[int] = []
        while len(dealt) < n:
            candidates = [taste for taste in self._left if taste not in dealt]
            if not candidates:
                self._left += [int(taste) for taste in self._rng.permutation(text.N_TASTES)]
                continue
            self._left.remove(candidates[0])
            dealt.append(candidates[0])
        return dealt


def signals_of(rng: np.random.Generator, taste_6: np.ndarray, n: int, source: str) -> tuple[Signal, ...]:
    """Draws n signals of a user: noisy pairs, comments and profiles in random order."""
    deck = _Deck(rng)
    signals = []
    for i in range(n):
        kind = SIGNAL_KINDS[i % len(SIGNAL_KINDS)]
        provenance = f"{source}/signal{i}"
        if kind == "pair":
            pair = labelled_query(rng, taste_6)
            signals.append(Signal("pair", pair.prompt, pair.chosen, pair.rejected, provenance=provenance))
            continue
        said = {
            taste: int(taste_6[taste] if rng.random() >= STATEMENT_ERROR else -taste_6[taste])
            for taste in deck.deal(STATEMENTS[kind])
        }
        if kind == "comment":
            prompt = text.question(rng)[1]
            signals.append(Signal("comment", prompt, text=text.comment(rng, said), provenance=provenance))
        else:
            signals.append(Signal("profile", text=text.profile(rng, said), provenance=provenance))
    return tuple(signals[i] for i in rng.permutation(n))


def draw_example(seed: int, split: str, index: int, signals: int, queries: int) -> Example:
    """Draws user number `index` of a split. The user depends only on (seed, split, index)."""
    rng = np.random.default_rng((seed, _SPLIT_STREAM[split], index))
    personas = TRAIN_PERSONAS_48x6 if split == "train" else TEST_PERSONAS_16x6
    # Every block of 48 (test: 16) consecutive users has every combination of the split once.
    block_rng = np.random.default_rng((seed, 3 + _SPLIT_STREAM[split], index // len(personas)))
    taste_6 = personas[block_rng.permutation(len(personas))[index % len(personas)]]
    user = f"stylebook-{split}-{index}"
    return Example(
        user=user,
        split=split,
        signals=signals_of(rng, taste_6, signals, user),
        queries=tuple(labelled_query(rng, taste_6, f"{user}/query{m}") for m in range(queries)),
        persona=text.summary(dict(enumerate(taste_6))),
    )


def load(data: StylebookConfig) -> dict[str, list[Example]]:
    """Draws data.train_users and data.test_users users. No training user has a test user's combination of tastes."""
    for field in ("signals_per_user", "train_users", "test_users", "queries_per_user", "test_queries_per_user"):
        if getattr(data, field) < 1:
            raise UserError(f"config: data.{field} = {getattr(data, field)} is too small for stylebook; use 1 or more")
    sizes = {"train": (data.train_users, data.queries_per_user), "test": (data.test_users, data.test_queries_per_user)}
    return {
        split: [draw_example(data.seed, split, i, data.signals_per_user, queries) for i in range(users)]
        for split, (users, queries) in sizes.items()
    }


def common_queries(seed: int, n: int) -> list[Query]:
    """Draws the n triples t for exact quantities. They belong to no user, and `chosen` is either response at random."""
    queries = []
    for i in range(n):
        rng = np.random.default_rng((seed, _SPLIT_STREAM["common"], i))
        topic, prompt = text.question(rng)
        (a, b), _ = two_responses(rng, topic)
        queries.append(Query(prompt, a, b, f"stylebook-common/query{i}"))
    return queries
