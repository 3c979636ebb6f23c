"""Loads data sets by name, prepares them as array_record with TFDS (without TensorFlow), reads them with grain."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from array_record.python.array_record_data_source import ArrayRecordDataSource

from popi_jax.config import Data
from popi_jax.data import card, counting, locks, parts, sources, tables, users, workers
from popi_jax.data.builders import alignx_parts, elix, prefeval, psoups, review, roleplay, stylebook, traits
from popi_jax.data.counting import Made
from popi_jax.data.parts import Part
from popi_jax.data.schema import Example, to_json
from popi_jax.errors import UserError, disk_full, first_line, shown

_FOLDER, _DONE, _INDEX = "preference_examples", "prepared.json", "index.npz"
Examples = Mapping[str, Sequence[Example]]  # By split.


class ExampleSource(Sequence[Example]):
    """Random access to prepared examples, for grain.

    Args:
        parts: the parts that have the examples.
        fingerprint: changes whenever an example does.
        places: those of the examples, counted through the parts; None: all of them, in order.
    """

    def __init__(self, parts: Sequence[Part], fingerprint: str, places: np.ndarray | None = None):
        self._records = ArrayRecordDataSource([str(part.records) for part in parts])
        self._places, self.fingerprint = places, fingerprint

    def __len__(self) -> int:
        return len(self._records) if self._places is None else len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return parts.decoded(self._records[int(index if self._places is None else self._places[index])])


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set.

    Attributes:
        examples: by split: readers of the prepared ones, or lists of those that are in memory only.
        dropped: the number of dropped rows and signals, by reason.
        card: the data card of these examples, see `card.make`.
        folder: where they are, or will be.
    """

    examples: Examples
    dropped: Mapping[str, int]
    card: Mapping[str, Any]
    folder: pathlib.Path


def content_hash(examples: Examples) -> str:
    """Hashes the examples' texts, order and splits."""
    digest = hashlib.sha256()
    for split, split_examples in examples.items():
        digest.update(split.encode() + b"\n")
        for example in split_examples:
            digest.update(to_json(example).encode() + b"\n")
    return digest.hexdigest()[:16]


def fingerprint(split: str, examples: Sequence[Example]) -> str:
    """Returns what changes whenever an example of the split does: for data in memory, their `content_hash`."""
    return examples.fingerprint if isinstance(examples, ExampleSource) else content_hash({split: examples})


def find(data: Data, workdir: str | pathlib.Path) -> Prepared:
    """Returns the examples of config.data, prepared already or not. Says how many there are and what was dropped.

    They are looked for in data.prepared_dir, or else in <workdir>/data, by the settings, the bytes of the source files
    and the code that reads them. If they are not there, they are read. Those of a large data set are then prepared;
    others are in memory, and `stored` prepares them.

    Raises:
        UserError: bad data, or fewer examples than config.data requests. Nothing is left of them.
    """
    top = pathlib.Path(data.prepared_dir or pathlib.Path(workdir) / "data")
    if jax.process_count() > 1:
        top /= f"process_{jax.process_index()}"  # Each process has its own.
    own = top / _FOLDER / f"{data.dataset}_{_key(data)}"
    found = _read(own)
    if found is None:
        found = _make(data, own) if data.dataset in PREPARERS else _load(data, own)
    for reason, count in found.dropped.items():
        logging.warning("data: dropped %d %s", count, reason)
    print("data:", ", ".join(f"{len(part)} {split} examples" for split, part in found.examples.items()))
    if data.protocol == "disjoint" and data.dataset != "stylebook":  # All its users share a few prompts.
        shared = found.card["shared"]
        names = {"test_prompts": "prompts", "test_triples": "triples", "test_signals": "signals"}
        if told := ", ".join(f"{shared[key]} {name}" for key, name in names.items() if shared[key]):
            print(f"data: training shows some of the test split, too: {told}")
    return found


def stored(found: Prepared) -> dict[str, ExampleSource]:
    """Returns readers of the examples, which are written as array_record unless they are there already.

    Damaged files, and what a killed process left of an earlier preparation, are replaced. If several processes
    need the same data, one writes them and the others read the result.

    Raises:
        UserError: a split is empty.
    """
    own, examples = found.folder, found.examples
    for split, part in examples.items():
        if not part:
            raise UserError(f"data set {_name(own)!r}: the split {split!r} is empty; add more data")
    if all(isinstance(part, ExampleSource) for part in examples.values()):
        return dict(examples)  # type: ignore[arg-type]
    with _locked(own):
        done = _read(own)
        if done is None:
            _clear(own)
            written = {split: _write(own, split, part) for split, part in examples.items()}
            _finish(own, {split: ([part], None) for split, part in written.items()}, found.dropped, found.card)
            done = _read(own)
    if done is None:
        raise UserError(f"{own}: the prepared data cannot be read back; give another config.data.prepared_dir")
    return dict(done.examples)  # type: ignore[arg-type]


