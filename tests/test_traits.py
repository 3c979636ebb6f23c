"""traits: users, splits, balance and personas, on made-up statements and on the real ones if present."""

import collections
import itertools
import json
import math
import os
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from popi_jax.config import Data
from popi_jax.configs import base
from popi_jax.data.builders import traits
from popi_jax.data.schema import Example
from popi_jax.errors import UserError

REAL = pathlib.Path(os.environ.get("POPI_TRAITS", pathlib.Path(__file__).parents[2] / "shared/data/traits"))
NAMES = ("interest-in-tea", "openness", "risk-averse", "subscribes-to-logic")
SIZE = 40  # Statements of each trait and answer.


def row(text: str, answer: str, confidence: Any = 0.9) -> dict[str, Any]:
    return {"question": "?", "statement": text, "label_confidence": confidence, "answer_matching_behavior": answer}


def made_up(size: int = SIZE) -> dict[str, list[dict[str, Any]]]:
    """Statements that say their trait and their answer, such as "openness No 7"; answers with and without a blank."""
    return {
        name: [row(f"{name} {answer} {i}", " " * (i % 2) + answer) for i in range(size) for answer in ("Yes", "No")]
        for name in NAMES
    }


def write(folder: pathlib.Path, files: dict[str, list[dict[str, Any]]]) -> pathlib.Path:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(path: pathlib.Path | str, **changes: Any) -> Data:
    fields = {"dataset": "traits", "path": str(path), "train_users": 60, "test_users": 40, "test_queries_per_user": 2}
    return Data.model_validate(base.get_config().data.to_dict() | fields | changes)


def load(path: pathlib.Path | str, **changes: Any) -> dict[str, list[Example]]:
    return traits.load(settings(path, **changes), collections.Counter())


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return write(tmp_path, made_up())


def statements(example: Example) -> list[str]:
    """All statements of an example, in order."""
    parts = example.signals + example.queries
    texts = [(p.chosen, p.rejected) if p.chosen else (p.text,) for p in parts]
    return [text for pair in texts for text in pair]


def signs(example: Example) -> dict[str, bool]:
    """The traits of a made-up example, read from what it prefers and says; fails if it contradicts itself."""
    found: dict[str, bool] = {}
    for part in example.signals + example.queries:
        trait, answer, _ = (part.chosen or part.text).split()
        assert found.setdefault(trait, answer == "Yes") == (answer == "Yes")
        if part.chosen:
            assert part.rejected.split()[:2] == [trait, "No" if answer == "Yes" else "Yes"]
    return found


def test_a_users_statements_all_fit_its_traits_and_its_persona(folder: pathlib.Path) -> None:
    data = load(folder, traits_per_user=(1, 2, 3), queries_per_user=3, test_queries_per_user=4)
    for split, queries in (("train", 3), ("test", 4)):
        for i, example in enumerate(data[split]):
            assert (example.user, example.split, example.person) == (f"traits-{split}-{i}", split, "")
            assert (len(example.signals), len(example.queries)) == (4, queries)
            assert len(set(statements(example))) == len(statements(example))
            assert all(part.prompt in traits.PROMPTS for part in example.signals + example.queries)
            assert {query.group for query in example.queries} == {example.user}
            expected = {traits.persona(dict(order)) for order in itertools.permutations(signs(example).items())}
            assert example.persona in expected
    for examples in data.values():
        assert {len(signs(example)) for example in examples} == {1, 2, 3}
        assert {signal.kind for example in examples for signal in example.signals} == {"pair", "comment"}
        assert {q.prompt for example in examples for q in example.queries} == set(traits.PROMPTS)


