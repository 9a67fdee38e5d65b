"""Surface-weighted distances: areas against triangulations of the loops, percentiles against windows one by one."""

from itertools import product

import numpy as np
import pytest
from scipy import ndimage

from metrics.surfels import areas_mm2, surface_weighted_hausdorff

ANISOTROPIC = (0.5, 0.8, 2.0)
CORNERS = list(product((0, 1), repeat=3))
AROUND = ((0, 0), (0, 1), (1, 1), (1, 0))


def inside_corners(code):
    """Of the fewer side: the surface is drawn around it."""
    inside = {corner for place, corner in enumerate(CORNERS) if code >> (7 - place) & 1}
    return inside if len(inside) <= 4 else set(CORNERS) - inside


def lines(inside):
    """On each face a line around each run of inside corners, between the midpoints of the edges where it ends."""
    for axis, side in product(range(3), (0, 1)):
        face = [tuple(np.insert(corner, axis, side).tolist()) for corner in AROUND]
        for first in range(4):
            if face[first - 1] not in inside and face[first] in inside:
                last = next(place for place in range(first, first + 4) if face[(place + 1) % 4] not in inside)
                ends = (face[first - 1], face[first]), (face[last % 4], face[(last + 1) % 4])
                yield {tuple(np.mean(end, axis=0).tolist()) for end in ends}


def loops(inside):
    left = list(lines(inside))
    while left:
        loop = list(left.pop())
        while following := [line for line in left if loop[-1] in line]:
            left.remove(following[0])
            loop.extend(following[0] - {loop[-1]})
        assert loop.pop() == loop[0]
        yield np.array(loop)


def triangulated_areas(loop):
    if len(loop) < 3:
        return [0.0]
    found = []
    for apex in range(1, len(loop) - 1):
        triangle = np.linalg.norm(np.cross(loop[apex] - loop[0], loop[-1] - loop[0])) / 2
        parts = triangulated_areas(loop[: apex + 1]), triangulated_areas(loop[apex:])
        found += [triangle + a + b for a, b in product(*parts)]
    return found


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), ANISOTROPIC])
def test_area_of_every_window_is_that_of_a_triangulation_of_its_loops(spacing_mm):
    areas = areas_mm2(spacing_mm)
    assert areas[[0, 255]].tolist() == [0, 0]
    for code in range(1, 255):
        possible = [triangulated_areas(loop * spacing_mm) for loop in loops(inside_corners(code))]
        sums = np.array([sum(parts) for parts in product(*possible)])
        assert np.abs(sums - areas[code]).min() < 1e-12, f"{code:08b}"


def windows_one_by_one(mask):
    padded = np.pad(mask, 1)
    points, codes = [], []
    for corner in np.ndindex(*np.array(mask.shape) + 1):
        values = [padded[tuple(np.add(corner, step))] for step in CORNERS]
        code = int("".join(str(int(value)) for value in values), 2)
        if 0 < code < 255:
            points.append(corner)
            codes.append(code)
    return np.array(points), codes


def least_distance_that_covers(share, distances, areas):
    covered, total = 0.0, sum(areas)
    for distance, area in sorted(zip(distances, areas, strict=True)):
        covered += area
        if covered >= share * total:
            return distance
    raise AssertionError


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), ANISOTROPIC])
def test_percentile_over_area_equals_windows_one_by_one(spacing_mm, seed):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, 8, 7, 6)), (0, 1, 1, 1))
    prediction, reference = smooth[0] > 0.1, smooth[0] + 0.6 * smooth[1] > 0.1
    (p, p_codes), (r, r_codes) = windows_one_by_one(prediction), windows_one_by_one(reference)
    distance = np.linalg.norm((p[:, None] - r[None]) * spacing_mm, axis=-1)
    areas = areas_mm2(spacing_mm)
    for percentile in (50.0, 83.0, 95.0):
        there = least_distance_that_covers(percentile / 100, distance.min(axis=1), areas[p_codes])
        back = least_distance_that_covers(percentile / 100, distance.min(axis=0), areas[r_codes])
        found = surface_weighted_hausdorff(prediction, reference, spacing_mm, percentile)
        assert found == pytest.approx(max(there, back), abs=1e-12)


def test_area_outweighs_the_number_of_elements():
    reference = np.zeros((30, 30, 30), bool)
    reference[5:15, 5:15, 5:15] = True
    prediction = reference.copy()
    prediction[25, 25, 5:27:2] = True  # 11 voxels: 88 elements of 0.22 mm2 beside 602 and 564 mm2 of the box
    assert surface_weighted_hausdorff(prediction, reference, (1.0, 1.0, 1.0)) == 0.0
    assert surface_weighted_hausdorff(prediction, reference, (1.0, 1.0, 1.0), 97.0) > 10


def test_a_shifted_slab_is_at_the_distance_of_the_shift():
    slab = np.zeros((6, 6, 20), bool)
    slab[:, :, 4:9] = True
    assert surface_weighted_hausdorff(np.roll(slab, 3, axis=2), slab, (1.0, 1.0, 2.0)) == 6.0


def test_empty_masks_are_nan_or_inf():
    full, empty = np.ones((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
    assert surface_weighted_hausdorff(full, empty, ANISOTROPIC) == np.inf
    assert surface_weighted_hausdorff(empty, full, ANISOTROPIC) == np.inf
    assert np.isnan(surface_weighted_hausdorff(empty, empty, ANISOTROPIC))


def test_images_are_refused():
    with pytest.raises(ValueError, match=r"one shape with 3 axes"):
        surface_weighted_hausdorff(np.ones((3, 3), bool), np.ones((3, 3), bool), (1.0, 1.0))
