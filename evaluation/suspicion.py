"""The judgement of a search: which synthetic slices are nearer to training slices than chance allows.

A slice is *suspicious* at the false-alarm rate a if its conformal p-value among the slices of held-out patients is a or
less (Vovk et al., "Algorithmic Learning in a Random World", 2005). If synthetic slices were like those of patients whom
the generator has never seen, a share a of them would be. Slices of one patient are alike, so the null is worth as many
observations as it has patients, not slices: intervals resample patients.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from evaluation.sensitivity import Null, threshold
from metrics.statistics import Interval

Floats = npt.NDArray[np.float64]

N_RESAMPLES = 2000
CONFIDENCE = 0.95


def suspicious(statistic: Floats, null: Null, false_alarm_rate: float) -> npt.NDArray[np.bool_]:
    """Say of every slice whether it is suspicious: (n,); NaN never is."""
    flags: npt.NDArray[np.bool_] = np.nan_to_num(statistic, nan=-np.inf) > threshold(null.scores, false_alarm_rate)
    return flags


def share_suspicious(
    statistic: Floats, null: Null, false_alarm_rate: float, *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Interval:
    """Give the share of suspicious slices with the interval of a bootstrap over slices and over patients of the null.

    It is at least as wide as Wilson's: where none is found, resampling alone would claim certainty.

    Args:
        statistic: (n,), n > 0, the larger the nearer; NaN is never suspicious.
        null: the same statistic of held-out patients.
        false_alarm_rate: share of suspicious slices without memorization.
        n_resamples: number of bootstrap samples.
        seed: of the bootstrap.

    Returns:
        The share; n is the number of patients of the null, and below `MIN_PATIENTS` of them the interval is NaN.
    """
    values = np.sort(np.nan_to_num(statistic, nan=-np.inf))
    found = int(suspicious(values, null, false_alarm_rate).sum())
    limits = null.resampled_thresholds([false_alarm_rate], n_resamples, seed)[false_alarm_rate]
    low = high = float("nan")
    if len(limits):
        above = (len(values) - np.searchsorted(values, limits, side="right")) / len(values)
        shares = np.random.default_rng((seed, 1)).binomial(len(values), above) / len(values)
        ends = np.quantile(shares, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        wilson = stats.binomtest(found, len(values)).proportion_ci(CONFIDENCE, method="wilson")
        low, high = float(min(ends[0], wilson.low)), float(max(ends[1], wilson.high))
    missing = int(np.isnan(statistic).sum())
    return Interval(found / len(values), low, high, len(np.unique(null.patients)), missing)


def judge_scores(
    synthetic: pd.DataFrame, held_out: pd.DataFrame, patients: npt.NDArray[np.object_], false_alarm_rate: float
) -> pd.DataFrame:
    """Put every score of synthetic slices beside that of held-out ones.

    Args:
        synthetic: (n, S), a column per score, the larger the nearer.
        held_out: (m, S).
        patients: (m,), of the held-out slices.
        false_alarm_rate: share of suspicious slices without memorization.

    Returns:
        A row per score: score, slices, median, q95, max, median_held_out, q95_held_out, max_held_out, threshold, share
        (of suspicious slices), ci_low, ci_high, held_out_slices, held_out_patients.
    """
    rows = []
    for score in synthetic.columns:
        values, null = synthetic[score].to_numpy(np.float64), held_out[score].to_numpy(np.float64)
        row: dict[str, object] = {"score": score, "slices": len(values)}
        for suffix, numbers in (("", values), ("_held_out", null)):
            known = numbers[~np.isnan(numbers)]
            quantiles = np.quantile(known, [0.5, 0.95, 1.0]) if len(known) else [float("nan")] * 3
            row |= {f"{name}{suffix}": float(q) for name, q in zip(("median", "q95", "max"), quantiles, strict=True)}
        of_patients = Null(null, patients)
        share = share_suspicious(values, of_patients, false_alarm_rate)
        row |= {
            "threshold": threshold(null, false_alarm_rate),
            "share": share.estimate,
            "ci_low": share.low,
            "ci_high": share.high,
            "held_out_slices": len(null),
            "held_out_patients": share.n,
        }
        rows.append(row)
    return pd.DataFrame(rows)


def reproduced_patients(
    nearest: npt.NDArray[np.int64], flags: npt.NDArray[np.bool_], training_patients: npt.NDArray[np.object_]
) -> pd.DataFrame:
    """Say which training patients the suspicious slices come near to.

    Args:
        nearest: (n,), position of the nearest training slice of every synthetic slice.
        flags: (n,), which of them are suspicious.
        training_patients: (N,), the patient of every training slice.

    Returns:
        A row per training patient, those with most suspicious slices first: patient, suspicious (synthetic slices whose
        nearest training slice is of the patient), reproduced (different slices of the patient among these), slices (of
        the patient in the training set).
    """
    hits = pd.DataFrame({"patient": training_patients[nearest[flags]], "nearest": nearest[flags]})
    by_patient = hits.groupby("patient")["nearest"].agg(suspicious="size", reproduced="nunique")
    table = pd.Series(training_patients).value_counts().rename_axis("patient").to_frame("slices")
    table = by_patient.reindex(table.index, fill_value=0).join(table).reset_index()
    table = table.sort_values(["suspicious", "patient"], ascending=[False, True], ignore_index=True)
    return pd.DataFrame(table, columns=["patient", "suspicious", "reproduced", "slices"])
