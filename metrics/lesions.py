"""Lesion-wise scores: which lesions were found, and how well; the whole-tumour scores hide missed and false ones.

A lesion is a connected component of a mask, voxels that touch by a corner included (26 neighbours, 8 in 2-D). Two rules
are common: one-to-one matching with the largest summed Dice (panoptica, the BraTS evaluation since 2024), and that of
the BraTS-2023 challenge, which merges reference lesions that are near each other and adds up all predicted ones near
them (https://github.com/rachitsaluja/BraTS-2023-Metrics).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from metrics.surface_distance import Floats, Mask, Points, check_masks, content_box
from metrics.surfels import surface_weighted_hausdorff

Labels = npt.NDArray[np.int32]

PENALTY_BRATS2023_MM = 374.0
"""What the BraTS-2023 challenge scored as HD95 of a missed or false lesion."""


@dataclass(frozen=True)
class Lesions:
    """The lesions of a mask.

    Attributes:
        labels: shape of the mask, 0 outside, 1..n.
        sizes: (n + 1,), voxels of each label; 0 for the outside.
    """

    labels: Labels
    sizes: npt.NDArray[np.int64]

    @property
    def n(self) -> int:
        """Number of lesions."""
        return self.sizes.size - 1


@dataclass(frozen=True)
class LesionMatch:
    """Lesions of the reference, of the prediction, found, false and missed, and their scores.

    Attributes:
        reference: number of lesions, = tp + fn.
        prediction: number of lesions, = tp + fp.
        tp: matched pairs.
        fp: lesions of the prediction without partner.
        fn: lesions of the reference without partner.
        f1: 2 tp / (2 tp + fp + fn), NaN without any lesion.
        dice: mean Dice of the matched pairs; 0 without a pair, NaN without any lesion.
    """

    reference: int
    prediction: int
    tp: int
    fp: int
    fn: int
    f1: float
    dice: float


@dataclass(frozen=True)
class LesionwiseBraTS2023:
    """Lesion-wise scores of the BraTS-2023 challenge.

    Attributes:
        tp: reference lesions (merged, large enough) that a predicted one is near to.
        fp: predicted lesions that no reference lesion, of whatever size, is near to.
        fn: reference lesions (merged, large enough) that no predicted one is near to.
        dice: mean over tp, fn and fp, the latter two counting 0; 1 without any of them.
        hd95_mm: mean over tp, fn and fp, the latter two counting 374 mm; 0 without any of them.
    """

    tp: int
    fp: int
    fn: int
    dice: float
    hd95_mm: float


def find_lesions(mask: Mask) -> Lesions:
    """Label the connected components of a mask, bool (X, Y) or (X, Y, Z)."""
    labels = np.zeros(mask.shape, np.int32)
    box = content_box(mask, margin=0)
    ndimage.label(mask[box], np.ones([3] * mask.ndim), output=labels[box])
    return Lesions(labels, _sizes(labels))


def match_lesions(prediction: Lesions, reference: Lesions) -> LesionMatch:
    """Pair the lesions of two masks of one shape one to one, such that the summed Dice of the pairs is largest."""
    n = reference.n + prediction.n
    if n == 0:
        return LesionMatch(0, 0, 0, 0, 0, float("nan"), float("nan"))
    pairs, overlap = _overlaps(reference.labels, prediction.labels)
    dice = _best_pairs(pairs, 2 * overlap / (reference.sizes[pairs[:, 0]] + prediction.sizes[pairs[:, 1]]))
    tp = dice.size
    return LesionMatch(
        reference=reference.n,
        prediction=prediction.n,
        tp=tp,
        fp=prediction.n - tp,
        fn=reference.n - tp,
        f1=2 * tp / n,
        dice=float(dice.mean()) if tp else 0.0,
    )


def lesionwise_brats2023(
    prediction: Lesions,
    reference: Lesions,
    spacing_mm: Sequence[float],
    *,
    dilation_voxels: int = 3,
    min_volume_mm3: float = 50.0,
) -> LesionwiseBraTS2023:
    """Score lesions as the BraTS-2023 challenge did; the defaults are those for adult glioma.

    Reference lesions whose dilations touch count as one, and as found by every predicted lesion that the dilation
    reaches; Dice and surface-weighted HD95 are between the undilated lesion and all of these. Small reference lesions
    do not count, but small false ones do, so a few stray voxels cost a good segmentation most of its score.

    Args:
        prediction: lesions of a volume (X, Y, Z).
        reference: same shape.
        spacing_mm: size of a voxel along each axis.
        dilation_voxels: steps of dilation by the 18-neighbourhood (1 for metastases and meningioma).
        min_volume_mm3: reference lesions must be larger than this (2 for metastases).

    Raises:
        ValueError: if the shapes differ or are not of three axes, or the spacing has another number of axes.
    """
    check_masks(prediction.labels, reference.labels, spacing_mm, axes=(3,))
    near = _merged(reference, dilation_voxels)
    pairs, _ = _overlaps(near, prediction.labels)
    reached = np.unique(pairs[:, 1])
    number = np.zeros(prediction.n + 1, np.int32)
    number[reached] = np.arange(1, reached.size + 1)
    p, r = number[prediction.labels], near * (reference.labels > 0)
    boxes_p, boxes_r = ndimage.find_objects(p), ndimage.find_objects(r)
    counted = np.flatnonzero(_sizes(r) * np.prod(spacing_mm) > min_volume_mm3)
    found = []
    for lesion in counted:
        partners = number[pairs[pairs[:, 0] == lesion, 1]]
        if partners.size:
            box = _union([boxes_r[lesion - 1], *(boxes_p[partner - 1] for partner in partners)])
            found.append(_lesion_scores(np.isin(p[box], partners), r[box] == lesion, spacing_mm))
    fp, fn = prediction.n - reached.size, counted.size - len(found)
    n = len(found) + fp + fn
    dice, hd95_mm = np.sum(found, axis=0) if found else (0.0, 0.0)
    return LesionwiseBraTS2023(
        tp=len(found),
        fp=fp,
        fn=fn,
        dice=float(dice / n) if n else 1.0,
        hd95_mm=float((hd95_mm + PENALTY_BRATS2023_MM * (fp + fn)) / n) if n else 0.0,
    )


def _sizes(labels: Labels) -> npt.NDArray[np.int64]:
    """Voxels of each label; 0 for the background."""
    return np.bincount(labels[labels > 0], minlength=1)


def _overlaps(a: Labels, b: Labels) -> tuple[Points, npt.NDArray[np.int64]]:
    """Labels of a and of b that share voxels (pairs, 2), in order, and how many voxels."""
    shared = (a > 0) & (b > 0)
    base = int(b.max(initial=0)) + 1
    keys, n = np.unique(a[shared].astype(np.int64) * base + b[shared], return_counts=True)
    return np.stack(np.divmod(keys, base), axis=1), n


def _best_pairs(pairs: Points, dice: Floats) -> Floats:
    """Dice of the pairs of a one-to-one assignment with the largest sum."""
    found = [np.zeros(0)]
    n_r, n_p = pairs.max(axis=0, initial=0) + 1
    edges = coo_array((dice, (pairs[:, 0], n_r + pairs[:, 1])), shape=(n_r + n_p, n_r + n_p))
    _, group = connected_components(edges, directed=False)  # lesions that do not compete are assigned apart
    group = group[pairs[:, 0]]
    for name in np.unique(group):
        rows, row = np.unique(pairs[group == name, 0], return_inverse=True)
        columns, column = np.unique(pairs[group == name, 1], return_inverse=True)
        table = np.zeros((rows.size, columns.size))
        table[row, column] = dice[group == name]
        chosen = table[linear_sum_assignment(1 - table)]  # of equal sums this cost finds the pairs that panoptica does
        found.append(chosen[chosen > 0])
    return np.concatenate(found)


def _merged(lesions: Lesions, dilation_voxels: int) -> Labels:
    """Label the dilation of the lesions: those that it joins become one."""
    merged = np.zeros(lesions.labels.shape, np.int32)
    box = content_box(lesions.labels, margin=dilation_voxels)
    structure = ndimage.generate_binary_structure(3, 2)
    dilated = ndimage.binary_dilation(lesions.labels[box] > 0, structure, iterations=dilation_voxels)
    ndimage.label(dilated, np.ones((3, 3, 3)), output=merged[box])
    return merged


def _union(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def _lesion_scores(prediction: Mask, reference: Mask, spacing_mm: Sequence[float]) -> tuple[float, float]:
    dice = 2 * np.sum(prediction & reference) / (np.sum(prediction) + np.sum(reference))
    return float(dice), surface_weighted_hausdorff(prediction, reference, spacing_mm)
