"""What is said of summaries as texts equals counts made by hand; their own pairs are scored as queries are."""

import json
import random
import types

import numpy as np
import pytest

from popi_jax.config import changed, parse
from popi_jax.configs import base
from popi_jax.data import layouts
from popi_jax.data.encoding import Encoder
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError
from popi_jax.evaluation import evaluate, faithfulness, final, report, stored, summaries, summaries_table
from popi_jax.rollout.references import References
from tests.test_encoding import WordTokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" -- ", []),
        ("Likes short, dry answers.", ["Likes", "short", "dry", "answers"]),
        ("don't re-read C++17/snake_case", ["don", "t", "re", "read", "C", "17", "snake_case"]),
        ("mag Öl–Äpfel", ["mag", "Öl", "Äpfel"]),
        ("cafe\u0301 ﬁne １２", ["café", "fine", "12"]),  # NFKC composes, and replaces ligatures and wide digits.
        ("हिन्दी में", ["हिन्दी", "में"]),  # Vowel signs are marks, no letters.
        ("❤️ yes \u0301no", ["yes", "no"]),  # A mark without a letter is no word.
        ("简短 的 回答。", ["简短", "的", "回答"]),
    ],
)
def test_words(text, expected):
    assert summaries.words(text) == expected


def test_length_is_the_mean_and_the_quantiles_of_the_words():
    texts_UxK = [["", "a"], ["a b, a b!", "- a b c d e"]]  # 0, 1, 4 and 5 words.
    # Linear between the sorted values: 5% of the way over three gaps is 0.15 of the first one.
    expected = {"mean": 2.5, "q05": 0.15, "q50": 2.5, "q95": 4.85}
    assert summaries.length(texts_UxK) == pytest.approx(expected)


def test_texts_are_different_unless_they_are_equal():
    assert summaries.distinct([["a", "a", "A"], ["a", "b", "c"]]) == {"summaries": 6, "distinct": 4, "per_user": 2.5}
    assert summaries.distinct([[""], [""]]) == {"summaries": 2, "distinct": 1, "per_user": 1.0}


SIGNALS = (
    Signal(
        "pair", "Which tea?", chosen="In June I drank 2.5 litres of green tea in Kyoto.", rejected="None, 17 times."
    ),
    Signal("comment", "Which tea?", text="Please be brief and to the point, and use no lists or tables at all: Ever."),
    Signal("profile", text="Größe: 1,80 m"),
)


@pytest.mark.parametrize(
    ("summary", "run"),
    [
        ("", 0),
        ("Wants humour.", 0),
        ("Likes TEA.", 1),
        ("green tea... in KYOTO", 4),
        ("tea green tea green", 2),
        ("in Kyoto None", 2),  # A run ends with its field,
        ("which tea please", 2),  # and with its signal.
        ("2.5 litres; Which tea?", 3),
        ("Be brief and to the point, and use what", 8),
        ("be brief and to the point and then: brief and to the point and use no", 8),
        ("GRÖSSE 1,80", 3),
    ],
)
def test_longest_run_of_the_signals_words(summary, run):
    found = summaries.leakage([[summary]], [SIGNALS], "")
    assert (found["run_mean"], found["run_max"], found["long_run_share"]) == (run, run, float(run >= 8))


def test_longest_runs_agree_with_a_search_of_every_run():
    rng = random.Random(0)

    def draw(most: int) -> list[list[str]]:
        return [[rng.choice("abcd") for _ in range(rng.randrange(20))] for _ in range(rng.randrange(1, most))]

    def stands_in(run: list[str], field: list[str]) -> bool:
        return any(field[i : i + len(run)] == run for i in range(len(field)))

    for _ in range(100):
        own, fields = draw(4), draw(5)
        expected = [
            max(
                (
                    j - i
                    for i in range(len(s))
                    for j in range(i, len(s) + 1)
                    if any(stands_in(s[i:j], f) for f in fields)
                ),
                default=0,
            )
            for s in own
        ]
        assert summaries.longest_runs(own, fields) == expected
    assert summaries.longest_runs([["a"], []], []) == [0, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", set()),
        ("Drinks 2.5 litres, 1,80 m, １７ times.", {"2.5", "1,80", "17"}),
        ("GPT4, 3. and 5..6", {"4", "3", "5", "6"}),
    ],
)
def test_numbers(text, expected):
    assert summaries.numbers(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", set()),
        ("Likes Kyoto and I am NASA's fan", {"Kyoto", "NASA"}),  # I is one letter.
        ("Tea. Then: More! What? Yes\nLists in Äthiopien", {"Äthiopien"}),
        ('She says "No", (Never), - Always', {"No", "Never", "Always"}),
        ("简短。Kyoto, 简短 Kyoto", {"Kyoto"}),
    ],
)
def test_names_stand_within_a_sentence(text, expected):
    assert summaries.names(text) == expected


