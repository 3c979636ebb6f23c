"""Intervals for what evaluation reports: percentile bootstraps that resample whole groups of rows.

Legend: N rows, G groups, B bootstrap draws.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over rows and the ends of its 95% interval: NaN where there is one group and so no spread to see."""

    mean: float
    low: float
    high: float


def bootstrap_mean_ci(values: ArrayLike, groups: Sequence[Hashable], resamples: int, seed: int) -> Interval:
    """Returns the mean of `values` and its 95% percentile interval (Efron and Tibshirani 1993, chapter 13).

    Rows of one group (a prompt, a user) depend on each other: the groups are drawn with replacement, each with all of
    its rows, and every draw has as many groups as the data. The same arguments give the same interval.

    Args:
        values: N finite numbers, one a row; booleans count as 0 and 1.
        groups: N hashables, the group of each row.
        resamples: how many draws stand behind the interval.
        seed: of the draws.

    Raises:
        ValueError: no rows, rows and groups of different number, a value that is not finite, or no resamples.
    """
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or len(values_N) == 0 or len(values_N) != len(groups):
        raise ValueError(
            f"values need one group each and one row at least: {values_N.shape} values, {len(groups)} groups"
        )
    if not np.isfinite(values_N).all():
        raise ValueError(f"row {int(np.flatnonzero(~np.isfinite(values_N))[0])} is not a finite number")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; an interval needs one at least")
    group_ids = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_N = np.array([group_ids[group] for group in groups])
    sum_G = np.bincount(group_N, weights=values_N)
    count_G = np.bincount(group_N)
    mean = float(values_N.mean())
    if len(sum_G) == 1:
        return Interval(mean, float("nan"), float("nan"))
    draw_BxG = np.random.default_rng(seed).integers(len(sum_G), size=(resamples, len(sum_G)))
    mean_B = sum_G[draw_BxG].sum(axis=1) / count_G[draw_BxG].sum(axis=1)
    low, high = np.quantile(mean_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def paired_bootstrap_difference(
    a: ArrayLike, b: ArrayLike, groups: Sequence[Hashable], resamples: int, seed: int
) -> Interval:
    """Returns the mean of a - b and its 95% interval: two methods on the same rows, the same groups drawn for both.

    Pairing takes out what the two share (a hard prompt is hard for both), so the interval is often far narrower than
    the two single ones suggest. Arguments and errors as `bootstrap_mean_ci`; row i of `a` and `b` is one test example.
    """
    a_N, b_N = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_N.shape != b_N.shape:
        raise ValueError(f"a and b are paired by row and need one shape: {a_N.shape} and {b_N.shape}")
    return bootstrap_mean_ci(a_N - b_N, groups, resamples, seed)
