"""Whatever the files of a benchmark hold, its builder returns examples or refuses them in one line.

The inputs are those of test_fuzz.py: HYPOTHESIS_PROFILE=nightly tries 10,000 of each kind.
"""

import collections
import json
import pathlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi_jax import config
from popi_jax.configs import quickstart
from popi_jax.data import prepared
from popi_jax.data.builders import alignx
from popi_jax.data.schema import from_json, to_json
from popi_jax.errors import UserError
from tests.test_fuzz import PAIR, changed, stored_bytes

ONE = st.sampled_from(["disjoint", "published"])
NULLS = st.sampled_from(["error", "drop"])
ELIX = {
    "prompt": "p",
    "response_x": "x",
    "response_y": "y",
    "level_x": "child",
    "level_y": "expert",
    "scorer_level": "child",
    "label": 0,
}
ROLEPLAY = {"x": "p", "yw": "c", "yl": "r", "level": "u", "score_persona": {"persona_description": "d"}}
ALIGNX = PAIR | {
    alignx.DEMOGRAPHICS: "d",
    alignx.COMMENTS: [{"prompt": "q", "comment": "c"}],
    alignx.PAIRS: [PAIR | {"prompt": "s"}],
}
OPTIONS = [f"option {i}" for i in range(4)]
PREFEVAL = {"preference": "likes tea", "question": "what tea?"}
CHOICE = PREFEVAL | {"implicit_query": "hello, q", "options": OPTIONS, "aligned_op": OPTIONS[0]}
CHOICE |= {"conversation": {"query": "q", "assistant_options": "o", "user_selection": "that one"}}
DIALOGUE = PREFEVAL | {"persona": "p", "conversation": {"0": {"user": "hello", "assistant": "hi"}}}
TRAIT = {"question": "q", "label_confidence": 0.9, "answer_not_matching_behavior": " No"}


def data(folder, dataset, **changes):
    changes = {
        "dataset": dataset,
        "path": str(folder),
        "train_users": 0,
        "test_users": 0,
        "signals_per_user": 1,
    } | changes
    return config.changed(
        config.parse(quickstart.get_config("runlocal")),
        {f"data.{key}": value for key, value in changes.items()},
    ).data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    yield path
    shutil.rmtree(path, ignore_errors=True)


