"""What is suspicious: against conformal p-values, closed forms and brute force."""

import numpy as np
import pandas as pd
import pytest

from datamodules.slice_set import SliceSet
from evaluation.detectors import EmbeddingDetector, PixelDetector
from evaluation.memorization import check_null, judge
from evaluation.nearness import JOINT_SCORES, JointStatistic
from evaluation.pixel_search import PixelSearch
from evaluation.sensitivity import Null
from evaluation.suspicion import judge_scores, reproduced_patients, share_suspicious, suspicious
from metrics.statistics import conformal_p_values


def null_of(slices_per_patient, patients, seed=0, spread=0.0):
    rng = np.random.default_rng(seed)
    of_patient = spread * rng.standard_normal(patients)
    scores = (of_patient[:, None] + rng.standard_normal((patients, slices_per_patient))).ravel()
    return Null(scores, np.repeat(np.array([f"H{i}" for i in range(patients)], dtype=object), slices_per_patient))


def correlations(count, seed):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(np.tanh(rng.normal(1.5, 0.2, (count, len(JOINT_SCORES)))), columns=list(JOINT_SCORES))


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_a_slice_is_suspicious_if_its_conformal_p_value_is_at_most_the_rate(rate):
    null = null_of(37, 5)
    values = np.append(np.random.default_rng(1).normal(1, 2, 500), np.nan)
    expected = conformal_p_values(values, null.scores) <= rate  # NaN is not
    np.testing.assert_array_equal(suspicious(values, null, rate), expected)
    assert share_suspicious(values, null, rate).estimate == expected.mean()
    assert share_suspicious(values, null, rate).dropped == 1


def test_the_interval_covers_the_rate_where_nothing_is_memorized():
    """Synthetic slices of many patients, like those of the null: their share is the rate, whoever was drawn."""
    rate, covered, runs = 0.05, 0, 60
    for seed in range(runs):
        null = null_of(20, 30, seed=(seed, 0), spread=0.5)
        values = null_of(1, 2000, seed=(seed, 1), spread=0.5).scores
        interval = share_suspicious(values, null, rate, n_resamples=400)
        covered += interval.low <= rate <= interval.high
    assert covered >= 0.85 * runs  # a percentile bootstrap of 30 patients covers a little less than 95 %


def test_few_patients_give_no_interval_and_no_slices_no_certainty():
    few = share_suspicious(np.zeros(10), null_of(40, 2), 0.05)
    assert np.isnan([few.low, few.high]).all()
    none = share_suspicious(np.full(100, -9.0), null_of(40, 6), 0.05)
    assert (none.estimate, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1.96**2 / (100 + 1.96**2), rel=1e-3)  # Wilson's limit for 0 of 100


def test_the_joint_statistic_is_the_largest_standardized_correlation():
    usual, new = correlations(400, 0), correlations(7, 1)
    joint = JointStatistic.fit(usual)
    z = (np.arctanh(new) - np.arctanh(usual).mean()) / np.arctanh(usual).std(ddof=1)
    np.testing.assert_allclose(joint(new), z.max(axis=1), rtol=1e-12)
    new.loc[0, "T2"] = 1.0  # a copy in one modality is above everything, and finite
    new.loc[1] = np.nan
    new.loc[2, "T1"] = np.nan
    found = joint(new)
    assert 20 < found[0] < 1000
    assert np.isnan(found[1])
    assert found[2] == pytest.approx(z.drop(columns="T1").loc[2].max())
    with pytest.raises(ValueError, match="differ in their correlations, but got 1 like"):
        JointStatistic.fit(usual[:1])


def test_every_score_stands_beside_its_null():
    synthetic, held_out = correlations(300, 2) ** 0.9, correlations(90, 3)
    patients = np.repeat(np.array(["A", "B", "C"], dtype=object), 30)
    table = judge_scores(synthetic, held_out, patients, 0.1).set_index("score")
    assert list(table.index) == list(JOINT_SCORES)
    for score in JOINT_SCORES:
        row = table.loc[score]
        assert row["share"] == (conformal_p_values(synthetic[score], held_out[score]) <= 0.1).mean()
        assert (row["median"], row["max_held_out"]) == (synthetic[score].median(), held_out[score].max())
        assert (row["slices"], row["held_out_slices"], row["held_out_patients"]) == (300, 90, 3)
        assert row["ci_low"] <= row["share"] <= row["ci_high"]


