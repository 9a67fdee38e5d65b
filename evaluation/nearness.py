"""How near slices come to a training set, by several scores, and one statistic of them all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.slice_set import MODALITIES

Floats = npt.NDArray[np.float64]

JOINT_SCORES = (*MODALITIES, "all", *(f"brain {name}" for name in MODALITIES), "brain all")
"""What enters the joint statistic: Pearson in every modality and over all, over the whole image and within the brain.

The label alone is left out, as it is empty in many slices, and distances, as they follow brightness.
"""
LARGEST_R = 1 - 1e-9
"""Correlations count as at most that, so that those of copies have a finite z."""


@dataclass(frozen=True)
class Nearness:
    """The nearest training slice of n slices by S scores.

    Attributes:
        values: (n, S), a column per score, the larger the nearer; NaN where a slice has none, as constant ones.
        nearest: (n, S), positions in the training set; -1 where there is none.
    """

    values: pd.DataFrame
    nearest: pd.DataFrame

    @staticmethod
    def of_search(table: pd.DataFrame) -> Nearness:
        """Take the first ranks of a pixel search; of distances the negative."""
        first = table[table["rank"] == 1]
        values = first.pivot(index="position", columns="score", values="value")
        nearest = first.pivot(index="position", columns="score", values="nearest")
        return Nearness(larger_is_nearer(values), nearest)


def larger_is_nearer(values: pd.DataFrame) -> pd.DataFrame:
    """Change the sign of distances."""
    values = values.copy()
    for column in values.columns:
        if str(column).startswith("distance"):
            values[column] = -values[column]
    return values


@dataclass(frozen=True)
class JointStatistic:
    """One number for the correlations of a slice: how far the most unusual one lies above what is usual.

    z = (artanh r - m) / s in each score, with the mean m and the standard deviation s of slices that owe nothing to
    the slices that they were compared with; the statistic is the largest z. It is to be calibrated on other slices than
    those that m and s are from: its distribution is not known.

    Attributes:
        mean: m of every score.
        deviation: s of every score.
    """

    mean: pd.Series
    deviation: pd.Series

    @staticmethod
    def fit(values: pd.DataFrame) -> JointStatistic:
        """Take m and s from correlations (n, S), a column per score.

        Raises:
            ValueError: if a score is the same in all slices, or there are fewer than two.
        """
        z = _artanh(values[list(JOINT_SCORES)])
        fitted = JointStatistic(z.mean(), z.std())
        if not (fitted.deviation > 0).all():
            raise ValueError(f"Expected slices that differ in their correlations, but got {len(values)} like ones.")
        return fitted

    def z(self, values: pd.DataFrame) -> pd.DataFrame:
        """Give z of every score, (n, S)."""
        scores = list(self.mean.index)
        return (_artanh(values[scores]) - self.mean) / self.deviation

    def __call__(self, values: pd.DataFrame) -> Floats:
        """Give the statistic, (n,); NaN where no score has a value."""
        return self.z(values).max(axis=1).to_numpy(np.float64)


def _artanh(r: pd.DataFrame) -> pd.DataFrame:
    return r.astype(np.float64).clip(-LARGEST_R, LARGEST_R).apply(np.arctanh)
