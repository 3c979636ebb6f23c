"""Loads data sets by name, prepares them as array_record with TFDS (without TensorFlow), reads them with grain."""

import collections
import contextlib
import dataclasses
import functools
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
import tensorflow_datasets as tfds
from absl import logging

from popi_jax.config import Data
from popi_jax.data import card, locks, tables, users
from popi_jax.data.builders import alignx, elix, prefeval, psoups, review, roleplay, stylebook, traits
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError, first_line, shown


@dataclasses.dataclass
class PreparedConfig(tfds.core.BuilderConfig):
    """A data set's examples by split. `name` must identify them, because TFDS finds prepared data by name."""

    # Not in the repr, which TFDS logs.
    examples: Mapping[str, Sequence[Example]] = dataclasses.field(default_factory=dict, repr=False)


class PreferenceExamples(tfds.core.GeneratorBasedBuilder):
    """Stores examples in order. Nested fields are JSON text, because TFDS needs TensorFlow to write ragged features."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so there are no checksums. To look for them beside this file, TFDS would import a package
    # that it does not install (importlib_resources).
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = tfds.features.FeaturesDict({"user": text(), "split": text(), "example": text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(examples) for split, examples in self.builder_config.examples.items()}

    def _generate_examples(self, examples: Sequence[Example]) -> Iterator[tuple[int, dict[str, str]]]:
        for i, example in enumerate(examples):
            yield i, {"user": example.user, "split": example.split, "example": to_json(example)}


class ExampleSource:
    """Random access to prepared examples, for grain. `fingerprint` changes whenever an example does."""

    def __init__(self, records: Sequence[dict[str, bytes]], fingerprint: str):
        self._records, self.fingerprint = records, fingerprint

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return from_json(self._records[index]["example"])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def to_json(example: Example) -> str:
    """Serialises an example as one line of JSON."""
    fields = dataclasses.asdict(example)
    if not example.person:  # Without it, the text and its hash are those of data that were prepared before it existed.
        del fields["person"]
    return json.dumps(fields, ensure_ascii=False)


def from_json(text: str | bytes) -> Example:
    """Inverse of `to_json`."""
    fields = json.loads(text)
    signals = tuple(Signal(**signal) for signal in fields.pop("signals"))
    queries = tuple(Query(**query) for query in fields.pop("queries"))
    return Example(signals=signals, queries=queries, **fields)


def content_hash(examples: Mapping[str, Sequence[Example]]) -> str:
    """Hashes the examples' texts, order and splits."""
    digest = hashlib.sha256()
    for split, split_examples in examples.items():
        for line in (split, *map(to_json, split_examples)):
            digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:16]


def prepare(
    source_name: str, examples: Mapping[str, Sequence[Example]], key: str, data_dir: str | pathlib.Path
) -> dict[str, ExampleSource]:
    """Writes the examples as array_record, unless the same ones are already there, and returns readers for them.

    Damaged files, and what a killed process left of an earlier preparation, are replaced. If several processes
    need the same data, one writes them and the others read the result.

    Args:
        source_name: e.g. "psoups"; letters and underscores.
        examples: the examples of each split, at least one in each.
        key: anything else that identifies the data set, such as its settings. It is hashed into the name with the
            content.
        data_dir: the folder to write to. In a multi-process run, each process has its own subfolder.

    Raises:
        UserError: a split is empty.
    """
    for split, split_examples in examples.items():
        if not split_examples:
            raise UserError(f"data set {source_name!r}: the split {split!r} is empty; add more data")
    digest = hashlib.sha256(f"{key}\n{content_hash(examples)}".encode()).hexdigest()[:16]
    folder = pathlib.Path(data_dir)
    if jax.process_count() > 1:
        folder /= f"process_{jax.process_index()}"
    own = folder / PreferenceExamples.name / f"{source_name}_{digest}"
    builder = functools.partial(
        PreferenceExamples,
        config=PreparedConfig(name=own.name, examples=examples),
        data_dir=folder,
        file_format="array_record",
    )
    found = _read(builder, own, examples)
    if found is None:
        for left in folder.glob(f"{PreferenceExamples.name}/*/incomplete.*"):  # Of a killed process.
            with contextlib.suppress(UserError), locks.held(left.parent):  # Unless somebody is writing it.
                shutil.rmtree(left, ignore_errors=True)
        with locks.held(own, wait=True):
            found = _read(builder, own, examples)
            if found is None:
                # The lock keeps others out, so nobody writes an incomplete folder now.
                for left in own.glob(f"*{PreferenceExamples.VERSION}"):
                    shutil.rmtree(left)
                with _quiet_tfds():
                    builder().download_and_prepare()
                found = _read(builder, own, examples)
    if found is None:
        raise UserError(f"{own}: the prepared data cannot be read back; give another config.data.prepared_dir")
    return found


