"""Writes experiments/fixtures: small made-up data in the schemas of the six benchmarks, for the config argument smoke.

    python experiments/make_fixtures.py

All texts are of stylebook, whose words the tiny model knows. A reader (a level, persona, user or trait) has fixed
tastes, so what a reader prefers can be learnt. The files also have what a builder must cope with: rows to leave out,
nulls, repeated rows, and shards that differ in their types. The same files result every time.
"""

import itertools
import json
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from popi_jax.data.builders import stylebook_text as text

ROOT = pathlib.Path(__file__).resolve().parent / "fixtures"
Rng = np.random.Generator
Row = dict[str, Any]
Question = tuple[str, str]  # Topic and prompt.

# By level: +1 or -1 for each of stylebook's tastes, in its order.
ELIX_LEVELS = {
    "child": "++++++", "preteen": "+++---", "teenager": "+--++-", "young adult": "-+-+-+", "expert": "------",
}  # fmt: skip
# A compound has the first three tastes of its opinion and the last three of its length.
REVIEW_LEVELS = {
    "positive": "++++--", "negative": "---+-+", "concise": "-+-+++", "verbose": "+-----",
    "positive+concise": "++++++", "positive+verbose": "+++---",
    "negative+concise": "---+++", "negative+verbose": "------",
}  # fmt: skip
# A trait per taste, in stylebook's order, named like the published files. It stands for the taste's first value.
TRAITS = (
    "desire-for-short-answers", "playfulness", "interest-in-lists", "desire-for-examples", "interest-in-metaphors",
    "desire-for-firm-claims",
)  # fmt: skip
ALL_TASTES = np.array(list(itertools.product((1, -1), repeat=text.N_TASTES)))
BREAK = 17  # The topic that both splits ask about. Those before it are for training, those after it for tests.
DIRECTIONS = 90  # Values of a "Preference Direction".
DIRECTION, DEMOGRAPHICS = "Preference Direction", "Demographic Information"
COMMENTS, PAIRS = "User-Generated Content", "Pair-wise Comparative Feedback"


def questions(topics: Sequence[str]) -> list[Question]:
    """Returns all questions about the topics."""
    return [(topic, asked.format(topic=topic)) for topic in topics for asked in text.QUESTIONS]


TRAIN_QUESTIONS, TEST_QUESTIONS = questions(text.TOPICS[: BREAK + 1]), questions(text.TOPICS[BREAK:])


def shuffled(rng: Rng, items: Sequence[Any]) -> list[Any]:
    """Returns the items in random order."""
    return [items[i] for i in rng.permutation(len(items))]


def tastes(signs: str) -> np.ndarray:
    """Returns the tastes that a string such as "+-++-+" stands for."""
    return np.array([1 if sign == "+" else -1 for sign in signs])


def some(rng: Rng, taste_6: np.ndarray, n: int) -> dict[int, int]:
    """Returns n of the tastes, drawn at random, as stylebook's texts state them."""
    return {int(i): int(taste_6[i]) for i in rng.permutation(text.N_TASTES)[:n]}


def pair(rng: Rng, taste_6: np.ndarray, topic: str) -> tuple[str, str]:
    """Draws two responses about a topic. They differ in three tastes, all of which the first one satisfies."""
    style_6, differs = rng.choice(ALL_TASTES), rng.permutation(text.N_TASTES) < 3
    chosen, rejected = (text.response(rng, topic, np.where(differs, sign * taste_6, style_6)) for sign in (1, -1))
    return chosen, rejected


