"""Bootstrap intervals against cases worked by hand, the normal approximation and their nominal coverage."""

import math

import numpy as np
import pytest

from popi_jax.evaluation import stats


def test_interval_of_two_groups_by_hand():
    """Groups (0, 0) and (1): the draws have mean 0 (1/4), 1/3 (1/2) or 1 (1/4), so the interval is [0, 1]."""
    interval = stats.bootstrap_mean_ci([0.0, 0.0, 1.0], ["a", "a", "b"], resamples=4000, seed=0)
    assert interval == (pytest.approx(1 / 3), 0.0, 1.0)


def test_equal_values_have_no_spread_and_one_group_has_no_interval():
    assert stats.bootstrap_mean_ci([0.5] * 4, [0, 1, 2, 3], resamples=50, seed=0) == (0.5, 0.5, 0.5)
    interval = stats.bootstrap_mean_ci([True, False], ["u", "u"], resamples=50, seed=0)
    assert interval.mean == 0.5 and math.isnan(interval.low) and math.isnan(interval.high)


def test_independent_rows_agree_with_the_normal_interval():
    values_R = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    mean, low, high = stats.bootstrap_mean_ci(values_R, range(400), resamples=8000, seed=2)
    half = 1.96 * values_R.std() / np.sqrt(400)
    assert mean == pytest.approx(values_R.mean())
    assert low == pytest.approx(mean - half, abs=0.05 * half)
    assert high == pytest.approx(mean + half, abs=0.05 * half)


def test_groups_are_resampled_not_rows():
    """Ten equal rows per group add no information: the interval is that of the 50 group values, not of 500 rows."""
    group_value_Cl = np.random.default_rng(3).normal(size=50)
    values_R, groups = np.repeat(group_value_Cl, 10), [f"user {g}" for g in range(50) for _ in range(10)]
    grouped = stats.bootstrap_mean_ci(values_R, groups, resamples=4000, seed=4)
    single = stats.bootstrap_mean_ci(group_value_Cl, range(50), resamples=4000, seed=4)
    rows = stats.bootstrap_mean_ci(values_R, range(500), resamples=4000, seed=4)
    np.testing.assert_allclose(grouped, single, rtol=1e-12)
    assert grouped.high - grouped.low > 2.5 * (rows.high - rows.low)  # sqrt 10 in the limit.


def test_groups_are_weighted_by_their_rows():
    """The mean is over rows: 3 rows of 1 and 1 row of 0 have mean 3/4."""
    assert stats.bootstrap_mean_ci([1, 1, 1, 0], [("p", 1)] * 3 + [("p", 2)], resamples=10, seed=0).mean == 0.75


def test_coverage_of_grouped_accuracies():
    """Grouped 95% intervals of 40 users cover the true mean in about 95% of worlds, intervals over rows in fewer."""
    rng = np.random.default_rng(5)
    n_worlds, n_groups, n_rows = 300, 40, 6
    grouped = rows = 0
    for world in range(n_worlds):
        skill_Cl = rng.beta(1.4, 0.6, size=n_groups)  # Mean 0.7.
        correct_R = (rng.random((n_groups, n_rows)) < skill_Cl[:, None]).ravel()
        _, low, high = stats.bootstrap_mean_ci(correct_R, np.arange(n_groups).repeat(n_rows), resamples=400, seed=world)
        grouped += low <= 0.7 <= high
        _, low, high = stats.bootstrap_mean_ci(correct_R, range(n_groups * n_rows), resamples=400, seed=world)
        rows += low <= 0.7 <= high
    # One standard error of the count is 1.3% of the worlds.
    assert 0.90 <= grouped / n_worlds <= 0.98
    assert rows / n_worlds < 0.85


def test_interval_depends_on_the_seed_and_not_on_group_names():
    values_R = np.random.default_rng(6).normal(size=60)
    groups = [n // 3 for n in range(60)]
    first = stats.bootstrap_mean_ci(values_R, groups, resamples=200, seed=1)
    assert first == stats.bootstrap_mean_ci(values_R, groups, resamples=200, seed=1)
    assert first != stats.bootstrap_mean_ci(values_R, groups, resamples=200, seed=2)
    # Group names do not matter, only which rows share one.
    assert first == stats.bootstrap_mean_ci(values_R, [f"u{g}" for g in groups], resamples=200, seed=1)


def test_pairing_removes_shared_variation():
    rng = np.random.default_rng(7)
    prompt_R = rng.normal(size=300) * 5.0
    a_R, b_R = prompt_R + 0.3 + 0.1 * rng.normal(size=300), prompt_R
    mean, low, high = stats.paired_bootstrap_difference(a_R, b_R, range(300), resamples=2000, seed=0)
    assert mean == pytest.approx((a_R - b_R).mean())
    assert 0.25 < low < mean < high < 0.35
    half = 1.96 * (a_R - b_R).std() / np.sqrt(300)
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_swapping_the_arguments_negates_the_difference():
    a_R, b_R, groups = [1, 1, 0, 1], [0, 1, 0, 0], list("wxyz")
    forth = stats.paired_bootstrap_difference(a_R, b_R, groups, resamples=500, seed=3)
    back = stats.paired_bootstrap_difference(b_R, a_R, groups, resamples=500, seed=3)
    assert forth.mean == 0.5
    np.testing.assert_allclose(back, (-forth.mean, -forth.high, -forth.low))


@pytest.mark.parametrize(
    ("values", "groups", "resamples", "message"),
    [
        ([], [], 10, "at least one row"),
        ([1.0, 2.0], ["a"], 10, "one group for each value"),
        ([[1.0], [2.0]], ["a", "b"], 10, "one group for each value"),
        ([1.0, float("nan")], ["a", "b"], 10, "row 1 is not a finite number"),
        ([1.0, 2.0], ["a", "b"], 0, "resamples is 0"),
    ],
)
def test_bad_arguments_are_refused(values, groups, resamples, message):
    with pytest.raises(ValueError, match=message):
        stats.bootstrap_mean_ci(values, groups, resamples, seed=0)


def test_unpaired_rows_are_refused():
    with pytest.raises(ValueError, match="paired by row"):
        stats.paired_bootstrap_difference([1.0, 2.0], [1.0], ["a", "b"], resamples=10, seed=0)
