"""Before the first step, all of a run's data are checked against the limits and used to choose buckets."""

import collections
import dataclasses

import pytest

from popi_jax.config import changed, parse
from popi_jax.configs import quickstart
from popi_jax.data import layouts, packing, prepared
from popi_jax.data.layouts import PLAIN, Told
from popi_jax.data.schema import Query, Signal
from popi_jax.errors import UserError
from popi_jax.modes import setup
from popi_jax.rollout import limits
from popi_jax.rollout.pairs import Item
from tests.test_encoding import EXAMPLE, SIGNALS, encoder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run with chosen buckets, its data, and a run with given buckets."""
    given = setup.load(parse(quickstart.get_config("runlocal")))
    sources = prepared.from_config(given.config.data, tmp_path_factory.mktemp("data"))
    chosen = dataclasses.replace(given, config=changed(given.config, {"limits.buckets": ()}))
    return chosen.fitted(sources), sources, given


def test_chosen_buckets_are_few_and_hold_all_data(fitted):
    run, sources, _ = fitted
    examples = [example for source in sources.values() for example in source]
    signals = [len(run.encoder.signals(example)) for example in examples]
    summary = run.config.limits.summary
    assert list(run.buckets) == sorted(set(run.buckets)) and len(run.buckets) <= 8 + 8 + 3
    assert set(packing.choose_buckets(signals, 8)) <= set(run.buckets)
    assert {summary // 4, summary // 2, summary} <= set(run.buckets)
    padding = sum(packing.bucket(n, run.buckets) - n for n in signals) / sum(signals)
    assert padding < 0.1


def test_pairs_count_with_the_longest_summary(fitted):
    run, sources, _ = fitted
    example = next(iter(sources["train"]))
    query, start = example.queries[0], Told(run.config.prompts.summary_start)
    row_of = run.scorer.packer.row
    row = row_of(Item(query, start))
    assert run.encoder.check(query, start, 7) == row.tokens + 7
    longest = max(
        row_of(Item(query, start)).tokens
        for source in sources.values()
        for example in source
        for query in example.queries
    )
    assert any(longest + run.config.limits.summary <= size for size in run.buckets)


def test_given_buckets_are_kept(fitted):
    _, sources, given = fitted
    assert given.fitted(sources).buckets == given.buckets == given.config.limits.buckets != ()


@pytest.mark.parametrize(("key", "split"), [("train.users_per_step", "train"), ("eval.users_per_batch", "test")])
def test_a_batch_far_larger_than_the_data_is_refused(fitted, key, split):
    run, sources, _ = fitted
    count = len(sources[split])
    dataclasses.replace(run, config=changed(run.config, {key: 1000 * count})).fitted(sources)
    larger = dataclasses.replace(run, config=changed(run.config, {key: 1000 * count + 1}))
    with pytest.raises(
        UserError, match=rf"config.{key} is {1000 * count + 1}, but there are only {count} {split} examples"
    ):
        larger.fitted(sources)


LONG = "w " * 50
FITTING = Query("what", "a", "b")


@pytest.mark.parametrize(
    ("changes", "dropped", "queries"),
    [
        ({}, {}, 2),
        ({"queries": (FITTING, Query("why", LONG, "b"))}, {"test queries that exceed limits.response": 1}, 1),
        ({"queries": (FITTING, Query(LONG, "a", "b"))}, {"test queries that exceed limits.prompt": 1}, 1),
        ({"queries": (FITTING, Query("w", "a  b", "a b"))}, {"test queries whose responses are the same tokens": 1}, 1),
        ({"signals": (*SIGNALS, Signal("profile", text=LONG))}, {"test users that exceed limits.signals": 1}, 0),
        ({"signals": ()}, {"test users without signals": 1}, 0),
        (
            {"persona": LONG},
            {"test queries that exceed limits.prompt": 2, "test users without a query that fits": 1},
            0,
        ),
    ],
)
def test_what_does_not_fit_is_dropped_and_counted(changes, dropped, queries):
    """Whatever the method, so that all methods are tested on the same rows."""
    users = [dataclasses.replace(EXAMPLE, user="a"), dataclasses.replace(EXAMPLE, user="b", **changes)]
    counts = collections.Counter()
    own = encoder(signals=40, prompt=30, response=5, summary=4, on_overflow="drop")
    kept = limits.usable(own, "test", users, counts)
    assert counts == dropped
    assert kept[0] == users[0] and sum(len(example.queries) for example in kept[1:]) == queries
    assert kept.all == (not dropped) and list(kept.of(users[:])) == list(kept)
    assert own.overflow.counts() == {}  # Nothing was read yet.
    assert list(limits.usable(encoder(on_overflow="error"), "test", users, counts)) == users


def test_a_layout_in_a_file_of_ones_own_belongs_to_the_run(fitted, tmp_path):
    """Its content, since the config has only its path. Otherwise, a run would go on with other prompts."""
    run, sources, _ = fitted
    assert "layout" not in run.identity and "layout" not in run.inputs(sources)
    path = tmp_path / "own.json"
    seen = set()
    for separator in ("\n", "\n\n\n"):
        path.write_text(PLAIN.model_copy(update={"separator": separator}).model_dump_json())
        layouts.load.cache_clear()  # Another start of the command.
        own = dataclasses.replace(run, config=changed(run.config, {"prompts.layout": str(path)}))
        assert own.identity["layout"] == own.inputs(sources)["layout"]
        seen.add(own.identity["layout"])
    assert len(seen) == 2


def test_no_user_that_fits_is_an_error(fitted):
    run, sources, _ = fitted
    tight = changed(run.config, {"limits.response": 1, "limits.on_overflow": "drop"})
    run = dataclasses.replace(run, config=tight, encoder=dataclasses.replace(run.encoder, limits=tight.limits))
    dropped = collections.Counter()
    with pytest.raises(UserError, match=r"^config.limits: no user of the train split fits; raise them$"):
        run.usable(sources, dropped)
    assert dropped["test queries that exceed limits.response"] == sum(len(e.queries) for e in sources["test"])
