"""Membership inference against scikit-learn, loops over resamples, and simulations with a known answer."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as roc_of_sklearn

from metrics.feature_neighbours import nearest_neighbours
from metrics.membership import extractable_share, membership_inference, patient_scores, roc_curve

RNG = np.random.default_rng(3)
MEMBERS = np.round(RNG.normal(0.8, 1, 70), 1)  # rounded: with ties
HELDOUT = np.round(RNG.normal(0.0, 1, 130), 1)
LABELS, SCORES = np.repeat([1, 0], [70, 130]), np.concatenate([MEMBERS, HELDOUT])


def test_curve_equals_scikit_learn():
    fpr, tpr, thresholds = roc_of_sklearn(LABELS, SCORES, drop_intermediate=False)
    ours = roc_curve(MEMBERS, HELDOUT)
    for mine, theirs in zip(ours, (fpr, tpr, thresholds), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1])
def test_area_and_rate_equal_scikit_learn_with_the_bootstrap_written_out(rate):
    found = membership_inference(MEMBERS, HELDOUT, false_positive_rate=rate, n_resamples=50, seed=6)

    def tpr_at(labels, scores):
        fpr, tpr, thresholds = roc_of_sklearn(labels, scores, drop_intermediate=False)
        allowed = fpr <= rate
        return tpr[allowed][-1], fpr[allowed][-1], thresholds[allowed][-1]

    assert found.auc.estimate == pytest.approx(roc_auc_score(LABELS, SCORES), abs=1e-14)
    assert (found.tpr.estimate, found.fpr, found.threshold) == pytest.approx(tpr_at(LABELS, SCORES), abs=1e-15)
    assert found.fpr <= rate
    random, resampled = np.random.default_rng(6), []
    for _ in range(50):
        scores = np.concatenate([random.choice(MEMBERS, 70), random.choice(HELDOUT, 130)])
        resampled.append((roc_auc_score(LABELS, scores), tpr_at(LABELS, scores)[0]))
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    assert (found.auc.low, found.auc.high) == pytest.approx((low[0], high[0]), abs=1e-13)
    assert (found.tpr.low, found.tpr.high) == pytest.approx((low[1], high[1]), abs=1e-13)
    assert (found.auc.n, found.auc.dropped) == (200, 0)


def test_patients_without_a_score_are_dropped_and_few_patients_have_no_interval():
    found = membership_inference([*MEMBERS, np.nan], [np.nan, *HELDOUT], n_resamples=10)
    assert found.auc.estimate == membership_inference(MEMBERS, HELDOUT, n_resamples=10).auc.estimate
    assert found.tpr.dropped == 2
    few = membership_inference([1.0, 2.0], HELDOUT)
    assert np.isnan([few.auc.low, few.auc.high, few.tpr.low, few.tpr.high]).all()
    with pytest.raises(ValueError, match="training and of held-out patients, but got 0 and 130"):
        membership_inference([np.nan], HELDOUT)


def test_fewer_heldout_patients_than_the_rate_needs_allow_no_false_positive():
    found = membership_inference([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 1.0], false_positive_rate=0.01)
    assert (found.tpr.estimate, found.fpr, found.threshold) == (0.5, 0.0, 3.0)


def test_scores_of_slices_become_scores_of_patients_by_the_rule():
    scores, patients = [0.1, 0.9, np.nan, 0.5, np.nan], ["b", "b", "b", "a", "c"]
    largest = patient_scores(scores, patients, "max")
    assert largest.index.tolist() == ["a", "b", "c"]
    assert largest.tolist() == pytest.approx([0.5, 0.9, np.nan], nan_ok=True)
    assert patient_scores(scores, patients, "mean").tolist() == pytest.approx([0.5, 0.5, np.nan], nan_ok=True)
    with pytest.raises(ValueError, match="one patient per score"):
        patient_scores(scores, patients[:3], "max")


def test_nearest_synthetic_distance_finds_the_copied_patients_and_only_the_largest_score_shows_few_copies():
    """Detection by one rule, blindness of the other: one copied slice of 20 vanishes in a mean."""
    random = torch.Generator().manual_seed(0)
    slices = torch.randn(120, 20, 16, generator=random)
    training, heldout = slices[:60], slices[60:]
    synthetic = torch.randn(500, 16, generator=random)
    synthetic[:30] = training[:30, 4] + 0.01  # one slice of every second training patient
    found = {}
    for rule in ("max", "mean"):
        scores = [
            patient_scores(
                -nearest_neighbours(x.flatten(0, 1), synthetic).distance[:, 0].numpy(),
                np.repeat(np.arange(60), 20),
                rule,
            )
            for x in (training, heldout)
        ]
        result = membership_inference(*scores, n_resamples=200)
        found[rule] = result, (scores[0] >= result.threshold).to_numpy()
    (by_max, flagged), (by_mean, flagged_by_mean) = found["max"], found["mean"]
    assert flagged[:30].all()
    assert flagged[30:].sum() <= 3
    assert by_max.tpr.estimate == flagged.mean()
    assert by_max.tpr.low > 0.3
    assert flagged_by_mean[:30].sum() < 10
    assert by_mean.tpr.estimate == flagged_by_mean.mean()


def test_bound_equals_clopper_and_pearson_at_the_rank_that_binomial_sums_give():
    rank = next(r for r in range(1, 131) if stats.binom.cdf(r - 1, 130, 0.05) >= 0.975)
    threshold = np.sort(HELDOUT)[::-1][rank - 1]
    flagged = int((threshold <= MEMBERS).sum())
    found = extractable_share(MEMBERS, HELDOUT, false_positive_rate=0.05)
    interval = stats.binomtest(flagged, 70).proportion_ci(0.95, method="exact")
    assert (found.threshold, found.flagged, found.n, found.n_heldout) == (threshold, flagged, 70, 130)
    assert found.false_alarms == int((threshold <= HELDOUT).sum())
    assert found.upper == pytest.approx(interval.high, rel=1e-12)
    # A hundred patients of whom none is flagged, and all of them.
    assert extractable_share(np.zeros(100), np.arange(1, 101)).upper == pytest.approx(0.0362, abs=1e-4)
    assert extractable_share(np.full(100, 101), np.arange(1, 101)).upper == 1
    assert extractable_share([0.0], [1.0, 2.0], false_positive_rate=0.9).threshold == -np.inf


@pytest.mark.parametrize("shift", [0.0, 2.0])
@pytest.mark.parametrize(("n", "m"), [(40, 30), (200, 300)])
def test_bound_holds_as_often_as_it_says(shift, n, m):
    """Normal scores, of which the true share at the true threshold is known."""
    true = stats.norm.sf(stats.norm.isf(0.05) - shift)
    random = np.random.default_rng(1)
    held = [
        extractable_share(random.normal(shift, 1, n), random.normal(0, 1, m), false_positive_rate=0.05).upper >= true
        for _ in range(400)
    ]
    assert np.mean(held) >= 0.95
