"""Windows of elix, review and roleplay: golden ones of the published code's libraries, leaks, and every row counted."""

import collections
import pathlib
import random
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from popi_jax.config import parse
from popi_jax.configs import base
from popi_jax.data.builders import elix, review, roleplay
from popi_jax.data.schema import Example
from popi_jax.errors import UserError

LOAD = {"elix": elix.load, "review": review.load, "roleplay": roleplay.load}
NAMES = tuple(LOAD)
# In the order of their names, in each benchmark.
PERSONS = {
    "elix": {"c": "child", "e": "expert", "t": "teenager", "y": "young adult"},
    "review": {"c": "concise", "e": "negative", "t": "positive", "y": "verbose"},
    "roleplay": {"c": "0c-1", "e": "0e-2", "t": "9", "y": "a"},
}
PERSONA = {"elix": "The user is {}.", "review": "This user prefers {} reviews.", "roleplay": "About {}."}
LEFT_OUT = {
    "elix": "train rows whose scorer_level is neither level_x nor level_y",
    "review": "train rows whose scorer_level is a compound",
    "roleplay": "train rows whose score_persona is null or blank",
}
COLUMNS = {  # prompt, chosen and rejected (of a row with label 0), person
    "elix": ("prompt", "response_x", "response_y", "scorer_level"),
    "review": ("prompt", "response_x", "response_y", "scorer_level"),
    "roleplay": ("x", "yw", "yl", "level"),
}

Rows = list[dict[str, Any]]


def row(name: str, person: str, prompt: str, chosen: str, rejected: str, label: int = 0, **changes: Any) -> dict:
    """A row of a benchmark. Person "x": one that is left out."""
    level = PERSONS[name].get(person)
    made: dict[str, Any]
    if name == "roleplay":
        struct = (
            {"uuid": f"u'{chosen.strip()}", "persona_description": f" About {level}.\n", "place": None}
            if person != "x"
            else None
        )
        made = {"x": prompt, "yw": chosen, "yl": rejected, "level": level or "?", "score_persona": struct}
    else:
        x, y = (rejected, chosen) if label else (chosen, rejected)
        made = {"prompt": prompt, "response_x": x, "response_y": y, "scorer_level": level, "label": label}
        if person == "x":
            made["scorer_level"] = "child" if name == "elix" else "positive+concise"
        made |= {"level_x": level or "expert", "level_y": "preteen"}
    return made | changes


def write(folder: pathlib.Path, **splits: Rows) -> pathlib.Path:
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def load(name: str, folder: pathlib.Path, **settings: Any) -> tuple[dict[str, list[Example]], collections.Counter[str]]:
    config = base.get_config()
    config.data.update({"dataset": name, "path": str(folder), "signals_per_user": 2} | settings)
    counts: collections.Counter[str] = collections.Counter()
    return LOAD[name](parse(config).data, counts), counts


def numbers(example: Example) -> list[int]:
    """The numbers of the example's rows, in order."""
    return [int(part.provenance.partition("#")[2]) for part in example.signals + example.queries]


def triples(examples: Sequence[Example]) -> set[tuple[str, str, str, str]]:
    return {(e.person, p.prompt, p.chosen, p.rejected) for e in examples for p in e.signals + e.queries}


def prompts(examples: Sequence[Example]) -> set[str]:
    return {part.prompt for example in examples for part in example.signals + example.queries}


# The persons of rows 0 to 25. "n": null, "x": left out.
PUBLISHED_ROWS = "cecyxcetcnccyetceyxccecyxy"
# By pandas 3.1.1 and datasets 5.2.0: numpy.random.seed(42); in each pass (one; for elix two), for each group of
# df.groupby("level"), windows of 3 rows are cut from group.sample(frac=1). Dataset.shuffle(seed=42) then orders them.
ONE_PASS = [[3, 12, 17], [22, 10, 8], [6, 1, 16], [0, 19, 5], [20, 2, 11]]
TWO_PASSES = [
    [[22, 5, 0], [15, 20, 11], [20, 2, 11], [8, 19, 2], [6, 1, 16]],
    [[22, 10, 8], [3, 12, 17], [12, 23, 17], [0, 19, 5], [13, 1, 21]],
]


