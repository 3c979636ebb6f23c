"""Writes and reads prepared examples: parts, each one array_record file with the description by which TFDS finds it.

A part is written by one process, completely or not at all. This module does not import JAX, so that the processes that
write parts start fast and stay small.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from popi_jax.data.schema import Example, from_json, to_json

UNFINISHED = "unfinished."  # Begins the name of a part that is being written.
_DATASET, _FEATURE = "preference_examples", "example"
_META, _KEYS = "part.json", "keys.npz"
# Single records, which grain reads at random. Compression would halve the files and take most of the time.
_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"
_BLOCK = 1000  # Records that are read at a time.


@dataclasses.dataclass(frozen=True)
class Part:
    """A finished part.

    Attributes:
        folder: its folder.
        split: of its examples.
        examples: how many it has.
        content: the hash of its examples' texts and order, and the split: see `prepared.content_hash`.
        files: the size in bytes and the SHA-256 of each file beside part.json.
        notes: what its writer added.
    """

    folder: pathlib.Path
    split: str
    examples: int
    content: str
    files: Mapping[str, Sequence[Any]]
    notes: Mapping[str, Any]

    @classmethod
    def find(cls, folder: pathlib.Path) -> Self | None:
        """Returns the part in this folder; None if there is none, or if its description is damaged."""
        try:
            described = json.loads((folder / _META).read_bytes())
            digest = described.pop("sha256")
            return cls(folder, **described) if digest == digest_of(described) else None
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    @property
    def records(self) -> pathlib.Path:
        """The file with the examples."""
        return self.folder / _records(self.split)

    def damage(self) -> str:
        """Returns what is wrong with its files; "" if they are as written."""
        for name, (size, digest) in self.files.items():
            path = self.folder / name
            if not path.is_file():
                return f"{path.name} is missing"
            if path.stat().st_size != size or file_digest(path) != digest:
                return f"{path.name} changed"
        return ""

    def keys(self) -> dict[str, np.ndarray]:
        """Returns the arrays that its writer added."""
        with np.load(self.folder / _KEYS) as arrays:
            return dict(arrays)

    def read(self, places: np.ndarray | None = None) -> Iterator[Example]:
        """Yields the examples at these places, all by default. A few are in memory at a time."""
        chosen = range(self.examples) if places is None else places.tolist()
        reader = ArrayRecordReader(os.fspath(self.records))
        try:
            for start in range(0, len(chosen), _BLOCK):
                yield from map(decoded, reader.read(list(chosen[start : start + _BLOCK])))
        finally:
            reader.close()


class Writer:
    """Writes a part. Use it as a context manager, and call `finish` at its end."""

    def __init__(self, folder: pathlib.Path, split: str):
        self._folder, self._split = folder, split
        self._digest = hashlib.sha256(split.encode() + b"\n")
        self._examples = self._bytes = 0

    def __enter__(self) -> Self:
        self._scratch = self._folder.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")  # No other process's.
        self._scratch.mkdir(parents=True)
        self._writer = ArrayRecordWriter(os.fspath(self._scratch / _records(self._split)), _OPTIONS)
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer.is_open():
            self._writer.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, example: Example) -> None:
        """Appends an example."""
        text = to_json(example).encode()
        self._digest.update(text + b"\n")
        record = encoded(text)
        self._writer.write(record)
        self._examples += 1
        self._bytes += len(record)

    def finish(self, notes: Mapping[str, Any] | None = None, **keys: np.ndarray) -> Part:
        """Completes the part.

        Args:
            notes: anything that JSON can hold, to keep with the part.
            keys: arrays to keep with the part.
        """
        self._writer.close()
        self._describe()
        if keys:
            np.savez(self._scratch / _KEYS, **keys)  # type: ignore[arg-type]
        files = {path.name: (path.stat().st_size, file_digest(path)) for path in sorted(self._scratch.iterdir())}
        described = {
            "split": self._split,
            "examples": self._examples,
            "content": self._digest.hexdigest()[:16],
            "files": files,
            "notes": dict(notes or {}),
        }
        described["sha256"] = digest_of(described)
        (self._scratch / _META).write_text(json.dumps(described), encoding="utf-8")
        for path in self._scratch.iterdir():  # Otherwise a power cut could leave empty files under the new name.
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if self._folder.exists():  # Damaged.
            shutil.rmtree(self._folder)
        self._scratch.rename(self._folder)
        found = Part.find(self._folder)
        assert found is not None
        return found

    def _describe(self) -> None:
        """Writes dataset_info.json and features.json, so that tfds.builder_from_directory reads the part, too."""
        template = tfds.core.ShardedFileTemplate(
            data_dir=self._scratch, dataset_name=_DATASET, split=self._split, filetype_suffix="array_record"
        )
        split = tfds.core.SplitInfo(
            name=self._split, shard_lengths=[self._examples], num_bytes=self._bytes, filename_template=template
        )
        tfds.folder_dataset.write_metadata(
            data_dir=self._scratch,
            features=tfds.features.FeaturesDict({_FEATURE: tfds.features.Text()}),
            split_infos=[split],
            check_data=False,
        )


def remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what killed processes had not finished. The caller holds the folder's lock."""
    for left in folder.glob(f"{UNFINISHED}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write(path: pathlib.Path, data: bytes) -> None:
    """Writes a file completely or not at all. Each process of a run has its own data, so each one writes."""
    scratch = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")
    try:
        with scratch.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def encoded(text: bytes) -> bytes:
    """Returns the record of a text: a tf.train.Example, in a third of the time that its class takes."""
    value = _field(1, _field(1, text))  # Feature.bytes_list.value
    return _field(1, _field(1, _field(1, _FEATURE.encode()) + _field(2, value)))  # Example.features.feature[_FEATURE]


def _field(number: int, data: bytes) -> bytes:
    """Returns a field of bytes as protocol buffers write it: a tag, the length in groups of 7 bits, the data."""
    head, length = bytearray([number << 3 | 2]), len(data)
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    head.append(length)
    return bytes(head) + data


def decoded(record: bytes) -> Example:
    """Returns the example of a record."""
    return from_json(tf_example_pb2.Example.FromString(record).features.feature[_FEATURE].bytes_list.value[0])


def file_digest(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records(split: str) -> str:
    return f"{_DATASET}-{split}.array_record-00000-of-00001"


def digest_of(described: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of what a JSON file holds."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
