"""HD95 weighted by surface area, as the BraTS challenges to 2023 scored it (with DeepMind's surface-distance).

The surface runs between the voxels: each window of 2 x 2 x 2 of them that is neither full nor empty holds one element
of it at its centre, with the area of the triangles that marching cubes puts there (Lorensen and Cline, SIGGRAPH 1987).
The percentile is taken over area instead of over elements (Nikolov et al., arXiv 1809.04430).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations, product

import numpy as np
import numpy.typing as npt

from metrics.surface_distance import Floats, Mask, Points, check_masks, nearest_mm

TRIANGLES: dict[int, tuple[tuple[int, int, int], ...]] = {
    0b0000_0001: ((1, 1, 1),),
    0b0000_0011: ((2, 2, 0), (2, 2, 0)),
    0b0000_0110: ((1, 1, 1), (1, 1, 1)),
    0b0001_1000: ((1, 1, 1), (1, 1, 1)),
    0b0000_0111: ((4, 0, 0), (2, 2, 2), (1, 1, 1)),
    0b0001_0110: ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    0b0001_1001: ((0, 2, 2), (0, 2, 2), (1, 1, 1)),
    0b0000_1111: ((4, 0, 0), (4, 0, 0)),
    0b0001_0111: ((1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2)),
    0b0001_1011: ((0, 2, 2), (1, 1, 1), (2, 0, 2), (3, 3, 3)),
    0b0001_1110: ((4, 0, 0), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    0b0011_1100: ((2, 2, 0), (2, 2, 0), (2, 2, 0), (2, 2, 0)),
    0b0110_1001: ((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
}
"""Area vectors (without sign, in eighths of a voxel's faces) of the triangles in a window whose set bits are inside.

The highest bit is the corner of the lowest indices, the last axis runs fastest. All other windows follow by rotation,
reflection and exchange of inside and outside.
"""


def surface_weighted_hausdorff(
    prediction: Mask, reference: Mask, spacing_mm: Sequence[float], percentile: float = 95.0
) -> float:
    """Hausdorff distance in mm as the larger of two directed percentiles over surface area.

    Args:
        prediction: bool (X, Y, Z); outside the array is outside the mask.
        reference: bool, same shape.
        spacing_mm: size of a voxel along each axis.
        percentile: 0..100: the least distance within which at least this share of the area lies.

    Returns:
        mm; NaN where both masks are empty, inf where one is.

    Raises:
        ValueError: if the shapes differ or are not of three axes, or the spacing has another number of axes.
    """
    check_masks(prediction, reference, spacing_mm, axes=(3,))
    if not prediction.any() or not reference.any():
        return float("inf") if prediction.any() or reference.any() else float("nan")
    area_of = areas_mm2(tuple(spacing_mm))
    (p, p_windows), (r, r_windows) = (_surface(mask) for mask in (prediction, reference))
    return max(
        _weighted_percentile(nearest_mm(p, r, spacing_mm), area_of[p_windows], percentile),
        _weighted_percentile(nearest_mm(r, p, spacing_mm), area_of[r_windows], percentile),
    )


def _surface(mask: Mask) -> tuple[Points, npt.NDArray[np.uint8]]:
    padded = np.pad(mask, 1).view(np.uint8)
    windows = np.zeros([length + 1 for length in mask.shape], np.uint8)
    for place, corner in enumerate(product((0, 1), repeat=3)):
        shifted = tuple(slice(start, start + length) for start, length in zip(corner, windows.shape, strict=True))
        windows |= padded[shifted] << np.uint8(7 - place)
    points = np.argwhere((windows != 0) & (windows != 255))
    return points, windows[tuple(points.T)]


@lru_cache(maxsize=16)
def areas_mm2(spacing_mm: tuple[float, ...]) -> Floats:
    """Area of the surface in each of the 256 windows, in the bits of `TRIANGLES`, for voxels of a size: (256,)."""
    face_mm2 = np.prod(spacing_mm) / np.asarray(spacing_mm)  # perpendicular to each axis
    areas = np.zeros(256)
    for code, triangles in TRIANGLES.items():
        corners = np.unpackbits(np.array([code], np.uint8)).reshape(2, 2, 2)
        for axes in permutations(range(3)):
            area = np.linalg.norm(np.array(triangles)[:, axes] / 8 * face_mm2, axis=1).sum()
            for flipped in product((slice(None), slice(None, None, -1)), repeat=3):
                window = int(np.packbits(corners.transpose(axes)[flipped])[0])
                areas[[window, 255 - window]] = area
    return areas


def _weighted_percentile(distances: Floats, weights: Floats, percentile: float) -> float:
    order = np.lexsort((weights, distances))
    share = np.cumsum(weights[order]) / np.sum(weights)
    place = np.searchsorted(share, percentile / 100)
    return float(distances[order[min(int(place), order.size - 1)]])
