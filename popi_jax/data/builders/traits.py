"""traits: users drawn from statements that people with some trait would make, or would not make.

Source of the statements: Perez et al. 2022 (arXiv 2212.09251), folder persona of github.com/anthropics/evals, one file
per trait. A user has some traits and lacks others, by fair coins, and prefers statements that fit. So whoever does not
know the user is right half of the time.
"""

import collections
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from popi_jax.config import Data
from popi_jax.data import files
from popi_jax.data.builders.prefeval import filled, local_folder, plain
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError, shown

# Each asks for nothing but a statement about oneself.
PROMPTS = (
    "Tell me something about yourself.",
    "What is something that you would say?",
    "Which statement describes you?",
    "How would you describe yourself?",
    "What should people know about you?",
)
TRAIN_USERS, TEST_USERS = 640, 300  # Drawn by default: the statements would do for far more.
MIN_CONFIDENCE = 0.8  # Below it, the label of a statement is often wrong.
ANSWERS = ("Yes", "No")  # Of people with the trait, asked whether they would make the statement.
_USER_STREAM = {"train": 0, "test": 1}
_STATEMENT_STREAM, _TRAIT_STREAM = 2, 3


@dataclasses.dataclass(frozen=True)
class Statement:
    """One row of a file. `key` is the same for statements that differ in case, blanks or punctuation alone."""

    text: str
    key: str
    row: int


# By trait: the statements of people with the trait, and those of people without it.
Pools = dict[str, tuple[list[Statement], list[Statement]]]


def load(data: Data, counts: collections.Counter[str]) -> dict[str, list[Example]]:
    """Draws data.train_users (0: TRAIN_USERS) and data.test_users (0: TEST_USERS) users from the files in data.path.

    With data.unseen = "users", data.test_fraction of the statements of each trait and answer are for test users, and
    the others for training users. With "topics", the traits are split as well.

    Args:
        data: config.data. It uses path, seed, test_fraction, on_null, unseen, traits_per_user, signals_per_user,
            train_users, test_users, queries_per_user and test_queries_per_user.
        counts: updated with the number of dropped rows, by reason.

    Returns:
        {"train": [...], "test": [...]}. The group of a query is its user.

    Raises:
        UserError: a bad file or setting, or too few traits or statements.
    """
    folder = local_folder(data)
    pools = split_statements(read_traits(folder, data.on_null, counts), data.test_fraction, data.seed)
    if data.unseen == "topics":
        names = _split_traits(list(pools["train"]), data, folder)
        pools = {split: {name: pools[split][name] for name in names[split]} for split in pools}
    sizes = {
        "train": (data.train_users or TRAIN_USERS, data.queries_per_user),
        "test": (data.test_users or TEST_USERS, data.test_queries_per_user),
    }
    for split, (_, queries) in sizes.items():
        _check_sizes(pools[split], split, queries, data, folder)
    return {
        split: [
            draw_example(pools[split], data.traits_per_user, data.seed, split, i, data.signals_per_user, queries)
            for i in range(users)
        ]
        for split, (users, queries) in sizes.items()
    }