def write_parquet(path: pathlib.Path, rows: Sequence[Row], types: Mapping[str, pa.DataType]) -> None:
    """Writes the columns named by `types`, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: pa.array([row[name] for row in rows], type_) for name, type_ in types.items()}
    pq.write_table(pa.table(columns), path, compression="zstd")


def write_json(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Writes a JSON list with an object on each line or, if the path ends in .jsonl, the objects alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, separators=(",", ":")) for row in rows]
    whole = "\n".join(lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]"
    path.write_text(whole + "\n", encoding="utf-8")


def level_rows(
    rng: Rng, levels: Mapping[str, str], scorer: str, asked: Sequence[Question], neither: bool = False
) -> list[Row]:
    """Draws a row per question. Responses are for the scorer's level and another one or, with `neither`, two others.

    The scorer prefers the response that satisfies more of its tastes.
    """
    rows = []
    for topic, prompt in asked:
        others = shuffled(rng, [level for level in levels if level != scorer])
        x, y = shuffled(rng, others[:2] if neither else [scorer, others[0]])
        fit_x, fit_y = (tastes(levels[level]) @ tastes(levels[scorer]) for level in (x, y))
        rows.append(
            {
                "prompt": prompt,
                "level_x": x,
                "level_y": y,
                "response_x": text.response(rng, topic, tastes(levels[x])),
                "response_y": text.response(rng, topic, tastes(levels[y])),
                "label": int(fit_x < fit_y),
                "scorer_level": scorer,
            }
        )
    return rows


def make_elix(root: pathlib.Path) -> None:
    """Writes elix: two training shards of different types, and a test split."""
    rng = np.random.default_rng(1)
    split_rows = {}
    for split, asked, size in (("train", TRAIN_QUESTIONS, 42), ("test", TEST_QUESTIONS, 16)):
        rows: list[Row] = []
        for level in ELIX_LEVELS:
            drawn = shuffled(rng, asked)
            rows += level_rows(rng, ELIX_LEVELS, level, drawn[:size])
            rows += level_rows(rng, ELIX_LEVELS, level, drawn[size : size + 3], neither=True)
        split_rows[split] = shuffled(rng, rows)
    train, test = split_rows["train"], split_rows["test"]
    usable = [row for row in train if row["scorer_level"] in (row["level_x"], row["level_y"])]
    usable[0]["response_x"] = "Done."
    usable[1]["response_y"] = " ".join(text.response(rng, "bread", taste_6) for taste_6 in rng.choice(ALL_TASTES, 145))
    usable[2]["response_x"] += " \n"
    for row in usable[3:6]:
        row["label"] = None
    usable[6]["response_y"] = usable[7]["scorer_level"] = None
    usable[8]["response_x"] = " "
    # A row that is there three times, and one that is there with either label.
    train += [dict(usable[10]), dict(usable[10]), usable[11] | {"label": 1 - usable[11]["label"]}]
    test[0]["label"] = test[1]["response_x"] = None
    ids = {level: i for i, level in enumerate(ELIX_LEVELS, start=1)}
    for i, row in enumerate([*train, *test]):
        row["scorer_level_id"], row["level_id_x"], row["level_id_y"] = (
            ids.get(row[field]) for field in ("scorer_level", "level_x", "level_y")
        )
        row |= {"model_name_x": "stylebook", "model_name_y": "stylebook", "det_choice": row["label"]}
        row["__index_level_0__"] = i
    wide = {name: pa.string() if isinstance(value, str) else pa.int64() for name, value in train[-1].items()}
    other = {pa.string(): pa.large_string(), pa.int64(): pa.int32()}
    narrow = {name: other[type_] for name, type_ in reversed(wide.items())} | {"det_choice": pa.null()}
    first, second = train[::2], [row | {"det_choice": None} for row in train[1::2]]
    write_parquet(root / "elix/train-00000-of-00002.parquet", first, wide)
    write_parquet(root / "elix/train-00001-of-00002.parquet", second, narrow)
    # With nulls in it, a column of integers often becomes one of floats.
    write_parquet(root / "elix/test-00000-of-00001.parquet", test, wide | {"label": pa.float64()})


def make_review(root: pathlib.Path) -> None:
    """Writes review: a file per split, with the four simple levels and fewer rows of the compound ones."""
    rng = np.random.default_rng(2)
    for split, asked, size in (("train", TRAIN_QUESTIONS, 40), ("test", TEST_QUESTIONS, 15)):
        rows: list[Row] = []
        for level in REVIEW_LEVELS:
            n = size // 4 if "+" in level else size
            rows += level_rows(rng, REVIEW_LEVELS, level, shuffled(rng, asked)[:n])
        types = {name: pa.int64() if name == "label" else pa.string() for name in rows[0]}
        write_parquet(root / f"review/{split}-00000-of-00001.parquet", shuffled(rng, rows), types)


def make_roleplay(root: pathlib.Path) -> None:
    """Writes roleplay: personas 0 to 7 in three training shards, 7 to 9 in the test split."""
    rng = np.random.default_rng(3)
    personas = []
    for i, taste_6 in enumerate(rng.permutation(ALL_TASTES)[:10]):
        struct = {
            "persona_description": text.summary(some(rng, taste_6, 6)),
            "name": f"Reader {i}" if i % 3 else None,
            "background": text.profile(rng, some(rng, taste_6, 3)),
        }
        personas.append((str(uuid.uuid5(uuid.NAMESPACE_URL, f"popi_jax/roleplay/{i}")), taste_6, struct))

    def draw(numbers: Sequence[int], asked: Sequence[Question], size: int) -> list[Row]:
        rows = []
        for level, taste_6, struct in (personas[i] for i in numbers):
            for topic, prompt in shuffled(rng, asked)[:size]:
                chosen, rejected = pair(rng, taste_6, topic)
                rows.append({"x": prompt, "yw": chosen, "yl": rejected, "level": level, "score_persona": dict(struct)})
        return shuffled(rng, rows)

    types = dict.fromkeys(("x", "yw", "yl", "level"), pa.string())
    types["score_persona"] = pa.struct([(name, pa.string()) for name in personas[0][2]])
    train = draw(range(8), TRAIN_QUESTIONS, 34)
    train[0]["score_persona"] = train[1]["score_persona"]["persona_description"] = train[2]["yl"] = None
    for i in range(3):
        write_parquet(root / f"roleplay/train-0000{i}-of-00003.parquet", train[i::3], types)
    validation = draw([0], TRAIN_QUESTIONS, 10)
    write_parquet(root / "roleplay/validation-00000-of-00001.parquet", validation, types)
    test = draw(range(7, 10), TEST_QUESTIONS, 28)
    write_parquet(root / "roleplay/test-00000-of-00001.parquet", test, types)


def alignx_row(rng: Rng, taste_6: np.ndarray, asked: Sequence[Question], comments: int, pairs: int) -> Row:
    """Draws a user of AlignX with histories of these lengths."""
    direction = {DIRECTION: [*((1 + taste_6) / 2).tolist(), *[0.5] * (DIRECTIONS - text.N_TASTES)]}
    drawn = iter(shuffled(rng, asked))

    def triple() -> Row:
        topic, prompt = next(drawn)
        return (
            {"prompt": prompt} | dict(zip(("chosen", "rejected"), pair(rng, taste_6, topic), strict=True)) | direction
        )

    def comment() -> Row:
        return {"prompt": next(drawn)[1], "comment": text.comment(rng, some(rng, taste_6, 3))} | direction

    return triple() | {
        DEMOGRAPHICS: text.profile(rng, some(rng, taste_6, 6)),
        COMMENTS: [comment() for _ in range(comments)],
        PAIRS: [triple() for _ in range(pairs)],
    }


def make_alignx(root: pathlib.Path) -> None:
    """Writes alignx, two shards whose structs have different orders, and alignx_test, four files of the same users."""
    rng = np.random.default_rng(4)
    everyone = rng.permutation(np.concatenate([ALL_TASTES, ALL_TASTES]))
    # Histories of 0 to 6 entries. Some that are empty are null.
    train = [alignx_row(rng, everyone[i], TRAIN_QUESTIONS, i % 7, i // 2 % 7) for i in range(56)]
    train[1][DEMOGRAPHICS], train[3][DEMOGRAPHICS] = None, " "
    train[7][COMMENTS] = train[14][PAIRS] = None
    train[11][COMMENTS][0]["comment"] = train[12]["rejected"] = None
    train[13]["rejected"] = train[13]["chosen"]
    train[18][PAIRS][0] = None
    train[20][COMMENTS][1] = dict(train[20][COMMENTS][0])
    train[4][COMMENTS][2]["prompt"] = train[4]["prompt"]
    train.append(dict(train[5]))

    directions = pa.list_(pa.float64())
    entry = {"prompt": pa.string(), "comment": pa.string(), DIRECTION: directions}
    compared = {"prompt": pa.string(), "chosen": pa.string(), "rejected": pa.string(), DIRECTION: directions}
    types: dict[str, pa.DataType] = {**compared, DEMOGRAPHICS: pa.string()}
    for shard in range(2):
        fields = [list(part.items())[:: -1 if shard else 1] for part in (entry, compared)]
        histories = {name: pa.list_(pa.struct(part)) for name, part in zip((COMMENTS, PAIRS), fields, strict=True)}
        write_parquet(root / f"alignx/train-0000{shard}-of-00002.parquet", train[shard::2], types | histories)

    variants: dict[str, list[Row]] = {"DEMO": [], "UGC": [], "PAIR": [], "arbitrary": []}
    for i in range(24):
        row = alignx_row(rng, everyone[64 + i], TEST_QUESTIONS, 2, 3)
        for variant, field in (("DEMO", DEMOGRAPHICS), ("UGC", COMMENTS), ("PAIR", PAIRS)):
            variants[variant].append({name: row[name] for name in (*compared, field)})
        # The profile is made from the demographics, even where they are hidden: a leak of the published file.
        shown = {"profile": row[DEMOGRAPHICS], DEMOGRAPHICS: None if i % 2 else row[DEMOGRAPHICS]}
        shown |= {COMMENTS: row[COMMENTS][: i % 3], PAIRS: row[PAIRS][: i // 3 % 4]}
        variants["arbitrary"].append({name: row[name] for name in compared} | shown)
    for variant, rows in variants.items():
        write_json(root / f"alignx_test/Reddit_{variant}.json", rows)


def make_prefeval(root: pathlib.Path) -> None:
    """Writes prefeval: three topics of 12 users. Only topics_a#0 and topics_b#5 have the same tastes."""
    rng = np.random.default_rng(5)
    everyone = rng.permutation(ALL_TASTES)[:36]
    everyone[12 + 5] = everyone[0]
    for number, topic in enumerate(("topics_a", "topics_b", "topics_c")):
        asked = shuffled(rng, questions(text.TOPICS[number::3]))
        users = [
            prefeval_user(rng, taste_6, asked[2 * i : 2 * i + 2], 4 + i % 3)
            for i, taste_6 in enumerate(everyone[12 * number : 12 * number + 12])
        ]
        for folder in users[0]:
            write_json(root / f"prefeval/{folder}/{topic}.json", [user[folder] for user in users])
    write_json(root / "prefeval/mcq_options/topics_c copy.json", [user["mcq_options"] for user in users[:2]])


