"""Whether summaries name the persona, with a scorer whose log-probabilities are worked out by hand."""

import types

import numpy as np
import pytest

from popi_jax.data.encoding import Unfit
from popi_jax.data.schema import Example
from popi_jax.evaluation import naming

PERSONAS = ("likes red", "likes blue", "likes red and blue things")


def logp(text: str, told: str | None) -> float:
    """Longer texts are less likely; each word that the summary has, too, makes one likelier by 2 nats."""
    words = text.split()
    return -len(words) + 2.0 * sum(word in (told or "").split() for word in words)


class Encoder:
    """Stands in for the encoder: texts of more than `longest` words do not fit."""

    prompts = types.SimpleNamespace(summary_start="")
    limits = types.SimpleNamespace(summary=8)

    def __init__(self, longest=10):
        self.longest = longest

    def check(self, query, told, more=0):
        if max(len(query.chosen.split()), len(query.rejected.split())) > self.longest:
            raise Unfit("that are too long", "too long")


def evaluator(longest=10):
    def logps(theta, items):
        assert theta is None  # The untrained model judges.
        told = [item.told and item.told.text for item in items]
        return np.array(
            [
                [logp(item.query.chosen, own), logp(item.query.rejected, own)]
                for item, own in zip(items, told, strict=True)
            ]
        )

    return types.SimpleNamespace(
        sampler=types.SimpleNamespace(encoder=Encoder(longest)),
        scorer=types.SimpleNamespace(logps=logps),
        config=types.SimpleNamespace(eval=types.SimpleNamespace(bootstrap=50)),
    )


def users(*personas: str) -> list[Example]:
    return [Example(f"u{i}", "test", (), (), persona) for i, persona in enumerate(personas)]


def test_the_share_by_hand():
    """The first user's summary names its persona alone, the second's names the other colour, the third's nothing."""
    texts = [["red", "blue"], ["red"], ["well"]]
    found = naming.measure(evaluator(), users(*PERSONAS), texts)
    # u0: the summary makes "likes red" and the long persona likelier by 2 nats, so u0's own beats "likes blue" alone.
    # u1's and u2's own beat none.
    assert found["share"] == pytest.approx(1 / 6)
    assert found["nats"] == pytest.approx((2 + 0 + 0) / 3)
    assert found["users"] == 3


def test_length_alone_wins_nothing():
    """A likelier persona does not win if the summary did not make it likelier."""
    found = naming.measure(evaluator(), users("red", "a long blue thing"), [["red"], ["thing"]])
    assert found["share"] == 1.0
    found = naming.measure(evaluator(), users("red", "a long blue thing"), [["well"], ["well"]])
    assert found["share"] == 0.0


def test_users_without_a_persona_or_with_one_that_does_not_fit_are_left_out():
    assert naming.measure(evaluator(), users("likes red", ""), [["red"], ["red"]]) is None
    assert naming.measure(evaluator(), users("likes red", "likes red"), [["red"], ["red"]]) is None
    found = naming.measure(evaluator(2), users(*PERSONAS[:2], PERSONAS[0]), [["red"], ["red"], ["red"]])
    assert found["users"] == 3
    assert naming.measure(evaluator(1), users(*PERSONAS), [["red"]] * 3) is None
