"""AlignX: what each user shows, leaks and drops, on made-up files with the columns and pitfalls of the real ones."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from popi_jax.config import parse
from popi_jax.configs import base
from popi_jax.data import tables
from popi_jax.data.builders import alignx, alignx_parts
from popi_jax.data.builders.alignx import COMMENTS, DEMOGRAPHICS, PAIRS, TEST_FILES
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError

DIRECTION = "Preference Direction"
Rows = list[dict[str, Any]]


def load(path: pathlib.Path | str, **changes: Any) -> tuple[dict[str, list[Example]], dict[str, int]]:
    config = base.get_config()
    config.data.dataset, config.data.path = "alignx", str(path)
    config.data.update({name: str(v) if isinstance(v, pathlib.Path) else v for name, v in changes.items()})
    counts: collections.Counter[str] = collections.Counter()
    return alignx_parts.load(parse(config).data, counts), dict(counts)


def comment(name: str, prompt: str = "") -> dict[str, Any]:
    return {"prompt": prompt or f"{name} post", "comment": f"{name} said", DIRECTION: [0.5] * 90}


def pair(name: str, prompt: str = "") -> dict[str, Any]:
    return {"prompt": prompt or f"{name} post", "chosen": f"{name} good", "rejected": f"{name} bad", DIRECTION: [1]}


def row(name: str, comments: Any = 4, pairs: Any = 4, **changes: Any) -> dict[str, Any]:
    """A row as published. Keywords change its fields, `demo`, `ugc` and `pairs_` the three with long names."""
    values = pair(name) | {
        DEMOGRAPHICS: f"{name} is a person",
        COMMENTS: [comment(f"{name} c{i}") for i in range(comments)],
        PAIRS: [pair(f"{name} p{i}") for i in range(pairs)],
    }
    long = {"demo": DEMOGRAPHICS, "ugc": COMMENTS, "pairs_": PAIRS}
    return {k: v for k, v in (values | {long.get(k, k): v for k, v in changes.items()}).items() if v is not ...}


def write_parquet(path: pathlib.Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_tests(folder: pathlib.Path, rows: Rows, **others: Rows) -> pathlib.Path:
    """Writes the four test files, with the profile that leaks. Every other row lacks what its user does not show."""
    folder.mkdir(parents=True, exist_ok=True)
    for variant, name in TEST_FILES.items():
        kept = {"prompt", "chosen", "rejected", *alignx.FIELDS[variant]}
        own = others.get(variant, [{k: v for k, v in r.items() if i % 2 or k in kept} for i, r in enumerate(rows)])
        (folder / name).write_text(json.dumps([r | {"profile": "LEAK", DIRECTION: [0] * 90} for r in own]))
    return folder


def published(folder: pathlib.Path, train: Rows, test: Rows, **others: Rows) -> dict[str, pathlib.Path]:
    """Writes the two folders as on the hub: shards of up to two rows, and the four test files."""
    starts = range(0, len(train), 2)
    for i, start in enumerate(starts):
        write_parquet(folder / f"train/data-{i:05}-of-{len(starts):05}.parquet", train[start : start + 2])
    return {"path": folder / "train", "test_path": write_tests(folder / "test", test, **others)}


def shown(draws: alignx.Draws, rng: np.random.Generator, comments: int, pairs: int) -> tuple[str, list[str]]:
    """Draws what a user shows: the mode, and the names of the entries in their order."""
    mode, profile, of_comments, of_pairs = draws(comments, pairs, rng.random(alignx.NUMBERS).tolist())
    return mode, ["d"] * profile + [f"c{i}" for i in of_comments] + [f"p{i}" for i in of_pairs]


def test_the_mode_is_forced_by_short_histories_and_else_the_one_used_least() -> None:
    draws, rng = alignx.Draws(), np.random.default_rng(0)
    sizes = [(3, 3), (4, 3), (3, 4), (4, 4), (4, 4), (4, 9), (9, 4), (5, 5), (0, 9), (4, 4), (4, 4), (4, 4), (4, 4)]
    modes = [shown(draws, rng, *size)[0] for size in sizes]
    # After the forced ones, UGC, PAIR and DEMO have 1 each; after the forced fifth PAIR, they have 2, 3, 2 and 2.
    expected = "DEMO UGC PAIR arbitrary UGC PAIR DEMO arbitrary PAIR UGC DEMO arbitrary UGC"
    assert modes == expected.split()
    assert draws.used == {"UGC": 4, "PAIR": 3, "DEMO": 3, "arbitrary": 3}
    assert shown(alignx.Draws(order=("PAIR", "UGC")), rng, 4, 4)[0] == "PAIR"


@pytest.mark.parametrize(("mode", "kind"), [("UGC", "c"), ("PAIR", "p"), ("DEMO", "d")])
def test_a_mode_shows_one_kind_each_entry_equally_often(mode: str, kind: str) -> None:
    draws, rng = alignx.Draws(mode), np.random.default_rng(0)
    found = [shown(draws, rng, 7, 7)[1] for _ in range(2000)]
    count = 1 if mode == "DEMO" else 4
    assert all(len(set(part)) == len(part) == count for part in found)
    assert {name[0] for part in found for name in part} == {kind}
    first = collections.Counter(part[0] for part in found)
    every = collections.Counter(name for part in found for name in part)
    assert len(every) == (1 if mode == "DEMO" else 7)
    assert all(abs(first[s] - 2000 / len(every)) < 60 and abs(every[s] - 2000 * count / len(every)) < 90 for s in every)


def test_arbitrary_shows_up_to_four_of_each_history_and_hides_half_of_the_demographics() -> None:
    draws, rng = alignx.Draws("arbitrary"), np.random.default_rng(0)
    seen: collections.Counter[tuple[int, int, int]] = collections.Counter()
    for _ in range(10_000):
        kinds = [name[0] for name in shown(draws, rng, 6, 6)[1]]
        assert kinds == sorted(kinds, key="dcp".index)
        seen[kinds.count("c"), kinds.count("p"), kinds.count("d")] += 1
    assert seen[0, 0, 0] == 0
    assert abs(seen[0, 0, 1] - 400) < 80  # 10,000 / 25; the demographics are always there.
    assert len(seen) == 1 + 2 * 24
    assert all(abs(n - 200) < 60 for key, n in seen.items() if key[:2] != (0, 0))


PROFILE = Signal("profile", text="b is a person", provenance="FILE#1/demographics")
COMMENT = [Signal("comment", f"b c{i} post", text=f"b c{i} said", provenance=f"FILE#1/comments/{i}") for i in range(5)]
PAIR = [Signal("pair", f"b p{i} post", f"b p{i} good", f"b p{i} bad", "", f"FILE#1/pairs/{i}") for i in range(5)]


@pytest.mark.parametrize("protocol", ["published", "disjoint"])
@pytest.mark.parametrize(
    ("variant", "shown"),
    [("DEMO", [PROFILE]), ("UGC", COMMENT), ("PAIR", PAIR), ("arbitrary", [PROFILE, *COMMENT, *PAIR])],
)
def test_test_users_show_what_the_variants_file_has(
    tmp_path: pathlib.Path, variant: str, shown: list[Signal], protocol: str
) -> None:
    paths = published(tmp_path, [row("t")], [row("a"), row("b", 5, 5)])
    data, counts = load(**paths, variant=variant, protocol=protocol)
    name = TEST_FILES[variant]
    own = tuple(dataclasses.replace(s, provenance=s.provenance.replace("FILE", name)) for s in shown)
    query = Query("b post", "b good", "b bad", provenance=f"{name}#1", group="b post")
    expected = Example(f"alignx/test/{name}#1", "test", own, (query,), persona="b is a person")
    assert {example.user: example for example in data["test"]}[expected.user] == expected
    assert (len(data["test"]), counts) == (2, {})
    assert "LEAK" not in str(data)


def test_an_arbitrary_user_without_demographics_has_the_persona_of_the_demo_file(tmp_path: pathlib.Path) -> None:
    rows = [row("a"), row("b"), row("c")]
    hidden = [row("a", demo=...), row("b", demo="", ugc=...), row("c", demo=None, pairs_=[])]
    paths = published(tmp_path, [row("t")], rows, arbitrary=hidden)
    test = sorted(load(**paths, variant="arbitrary")[0]["test"], key=lambda example: example.user)
    assert [example.persona for example in test] == [f"{name} is a person" for name in "abc"]
    kinds = [[signal.kind for signal in example.signals] for example in test]
    assert kinds == [["comment"] * 4 + ["pair"] * 4, ["pair"] * 4, ["comment"] * 4]


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_demo_row_of_another_user_is_refused(tmp_path: pathlib.Path, field: str) -> None:
    paths = published(tmp_path, [row("t")], [row("a"), row("b")], DEMO=[row("a"), row("b", **{field: "other"})])
    with pytest.raises(UserError, match=rf"Reddit_UGC.json: row 1: field '{field}' differs .*Reddit_DEMO.json: row 1"):
        load(**paths, variant="UGC")
    published(tmp_path, [row("t")], [row("a"), row("b")], DEMO=[row("a")])
    with pytest.raises(UserError, match=r"Reddit_UGC.json: 2 rows, but .*Reddit_DEMO.json has 1"):
        load(**paths, variant="UGC")


@pytest.mark.parametrize("missing", ["UGC", "DEMO"])
@pytest.mark.parametrize("together", [True, False])
def test_a_missing_test_file_is_named(tmp_path: pathlib.Path, missing: str, together: bool) -> None:
    paths = published(tmp_path, [row("t")], [row("a")])
    if together:
        paths = {"path": write_tests(paths["path"], [row("a")])}
    (paths.get("test_path", paths["path"]) / TEST_FILES[missing]).unlink()
    with pytest.raises(UserError, match=rf"no file Reddit_{missing}.json, which data.variant = 'UGC' needs") as caught:
        load(**paths, variant="UGC")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train-0.parquet", "part-0.parquet", "rows.json", "rows.jsonl"])
def test_a_folder_may_hold_both_training_and_test_files(tmp_path: pathlib.Path, name: str) -> None:
    write_tests(tmp_path, [row("a"), row("b")])
    (tmp_path / "README.md").write_text("about")
    if name.endswith(".parquet"):
        write_parquet(tmp_path / name, [row("t")])
    else:
        (tmp_path / name).write_text(json.dumps([row("t")]) if name == "rows.json" else json.dumps(row("t")))
    data, _ = load(tmp_path)
    assert [example.user for example in data["train"]] == [f"alignx/train/{name}#0"]
    assert len(data["test"]) == 2


def test_both_sources_may_be_hub_ids(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = published(tmp_path, [row("t")], [row("a")])
    folders = {"JinaLeejnl/AlignX": paths["path"], "JinaLeejnl/AlignX-test": paths["test_path"]}
    monkeypatch.setattr(tables.huggingface_hub, "snapshot_download", lambda repo_id, **_: str(folders[repo_id]))
    local = load(**paths, variant="PAIR")
    ids = {key: f"hf://datasets/{name}" for key, name in zip(paths, folders, strict=True)}
    assert load(**ids, variant="PAIR") == local


NO_TEXT, EQUAL = comment("k") | {"comment": ""}, pair("k") | {"rejected": "k good"}
FLAWS = [
    ({"chosen": None}, "field 'chosen' is null", "rows whose chosen is null or blank"),
    ({"prompt": " \n"}, "field 'prompt' is null or blank", "rows whose prompt is null or blank"),
    ({"rejected": "x good"}, "'chosen' and 'rejected' are the same", "rows whose responses are the same text"),
    ({"comments": 3, "pairs": 3, "demo": None}, "nothing to show in mode DEMO", "rows without signals to show"),
    ({"ugc": None, "pairs_": None, "demo": " "}, "nothing to show in mode DEMO", "rows without signals to show"),
    ({"ugc": [None, comment("k")]}, r"Content\[0\]: the entry is null", "comments that are null"),
    ({"ugc": [NO_TEXT, comment("k")]}, r"Content\[0\]: field 'comment'", "comments whose comment is null or blank"),
    ({"pairs_": [pair("k"), EQUAL]}, r"Feedback\[1\]: fields 'chosen' and", "pairs whose responses are the same text"),
]


@pytest.mark.parametrize("protocol", ["published", "disjoint"])
@pytest.mark.parametrize(("change", "message", "reason"), FLAWS, ids=[message for _, message, _ in FLAWS])
def test_a_null_or_blank_text_is_an_error_or_dropped_and_counted(
    tmp_path: pathlib.Path, change: dict[str, Any], message: str, reason: str, protocol: str
) -> None:
    paths = published(tmp_path, [row("t"), row("x", **change)], [row("a")])
    with pytest.raises(UserError, match=rf"data-00000-of-00001.parquet: row 1: .*{message}.*data.on_null = 'drop'"):
        load(**paths, protocol=protocol)
    data, counts = load(**paths, protocol=protocol, on_null="drop")
    assert counts == {f"train {reason}": 1}
    assert len(data["train"]) == (1 if reason.startswith("rows") else 2)


@pytest.mark.parametrize(
    ("variant", "change"),
    [("DEMO", {"demo": None}), ("UGC", {"ugc": []}), ("PAIR", {"pairs_": None}), ("UGC", {"ugc": ...})],
)
def test_a_test_user_with_nothing_to_show_is_an_error_or_dropped(
    tmp_path: pathlib.Path, variant: str, change: dict[str, Any]
) -> None:
    paths = published(tmp_path, [row("t")], [row("a"), row("b", **change)])
    with pytest.raises(UserError, match=rf"Reddit_{variant}.json: row 1: nothing to show in mode {variant}"):
        load(**paths, variant=variant)
    data, counts = load(**paths, variant=variant, on_null="drop")
    assert [example.queries[0].prompt for example in data["test"]] == ["a post"]
    assert counts == {"test rows without signals to show": 1}


def test_disjoint_drops_repeats_and_whatever_shows_a_test_prompt_and_counts_them(tmp_path: pathlib.Path) -> None:
    train = [
        row("t", 3, 3),
        row("t", 3, 2),  # The same row but for its history.
        row("u", 3, 3, prompt="a post"),  # A test prompt.
        row("v", 0, 0, pairs_=[pair("v0", "b post"), pair("v1", "v post"), pair("v2"), pair("v3")]),
        row("w", 0, 0, ugc=[comment("w0", "w post")] + [comment(f"w{i}", "a post") for i in range(1, 4)]),
        row("x", 0, 0, ugc=[comment(f"x{i}") for i in (0, 1, 2, 2)]),  # Three entries, so DEMO.
    ]
    test = [row("a"), row("b", 0, 1, ugc=[comment("b0", "b post"), comment("b1", "t post")]), row("a")]
    test.append(row("a", demo="another person"))
    paths = published(tmp_path, train, test)
    data, counts = load(**paths, variant="UGC")
    kinds = {e.queries[0].prompt: [s.prompt for s in e.signals] for e in data["train"]}
    kinds["v post"].sort()
    assert kinds == {"t post": [""], "v post": ["v2 post", "v3 post"], "x post": [""]}
    assert {e.queries[0].prompt: len(e.signals) for e in data["test"]} == {"a post": 4, "b post": 1}
    assert sorted(e.persona for e in data["test"]) == ["a is a person", "another person", "b is a person"]
    assert counts == {
        "train rows that repeat another row": 1,
        "train rows whose prompt is a test prompt": 1,
        "train signals that show their own query's prompt": 2,
        "train signals that show a test prompt": 4,
        "train rows whose signals all show their own query's prompt or a test prompt": 1,
        "train comments that repeat another one of their row": 1,
        "test rows that repeat another row": 1,
        "test signals that show their own query's prompt": 1,
    }
    data, counts = load(**paths, variant="UGC", protocol="published")
    assert counts == {}
    # DEMO three times, else four entries; all comments in the test file.
    assert [sorted(len(e.signals) for e in part) for part in data.values()] == [[1, 1, 1, 4, 4, 4], [2, 4, 4, 4]]


def test_case_and_blanks_make_no_difference_to_a_leak(tmp_path: pathlib.Path) -> None:
    train = [
        row("u", 3, 3, prompt=" A\tlong  POST of the test"),
        row("v", 0, 0, pairs_=[pair("v0", "V  Post"), pair("v1", "a LONG\npost of the test"), pair("v2"), pair("v3")]),
        row("x", 3, 3),
        row("x", 3, 3, prompt="X \u00a0 Post", demo="X is a  PERSON", chosen="X  good", rejected="x BAD"),
    ]
    data, counts = load(**published(tmp_path, train, [row("a", prompt="a long post of the test")]))
    assert [len(e.signals) for e in data["train"] if e.queries[0].prompt == "v post"] == [2]
    assert counts == {
        "train rows whose prompt is a test prompt": 1,
        "train signals that show their own query's prompt": 1,
        "train signals that show a test prompt": 1,
        "train rows that repeat another row": 1,
    }


def random_rows(seed: int, count: int) -> Rows:
    """Rows of few prompts, so that queries and signals have many in common."""
    rng = np.random.default_rng(seed)

    def some(make: Any) -> list[dict[str, Any]]:
        return [make(f"{rng.integers(40)}", f"q{rng.integers(60)}") for _ in range(rng.integers(8))]

    return [
        row(f"{rng.integers(50)}", prompt=f"q{rng.integers(60)}", ugc=some(comment), pairs_=some(pair))
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", TEST_FILES)
@pytest.mark.parametrize("source", ["files", "split", "held out"])
def test_disjoint_leaks_nothing_on_random_rows(tmp_path: pathlib.Path, source: str, variant: str, seed: int) -> None:
    rows, test_rows = random_rows(seed, 150), random_rows(seed + 100, 12)
    write_parquet(tmp_path / "train.parquet", rows)
    if source == "files":
        write_tests(tmp_path, test_rows)
    elif source == "split":
        write_parquet(tmp_path / "test.parquet", test_rows)
    options = {"variant": variant, "on_null": "drop", "seed": seed, "test_fraction": 0.1}
    data, _ = load(tmp_path, **options)
    told = {e.queries[0].prompt for e in data["test"]}
    assert not told & {e.queries[0].prompt for e in data["train"]}
    assert not told & {s.prompt for e in data["train"] for s in e.signals}
    for example in data["train"] + data["test"]:
        assert example.signals
        assert example.queries[0].prompt not in {s.prompt for s in example.signals}
        assert len({(s.prompt, s.chosen, s.text) for s in example.signals}) == len(example.signals)
        assert {s.kind for s in example.signals} <= {"profile", "comment", "pair"}
    for part in data.values():
        assert len({(e.queries[0].prompt, e.queries[0].chosen, e.persona) for e in part}) == len(part)
    kind = {"DEMO": "profile", "UGC": "comment", "PAIR": "pair"}.get(variant)
    assert not kind or {s.kind for e in data["test"] for s in e.signals} == {kind}
    if source != "files":
        assert max(sum(s.kind == "pair" for s in e.signals) for e in data["test"]) <= 4
    if source == "held out":
        assert 10 <= len(data["test"]) <= 15  # At most 0.1 of 150, in whole prompts.
        with pytest.raises(UserError, match="has no test files; set data.test_path or use data.protocol = 'disjoint'"):
            load(tmp_path, **options, protocol="published")
        return
    leaky, _ = load(tmp_path, **options, protocol="published")
    told = {e.queries[0].prompt for e in leaky["test"]}
    assert told & {s.prompt for e in leaky["train"] for s in e.signals}
    assert told & {e.queries[0].prompt for e in leaky["train"]}


@pytest.mark.parametrize("protocol", ["published", "disjoint"])
def test_a_smaller_sample_is_the_start_of_a_larger_one_and_counts_less(tmp_path: pathlib.Path, protocol: str) -> None:
    good = [row(str(i), i % 6, i % 5) for i in range(300)]
    rows = [r for i in range(300) for r in (good[i], *(row(f"x{i}-{k}", chosen="") for k in range(4)))]
    write_parquet(tmp_path / "rows.parquet", rows)
    write_tests(tmp_path, random_rows(0, 20))
    options = {"protocol": protocol, "on_null": "drop", "variant": "DEMO"}
    full, all_counts = load(tmp_path, **options)
    for train_users, test_users in ((1, 1), (60, 5), (299, 10), (300, 0), (900, 0)):
        part, counts = load(tmp_path, **options, train_users=train_users, test_users=test_users)
        assert part["train"] == full["train"][:train_users]
        assert part["test"] == full["test"][: test_users or None]
        assert (counts == all_counts) == (train_users == 900)
    assert (len(full["train"]), all_counts["train rows whose chosen is null or blank"]) == (300, 1200)
    users = [example.user for example in full["train"]]
    assert users != sorted(users, key=lambda user: int(user.partition("#")[2]))


@pytest.mark.parametrize(("every", "expected_passes"), [(1, 1), (5, 2)])
def test_only_rows_that_are_drawn_become_python_objects(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, every: int, expected_passes: int
) -> None:
    made = passes = 0
    blocks = tables.blocks

    def watched(path: pathlib.Path, columns: Any, size: int) -> Iterator[tables.Block]:
        nonlocal passes
        passes += path.name == "rows.parquet"
        for block in blocks(path, columns, 500):

            def taken(places: np.ndarray, block: tables.Block = block) -> list[tables.Row]:
                nonlocal made
                made += len(places) if path.name == "rows.parquet" else 0
                return block.take(places)

            yield dataclasses.replace(block, take=taken)

    monkeypatch.setattr(tables, "blocks", watched)
    rows = [row(str(i), 1, 1, chosen="" if i % every else "yes") for i in range(3000)]
    write_parquet(tmp_path / "rows.parquet", rows)
    write_tests(tmp_path, [row("a")])
    data, _ = load(tmp_path, train_users=40, protocol="published", on_null="drop")
    assert len({example.user for example in data["train"]}) == 40
    assert passes == expected_passes
    # Of 3,000: the 40, a quarter more and a hundred. If they are too few, twice as many.
    assert made == (150 if passes == 1 else 450)


def test_a_row_s_example_does_not_depend_on_the_size_of_the_sample_across_blocks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignx, "BLOCK", 32)
    write_parquet(tmp_path / "train-0.parquet", [row(str(i), i % 6, i % 7) for i in range(400)])
    write_parquet(tmp_path / "train-1.parquet", [row(str(i), i % 7, i % 6) for i in range(300, 700)])
    write_tests(tmp_path, [row("a")])
    full, counts = load(tmp_path)
    assert counts == {"train rows that repeat another row": 100}
    for wanted in (1, 50, 300):
        part, fewer = load(tmp_path, train_users=wanted)
        assert part["train"] == full["train"][:wanted]
        assert fewer.get("train rows that repeat another row", 0) < 100
    modes = collections.Counter(tuple(sorted({s.kind for s in e.signals})) for e in full["train"])
    assert len(modes) == 7  # One kind alone, or several in the mode "arbitrary".


def test_reading_is_deterministic_and_the_format_changes_nothing(tmp_path: pathlib.Path) -> None:
    rows = random_rows(1, 80)
    write_parquet(tmp_path / "a/data.parquet", rows)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/data.parquet.json").write_text(json.dumps(rows))
    test = write_tests(tmp_path / "test", random_rows(2, 30))
    options = {"test_path": test, "on_null": "drop", "protocol": "published"}
    parquet, _ = load(tmp_path / "a", **options)
    from_json, _ = load(tmp_path / "b", **options)
    assert str(from_json).replace("data.parquet.json", "data.parquet") == str(parquet)
    assert load(tmp_path / "a", **options)[0] == parquet
    other, _ = load(tmp_path / "a", **options, seed=1)
    for split in ("train", "test"):
        users, others = ([e.user for e in part[split]] for part in (parquet, other))
        assert users != others and sorted(users) == sorted(others) and len(set(users)) == len(users)
    options = {"on_null": "drop"}  # The test rows are then held out.
    assert load(tmp_path / "a", **options) == load(tmp_path / "a", **options)


def test_errors_about_the_sources_are_one_line(tmp_path: pathlib.Path) -> None:
    paths = published(tmp_path, [row("t"), row("u")], [row("a")])
    with pytest.raises(UserError, match="data.path is empty, but data.dataset = 'alignx'"):
        load("")
    with pytest.raises(UserError, match="no data files in this folder; set data.path"):
        load(paths["test_path"])
    with pytest.raises(UserError, match="2 rows of 2 prompts cannot be split at data.test_fraction = 0.1"):
        load(paths["path"], test_fraction=0.1)
    renamed = {key.replace("Pair-wise", "Pairwise"): value for key, value in row("t").items()}
    with pytest.raises(UserError, match="'Pair-wise Comparative Feedback' is missing"):
        load(**published(tmp_path, [renamed], [row("a")]))
    good, bad = row("t"), row("t", chosen="")
    for train, test, message in (
        ([bad, bad], [good], r"no train row can be used \(2 train rows whose chosen is null or blank\)"),
        ([good, bad], [bad], r"no test row can be used \(1 test rows whose chosen is null or blank\)"),
        ([good], [], r"no test row can be used \(there are none\)"),
    ):
        with pytest.raises(UserError, match=message):
            load(**published(tmp_path, train, test), on_null="drop", protocol="published")
