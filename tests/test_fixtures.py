"""The made-up data of experiments/fixtures: schemas, pitfalls, and that every builder can read and learn from it."""

import collections
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import make_fixtures
from popi_jax import config
from popi_jax.config import Data
from popi_jax.configs import quickstart
from popi_jax.data.builders import stylebook_text
from popi_jax.data.prepared import LOADERS
from popi_jax.data.schema import Example
from popi_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1] / "experiments/fixtures"
QUERY = {"prompt", "chosen", "rejected", "Preference Direction"}
DEMOGRAPHICS, COMMENTS = "Demographic Information", "User-Generated Content"
PAIRS = "Pair-wise Comparative Feedback"
KNOWN = {"preference", "question", "explanation"}
LEVELS = {"prompt", "response_x", "response_y", "level_x", "level_y", "scorer_level", "label"}
ELIX = LEVELS | {
    "scorer_level_id",
    "level_id_x",
    "level_id_y",
    "model_name_x",
    "model_name_y",
    "det_choice",
    "__index_level_0__",
}
# The files, and the columns of each.
SCHEMAS = {
    "elix/train-0000[01]-of-00002.parquet": ELIX,
    "elix/test-00000-of-00001.parquet": ELIX,
    "review/train-00000-of-00001.parquet": LEVELS,
    "review/test-00000-of-00001.parquet": LEVELS,
    "roleplay/train-0000[012]-of-00003.parquet": {"x", "yw", "yl", "level", "score_persona"},
    "roleplay/validation-00000-of-00001.parquet": {"x", "yw", "yl", "level", "score_persona"},
    "roleplay/test-00000-of-00001.parquet": {"x", "yw", "yl", "level", "score_persona"},
    "alignx/train-0000[01]-of-00002.parquet": QUERY | {DEMOGRAPHICS, COMMENTS, PAIRS},
    "alignx_test/Reddit_DEMO.json": QUERY | {DEMOGRAPHICS},
    "alignx_test/Reddit_UGC.json": QUERY | {COMMENTS},
    "alignx_test/Reddit_PAIR.json": QUERY | {PAIRS},
    "alignx_test/Reddit_arbitrary.json": QUERY | {DEMOGRAPHICS, COMMENTS, PAIRS, "profile"},
    "prefeval/explicit_preference/topics_[abc].json": KNOWN,
    "prefeval/mcq_options/topics_[abc].json": KNOWN | {"classification_task_options"},
    "prefeval/mcq_options/topics_c copy.json": KNOWN | {"classification_task_options"},
    "prefeval/implicit_preference/choice-based/topics_[abc].json": KNOWN
    | {"implicit_query", "options", "conversation", "aligned_op"},
    "prefeval/implicit_preference/persona-driven/topics_[abc].json": KNOWN | {"persona", "conversation"},
    "traits/*.jsonl": {
        "question",
        "statement",
        "label_confidence",
        "answer_matching_behavior",
        "answer_not_matching_behavior",
    },
}


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def read(pattern: str) -> list[dict[str, Any]]:
    """The rows of all files that match."""
    return [row for path in sorted(ROOT.glob(pattern)) for row in rows(path)]


def settings(name: str, **changes: Any) -> Data:
    """The settings of a benchmark, as its own config has them."""
    sizes: dict[str, dict[str, Any]] = {
        "elix": {"signals_per_user": 4},
        "review": {"signals_per_user": 4},
        "roleplay": {"signals_per_user": 8},
        "alignx": {"test_path": str(ROOT / "alignx_test")},
        "prefeval": {"queries_per_user": 3, "test_queries_per_user": 3},
        "traits": {"train_users": 64, "test_users": 64, "queries_per_user": 2},
    }
    fields: dict[str, Any] = {
        "train_users": 0,
        "test_users": 0,
        "queries_per_user": 1,
        "test_queries_per_user": 1,
        "on_null": "drop",
    }
    fields |= {"dataset": name, "path": str(ROOT / name)} | sizes[name] | changes
    whole = config.parse(quickstart.get_config("runlocal"))
    return config.changed(whole, {f"data.{key}": value for key, value in fields.items()}).data


