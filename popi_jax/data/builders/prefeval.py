"""Reads PrefEval: users with one stated preference each, which their choices and their dialogues show.

Source: Zhao et al. 2025 (arXiv 2502.09597), folder benchmark_dataset of github.com/amazon-science/PrefEval. Each topic
has a file in each of three folders, and row i of all three is the same user. The stated preference is the persona, for
the oracle; no signal has it word for word.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import logging

from popi_jax.config import HUB, Data
from popi_jax.data import checks, disjoint
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError, shown

QUESTIONS = "mcq_options"
CHOICES = "implicit_preference/choice-based"
DIALOGUES = "implicit_preference/persona-driven"
OPTIONS = 4  # In each question and choice; the first one fits the user.
GREETING = "Hello! How can I help you today?"  # The prompt of a dialogue's first turn, since the user starts it.
_SPLIT_STREAM, _ORDER_STREAM, _QUERY_STREAM = range(3)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        record: its fields.
        where: file and row, for error messages.
        provenance: the same, relative to the data folder, such as "mcq_options/pets.json#3".
    """

    record: dict[str, Any]
    where: str
    provenance: str


def load(data: Data, counts: collections.Counter[str]) -> dict[str, list[Example]]:
    """Reads the folder config.data.path; both splits are in random order.

    A user's signals are all that the data have: the choice as three pairs and as a comment, and the user's turns of the
    dialogue as comments. The queries are three pairs: the question, and the option that fits preferred to each other
    one. With data.unseen = "users", about data.test_fraction of the users are tested on; those who share a preference
    or a question stay together. With "topics", whole topics are, and training users who share a preference or a
    question with a test user are dropped. So are training signals that a test user has, too.

    Args:
        data: config.data. It uses path, seed, test_fraction, on_null, unseen, queries_per_user and
            test_queries_per_user; the last two are upper bounds.
        counts: updated with the number of dropped users, queries and signals, by reason.

    Returns:
        {"train": [...], "test": [...]}. An example's user is "TOPIC#ROW", and the group of its queries is the user.

    Raises:
        UserError: a bad file or setting, or too few users.
    """
    folder = local_folder(data)
    users = [user for topic in topics(folder) for user in read_topic(folder, topic, data.on_null, counts)]
    tested = _tested(users, data)
    shared = {text for user in users if user.user in tested for text in _texts(user)}
    split_users: dict[str, list[Example]] = {"train": [], "test": []}
    rng = np.random.default_rng((data.seed, _QUERY_STREAM))
    for user in users:
        split, limit = ("test", data.test_queries_per_user) if user.user in tested else ("train", data.queries_per_user)
        order = rng.permutation(len(user.queries))[:limit]
        if split == "train" and shared.intersection(_texts(user)):
            counts["training users who share a preference or a question with a test user"] += 1
            continue
        queries = tuple(user.queries[i] for i in order)
        split_users[split].append(dataclasses.replace(user, split=split, queries=queries))
    split_users["train"] = disjoint.without(split_users["train"], split_users["test"], counts)
    rng = np.random.default_rng((data.seed, _ORDER_STREAM))
    for split, part in split_users.items():
        if not part:
            raise UserError(
                f"{folder}: {len(users)} users leave none for {split} at data.unseen = {data.unseen!r} and"
                f" data.test_fraction = {data.test_fraction}; add users or change the fraction"
            )
        split_users[split] = [part[i] for i in rng.permutation(len(part))]
    return split_users


def topics(folder: pathlib.Path) -> list[str]:
    """Returns the sorted names of the topics. Files with a blank in their names, such as copies, are left out."""
    names = sorted(path.stem for path in (folder / QUESTIONS).glob("*.json"))
    found = [name for name in names if not any(character.isspace() for character in name)]
    if len(found) < len(names):
        ignored = shown([name for name in names if name not in found])
        logging.warning(
            "%s: ignored %d files with a blank in their names: %s", folder, len(names) - len(found), ignored
        )
    if not found:
        raise UserError(
            f"{folder / QUESTIONS}: has no JSON file; set data.path to the folder benchmark_dataset of PrefEval"
        )
    return found


