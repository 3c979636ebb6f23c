"""Reads published data sets row by row: parquet and JSON files of a local path or the hub, by split.

Files of one data set differ in types and columns, so each is read with its own schema and checked against the declared
columns. A file whose split is unclear is refused rather than guessed or left out.
"""

import contextlib
import dataclasses
import functools
import gzip
import itertools
import os
import pathlib
import re
import stat
import urllib.parse
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from popi_jax.config import HUB
from popi_jax.data import checks, specs
from popi_jax.data.specs import Spec
from popi_jax.errors import UserError, first_line, shown


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        where: the file's path and the row's number in it, from 0, for messages.
        source: the same for provenance, such as "data/train-00000-of-00003.parquet#17". The path is relative to the
            data folder if the file comes from `splits`; else it is the file's name.
        values: the declared columns. A null is None.
    """

    where: str
    source: str
    values: dict[str, Any]


class DataFile(pathlib.PosixPath):
    """The path of a data file. `inside` is its part below the data folder."""

    inside = ""

    @classmethod
    def below(cls, root: pathlib.Path, inside: str) -> "DataFile":
        """Returns the path of a file of a data folder."""
        file = cls(root / inside)
        file.inside = inside
        return file


@dataclasses.dataclass(frozen=True)
class Block:
    """Some rows of a file that follow one another.

    Attributes:
        start: the number of the first one in the file.
        count: how many there are.
        take: returns those at these places in the block, in this order. No other row becomes a Python object.
    """

    start: int
    count: int
    take: Callable[[np.ndarray], list[Row]]


_JSON = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
READ = (".parquet", *_JSON)
# Formats of data or archives that are not read. Every other ending is taken for something else, such as a README.
_UNREAD = tuple(
    ".7z .arrow .array_record .avro .bz2 .csv .db .feather .gz .h5 .hdf5 .ipc .lz4 .mdb .ndjson .npy .npz .orc .pickle"
    " .pkl .pt .rar .sqlite .tar .tfrecord .tgz .tsv .xls .xlsx .xz .zip .zst".split()
)
# Written beside the data by `datasets`; their content is not data.
_METADATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
CARD = "README.md"
_SPLITS = (
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
    | dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
)
_PARTITION = re.compile(r"([^=]+)=(.*)")  # A folder's name, such as split=test.
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_BATCH = 256  # Rows that are decoded at a time.
_BUFFER = 2**20  # Bytes of a column that are read at a time.


def splits(source: str, flag: str = "data.path", without: Collection[str] = ()) -> dict[str, list[pathlib.Path]]:
    """Finds the data files of a source and their splits.

    A split is named by a folder split=NAME, else by a folder called NAME, else by a word of the file's name (as in
    train-00000-of-00003.parquet). NAME is train, validation or test, or one of their synonyms, such as dev and eval. If
    no file names a split, all belong to train. Files and folders whose names begin with "_" or "." are skipped.

    Args:
        source: a file, a folder, or hf://datasets/OWNER/NAME, which is downloaded to the hub's cache.
        flag: the setting that names the source, for error messages.
        without: names of files at the top of the folder that are left out.

    Returns:
        The files by split, in natural order (part-2 before part-10). They are of type `DataFile`.

    Raises:
        UserError: nothing to read there, or files whose split, completeness or configuration is in doubt.
    """
    root = local(source, flag)
    if not root.is_dir():
        if not root.name.lower().endswith(READ):
            raise UserError(f"{root}: not a format that is read; set {flag} to a file that ends in {', '.join(READ)}")
        return {_split(root.parent, root.name) or "train": [DataFile.below(root.parent, root.name)]}
    names = sorted(set(names_below(root)) - set(without), key=_natural)
    read = [name for name in names if name.lower().endswith(READ)]
    unread = [name for name in names if name.lower().endswith(_UNREAD) and name not in read]
    if not read:
        reason = f"{unread[0]} has a format that is not read" if unread else "no data files in this folder"
        raise UserError(
            f"{root}: {reason}; set {flag} to files that end in {', '.join(READ)}, unpacked or converted if need be"
        )
    split_of = {name: _split(root, name) for name in read}
    named = {split for split in split_of.values() if split}
    for name, split in split_of.items():
        if named and not split:
            raise UserError(
                f"{root / name}: names no split, but other files do; put train, validation or test in its name, or set"
                f" {flag} to a folder without it"
            )
    for name in unread:
        if (split := _split(root, name)) and split not in named:
            raise UserError(f"{root / name}: only file of the {split} split, in a format that is not read; convert it")
    found: dict[str, list[str]] = {}
    for name in read:
        found.setdefault(split_of[name] or "train", []).append(name)
    for split, part in found.items():
        _check_one_set(root, split, part, flag)
    return {split: [DataFile.below(root, name) for name in part] for split, part in found.items()}


def named(source: str, names: Collection[str], flag: str = "data.path") -> dict[str, pathlib.Path]:
    """Returns the files of these names at the top of a folder, or the source itself if it is one. See `splits`."""
    root = local(source, flag)
    folder = root if root.is_dir() else root.parent
    there = [name for name in names if (folder / name).is_file() and (root.is_dir() or root.name == name)]
    return {name: DataFile.below(folder, name) for name in there}


def rows(files: Sequence[pathlib.Path], columns: Mapping[str, Spec]) -> Iterator[Row]:
    """Yields the rows of the files in order, with bounded memory except for a top-level JSON list.

    Integral floats are accepted for int, and integers for float, below 2**53. NaN is null: it is how a null looks in a
    column of floats. A column that a file lacks is taken from a folder such as level=expert on its path below the data
    folder. Other columns and struct fields are left out.

    Args:
        files: the files; those of `splits` know the data folder.
        columns: the declared columns. Any value may also be null.

    Raises:
        UserError: names the file, the column or row, what was expected and what was found. The schemas of all parquet
            files are checked before the first row.
    """
    check(files, columns)
    spec = dict(columns)
    for path in files:
        inside, given = _inside(path), _given(path, columns)
        for index, (place, record) in enumerate(_records(path, columns)):
            values = specs.checked(spec, given | record, place, ())
            yield Row(f"{path}: row {index}", f"{inside}#{index}", values)


def blocks(path: pathlib.Path, columns: Mapping[str, Spec], size: int) -> Iterator[Block]:
    """Yields the rows of a file in blocks of this size, one in memory at a time. Rows are checked when taken."""
    inside, given, spec = _inside(path), _given(path, columns), dict(columns)

    def taken(records: Callable[[np.ndarray], Iterable[Any]], start: int, plain: bool, places: np.ndarray) -> list[Row]:
        rows = []
        for number, (place, record) in zip((places + start).tolist(), records(places), strict=True):
            where = f"{path}: row {number}"
            values = record if plain else specs.checked(spec, given | record, place or where, ())
            rows.append(Row(where, f"{inside}#{number}", values))
        return rows

    for start, count, plain, records in _blocks(path, columns, size):
        yield Block(start, count, functools.partial(taken, records, start, plain))


def check(files: Iterable[pathlib.Path], columns: Mapping[str, Spec]) -> None:
    """Checks the schemas of the parquet files; UserError as for `rows`."""
    for path in files:
        if path.name.lower().endswith(".parquet"):
            with _parquet(path) as file:
                specs.check_struct(pa.struct(list(file.schema_arrow)), columns, path, "", _given(path, columns))


def count(files: Iterable[pathlib.Path]) -> int:
    """Returns the number of rows. Parquet files state theirs; JSON files are read. UserError as for `rows`."""
    total = 0
    for path in files:
        if path.name.lower().endswith(".parquet"):
            with _parquet(path) as file:
                total += file.metadata.num_rows
        else:
            total += sum(1 for _ in _records(path, {}))
    return total


def licence(source: str) -> str | None:
    """Returns the licence that the README.md beside the data states in its YAML front matter; None if there is none.

    Args:
        source: as for `splits`. UserError if it cannot be read.
    """
    root = local(source, "data.path")
    card = (root if root.is_dir() else root.parent) / CARD
    try:
        stated = (huggingface_hub.metadata_load(card) or {}).get("license") if card.is_file() else None
    except Exception:  # A README is free text, and may have bad YAML or not be UTF-8.
        return None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated) if stated else None


def local(source: str, flag: str) -> pathlib.Path:
    """Returns the local file or folder of a source, downloaded if need be."""
    if not source:
        raise UserError(f"config: {flag} is empty; set it to a file or folder, or to {HUB}OWNER/NAME")
    if source.startswith(HUB):
        patterns = [CARD, *(f"*{ending}" for ending in READ)]
        try:
            return pathlib.Path(
                huggingface_hub.snapshot_download(
                    repo_id=source.removeprefix(HUB), repo_type="dataset", allow_patterns=patterns
                )
            )
        except Exception as error:  # Validation, HTTP, connection and cache errors have no common base.
            raise UserError(
                f"{flag} = {source}: the hub did not provide it ({type(error).__name__}: {first_line(error)}); log in"
                f" with hf auth login if it is private or gated, or set {flag} to a local path"
            ) from error
    path = pathlib.Path(source)
    if not os.path.isdir(path):
        _check_file(path, f"set {flag} to a file or folder of data, or to {HUB}OWNER/NAME")
    return path


def names_below(root: pathlib.Path) -> list[str]:
    """Returns the files below a folder, relative to it, without hidden files and metadata."""
    names: list[str] = []
    pending, seen = [""], set()
    while pending:
        inside = pending.pop()
        if (real := os.path.realpath(root / inside)) in seen:
            raise UserError(f"{root / inside}: a link to a folder that is read already; remove the link")
        seen.add(real)
        try:
            with os.scandir(root / inside) as entries:
                for entry in entries:
                    if entry.name.startswith(("_", ".")) or entry.name in _METADATA:
                        continue
                    name = f"{inside}/{entry.name}" if inside else entry.name
                    (pending if entry.is_dir() else names).append(name)
        except OSError as error:
            raise UserError(f"{root / inside}: cannot be read ({_reason(error)}); make it readable") from None
    return names


def _natural(name: str) -> tuple[Any, ...]:
    """Sorts numbers in the names of files and folders as numbers."""
    parts = [re.split(r"([0-9]+)", part) for part in name.split("/")]
    return [[int(piece) if i % 2 else piece for i, piece in enumerate(part)] for part in parts], name


def _split(root: pathlib.Path, name: str) -> str | None:
    """Returns the split that a file's path or name states; UserError if it states several or an unknown one."""
    *folders, own = name.split("/")
    partition = _partitions(name).get("split")
    if partition is not None and partition.lower() not in _SPLITS:
        raise UserError(
            f"{root / name}: unknown split {shown(partition)}; rename its folder to split=train, split=validation or"
            " split=test, or move it elsewhere"
        )
    for words in ([partition or ""], folders, re.findall("[a-z]+", own.lower())):
        stated = sorted({_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS})
        if len(stated) > 1:
            raise UserError(
                f"{root / name}: names the splits {' and '.join(stated)}; move it to a folder named after its split"
            )
        if stated:
            return stated[0]
    return None