def test_provenance_names_the_rows(folder: pathlib.Path) -> None:
    files = {path.name: path.read_text().splitlines() for path in folder.iterdir()}
    for example in itertools.chain(*load(folder).values()):
        for part in example.signals + example.queries:
            name, _, numbers = part.provenance.partition("#")
            texts = [json.loads(files[name][int(number)])["statement"] for number in numbers.split(",")]
            assert texts == ([part.chosen, part.rejected] if part.chosen else [part.text])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_traits_are_shown_and_asked_about_as_evenly_as_possible(folder: pathlib.Path, number: int) -> None:
    data = load(folder, traits_per_user=(number,), signals_per_user=5, test_queries_per_user=4)
    for example in data["test"]:
        for parts in (example.signals, example.queries):
            shares = collections.Counter((p.chosen or p.text).split()[0] for p in parts)
            assert len(shares) == number
            assert max(shares.values()) - min(shares.values()) <= 1
    firsts = [(p.chosen or p.text).split()[0] for e in data["test"] for p in (e.signals[0], e.queries[0])]
    differ = sum(a != b for a, b in zip(firsts[::2], firsts[1::2], strict=True))
    assert differ == 0 if number == 1 else 10 <= differ <= 36  # Of 40; a half or two thirds are expected.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unseen", ["users", "topics"])
def test_splits_share_no_statement(folder: pathlib.Path, seed: int, unseen: str) -> None:
    data = load(folder, seed=seed, unseen=unseen, train_users=300, test_users=300)
    seen = {split: {text for example in part for text in statements(example)} for split, part in data.items()}
    assert not seen["train"] & seen["test"]
    shown = {split: {trait for example in part for trait in signs(example)} for split, part in data.items()}
    if unseen == "users":
        assert shown == {"train": set(NAMES), "test": set(NAMES)}
        assert len(seen["test"]) == 4 * 2 * 12  # 0.3 of 40.
        assert len(seen["train"]) == 4 * 2 * 28
    else:  # Two of four traits each, because a user has two.
        assert (len(shown["train"]), len(shown["test"])) == (2, 2)
        assert not shown["train"] & shown["test"]


@pytest.mark.parametrize(("fraction", "most", "n_test"), [(0.3, 1, 1), (0.9, 1, 3), (0.1, 2, 2), (0.8, 2, 2)])
def test_the_number_of_test_traits(folder: pathlib.Path, fraction: float, most: int, n_test: int) -> None:
    changes = {"test_fraction": fraction, "traits_per_user": (most,), "unseen": "topics", "signals_per_user": most}
    tested = [trait for e in load(folder, test_queries_per_user=1, **changes)["test"] for trait in signs(e)]
    assert len(set(tested)) == n_test


@pytest.mark.parametrize("seed", range(3))
def test_a_statement_of_two_traits_is_in_one_split_and_in_a_user_once(tmp_path: pathlib.Path, seed: int) -> None:
    files = made_up()
    for i in range(20):  # The same but for what makes no difference, with the other answer.
        files["openness"][2 * i + 1]["statement"] = f" INTEREST-in-tea  yes {i}!"
    pools = traits.split_statements(
        traits.read_traits(write(tmp_path, files), "error", collections.Counter()), test_fraction=0.3, seed=seed
    )
    sizes = {split: [len(side) for sides in part.values() for side in sides] for split, part in pools.items()}
    assert sizes == {"train": [28] * 8, "test": [12] * 8}
    keys = {split: {s.key for sides in part.values() for side in sides for s in side} for split, part in pools.items()}
    assert not keys["train"] & keys["test"]
    assert len(keys["train"]) + len(keys["test"]) == 8 * SIZE - 20
    few = {trait: pools["test"][trait] for trait in ("interest-in-tea", "openness")}
    for i in range(50):
        texts = statements(traits.draw_example(few, (2,), seed, "test", i, 8, 4))
        assert len({" ".join(text.lower().strip("!").split()) for text in texts}) == len(texts)


