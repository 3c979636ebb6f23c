"""Published data files: every row comes out as it was written, or one line names the file and the column."""

import gzip
import json
import os
import pathlib
import tracemalloc
import unittest.mock
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from popi_jax.data import tables
from popi_jax.data.specs import Optional
from popi_jax.errors import UserError

PERSONA = {"text": str}


def parquet(path: pathlib.Path, columns: Any, **options: Any) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def written(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def written_all(folder: pathlib.Path, names: str) -> None:
    for name in reversed(names.split()):
        written(folder / name, "")


def values(files: Iterable[pathlib.Path], columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row.values for row in tables.rows(list(files), columns)]


def refused(call: Callable[[], Any], *parts: str) -> None:
    """Checks that the error is one line with these parts."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    assert all(part in message for part in parts), message


def structs(*entries: Any, **fields: pa.DataType) -> pa.Array:
    return pa.array(entries, pa.struct(list(fields.items())))


COLUMNS = {
    "null type": (pa.nulls(2), str, [None, None]),
    "large_string": (pa.array(["a", None], pa.large_string()), str, ["a", None]),
    "string_view": (pa.array(["a"], pa.string_view()), str, ["a"]),
    "dictionary": (pa.array(["b", "a", None, "b"]).dictionary_encode(), str, ["b", "a", None, "b"]),
    "int32": (pa.array([-1, 2], pa.int32()), int, [-1, 2]),
    "uint64": (pa.array([2**63 + 1], pa.uint64()), int, [2**63 + 1]),
    "id beyond floats": (pa.array([2**53 + 1, None]), int, [2**53 + 1, None]),
    "label of floats": (pa.array([0.0, 1.0, None, -0.0]), int, [0, 1, None, 0]),
    "NaN for null": (pa.array([1.0, float("nan")]), int, [1, None]),
    "float16": (pa.array([0.5, None], pa.float16()), float, [0.5, None]),
    "integers for floats": (pa.array([1, 0]), float, [1.0, 0.0]),
    "list": (pa.array([["a", None], [], None, [None]]), [str], [["a", None], [], None, [None]]),
    "large_list": (pa.array([[1]], pa.large_list(pa.int16())), [int], [[1]]),
    "fixed_size_list": (pa.array([[0.5, 1], [0, 1]], pa.list_(pa.float32(), 2)), [float], [[0.5, 1.0], [0.0, 1.0]]),
    "list of the null type": (pa.array([[], [None]], pa.list_(pa.null())), [int], [[], [None]]),
    "list of dictionaries": (pa.array([["a"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))), [str], [["a"]]),
    "null struct": (structs({"text": "p"}, None, text=pa.string()), PERSONA, [{"text": "p"}, None]),
    "surplus field": (structs({"n": 1, "text": "p"}, n=pa.int64(), text=pa.string()), PERSONA, [{"text": "p"}]),
    "null field": (structs({"text": None}, text=pa.null()), PERSONA, [{"text": None}]),
    "fewer fields": (structs({"a": 1}, None, a=pa.int8()), {"a": int, "b": Optional(str)}, [{"a": 1, "b": None}, None]),
    "list of structs": (pa.array([[{"a": "x"}, None], None]), [{"a": str}], [[{"a": "x"}, None], None]),
    "struct of lists": (pa.array([{"a": [{"b": [1.0]}]}]), {"a": [{"b": [int]}]}, [{"a": [{"b": [1]}]}]),
}  # fmt: skip


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_of_any_type_comes_out_as_written(tmp_path: pathlib.Path, case: str) -> None:
    column, spec, expected = COLUMNS[case]
    found = values([parquet(tmp_path / "x.parquet", {"before": [0] * len(column), "x": column})], {"x": spec})
    assert [row["x"] for row in found] == expected
    assert repr(found) == repr([{"x": value} for value in expected])  # 1 == 1.0 == True.


def test_shards_may_differ_in_columns_types_and_order(tmp_path: pathlib.Path) -> None:
    spec = {"x": str, "label": int, "persona": {"text": str, "score": Optional(float)}}
    shards: list[dict[str, Any]] = [
        {"x": pa.nulls(1), "label": pa.nulls(1), "persona": structs(None, text=pa.string())},
        {"extra": [1, 2], "label": [1.0, None], "x": pa.array(["a", "b"]).dictionary_encode(),
         "persona": pa.array([{"score": 2, "text": "p"}, {"score": None, "text": "q"}])},
        {"x": pa.array(["c"], pa.large_string()), "persona": pa.array([{"text": "r"}]), "label": [0]},
    ]  # fmt: skip
    for i, shard in enumerate(shards):
        parquet(tmp_path / f"train-0000{i}-of-00003.parquet", shard)
    files = tables.splits(str(tmp_path))["train"]
    assert values(files, spec) == [
        {"x": None, "label": None, "persona": None},
        {"x": "a", "label": 1, "persona": {"text": "p", "score": 2.0}},
        {"x": "b", "label": None, "persona": {"text": "q", "score": None}},
        {"x": "c", "label": 0, "persona": {"text": "r", "score": None}},
    ]
    assert tables.count(files) == 4


def test_a_row_says_where_it_is_from(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path / "data/train-1.parquet", {"x": [str(i) for i in range(600)]})  # More than one batch.
    (file,) = tables.splits(str(tmp_path))["train"]
    row = list(tables.rows([file], {"x": str}))[599]
    assert row == tables.Row(f"{file}: row 599", "data/train-1.parquet#599", {"x": "599"})
    plain = next(tables.rows([pathlib.Path(file)], {"x": str}))
    assert (plain.where, plain.source) == (f"{file}: row 0", "train-1.parquet#0")


BAD_COLUMNS = [
    (pa.array([1]), str, "column 'x': expected a string, found 'int64'; check"),
    (pa.array([0], pa.timestamp("us")), str, "column 'x': expected a string, found 'timestamp[us]'"),
    (pa.array([b"a"]), str, "column 'x': expected a string, found 'binary'"),
    (pa.array([None], pa.bool_()), int, "column 'x': expected an integer, found 'bool'"),
    (pa.array(["1"]), int, "column 'x': expected an integer, found 'string'"),
    (pa.array(["a"]), [str], "column 'x': expected a list, found 'string'"),
    (pa.array([["a"]]), str, "column 'x': expected a string, found 'list<element: string>'"),
    (pa.array([[1]]), [str], "column 'x[]': expected a string, found 'int64'"),
    (pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())), [str], "column 'x': expected a list, found \"map<"),
    (pa.array(["p"]), PERSONA, "column 'x': expected a struct, found 'string'"),
    (pa.array([{"a": 1}]), PERSONA, "column 'x.text' is missing, found 'a'; check"),
    (pa.array([[{"a": 1}]]), [{"b": str}], "column 'x[].b' is missing, found 'a'"),
    (pa.array([{"a": {"b": 1}}]), {"a": {"b": str}}, "column 'x.a.b': expected a string, found 'int64'"),
    (pa.StructArray.from_arrays([[1], [2]], ["a", "a"]), {"a": int}, "column 'x.a' occurs twice"),
]  # fmt: skip
BAD_VALUES = [
    (pa.array([0] * 300 + [0.5]), int, ": row 300: column 'x': expected an integer, found 0.5"),
    (pa.array([2.0**53]), int, ": row 0: column 'x': expected an integer, found 9007199254740992.0"),
    (pa.array([float("inf")]), float, ": row 0: column 'x': expected a number, found inf"),
    (pa.array([2**53 + 1]), float, ": row 0: column 'x': expected a number, found 9007199254740993"),
    (pa.array([{"a": [1, None, 0.5]}]), {"a": [int]}, ": row 0: column 'x.a[2]': expected an integer, found 0.5"),
    (pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers()), str, "'x': not UTF-8 at or after row 0"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "spec", "message"), BAD_COLUMNS + BAD_VALUES)
def test_a_column_of_the_wrong_type_is_refused(tmp_path: pathlib.Path, column: Any, spec: Any, message: str) -> None:
    good = parquet(tmp_path / "a.parquet", {"x": pa.nulls(1)})
    path = parquet(tmp_path / "b.parquet", {"x": column})
    refused(lambda: values([good, path], {"x": spec}), str(path), message)
    if message.startswith("column"):  # Found before the first row of the first file.
        refused(lambda: next(tables.rows([good, path], {"x": spec})), str(path), message)


def test_a_missing_or_repeated_column_is_refused(tmp_path: pathlib.Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"x": ["a"], "x.y": ["b"]})
    refused(lambda: values([path], {"z": str}), f"{path}: column 'z' is missing, found 'x, x.y'")
    assert values([path], {"x.y": str, "z": Optional([str])}) == [{"x.y": "b", "z": None}]
    assert values([path], {"z": Optional(str)}) == [{"z": None}]  # No column at all is read.
    twice = parquet(tmp_path / "b.parquet", pa.Table.from_arrays([[1], ["a"], [1]], ["x", "x", "y"]))
    refused(lambda: values([twice], {"y": int}), f"{twice}: column 'x' occurs twice")


ROWS = [{"x": "é \u2028 ", "label": None}, {"x": None, "label": 1.0, "extra": True}, {"x": "", "label": 2**60 + 1}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
JSON_FILES = {
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "b.json": LINES.encode(),
    "c.jsonl": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode() + b"\r\n \n",
    "d.jsonl": b"\n \n " + json.dumps(ROWS).encode(),
    "e.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "f.jsonl.gz": gzip.compress(LINES.encode()),
    "G.JSONL": LINES.encode(),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_is_read_as_a_list_and_as_lines(tmp_path: pathlib.Path, name: str) -> None:
    path = written(tmp_path / name, JSON_FILES[name])
    files = tables.splits(str(path))["train"]
    found = list(tables.rows(files, {"x": str, "label": int}))
    assert [row.values["x"] for row in found] == ["é \u2028 ", None, ""]
    assert [row.values["label"] for row in found] == [None, 1, 2**60 + 1]
    assert [row.source for row in found] == [f"{name}#{i}" for i in range(3)]
    assert found[2].where == f"{path}: row 2"
    assert tables.count(files) == 3


GOOD = b'{"x": "a", "s": [{"b": "c"}]}\n'
BAD_JSON = [
    ("a.jsonl", GOOD + b"\n{]", ":3: not JSON (Expecting property name enclosed in double quotes at column 2); fix"),
    ("a.json", b'\n[{"x": "a", "s": null},\n{]', ":3: not JSON"),
    ("a.jsonl", GOOD + b"[]", ":2: expected an object in braces, found a list"),
    ("a.json", b'{\n"x": "a"}', ":1: JSON over several lines"),
    ("a.jsonl", GOOD + b'{"x": "a", "x": "b"}', ":2: field 'x' occurs twice"),
    ("a.json", b"[3]", ": row 0: expected an object in braces, found a number"),
    ("a.jsonl", GOOD + b'{"x": 1}', ":2: column 's' is missing, found 'x'"),
    ("a.jsonl", GOOD + b'{"x": 1, "s": []}', ":2: column 'x': expected a string, found 1"),
    ("a.json", b'[{"x": true, "s": []}]', ": row 0: column 'x': expected a string, found True"),
    ("a.jsonl", b'{"x": "", "s": [null, {"b": {}}]}', ":1: column 's[1].b': expected a string, found {}"),
    ("a.jsonl", b'{"x": "", "s": [{"c": ""}]}', ":1: column 's[0].b' is missing, found 'c'"),
    ("a.jsonl", b'{"x": "\\ud800", "s": []}', ":1: column 'x' has half a surrogate pair"),
    ("a.jsonl", GOOD + b'{"x": "\xff"}', f": not UTF-8 at byte {len(GOOD) + 7}"),
    ("a.jsonl", "\ufeff{}".encode("utf-16-le"), "which is not JSON; save it as UTF-8"),
    ("a.jsonl", gzip.compress(GOOD), "which is not JSON; save it as UTF-8 JSON, compressed only if it ends in .gz"),
    ("a.jsonl.gz", GOOD, ": cannot be read (Not a gzipped file (b'{\"')); download it again"),
    ("a.jsonl.gz", gzip.compress(GOOD)[:-9], ": cannot be read (Compressed file ended before"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", ": a Git LFS pointer, not the data; run git lfs pull"),
    ("a.parquet", b"PAR1" * 9, ": not a parquet file, or damaged"),
    ("a.csv", b"x,s", ": not a format that is read; convert it"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_JSON)
def test_a_damaged_file_is_named(tmp_path: pathlib.Path, name: str, content: bytes, message: str) -> None:
    path = written(tmp_path / name, content)
    refused(lambda: values([path], {"x": str, "s": [{"b": str}]}), str(path), message)


def test_integers_in_json_are_not_booleans_and_stay_exact(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"x": 12345678901234567890123}\n{"x": NaN}\n{"x": true}\n')
    rows = tables.rows([path], {"x": int})
    assert [next(rows).values["x"] for _ in range(2)] == [12345678901234567890123, None]
    refused(lambda: next(rows), ":3: column 'x': expected an integer, found True")
    huge = written(tmp_path / "b.jsonl", '{"x": 1' + "0" * 400 + "}")
    refused(lambda: values([huge], {"x": float}), "expected a number, found 1000")


def test_parquet_that_is_cut_or_changed_is_refused(tmp_path: pathlib.Path) -> None:
    table = pa.table({"x": [f"text {i}" for i in range(5000)], "n": range(5000)})
    path = parquet(tmp_path / "a.parquet", table, write_page_checksum=True, use_dictionary=False, compression="none")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    refused(lambda: values([path], {"x": str}), f"{path}: not a parquet file, or damaged")
    path.write_bytes(content.replace(b"text 4321", b"text 4322"))
    refused(lambda: values([path], {"x": str}), f"{path}: not a parquet file, or damaged", "CRC")
    assert [row["n"] for row in values([path], {"n": int})] == list(range(5000))  # Other columns are not even read.
    path.unlink()
    refused(lambda: values([path], {"x": str}), f"{path}: no such file; restore it")
    path.mkdir()
    refused(lambda: tables.count([path]), f"{path}: is a folder or a device, not a file")


SPLITS = [  # The files by split, and others that are there too.
    ({"train": "a.parquet b.parquet"}, ""),
    ({"test": "v1/test/part-2.json v1/test/part-10.json", "train": "v1/train/part-2.json v1/train/part-10.json"}, ""),
    ({"train": "data/train-0000-of-0002-b.json data/train-0001-of-0002-a.json", "test": "data/test-0-of-1.json"}, ""),
    ({"test": "persona_test.json testing1.json", "validation": "data-VAL-1.jsonl", "train": "mydev.train.json"}, ""),
    ({"validation": "Dev/train_test.json val/0.json", "train": "test/split=train/0.json", "test": "eval/0.json"}, ""),
    ({"test": "split=test/n=2/0.json split=test/n=10/0.json", "train": "split=train/n=2/0.json"}, ""),
    ({"train": "train.parquet", "test": "test.json"}, "dataset_info.json README.md images/test.png train.csv"),
    ({"train": "train/a.parquet"}, "_test.parquet .a/test.json _temporary/0.json"),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "others"), SPLITS)
def test_files_are_split_by_their_names(tmp_path: pathlib.Path, expected: dict[str, str], others: str) -> None:
    written_all(tmp_path, " ".join((*expected.values(), others)))
    found = tables.splits(str(tmp_path))
    assert {split: " ".join(os.path.relpath(f, tmp_path) for f in files) for split, files in found.items()} == expected


UNCLEAR = [
    ("train_test.parquet", "/train_test.parquet: names the splits test and train; move it to a folder"),
    ("train/test/0.json", "/train/test/0.json: names the splits test and train"),
    ("train.json more.json", "/more.json: names no split, but other files do; put"),
    ("split=extra/0.json", "/split=extra/0.json: unknown split 'extra'; rename"),
    ("b/test.json a/train.json b/train.json", "folders, a/train.json and b/train.json; set"),
    ("train/a/0.json train/b/0.json", "folders, train/a/0.json and train/b/0.json; set FLAG to"),
    ("train-1.json train-2.parquet", "both train-2.parquet and train-1.json; move"),
    ("README.md _0.json", ": no data files in this folder; set FLAG to files that end in .parquet,"),
    ("data-00000-of-00001.arrow state.json dataset_info.json", ".arrow has a format that is not read"),
    ("train.jsonl.zst", ": train.jsonl.zst has a format that is not read; set FLAG to files that end in"),
    ("train.json test.csv", "/test.csv: only file of the test split, in a format that is not read"),
    ("train-0-of-3.json train-2-of-3.json", "/train-*: 2 files with 2 of 3 shards; get the missing"),
    ("x/train-0-of-1-a.json x/train-0-of-1-b.json", "/x/train-*: 2 files with 1 of 1 shards;"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "message"), UNCLEAR)
def test_files_that_would_be_lost_or_misplaced_are_refused(tmp_path: pathlib.Path, names: str, message: str) -> None:
    written_all(tmp_path, names)
    refused(lambda: tables.splits(str(tmp_path), "FLAG"), str(tmp_path), message)


def test_the_source_may_be_a_file(tmp_path: pathlib.Path) -> None:
    written_all(tmp_path, "dev/a_test.jsonl dev/b-0-of-2.parquet dev/train.csv")
    for name, split in {"dev/a_test.jsonl": "test", "dev/b-0-of-2.parquet": "train"}.items():
        assert tables.splits(f"{tmp_path}/{name}") == {split: [tmp_path / name]}
    refused(lambda: tables.splits(f"{tmp_path}/dev/train.csv"), "train.csv: not a format that is read; set data.path")


def test_a_source_that_cannot_be_read_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a/train.json", "")
    for source, message in {
        "": "config: FLAG is empty; set it to",
        str(tmp_path / "none"): f"{tmp_path}/none: no such file; set FLAG to",
        str(tmp_path / "a\0b"): "cannot be read (embedded null byte); set FLAG to",
        str(tmp_path / "a/train.json/b"): "cannot be read (Not a directory); set FLAG to",
        "/dev/zero": "/dev/zero: is a folder or a device, not a file; set FLAG to",
    }.items():
        refused(lambda source=source: tables.splits(source, "FLAG"), message)
    (tmp_path / "a/again").symlink_to(tmp_path / "a", target_is_directory=True)
    refused(lambda: tables.splits(str(tmp_path)), f"{tmp_path}/a/again: a link to a folder that is read already")
    monkeypatch.setattr(os, "scandir", unittest.mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    refused(lambda: tables.splits(str(tmp_path)), f"{tmp_path}: cannot be read (Permission denied); make it readable")


def test_folders_give_the_columns_that_the_files_lack(tmp_path: pathlib.Path) -> None:
    parquet(tmp_path / "split=test/level=a%2Fb/n=7/0.parquet", {"x": ["a"]})
    parquet(tmp_path / "split=test/level=__HIVE_DEFAULT_PARTITION__/n=8/0.parquet", {"x": ["b"], "n": [1]})
    files = tables.splits(str(tmp_path))["test"]
    assert values(files, {"x": str, "level": str, "n": int, "split": str}) == [
        {"x": "b", "level": None, "n": 1, "split": "test"},
        {"x": "a", "level": "a/b", "n": 7, "split": "test"},
    ]
    refused(lambda: values(files[1:], {"level": int}), "folder 'level=a/b': expected an integer; rename it")
    refused(lambda: values(files, {"level": [str]}), "column 'level' is missing")


def test_the_hub_is_asked_for_data_and_readme(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "README.md", "---\nlicense: cc-by-4.0\n---\n")
    written(tmp_path / "data/test-0.jsonl", '{"x": "a"}')
    download = unittest.mock.Mock(return_value=str(tmp_path))
    monkeypatch.setattr(tables.huggingface_hub, "snapshot_download", download)
    source = "hf://datasets/someone/some-data"
    (row,) = tables.rows(tables.splits(source)["test"], {"x": str})
    assert (row.source, row.values) == ("data/test-0.jsonl#0", {"x": "a"})
    assert tables.licence(source) == "cc-by-4.0"
    patterns = ["README.md", "*.parquet", "*.json", "*.jsonl", "*.json.gz", "*.jsonl.gz"]
    asked = unittest.mock.call(repo_id="someone/some-data", repo_type="dataset", allow_patterns=patterns)
    assert download.call_args_list == [asked] * 2

    failure = ConnectionError("403 Client Error.\n\nsecond line")
    monkeypatch.setattr(tables.huggingface_hub, "snapshot_download", unittest.mock.Mock(side_effect=failure))
    message = (
        f"FLAG = {source}: the hub did not provide it (ConnectionError: 403 Client Error.); log in with hf auth login"
    )
    refused(lambda: tables.splits(source, "FLAG"), message, "or set FLAG to a local path")


CARDS = {
    b"\xef\xbb\xbf---\r\ntags: [a]\r\nlicense: mit\r\n---\r\n# A": "mit",
    b"---\nlicense:\n- mit\n- other\n---": "mit, other",
    b"---\ntags: []\n---\nlicense: mit\n": None,
    b"---\nlicense: [\n---\n": None,
    b"\xff": None,
}


def test_the_licence_is_that_of_the_readme(tmp_path: pathlib.Path) -> None:
    file = written(tmp_path / "train.jsonl", "")
    assert tables.licence(str(tmp_path)) is None
    for card, expected in CARDS.items():
        written(tmp_path / "README.md", card)
        assert tables.licence(str(tmp_path)) == tables.licence(str(file)) == expected


def test_rows_are_streamed(tmp_path: pathlib.Path) -> None:
    texts = [os.urandom(2000).hex() for _ in range(8000)]  # 32 MB.
    held = pa.total_allocated_bytes()
    for groups in (8000, 500):
        path = parquet(tmp_path / f"{groups}.parquet", {"x": texts}, row_group_size=groups)
        assert max(pa.total_allocated_bytes() for _ in tables.rows([path], {"x": str})) - held < 15e6
    path = written(tmp_path / "a.jsonl", "".join(f'{{"x": "{text}"}}\n' for text in texts[:1500]))
    tracemalloc.start()
    assert sum(1 for _ in tables.rows([path], {"x": str})) == 1500
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


STRINGS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
STRUCTS = [{"a": pa.string(), "b": pa.list_(pa.int8())}, {"b": pa.large_list(pa.int64()), "a": pa.large_string()}]
TYPES = {"x": STRINGS, "n": [pa.int64(), pa.float64()], "s": [pa.struct(list(fields.items())) for fields in STRUCTS]}
SPEC = {"x": str, "n": int, "s": {"a": str, "b": [int]}}
TEXT = st.text(st.characters(codec="utf-8"), max_size=4) | st.none()
INTEGERS = st.lists(st.integers(-128, 127) | st.none(), max_size=3)
ROW = st.fixed_dictionaries({
    "x": TEXT, "n": st.integers(-(2**53) + 1, 2**53 - 1) | st.none(),
    "s": st.fixed_dictionaries({"a": TEXT, "b": INTEGERS | st.none()}) | st.none(),
})  # fmt: skip


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(data=st.data())
def test_shards_of_any_types_give_their_rows(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, expected = tmp_path_factory.mktemp("shards"), []
    for shard in range(data.draw(st.integers(1, 12))):
        rows = data.draw(st.lists(ROW, max_size=4))
        columns = {}
        for name in data.draw(st.permutations(list(SPEC))):
            column = [row[name] for row in rows]
            empty = [pa.null()] if all(value is None for value in column) else []
            columns[name] = pa.array(column, data.draw(st.sampled_from(TYPES[name] + empty)))
        parquet(folder / f"part-{shard}.parquet", columns, row_group_size=data.draw(st.integers(1, 4)))
        expected += rows
    assert values(tables.splits(str(folder))["train"], SPEC) == expected