def _load(data: Data, own: pathlib.Path) -> Prepared:
    """Reads a data set into memory."""
    dropped: collections.Counter[str] = collections.Counter()
    examples = load_examples(data, dropped)
    return Prepared(examples, dropped, card.make(data, examples, dropped, licence(data)), own)


def _make(data: Data, own: pathlib.Path) -> Prepared:
    """Prepares a data set, unless another process has just done so. What it finished before a kill is kept."""
    made = [folder for folder in (own, *own.parents) if not folder.exists()]
    try:
        with _locked(own):
            found = _read(own)
            if found is None:
                dropped: collections.Counter[str] = collections.Counter()
                splits, test = PREPARERS[data.dataset](data, own, dropped)
                counts = {
                    split: counting.count(split, made, test if split == "train" else None)
                    for split, made in splits.items()
                }
                _finish(
                    own,
                    {split: (made.parts, made.places) for split, made in splits.items()},
                    dropped,
                    card.assembled(data, counts, dropped, licence(data), test),
                )
                found = _read(own)
    except workers.Killed:
        raise
    except UserError:
        shutil.rmtree(own, ignore_errors=True)  # Corrected data are other data.
        for folder in made:
            with contextlib.suppress(OSError):  # Another process may use it.
                folder.rmdir()
        raise
    if found is None:
        raise UserError(f"{own}: the prepared data cannot be read back; give another config.data.prepared_dir")
    return found


def _write(own: pathlib.Path, split: str, examples: Sequence[Example]) -> Part:
    with parts.Writer(own / split, split) as writer:
        for example in examples:
            writer.add(example)
        return writer.finish()


def _finish(
    own: pathlib.Path,
    splits: Mapping[str, tuple[Sequence[Part], np.ndarray | None]],
    dropped: Mapping[str, int],
    card: Mapping[str, Any],
) -> None:
    """Writes prepared.json, which says that the data are complete."""
    places = {split: places for split, (_, places) in splits.items() if places is not None}
    if places:
        index = io.BytesIO()
        np.savez(index, **places)  # type: ignore[arg-type]
        parts.write(own / _INDEX, index.getvalue())
    described = {
        "splits": {split: [part.folder.name for part in own] for split, (own, _) in splits.items()},
        "index": parts.file_digest(own / _INDEX) if places else None,
        "dropped": dict(dropped),
        "card": card,
    }
    parts.write(own / _DONE, json.dumps(described | {"sha256": parts.digest_of(described)}, indent=1).encode())


def _read(own: pathlib.Path) -> Prepared | None:
    """Returns the data prepared in this folder; None if they are not complete or damaged."""
    if not (own / _DONE).exists():
        return None
    try:
        described = json.loads((own / _DONE).read_bytes())
        if described.pop("sha256") != parts.digest_of(described):
            raise ValueError(f"{_DONE} changed")
        if described["index"] and parts.file_digest(own / _INDEX) != described["index"]:
            raise ValueError(f"{_INDEX} changed")
        index: dict[str, np.ndarray] = {}
        if described["index"]:
            with np.load(own / _INDEX) as arrays:
                index = dict(arrays)
        examples = {}
        for split, names in described["splits"].items():
            found = [Part.find(own / name) for name in names]
            if None in found:
                raise ValueError(f"{names[found.index(None)]} is missing or damaged")
            whole = [part for part in found if part is not None]
            if damage := next(filter(None, workers.threads(Part.damage, whole)), ""):
                raise ValueError(damage)
            examples[split] = ExampleSource(whole, _fingerprint(whole, index.get(split)), index.get(split))
        return Prepared(examples, described["dropped"], described["card"], own)
    except Exception as error:  # A broken file can make array_record raise any exception.
        if disk_full(error):
            raise
        logging.warning("%s: the prepared data are damaged (%s); preparing them again", own, first_line(error))
        return None