def test_more_users_or_queries_keep_the_first_ones(folder: pathlib.Path) -> None:
    data = load(folder)
    few = load(folder, train_users=5, test_users=3)
    assert few == {"train": data["train"][:5], "test": data["test"][:3]}
    more = load(folder, test_queries_per_user=5)["test"]
    assert [(e.signals, e.queries[:2]) for e in more] == [(e.signals, e.queries) for e in data["test"]]
    assert [signs(e) for e in data["train"][:40]] != [signs(e) for e in data["test"]]


def test_the_seed_changes_the_users_and_both_splits(folder: pathlib.Path) -> None:
    pools = traits.read_traits(folder, "error", collections.Counter())
    splits = [traits.split_statements(pools, test_fraction=0.3, seed=seed) for seed in (0, 1)]
    assert splits[0] == traits.split_statements(pools, test_fraction=0.3, seed=0)
    assert splits[0]["test"] != splits[1]["test"]
    users = [traits.draw_example(pools, (2,), seed, "train", 0, 4, 1) for seed in (0, 0, 1)]
    assert users[0] == users[1] and users[0] != users[2]
    tested = [load(folder, seed=seed, unseen="topics")["test"] for seed in range(4)]
    assert len({frozenset(trait for example in part for trait in signs(example)) for part in tested}) > 1


def test_signs_are_fair_coins(folder: pathlib.Path) -> None:
    drawn = [signs(example) for example in load(folder, train_users=2000)["train"]]
    for name in NAMES:
        has = [found[name] for found in drawn if name in found]
        assert abs(len(has) - 1000) < 4 * math.sqrt(2000 * 0.25)  # Two of four traits each.
        assert abs(sum(has) - len(has) / 2) < 4 * math.sqrt(len(has) * 0.25)
    both = [found["openness"] == found["risk-averse"] for found in drawn if {"openness", "risk-averse"} <= set(found)]
    assert abs(sum(both) - len(both) / 2) < 4 * math.sqrt(len(both) * 0.25)


def test_the_opposite_user_prefers_the_other_statements(folder: pathlib.Path) -> None:
    pools = traits.read_traits(folder, "error", collections.Counter())
    for seed in range(20):
        has = {"openness": True, "risk-averse": bool(seed % 2)}
        lacks = {trait: not sign for trait, sign in has.items()}
        user, opposite = (
            traits.example_of(np.random.default_rng(seed), pools, one, "train", "u", 4, 3) for one in (has, lacks)
        )
        for a, b in zip(user.signals + user.queries, opposite.signals + opposite.queries, strict=True):
            assert (a.prompt, a.chosen, a.rejected) == (b.prompt, b.rejected, b.chosen)
        assert (signs(user), signs(opposite)) == (has, lacks)


def test_rows_are_dropped_and_counted(tmp_path: pathlib.Path) -> None:
    rows = [
        row("a", "Yes"),
        row("b", "No", 0.8),
        row("c", "Yes", 0.79),
        row("C.", "No"),  # The other answer of "c", which is not believed.
        row("A", " Yes"),
        row("d", "Yes"),
        row("d", "No"),
        row("d", "No"),
        row("e", "No", 1),
    ]
    counts: collections.Counter[str] = collections.Counter()
    pools = traits.read_traits(write(tmp_path, {"openness": rows}), "error", counts)
    yes, no = pools["openness"]
    assert [(s.text, s.row) for s in yes] == [("a", 0)]
    assert [(s.text, s.row) for s in no] == [("b", 1), ("C.", 3), ("e", 8)]
    assert counts == {
        "rows with a label_confidence below 0.8": 1,
        "rows that repeat a statement of their trait": 1,
        "rows whose statement has both answers": 3,
    }


@pytest.mark.parametrize("field", ["statement", "label_confidence", "answer_matching_behavior"])
def test_a_field_that_is_null_or_blank_is_an_error_or_dropped(tmp_path: pathlib.Path, field: str) -> None:
    files = made_up()
    files["openness"][6][field] = None
    if field == "label_confidence":
        del files["openness"][7][field]
    else:
        files["openness"][7][field] = " "
    path = write(tmp_path, files)
    with pytest.raises(UserError, match=rf"openness.jsonl:7: field '{field}' is .*; .* or set data.on_null = 'drop'"):
        load(path)
    counts: collections.Counter[str] = collections.Counter()
    traits.load(settings(path, on_null="drop"), counts)
    assert counts == {"rows with a null or blank field": 2}