def _read(
    builder: Callable[[], PreferenceExamples], own: pathlib.Path, examples: Mapping[str, Sequence[Example]]
) -> dict[str, ExampleSource] | None:
    """Returns readers for the files in `own`; None if there are none, or if they do not hold the examples."""
    if not (own / str(PreferenceExamples.VERSION)).exists():
        return None
    try:
        with _quiet_tfds():
            reader = builder()
            found = {
                split: ExampleSource(reader.as_data_source(split), content_hash({split: part}))
                for split, part in examples.items()
            }
        if all(list(found[split]) == list(part) for split, part in examples.items()):
            return found
        reason = "they differ from the data"
    except Exception as error:  # A broken file can make TFDS and array_record raise any exception.
        reason = first_line(error)
    logging.warning("%s: the prepared data are damaged (%s); preparing them again", own, reason)
    return None


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Silences TFDS, which reports downloads that do not happen and warns of configs that the builder does not list."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def training_iterator(
    source: ExampleSource,
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
    """Reads config.data and prepares it, see `from_examples`."""
    return from_examples(data, read(data), workdir)


def read(data: Data, dropped: collections.Counter[str] | None = None) -> dict[str, list[Example]]:
    """Returns the examples of config.data by split. Says how many there are, and warns of what was dropped.

    The number of dropped rows and signals is added to `dropped`, by reason.
    """
    counts: collections.Counter[str] = collections.Counter()
    examples = load_examples(data, counts)
    if dropped is not None:
        dropped.update(counts)
    for reason, count in counts.items():
        logging.warning("data: dropped %d %s", count, reason)
    print("data:", ", ".join(f"{len(part)} {split} examples" for split, part in examples.items()))
    if data.protocol == "disjoint" and data.dataset != "stylebook":  # All its users share a few prompts.
        shared = card.shared(examples["train"], examples["test"])
        names = {"test_prompts": "prompts", "test_triples": "triples", "test_signals": "signals"}
        if found := ", ".join(f"{shared[key]} {name}" for key, name in names.items() if shared[key]):
            print(f"data: training shows some of the test split, too: {found}")
    return examples


def licence(data: Data) -> str | None:
    """Returns the licence that a benchmark's own card names, if any."""
    return tables.licence(data.path) if data.dataset in BENCHMARKS else None


def from_examples(
    data: Data, examples: Mapping[str, Sequence[Example]], workdir: str | pathlib.Path
) -> dict[str, ExampleSource]:
    """Prepares the examples of config.data in data.prepared_dir, or else <workdir>/data."""
    data_dir = data.prepared_dir or pathlib.Path(workdir) / "data"
    return prepare(data.dataset, examples, json.dumps(data.model_dump(), sort_keys=True), data_dir)


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
    "alignx": alignx.load,
    "prefeval": prefeval.load,
    "traits": traits.load,
}
DRAWN = ("stylebook", "traits")  # They draw as many users as the config names.
BENCHMARKS = ("elix", "review", "roleplay", "alignx", "prefeval", "traits")