@pytest.mark.parametrize(
    ("summary", "number", "name"),
    [
        ("", 0, 0),
        ("Drinks 2.5 litres.", 1, 0),
        ("Drinks 2 of 5, 1 in 80.", 0, 0),
        ("Was in Kyoto.", 0, 1),
        ("Kyoto. June: Never.", 0, 0),  # Each begins a sentence.
        ("Was in Rome.", 0, 0),
        ("Was in KYOTO.", 0, 0),  # Other capitals than in the signals.
        ("The User drank Please.", 0, 1),
        ("Wants Which and None.", 0, 0),  # Both are in the instruction.
        ("17 in June", 1, 1),
    ],
)
def test_copied_numbers_and_names(summary, number, name):
    found = summaries.leakage([[summary]], [SIGNALS], "Say WHICH answers this user likes, or none")
    assert (found["number_share"], found["name_share"]) == (number, name)


def test_leakage_is_of_the_users_own_signals_and_averaged_over_all_summaries():
    other = (Signal("profile", text="Lives in Rome with 3 cats"),)
    texts_UxK = [["Of Kyoto with 3 cats", "green tea"], ["Of Kyoto with 3 cats", "was in Rome with 3 cats"]]
    assert summaries.leakage(texts_UxK, [SIGNALS, other], "") == {
        "run_mean": (1 + 2 + 3 + 5) / 4,
        "run_max": 5,
        "long_run_share": 0.0,
        "number_share": 0.5,
        "name_share": 0.5,
    }
    assert summaries.leakage([["Of 3 Cats"]], [()], "")["run_max"] == 0  # A user without signals.


def test_stability_compares_the_summaries_of_a_user():
    texts_UxK = [["a b", "B, c! b", ""], ["", "", ""]]
    # {a, b} and {b, c} share one of three words; an empty set shares none with them, and all with an empty one.
    h_RxK = np.array([[1.0, 0.1, 2.0], [1.0, 0.0, 2.0], [-1.0, 0.0, -3.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0]])
    found = summaries.stability(texts_UxK, h_RxK)
    assert found == pytest.approx({"jaccard": (1 / 9 + 1) / 2, "agreement": 3 / 5})
    assert summaries.stability([["a"], ["b"]], np.ones((2, 1))) == {"jaccard": None, "agreement": None}


class CountingScorer:
    """Log pi(y|x, z): for each word of y, as often as the context has it, and a tenth without a context.

    The reference counts half of that.
    """

    def __init__(self) -> None:
        self.scored = 0

    def logps(self, theta, items, **_):
        self.scored += len(items)
        weight = 0.5 if theta is None else 1.0
        return np.array([[weight * self.logp(y, item.told) for y in self.responses(item)] for item in items])

    @staticmethod
    def responses(item):
        return item.query.chosen, item.query.rejected

    @staticmethod
    def logp(response, told):
        return sum(0.1 if told is None else told.text.split().count(word) for word in response.split())


def scored_with(reference, folder, more=(), **limits):
    """An evaluator of the fake scorer."""
    config = parse(base.get_config())
    fits = {"signals": 200, "prompt": 200, "response": 6, "summary": 8} | limits
    values = {"eval.bootstrap": 200, "objective.reference_context": reference} | dict(more)
    config = changed(config, values | {f"limits.{name}": value for name, value in fits.items()})
    scorer = CountingScorer()
    sampler = types.SimpleNamespace(encoder=Encoder(WordTokenizer(), config.prompts, config.limits))
    references = References(scorer, folder, "fake")
    return types.SimpleNamespace(config=config, sampler=sampler, scorer=scorer, references=references)


def user(name, *signals, person=""):
    return Example(name, "test", signals, (Query("why", "yes", "no"),), person=person)


def pair(chosen, rejected):
    return Signal("pair", "which", chosen=chosen, rejected=rejected)


