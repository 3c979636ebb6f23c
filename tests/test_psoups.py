"""P-Soups: leaks and draws, on a synthetic file with the pitfalls of the real one, and on the real one if present."""

import collections
import json
import os
import pathlib
from typing import Any

import pytest

from popi_jax.data.builders import psoups
from popi_jax.data.schema import Example
from popi_jax.errors import UserError

REAL = pathlib.Path(
    os.environ.get("POPI_PSOUPS", pathlib.Path(__file__).parents[2] / "shared/data/psoups/student_phd.json")
)
PERSONAS = ("simple", "expert")


def pair(prompt: str, persona: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": f"{persona} yes {prompt}", "rejected": f"{persona} no {prompt}"}


def synthetic_rows() -> list[dict[str, Any]]:
    """Rows for 84 prompts, sorted by persona as in real files.

    Prompt i occurs i % 3 + 1 times for persona i % 2; prompts from 72 on occur for both personas. Shipped signals use 6
    prompts, of which 4 are also query prompts.
    """
    rows = []
    for p, persona in enumerate(PERSONAS):
        for i in range(84):
            if i % 2 == p or i >= 72:
                signals = [f"prompt {j}" for j in (0, 1, 2, 3)] + ["shown 0", "shown 1"]
                feedback = [pair(signals[(i + s) % 6], persona) for s in range(3)]
                row = pair(f"prompt {i}", persona) | {
                    psoups.PERSONA: persona,
                    "profile": "x",
                    psoups.FEEDBACK: feedback,
                }
                rows += [row] * (i % 3 + 1)
    return rows


def write(folder: pathlib.Path, rows: Any) -> pathlib.Path:
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(params=["synthetic", "real"])
def path(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    if request.param == "synthetic":
        return write(tmp_path, synthetic_rows())
    if not REAL.exists():
        pytest.skip(f"the P-Soups file is not at {REAL}; set POPI_PSOUPS to its path")
    return REAL


def query_prompts(examples: list[Example]) -> set[str]:
    return {query.prompt for example in examples for query in example.queries}


def signal_prompts(examples: list[Example]) -> set[str]:
    return {signal.prompt for example in examples for signal in example.signals}


def query_rows(examples: list[Example]) -> collections.Counter[str]:
    return collections.Counter(query.provenance for example in examples for query in example.queries)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("queries", [1, 3])
def test_disjoint_leaks_nothing(path: pathlib.Path, seed: int, queries: int) -> None:
    data = psoups.read_psoups(path, seed=seed, train_draws=2, queries_per_user=queries, test_queries_per_user=queries)
    train, test = data["train"], data["test"]
    assert not query_prompts(train) & query_prompts(test)
    assert not signal_prompts(train) & query_prompts(test)
    assert not signal_prompts(test) & (query_prompts(train) | signal_prompts(train))
    assert signal_prompts(train) <= query_prompts(train)
    assert signal_prompts(test) <= query_prompts(test)
    for example in train + test:
        prompts = [signal.prompt for signal in example.signals] + [query.prompt for query in example.queries]
        assert len(example.signals) == 4
        assert len(set(prompts)) == len(prompts)


def test_signals_and_queries_are_rows_with_the_examples_persona(path: pathlib.Path) -> None:
    rows = json.loads(path.read_text())
    data = psoups.read_psoups(path, queries_per_user=2)
    for example in data["train"] + data["test"]:
        for part in example.signals + example.queries:
            name, _, index = part.provenance.partition("#")
            assert name == path.name
            row = rows[int(index)]
            assert (part.prompt, part.chosen, part.rejected) == (row["prompt"], row["chosen"], row["rejected"])
            assert example.persona == row[psoups.PERSONA]
        assert all(query.group == query.prompt for query in example.queries)


@pytest.mark.parametrize("protocol", ["disjoint", "published"])
@pytest.mark.parametrize("queries", [1, 3])
def test_each_row_is_a_query_once_per_draw(path: pathlib.Path, protocol: str, queries: int) -> None:
    data = psoups.read_psoups(
        path, protocol=protocol, train_draws=3, test_draws=2, queries_per_user=queries, test_queries_per_user=queries
    )
    train, test = query_rows(data["train"]), query_rows(data["test"])
    draws = (3, 2) if protocol == "disjoint" else (1, 1)
    assert (set(train.values()), set(test.values())) == ({draws[0]}, {draws[1]})
    assert len(train) + len(test) == len(json.loads(path.read_text()))
    assert not set(train) & set(test)
    sizes = collections.Counter(len(example.queries) for example in data["train"])
    assert max(sizes) == queries
    assert min(sizes) >= queries - 1


def test_draws_differ_in_signals_and_users_are_unique(path: pathlib.Path) -> None:
    train = psoups.read_psoups(path, train_draws=2)["train"]
    half = len(train) // 2
    first, second = ({e.queries[0].provenance: e.signals for e in part} for part in (train[:half], train[half:]))
    assert first.keys() == second.keys()
    assert sum(first[row] != second[row] for row in first) > 0.9 * half
    assert len({example.user for example in train}) == len(train)


def test_test_rows_do_not_depend_on_protocol_or_number_of_draws(path: pathlib.Path) -> None:
    base = query_rows(psoups.read_psoups(path)["test"])
    for other in ({"protocol": "published"}, {"train_draws": 3, "queries_per_user": 4}, {"test_queries_per_user": 3}):
        assert query_rows(psoups.read_psoups(path, **other)["test"]) == base
    assert query_rows(psoups.read_psoups(path, seed=1)["test"]) != base


@pytest.mark.parametrize("seed", range(5))
def test_test_prompts_are_in_no_shipped_signals_and_test_has_the_requested_size(path: pathlib.Path, seed: int) -> None:
    rows = json.loads(path.read_text())
    counts: collections.Counter[str] = collections.Counter()
    data = psoups.read_psoups(path, protocol="published", seed=seed, counts=counts)
    shown = {signal["prompt"] for row in rows for signal in row[psoups.FEEDBACK]}
    assert not query_prompts(data["test"]) & shown
    assert 0.3 * len(rows) - 2 <= len(data["test"]) <= 0.3 * len(rows) + 0.5
    assert set(counts) == {"shipped signals that show their own query"}


def test_shipped_signals_are_the_rows_own_without_the_queries(path: pathlib.Path) -> None:
    rows = json.loads(path.read_text())
    counts: collections.Counter[str] = collections.Counter()
    data = psoups.read_psoups(path, protocol="published", counts=counts)
    dropped = 0
    for example in data["train"] + data["test"]:
        row = rows[int(example.queries[0].provenance.partition("#")[2])]
        own = [s for s in row[psoups.FEEDBACK] if s["prompt"] != row["prompt"]]
        assert [(s.prompt, s.chosen, s.rejected) for s in example.signals] == [tuple(s.values()) for s in own]
        dropped += len(row[psoups.FEEDBACK]) - len(own)
    assert counts == {"shipped signals that show their own query": dropped}
    assert dropped > 0


def test_the_counts_of_the_real_file() -> None:
    if not REAL.exists():
        pytest.skip(f"the P-Soups file is not at {REAL}; set POPI_PSOUPS to its path")
    data = psoups.read_psoups(REAL, protocol="published", seed=1)
    assert (len(data["train"]), len(data["test"])) == (420, 180)
    assert sum(len(e.signals) for split in data.values() for e in split) == 600 * 4 - 3  # Three show their own query.
    assert len(query_prompts(data["train"]) | query_prompts(data["test"])) == 211


def test_reading_is_deterministic_and_the_first_examples_are_a_fair_sample(path: pathlib.Path) -> None:
    data = psoups.read_psoups(path, train_draws=2)
    assert data == psoups.read_psoups(path, train_draws=2)
    assert psoups.read_psoups(path, seed=1)["train"] != data["train"]
    assert {example.persona for example in data["test"][:12]} == {example.persona for example in data["test"]}


def test_shipped_drops_training_rows_that_show_a_test_prompt_if_unshown_prompts_are_too_few(
    tmp_path: pathlib.Path,
) -> None:
    rows = [
        pair(f"p{i}", "simple") | {psoups.PERSONA: "simple", psoups.FEEDBACK: [pair(f"p{(i + 1) % 10}", "simple")]}
        for i in range(10)
    ]
    counts: collections.Counter[str] = collections.Counter()
    data = psoups.read_psoups(write(tmp_path, rows), protocol="published", counts=counts)
    assert len(data["test"]) == 3
    assert not signal_prompts(data["train"]) & query_prompts(data["test"])
    dropped = counts["training rows whose signals show a test prompt"]
    assert len(data["train"]) == 7 - dropped
    assert 1 <= dropped <= 3


def test_a_frequent_prompt_occurs_at_most_once_in_an_example(tmp_path: pathlib.Path) -> None:
    rows = synthetic_rows()
    common = pair("common", "simple") | {psoups.PERSONA: "simple", psoups.FEEDBACK: rows[0][psoups.FEEDBACK]}
    data = psoups.read_psoups(write(tmp_path, rows + [common] * 60), queries_per_user=8, test_fraction=0.2)
    sizes = collections.Counter(query.prompt for example in data["train"] for query in example.queries)
    assert sizes["common"] == 60
    assert all(len({q.prompt for q in example.queries}) == len(example.queries) for example in data["train"])


def broken(**changes: Any) -> list[dict[str, Any]]:
    rows = [dict(row) for row in synthetic_rows()]
    rows[5] = {key: value for key, value in (rows[5] | changes).items() if value is not ...}
    return rows


MISTAKES = [
    ({}, r"expected a JSON list of rows"),
    ([], r"expected a JSON list of rows"),
    ([1], r"row 0: expected an object"),
    (broken(chosen=...), r"row 5: field 'chosen' is missing"),
    (broken(prompt=""), r"row 5: field 'prompt' is empty"),
    (broken(rejected=3), r"row 5: field 'rejected' must be a string"),
    (broken(chosen="a", rejected="a"), r"row 5: fields 'chosen' and 'rejected' are the same"),
    (broken(ground_truth_persona=...), r"row 5: field 'ground_truth_persona' is missing"),
    (broken(**{psoups.FEEDBACK: ...}), r"row 5: field 'Pair-wise Comparative Feedback' is missing"),
    (broken(**{psoups.FEEDBACK: []}), r"row 5: field 'Pair-wise Comparative Feedback' is an empty list"),
    (broken(**{psoups.FEEDBACK: [{"prompt": "p"}]}), r"row 5: Pair-wise .*\[0\]: field 'chosen' is missing"),
    (synthetic_rows()[:1], r"1 rows of 1 prompts cannot be split"),
    (synthetic_rows()[:12], r"rows of persona 'simple' have \d other prompts, too few"),
]


@pytest.mark.parametrize(("rows", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_each_error_about_the_file_is_one_line(tmp_path: pathlib.Path, rows: Any, message: str) -> None:
    path = write(tmp_path, rows)
    with pytest.raises(UserError, match=message) as caught:
        psoups.read_psoups(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_the_error_about_a_missing_or_broken_file_is_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="none.json: no such file; set data.path"):
        psoups.read_psoups(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('[\n{"prompt": 1},\n{]')
    with pytest.raises(UserError, match="bad.json:3: not JSON"):
        psoups.read_psoups(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"protocol": "both"}, "data.protocol = 'both' is unknown"),
        ({"test_fraction": 0.0}, "data.test_fraction = 0.0; use"),
        ({"test_fraction": 1.0}, "data.test_fraction = 1.0; use"),
        ({"signals_per_user": 0}, "signals_per_user = 0"),
        ({"train_draws": 0}, "draws = 0"),
        ({"test_queries_per_user": 0}, "queries_per_user = 0"),
        ({"signals_per_user": 60}, "other prompts, too few"),
    ],
)
def test_settings_that_no_data_can_satisfy_are_refused(
    tmp_path: pathlib.Path, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        psoups.read_psoups(write(tmp_path, synthetic_rows()), **setting)


def test_an_error_about_a_long_text_is_short(tmp_path: pathlib.Path) -> None:
    rows = [row | {psoups.PERSONA: row[psoups.PERSONA] * 5000} for row in synthetic_rows()]
    with pytest.raises(UserError, match="other prompts, too few") as caught:
        psoups.read_psoups(write(tmp_path, rows), signals_per_user=60)
    assert len(str(caught.value)) < 500