def read_topic(folder: pathlib.Path, topic: str, on_null: str, counts: collections.Counter[str]) -> list[Example]:
    """Reads and checks the users of one topic, in the order of its files, with all their queries and no split."""
    asked, chosen, talked = (_rows(folder, f"{part}/{topic}.json") for part in (QUESTIONS, CHOICES, DIALOGUES))
    for other, part in ((chosen, CHOICES), (talked, DIALOGUES)):
        if len(other) != len(asked):
            raise UserError(
                f"{folder / part / topic}.json: has {len(other)} rows, but {folder / QUESTIONS / topic}.json has"
                f" {len(asked)}; take both from one version of the data"
            )
    users = []
    for index, (question, choice, dialogue) in enumerate(zip(asked, chosen, talked, strict=True)):
        for row in (choice, dialogue):
            _check_same_user(question, row)
        preference = filled(question.record, "preference", question.where, on_null)
        if not preference:
            counts["users whose preference is null or blank"] += 1
            continue
        user = f"{topic}#{index}"
        pairs = _pairs(question, "question", "classification_task_options", on_null, "queries", counts)
        queries = tuple(Query(**pair, group=user) for pair in pairs)
        signals = _choice(choice, on_null, counts) + _turns(dialogue, on_null, counts)
        signals = _hidden(signals, [preference], "that have the stated preference word for word", counts)
        options = [option for query in queries for option in (query.chosen, query.rejected)]
        signals = _hidden(signals, options, "that have an option of their own query word for word", counts)
        if not queries or not signals:
            counts[f"users without {'signals' if queries else 'queries'}"] += 1
            continue
        users.append(Example(user, "", tuple(signals), queries, preference))
    return users