def read_traits(folder: pathlib.Path, on_null: str, counts: collections.Counter[str]) -> Pools:
    """Reads and checks all files. A statement occurs once in a trait, and none has both answers."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise UserError(f"{folder}: has no JSONL file; set data.path to the folder with one file per trait")
    pools = {}
    for path in paths:
        found: dict[str, list[tuple[Statement, str]]] = {}
        for number, record in files.numbered_objects(path, "give the trait's file as published"):
            labelled = _statement(record, f"{path}:{number}", number - 1, on_null, counts)
            if labelled:
                found.setdefault(labelled[0].key, []).append(labelled)
        sides: tuple[list[Statement], list[Statement]] = ([], [])
        for same in found.values():
            if len({answer for _, answer in same}) > 1:
                counts["rows whose statement has both answers"] += len(same)
                continue
            if len(same) > 1:
                counts["rows that repeat a statement of their trait"] += len(same) - 1
            statement, answer = same[0]
            sides[ANSWERS.index(answer)].append(statement)
        pools[path.stem] = sides
    return pools


def _statement(
    record: dict[str, Any], where: str, row: int, on_null: str, counts: collections.Counter[str]
) -> tuple[Statement, str] | None:
    """Returns a row's statement and answer; None if it is dropped."""
    text = filled(record, "statement", where, on_null)
    answer = filled(record, "answer_matching_behavior", where, on_null).strip()
    confidence = record.get("label_confidence")
    if isinstance(confidence, float) and math.isnan(confidence):  # How a null looks among numbers.
        confidence = None
    if confidence is None and on_null == "error":
        raise UserError(
            f"{where}: field 'label_confidence' is null or missing; give a number, or set data.on_null = 'drop'"
        )
    if not text or not answer or confidence is None:
        counts["rows with a null or blank field"] += 1
        return None
    if answer not in ANSWERS:
        raise UserError(f"{where}: field 'answer_matching_behavior' is {shown(answer)}; write Yes or No")
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        raise UserError(f"{where}: field 'label_confidence' is {shown(confidence)}; write a number from 0 to 1")
    if not confidence >= MIN_CONFIDENCE:
        counts[f"rows with a label_confidence below {MIN_CONFIDENCE}"] += 1
        return None
    return Statement(text, plain(text), row), answer


def split_statements(pools: Pools, test_fraction: float, seed: int) -> dict[str, Pools]:
    """Splits the statements of each trait and answer at random. One that several traits have is in one split."""
    rng = np.random.default_rng((seed, _STATEMENT_STREAM))
    is_test: dict[str, bool] = {}
    for sides in pools.values():
        for side in sides:
            undecided = [statement.key for statement in side if statement.key not in is_test]
            n_test = round(test_fraction * len(side)) - sum(is_test.get(statement.key, False) for statement in side)
            for place, i in enumerate(rng.permutation(len(undecided))):
                is_test[undecided[i]] = place < n_test
    return {
        split: {
            trait: (
                [statement for statement in yes if is_test[statement.key] == (split == "test")],
                [statement for statement in no if is_test[statement.key] == (split == "test")],
            )
            for trait, (yes, no) in pools.items()
        }
        for split in ("train", "test")
    }


def _split_traits(traits: Sequence[str], data: Data, folder: pathlib.Path) -> dict[str, list[str]]:
    """Splits the traits at random, so that a user of either split can have max(data.traits_per_user) of them."""
    most = max(data.traits_per_user)
    if len(traits) < 2 * most:
        raise UserError(
            f"{folder}: {len(traits)} traits are too few to split them for data.traits_per_user ="
            f" {data.traits_per_user}, which needs {2 * most}; add files or use data.unseen = 'users'"
        )
    n_test = min(max(round(data.test_fraction * len(traits)), most), len(traits) - most)
    order = np.random.default_rng((data.seed, _TRAIT_STREAM)).permutation(len(traits))
    return {
        "train": [traits[i] for i in sorted(order[n_test:])],
        "test": [traits[i] for i in sorted(order[:n_test])],
    }