def test_patients_are_named_by_how_often_they_are_reproduced():
    patients = np.array(["A", "A", "B", "C"], dtype=object)
    table = reproduced_patients(np.array([0, 1, 1, 2, -1]), np.array([True, True, True, False, False]), patients)
    assert table.values.tolist() == [["A", 3, 2, 2], ["B", 0, 0, 1], ["C", 0, 0, 1]]


def embed(slices):
    flat = slices[:, :4].reshape(len(slices), -1).astype(np.float32)[:, ::7] - 60
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


@pytest.fixture
def sides(slice_set):
    return SliceSet(slice_set, "train"), SliceSet(slice_set, "test")


def test_both_detectors_find_copies_and_judge_sets_as_slices(sides, tmp_path):
    training, held_out = sides
    search = PixelSearch(k=2, max_shift_px=1)
    copies = training.subset([30, 2, 17])
    for detector in (
        PixelDetector(training, held_out, search, tmp_path, null_slices=20),
        EmbeddingDetector(training, held_out, embed),
    ):
        found = detector.of_set("synthetic", copies)
        assert found.nearest.tolist() == [30, 2, 17]
        np.testing.assert_array_equal(found.statistic, detector.of_slices(copies.read(range(3))))
        assert suspicious(found.statistic, detector.null, 0.1).all()
        assert len(detector.null.scores) == len(held_out)
        assert not (detector.held_out.statistic > found.statistic.min()).any()
        patient = training.index["patient"].to_numpy(dtype=object)
        assert set(patient[found.nearest]) == set(copies.patients)


def test_the_nulls_of_pixels_are_apart(sides, tmp_path):
    """Location and scale are from the training patients; the held-out ones calibrate alone."""
    training, held_out = sides
    search = PixelSearch(k=1, mirror=False, max_shift_px=0)
    whole = PixelDetector(training, held_out, search, tmp_path)
    part = PixelDetector(training, held_out.subset(range(3)), search, tmp_path)
    pd.testing.assert_series_equal(whole.joint.mean, part.joint.mean)
    np.testing.assert_array_equal(whole.null.scores[:3], part.null.scores)


def test_suspicious_slices_are_listed_the_nearest_first(sides, tmp_path):
    training, held_out = sides
    detector = PixelDetector(training, held_out, PixelSearch(max_shift_px=0), tmp_path)
    mixture = SliceSet(training.root).subset([*np.flatnonzero(SliceSet(training.root).index["split"] == "test")[:4]])
    nothing = judge(detector, detector.of_set("synthetic", mixture), training, 0.01)
    assert len(nothing["suspicious"]) == 0
    assert (nothing["patients"]["suspicious"] == 0).all()
    copies = judge(detector, detector.of_set("synthetic", training.subset([4, 5, 20])), training, 0.1)
    assert sorted(copies["suspicious"]["position"]) == [0, 1, 2]
    assert copies["suspicious"]["statistic"].is_monotonic_decreasing
    assert copies["judgement"].set_index("score").loc["joint", "share"] == 1.0
    assert copies["patients"]["suspicious"].sum() == 3


def test_a_null_that_can_make_nothing_suspicious_is_refused(slice_set):
    held_out = SliceSet(slice_set, "test")
    check_null(held_out, 1 / (len(held_out) + 1))
    with pytest.raises(ValueError, match=r"false_alarm_rate=0.01 needs 99 slices of held-out patients .* there are 13"):
        check_null(held_out, 0.01)
    with pytest.raises(ValueError, match=r"false_alarm_rate=1: expected a number between 0 and 1"):
        check_null(held_out, 1)