def load(name: str, **changes: Any) -> dict[str, list[Example]]:
    return LOADERS[name](settings(name, **changes), collections.Counter())


def files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    return {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}


def test_the_files_are_what_the_script_writes(tmp_path: pathlib.Path) -> None:
    make_fixtures.main(tmp_path)
    there, made = files(ROOT), files(tmp_path)
    assert sorted(there) == sorted(made)
    for name, path in made.items():
        if path.suffix == ".parquet":
            assert pq.read_schema(path) == pq.read_schema(there[name])
            assert rows(path) == rows(there[name])
        else:
            assert path.read_bytes() == there[name].read_bytes()


def test_they_are_small_and_all_of_them_are_known() -> None:
    assert sum(path.stat().st_size for path in files(ROOT).values()) < 600_000
    known = [path for pattern in SCHEMAS for path in ROOT.glob(pattern)]
    assert sorted(known) == sorted(files(ROOT).values())


@pytest.mark.parametrize(("pattern", "columns"), SCHEMAS.items(), ids=SCHEMAS)
def test_each_file_has_the_columns_of_the_public_one(pattern: str, columns: set[str]) -> None:
    found = sorted(ROOT.glob(pattern))
    assert found
    for path in found:
        assert {frozenset(row) for row in rows(path)} == {frozenset(columns)}


def test_elix_has_its_pitfalls() -> None:
    train, test = read("elix/train*"), read("elix/test*")
    per_level = collections.Counter(row["scorer_level"] for row in train)
    assert {level: n for level, n in per_level.items() if n < 40} == {None: 1}
    for part in (train, test):
        assert any(row["scorer_level"] not in (None, row["level_x"], row["level_y"]) for row in part)
    nulls = collections.Counter(name for row in train for name in ("label", "response_y") if row[name] is None)
    assert nulls == {"label": 3, "response_y": 1}
    texts = [row[name] for row in train for name in ("response_x", "response_y") if row[name] is not None]
    assert sum(not text.strip() for text in texts) == 1
    assert sum(len(text.split()) == 1 for text in texts) == 1
    assert sum(len(text.split()) > 3000 for text in texts) == 1
    stated = collections.Counter(
        (row["scorer_level"], row["prompt"], row["response_x"], row["response_y"], row["label"]) for row in train
    )
    assert max(stated.values()) == 3
    assert sum((*row[:-1], 1 - row[-1]) in stated for row in stated if row[-1] is not None) == 2
    assert {row["prompt"] for row in train} & {row["prompt"] for row in test}
    first, second = (pq.read_schema(ROOT / f"elix/train-0000{i}-of-00002.parquet") for i in range(2))
    assert first.names == second.names[::-1]
    assert not any(first.field(name).type == second.field(name).type for name in first.names)
    assert second.field("det_choice").type == pa.null()


def test_roleplay_and_alignx_have_their_pitfalls() -> None:
    train, test = read("roleplay/train*"), read("roleplay/test*")
    per_persona = collections.Counter(row["level"] for row in train)
    assert len(per_persona) == 8 and min(per_persona.values()) >= 20
    assert len({row["level"] for row in test}) == 3
    assert len({row["level"] for row in test} & set(per_persona)) == 1
    structs = [row["score_persona"] for row in train]
    assert structs.count(None) == 1
    assert {name for struct in structs if struct for name in struct if struct[name] is None} == {
        "persona_description",
        "name",
    }

    users = read("alignx/train*")
    for field in (COMMENTS, PAIRS):
        lengths = {None if row[field] is None else len(row[field]) for row in users}
        assert lengths == {None, 0, 1, 2, 3, 4, 5, 6}
    assert {len(row["Preference Direction"]) for row in users} == {90}
    assert sum(row["chosen"] == row["rejected"] for row in users) == 1
    assert sum(row in users[:i] for i, row in enumerate(users)) == 1
    orders = [list(next(row for row in read(f"alignx/*{i}-of*") if row[PAIRS])[PAIRS][0]) for i in range(2)]
    assert orders[0] == orders[1][::-1]
    variants = [read(f"alignx_test/Reddit_{variant}.json") for variant in ("DEMO", "UGC", "PAIR", "arbitrary")]
    for same in zip(*variants, strict=True):
        assert len({row["prompt"] + row["chosen"] for row in same}) == 1
    assert len(variants[0]) == 24