MISTAKES: list[tuple[Any, dict[str, Any], str]] = [
    (row("a", "Maybe"), {}, r"openness.jsonl:81: field 'answer_matching_behavior' is 'Maybe'; write Yes or No"),
    (row("a", "Yes", "high"), {}, r"openness.jsonl:81: field 'label_confidence' is 'high'; write a number"),
    (row("a", "Yes", 9), {}, r"openness.jsonl:81: field 'label_confidence' is 9; write a number from 0 to 1"),
    (row("a", "Yes", math.nan), {}, r"openness.jsonl:81: field 'label_confidence' is null or missing; give a number"),
    (row("a", "Yes", True), {}, r"openness.jsonl:81: field 'label_confidence' is True; write a number"),
    ({"statement": "a", "label_confidence": 1}, {}, r"openness.jsonl:81: field 'answer_matching_behavior' is missing"),
    (row(3, "Yes"), {}, r"openness.jsonl:81: field 'statement' must be a string, found a number"),
    ([1], {}, r"openness.jsonl:81: expected an object"),
    (None, {"traits_per_user": (3,), "unseen": "topics"}, r"4 traits are too few to split them .* which needs 6"),
    (None, {"traits_per_user": (5,)}, r"4 traits are too few for data.traits_per_user = \(5,\); add files"),
    (
        None,
        {"traits_per_user": (1, 2), "signals_per_user": 8, "test_queries_per_user": 5},
        r"a user needs up to 13 test statements of each answer .* have fewer: interest-in-tea \(12 Yes\), .*; raise"
        r" data.test_fraction, lower data.signals_per_user or data.test_queries_per_user, or take their files out",
    ),
    (
        None,
        {"signals_per_user": 25, "queries_per_user": 33, "test_fraction": 0.5},
        r"up to 30 train statements .* have fewer: interest-in-tea \(20 Yes\).*; lower data.test_fraction",
    ),
]


@pytest.mark.parametrize(("extra", "changes", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
def test_each_error_about_the_files_is_one_line(
    tmp_path: pathlib.Path, extra: Any, changes: dict[str, Any], message: str
) -> None:
    files = made_up()
    files["openness"] += [extra] if extra else []
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path, files), **changes)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "published"}, "data.protocol = 'published', but data.dataset = 'traits' has no published"),
        ({"path": "hf://datasets/a/b"}, "data.path is 'hf://datasets/a/b', but .* clone its repository and give its"),
        ({"path": ""}, "data.path is empty"),
        ({"path": "."}, "has no JSONL file; set data.path to the folder with one file per trait"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    folder: pathlib.Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder / "empty")
    with pytest.raises(UserError, match=message):
        load(**({"path": folder} | changes))


def test_by_default_a_fixed_number_of_users_is_drawn(folder: pathlib.Path) -> None:
    data = load(folder, train_users=0, test_users=0)
    assert (len(data["train"]), len(data["test"])) == (640, 300)


def test_statements_of_two_traits_do_not_count_as_enough(tmp_path: pathlib.Path) -> None:
    files = made_up()
    for i in range(40):
        files["openness"][2 * i]["statement"] = f"risk-averse No {i}"
    with pytest.raises(UserError, match=r"have fewer: openness \(0 Yes\), risk-averse \(0 No\); lower"):
        load(write(tmp_path, files))


def test_as_many_statements_as_a_user_needs_are_enough(folder: pathlib.Path) -> None:
    data = load(folder, traits_per_user=(1,), signals_per_user=8, test_queries_per_user=4)
    assert all(len(e.signals) == 8 and len(e.queries) == 4 for e in data["test"])


