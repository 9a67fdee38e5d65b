"""Distances between the surfaces of two masks in mm: Hausdorff, average symmetric surface distance, surface Dice.

The surface of a mask is its border: the voxels of which a face neighbour (an edge neighbour in 2-D) lies outside, and
everything beyond the image is outside. Definitions: Maier-Hein et al., "Metrics reloaded", Nature Methods 2024. HD95 is
of several kinds, and papers seldom say of which: the larger of the two directed percentiles (MONAI, Metrics Reloaded),
the percentile of both lists together (medpy, panoptica), or percentiles over surface area (`metrics.surfels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.int64]

HausdorffKind = Literal["maxdir", "pooled"]


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance in mm from every border voxel of one mask to the nearest of the other; inf where the other has none.

    Attributes:
        to_reference: (border voxels of the prediction,).
        to_prediction: (border voxels of the reference,).
    """

    to_reference: Floats
    to_prediction: Floats

    @property
    def pooled(self) -> Floats:
        """Both lists as one."""
        return np.concatenate([self.to_reference, self.to_prediction])

    @property
    def n_empty(self) -> int:
        """How many of the two masks are empty."""
        return (self.to_reference.size == 0) + (self.to_prediction.size == 0)


def surface_distances(prediction: Mask, reference: Mask, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Measure from each border voxel to the nearest border voxel of the other mask, between voxel centres.

    Args:
        prediction: bool (X, Y) or (X, Y, Z); an axis of length 1 does not count: a volume of one slice is a 2-D image.
        reference: bool, same shape.
        spacing_mm: size of a voxel along each axis.

    Raises:
        ValueError: if the shapes differ, are not of 2 or 3 axes, or the spacing has another number of them.
    """
    check_masks(prediction, reference, spacing_mm)
    borders = [_border_voxels(mask) for mask in (prediction, reference)]
    return SurfaceDistances(
        to_reference=nearest_mm(borders[0], borders[1], spacing_mm),
        to_prediction=nearest_mm(borders[1], borders[0], spacing_mm),
    )


def hausdorff(distances: SurfaceDistances, percentile: float = 95.0, kind: HausdorffKind = "maxdir") -> float:
    """Percentile Hausdorff distance in mm (numpy's linear interpolation); 100 is the Hausdorff distance.

    Args:
        distances: of the two surfaces.
        percentile: 0..100.
        kind: "maxdir", the larger of the two directed percentiles, or "pooled", the percentile of both lists together.

    Returns:
        mm; NaN where both masks are empty, inf where one is.
    """
    if distances.n_empty:
        return _undefined(distances)
    if kind == "pooled":
        return float(np.percentile(distances.pooled, percentile))
    directed = (distances.to_reference, distances.to_prediction)
    return max(float(np.percentile(values, percentile)) for values in directed)


def assd(distances: SurfaceDistances) -> float:
    """Average symmetric surface distance, the mean of both lists together: mm, NaN both empty, inf one empty."""
    return _undefined(distances) if distances.n_empty else float(distances.pooled.mean())


def nsd(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """Normalized surface distance (surface Dice): share of all border voxels within a tolerance of the other border.

    Args:
        distances: of the two surfaces.
        tolerance_mm: that does not count as an error.

    Returns:
        0..1; NaN where both masks are empty, 0 where one is.
    """
    pooled = distances.pooled
    return float(np.mean(pooled <= tolerance_mm)) if pooled.size else float("nan")


def check_masks(
    prediction: npt.NDArray[Any], reference: npt.NDArray[Any], spacing_mm: Sequence[float], axes: Sequence[int] = (2, 3)
) -> None:
    """Refuse arrays of different shapes or another number of axes, and a spacing without one positive number for each.

    Raises:
        ValueError: naming what came.
    """
    if prediction.shape != reference.shape or prediction.ndim not in axes:
        raise ValueError(
            f"Expected prediction and reference of one shape with {' or '.join(map(str, axes))} axes, "
            f"but got {prediction.shape} and {reference.shape}."
        )
    if len(spacing_mm) != prediction.ndim or not all(0 < size < np.inf for size in spacing_mm):
        raise ValueError(
            f"Expected the size of a voxel in mm along each of {prediction.ndim} axes, but got {tuple(spacing_mm)}."
        )


def content_box(volume: npt.NDArray[Any], margin: int) -> tuple[slice, ...]:
    """Slices to the box of what is not zero, wider by a margin in voxels where the array goes on.

    A margin of one voxel tells a structure of one slice from an image of one slice.
    """
    box = []
    for axis in range(volume.ndim):
        filled = np.flatnonzero(volume.any(axis=tuple(other for other in range(volume.ndim) if other != axis)))
        first, last = (int(filled[0]), int(filled[-1])) if filled.size else (0, 0)
        box.append(slice(max(first - margin, 0), last + 1 + margin))
    return tuple(box)


def nearest_mm(points: Points, targets: Points, spacing_mm: Sequence[float]) -> Floats:
    """Distance of every point to the nearest target, both int (n, axes) in voxels: (n,) in mm, inf without targets.

    Equal steps in voxels give equal distances to the last bit, so a tolerance cuts them alike everywhere.
    """
    if not len(targets):
        return np.full(len(points), np.inf)
    spacing = np.asarray(spacing_mm, np.float64)
    _, index = KDTree(targets * spacing, balanced_tree=False).query(points * spacing)
    return np.asarray(np.linalg.norm((points - targets[index]) * spacing, axis=1), np.float64)


def _border_voxels(mask: Mask) -> Points:
    inner = mask.copy()
    for axis, length in enumerate(mask.shape):
        if length > 1:
            core, whole = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
            core[1:] &= whole[:-1]
            core[:-1] &= whole[1:]
            core[0] = core[-1] = False
    return np.argwhere(mask & ~inner)


def _undefined(distances: SurfaceDistances) -> float:
    return float("nan") if distances.n_empty == 2 else float("inf")
