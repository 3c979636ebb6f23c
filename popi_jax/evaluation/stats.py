"""Confidence intervals: percentile bootstraps that resample whole groups of rows. Letters: docs/architecture.md."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over rows and the bounds of its 95% interval, which are NaN with fewer than two groups."""

    mean: float
    low: float
    high: float


def bootstrap_mean_ci(values: ArrayLike, groups: Sequence[Hashable], resamples: int, seed: int) -> Interval:
    """Returns the mean of `values` and its 95% percentile interval (Efron and Tibshirani 1993, chapter 13).

    Rows of one group (a prompt, a user) depend on each other. Groups are therefore drawn with replacement, each with
    all of its rows; every draw has the same number of groups as the data. The same arguments give the same interval.

    Args:
        values: R finite numbers, one per row; booleans count as 0 and 1.
        groups: R hashables, the group of each row.
        resamples: the number of draws.
        seed: the seed of the draws.

    Raises:
        ValueError: no rows, different numbers of rows and groups, a value that is not finite, or no resamples.
    """
    values_R = np.asarray(values, dtype=np.float64)
    if values_R.ndim != 1 or len(values_R) == 0 or len(values_R) != len(groups):
        raise ValueError(
            f"{values_R.shape} values and {len(groups)} groups: give at least one row, and one group for each value"
        )
    if not np.isfinite(values_R).all():
        raise ValueError(f"row {int(np.flatnonzero(~np.isfinite(values_R))[0])} is not a finite number")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1")
    group_ids = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group_R = np.array([group_ids[group] for group in groups])
    sum_Cl = np.bincount(group_R, weights=values_R)
    count_Cl = np.bincount(group_R)
    mean = float(values_R.mean())
    if len(sum_Cl) == 1:
        return Interval(mean, float("nan"), float("nan"))
    draw_BtxCl = np.random.default_rng(seed).integers(len(sum_Cl), size=(resamples, len(sum_Cl)))
    mean_Bt = sum_Cl[draw_BtxCl].sum(axis=1) / count_Cl[draw_BtxCl].sum(axis=1)
    low, high = np.quantile(mean_Bt, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def paired_bootstrap_difference(
    a: ArrayLike, b: ArrayLike, groups: Sequence[Hashable], resamples: int, seed: int
) -> Interval:
    """Returns the mean of a - b and its 95% interval, for two methods on the same rows.

    Every draw has the same groups for both. Pairing removes what the two share (a hard prompt is hard for both), so the
    interval is often far narrower than the two single ones suggest. Arguments and errors are those of
    `bootstrap_mean_ci`; row i of `a` and of `b` is the same test example.
    """
    a_R, b_R = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_R.shape != b_R.shape:
        raise ValueError(f"a and b are paired by row and need the same shape: {a_R.shape} and {b_R.shape}")
    return bootstrap_mean_ci(a_R - b_R, groups, resamples, seed)
