"""Prepared data comes back unchanged, in an order that resumes exactly, and data sets are found by name."""

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from popi_jax.config import parse
from popi_jax.configs import base
from popi_jax.data import locks, parts, prepared, sources, users
from popi_jax.data.schema import Example, Query, Signal, from_json, to_json
from popi_jax.errors import UserError


def make(n: int, split: str = "train") -> list[Example]:
    return [
        Example(
            user=f"{split}{i} ü",
            split=split,
            signals=(
                Signal("pair", "p\n", f"c{i}", "r", provenance=f"f#{i}"),
                Signal("comment", prompt="q", text="日本 \u2028 😀"),
                Signal("profile", text="t"),
            )[: 1 + i % 3],
            queries=tuple(Query(f"x{m}", "y", "z", f"f#{i}", group=f"x{m}") for m in range(i % 3)),
            persona="kind" if i % 2 else "",
        )
        for i in range(n)
    ]


def prepare(examples: prepared.Examples, folder: pathlib.Path, key: str = "k") -> dict[str, prepared.ExampleSource]:
    """Prepares examples as those of a data set with this key."""
    return prepared.stored(prepared.Prepared(examples, {"rows": 1}, {}, folder / "preference_examples" / f"fake_{key}"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> prepared.ExampleSource:
    data = {"train": make(23), "test": make(5, "test")}
    return prepare(data, tmp_path_factory.mktemp("data"))["train"]


def names(batch: list[Example]) -> list[str]:
    return [example.user for example in batch]


def test_examples_come_back_equal_and_in_order(tmp_path: pathlib.Path) -> None:
    data = {"train": make(7), "test": make(2, "test")}
    readers = prepare(data, tmp_path)
    assert {split: list(source) for split, source in readers.items()} == data
    assert (len(readers["train"]), readers["train"][6]) == (7, data["train"][6])
    assert {split: source.fingerprint for split, source in readers.items()} == {
        split: prepared.content_hash({split: part}) for split, part in data.items()
    }
    (folder,) = tmp_path.glob("*/fake_k/train")
    by_tfds = tfds.builder_from_directory(folder).as_data_source("train")
    assert [from_json(record["example"]) for record in by_tfds] == data["train"]


def test_the_text_of_an_example_is_that_of_json() -> None:
    odd = Signal("comment", '\x00\x1f\x7f"\\/\n\t', text="\u2028 😀 é", provenance="\ud7ff")
    for example in [*make(6), Example("u", "test", (odd,), (), person='p"')]:
        fields = dataclasses.asdict(example)
        if not example.person:
            del fields["person"]
        assert to_json(example) == json.dumps(fields, ensure_ascii=False)
        assert from_json(to_json(example)) == example


@pytest.mark.parametrize("size", [0, 1, 100, 113, 127, 128, 16_383, 16_384, 3_000_000])
def test_a_record_is_what_protocol_buffers_write(size: int) -> None:
    message = tf_example_pb2.Example()
    message.features.feature["example"].bytes_list.value.append(b"x" * size)
    assert parts.encoded(b"x" * size) == message.SerializeToString()


def records(folder: pathlib.Path) -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.array_record*")}


def test_prepared_data_is_reused_but_never_stale(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = users_config(tmp_path)
    loads = []
    loader = prepared.LOADERS["users"]
    monkeypatch.setitem(prepared.LOADERS, "users", lambda *given: loads.append(given) or loader(*given))

    def found() -> prepared.Prepared:
        made = prepared.find(parse(config).data, tmp_path / "run")
        prepared.stored(made)
        return made

    first = found()
    there = records(tmp_path)
    assert len(there) == 2 and len(loads) == 1 and isinstance(first.examples["train"], list)
    again = found()
    assert records(tmp_path) == there and len(loads) == 1
    assert {split: list(part) for split, part in again.examples.items()} == first.examples
    assert again.card == first.card and again.dropped == first.dropped
    assert again.examples["train"].fingerprint == prepared.content_hash({"train": first.examples["train"]})
    config.data.prepared_dir = str(tmp_path / "run" / "data")  # It is the same place.
    found()
    assert len(loads) == 1
    lines = pathlib.Path(config.data.path).read_text().splitlines(keepends=True)
    pathlib.Path(config.data.path).write_text("".join(lines[1:]))
    changes: list[Callable[[], Any]] = [
        lambda: None,  # The file has changed.
        lambda: config.data.update({"seed": 1}),
        lambda: monkeypatch.setattr(sources, "code_digest", lambda: "another version"),
    ]
    for number, change in enumerate(changes, start=2):
        change()
        found()
        assert len(loads) == number and len(records(tmp_path)) == 2 * number
    monkeypatch.undo()
    assert sources.code_digest() != "another version"


def test_content_hash_depends_on_texts_order_and_splits() -> None:
    a, b = make(2)
    hashes = [
        prepared.content_hash(data)
        for data in (
            {"train": [a, b]},
            {"train": [b, a]},
            {"train": [a], "test": [b]},
            {"train": [a, a]},
            {"test": [a, b]},
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == prepared.content_hash({"train": make(2)})


def test_an_interrupted_preparation_is_repeated(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"train": make(4)}
    with monkeypatch.context() as patch:
        patch.setattr(parts.shutil, "rmtree", lambda *_, **__: None)  # A kill leaves the files.
        patch.setattr(parts.Writer, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(data, tmp_path)
    (left,) = tmp_path.glob(f"*/fake_k/{parts.UNFINISHED}*")
    with locks.held(left.parent):  # Somebody writes it.
        prepare(data, tmp_path, "other")
        assert left.exists()
    prepare(data, tmp_path, "more")
    assert not left.exists()
    assert list(prepare(data, tmp_path)["train"]) == data["train"]


def test_an_empty_split_is_a_user_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="data set 'fake': the split 'test' is empty"):
        prepare({"train": make(1), "test": []}, tmp_path)


def test_tensorflow_is_never_imported(source: prepared.ExampleSource) -> None:
    assert len(source) == len(list(source)) == 23
    assert "tensorflow" not in sys.modules


def test_every_epoch_is_a_new_permutation_determined_by_the_seed(source: prepared.ExampleSource) -> None:
    def draw(seed: int) -> list[str]:
        iterator = prepared.training_iterator(source, 1, seed)
        return [name for _ in range(2 * len(source)) for name in names(next(iterator))]

    order = draw(0)
    everyone = {example.user for example in source}
    first, second = order[: len(source)], order[len(source) :]
    assert set(first) == set(second) == everyone
    assert first != second
    assert first != [example.user for example in source]
    assert order == draw(0)
    assert order != draw(1)


def test_batches_have_the_given_size_and_cross_epochs(source: prepared.ExampleSource) -> None:
    iterator = prepared.training_iterator(source, 4, 0)
    batches = [next(iterator) for _ in range(23)]  # 92 = 4 epochs of 23.
    assert {len(batch) for batch in batches} == {4}
    assert set(collections.Counter(name for batch in batches for name in names(batch)).values()) == {4}
    assert isinstance(batches[0], list)


@pytest.mark.parametrize("taken", [0, 3, 6, 17])
def test_a_state_resumes_exactly_in_mid_epoch_and_through_json(source: prepared.ExampleSource, taken: int) -> None:
    iterator = prepared.training_iterator(source, 4, 0)
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [names(next(iterator)) for _ in range(12)]
    resumed = prepared.training_iterator(source, 4, 0)
    next(resumed)  # set_state must override the iterator's position.
    resumed.set_state(state)
    assert [names(next(resumed)) for _ in range(12)] == rest


def load(config, counts=None):
    return prepared.load_examples(parse(config).data, counts)


def users_config(tmp_path: pathlib.Path, n: int = 10):
    config = base.get_config()
    config.data.dataset = "users"
    config.data.path = str(tmp_path / "users.jsonl")
    people = [Example(f"u{i}", "train", (Signal("profile", text="t"),), (Query("q", "y", "z"),)) for i in range(n)]
    users.write_users(config.data.path, people)
    return config


def test_held_out_users_and_training_users_partition_all_users(tmp_path: pathlib.Path) -> None:
    config = users_config(tmp_path)
    data = load(config)
    train, test = ({example.user for example in data[split]} for split in ("train", "test"))
    assert (len(train), len(test)) == (7, 3)
    assert train | test == {f"u{i}" for i in range(10)}
    assert {example.split for example in data["test"]} == {"test"}
    assert {example.split for example in data["train"]} == {"train"}
    config.data.seed = 1
    assert {example.user for example in load(config)["test"]} != test


def test_test_users_may_come_from_a_separate_file(tmp_path: pathlib.Path) -> None:
    config = users_config(tmp_path)
    config.data.test_path = str(tmp_path / "test.jsonl")
    users.write_users(
        config.data.test_path, [Example("v", "test", (Signal("profile", text="t"),), (Query("q", "y", "z"),))]
    )
    data = load(config)
    assert [(e.user, e.split) for e in data["test"]] == [("v", "test")]
    assert len(data["train"]) == 10
    config.data.test_path = config.data.path
    with pytest.raises(UserError, match="users.jsonl: field 'user': 'u0' is also in"):
        load(config)


def test_user_counts_are_honoured_or_refused(tmp_path: pathlib.Path) -> None:
    config = users_config(tmp_path)
    everyone = load(config)
    config.data.train_users, config.data.test_users = 4, 2
    data = load(config)
    assert (data["train"], data["test"]) == (everyone["train"][:4], everyone["test"][:2])
    config.data.train_users = 8
    with pytest.raises(UserError, match="data.train_users = 8, but there are 7 examples"):
        load(config)


def test_errors_in_the_data_config(tmp_path: pathlib.Path) -> None:
    config = users_config(tmp_path, n=1)
    with pytest.raises(UserError, match="1 users cannot be split at data.test_fraction = 0.3"):
        load(config)
    config.data.path = ""
    with pytest.raises(UserError, match="data.path is empty, .*data.dataset = 'users'"):
        load(config)
    config.data.dataset = "psoups"
    with pytest.raises(UserError, match="data.path is empty"):
        load(config)


@pytest.mark.parametrize("separate_folder", [False, True])
def test_from_config_prepares_data_in_the_configured_folder(tmp_path: pathlib.Path, separate_folder: bool) -> None:
    config = users_config(tmp_path)
    if separate_folder:
        config.data.prepared_dir = str(tmp_path / "elsewhere")
    readers = prepared.from_config(parse(config).data, tmp_path / "run")
    assert {split: list(source) for split, source in readers.items()} == load(config)
    where = tmp_path / "elsewhere" if separate_folder else tmp_path / "run" / "data"
    assert list(where.rglob("*.array_record*"))


def test_stylebook_is_found_by_name(tmp_path: pathlib.Path) -> None:
    config = base.get_config()
    config.data.train_users, config.data.test_users = 3, 2
    data = load(config)
    assert (len(data["train"]), len(data["test"])) == (3, 2)


def test_psoups_settings_are_passed_to_the_reader(tmp_path: pathlib.Path) -> None:
    def pair(i: int) -> dict[str, str]:
        return {"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"}

    rows = [
        pair(i) | {"ground_truth_persona": "a", "Pair-wise Comparative Feedback": [pair(i), pair(99)]}
        for i in range(40)
    ]
    config = base.get_config()
    config.data.dataset, config.data.path = "psoups", str(tmp_path / "rows.json")
    pathlib.Path(config.data.path).write_text(json.dumps(rows))
    config.data.signals_per_user, config.data.train_draws, config.data.test_draws = 2, 3, 2
    config.data.queries_per_user, config.data.test_queries_per_user, config.data.test_fraction = 5, 2, 0.5
    data = load(config)
    assert (len(data["train"]), len(data["test"])) == (3 * 20 // 5, 2 * 20 // 2)
    assert {len(example.signals) for example in data["train"] + data["test"]} == {2}
    config.data.protocol = "published"
    counts: collections.Counter[str] = collections.Counter()
    load(config, counts)
    assert counts["shipped signals that show their own query"] > 0
