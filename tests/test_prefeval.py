"""PrefEval: users, splits and what is dropped, on made-up files with every pitfall, and on the real ones if present."""

import collections
import json
import os
import pathlib
import re
from typing import Any

import pytest

from popi_jax.config import Data
from popi_jax.configs import base
from popi_jax.data.builders import prefeval
from popi_jax.data.schema import Example, Signal
from popi_jax.errors import UserError

REAL = pathlib.Path(os.environ.get("POPI_PREFEVAL", pathlib.Path(__file__).parents[2] / "shared/data/prefeval"))
MCQ, CHOICE, DIALOGUE = "mcq_options", "implicit_preference/choice-based", "implicit_preference/persona-driven"
Records = dict[str, list[dict[str, Any]]]  # By folder: the rows of one topic.


def one_user(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a user in the three files. All texts have the user's name."""
    known = {"preference": f"I like {name} things.", "question": f"What of {name}?", "explanation": "Because."}
    options = [f"choice {i} of {name}" for i in range(4)]
    conversation = {
        "query": f"Which {name}?",
        "assistant_options": " ".join(options),
        "user_selection": f"The first {name}.",
        "assistant_acknowledgment": "Good.",
    }
    turns = {str(i): {"user": f"{name} says {i}", "assistant": f"{name} hears {i}"} for i in range(12)}
    return {
        MCQ: known | {"classification_task_options": [f"option {i} of {name}" for i in range(4)]},
        CHOICE: known
        | {
            "implicit_query": f"Which {name}?",
            "options": options,
            "conversation": conversation,
            "aligned_op": options[0],
        },
        DIALOGUE: known | {"persona": "A person", "conversation": dict(reversed(turns.items()))},
    }


def topic(name: str, users: int) -> Records:
    rows = [one_user(f"{name}-{chr(97 + i)}") for i in range(users)]
    return {part: [row[part] for row in rows] for part in (MCQ, CHOICE, DIALOGUE)}


def write(folder: pathlib.Path, topics: dict[str, Records]) -> pathlib.Path:
    for name, records in topics.items():
        for part, rows in records.items():
            path = folder / part / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
    return folder


def settings(path: pathlib.Path | str, **changes: Any) -> Data:
    fields = {
        "dataset": "prefeval",
        "path": str(path),
        "queries_per_user": 3,
        "test_queries_per_user": 3,
    }
    return Data.model_validate(base.get_config().data.to_dict() | fields | changes)


def load(path: pathlib.Path | str, **changes: Any) -> tuple[dict[str, Example], collections.Counter[str]]:
    """The examples of both splits by user, and what was dropped."""
    counts: collections.Counter[str] = collections.Counter()
    splits = prefeval.load(settings(path, **changes), counts)
    assert all(example.split == split for split, part in splits.items() for example in part)
    examples = [example for part in splits.values() for example in part]
    assert len({example.user for example in examples}) == len(examples)
    return {example.user: example for example in examples}, counts


def two_topics() -> dict[str, Records]:
    return {"pets": topic("pet", 12), "cars": topic("car", 8)}


def test_a_users_signals_queries_and_persona_by_hand(tmp_path: pathlib.Path) -> None:
    examples, counts = load(write(tmp_path, two_topics()))
    user = examples["cars#1"]
    name, file = "car-b", "cars.json#1"
    choices = [
        Signal(
            "pair", f"Which {name}?", f"choice 0 of {name}", f"choice {i} of {name}", "", f"{CHOICE}/{file}/options/{i}"
        )
        for i in (1, 2, 3)
    ]
    spoken = Signal("comment", f"Which {name}?", text=f"The first {name}.", provenance=f"{CHOICE}/{file}/conversation")
    prompts = [prefeval.GREETING] + [f"{name} hears {i}" for i in range(11)]
    turns = [
        Signal("comment", prompt, text=f"{name} says {i}", provenance=f"{DIALOGUE}/{file}/conversation/{i}")
        for i, prompt in enumerate(prompts)
    ]
    assert user.signals == (*choices, spoken, *turns)
    assert {(q.prompt, q.chosen, q.rejected, q.provenance, q.group) for q in user.queries} == {
        (f"What of {name}?", f"option 0 of {name}", f"option {i} of {name}", f"{MCQ}/{file}/options/{i}", "cars#1")
        for i in (1, 2, 3)
    }
    assert (user.persona, user.person) == (f"I like {name} things.", "")
    assert not counts


@pytest.mark.parametrize("seed", range(4))
def test_every_user_is_in_one_split_of_the_requested_size(tmp_path: pathlib.Path, seed: int) -> None:
    path = write(tmp_path, two_topics())
    examples, counts = load(path, seed=seed)
    assert set(examples) == {f"pets#{i}" for i in range(12)} | {f"cars#{i}" for i in range(8)}
    assert sum(example.split == "test" for example in examples.values()) == 6  # 0.3 of 20.
    by_topic, _ = load(path, seed=seed, unseen="topics")
    splits = {name: {e.split for e in by_topic.values() if e.user.startswith(name)} for name in ("pets", "cars")}
    assert sorted(map(list, splits.values())) == [["test"], ["train"]]
    assert not counts


@pytest.mark.parametrize("seed", range(6))
def test_users_who_share_a_preference_or_a_question_are_in_one_split(tmp_path: pathlib.Path, seed: int) -> None:
    topics = two_topics()
    for rows in topics["pets"].values():
        rows[7]["preference"] = " i LIKE  pet-a things!"  # As user 0, but for what makes no difference.
        rows[7]["question"] = rows[3]["question"]
        rows[9]["preference"] = rows[3]["preference"]
    for rows in topics["cars"].values():
        rows[5]["question"] = rows[1]["question"]
    examples, counts = load(write(tmp_path, topics), seed=seed, test_fraction=0.5)
    for group in (("pets#0", "pets#7", "pets#3", "pets#9"), ("cars#1", "cars#5")):
        assert len({examples[user].split for user in group}) == 1
    assert sum(example.split == "test" for example in examples.values()) == 10
    assert not counts


def test_a_training_topics_users_who_share_a_text_with_a_test_topic_are_dropped(tmp_path: pathlib.Path) -> None:
    topics = two_topics()
    for part in (MCQ, CHOICE, DIALOGUE):
        topics["cars"][part][2]["preference"] = topics["pets"][part][4]["preference"]
        topics["cars"][part][3]["question"] = topics["pets"][part][4]["question"]
    seen = set()
    for seed in range(6):
        examples, counts = load(write(tmp_path, topics), unseen="topics", seed=seed)
        tested = examples["pets#0"].split
        gone = {f"pets#{i}" for i in range(12)} | {f"cars#{i}" for i in range(8)}
        assert gone - set(examples) == ({"cars#2", "cars#3"} if tested == "test" else {"pets#4"})
        reason = "training users who share a preference or a question with a test user"
        assert counts == {reason: 2 if tested == "test" else 1}
        seen.add(tested)
    assert seen == {"train", "test"}


def test_no_signal_has_the_preference_or_an_option_of_the_query(tmp_path: pathlib.Path) -> None:
    records = topic("pet", 4)
    turns = records[DIALOGUE][0]["conversation"]
    turns["2"]["user"] = "Well, i like  PET-A things, you see."
    turns["5"]["assistant"] = "So: I like pet-a things."
    records[CHOICE][1]["conversation"]["user_selection"] = "I like pet-b things."
    records[CHOICE][2]["options"][2] = "Option 3 of pet-c."
    records[CHOICE][3]["options"][0] = records[CHOICE][3]["aligned_op"] = "option 0 of pet-d"
    examples, counts = load(write(tmp_path, {"pets": records}))
    assert counts == {
        "signals that have the stated preference word for word": 3,
        "signals that have an option of their own query word for word": 4,
    }
    left = {user: [s.provenance.rpartition("/")[2] for s in e.signals] for user, e in examples.items()}
    turns_left = [str(i) for i in range(12)]
    assert left["pets#0"] == ["1", "2", "3", "conversation"] + [t for t in turns_left if t not in ("2", "6")]
    assert left["pets#1"] == ["1", "2", "3", *turns_left]
    assert left["pets#2"] == ["1", "3", "conversation", *turns_left]
    assert left["pets#3"] == ["conversation", *turns_left]


def test_options_that_repeat_are_dropped_and_counted(tmp_path: pathlib.Path) -> None:
    records = topic("pet", 4)
    records[MCQ][0]["classification_task_options"][2] = "option 0 of pet-a"
    records[MCQ][1]["classification_task_options"] = ["same"] * 4
    records[CHOICE][2]["options"][3] = "choice 1 of pet-c"
    examples, counts = load(write(tmp_path, {"pets": records}))
    assert counts == {
        "queries whose rejected option repeats another option": 4,
        "signals whose rejected option repeats another option": 1,
        "users without queries": 1,
    }
    assert {query.rejected for query in examples["pets#0"].queries} == {"option 1 of pet-a", "option 3 of pet-a"}
    assert sum(signal.kind == "pair" for signal in examples["pets#2"].signals) == 2
    assert set(examples) == {"pets#0", "pets#2", "pets#3"}


NULLS = [  # Folder, path of the text, how the error names it, reason and number of the drops.
    (MCQ, ("classification_task_options", 2), "row 1: field 'classification_task_options[2]'", {"queries": 1}),
    (MCQ, ("classification_task_options", 0), "row 1: field 'classification_task_options[0]'", {"queries": 3}),
    (CHOICE, ("implicit_query",), "row 1: field 'implicit_query'", {"signals": 4}),
    (CHOICE, ("options", 3), "row 1: field 'options[3]'", {"signals": 1}),
    (CHOICE, ("conversation", "user_selection"), "row 1: conversation: field 'user_selection'", {"signals": 1}),
    (DIALOGUE, ("conversation", "4", "user"), "row 1: conversation: turn 4: field 'user'", {"signals": 1}),
    (DIALOGUE, ("conversation", "4", "assistant"), "row 1: conversation: turn 4: field 'assistant'", {"signals": 1}),
    (DIALOGUE, ("conversation", "11", "assistant"), "", {}),  # Nothing follows the last turn.
]


@pytest.mark.parametrize("value", [None, " \n"], ids=["null", "blank"])
@pytest.mark.parametrize(("part", "keys", "place", "drops"), NULLS, ids=[f"{n[0]}/{n[1]}" for n in NULLS])
def test_a_text_that_is_null_or_blank_is_an_error_or_dropped(
    tmp_path: pathlib.Path, part: str, keys: tuple[Any, ...], place: str, drops: dict[str, int], value: str | None
) -> None:
    records = topic("pet", 4)
    holder: Any = records[part][1]
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    path = write(tmp_path, {"pets": records})
    if place:
        with pytest.raises(UserError, match=re.escape(f"{part}/pets.json: {place} is")) as caught:
            load(path)
        assert "data.on_null = 'drop'" in str(caught.value)
    expected = {f"{kind} with a null or blank text": number for kind, number in drops.items()}
    if drops == {"queries": 3}:
        expected["users without queries"] = 1
    assert load(path, on_null="drop")[1] == expected


@pytest.mark.parametrize("field", ["preference", "question"])
def test_a_user_whose_preference_or_question_is_null_is_an_error_or_dropped(tmp_path: pathlib.Path, field: str) -> None:
    records = topic("pet", 4)
    for rows in records.values():
        rows[2][field] = None
    path = write(tmp_path, {"pets": records})
    with pytest.raises(UserError, match=f"{MCQ}/pets.json: row 2: field '{field}' is null; write some text, or set"):
        load(path)
    examples, counts = load(path, on_null="drop")
    assert set(examples) == {"pets#0", "pets#1", "pets#3"}
    expected = {"preference": {"users whose preference is null or blank": 1}}
    assert counts == expected.get(field, {"queries with a null or blank text": 3, "users without queries": 1})


def test_a_user_who_shows_nothing_is_dropped(tmp_path: pathlib.Path) -> None:
    records = topic("pet", 4)
    records[CHOICE][1]["implicit_query"] = None
    records[DIALOGUE][1]["conversation"] = {}
    examples, counts = load(write(tmp_path, {"pets": records}), on_null="drop")
    assert set(examples) == {"pets#0", "pets#2", "pets#3"}
    assert counts == {"signals with a null or blank text": 4, "users without signals": 1}


def test_fewer_queries_are_the_first_of_a_random_order(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, two_topics())
    full, _ = load(path)
    few, _ = load(path, queries_per_user=1, test_queries_per_user=2)
    for user, example in full.items():
        assert few[user].queries == example.queries[: 1 if example.split == "train" else 2]
    assert len({example.queries[0].provenance[-1] for example in full.values()}) == 3


def test_reading_is_deterministic_and_examples_are_in_random_order(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, two_topics())
    data = prefeval.load(settings(path), collections.Counter())
    assert data == prefeval.load(settings(path), collections.Counter())
    assert prefeval.load(settings(path, seed=1), collections.Counter()) != data
    users = [example.user for example in data["train"]]
    assert users != sorted(users, key=lambda user: (user.partition("#")[0], int(user.partition("#")[2])))
    assert {user.partition("#")[0] for user in users[:5]} == {"pets", "cars"}


def test_a_file_with_a_blank_in_its_name_is_no_topic(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, {"pets": topic("pet", 4), "pets copy": topic("pet", 4)})
    assert prefeval.topics(path) == ["pets"]
    assert "ignored 1 files with a blank in their names: ['pets copy']" in caplog.records[0].getMessage()
    assert len(load(path)[0]) == 4


def broken(part: str, **changes: Any) -> Records:
    records = topic("pet", 4)
    records[part][2] = {key: value for key, value in (records[part][2] | changes).items() if value is not ...}
    return records


MISTAKES = [
    (
        broken(CHOICE, preference="x"),
        rf"{CHOICE}/pets.json: row 2: field 'preference' differs from .*{MCQ}/pets.json: row 2",
    ),
    (
        broken(DIALOGUE, question="x"),
        rf"{DIALOGUE}/pets.json: row 2: field 'question' differs from .*{MCQ}/pets.json: row 2",
    ),
    (
        topic("pet", 4) | {CHOICE: topic("pet", 3)[CHOICE]},
        rf"{CHOICE}/pets.json: has 3 rows, but .*{MCQ}/pets.json has 4",
    ),
    (topic("pet", 4) | {DIALOGUE: []}, rf"{DIALOGUE}/pets.json: expected a JSON list of rows"),
    (topic("pet", 4) | {MCQ: {}}, rf"{MCQ}/pets.json: expected a JSON list of rows"),
    (topic("pet", 4) | {MCQ: [1]}, rf"{MCQ}/pets.json: row 0: expected an object"),
    ({MCQ: topic("pet", 4)[MCQ]}, rf"{CHOICE}/pets.json: no such file; set data.path to the folder"),
    (
        broken(CHOICE, aligned_op="choice 1 of pet-c"),
        r"row 2: field 'aligned_op' is 'choice 1 of pet-c', but the first",
    ),
    (broken(CHOICE, options=["a", "b", "c"]), r"row 2: field 'options' has 3 options; give 4"),
    (broken(CHOICE, options=["a", "b", "c", 4], aligned_op="a"), r"row 2: field 'options\[3\]' must be a string"),
    (broken(CHOICE, implicit_query=...), r"row 2: field 'implicit_query' is missing"),
    (broken(CHOICE, conversation=...), r"row 2: conversation: expected an object"),
    (broken(MCQ, classification_task_options=...), r"row 2: field 'classification_task_options' is missing"),
    (
        broken(DIALOGUE, conversation={"1": {"user": "a", "assistant": "b"}}),
        r"row 2: conversation: turn 0: expected an",
    ),
    (broken(DIALOGUE, conversation={"0": {"assistant": "b"}}), r"row 2: conversation: turn 0: field 'user' is missing"),
    (topic("pet", 1), r"1 users leave none for train at data.unseen = 'users'"),
]


@pytest.mark.parametrize(("records", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_each_error_about_a_file_is_one_line(tmp_path: pathlib.Path, records: Records, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path, {"pets": records}))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_repeated_key_is_an_error(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, {"pets": topic("pet", 4)})
    (path / MCQ / "pets.json").write_text('[{"preference": "a", "preference": "b"}]')
    with pytest.raises(UserError, match="mcq_options/pets.json: field 'preference' occurs twice"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "published"}, "data.protocol = 'published', but data.dataset = 'prefeval' has no published"),
        ({"path": "hf://datasets/a/b"}, "data.path is 'hf://datasets/a/b', but .* clone its repository and give its"),
        ({"path": ""}, "data.path is empty, but data.dataset = 'prefeval' reads a folder; set its path"),
        ({"path": "absent"}, "absent: no such folder; set data.path"),
        ({"test_path": "x"}, "data.test_path is set, but data.dataset = 'prefeval' splits data.path; leave it empty"),
        ({"path": "."}, "mcq_options: has no JSON file; set data.path to the folder benchmark_dataset"),
        ({"unseen": "topics"}, "4 users leave none for train at data.unseen = 'topics'"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match=message) as caught:
        load(**({"path": write(tmp_path, {"pets": topic("pet", 4)})} | changes))
    assert "\n" not in str(caught.value)


def words(text: str) -> str:
    return " " + re.sub(r"\W+", " ", text.lower()).strip() + " "


@pytest.mark.parametrize("unseen", ["users", "topics"])
def test_the_real_files_against_an_independent_count(unseen: str) -> None:
    if not REAL.exists():
        pytest.skip(f"PrefEval is not at {REAL}; set POPI_PREFEVAL to its folder")
    kinds: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    users, questions = {}, {}
    for path in sorted((REAL / MCQ).glob("*.json")):
        if " " in path.name:
            continue
        files = [json.loads((REAL / part / path.name).read_text()) for part in (MCQ, CHOICE, DIALOGUE)]
        for i, (asked, chose, talked) in enumerate(zip(*files, strict=True)):
            users[f"{path.stem}#{i}"], questions[f"{path.stem}#{i}"] = asked["preference"], asked["question"]
            turns = list(talked["conversation"].values())
            said = [[turn["user"]] for turn in turns]
            for before, texts in zip(turns, said[1:], strict=False):
                texts.append(before["assistant"])
            hidden = sum(any(words(asked["preference"]) in words(text) for text in texts) for texts in said)
            options = list(map(words, chose["options"]))
            answers = list(map(words, asked["classification_task_options"]))
            shown = [any(answer in options[0] or answer in other for answer in answers) for other in options[1:]]
            counts["signals that have the stated preference word for word"] += hidden
            counts["signals that have an option of their own query word for word"] += sum(shown)
            kinds["comment"] += 1 + len(turns) - hidden
            kinds["pair"] += 3 - sum(shown)
    examples, dropped = load(REAL, unseen=unseen)
    texts = {"train": set[str](), "test": set[str]()}
    for user, example in examples.items():
        texts[example.split] |= {users[user].lower(), questions[user].lower()}
        assert example.persona == users[user] and len(example.queries) == 3
        assert all(users[user].lower() not in f"{s.prompt}\n{s.text}".lower() for s in example.signals)
    assert not texts["train"] & texts["test"]
    if unseen == "topics":
        names = {split: {u.partition("#")[0] for u, e in examples.items() if e.split == split} for split in texts}
        assert not names["train"] & names["test"]
        return
    assert set(examples) == set(users)
    # Training signals that a test user has, too, are dropped: common turns and choices.
    shown = {
        split: {
            tuple(" ".join(t.lower().split()) for t in (s.prompt, s.chosen, s.rejected, s.text))
            for e in examples.values()
            if e.split == split
            for s in e.signals
        }
        for split in texts
    }
    assert not shown["train"] & shown["test"]
    also = dropped.pop("train signals that a test user has, too")
    assert 0 < also == kinds.total() - sum(len(e.signals) for e in examples.values())
    assert dropped == counts