def prefeval_user(rng: Rng, taste_6: np.ndarray, asked: Sequence[Question], turns: int) -> dict[str, Row]:
    """Draws a user's row in the files of each folder."""
    (topic, question), (other_topic, query) = asked
    known = {
        "preference": text.summary(some(rng, taste_6, 6)),
        "question": question,
        "explanation": text.profile(rng, some(rng, taste_6, 3)),
    }
    options = prefeval_options(rng, taste_6, other_topic)
    choice = {
        "query": query,
        "assistant_options": "\n".join(options),
        "user_selection": text.comment(rng, some(rng, taste_6, 2)),
        "assistant_acknowledgment": "Of course.",
    }
    dialogue = {
        str(turn): {
            "user": text.comment(rng, some(rng, taste_6, 1)),
            "assistant": text.response(rng, other_topic, rng.choice(ALL_TASTES)),
        }
        for turn in range(turns)
    }
    chosen = {"implicit_query": query, "options": options, "conversation": choice, "aligned_op": options[0]}
    talked = {"persona": text.profile(rng, some(rng, taste_6, 2)), "conversation": dialogue}
    return {
        "explicit_preference": known,
        "mcq_options": known | {"classification_task_options": prefeval_options(rng, taste_6, topic)},
        "implicit_preference/choice-based": known | chosen,
        "implicit_preference/persona-driven": known | talked,
    }