@pytest.mark.parametrize("name", NAMES)
def test_published_windows_are_those_of_pandas_and_datasets(name: str, tmp_path: pathlib.Path) -> None:
    rows = []
    for i, person in enumerate(PUBLISHED_ROWS):
        null = {COLUMNS[name][3]: None} if person == "n" else {}
        rows.append(row(name, person, f" p{i % 3}", f"c{i}\n", f"\tr{i}", label=i % 2, **null))
    found, counts = load(name, write(tmp_path, train=rows, test=rows), protocol="published", on_null="drop")
    golden = sum(TWO_PASSES, []) if name == "elix" else ONE_PASS
    for split in ("train", "test"):
        assert [numbers(example) for example in found[split]] == golden
    for example, window in zip(found["test"], golden, strict=True):
        *signals, query = window
        person = PERSONS[name][PUBLISHED_ROWS[query]]
        assert example.person == person
        assert [(s.kind, s.prompt, s.chosen, s.rejected) for s in example.signals] == [
            ("pair", f"p{i % 3}", f"c{i}", f"r{i}") for i in signals
        ]
        (q,) = example.queries
        assert (q.prompt, q.chosen, q.rejected, q.group) == (f"p{query % 3}", f"c{query}", f"r{query}", q.prompt)
        assert q.provenance == f"test.parquet#{query}"
        struct = f"{{'uuid': \"u'c{query}\", 'persona_description': ' About {person}.\\n', 'place': None}}"
        assert example.persona == (struct if name == "roleplay" else PERSONA[name].format(person))
    users = [example.user for example in found["test"]]
    person = PERSONS[name]["c"]
    child = [f"{name}/test/{person}/{draw}/{i}" for draw in range(2 if name == "elix" else 1) for i in range(3)]
    assert len(set(users)) == len(users)
    assert sorted(user for user in users if f"/{person}/" in user) == child
    column = COLUMNS[name][3]
    of_train = {reason: number for reason, number in counts.items() if reason.startswith("train")}
    assert of_train == {
        f"train rows whose {column} is null or blank": 1,
        LEFT_OUT[name]: 3,
        "train rows of persons with too few rows for one user": 2,
        "train rows left over from their person's users": 1 if name == "elix" else 5,
    }


