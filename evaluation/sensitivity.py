"""How often a detector finds planted positives, at a stated rate of false alarms among held-out real slices.

A detector is any function that gives a slice a number, the higher the more suspicious: its largest correlation with a
training slice, the cosine of its embedding with the nearest one. A slice is detected at the false-alarm rate a if its
conformal p-value (Vovk et al., "Algorithmic Learning in a Random World", 2005) among the m slices of the null is a or
less, that is, if it lies above the k-th largest of them, k = floor(a (m + 1)). A null of fewer than 1 / a - 1 slices
can detect nothing at that rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from datamodules.slice_set import Slices, SliceSet
from evaluation.planted import KINDS, Kind, plant_in
from metrics.statistics import MIN_PATIENTS

Floats = npt.NDArray[np.float64]
Score = Callable[[Slices], Floats]
"""uint8 (N, 5, H, W) -> (N,), the higher the more suspicious; NaN where a slice cannot be judged, as a constant one."""

FALSE_ALARM_RATES = (0.01, 0.05)


@dataclass(frozen=True)
class Null:
    """What a detector says of real slices that no generator has seen.

    Attributes:
        scores: (m,); NaN, which raises no alarm, is the lowest.
        patients: (m,), of which patient each slice is.
    """

    scores: Floats
    patients: npt.NDArray[np.object_]

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.patients) or not len(self.scores):
            raise ValueError(
                f"Expected a null with one patient per score, but got {len(self.scores)} scores and "
                f"{len(self.patients)} patients."
            )

    def resampled_thresholds(self, false_alarm_rates: Sequence[float], count: int, seed: int) -> dict[float, Floats]:
        """Give `threshold` at every rate in `count` bootstrap samples of the patients.

        Returns:
            rate -> (count,); empty below `MIN_PATIENTS` patients.
        """
        members = _by_patient(self.scores, self.patients)
        rng = np.random.default_rng((seed, 0))
        nulls = (
            np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
            for _ in range(count if len(members) >= MIN_PATIENTS else 0)
        )
        limits = [[threshold(scores, rate) for rate in false_alarm_rates] for scores in nulls]
        return dict(zip(false_alarm_rates, np.array(limits).reshape(-1, len(false_alarm_rates)).T, strict=True))


def threshold(scores: Floats, false_alarm_rate: float) -> float:
    """Give the number above which a score is an alarm: the k-th largest of the null, infinity if k = 0."""
    k = math.floor(false_alarm_rate * (len(scores) + 1) + 1e-9)
    if not k:
        return math.inf
    lowest_first = np.sort(np.nan_to_num(scores, nan=-np.inf))
    return float(lowest_first[-k])


def sensitivity(
    score: Score,
    null: Null,
    training: SliceSet,
    *,
    kinds: Sequence[Kind] = KINDS,
    planted: int = 256,
    false_alarm_rates: Sequence[float] = FALSE_ALARM_RATES,
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Measure the detection rate of every kind of positive.

    The interval is that of a bootstrap over the patients of the positives and, for the threshold, those of the null;
    the slices of a patient stay together. It is at least as wide as Wilson's for independent slices: where all are
    found, resampling alone would claim certainty.

    Args:
        score: the detector, which compares with all of `training`.
        null: its scores of held-out patients against the same training set.
        training: positives are planted from its slices; see `plant_in`.
        kinds: of positives.
        planted: positives of each kind.
        false_alarm_rates: shares of the null above the threshold.
        n_resamples: number of bootstrap samples.
        seed: of the positives and the bootstrap.
        confidence: coverage of the interval.

    Returns:
        A row per kind and rate: kind, false_alarm_rate, threshold, rate (of detection), ci_low, ci_high, detected,
        slices, patients, null_slices, null_patients. The interval is NaN below `MIN_PATIENTS` patients on either side.
    """
    limits = null.resampled_thresholds(false_alarm_rates, n_resamples, seed)
    rows = []
    for kind in kinds:
        positives = plant_in(training, kind, planted, seed)
        scores = np.nan_to_num(np.asarray(score(positives.slices), np.float64), nan=-np.inf)
        patients = positives.table["source_patient"].to_numpy(dtype=object)
        for rate in false_alarm_rates:
            limit = threshold(null.scores, rate)
            detected = int((scores > limit).sum())
            low, high = _interval(scores, patients, limits[rate], seed, confidence)
            wilson = stats.binomtest(detected, len(scores)).proportion_ci(confidence, method="wilson")
            rows.append(
                {
                    "kind": kind,
                    "false_alarm_rate": rate,
                    "threshold": limit,
                    "rate": detected / len(scores),
                    "ci_low": float(np.minimum(low, wilson.low)),
                    "ci_high": float(np.maximum(high, wilson.high)),
                    "detected": detected,
                    "slices": len(scores),
                    "patients": len(np.unique(patients)),
                    "null_slices": len(null.scores),
                    "null_patients": len(np.unique(null.patients)),
                }
            )
    return pd.DataFrame(rows)


def _interval(
    scores: Floats, patients: npt.NDArray[np.object_], limits: Floats, seed: int, confidence: float
) -> tuple[float, float]:
    """Percentiles of the detection rate over resampled patients, each time at another one of the limits (count,)."""
    members = _by_patient(scores, patients)
    if not len(limits) or len(members) < MIN_PATIENTS:
        return math.nan, math.nan
    sizes = np.array([len(part) for part in members])
    above = np.stack([len(p) - np.searchsorted(np.sort(p), limits, side="right") for p in members])
    rng = np.random.default_rng((seed, 1))
    drawn = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), len(limits))  # (count, patients)
    rates = (drawn * above.T).sum(axis=1) / (drawn @ sizes)
    low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _by_patient(scores: Floats, patients: npt.NDArray[np.object_]) -> list[Floats]:
    return [scores[patients == patient] for patient in np.unique(patients)]