def test_prefeval_and_traits_have_their_pitfalls() -> None:
    preferences = collections.Counter(row["preference"] for row in read("prefeval/mcq_options/topics_[abc].json"))
    assert sorted(preferences.values()) == [1] * 34 + [2]

    traits = {path.stem: rows(path) for path in ROOT.glob("traits/*")}
    for statements in traits.values():
        answers = collections.Counter(row["answer_matching_behavior"] for row in statements)
        assert answers == {" Yes": 30, " No": 30}
        assert sum(row["label_confidence"] < 0.8 for row in statements) == 4
    times = collections.Counter(row["statement"] for statements in traits.values() for row in statements)
    assert [n for n in times.values() if n > 1] == [2]


LOADS = [
    *(
        (name, {"protocol": protocol})
        for name in ("elix", "review", "roleplay")
        for protocol in ("published", "disjoint")
    ),
    *(
        ("alignx", {"protocol": protocol, "variant": variant})
        for protocol in ("published", "disjoint")
        for variant in ("DEMO", "UGC", "PAIR", "arbitrary")
    ),
    *((name, {"unseen": unseen}) for name in ("prefeval", "traits") for unseen in ("users", "topics")),
]


def style(text: str) -> np.ndarray | None:
    """The tastes that a text of stylebook expresses or states (+1 or -1, 0 for unknown); None for any other text."""
    try:
        return stylebook_text.read_response(text)
    except ValueError:
        pass
    try:
        stated = stylebook_text.read_statements(text)
    except ValueError:
        return None
    return np.array([stated.get(taste, 0) for taste in range(6)])


def right(example: Example) -> list[bool]:
    """Whether each query is as the user's signals, added up, would have it."""
    known_6 = np.zeros(6)
    for signal in example.signals:
        liked, disliked = (
            style(text) if text else np.zeros(6) for text in (signal.chosen or signal.text, signal.rejected)
        )
        if liked is not None and disliked is not None:
            known_6 += liked - disliked
    answers = []
    for query in example.queries:
        chosen, rejected = style(query.chosen), style(query.rejected)
        if chosen is not None and rejected is not None:
            answers.append(bool(known_6 @ (chosen - rejected) > 0))
    return answers


@pytest.mark.parametrize(("name", "changes"), LOADS, ids=[f"{n}-{'-'.join(c.values())}" for n, c in LOADS])
def test_each_builder_reads_them_and_preferences_can_be_learnt(name: str, changes: dict[str, Any]) -> None:
    examples = load(name, **changes)
    for split, fewest in (("train", 16), ("test", 8)):  # As many as the smoke runs take.
        assert len(examples[split]) >= fewest
        answers = [answer for example in examples[split] for answer in right(example)]
        assert len(answers) >= fewest
        assert np.mean(answers) > 0.6, split


@pytest.mark.parametrize("name", ["elix", "roleplay", "alignx"])
def test_nulls_are_an_error_of_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"fixtures/{name}/.*: row \d+.*data.on_null = 'drop'") as caught:
        load(name, on_null="error")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["review", "prefeval", "traits"])
def test_there_are_no_other_nulls(name: str) -> None:
    assert load(name, on_null="error") == load(name, on_null="drop")