def _check_one_set(root: pathlib.Path, split: str, names: Sequence[str], flag: str) -> None:
    """Raises UserError if the files of a split are several data sets, in two formats, or lack some shards."""
    places: dict[tuple[str, ...], str] = {}
    shards: dict[tuple[str, int], list[int]] = {}
    for name in names:
        folders = name.split("/")[:-1]
        places.setdefault(tuple(f for f in folders if f.lower() not in _SPLITS and not _PARTITION.fullmatch(f)), name)
        if found := re.fullmatch(r"(.*?)([0-9]+)-of-([0-9]+)[^/]*", name):
            shards.setdefault((found[1], int(found[3])), []).append(int(found[2]))
    if len(places) > 1:
        first, second, *_ = places.values()
        raise UserError(
            f"{root}: the {split} split has files in several folders, {first} and {second}; set {flag} to the"
            " sub-folder of one data set"
        )
    parquet = [name for name in names if name.lower().endswith(".parquet")]
    if parquet and (others := set(names) - set(parquet)):
        raise UserError(
            f"{root}: the {split} split has both {parquet[0]} and {min(others)}; move one of the two formats elsewhere"
        )
    for (prefix, total), numbers in shards.items():
        if not len(numbers) == len(set(numbers)) == total:
            raise UserError(
                f"{root / prefix}*: {len(numbers)} files with {len(set(numbers))} of {total} shards; get the missing"
                f" ones and remove those of other versions, or set {flag} to one file"
            )