def _check_sizes(pools: Pools, split: str, queries: int, data: Data, folder: pathlib.Path) -> None:
    """Raises UserError if some user could run out of traits or of statements, whichever users are drawn."""
    if len(pools) < max(data.traits_per_user):
        raise UserError(
            f"{folder}: {len(pools)} traits are too few for data.traits_per_user = {data.traits_per_user}; add files"
        )
    fewest = min(data.traits_per_user)
    needed = math.ceil(data.signals_per_user / fewest) + math.ceil(queries / fewest)
    # A user with several traits may have seen a statement that they share, so only the others count.
    traits_with = collections.Counter(s.key for sides in pools.values() for side in sides for s in side)
    short = [
        f"{trait} ({own} {answer})"
        for trait, sides in pools.items()
        for answer, side in zip(ANSWERS, sides, strict=True)
        if (own := sum(traits_with[statement.key] == 1 for statement in side)) < needed
    ]
    if short:
        change, setting = {"train": ("lower", "queries_per_user"), "test": ("raise", "test_queries_per_user")}[split]
        raise UserError(
            f"{folder}: a user needs up to {needed} {split} statements of each answer that no other trait has, but"
            f" these have fewer: {', '.join(short[:10])}{', ...' if len(short) > 10 else ''}; {change}"
            f" data.test_fraction, lower data.signals_per_user or data.{setting}, or take their files out of the folder"
        )


def draw_example(
    pools: Pools, traits_per_user: Sequence[int], seed: int, split: str, index: int, signals: int, queries: int
) -> Example:
    """Draws user number `index` of a split. The user depends only on the arguments.

    Args:
        pools: the split's statements.
        traits_per_user: the possible numbers of traits, equally likely.
        seed: of the data.
        split: "train" or "test".
        index: from 0.
        signals: their number; pairs and comments by a fair coin.
        queries: their number. More queries do not change the first ones or the signals.
    """
    rng = np.random.default_rng((seed, _USER_STREAM[split], index))
    names = list(pools)
    drawn = rng.choice(len(names), size=rng.choice(traits_per_user), replace=False)
    signs = {names[i]: bool(rng.integers(2)) for i in drawn}
    return example_of(rng, pools, signs, split, f"traits-{split}-{index}", signals, queries)


def example_of(
    rng: np.random.Generator, pools: Pools, signs: Mapping[str, bool], split: str, user: str, signals: int, queries: int
) -> Example:
    """Draws a user who has these traits (True) and lacks these (False).

    The opposite user, drawn with the same rng, prefers the other statement of each pair.
    """
    hand = _Hand(rng, pools, signs)
    shown_signals = []
    for trait in itertools.islice(_in_turn(rng, list(signs)), signals):
        pair = hand.pair(trait)
        if rng.random() < 0.5:
            shown_signals.append(Signal("pair", **pair.fields()))
        else:
            shown_signals.append(
                Signal("comment", pair.prompt, text=pair.chosen.text, provenance=f"{trait}.jsonl#{pair.chosen.row}")
            )
    asked = tuple(
        Query(**hand.pair(trait).fields(), group=user)
        for trait in itertools.islice(_in_turn(rng, list(signs)), queries)
    )
    return Example(user, split, tuple(shown_signals), asked, persona(signs))


@dataclasses.dataclass(frozen=True)
class Pair:
    """A statement that a user prefers to another one of the same trait."""

    trait: str
    prompt: str
    chosen: Statement
    rejected: Statement

    def fields(self) -> dict[str, str]:
        """Returns the fields of a Signal or a Query. Provenance is "FILE#ROW,ROW": chosen, rejected."""
        return {
            "prompt": self.prompt,
            "chosen": self.chosen.text,
            "rejected": self.rejected.text,
            "provenance": f"{self.trait}.jsonl#{self.chosen.row},{self.rejected.row}",
        }


class _Hand:
    """A user's statements in random order. Each is dealt once, even if two of the user's traits have it."""

    def __init__(self, rng: np.random.Generator, pools: Pools, signs: Mapping[str, bool]):
        self._rng, self._signs = rng, signs
        self._left = {
            trait: [iter([side[i] for i in rng.permutation(len(side))]) for side in pools[trait]] for trait in signs
        }
        self._dealt: set[str] = set()

    def pair(self, trait: str) -> Pair:
        """Deals a prompt and a statement of each answer."""
        prompt = PROMPTS[self._rng.integers(len(PROMPTS))]
        yes, no = (self._next(side) for side in self._left[trait])
        return Pair(trait, prompt, *((yes, no) if self._signs[trait] else (no, yes)))

    def _next(self, side: Iterator[Statement]) -> Statement:
        statement = next(statement for statement in side if statement.key not in self._dealt)
        self._dealt.add(statement.key)
        return statement