def _fingerprint(parts: Sequence[Part], places: np.ndarray | None) -> str:
    """Returns the content hash of the examples of one part, or a hash of those of several parts and of the places."""
    if places is None:
        (part,) = parts
        return part.content
    digest = hashlib.sha256("\n".join(part.content for part in parts).encode())
    digest.update(np.asarray(places, np.int64).tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(own: pathlib.Path) -> Iterator[None]:
    """Holds the lock of the folder of a data set, and removes what killed processes left beside it."""
    for other in {left.parent for left in own.parent.glob(f"*/{parts.UNFINISHED}*")} - {own}:
        with contextlib.suppress(UserError), locks.held(other):  # Unless somebody is writing it.
            parts.remove_unfinished(other)
    with locks.held(own, wait=True):
        own.mkdir(parents=True, exist_ok=True)  # In a run of several processes, only the first one has done so.
        yield


def _clear(own: pathlib.Path) -> None:
    """Removes all but the lock."""
    for left in own.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != "lock":
            left.unlink()


def _name(own: pathlib.Path) -> str:
    return own.name.rpartition("_")[0]


def _key(data: Data) -> str:
    """Returns what identifies the prepared data: the settings, the source files, and the code that reads them."""
    settings = data.model_dump(exclude={"prepared_dir"})
    known = {"settings": settings, "files": sources.digests(data), "code": sources.code_digest()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def training_iterator(
    source: Sequence[Example],
    users_per_step: int,
    seed: int,
) -> grain.DatasetIterator:
    """Yields lists of examples forever. Every epoch is a new permutation of the source, determined by `seed`.

    Every process reads the same users. Their arrays are global, and each device takes its own rows.

    Returns:
        An iterator whose get_state() is a small JSON-serialisable dict and whose set_state() resumes exactly.
    """
    order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    steps = order.batch(users_per_step, drop_remainder=True, batch_fn=list)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def from_config(data: Data, workdir: str | pathlib.Path) -> dict[str, ExampleSource]:
    """Finds the examples of config.data, or prepares them; returns readers for them."""
    return stored(find(data, workdir))


def licence(data: Data) -> str | None:
    """Returns the licence that a benchmark's own card names, if any."""
    return tables.licence(data.path) if data.dataset in BENCHMARKS else None


def load_examples(data: Data, counts: collections.Counter[str] | None = None) -> dict[str, list[Example]]:
    """Returns {"train": [...], "test": [...]} of the data set that config.data names; see configs/base.py.

    Args:
        data: config.data.
        counts: updated with the number of dropped rows and signals, by reason.

    Raises:
        UserError: bad data, or fewer examples than config.data requests.
    """
    counts = collections.Counter() if counts is None else counts
    examples = LOADERS[data.dataset](data, counts)
    if data.dataset in DRAWN:
        return examples  # Of the others, the first ones are taken.
    return {
        "train": _first(examples["train"], data.train_users, "train_users"),
        "test": _first(examples["test"], data.test_users, "test_users"),
    }


def _load_users(data: Data, counts: collections.Counter[str]) -> dict[str, list[Example]]:
    """Reads users.jsonl. Test users come from data.test_path or are held out. Both splits are in random order."""
    del counts  # Nothing is dropped.
    rng = np.random.default_rng(data.seed)
    path = data.path
    if not path:
        raise UserError("config: data.path is empty, but data.dataset = 'users' reads a file; set its path")
    read = users.read_users(path)
    everyone = [read[i] for i in rng.permutation(len(read))]
    if data.test_path:
        test = users.read_users(data.test_path, split="test")
        both = sorted({example.user for example in test} & {example.user for example in everyone})
        if both:
            raise UserError(f"{data.test_path}: field 'user': {shown(both[0])} is also in {path}; use other test users")
        return {"train": everyone, "test": [test[i] for i in rng.permutation(len(test))]}
    n_test = round(data.test_fraction * len(everyone))
    if not 0 < n_test < len(everyone):
        raise UserError(
            f"{path}: {len(everyone)} users cannot be split at data.test_fraction = {data.test_fraction};"
            " add users, change the fraction or set data.test_path"
        )
    test = [dataclasses.replace(example, split="test") for example in everyone[:n_test]]
    return {"train": everyone[n_test:], "test": test}


def _first(examples: list[Example], count: int, name: str) -> list[Example]:
    """Returns the first `count` examples, or all if it is 0."""
    if count < 0 or count > len(examples):
        raise UserError(f"config: data.{name} = {count}, but there are {len(examples)} examples; 0 takes all")
    return examples[:count] if count else examples


# By data.dataset. A loader adds what it drops to the counter, by reason.
LOADERS: dict[str, Callable[[Data, collections.Counter[str]], dict[str, list[Example]]]] = {
    "stylebook": lambda data, counts: stylebook.load(data),
    "users": _load_users,
    "psoups": psoups.load,
    "elix": elix.load,
    "review": review.load,
    "roleplay": roleplay.load,
    "alignx": alignx_parts.load,
    "prefeval": prefeval.load,
    "traits": traits.load,
}
# Those of data sets that memory may not hold. They write parts, and say which examples are kept.
PREPARERS: dict[
    str, Callable[[Data, pathlib.Path, collections.Counter[str]], tuple[Mapping[str, Made], card.Tested]]
] = {"alignx": alignx_parts.prepare}
DRAWN = ("stylebook", "traits")  # They draw as many users as the config names.
BENCHMARKS = ("elix", "review", "roleplay", "alignx", "prefeval", "traits")
