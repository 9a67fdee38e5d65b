"""Bootstrap, tests and correction against scipy and against loops written out."""

import numpy as np
import pytest
from scipy import stats

from metrics.statistics import (
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_share_above,
    conformal_p_values,
    holm,
    paired_wilcoxon,
    summarize,
)

RNG = np.random.default_rng(7)
A = RNG.uniform(0.5, 1.0, 25)
B = 0.85 * A + RNG.normal(0, 0.03, 25)


def test_interval_of_the_mean_equals_a_loop_over_resamples():
    indices = np.random.default_rng(3).integers(0, 25, (500, 25))
    means = [A[row].mean() for row in indices]
    interval = bootstrap_mean(A, n_resamples=500, seed=3, confidence=0.9)
    assert interval.estimate == pytest.approx(A.mean(), abs=1e-15)
    assert [interval.low, interval.high] == pytest.approx(np.percentile(means, [5, 95]), abs=1e-14)
    assert (interval.n, interval.dropped) == (25, 0)


def test_interval_of_the_mean_agrees_with_scipy():
    theirs = stats.bootstrap((A,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    ours = bootstrap_mean(A, n_resamples=20000)
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=2e-3)


def test_ratio_resamples_patients_with_both_values():
    indices = np.random.default_rng(5).integers(0, 25, (400, 25))
    ratios = [B[row].mean() / A[row].mean() for row in indices]
    interval = bootstrap_ratio(A, B, n_resamples=400, seed=5)
    assert interval.estimate == pytest.approx(B.mean() / A.mean(), abs=1e-15)
    assert [interval.low, interval.high] == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=1e-14)
    unpaired = bootstrap_ratio(A, B[::-1], n_resamples=400, seed=5)
    assert unpaired.high - unpaired.low > 3 * (interval.high - interval.low)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        interval = bootstrap_mean(rng.normal(0.8, 0.1, 50), n_resamples=500, seed=seed)
        covered += interval.low <= 0.8 <= interval.high
    assert 0.89 <= covered / 200 <= 0.985


def test_nan_pairs_are_dropped_and_counted():
    a, b = A.copy(), B.copy()
    a[3] = b[3] = b[10] = np.nan
    kept = np.delete(np.arange(25), [3, 10])
    assert bootstrap_ratio(a, b) == bootstrap_ratio_of_kept(A[kept], B[kept], dropped=2)
    assert bootstrap_mean(b).dropped == 2
    test = paired_wilcoxon(a, b)
    assert (test.n, test.dropped) == (23, 2)
    assert test.p == stats.wilcoxon(A[kept], B[kept]).pvalue


def bootstrap_ratio_of_kept(a, b, dropped):
    interval = bootstrap_ratio(a, b)
    return type(interval)(interval.estimate, interval.low, interval.high, interval.n, dropped)


def test_fewer_than_three_patients_give_an_estimate_without_interval():
    interval = bootstrap_mean([0.5, 0.7])
    assert interval.estimate == pytest.approx(0.6)
    assert np.isnan([interval.low, interval.high]).all()
    ratio = bootstrap_ratio([0.5, 0.7, np.nan], [0.25, 0.35, 0.1])
    assert (ratio.estimate, ratio.n, ratio.dropped) == (pytest.approx(0.5), 2, 1)
    assert np.isnan([ratio.low, ratio.high]).all()


def test_nothing_to_average_stays_nan():
    assert np.isnan(bootstrap_mean([np.nan]).estimate)
    assert np.isnan(bootstrap_ratio([np.nan], [1.0]).estimate)
    assert np.isnan(bootstrap_ratio([0.0, 0.0, 0.0], [0.1, 0.2, 0.3]).estimate)


def test_ratio_to_an_arm_that_can_be_zero_in_a_resample_has_no_interval():
    ratio = bootstrap_ratio([0.0, 0.0, 0.9], [0.1, 0.0, 0.3])
    assert ratio.estimate == pytest.approx(0.4 / 0.9)
    assert np.isnan([ratio.low, ratio.high]).all()


def test_arms_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"one value per patient"):
        bootstrap_ratio([1.0, 2.0], [1.0])


def test_wilcoxon_of_equal_arms_is_one_and_of_nothing_is_nan():
    assert paired_wilcoxon(A, A).p == 1.0
    assert np.isnan(paired_wilcoxon([np.nan], [1.0]).p)


def test_holm_by_hand_with_ties_and_nan():
    assert holm([0.01, 0.04, 0.03, np.nan, 0.5]) == pytest.approx([0.04, 0.09, 0.09, np.nan, 0.5], nan_ok=True)
    assert holm([0.6, 0.6]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_conformal_p_counts_null_values_at_least_as_large():
    p = conformal_p_values([0.1, 0.5, 0.9, np.nan, 1.0], [0.5, 0.2, 0.9, np.nan])
    assert p == pytest.approx([1.0, 0.75, 0.5, np.nan, 0.25], nan_ok=True)


def test_summary_of_synthetic_beside_null():
    null = np.arange(1, 101) / 101
    synthetic = np.array([0.5, 0.945, 0.985, 0.999, np.nan])
    s = summarize(synthetic, null)
    assert (s.n, s.n_null) == (4, 100)
    assert s.median == pytest.approx((0.945 + 0.985) / 2)
    assert s.q95_null == np.quantile(null, 0.95)
    assert (s.share_above_q95, s.share_above_q99, s.share_above_max) == (0.75, 0.5, 0.25)
    assert (s.max, s.max_null) == (0.999, 100 / 101)
    assert (s.mean, s.mean_null) == pytest.approx((np.mean(synthetic[:4]), 0.5))
    assert s.p_values[3] == 1 / 101
    assert np.isnan(s.p_values[4])
    with pytest.raises(ValueError, match=r"val or test split"):
        summarize(synthetic, [np.nan])


def test_share_above_a_null_of_few_patients_is_uncertain_however_many_slices_it_has():
    rng = np.random.default_rng(1)
    level = rng.normal(0.9, 0.02, 5)  # patients differ
    null = np.concatenate([rng.normal(level[p], 0.002, 200) for p in range(5)])
    groups = np.repeat([f"p{p}" for p in range(5)], 200)
    values = rng.normal(0.92, 0.02, 1000)
    clustered = bootstrap_share_above(values, null, groups, n_resamples=400)
    naive = bootstrap_share_above(values, null, np.arange(1000), n_resamples=400)
    assert clustered.estimate == naive.estimate == np.mean(values > np.quantile(null, 0.95))
    assert clustered.n == 5
    assert clustered.low <= clustered.estimate <= clustered.high
    assert clustered.high - clustered.low > 3 * (naive.high - naive.low)
    assert np.isnan(bootstrap_share_above(values, null[:400], groups[:400]).low)