def local_folder(data: Data) -> pathlib.Path:
    """Returns data.path, the local folder of a data set that has no published protocol and no test split."""
    if data.protocol == "published":
        raise UserError(
            f"config: data.protocol = 'published', but data.dataset = {data.dataset!r} has no published protocol;"
            " use 'disjoint'"
        )
    if data.test_path:
        raise UserError(
            f"config: data.test_path is set, but data.dataset = {data.dataset!r} splits data.path; leave it empty"
        )
    if not data.path:
        raise UserError(f"config: data.path is empty, but data.dataset = {data.dataset!r} reads a folder; set its path")
    if data.path.startswith(HUB):
        raise UserError(
            f"config: data.path is {shown(data.path)}, but data.dataset = {data.dataset!r} is not read from the hub;"
            " clone its repository and give its folder"
        )
    folder = pathlib.Path(data.path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set data.path to the folder of the {data.dataset} data")
    return folder


def filled(record: dict[str, Any], field: str, where: str, on_null: str) -> str:
    """Returns the text of a field; "" if it is null or blank and `on_null` is "drop"; UserError otherwise."""
    value = record.get(field)
    empty = value is None or (isinstance(value, str) and not value.strip())
    if field not in record or not empty:
        return checks.text_field(record, field, where)
    if on_null == "error":
        kind = "null" if value is None else "blank"
        raise UserError(f"{where}: field {field!r} is {kind}; write some text, or set data.on_null = 'drop'")
    return ""


def plain(text: str) -> str:
    """Returns the words of the text, without what makes no difference: case, blanks and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _rows(folder: pathlib.Path, name: str) -> list[Row]:
    """Reads the JSON list of objects in one file."""
    path = folder / name
    text = checks.read_text(path, "set data.path to the folder benchmark_dataset of PrefEval, with all its files")
    records = checks.parse_json(text, str(path), remedy="give one JSON list of rows")
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: expected a JSON list of rows; take the file as published")
    wheres = [f"{path}: row {i}" for i in range(len(records))]
    return [
        Row(checks.as_object(record, where), where, f"{name}#{i}")
        for i, (record, where) in enumerate(zip(records, wheres, strict=True))
    ]


def _check_same_user(question: Row, other: Row) -> None:
    for field in ("preference", "question"):
        if question.record.get(field) != other.record.get(field):
            raise UserError(
                f"{other.where}: field {field!r} differs from {question.where}; take both files from one version of"
                " the data, in its order"
            )


def _pairs(
    row: Row, question: str, field: str, on_null: str, kind: str, counts: collections.Counter[str]
) -> list[dict[str, str]]:
    """Returns the fields of the pairs that prefer the first option to each of the others."""
    prompt = filled(row.record, question, row.where, on_null)
    entries = checks.list_field(row.record, field, row.where)
    if len(entries) != OPTIONS:
        raise UserError(f"{row.where}: field {field!r} has {len(entries)} options; give {OPTIONS}, the first one fits")
    options = [filled({f"{field}[{i}]": entry}, f"{field}[{i}]", row.where, on_null) for i, entry in enumerate(entries)]
    pairs = []
    for i in range(1, OPTIONS):
        if not (prompt and options[0] and options[i]):
            counts[f"{kind} with a null or blank text"] += 1
        elif options[i] in options[:i]:
            counts[f"{kind} whose rejected option repeats another option"] += 1
        else:
            provenance = f"{row.provenance}/options/{i}"
            pairs.append({"prompt": prompt, "chosen": options[0], "rejected": options[i], "provenance": provenance})
    return pairs


def _choice(row: Row, on_null: str, counts: collections.Counter[str]) -> list[Signal]:
    """Returns the signals of a choice: its pairs, and a comment with the choice in the user's words."""
    signals = [Signal("pair", **pair) for pair in _pairs(row, "implicit_query", "options", on_null, "signals", counts)]
    aligned, first = row.record.get("aligned_op"), row.record["options"][0]
    if aligned is not None and aligned != first:
        raise UserError(
            f"{row.where}: field 'aligned_op' is {shown(aligned)}, but the first of 'options' is {shown(first)}; put"
            " the option that fits first"
        )
    where = f"{row.where}: conversation"
    conversation = checks.as_object(row.record.get("conversation"), where)
    prompt = filled(row.record, "implicit_query", row.where, on_null)
    text = filled(conversation, "user_selection", where, on_null)
    return signals + _comment(prompt, text, f"{row.provenance}/conversation", counts)


def _turns(row: Row, on_null: str, counts: collections.Counter[str]) -> list[Signal]:
    """Returns the user's turns of a dialogue as comments on the assistant's turn before."""
    where = f"{row.where}: conversation"
    conversation = checks.as_object(row.record.get("conversation"), where)
    turns = [
        checks.as_object(conversation.get(str(i)), f"{where}: turn {i}", "number the turns from 0")
        for i in range(len(conversation))
    ]
    signals: list[Signal] = []
    for i, turn in enumerate(turns):
        prompt = filled(turns[i - 1], "assistant", f"{where}: turn {i - 1}", on_null) if i else GREETING
        text = filled(turn, "user", f"{where}: turn {i}", on_null)
        signals += _comment(prompt, text, f"{row.provenance}/conversation/{i}", counts)
    return signals


def _comment(prompt: str, text: str, provenance: str, counts: collections.Counter[str]) -> list[Signal]:
    if not (prompt and text):
        counts["signals with a null or blank text"] += 1
        return []
    return [Signal("comment", prompt, text=text, provenance=provenance)]


def _hidden(
    signals: Sequence[Signal], secrets: Iterable[str], reason: str, counts: collections.Counter[str]
) -> list[Signal]:
    """Drops the signals that contain the words of one of the secrets."""
    wanted = {f" {plain(secret)} " for secret in secrets if plain(secret)}
    kept = []
    for signal in signals:
        texts = [f" {plain(text)} " for text in (signal.prompt, signal.chosen, signal.rejected, signal.text)]
        if any(words in text for words in wanted for text in texts):
            counts[f"signals {reason}"] += 1
        else:
            kept.append(signal)
    return kept


def _texts(user: Example) -> tuple[str, str]:
    """Returns what no two users of different splits share: the preference and the question."""
    return f"preference: {plain(user.persona)}", f"question: {plain(user.queries[0].prompt)}"


def _tested(users: Sequence[Example], data: Data) -> set[str]:
    """Draws the test users: whole groups in random order, as long as they fit in data.test_fraction."""
    if data.unseen == "topics":
        by_topic: dict[str, list[str]] = {}
        for user in users:
            by_topic.setdefault(user.user.rpartition("#")[0], []).append(user.user)
        groups = list(by_topic.values())
        sizes = [1] * len(groups)
    else:
        groups = _same_texts(users)
        sizes = [len(group) for group in groups]
    room = max(1, min(round(data.test_fraction * sum(sizes)), sum(sizes) - 1))
    tested: set[str] = set()
    for i in np.random.default_rng((data.seed, _SPLIT_STREAM)).permutation(len(groups)):
        if sizes[i] <= room:
            tested.update(groups[i])
            room -= sizes[i]
    return tested


def _same_texts(users: Sequence[Example]) -> list[list[str]]:
    """Groups users who share a preference or a question, directly or through others."""
    group_of: dict[str, list[str]] = {}
    for user in users:
        first, second = _texts(user)
        group = group_of.setdefault(first, [])
        other = group_of.setdefault(second, group)
        if other is not group:
            group += other
            for text, members in list(group_of.items()):
                if members is other:
                    group_of[text] = group
        group.append(user.user)
    return list({id(group): group for group in group_of.values()}.values())