def check(folder: pathlib.Path, settings: config.Data, files: dict[str, bytes | str]):
    """Loads the files. Returns the examples, or None if they were refused in one line that names their folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        found = prepared.load_examples(settings, collections.Counter())
    except UserError as error:
        message = str(error)
        assert str(folder) in message or settings.dataset in message, message
        assert len(message.splitlines()) == 1 and len(message) < 2000, message
        return None
    for example in (*found["train"], *found["test"]):
        assert from_json(to_json(example)) == example
        assert example.signals and all(query.chosen != query.rejected for query in example.queries)
    return found


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def rows(record, count, **field):
    """The record several times, with a number after the text of one field."""
    ((name, text),) = field.items()
    return [record | {name: f"{text} {i}"} for i in range(count)]


def users(record):
    """Four users whose texts differ."""
    text = json.dumps(record)
    return [json.loads(text.replace("tea", f"tea {i}").replace("hello", f"hello {i}")) for i in range(4)]


REVIEW = ELIX | {"scorer_level": "concise"}
PREFEVAL_FILES = {
    "mcq_options": users(PREFEVAL | {"classification_task_options": [f"answer {i}" for i in range(4)]}),
    "implicit_preference/choice-based": users(CHOICE),
    "implicit_preference/persona-driven": users(DIALOGUE),
}
STATEMENTS = [
    TRAIT | {"statement": f"{answer} {i}", "answer_matching_behavior": answer}
    for answer in (" Yes", " No")
    for i in range(12)
]
# Small files that every builder accepts as they are.
FILES = {
    "elix": {"train.jsonl": lines(*rows(ELIX, 4, prompt="a")), "test.jsonl": lines(*rows(ELIX, 4, prompt="t"))},
    "review": {"train.jsonl": lines(*rows(REVIEW, 4, prompt="a")), "test.jsonl": lines(*rows(REVIEW, 4, prompt="t"))},
    "roleplay": {"roles.jsonl": lines(*rows(ROLEPLAY, 6, x="a"))},
    "alignx": {
        "train/rows.jsonl": lines(*rows(ALIGNX, 5, prompt="a")),
        "test/Reddit_UGC.json": json.dumps(rows(ALIGNX, 2, prompt="t")),
        "test/Reddit_DEMO.json": json.dumps(rows(ALIGNX, 2, prompt="t")),
    },
    "prefeval": {f"{place}/drinks.json": json.dumps(records) for place, records in PREFEVAL_FILES.items()},
    "traits": {"calm.jsonl": lines(*STATEMENTS)},
}
OTHER = {
    "roleplay": {"test_fraction": 0.5},
    "alignx": {"test_fraction": 0.4, "variant": "UGC"},
    "traits": {"train_users": 2, "test_users": 2, "traits_per_user": (1,)},
}


def load(folder, name, files, **changes):
    changes = OTHER.get(name, {}) | changes
    path = folder
    if name == "alignx" and "test/Reddit_UGC.json" in files:
        path, changes = folder / "train", changes | {"test_path": str(folder / "test")}
    return check(folder, data(path, name, **changes), files)


def fuzzed(*records):
    """A file of JSON lines of which the first is changed."""
    return stored_bytes(st.tuples(changed(records[0]), *map(st.just, records[1:])), lines=True)


@pytest.mark.parametrize("name", FILES)
def test_the_files_as_they_are_give_examples(folder, name):
    found = load(folder, name, FILES[name])
    assert found["train"] and found["test"]


@given(fuzzed(*rows(ELIX, 4, prompt="a")), ONE, NULLS)
def test_elix(folder, content, protocol, on_null):
    load(folder, "elix", FILES["elix"] | {"train.jsonl": content}, protocol=protocol, on_null=on_null)


@given(fuzzed(*rows(REVIEW, 4, prompt="t")), ONE, NULLS)
def test_review(folder, content, protocol, on_null):
    load(folder, "review", FILES["review"] | {"test.jsonl": content}, protocol=protocol, on_null=on_null)


@given(fuzzed(*rows(ROLEPLAY, 6, x="a")), NULLS)
def test_roleplay(folder, content, on_null):
    load(folder, "roleplay", {"roles.jsonl": content}, on_null=on_null)


@given(fuzzed(*rows(ALIGNX, 5, prompt="a")), ONE, NULLS, st.sampled_from(sorted(alignx.FIELDS)))
def test_alignx(folder, content, protocol, on_null, variant):
    load(folder, "alignx", {"rows.jsonl": content}, protocol=protocol, on_null=on_null, variant=variant)


@given(stored_bytes(st.tuples(changed(rows(ALIGNX, 2, prompt="t"))), lines=False), NULLS)
def test_alignx_test_files(folder, content, on_null):
    load(folder, "alignx", FILES["alignx"] | {"test/Reddit_UGC.json": content}, on_null=on_null)


@given(st.sampled_from(sorted(PREFEVAL_FILES)), st.data(), NULLS)
def test_prefeval(folder, place, draw, on_null):
    content = draw.draw(stored_bytes(st.tuples(changed(PREFEVAL_FILES[place])), lines=False))
    load(folder, "prefeval", FILES["prefeval"] | {f"{place}/drinks.json": content}, on_null=on_null)


@given(fuzzed(TRAIT | {"statement": "s", "answer_matching_behavior": " Yes"}), NULLS)
def test_traits(folder, content, on_null):
    load(folder, "traits", {"calm.jsonl": FILES["traits"]["calm.jsonl"].encode() + content}, on_null=on_null)
