"""Bootstrap, tests and correction against scipy and against loops written out."""

import numpy as np
import pytest
from scipy import stats

from metrics.statistics import (
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_share_above,
    conformal_p_values,
    effect_sizes,
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


def test_difference_is_that_of_paired_means():
    indices = np.random.default_rng(5).integers(0, 25, (400, 25))
    differences = [(B - A)[row].mean() for row in indices]
    interval = bootstrap_difference(A, B, n_resamples=400, seed=5)
    assert interval.estimate == pytest.approx((B - A).mean(), abs=1e-15)
    assert [interval.low, interval.high] == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=1e-14)
    assert np.isnan([bootstrap_difference(A[:2], B[:2]).low, bootstrap_difference([], []).estimate]).all()


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


def test_effect_sizes_by_hand():
    effect = effect_sizes([0.5, 0.5, 0.5, 0.5, np.nan], [0.6, 0.8, 0.5, 0.3, 0.9])
    differences = np.array([0.1, 0.3, 0.0, -0.2])
    assert effect.d_z == pytest.approx(differences.mean() / np.sqrt(((differences - 0.05) ** 2).sum() / 3))
    assert effect.rank_biserial == pytest.approx((1 + 3 - 2) / (1 + 2 + 3))  # the equal pair has no rank
    assert (effect.n, effect.dropped) == (4, 1)


def test_effect_sizes_agree_with_the_paired_tests():
    effect = effect_sizes(A, B)
    assert effect.d_z == pytest.approx(stats.ttest_rel(B, A).statistic / np.sqrt(25))
    signed_rank = stats.wilcoxon(B, A, alternative="greater").statistic  # sum of the ranks that speak for B
    assert effect.rank_biserial == pytest.approx(2 * signed_rank / (25 * 26 / 2) - 1)
    assert effect.d_z < -1
    swapped = effect_sizes(B, A)
    assert (swapped.d_z, swapped.rank_biserial) == (-effect.d_z, -effect.rank_biserial)


def test_rank_biserial_equals_a_count_over_pairs_of_patients():
    rng = np.random.default_rng(2)
    differences = rng.permutation([-4, -2, -2, -1, 0, 1, 2, 3, 5, 6]) / 8  # ties and a zero
    changed = differences[differences != 0]
    averages = changed[:, None] + changed[None]  # Walsh: ranks are counts of them
    upper = averages[np.triu_indices(changed.size)]
    for_b, against = np.sum(upper > 0) + np.sum(upper == 0) / 2, np.sum(upper < 0) + np.sum(upper == 0) / 2
    effect = effect_sizes(np.zeros(10), differences)
    assert effect.rank_biserial == pytest.approx((for_b - against) / upper.size)


def test_effects_without_a_difference_or_without_pairs():
    none = effect_sizes(A, A)
    assert (none.d_z, none.rank_biserial, none.n) == (0, 0, 25)
    nothing = effect_sizes([np.nan], [1.0])
    assert np.isnan([nothing.d_z, nothing.rank_biserial]).all()
    assert (nothing.n, nothing.dropped) == (0, 1)
    single = effect_sizes([0.25], [0.5])
    assert (np.isnan(single.d_z), single.rank_biserial) == (True, 1.0)
    assert effect_sizes([0.25, 0.5], [0.0, 0.25]).d_z == -np.inf


def arms_of_seeds(n_patients=12, luck=0.05):
    """Three seeds of one arm and two of another: each training is lucky or not on all patients alike."""
    rng = np.random.default_rng(4)
    patient = rng.uniform(0.5, 0.9, (n_patients, 1))
    a = patient + luck * np.array([-1, 0, 1]) + rng.normal(0, 0.01, (n_patients, 3))
    b = 0.9 * patient + luck * np.array([-1, 1]) + rng.normal(0, 0.01, (n_patients, 2))
    return a, b