USERS = [
    user("u0", pair("tea", "coffee milk"), pair("a b", "b a"), Signal("profile", text="tea tea")),
    user("u1", Signal("profile", text="tea")),  # Without pairs.
    user("u2", pair("coffee", "tea"), pair("same words", "same  words"), pair("one two three four five six", "tea")),
]
TEXTS = [["tea", "coffee"], ["tea", "tea"], ["tea coffee coffee", ""]]
# h of each pair under both summaries: log pi minus log pi_ref of y+, minus that of y-.
# u0, tea over coffee and milk: the generator gives +1 and -1; without context the reference gives 0.05 - 0.1.
# u0, the other pair has the same words on both sides: a tie. u2, coffee over tea: +1 and 0; the reference has a tie.
H = {
    "prompt": [[1.05, -0.95], [0, 0], [1, 0]],
    "summary": [[0.5, -0.5], [0, 0], [0.5, 0]],
    # The raw signals of u0 name tea three times, coffee and milk once each: half of 3 - 2. Those of u2 name tea twice.
    "signals": [[0.5, -1.5], [0, 0], [1.5, 0.5]],
}


@pytest.mark.parametrize("reference", H)
def test_own_pairs_are_scored_as_queries(reference, tmp_path):
    own = scored_with(reference, tmp_path)
    correct = [np.mean([h > 0 for h in h_K]) for h_K in H[reference]]
    found = faithfulness.measure(own, object(), USERS, TEXTS)
    assert found["accuracy"] == pytest.approx(np.mean(correct))
    assert (found["users"], found["signals"], found["skipped"]) == (2, 3, 2)  # Equal as tokens; seven tokens.
    # Of the draws of two users, those of one user twice are the extremes.
    means = sorted([np.mean(correct[:2]), correct[2]])
    assert found["accuracy_ci95"] == pytest.approx(means)


def test_the_users_of_one_person_are_resampled_together(tmp_path):
    users = [user(f"u{i}", pair("tea", "coffee"), person="p") for i in range(2)]
    found = faithfulness.measure(scored_with("prompt", tmp_path), object(), users, [["tea"], ["coffee"]])
    assert found["accuracy"] == 0.5 and found["users"] == 2 and np.isnan(found["accuracy_ci95"]).all()


def test_no_pairs_and_none_that_fit(tmp_path):
    assert faithfulness.measure(scored_with("prompt", tmp_path), object(), USERS[1:2], TEXTS[1:2]) is None
    own = scored_with("prompt", tmp_path, response=1)  # Only the end token fits.
    found = faithfulness.measure(own, object(), USERS, TEXTS)
    assert (found["users"], found["signals"], found["skipped"]) == (0, 0, 5)
    assert np.isnan([found["accuracy"], *found["accuracy_ci95"]]).all() and own.scorer.scored == 0


def test_a_pair_is_skipped_if_it_exceeds_the_prompt_beside_the_signals_that_the_reference_reads(tmp_path):
    # "why" is one word. The pair's prompt has five, which fit alone and with a summary.
    long = Signal("pair", "which of the two then", chosen="tea", rejected="coffee")
    own = scored_with("prompt", tmp_path)
    example = user("u0", *[Signal("profile", text=f"fact {i} is so") for i in range(6)], long)
    tokens = len(own.sampler.encoder.prompt("why", own.sampler.encoder.raw_signals(example)))
    for reference, more, skipped in (("prompt", 3, 0), ("signals", 3, 1), ("signals", 4, 0)):
        own = scored_with(reference, tmp_path, prompt=tokens + more)
        assert faithfulness.measure(own, object(), [example], [["tea"]])["skipped"] == skipped, (reference, more)


@pytest.mark.parametrize("direct", ["{prompt}", "one two three four five six " * 9 + "{prompt}"])
def test_a_pair_is_skipped_if_it_exceeds_the_prompt_alone_or_with_the_longest_summary(direct, tmp_path):
    layout = layouts.PLAIN.model_dump() | {"direct": {"system": "", "user": direct}}
    (tmp_path / "layout.json").write_text(json.dumps(layout))
    named = {"prompts.layout": str(tmp_path / "layout.json")}
    encoder = scored_with("prompt", tmp_path, named).sampler.encoder
    alone, with_summary = len(encoder.prompt("which", None)), len(encoder.prompt("which", Told(""))) + 8
    assert (alone > with_summary) == (len(direct) > 10)
    for less, skipped in ((0, 0), (1, 1)):
        own = scored_with("prompt", tmp_path, named, prompt=max(alone, with_summary) - less)
        example = user("u0", pair("tea", "coffee"))
        assert faithfulness.measure(own, object(), [example], [["tea"]])["skipped"] == skipped


def test_only_the_first_users_with_pairs_are_scored(monkeypatch, tmp_path):
    monkeypatch.setattr(faithfulness, "USERS", 1)
    own = scored_with("summary", tmp_path)
    assert faithfulness.measure(own, object(), USERS[1:], TEXTS[1:])["users"] == 1
    assert own.scorer.scored == 2 + 2  # One pair under two summaries, and the reference of each.
    assert faithfulness.measure(own, object(), USERS, TEXTS)["signals"] == 2


