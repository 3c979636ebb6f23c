"""Before the first step: limits are checked, and buckets chosen, on all of a run's data."""

import dataclasses

import pytest

from configs import quickstart
from popi_jax.data import packing, prepared
from popi_jax.modes import setup as system_lib
from popi_jax.rollout import limits as preflight
from popi_jax.rollout import pairs


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A system whose buckets are chosen, its data, and whose were given."""
    config = quickstart.get_config("runlocal")
    given = system_lib.load(config)
    sources = prepared.from_config(config, tmp_path_factory.mktemp("data"))
    return preflight.fit(dataclasses.replace(given, buckets=()), sources), sources, given


def test_buckets_are_few_and_hold_all_data(fitted):
    system, sources, _ = fitted
    examples = [example for source in sources.values() for example in source]
    signals = [len(system.encoder.signals(example)) for example in examples]
    summary = system.config.limits.summary
    assert list(system.buckets) == sorted(set(system.buckets)) and len(system.buckets) <= 8 + 8 + 3
    assert set(packing.choose_buckets(signals, 8)) <= set(system.buckets)
    assert {summary // 4, summary // 2, summary} <= set(system.buckets)
    padding = sum(packing.bucket(n, system.buckets) - n for n in signals) / sum(signals)
    assert padding < 0.1


def test_pairs_count_with_the_longest_summary(fitted):
    system, sources, _ = fitted
    example = next(iter(sources["train"]))
    query, start = example.queries[0], system.config.prompts.summary_start
    row = pairs.pair_row(system, pairs.Item(query, start))
    assert system.encoder.check(query, start, 7) == row.tokens + 7
    longest = max(
        pairs.pair_row(system, pairs.Item(query, start)).tokens
        for source in sources.values()
        for example in source
        for query in example.queries
    )
    assert any(longest + system.config.limits.summary <= size for size in system.buckets)


def test_given_buckets_stay(fitted):
    _, sources, given = fitted
    assert preflight.fit(given, sources) is given
    assert given.buckets == tuple(given.config.limits.buckets) != ()