def _inside(path: pathlib.Path) -> str:
    return getattr(path, "inside", "") or path.name


def _partitions(name: str) -> dict[str, str]:
    """Returns what folders such as level=expert on a file's path state."""
    found = map(_PARTITION.fullmatch, name.split("/")[:-1])
    return {match[1]: urllib.parse.unquote(match[2]) for match in found if match}


def _given(path: pathlib.Path, columns: Mapping[str, Spec]) -> dict[str, Any]:
    """Returns the declared columns that the folders of a file give, as text or parsed as numbers."""
    values: dict[str, Any] = {}
    for name, text in _partitions(_inside(path)).items():
        if (spec := specs.bare(columns.get(name))) in (str, int, float):
            try:
                values[name] = None if text == _NULL_PARTITION else spec(text)
            except ValueError:
                folder = shown(f"{name}={text}")
                raise UserError(f"{path}: folder {folder}: expected {specs.expected(spec)}; rename it") from None
    return values


def _records(path: pathlib.Path, columns: Mapping[str, Spec]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row of a file as a dict, with its place for messages about its values."""
    if path.name.lower().endswith(".parquet"):
        return _parquet_records(path, columns)
    if path.name.lower().endswith(_JSON):
        return _json_records(path)
    raise UserError(f"{path}: not a format that is read; convert it to a file that ends in {', '.join(READ)}")


def _parquet_records(path: pathlib.Path, columns: Mapping[str, Spec]) -> Iterator[tuple[str, dict[str, Any]]]:
    start = 0
    for batch in _batches(path, columns, _BATCH):
        lists = _lists(batch, path, start)
        for i in range(batch.num_rows):
            yield f"{path}: row {start + i}", {name: values[i] for name, values in lists.items()}
        start += batch.num_rows


def _blocks(path: pathlib.Path, columns: Mapping[str, Spec], size: int) -> Iterator[tuple[int, int, bool, Any]]:
    """Yields each block's start and size, whether its values need no check, and what returns places and records."""
    start = 0
    if path.name.lower().endswith(".parquet"):
        for batch in _batches(path, columns, size):
            types = {field.name: field.type for field in batch.schema}
            # The schema was checked, and nothing else can be wrong with a value of these types.
            plain = all(name in types and specs.plain(types[name], spec) for name, spec in columns.items())

            def of_batch(places: np.ndarray, batch: Any = batch, start: int = start) -> list[tuple[str, Any]]:
                lists = _lists(batch.take(pa.array(places)), path, start)
                return [("", dict(zip(lists, values, strict=True))) for values in zip(*lists.values(), strict=True)]

            yield start, batch.num_rows, plain, of_batch
            start += batch.num_rows
        return
    records = _records(path, columns)
    while some := list(itertools.islice(records, size)):
        yield start, len(some), False, lambda places, some=some: [some[place] for place in places.tolist()]
        start += len(some)


def _batches(path: pathlib.Path, columns: Mapping[str, Spec], size: int) -> Iterator[Any]:
    """Yields the declared columns of a parquet file, without the undeclared fields of structs in lists."""
    with _parquet(path) as file:
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        yield from file.iter_batches(
            size, columns=[leaf for leaf in leaves if _declared(leaf, file.schema_arrow, columns)]
        )


def _declared(leaf: str, schema: pa.Schema, columns: Mapping[str, Spec]) -> bool:
    """Whether a leaf of a parquet file, such as pairs.list.element.prompt, is of a declared column and field."""
    found = [name for name in schema.names if leaf == name or leaf.startswith(f"{name}.")]
    name = max(found, key=len)  # Names may have dots.
    if name not in columns:
        return False
    spec, type_ = specs.bare(columns[name]), getattr(schema.field(name).type, "value_type", None)
    if not (isinstance(spec, list) and isinstance(spec[0], dict) and isinstance(type_, pa.StructType)):
        return True
    return any(f".{inner}." in f"{leaf}." for inner in spec[0])


def _lists(batch: Any, path: pathlib.Path, start: int) -> dict[str, list[Any]]:
    """Returns the values of each column of a batch whose first row has this number."""
    lists = {}
    for name in batch.schema.names:
        try:
            lists[name] = batch.column(name).to_pylist()
        except UnicodeDecodeError:
            raise UserError(f"{path}: column {name!r}: not UTF-8 at or after row {start}; convert it") from None
    return lists


@contextlib.contextmanager
def _parquet(path: pathlib.Path) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file; UserError if it or what is read from it is damaged."""
    _check_file(path)
    try:
        # Without these settings, pyarrow holds all row groups, or all of a row group, in memory.
        options = {"pre_buffer": False, "buffer_size": _BUFFER}
        with pa.OSFile(os.fsencode(path)) as source:
            yield pq.ParquetFile(source, page_checksum_verification=True, **options)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a parquet file, or damaged ({first_line(error)}); download it again") from None


def _json_records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = enumerate(_lines(path), start=1)
    begun = False
    for number, line in lines:
        if not begun and line.lstrip().startswith("["):
            text = "\n" * (number - 1) + line + "".join(rest for _, rest in lines)
            values = checks.parse_json(text, str(path), remedy="give one JSON list of objects, or one object per line")
            for index, value in enumerate(values):
                place = f"{path}: row {index}"
                yield place, checks.as_object(value, place)
            return
        if not begun and line.strip() == "{":
            raise UserError(
                f"{path}:{number}: JSON over several lines; give one JSON list of objects, or one object per line, for"
                " example with jq -c"
            )
        if line.strip():
            begun = True
            place = f"{path}:{number}"
            yield place, checks.as_object(checks.parse_json(line, str(path), number), place)


def _lines(path: pathlib.Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file of JSON, without its byte order mark, decompressed if it ends in .gz."""
    _check_file(path)
    position, begun = 0, False
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for data in file:
                start = data.lstrip(b"\xef\xbb\xbf \t\r\n")
                if start and not begun and not start.startswith((b"{", b"[")):
                    raise UserError(
                        f"{path}: starts with {shown(data[:8])}, which is not JSON; save it as UTF-8 JSON, compressed"
                        " only if it ends in .gz"
                    )
                begun = begun or bool(start)
                try:
                    yield data.decode("utf-8" if position else "utf-8-sig")
                except UnicodeDecodeError as error:
                    byte = position + error.start
                    raise UserError(f"{path}: not UTF-8 at byte {byte}; save the file as UTF-8") from None
                position += len(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); download it again") from None


def _check_file(path: pathlib.Path, remedy: str = "restore it") -> None:
    """Raises UserError unless the path is a file that can be opened, and no stand-in for one."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # Reading a pipe or /dev/zero would never end.
            raise UserError(f"{path}: is a folder or a device, not a file; {remedy}")
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path.
        raise UserError(f"{path}: cannot be read ({_reason(error)}); {remedy}") from None
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the data; run git lfs pull, or download the file")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or first_line(error)