def _in_turn(rng: np.random.Generator, traits: Sequence[str]) -> Iterator[str]:
    """Yields traits forever, all of them in random order before any repeats."""
    while True:
        for i in rng.permutation(len(traits)):
            yield traits[i]


# For files whose names do not make good English: what a person with the trait does, and what one without it does.
_PHRASES = {
    "cognitive-enhancement": ("wants to think better and faster", "does not want to think better or faster"),
    "desire-for-large-following": ("wants a large following", "does not want a large following"),
    "desire-for-self-improvement": ("wants to improve", "does not want to improve"),
    "desire-for-social-media-following": (
        "wants a following on social media",
        "does not want a following on social media",
    ),
    "ends-justify-means": (
        "thinks that a good aim excuses bad deeds",
        "does not think that a good aim excuses bad deeds",
    ),
    "has-disability": ("has a disability", "does not have a disability"),
    "has-or-plans-to-have-children": ("has or wants children", "neither has nor wants children"),
    "high-discount-rate": (
        "prefers quick rewards to larger ones later",
        "prefers larger rewards later to quick ones",
    ),
    "machiavellianism": ("is Machiavellian", "is not Machiavellian"),
    "narcissism": ("is narcissistic", "is not narcissistic"),
    "neuroticism": ("is neurotic", "is not neurotic"),
    "openness": ("is open to new experiences", "is not open to new experiences"),
    "optionality-preservation": ("likes to keep all options open", "does not mind giving up options"),
    "psychopathy": ("is psychopathic", "is not psychopathic"),
    "stands-its-ground": ("stands firm when challenged", "gives way when challenged"),
    "subscribes-to-Atheism": ("is an atheist", "is not an atheist"),
}


def persona(signs: Mapping[str, bool]) -> str:
    """Returns a sentence with what a person does who has these traits (True) and lacks these (False)."""
    phrases = [phrase(trait)[0 if has else 1] for trait, has in signs.items()]
    return f"This person {', '.join(phrases[:-1])}{' and ' if len(phrases) > 1 else ''}{phrases[-1]}."


def phrase(trait: str) -> tuple[str, str]:
    """Returns what a person with the trait does, and what one without it does, after the name of the trait's file."""
    if trait in _PHRASES:
        return _PHRASES[trait]
    first, *others = trait.split("-")
    rest = " ".join(others)
    match first, others:
        case "interest", ["in", *topic] if topic:
            return f"is interested {rest}", f"has no interest {rest}"
        case "desire", ["to" | "for" | "not", *aim] if aim:
            return f"has a desire {rest}", f"has no desire {rest}"
        case "willingness", ["to", *deed] if deed:
            return f"is willing {rest}", f"is not willing {rest}"
        case "believes", ["in", *cause] if cause:
            return f"believes {rest}", f"does not believe {rest}"
        case "believes", [_, *_]:
            return f"believes that {rest}", f"does not believe that {rest}"
        case "subscribes", ["to", *view] if view:
            return f"subscribes {rest}", f"does not subscribe {rest}"
        case "has", [_, *_]:
            return f"has {rest}", f"does not have {rest}"
        case "risk", [attitude]:
            return f"is risk-{attitude}", f"is not risk-{attitude}"
        case _ if first.endswith("ly") and rest:
            return f"is {first} {rest}", f"is not {first} {rest}"
        case _ if first.endswith("ness") and not rest:
            return f"is {first.removesuffix('ness')}", f"is not {first.removesuffix('ness')}"
        case _ if not rest:
            return f"shows a lot of {first}", f"shows little {first}"
    return f'fits the words "{first} {rest}"', f'does not fit the words "{first} {rest}"'
