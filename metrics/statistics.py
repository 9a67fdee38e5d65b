"""Statistics in which the patient is the unit: bootstrap intervals, paired tests, comparison with a null.

Slices of one patient are not independent samples; every function here takes one value per patient, or is told which
patient a value belongs to. Percentile bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993),
chapter 13; step-down correction: Holm, Scand. J. Statist. 6 (1979); conformal p-values: Vovk et al., "Algorithmic
Learning in a Random World" (2005).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
MIN_PATIENTS = 3
"""With fewer patients an interval would say nothing: it is NaN."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, the number of patients in it and of those dropped as NaN."""

    estimate: float
    low: float
    high: float
    n: int
    dropped: int


@dataclass(frozen=True)
class PairedTest:
    """A two-sided paired test: statistic, p-value, pairs used, pairs dropped because a value was NaN."""

    statistic: float
    p: float
    n: int
    dropped: int


@dataclass(frozen=True)
class NullComparison:
    """How largest correlations of synthetic slices lie against those of held-out real slices (the null).

    Shares are fractions of the synthetic values strictly above the null's percentile or maximum. `p_values` are the
    conformal p-values of the synthetic values in the order given, NaN where the value is NaN.
    """

    n: int
    n_null: int
    mean: float
    mean_null: float
    median: float
    median_null: float
    q95: float
    q95_null: float
    max: float
    max_null: float
    share_above_q95: float
    share_above_q99: float
    share_above_max: float
    p_values: Floats


