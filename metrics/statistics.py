"""Statistics in which the patient is the unit: bootstrap intervals, paired tests and effects, comparison with a null.

Slices of one patient are not independent samples; every function here takes one value per patient, or is told which
patient a value belongs to. Percentile bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993),
chapter 13; step-down correction: Holm, Scand. J. Statist. 6 (1979); conformal p-values: Vovk et al., "Algorithmic
Learning in a Random World" (2005).

An arm of several trainings, which differ in their seed, comes as (patients, seeds). Tests and effects take the mean
over seeds of each patient: more seeds are not more patients. Intervals resample patients and, independently, seeds
(Owen, "The pigeonhole bootstrap", Ann. Appl. Stat. 1 (2007), doi 10.1214/07-AOAS122): each training is judged on all
patients, so one draw of seeds holds for all of them; a draw for each patient apart would average the luck of a training
away. A patient without a value for some seeds has the mean of the others there, one without any is dropped.
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
class EffectSizes:
    """How much an arm b differs from an arm a on the same patients; positive where b is larger.

    Attributes:
        d_z: mean of the differences over their standard deviation (Cohen, "Statistical Power Analysis" (1988)).
        rank_biserial: of matched pairs, -1..1: the share of the ranks of |difference| that speaks for b minus the
            share against (Kerby, Compr. Psychol. 3 (2014)); equal pairs have no rank, as in Wilcoxon's test.
        n: pairs used.
        dropped: pairs dropped because a value was NaN.
    """

    d_z: float
    rank_biserial: float
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
        values: (patients,) or (patients, seeds); patients with nothing but NaN are dropped and counted.
        n_resamples: number of bootstrap samples B.
        seed: of numpy's `default_rng`; the indices of patients are its first `integers(0, n, (B, n))`.
        confidence: coverage of the interval.

    Returns:
        The interval; its ends are NaN below `MIN_PATIENTS` patients.
    """
    x = _patients_by_seeds(values)
    kept = x[~np.isnan(x[:, 0])]
    n = len(kept)
    estimate = float(kept.mean(axis=1).mean()) if n else float("nan")
    low = high = float("nan")
    if n >= MIN_PATIENTS:
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, n, (n_resamples, n))
        low, high = _percentiles(_resampled_means(kept, rows, rng), confidence)
    return Interval(estimate, low, high, n, len(x) - n)


