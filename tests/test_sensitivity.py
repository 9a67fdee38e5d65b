"""Detection rates of planted positives: thresholds against conformal p-values, intervals against closed forms."""

import math

import numpy as np
import pytest

from datamodules.slice_set import SliceSet
from evaluation.sensitivity import Null, sensitivity, threshold
from metrics.statistics import conformal_p_values

PATIENTS = ["P0", "P1", "P2", "P3", "P4"]


@pytest.fixture
def training(slice_set):
    return SliceSet(slice_set, "train")


def scored_by(training, value_of):
    """A detector that knows the training slices: value_of(patient, number of the slice in it); -1 for all others."""
    patients = training.index["patient"].to_numpy()
    number = training.index.groupby("patient").cumcount().to_numpy()
    known = {one.tobytes(): row for row, one in enumerate(training.read(range(len(training))))}

    def score(slices):
        rows = [known.get(one.tobytes()) for one in slices]
        return np.array([-1.0 if row is None else value_of(patients[row], number[row]) for row in rows])

    return score


def null_of(values):
    """A null with the same number of slices of every patient."""
    patients = np.repeat(np.array([f"H{i}" for i in range(len(values))], dtype=object), len(values[0]))
    return Null(np.concatenate(values), patients)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.07, 0.29, 0.5])
@pytest.mark.parametrize("count", [3, 19, 98, 99, 100, 250])
def test_threshold_raises_an_alarm_where_the_conformal_p_value_is_at_most_the_rate(rate, count):
    rng = np.random.default_rng(count)
    null = rng.integers(0, 60, count).astype(float)  # with ties
    values = np.arange(-1.0, 62.0)
    alarm = values > threshold(null, rate)
    np.testing.assert_array_equal(alarm, conformal_p_values(values, null) <= rate)
    assert (null > threshold(null, rate)).mean() <= rate


def test_what_cannot_be_judged_raises_no_alarm():
    null = np.concatenate([np.arange(18.0), [np.nan]])
    assert threshold(null, 0.05) == 17
    assert threshold(null, 0.1) == 16
    assert threshold(np.full(100, np.nan), 0.05) == -math.inf
    assert threshold(np.arange(18.0), 0.05) == math.inf


def test_rates_are_those_above_the_threshold(training):
    found = scored_by(training, lambda patient, number: np.nan if patient == "P4" else 0.5 + 0.1 * (number < 3))
    null = null_of([np.linspace(0, 0.55, 100)] * 3)
    table = sensitivity(found, null, training, kinds=("exact", "mirrored"), planted=1000, false_alarm_rates=(0.05, 0.2))
    exact = table[table["kind"] == "exact"].set_index("false_alarm_rate")
    not_p4 = (training.index["patient"] != "P4").sum()
    assert exact["detected"].to_dict() == {0.05: 12, 0.2: not_p4}
    assert exact["threshold"].to_dict() == {rate: threshold(null.scores, rate) for rate in (0.05, 0.2)}
    assert exact["rate"].tolist() == pytest.approx([12 / len(training), not_p4 / len(training)])
    assert (table[table["kind"] == "mirrored"]["detected"] == 0).all()
    counts = table[["slices", "patients", "null_slices", "null_patients"]].drop_duplicates().to_numpy().tolist()
    assert counts == [[len(training), 5, 300, 3]]


def test_where_all_are_found_the_interval_is_wilsons(training):
    null = null_of([np.linspace(0, 0.5, 30)] * 4)
    row = sensitivity(scored_by(training, lambda *_: 1.0), null, training, kinds=("exact",), planted=20).iloc[1]
    z = 1.959963984540054
    assert (row["rate"], row["ci_high"]) == (1.0, 1.0)
    assert row["ci_low"] == pytest.approx(20 / (20 + z**2))


def test_patients_of_the_positives_are_resampled(training):
    """Rates of 0 and 1 in halves of 4 patients with equally many slices: 0 of 4 detected has probability 1/16."""
    few = training.subset((training.index["patient"].isin(PATIENTS[:4]) & (training.index["z"] < 6)).to_numpy())
    found = scored_by(training, lambda patient, number: float(patient in ("P0", "P1")))
    null = null_of([np.full(30, 0.5)] * 3)
    row = sensitivity(found, null, few, kinds=("exact",), planted=1000, false_alarm_rates=(0.05,)).iloc[0]
    assert (row["slices"], row["rate"], row["ci_low"], row["ci_high"]) == (24, 0.5, 0.0, 1.0)
    narrow = sensitivity(
        found, null, few, kinds=("exact",), planted=1000, false_alarm_rates=(0.05,), confidence=0.8, n_resamples=20000
    ).iloc[0]
    assert (narrow["ci_low"], narrow["ci_high"]) == (0.25, 0.75)  # 1/16 < 0.1 < 5/16


def test_patients_of_the_null_are_resampled(training):
    """The highest of 3 null patients is drawn in 19 of 27 resamples, and only then no positive is found."""
    null = null_of([np.full(20, value) for value in (1.0, 2.0, 3.0)])
    found = scored_by(training, lambda *_: 2.5)
    options = {"kinds": ("exact",), "planted": 1000, "false_alarm_rates": (0.05,)}
    row = sensitivity(found, null, training, **options).iloc[0]
    assert (row["threshold"], row["rate"], row["ci_low"], row["ci_high"]) == (3.0, 0.0, 0.0, 1.0)
    certain = sensitivity(found, null, training, **options, confidence=0.3).iloc[0]  # 8/27 < 0.35
    assert certain["ci_high"] < 0.1


def test_few_patients_give_no_interval(training):
    found = scored_by(training, lambda *_: 1.0)
    two = training.subset(training.index["patient"].isin(["P0", "P1"]).to_numpy())
    for null, positives in ((null_of([np.zeros(30)] * 2), training), (null_of([np.zeros(30)] * 3), two)):
        row = sensitivity(found, null, positives, kinds=("exact",), planted=5, false_alarm_rates=(0.05,)).iloc[0]
        assert row["rate"] == 1.0
        assert np.isnan([row["ci_low"], row["ci_high"]]).all()


def test_null_without_one_patient_per_score_is_refused():
    for scores, patients in (([1.0, 2.0], ["a"]), ([], [])):
        with pytest.raises(ValueError, match="one patient per score"):
            Null(np.array(scores), np.array(patients, dtype=object))
