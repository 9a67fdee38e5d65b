"""Published tests for data copying in a feature space: C_T and authenticity.

Both ask whether generated features lie nearer to the training features than they should. Both are reported because
others report them, and both look at sets as a whole: a few per cent of exact copies do not move them, however many
patients that may be. What does expose these is the distance of each single image beside those of held-out patients
(:func:`metrics.statistics.conformal_p_values`).

Images count as independent samples in both. Slices of one patient are not, which makes C_T more certain than it should
be, and authenticity harsher: the nearest other training slice is the next slice of the same head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.vq import kmeans2
from scipy.stats import rankdata
from torch import Tensor

from metrics.feature_neighbours import check_features, nearest_neighbours

Floats = npt.NDArray[np.float64]
Cells = tuple[Tensor, Tensor, Tensor]
"""Cell 0 .. K - 1 of every training, held-out and generated feature; int64 (N,), (H,), (M,)."""


@dataclass(frozen=True)
class DataCopying:
    """Z-scored Mann-Whitney statistics: far below 0 is copying, far above 0 is underfitting.

    `z` over everything, `z_cells` (K,) in each cell (NaN without a generated feature), `c_t` their mean weighted with
    the share of held-out features, over cells with more than the share tau of the generated ones.
    """

    z: float
    z_cells: Floats
    c_t: float


def data_copying(training: Tensor, heldout: Tensor, generated: Tensor, cells: Cells, tau: float) -> DataCopying:
    """Compare the distances to the training set of generated and of held-out features (Meehan et al. 2020).

    "A non-parametric test to detect data-copying in generative models" (AISTATS, arXiv 2004.05675). Blind to rare
    copies, as all rank statistics: a share s of exact copies moves z by about -1.2 s sqrt(N) for N of both kinds, which
    a generator whose other images lie a little too far from the training ones makes up for.

    Args:
        training: features (N, D).
        heldout: features (H, D) of images that the generator has not seen.
        generated: features (M, D).
        cells: of all of them, as :func:`k_means_cells` makes them.
        tau: share of the generated features in [0, 1) that a cell must exceed.

    Returns:
        The statistics.

    Raises:
        ValueError: If the features do not fit together, a cell lacks training or held-out features, or no cell exceeds
            tau.
    """
    check_features(training, generated, "training", least=1)
    check_features(training, heldout, "training", "held-out", least=1)
    in_training, in_heldout, in_generated = (cell.to(training.device) for cell in cells)
    count = 1 + max(int(cell.max()) for cell in cells)
    z_cells, shares_heldout, shares_generated = np.full(count, np.nan), np.zeros(count), np.zeros(count)
    for c in range(count):
        t, p, q = training[in_training == c], heldout[in_heldout == c], generated[in_generated == c]
        if not len(t) or not len(p):
            raise ValueError(
                f"Cell {c} of {count} has {len(t)} training and {len(p)} held-out images, and needs both; "
                "make fewer cells."
            )
        shares_heldout[c], shares_generated[c] = len(p) / len(heldout), len(q) / len(generated)
        if len(q):
            z_cells[c] = _z(q, p, t)
    enough = shares_generated > tau
    if not enough.any():
        raise ValueError(
            f"No cell has more than the share {tau} of the generated images; lower tau or make fewer cells."
        )
    c_t = float(np.average(z_cells[enough], weights=shares_heldout[enough]))
    return DataCopying(_z(generated, heldout, training), z_cells, c_t)


def _z(generated: Tensor, heldout: Tensor, training: Tensor) -> float:
    """Z_U: the Mann-Whitney statistic U of the distances, generated larger, less its mean over its deviation."""
    to_training = [nearest_neighbours(x, training).distance[:, 0].cpu().numpy() for x in (generated, heldout)]
    m, n = len(generated), len(heldout)
    u = float(rankdata(np.concatenate(to_training))[:m].sum()) - m * (m + 1) / 2
    return (u - (m * n / 2 - 0.5)) / float(np.sqrt(m * n * (m + n + 1) / 12))  # with the authors' continuity correction


def k_means_cells(training: Tensor, heldout: Tensor, generated: Tensor, count: int, seed: int = 0) -> Cells:
    """Divide the feature space into cells by k-means on the training features.

    Args:
        training: features (N, D).
        heldout: features (H, D).
        generated: features (M, D).
        count: cells.
        seed: of the first centres (k-means++).

    Returns:
        The cell of every feature. Cells without a training feature are left out, so there may be fewer.
    """
    points = training.double().cpu().numpy()
    centres, _ = kmeans2(points, count, minit="++", seed=np.random.default_rng(seed))
    places = torch.from_numpy(centres).to(training.device)
    near = nearest_neighbours(training, places).index[:, 0]
    places = places[near.bincount(minlength=len(places)) > 0]
    a, b, c = (nearest_neighbours(x, places).index[:, 0] for x in (training, heldout, generated))
    return a, b, c


def authentic(training: Tensor, generated: Tensor, training_groups: Tensor | None = None) -> Tensor:
    """Say of every generated feature whether it is authentic (Alaa et al. 2022, arXiv 2102.08921).

    "How faithful is your synthetic data?" (ICML). It is not when it lies nearer to its nearest training feature than
    that one to its own nearest other training feature. A quarter to a half of the images of a perfect generator
    are not, and a few copies drown among them.

    Args:
        training: features (N, D).
        generated: features (M, D).
        training_groups: int (N,), for instance the patient of each: its own nearest is then sought among others. None
            compares with all, as published.

    Returns:
        bool (M,); the mean times 100 is "AuthPct".

    Raises:
        ValueError: If the features do not fit together, or there are fewer than two training features.
    """
    check_features(training, generated, "training")
    groups = torch.arange(len(training)) if training_groups is None else training_groups
    own = nearest_neighbours(training, training, query_groups=groups, reference_groups=groups)
    nearest = nearest_neighbours(generated, training)
    return nearest.distance[:, 0] > own.distance[nearest.index[:, 0], 0]