def bootstrap_mean(
    values: npt.ArrayLike, *, n_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Mean over patients with its percentile bootstrap interval.

    Args:
        values: (patients,); NaN is dropped and counted.
        n_resamples: number of bootstrap samples B.
        seed: of numpy's `default_rng`; the indices are its first `integers(0, n, (B, n))`.
        confidence: coverage of the interval.

    Returns:
        The interval; its ends are NaN below `MIN_PATIENTS` patients.
    """
    x = np.asarray(values, np.float64)
    kept = x[~np.isnan(x)]
    estimate = float(kept.mean()) if kept.size else float("nan")
    low = high = float("nan")
    if kept.size >= MIN_PATIENTS:
        low, high = _percentiles(kept[_resamples(kept.size, n_resamples, seed)].mean(axis=1), confidence)
    return Interval(estimate, low, high, kept.size, x.size - kept.size)


def bootstrap_ratio(
    a: npt.ArrayLike, b: npt.ArrayLike, *, n_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Ratio mean(b) / mean(a) of two arms on the same patients, with its percentile bootstrap interval.

    Patients are resampled, each with both of its values, so what makes a patient easy or hard for both arms cancels.

    Args:
        a: (patients,), the arm that is compared with.
        b: (patients,), same patients in the same order; pairs with a NaN are dropped and counted.
        n_resamples: number of bootstrap samples B.
        seed: of numpy's `default_rng`.
        confidence: coverage of the interval.

    Returns:
        The interval; its ends are NaN below `MIN_PATIENTS` pairs, or where a resample has mean(a) = 0.
    """
    x, y, dropped = _pairs(a, b)
    estimate = float(y.mean() / x.mean()) if x.size and x.mean() != 0 else float("nan")
    low = high = float("nan")
    if x.size >= MIN_PATIENTS:
        rows = _resamples(x.size, n_resamples, seed)
        denominators = x[rows].mean(axis=1)
        if np.all(denominators != 0):
            low, high = _percentiles(y[rows].mean(axis=1) / denominators, confidence)
    return Interval(estimate, low, high, x.size, dropped)


def bootstrap_share_above(
    values: npt.ArrayLike,
    null: npt.ArrayLike,
    null_groups: npt.ArrayLike,
    *,
    quantile: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Share of values above a quantile of a null that is clustered in patients, with a cluster bootstrap interval.

    Both the values and the patients of the null are resampled, so few held-out patients give a wide interval however
    many slices they have. Without a difference the share is about 1 - `quantile`.

    Args:
        values: (n,), NaN dropped and counted.
        null: (m,), NaN dropped.
        null_groups: (m,), the patient of each null value.
        quantile: of the null (numpy's linear interpolation).
        n_resamples: number of bootstrap samples B.
        seed: of numpy's `default_rng`.
        confidence: coverage of the interval.

    Returns:
        The interval; n is the number of patients in the null. Its ends are NaN below `MIN_PATIENTS` of them.
    """
    x, y, groups = np.asarray(values, np.float64), np.asarray(null, np.float64), np.asarray(null_groups)
    groups, y = groups[~np.isnan(y)], y[~np.isnan(y)]
    kept = np.sort(x[~np.isnan(x)])
    names = np.unique(groups)
    low = high = estimate = float("nan")
    if kept.size and y.size:
        estimate = float(np.mean(kept > np.quantile(y, quantile)))
    if kept.size and names.size >= MIN_PATIENTS:
        members = [y[groups == name] for name in names]
        rng = np.random.default_rng(seed)
        shares = np.empty(n_resamples)
        for i in range(n_resamples):
            drawn = np.concatenate([members[j] for j in rng.integers(0, names.size, names.size)])
            above = kept.size - np.searchsorted(kept, np.quantile(drawn, quantile), side="right")
            shares[i] = rng.binomial(kept.size, above / kept.size) / kept.size  # = resampling the values
        low, high = _percentiles(shares, confidence)
    return Interval(estimate, low, high, names.size, x.size - kept.size)


def paired_wilcoxon(a: npt.ArrayLike, b: npt.ArrayLike) -> PairedTest:
    """Two-sided Wilcoxon signed-rank test on pairs of patients (scipy, ties of zero dropped as Wilcoxon did).

    Pairs with a NaN are dropped and counted. Without any difference between the arms p is 1; without pairs it is NaN.
    """
    x, y, dropped = _pairs(a, b)
    if x.size == 0:
        return PairedTest(float("nan"), float("nan"), 0, dropped)
    if np.all(x == y):
        return PairedTest(0.0, 1.0, x.size, dropped)
    result = stats.wilcoxon(x, y, zero_method="wilcox", alternative="two-sided")
    return PairedTest(float(result.statistic), float(result.pvalue), x.size, dropped)


def holm(p_values: npt.ArrayLike) -> Floats:
    """Adjust p-values for multiple tests: p_(i) -> max over j <= i of min(1, (m - j + 1) p_(j)) (Holm 1979).

    NaN stays NaN and does not count as a test.
    """
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(order.size, 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return adjusted


def conformal_p_values(values: npt.ArrayLike, null: npt.ArrayLike) -> Floats:
    """Rank values in a null: p = (1 + number of null values >= value) / (1 + number of null values).

    A NaN value stays NaN, NaN nulls are dropped.
    """
    x, y = np.asarray(values, np.float64), np.asarray(null, np.float64)
    y = np.sort(y[~np.isnan(y)])
    p = (1 + y.size - np.searchsorted(y, x, side="left")) / (1 + y.size)
    return np.where(np.isnan(x), np.nan, p)


def summarize(r_synthetic: npt.ArrayLike, r_null: npt.ArrayLike) -> NullComparison:
    """Put the largest correlations of synthetic slices beside those of held-out real slices.

    Args:
        r_synthetic: (n,), largest correlation of each synthetic slice with any training slice; NaN dropped.
        r_null: (m,), the same for real slices of patients outside the training set; NaN dropped.

    Raises:
        ValueError: if one of them has no number in it.
    """
    x, y = np.asarray(r_synthetic, np.float64), np.asarray(r_null, np.float64)
    p_values = conformal_p_values(x, y)
    x, y = x[~np.isnan(x)], y[~np.isnan(y)]
    if not x.size or not y.size:
        raise ValueError(
            f"Expected correlations of synthetic and of held-out slices, but got {x.size} and {y.size} numbers. "
            "A memorization check needs a val or test split with at least one slice that is not constant."
        )
    q95_null, q99_null = np.quantile(y, [0.95, 0.99])
    return NullComparison(
        n=x.size,
        n_null=y.size,
        mean=float(x.mean()),
        mean_null=float(y.mean()),
        median=float(np.median(x)),
        median_null=float(np.median(y)),
        q95=float(np.quantile(x, 0.95)),
        q95_null=float(q95_null),
        max=float(x.max()),
        max_null=float(y.max()),
        share_above_q95=float(np.mean(x > q95_null)),
        share_above_q99=float(np.mean(x > q99_null)),
        share_above_max=float(np.mean(x > y.max())),
        p_values=p_values,
    )


def _pairs(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[Floats, Floats, int]:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"Expected two arms with one value per patient each, but got shapes {x.shape} and {y.shape}.")
    valid = ~(np.isnan(x) | np.isnan(y))
    return x[valid], y[valid], int((~valid).sum())


def _resamples(n: int, n_resamples: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, n, (n_resamples, n))


def _percentiles(values: npt.NDArray[Any], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
