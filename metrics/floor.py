"""The floor of a distance between sets: what real images of other patients get.

Slices of one patient are alike, so two halves of the slices of the same patients are nearer to each other than any
generator can come, and any number looks bad beside them. The floor that means something is between patients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metrics.feature_neighbours import check_features

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BesideFloor:
    """A score and its floor, (seeds,) each: both against the same `n` images of one half of the patients.

    `floor` compares them with n images of the other half, `score` with n generated ones.
    """

    n: int
    score: npt.NDArray[np.float64]
    floor: npt.NDArray[np.float64]


def beside_floor(
    score: Callable[[Tensor, Tensor], float],
    real: Tensor,
    patients: npt.ArrayLike,
    generated: Tensor,
    *,
    n: int | None = None,
    seeds: Iterable[int] = range(5),
) -> BesideFloor:
    """Compute a score of generated features, and the same score of real ones by halves of the patients.

    With few patients the two halves differ by chance, and so the floor is high: the spread over seeds says how much.
    The seeds share the patients, so this spread is no standard error.

    Args:
        score: of (reference, compared) features, (n, D) each; for instance a Fréchet distance.
        real: features (N, D).
        patients: (N,), the patient of each real feature.
        generated: features (M, D).
        n: images of each kind; the most that there are, if None.
        seeds: one division of the patients each.

    Returns:
        Score and floor.

    Raises:
        ValueError: If the features do not fit together, there are fewer than two patients, or fewer than n images in a
            half or generated.
    """
    check_features(real, generated)
    names = np.asarray(patients)
    if names.shape != (len(real),):
        raise ValueError(f"Expected one patient per real image, but got {names.shape} for {len(real)} images.")
    drawn = [(np.random.default_rng((seed, 1)), *halves_of_patients(names, seed)) for seed in seeds]
    most = min(len(generated), *(len(half) for _, *halves in drawn for half in halves))
    n = most if n is None else n
    if n > most:
        raise ValueError(f"Expected n of at most {most}, the images of a half or the generated ones, but got {n}.")
    scores, floors = [], []
    for random, *halves in drawn:
        rows = (random.permutation(half)[:n] for half in (*halves, np.arange(len(generated))))
        a, b, c = (torch.from_numpy(part).to(real.device) for part in rows)
        scores.append(float(score(real[a], generated[c])))
        floors.append(float(score(real[a], real[b])))
    return BesideFloor(n, np.array(scores), np.array(floors))


def halves_of_patients(patients: npt.ArrayLike, seed: int) -> tuple[Rows, Rows]:
    """Rows of two halves of the patients (N,); of an odd number the second half has one more.

    Raises:
        ValueError: If there are fewer than two patients.
    """
    names, numbers = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"Expected images of at least two patients to make halves, but got {len(names)}.")
    first = np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]
    in_first = np.isin(numbers, first)
    return np.flatnonzero(in_first), np.flatnonzero(~in_first)
