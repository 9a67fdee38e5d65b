"""Mode collapse: are the images of a synthetic set too much alike?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor

from metrics.feature_neighbours import blocks, check_features, nearest_others
from metrics.statistics import MIN_PATIENTS, Interval

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
PARTS = 20
"""Into which patients and images are divided for the jackknife."""


@dataclass(frozen=True)
class Duplicates:
    """How near synthetic images lie to each other, over several draws of `n` of them, one per real patient.

    `share` of them has a nearest other one below `threshold`, below which a share `false_alarm_rate` of real images
    has its nearest of another patient. `pairs` (draws x n, 2) are rows of the synthetic set, each drawn one with the
    nearest of its draw, and `distance` (draws x n,) is how near.
    """

    share: Interval
    threshold: float
    false_alarm_rate: float
    n: int
    pairs: Rows
    distance: Floats


def duplicates(
    generated: Tensor,
    real: Tensor,
    patients: npt.ArrayLike,
    *,
    false_alarm_rate: float = 0.01,
    draws: int = 10,
    seed: int = 0,
    confidence: float = 0.95,
) -> Duplicates:
    """Find synthetic images that are nearer to another one than real images of different patients are to each other.

    A nearest neighbour is the nearer the more images there are, and slices of one patient count for little more than
    one. So a draw takes one image of every patient and as many synthetic ones: if both follow one law, and the
    synthetic images are independent, the share is the false-alarm rate (and up to 1 / n more on average).

    The interval is that of a jackknife which leaves out a twentieth of the patients and of the images at a time (Kott,
    J. Official Statistics 17, 2001): two images have one distance, which a bootstrap takes for two.

    Blind to copies of training images, as long as they are of different ones; to repetitions so rare that no draw
    holds both images; and to what the features do not show.

    Args:
        generated: features (M, D).
        real: features (N, D).
        patients: (N,), the patient of each real feature.
        false_alarm_rate: share of the real images below the threshold.
        draws: of one image per patient; of as many random patients as there are synthetic images, if these are fewer.
        seed: of the drawing.
        confidence: coverage of the interval.

    Returns:
        The share with its interval, whose n is the number of patients, and every pair.

    Raises:
        ValueError: If the features do not fit together, or there are fewer than `MIN_PATIENTS` patients or images.
    """
    check_features(real, generated, least=MIN_PATIENTS)
    names, numbers = np.unique(np.asarray(patients), return_inverse=True)
    if len(numbers) != len(real):
        raise ValueError(f"Expected one patient per real image, but got {len(numbers)} for {len(real)} images.")
    if len(names) < MIN_PATIENTS:
        raise ValueError(f"Expected real images of at least {MIN_PATIENTS} patients, but got {', '.join(names)}.")
    n = min(len(names), len(generated))
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(names))[:n]
    parts = min(PARTS, n)
    part = np.arange(n) % parts
    part_of_patient = np.empty(len(names), np.int64)
    part_of_patient[chosen] = part
    of_chosen = np.flatnonzero(np.isin(numbers, chosen))
    drawn = []
    for _ in range(draws):
        order = random.permutation(of_chosen)
        _, first = np.unique(numbers[order], return_index=True)  # a random image of every patient
        drawn.append((order[first], random.permutation(len(generated))[:n]))

    def distances(left_out: int) -> tuple[Floats, Floats, Rows]:
        """Of real and of synthetic images to their nearest others; and the pairs of the latter."""
        null = [_nearest(real, rows[part_of_patient[numbers[rows]] != left_out]) for rows, _ in drawn]
        near = [_nearest(generated, rows[part != left_out]) for _, rows in drawn]
        return _joined(null)[0], *_joined(near)

    null, near, pairs = distances(-1)
    threshold = float(np.quantile(null, false_alarm_rate))
    share = float((near < threshold).mean())
    kept = (distances(left_out) for left_out in range(parts))
    without = np.array([(x < np.quantile(y, false_alarm_rate)).mean() for y, x, _ in kept])
    error = np.sqrt((parts - 1) * without.var()) * stats.t.ppf((1 + confidence) / 2, parts - 1)
    interval = Interval(share, max(0.0, share - error), min(1.0, share + error), len(names), 0)
    return Duplicates(interval, threshold, false_alarm_rate, n, pairs, near)


def _nearest(features: Tensor, rows: Rows) -> tuple[Floats, Rows]:
    """Distance of each of these rows to the nearest other one, and the pairs (n, 2) of rows."""
    found = nearest_others(features[torch.from_numpy(rows).to(features.device)])
    return found.distance[:, 0].cpu().numpy(), np.stack([rows, rows[found.index[:, 0].cpu().numpy()]], 1)


def _joined(parts: list[tuple[Floats, Rows]]) -> tuple[Floats, Rows]:
    return np.concatenate([distance for distance, _ in parts]), np.concatenate([pairs for _, pairs in parts])


def vendi_score(features: Tensor) -> float:
    """Effective number of different images of a set (Friedman and Dieng 2023, TMLR, arXiv 2210.02410).

    exp(-sum l log l) over the eigenvalues l of the matrix of cosine similarities over N, which are those of the (D, D)
    matrix of second moments of the normalized features.

    At most D, so it says little of large sets in few features; blind to whether the images are any good, and to some
    duplicates among many others.

    Args:
        features: (N, D), none of them zero.

    Returns:
        From 1 (all alike) to min(N, D).

    Raises:
        ValueError: If there are no features, or one is zero.
    """
    check_features(features, features, "first", "second", 1)
    moment = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for rows, part in blocks(features):
        length = part.double().norm(dim=1, keepdim=True)
        if bool((length == 0).any()):
            raise ValueError(f"Features must not be zero; those of an image in {rows.start}..{rows.stop - 1} are.")
        part = part.double() / length
        moment.addmm_(part.t(), part)
    values = torch.linalg.eigvalsh(moment / len(features)).clamp(min=0)
    return float((-torch.xlogy(values, values).sum()).exp())