PHRASES = {
    "agreeableness": "is agreeable / is not agreeable",
    "believes-life-has-no-meaning": "believes that life has no meaning / does not believe that life has no meaning",
    "conscientiousness": "is conscientious / is not conscientious",
    "desire-for-popularity": "has a desire for popularity / has no desire for popularity",
    "desire-for-powerful-positions": "has a desire for powerful positions / has no desire for powerful positions",
    "desire-to-be-more-intelligent": "has a desire to be more intelligent / has no desire to be more intelligent",
    "has-strong-aesthetic-preferences": "has strong aesthetic preferences / does not have strong aesthetic preferences",
    "interest-in-art": "is interested in art / has no interest in art",
    "risk-averse": "is risk-averse / is not risk-averse",
    "subscribes-to-Taoism": "subscribes to Taoism / does not subscribe to Taoism",
    "subscribes-to-virtue-ethics": "subscribes to virtue ethics / does not subscribe to virtue ethics",
    "willingness-to-defer-to-them": "is willing to defer to them / is not willing to defer to them",
    "believes-in-free-tea": "believes in free tea / does not believe in free tea",
    "desire-not-to-be-seen": "has a desire not to be seen / has no desire not to be seen",
    "politically-neutral": "is politically neutral / is not politically neutral",
    "bravery": "shows a lot of bravery / shows little bravery",
    "no-more-tea": 'fits the words "no more tea" / does not fit the words "no more tea"',
    "desire": "shows a lot of desire / shows little desire",
    "interest-in": 'fits the words "interest in" / does not fit the words "interest in"',
}


@pytest.mark.parametrize("trait", PHRASES)
def test_a_phrase_follows_from_the_name_of_the_file(trait: str) -> None:
    assert " / ".join(traits.phrase(trait)) == PHRASES[trait]


def test_a_persona_joins_the_phrases_in_one_sentence() -> None:
    assert traits.persona({"interest-in-art": False}) == "This person has no interest in art."
    two = {"interest-in-art": True, "subscribes-to-Taoism": False}
    assert traits.persona(two) == "This person is interested in art and does not subscribe to Taoism."
    three = traits.persona(two | {"openness": True})
    assert three == ("This person is interested in art, does not subscribe to Taoism and is open to new experiences.")


def words(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def test_the_real_files_against_an_independent_count() -> None:
    if not REAL.exists():
        pytest.skip(f"the statements are not at {REAL}; set POPI_TRAITS to their folder")
    counts: collections.Counter[str] = collections.Counter()
    pools = traits.read_traits(REAL, "error", counts)
    low = repeated = 0
    everything = set()
    for path in REAL.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        believed = [row for row in rows if row["label_confidence"] >= 0.8]
        texts = [words(row["statement"]) for row in believed]
        answers = [row["answer_matching_behavior"] for row in believed]
        assert len(set(zip(texts, answers, strict=True))) == len(set(texts))  # None has both answers.
        for answer, side in zip((" Yes", " No"), pools[path.stem], strict=True):
            assert len(side) == len({t for t, a in zip(texts, answers, strict=True) if a == answer})
        low += len(rows) - len(believed)
        repeated += len(believed) - len(set(texts))
        everything |= {words(row["statement"]) for row in rows}
    assert counts == {
        "rows with a label_confidence below 0.8": low,
        "rows that repeat a statement of their trait": repeated,
    }
    for trait in pools:
        yes, no = (traits.persona({trait: sign}) for sign in (True, False))
        assert yes != no and "fits" not in yes
        assert not any(text in words(sentence) for text in everything for sentence in (yes, no))
    for unseen in ("users", "topics"):
        data = load(REAL, unseen=unseen, traits_per_user=(1, 2, 3), train_users=200, test_users=200)
        seen = {
            split: {words(text) for example in part for text in statements(example)} for split, part in data.items()
        }
        assert not seen["train"] & seen["test"]
