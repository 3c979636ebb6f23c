"""The data card: every figure counted by hand on a few users."""

import collections
import json

import pytest

from popi_jax.config import changed, parse
from popi_jax.configs import quickstart
from popi_jax.data import card, disjoint
from popi_jax.data.schema import Example, Query, Signal

DATA = changed(parse(quickstart.get_config("runlocal")), {"data.dataset": "elix", "data.path": "elix"}).data


def pair(prompt: str, chosen: str = "yes", rejected: str = "no") -> Signal:
    return Signal("pair", prompt, chosen, rejected, provenance="f#0")


def user(name: str, signals: list[Signal], queries: list[Query], person: str = "", persona: str = "p") -> Example:
    return Example(name, "train", tuple(signals), tuple(queries), persona, person)


TRAIN = [
    user("a", [pair("x"), Signal("comment", "m", text="one two three")], [Query("q", "yes", "no", "f#1")], "child"),
    user("b", [pair("x"), pair("q", "yes", "no")], [Query("q", "yes", "no", "f#2"), Query("r", "1", "2")], "child"),
    user("c", [pair("r", "2", "1")], [Query("q", "no", "yes", "f#3"), Query("r", "2", "1", "f#4")], "expert", ""),
]
TEST = [
    user("d", [pair("x"), pair("new")], [Query("m", "1", "2"), Query("r", "1", "2")], "child"),
    user("e", [], [Query("fresh words here", "a", "b", "g#9")]),
]


@pytest.fixture(scope="module")
def made() -> dict:
    return card.make(DATA, {"train": TRAIN, "test": TEST}, {"rows": 3}, "mit")


def test_counts_of_a_split(made: dict) -> None:
    train = made["splits"]["train"]
    assert (train["users"], train["persons"], train["users_by_person"]) == (3, 2, {"child": 2, "expert": 1})
    assert train["users_without_persona"] == 1
    assert train["signals_by_kind"] == {"pair": 4, "comment": 1}
    assert train["signals_per_user"] == {"least": 1, "mean": 5 / 3, "most": 2}
    assert (train["queries"], train["distinct_prompts"]) == (5, 2)
    assert train["users_by_file"] == {"f": 3}
    assert train["longest"]["signal text"] == {"words": 3, "at": ""}
    assert made["splits"]["test"]["longest"]["prompt"] == {"words": 3, "at": "g#9"}
    assert made["splits"]["test"]["users_by_person"] == {}  # As many persons as users.


def test_repeats_and_contradictions(made: dict) -> None:
    train = made["splits"]["train"]
    assert train["repeated_triples"] == 1  # q yes no, of a and b.
    assert train["reversed_triples"] == 2  # q of a and c; r of b and c.
    assert train["repeated_signals"] == 1  # x, of a and b.
    assert train["queries_whose_prompt_the_user_shows"] == 2  # q of b, r of c.
    assert train["queries_that_the_user_shows"] == 2
    assert made["splits"]["test"]["queries_that_the_user_shows"] == 0


def test_what_the_splits_share(made: dict) -> None:
    """M is in a training comment alone; r 1 2 is a training query; x is a signal of both."""
    assert made["shared"] == {"persons": 1, "test_prompts": 2, "test_triples": 1, "test_signals": 1}
    assert card.shared(TRAIN, TEST[1:]) == dict.fromkeys(("persons", "test_prompts", "test_triples", "test_signals"), 0)


def test_case_and_blanks_make_no_difference_to_what_is_shared() -> None:
    train = [user("a", [pair("One  TWO three four FIVE")], [Query(" Q\tand more", "Yes", "NO")])]
    test = [user("b", [pair("one two three four five")], [Query("q AND more", "yes", "no")])]
    assert card.shared(train, test) == {"persons": 0, "test_prompts": 1, "test_triples": 1, "test_signals": 1}


def test_training_loses_what_test_users_have():
    counts = collections.Counter()
    kept = disjoint.without(
        [
            user("a", [pair("X", "Yes"), pair("own"), Signal("profile", text="old")], [Query("q", "1", "2")]),
            user("b", [pair("x ")], [Query("r", "1", "2")]),
            user("c", [pair("own")], [Query("new", "YES", "no"), Query("s", "1", "2")]),
        ],
        [user("t", [pair("x"), pair("new"), Signal("profile", text="old")], [Query("u", "1", "2")])],
        counts,
    )
    assert [(e.user, [s.prompt for s in e.signals], [q.prompt for q in e.queries]) for e in kept] == [
        ("a", ["own", ""], ["q"]),
        ("c", ["own"], ["s"]),
    ]
    assert counts == {
        "train signals that a test user has, too": 2,
        "train queries that a test user has, too": 1,
        "train users of whom test users have all signals or queries, too": 1,
    }


def test_the_card_is_json(made: dict, tmp_path) -> None:
    card.write(tmp_path, made)
    assert json.loads((tmp_path / "data_card.json").read_text()) == made
    assert (made["licence"], made["dropped"], made["dataset"]) == ("mit", {"rows": 3}, "elix")