def record(example, row, context, h):
    return evaluate.Record(row, example.user, "g", "", "f", context, 1, True, 9, h, h)


def test_the_records_of_a_user_give_its_summaries(tmp_path):
    """Two queries of the first user, one of the other, three summaries each."""
    own = scored_with("prompt", tmp_path)
    own.config = changed(own.config, {"prompts.summary_start": "It likes Kyoto"})
    texts = [("a Kyoto", "b", "b"), ("c", "c", None)]
    rows = [(0, 0, (1, 1, 1)), (1, 0, (1, -1, 1)), (2, 1, (-1, -1, -1))]
    test = [user("u0", Signal("profile", text="Kyoto b")), user("u1", Signal("profile", text="c c"))]
    records = [
        record(test[u], row, text, float(h)) for row, u, h_K in rows for text, h in zip(texts[u], h_K, strict=True)
    ]
    found = final.describe_summaries(own, object(), test, records)
    assert found["summary_length"]["mean"] == pytest.approx((2 + 1 + 1 + 1 + 1 + 0) / 6)
    assert found["summaries_distinct"] == {"summaries": 6, "distinct": 4, "per_user": 2.0}
    assert found["leakage"]["run_mean"] == pytest.approx((1 + 1 + 1 + 1 + 1 + 0) / 6)
    assert found["leakage"]["name_share"] == 0  # Kyoto is in the fixed start of every summary.
    assert found["stability"] == pytest.approx({"jaccard": (1 / 3 + 1 / 3) / 2, "agreement": 2 / 3})
    assert found["faithfulness"] is None


def figures(mean, accuracy, jaccard):
    return {
        "summary_length": {"mean": mean, "q05": 3.0, "q50": 10.0, "q95": 29.6},
        "summaries_distinct": {"distinct": 1500, "summaries": 2000, "per_user": 1.5},
        "faithfulness": accuracy and {"accuracy": accuracy, "accuracy_ci95": [accuracy - 0.1, accuracy + 0.1]},
        "leakage": {"run_mean": 2.5, "run_max": 9, "long_run_share": 0.125, "number_share": 0.0, "name_share": 1.0},
        "stability": {"jaccard": jaccard, "agreement": jaccard},
    }


def results_row(method, seed, described=None):
    row = {"method": method, "seed": seed, "accuracy": 0.5}
    return row if described is None else row | {"summaries": described}


def test_the_report_has_a_column_for_each_method_that_writes_summaries(tmp_path):
    rows = [
        results_row("popi", 0, figures(10.0, 0.6, None)),
        results_row("popi", 1, figures(12.5, 0.8, None)),
        results_row("zero_shot_summary", 0, figures(40.0, None, None)),
        results_row("base", 0),
    ]
    columns, lines = summaries_table.cells(rows)
    assert columns == ["", "Zero-shot summary", "POPI"]
    table = {label: tuple(own) for label, *own in lines}
    assert table["Words per summary"] == ("40.0 (3 to 30)", "11.2 (3 to 30)")
    assert table["Own pairs predicted"] == ("", "70.0% [60.0%, 80.0%]")
    assert table["Copied run, words"] == ("2.5, at most 9", "2.5, at most 9")
    assert table["Different summaries"][0] == "1,500 of 2,000"
    assert "Words in common" not in table  # One summary per user.
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"config": "c", "dataset": "d", "split": "s", "rows": rows}))
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Summaries</h2>" in page and "70.0%<small>[60.0%, 80.0%]</small>" in page and "first 256 users" in page


def test_results_without_the_field_or_with_empty_parts_are_read(tmp_path):
    path = tmp_path / "results.json"
    head = {"config": "c", "dataset": "d", "split": "s"}
    path.write_text(json.dumps(head | {"rows": [results_row("popi", 0)]}))
    assert stored.results(tmp_path)["rows"] == [results_row("popi", 0)] and summaries_table.cells([]) is None
    report.write(tmp_path)
    assert "<h2>Summaries</h2>" not in (tmp_path / "report.html").read_text()
    path.write_text(json.dumps(head | {"rows": [results_row("popi", 0, {"faithfulness": None, "leakage": {}})]}))
    report.write(tmp_path)
    path.write_text(json.dumps(head | {"rows": [results_row("popi", 0, {"leakage": {"run_max": "x"}})]}))
    with pytest.raises(UserError, match="results.json: damaged"):
        stored.results(tmp_path)