def random_rows(name: str, seed: int, count: int, persons: str, shared: float) -> Rows:
    """Rows with repeats, contradictions, nulls, and rows that are left out. Some prompts are in every such list."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = f"common {rng.randrange(9)}" if rng.random() < shared else f"{seed} {rng.randrange(40)}"
        chosen, rejected = (f"{rng.choice(' abc')}{rng.choice(('', ' '))}" for _ in range(2))
        person = rng.choice(persons + "x" * (rng.random() < 0.2))
        rows.append(row(name, person, prompt, chosen, rejected, rng.randrange(2)))
        if rng.random() < 0.1:
            rows[-1][rng.choice(COLUMNS[name])] = rng.choice((None, " "))
    return rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("held_out", [False, True])
def test_disjoint_leaks_nothing_and_counts_every_row(
    name: str, seed: int, held_out: bool, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Of the training persons, c and e are not tested, so the others are dropped if c and e have half of the rows.
    splits = {"train": random_rows(name, 2 * seed, 400, "cety" if seed % 2 else "cceet", 0.2)}
    if not held_out:
        splits["test"] = random_rows(name, 2 * seed + 1, 150, "ty", 0.2)
    write(tmp_path, **splits)
    settings = {"on_null": "drop", "queries_per_user": 2, "test_queries_per_user": 3, "train_draws": 2}
    found, counts = load(name, tmp_path, seed=seed, **settings)
    train, test = found["train"], found["test"]
    assert not prompts(train) & prompts(test)
    shared = {e.person for e in train} & {e.person for e in test}
    assert bool(shared) == bool(caplog.records)
    assert held_out <= bool(shared)
    used = 0
    for split, examples, queries in (("train", train, 2), ("test", test, 3)):
        assert len({example.user for example in examples}) == len(examples) > 0
        by_pass: dict[str, list[int]] = collections.defaultdict(list)
        file = "train" if held_out else split
        for example in examples:
            assert (example.split, len(example.signals), len(example.queries)) == (split, 2, queries)
            parts = example.signals + example.queries
            assert len({part.prompt for part in parts}) == 2 + queries
            assert all(query.group == query.prompt for query in example.queries)
            assert example.persona == PERSONA[name].format(example.person)
            assert [part.provenance.partition("#")[0] for part in parts] == [f"{file}.parquet"] * len(parts)
            for part, i in zip(parts, numbers(example), strict=True):
                raw = splits[file][i]
                prompt, chosen, rejected, person = (raw[column] for column in COLUMNS[name])
                if raw.get("label"):
                    chosen, rejected = rejected, chosen
                read = (part.prompt, part.chosen, part.rejected, example.person)
                assert read == (prompt.strip(), chosen.strip(), rejected.strip(), person)
            by_pass[example.user.split("/")[3]] += numbers(example)
        assert sorted(by_pass) == (["0", "1"] if split == "train" else ["0"])
        assert all(len(set(rows)) == len(rows) for rows in by_pass.values())
        used += len({i for rows in by_pass.values() for i in rows})
        unique = triples(examples)
        assert len(unique) == len({i for rows in by_pass.values() for i in rows})
        assert not any((person, prompt, no, yes) in unique for person, prompt, yes, no in unique)
    assert used + sum(counts.values()) == sum(map(len, splits.values()))
    # Determined by the seed; more draws add users behind the first ones and change nothing else.
    assert load(name, tmp_path, seed=seed, **settings)[0] == found
    assert load(name, tmp_path, seed=seed + 1, **settings)[0]["train"] != train
    more = load(name, tmp_path, seed=seed, **settings | {"train_draws": 3})[0]
    assert (more["train"][: len(train)], more["test"]) == (train, test)
    windows = [{frozenset(numbers(e)) for e in more["train"] if f"/{draw}/" in e.user} for draw in range(3)]
    assert not windows[0] & windows[1] & windows[2]


def test_repeated_contradicting_and_equal_rows_are_dropped_and_counted(tmp_path: pathlib.Path) -> None:
    train = [
        row("review", "c", "p0", "a", "b"),
        row("review", "c", "p0 ", " a", "b", label=1),  # Repeats row 0.
        row("review", "c", "p0", "a", "d"),
        row("review", "e", "p0", "b", "a"),  # Another person.
        row("review", "c", "p1", "a", "b"),  # Contradicts row 5, and so does row 6.
        row("review", "c", "p1", "b", "a"),
        row("review", "c", "p1", "a", "b"),
        row("review", "c", "p2", "a", "a "),
        row("review", "c", "p3", "a", "b"),
        row("review", "c", "q1", "a", "b"),
    ]
    test = [row("review", "c", f"q{i}", "b", "a") for i in range(3)]
    found, counts = load("review", write(tmp_path, train=train, test=test), signals_per_user=1)
    assert len(found["train"]) == len(found["test"]) == 1
    assert counts == {
        "train rows that repeat another row": 2,
        "train rows whose two responses are the same": 1,
        "train rows that contradict another row": 2,
        "train rows whose prompt is in the test split": 1,
        "train rows of persons with too few rows for one user": 1,
        "train rows left over from their person's users": 1,
        "test rows left over from their person's users": 1,
    }
    assert sorted(numbers(found["train"][0])) in ([0, 8], [2, 8])


@pytest.mark.parametrize(
    ("train", "test", "kept", "warning"),
    [
        ("ccce", "et", "c", None),
        ("cceet", "et", "cet", "2 of 3 persons are in both splits"),  # Without e and t, less than half is left.
        ("ccee", "et", "c", None),
        ("ce", "ce", "ce", "the data have 2 persons, all of them in both splits"),
        ("ccc", "ccet", "c", "1 of 3 persons are in both splits"),
        ("cc", "ee", "c", None),
    ],
)
def test_training_rows_of_test_persons_are_dropped_if_half_of_the_rows_remain(
    train: str, test: str, kept: str, warning: str | None, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    def rows(split: str, persons: str) -> Rows:
        return [row("elix", p, f"{split} {i} {k}", "a", "b") for i, p in enumerate(persons) for k in range(3)]

    found, counts = load("elix", write(tmp_path, train=rows("train", train), test=rows("test", test)))
    assert {example.person for example in found["train"]} == {PERSONS["elix"][p] for p in kept}
    dropped = 3 * sum(p not in kept for p in train)
    assert counts == ({"train rows whose person is in the test split": dropped} if dropped else {})
    ending = ": test users are new, but not their levels"
    assert [record.getMessage() for record in caplog.records] == ([f"elix: {warning}{ending}"] if warning else [])


@pytest.mark.parametrize(
    ("repeats", "size", "windows"),
    [((3, 1, 1, 1), 2, 3), ((5, 1), 2, 1), ((4, 4, 4), 3, 4), ((5, 2, 2, 1), 3, 2), ((1,) * 11, 4, 2), ((9, 9), 3, 0)],
)
def test_rows_fill_as_many_windows_of_distinct_prompts_as_they_can(
    repeats: tuple[int, ...], size: int, windows: int, tmp_path: pathlib.Path
) -> None:
    rows = [row("review", "c", f"p{i}", f"{k}", "b") for i, number in enumerate(repeats) for k in range(number)]
    rows += [row("review", "e", f"e{i}", "a", "b") for i in range(size)]  # So that there is a user at all.
    write(tmp_path, train=rows, test=[row("review", "t", f"q{i}", "a", "b") for i in range(size)])
    found, _ = load("review", tmp_path, signals_per_user=size - 1, train_draws=20)
    assert len(found["train"]) == 20 * (windows + 1)
    assert len(set(sum(map(numbers, found["train"]), []))) == (sum(repeats) if windows else 0) + size


def test_users_are_in_random_order_and_rows_change_places(tmp_path: pathlib.Path) -> None:
    rows = [row("review", p, f"p{i} {p}", "a", "b") for p in "cety" for i in range(90)]
    write(tmp_path, train=rows, test=[row("review", p, f"q{i}", "a", "b") for p in "cety" for i in range(3)])
    train = load("review", tmp_path, train_draws=4)[0]["train"]
    assert len(train) == 4 * 120
    for draw in range(4):
        assert len({example.person for example in train[120 * draw : 120 * draw + 16]}) == 4
    asked = {numbers(example)[-1] for example in train}
    assert 240 < len(asked) < 330  # Each row is asked in a pass with probability 1/3: 360 * (1 - (2/3)**4) = 289.


NEEDED = [(name, column) for name in NAMES for column in COLUMNS[name]]
NEEDED += [("elix", "label"), ("review", "label"), ("roleplay", "score_persona"), ("elix", "level_x")]
NEEDED += [("roleplay", "score_persona.persona_description")]


@pytest.mark.parametrize("protocol", ["disjoint", "published"])
@pytest.mark.parametrize("blank", [None, "\u3000\n"], ids=["null", "blank"])
@pytest.mark.parametrize(("name", "column"), NEEDED)
def test_null_and_blank_values_are_an_error_or_counted(
    name: str, column: str, blank: str | None, protocol: str, tmp_path: pathlib.Path
) -> None:
    train, test = ([row(name, "c", f"{s} {i}", "a", "b") for i in range(8)] for s in ("train", "test"))
    outer, _, inner = column.partition(".")
    if column in ("label", "score_persona"):
        blank = None
    train[5][outer] = train[5][outer] | {inner: blank} if inner else blank
    write(tmp_path, train=train, test=test)
    said = re.escape(f"{tmp_path}/train.parquet: row 5: column {column!r} is null or blank; give it a value or set")
    with pytest.raises(UserError, match=said + r" data\.on_null = 'drop'"):
        load(name, tmp_path, protocol=protocol)
    found, counts = load(name, tmp_path, protocol=protocol, on_null="drop")
    assert counts[f"train rows whose {column} is null or blank"] == 1
    assert 5 not in sum(map(numbers, found["train"]), [])


def test_a_null_level_does_not_matter_if_the_other_one_is_the_scorers(tmp_path: pathlib.Path) -> None:
    rows = [row("elix", "c", f"{i}", "a", "b", level_x=None, level_y="child") for i in range(3)]
    found, counts = load("elix", write(tmp_path, train=rows, test=rows), protocol="published")
    assert (len(found["train"]), counts) == (2, {})  # One in each pass.


LEVELS = "child, preteen, teenager, young adult, expert"
TASTES = "positive, negative, concise, verbose, positive+concise, positive+verbose, negative+concise, negative+verbose"
WRONG: list[tuple[str, str, Any, str]] = [
    (name, "label", label, f"'label' is {label}") for name in NAMES[:2] for label in (2.0, -1.0, 0.5)
]
WRONG += [
    ("elix", "scorer_level", "adult", f"'scorer_level' is 'adult'; use one of {LEVELS}"),
    ("elix", "level_y", " child", f"'level_y' is ' child'; use one of {LEVELS}"),
    ("review", "scorer_level", "concise+positive", f"'scorer_level' is 'concise+positive'; use one of {TASTES}"),
    ("review", "scorer_level", "x" * 999, f"'scorer_level' is '{'x' * 99}...; use one of {TASTES}"),
]


@pytest.mark.parametrize("on_null", ["error", "drop"])
@pytest.mark.parametrize(("name", "column", "value", "message"), WRONG)
def test_unknown_labels_and_levels_are_errors(
    name: str, column: str, value: Any, message: str, on_null: str, tmp_path: pathlib.Path
) -> None:
    test = [row(name, "c", f"{i}", "a", "b") for i in range(6)]
    test[4][column] = value
    write(tmp_path, train=test[:4], test=test)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/test.parquet: row 4: column {message}")) as caught:
        load(name, tmp_path, on_null=on_null)
    assert "\n" not in str(caught.value)


def test_splits_are_found_or_refused(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    for folder in (a, b, c):
        folder.mkdir()
    rows = {s: [row("review", p, f"{s} {i}", "a", "b") for p in "ce" for i in range(6)] for s in ("1", "2", "3")}
    write(a, train=rows["1"], validation=rows["2"])
    held_out, _ = load("review", a, test_fraction=0.5, test_queries_per_user=1)
    assert prompts(held_out["train"]) | prompts(held_out["test"]) == {f"1 {i}" for i in range(6)}  # Not the validation.
    assert f"{a}: the validation split is not used" in caplog.text
    assert len(prompts(held_out["test"])) == 3  # Half of the prompts, for both persons.
    drawn = {frozenset(prompts(load("review", a, test_fraction=0.5, seed=seed)[0]["test"])) for seed in range(4)}
    assert len(drawn) > 1
    with pytest.raises(UserError, match=r"/a: has no test split; set data.test_path or use data.protocol = 'disjoint'"):
        load("review", a, protocol="published")
    write(b, **{"0-train": rows["2"], "1-test": rows["3"]})
    for path in (b, b / "1-test.parquet"):
        assert prompts(load("review", a, test_path=str(path))[0]["test"]) <= {f"3 {i}" for i in range(6)}
    write(c, validation=rows["1"], test=rows["2"])
    with pytest.raises(UserError, match=r"/c: has no train split, only (test|validation)"):
        load("review", c)
    with pytest.raises(UserError, match=r"/a: has no test split, only train, validation; set data.test_path"):
        load("review", b, test_path=str(a))
    with pytest.raises(UserError, match=r"/a/none: no such .*; set data\.test_path"):
        load("review", a, test_path=str(a / "none"))
    with pytest.raises(UserError, match="6 prompts cannot be split at data.test_fraction = 0.01"):
        load("review", a, test_fraction=0.01)
    with pytest.raises(UserError, match=r"data\.path is empty"):
        load("review", pathlib.Path(), path="")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no train users can be made (dropped: 6 train rows whose prompt is in the test split); lower"),
        (
            {"protocol": "published", "signals_per_user": 6},
            "no train users can be made (dropped: 6 train rows of persons with too few rows for one user); lower"
            " data.signals_per_user or data.queries_per_user, or give more data",
        ),
    ],
)
def test_no_users_at_all_is_an_error_that_says_why(
    settings: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    rows = [row("review", "c", f"{i}", "a", "b") for i in range(6)]
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: {message}")):
        load("review", write(tmp_path, train=rows, test=rows), **settings)


def test_the_published_persona_of_roleplay_needs_parquet(tmp_path: pathlib.Path) -> None:
    line = '{"x": "p", "yw": "a", "yl": "b", "level": "u", "score_persona": {"persona_description": "d"}}\n'
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(line * 3)
    with pytest.raises(UserError, match=r"train\.jsonl: not a Parquet file.*data\.protocol = 'disjoint'"):
        load("roleplay", tmp_path, protocol="published")