def prefeval_options(rng: Rng, taste_6: np.ndarray, topic: str) -> list[str]:
    """Draws four responses. The first one satisfies all tastes, the others two to four of them."""
    others = [np.where(rng.permutation(text.N_TASTES) < 2 + i, -taste_6, taste_6) for i in range(3)]
    return [text.response(rng, topic, style_6) for style_6 in (taste_6, *shuffled(rng, others))]


def make_traits(root: pathlib.Path) -> None:
    """Writes traits: 60 statements of each, half of which fit the trait. Two traits have their last one in common."""
    rng = np.random.default_rng(6)
    shared = text.response(rng, "tea", tastes("++++++"))
    for taste, trait in enumerate(TRAITS):
        rows = []
        for i in range(60):
            style_6 = rng.choice((1, 1, 1, -1), text.N_TASTES)
            style_6[taste] = 1 if i % 2 else -1
            topic = text.TOPICS[(i + taste) % len(text.TOPICS)]
            statement = shared if i == 59 and taste < 2 else text.response(rng, topic, style_6)
            answers = (" Yes", " No") if i % 2 else (" No", " Yes")
            confidence = rng.uniform(0.5, 0.79) if i % 15 == 0 else rng.uniform(0.8, 1)
            rows.append(
                {
                    "question": f"Would you say this?\n{statement}",
                    "statement": statement,
                    "label_confidence": round(float(confidence), 3),
                    "answer_matching_behavior": answers[0],
                    "answer_not_matching_behavior": answers[1],
                }
            )
        write_json(root / f"traits/{trait}.jsonl", rows)


def main(root: pathlib.Path = ROOT) -> None:
    """Writes the files of all benchmarks below a folder."""
    for make in (make_elix, make_review, make_roleplay, make_alignx, make_prefeval, make_traits):
        make(root)


if __name__ == "__main__":
    main()
