"""Precision, recall, density and coverage: do generated features lie where real ones do, and the other way round?

A manifold is the union of the balls around its features that reach to their k-th nearest neighbour in the set.
Precision and recall: Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models"
(NeurIPS, arXiv 1904.06991, equations 1 and 2), who take k = 3. Density and coverage: Naeem et al. 2020, "Reliable
fidelity and diversity metrics for generative models" (ICML, arXiv 2002.09797), who take k = 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metrics.feature_neighbours import blocks, check_features, nearest_others, squared_distances


@dataclass(frozen=True)
class ManifoldScores:
    """Precision, recall and coverage in [0, 1]; density from 0, about 1 for two samples of one law."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real: Tensor, generated: Tensor, k: int = 5) -> ManifoldScores:
    """Compare the k-nearest-neighbour manifolds of real and generated features.

    Precision is the share of generated features in any ball of a real one, recall the share of real features in any
    ball of a generated one, density the mean number of real balls around a generated feature over k, coverage the
    share of real balls with a generated feature in them. A feature on the surface of a ball is inside, rounding
    included (:func:`metrics.feature_neighbours.squared_distances`).

    Blind to memorization: copies of real images are perfect by all four. Precision and recall grow with a single
    outlier, whose ball is huge; all depend on N and M, so compare equal numbers.

    Args:
        real: features (N, D).
        generated: features (M, D).
        k: neighbours, fewer than N and M.

    Returns:
        The four scores.

    Raises:
        ValueError: If the features do not fit together or there are too few.
    """
    check_features(real, generated, least=k + 1)
    reach_real, reach_generated = (nearest_others(x, k).distance[:, -1].square() for x in (real, generated))
    centre = real.mean(0, dtype=torch.float64)
    in_real = torch.zeros(len(generated), dtype=torch.int64, device=real.device)  # balls around each generated feature
    in_generated, covered = torch.zeros(2, len(real), dtype=torch.bool, device=real.device)
    for rows, x in blocks(real):
        for columns, y in blocks(generated):
            square = squared_distances(x, y, centre, at_least=True)
            inside = square <= reach_real[rows, None]
            in_real[columns] += inside.sum(0)
            covered[rows] |= inside.any(1)
            in_generated[rows] |= (square <= reach_generated[columns]).any(1)
    return ManifoldScores(
        precision=float((in_real > 0).double().mean()),
        recall=float(in_generated.double().mean()),
        density=float(in_real.double().mean()) / k,
        coverage=float(covered.double().mean()),
    )