def bootstrap_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, *, n_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Difference mean(b) - mean(a) of two arms on the same patients; arguments and resampling as `bootstrap_ratio`."""
    x, y, dropped = _pairs(a, b)
    n = len(x)
    estimate = float(y.mean() - x.mean()) if n else float("nan")
    low = high = float("nan")
    if n >= MIN_PATIENTS:
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, n, (n_resamples, n))
        of_a = _resampled_means(x, rows, rng)
        low, high = _percentiles(_resampled_means(y, rows, rng) - of_a, confidence)
    return Interval(estimate, low, high, n, dropped)


def bootstrap_ratio(
    a: npt.ArrayLike, b: npt.ArrayLike, *, n_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Ratio mean(b) / mean(a) of two arms on the same patients, with its percentile bootstrap interval.

    Patients are resampled, each with both of its values, so what makes a patient easy or hard for both arms cancels.

    Args:
        a: (patients,) or (patients, seeds), the arm that is compared with.
        b: same patients in the same order, its own number of seeds; patients without a value in either arm are dropped
            and counted.
        n_resamples: number of bootstrap samples B.
        seed: of numpy's `default_rng`.
        confidence: coverage of the interval.

    Returns:
        The interval; its ends are NaN below `MIN_PATIENTS` pairs, or where a resample has mean(a) = 0.
    """
    x, y, dropped = _pairs(a, b)
    n = len(x)
    estimate = float(y.mean() / x.mean()) if n and x.mean() != 0 else float("nan")
    low = high = float("nan")
    if n >= MIN_PATIENTS:
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, n, (n_resamples, n))
        denominators = _resampled_means(x, rows, rng)
        if np.all(denominators != 0):
            low, high = _percentiles(_resampled_means(y, rows, rng) / denominators, confidence)
    return Interval(estimate, low, high, n, dropped)


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

    Arms are (patients,) or (patients, seeds). Pairs with a NaN are dropped and counted. Without any difference between
    the arms p is 1; without pairs it is NaN.
    """
    x, y, dropped = _mean_pairs(a, b)
    if x.size == 0:
        return PairedTest(float("nan"), float("nan"), 0, dropped)
    if np.all(x == y):
        return PairedTest(0.0, 1.0, x.size, dropped)
    result = stats.wilcoxon(x, y, zero_method="wilcox", alternative="two-sided")
    return PairedTest(float(result.statistic), float(result.pvalue), x.size, dropped)


def effect_sizes(a: npt.ArrayLike, b: npt.ArrayLike) -> EffectSizes:
    """Say how large the difference of two arms on the same patients is, in units free of the metric.

    Args:
        a: (patients,) or (patients, seeds), the arm that is compared with.
        b: same patients in the same order; pairs with a NaN are dropped and counted.

    Returns:
        The effects: 0 without any difference; NaN without pairs, and for d_z also with one.
    """
    x, y, dropped = _mean_pairs(a, b)
    difference = y - x
    changed = difference[difference != 0]
    if not changed.size:
        none = 0.0 if difference.size else float("nan")
        return EffectSizes(none, none, difference.size, dropped)
    ranks = stats.rankdata(np.abs(changed))
    with np.errstate(divide="ignore"):  # the same difference everywhere is infinite
        d_z = difference.mean() / difference.std(ddof=1) if difference.size > 1 else np.nan
    rank_biserial = np.sum(ranks * np.sign(changed)) / np.sum(ranks)
    return EffectSizes(float(d_z), float(rank_biserial), difference.size, dropped)


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


def _patients_by_seeds(values: npt.ArrayLike) -> Floats:
    """Give (patients, seeds); the NaN of a patient are the mean of the patient's other seeds."""
    x = np.asarray(values, np.float64)
    if x.ndim == 1:
        return x[:, None]
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"Expected one value per patient, or (patients, seeds), but got shape {x.shape}.")
    missing = np.isnan(x)
    with np.errstate(invalid="ignore"):  # 0 / 0 of a patient without a value
        mean = np.where(missing, 0.0, x).sum(axis=1, keepdims=True) / (~missing).sum(axis=1, keepdims=True)
    return np.where(missing, mean, x)


def _pairs(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[Floats, Floats, int]:
    """Give both arms as (pairs, seeds), and how many pairs were dropped."""
    x, y = _patients_by_seeds(a), _patients_by_seeds(b)
    if len(x) != len(y):
        raise ValueError(f"Expected two arms with one value per patient each, but got {len(x)} and {len(y)} patients.")
    valid = ~(np.isnan(x[:, 0]) | np.isnan(y[:, 0]))
    return x[valid], y[valid], int((~valid).sum())


def _mean_pairs(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[Floats, Floats, int]:
    x, y, dropped = _pairs(a, b)
    return x.mean(axis=1), y.mean(axis=1), dropped


def _resampled_means(values: Floats, rows: npt.NDArray[np.int64], rng: np.random.Generator) -> Floats:
    """Means (B,) of values (patients, seeds) over resampled patients, rows (B, patients), and seeds drawn here."""
    per_seed = np.stack([column[rows].mean(axis=1) for column in values.T], axis=1)  # (B, seeds)
    drawn = rng.integers(0, per_seed.shape[1], per_seed.shape)
    return np.asarray(np.take_along_axis(per_seed, drawn, axis=1).mean(axis=1), np.float64)


def _percentiles(values: npt.NDArray[Any], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