def test_intervals_over_seeds_equal_a_loop_that_draws_patients_and_seeds():
    a, b = arms_of_seeds()
    rng = np.random.default_rng(11)
    rows, seeds_a, seeds_b = rng.integers(0, 12, (300, 12)), rng.integers(0, 3, (300, 3)), rng.integers(0, 2, (300, 2))
    means_a = [a[np.ix_(row, drawn)].mean() for row, drawn in zip(rows, seeds_a, strict=True)]
    means_b = [b[np.ix_(row, drawn)].mean() for row, drawn in zip(rows, seeds_b, strict=True)]
    mean = bootstrap_mean(a, n_resamples=300, seed=11)
    assert mean.estimate == pytest.approx(a.mean(), abs=1e-15)
    assert [mean.low, mean.high] == pytest.approx(np.percentile(means_a, [2.5, 97.5]), abs=1e-14)
    ratio = bootstrap_ratio(a, b, n_resamples=300, seed=11)
    assert ratio.estimate == pytest.approx(b.mean() / a.mean(), abs=1e-15)
    expected = np.percentile(np.divide(means_b, means_a), [2.5, 97.5])
    assert [ratio.low, ratio.high] == pytest.approx(expected, abs=1e-14)


def test_one_seed_as_a_table_is_the_same_as_a_list_of_patients():
    assert bootstrap_mean(A[:, None]) == bootstrap_mean(A)
    assert bootstrap_ratio(A[:, None], B) == bootstrap_ratio(A, B)
    assert effect_sizes(A[:, None], B[:, None]) == effect_sizes(A, B)


def test_interval_holds_the_luck_of_trainings_that_more_patients_do_not_average_away():
    wide = bootstrap_mean(arms_of_seeds(n_patients=400)[0])
    alike = bootstrap_mean(arms_of_seeds(n_patients=400, luck=0)[0])
    assert wide.high - wide.low > 3 * (alike.high - alike.low)
    a, _ = arms_of_seeds(n_patients=400)
    of_the_means = bootstrap_mean(a.mean(axis=1))
    assert wide.high - wide.low > 3 * (of_the_means.high - of_the_means.low)


def test_tests_and_effects_take_the_mean_over_seeds_so_seeds_are_not_patients():
    a, b = arms_of_seeds()
    test = paired_wilcoxon(a, b)
    assert (test.n, test.p) == (12, stats.wilcoxon(a.mean(axis=1), b.mean(axis=1)).pvalue)
    assert effect_sizes(a, b) == effect_sizes(a.mean(axis=1), b.mean(axis=1))
    doubled = paired_wilcoxon(np.tile(a, 2), np.tile(b, 2))
    assert (doubled.n, doubled.p) == (12, pytest.approx(test.p))


def test_missing_seeds_of_a_patient_take_the_mean_of_the_others_and_none_drops_the_patient():
    a, b = arms_of_seeds()
    a[2, 1] = np.nan
    a[5] = np.nan
    b[7] = np.nan
    filled = a.copy()
    filled[2, 1] = (a[2, 0] + a[2, 2]) / 2
    kept = np.delete(np.arange(12), [5, 7])
    mean = bootstrap_mean(a)
    assert (mean.n, mean.dropped) == (11, 1)
    assert mean.estimate == pytest.approx(np.nanmean(np.nanmean(np.delete(a, 5, axis=0), axis=1)), abs=1e-15)
    ratio, complete = bootstrap_ratio(a, b), bootstrap_ratio(filled[kept], b[kept])
    assert (ratio.estimate, ratio.low, ratio.high) == (complete.estimate, complete.low, complete.high)
    assert (ratio.n, ratio.dropped) == (10, 2)
    assert paired_wilcoxon(a, b).p == paired_wilcoxon(filled[kept], b[kept]).p


def test_tables_that_are_not_patients_by_seeds_are_refused():
    for wrong in (np.ones((3, 2, 2)), np.ones((3, 0)), 0.5):
        with pytest.raises(ValueError, match=r"\(patients, seeds\)"):
            bootstrap_mean(wrong)
    with pytest.raises(ValueError, match=r"but got 12 and 11 patients"):
        paired_wilcoxon(arms_of_seeds()[0], arms_of_seeds()[1][1:])


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
