"""Lesion-wise scores against all possible pairings and against the rules of the challenge on sets of voxels."""

from itertools import permutations, product

import numpy as np
import pytest
from scipy import ndimage

from metrics.lesions import find_lesions, lesionwise_brats2023, match_lesions
from metrics.surfels import surface_weighted_hausdorff

MM = (1.0, 1.0, 1.0)


def blobs(shape, seed, share=0.12, likeness=0.8):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, *[1.0] * len(shape)))
    fields = smooth[0], likeness * smooth[0] + (1 - likeness) * smooth[1]
    return tuple(field > np.quantile(field, 1 - share) for field in fields)


def volume(*boxes, shape=(40, 20, 20)):
    """Boxes given as (x, y, z) ranges."""
    mask = np.zeros(shape, bool)
    for box in boxes:
        mask[tuple(slice(*sides) for sides in box)] = True
    return mask


def pair(prediction, reference):
    return find_lesions(prediction), find_lesions(reference)


def components_by_hand(mask):
    """Sets of voxels that touch, by growing each from a seed."""
    left = set(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True))
    steps = list(product((-1, 0, 1), repeat=mask.ndim))
    found = []
    while left:
        grown, front = set(), [left.pop()]
        while front:
            voxel = front.pop()
            grown.add(voxel)
            near = {tuple(a + b for a, b in zip(voxel, step, strict=True)) for step in steps} & left
            left -= near
            front += near
        found.append(frozenset(grown))
    return found


def dice_of(a, b):
    return 2 * len(a & b) / (len(a) + len(b))


def test_lesions_touch_by_a_corner():
    diagonal = np.eye(5, dtype=bool)
    assert find_lesions(diagonal).n == 1
    in_space = np.zeros((4, 4, 4), bool)
    in_space[[0, 1, 3], [0, 1, 3], [0, 1, 3]] = True
    found = find_lesions(in_space)
    assert (found.n, sorted(found.sizes)) == (2, [0, 1, 2])
    assert find_lesions(np.zeros((4, 4), bool)).n == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(13, 11), (8, 7, 6)])
def test_labels_are_the_components_grown_by_hand(shape, seed):
    mask, _ = blobs(shape, seed)
    found = find_lesions(mask)
    ours = {frozenset(map(tuple, np.argwhere(found.labels == label).tolist())) for label in range(1, found.n + 1)}
    assert ours == set(components_by_hand(mask))
    assert found.sizes.tolist() == [0] + [int((found.labels == label).sum()) for label in range(1, found.n + 1)]


@pytest.mark.parametrize("seed", range(10))
def test_summed_dice_is_that_of_the_best_of_all_pairings(seed):
    masks = blobs((18, 15) if seed % 2 else (9, 9, 8), seed, likeness=0.6)
    p, r = (components_by_hand(mask) for mask in masks)
    few, many = sorted((p, r), key=len)
    assert 2 <= len(few) <= 7
    best = max(sum(map(dice_of, few, chosen)) for chosen in permutations(many, len(few)))
    found = match_lesions(*pair(*masks))
    assert (found.prediction, found.reference) == (len(p), len(r)) == (found.tp + found.fp, found.tp + found.fn)
    assert found.dice * found.tp == pytest.approx(best, abs=1e-12)
    assert found.f1 == pytest.approx(found.tp / (found.tp + 0.5 * (found.fp + found.fn)), abs=1e-12)


def test_the_best_pair_yields_where_that_serves_the_sum():
    row = np.zeros((3, 25), bool)
    reference, prediction = row.copy(), row.copy()
    reference[1, 1:8] = reference[1, 10:20] = True
    prediction[1, 5:16] = prediction[1, 17:22] = True
    found = match_lesions(*pair(prediction, reference))  # not 12/21, the best single pair
    assert (found.tp, found.fp, found.fn, found.f1) == (2, 0, 0, 1.0)
    assert found.dice == pytest.approx((6 / 18 + 6 / 15) / 2, abs=1e-12)


def test_missed_and_false_lesions_are_counted():
    reference = volume([(1, 5), (1, 5), (1, 5)], [(10, 14), (1, 5), (1, 5)], [(20, 24), (1, 5), (1, 5)])
    prediction = volume([(1, 5), (1, 5), (1, 5)], [(10, 14), (1, 5), (1, 3)], [(30, 31), (1, 2), (1, 2)])
    found = match_lesions(*pair(prediction, reference))
    assert (found.reference, found.prediction, found.tp, found.fp, found.fn) == (3, 3, 2, 1, 1)
    assert found.f1 == pytest.approx(2 / 3)
    assert found.dice == pytest.approx((1 + 2 / 3) / 2)


def test_without_lesions_scores_are_nan_and_without_pairs_zero():
    empty, one = volume(), volume([(1, 3), (1, 3), (1, 3)])
    none = match_lesions(*pair(empty, empty))
    assert (none.reference, none.prediction, none.tp, none.fp, none.fn) == (0, 0, 0, 0, 0)
    assert np.isnan([none.f1, none.dice]).all()
    missed, false = match_lesions(*pair(empty, one)), match_lesions(*pair(one, empty))
    apart = match_lesions(*pair(one, np.roll(one, 9, axis=0)))
    assert [(m.fp, m.fn, m.f1, m.dice) for m in (missed, false, apart)] == [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0)]


def dilated_by_hand(voxels, steps, shape):
    around = [step for step in product((-1, 0, 1), repeat=3) if 0 < np.count_nonzero(step) < 3]
    for _ in range(steps):
        grown = {tuple(a + b for a, b in zip(voxel, step, strict=True)) for voxel in voxels for step in around}
        voxels = voxels | {v for v in grown if all(0 <= i < n for i, n in zip(v, shape, strict=True))}
    return voxels


def mask_of(voxels, shape):
    mask = np.zeros(shape, bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


def challenge_by_hand(prediction, reference, spacing_mm, steps, min_volume_mm3):
    shape = prediction.shape
    p, r = components_by_hand(prediction), frozenset().union(*components_by_hand(reference))
    tp, fn, near_any, scores = 0, 0, set(), []
    for around in components_by_hand(mask_of(dilated_by_hand(r, steps, shape), shape)):
        lesion, near = r & around, [component for component in p if component & around]
        near_any |= set(near)
        if len(lesion) * np.prod(spacing_mm) <= min_volume_mm3:
            continue
        if near:
            union = frozenset().union(*near)
            hd95 = surface_weighted_hausdorff(mask_of(union, shape), mask_of(lesion, shape), spacing_mm)
            scores.append((dice_of(union, lesion), hd95))
            tp += 1
        else:
            scores.append((0.0, 374.0))
            fn += 1
    fp = len(set(p) - near_any)
    scores += [(0.0, 374.0)] * fp
    dice, hd95_mm = np.mean(scores, axis=0) if scores else (1.0, 0.0)
    return tp, fp, fn, dice, hd95_mm


@pytest.mark.parametrize(("steps", "min_volume_mm3"), [(1, 2.0), (2, 9.0), (3, 50.0)])
@pytest.mark.parametrize("spacing_mm", [MM, (0.5, 1.5, 2.0)])
@pytest.mark.parametrize("seed", range(3))
def test_challenge_scores_equal_the_rules_on_sets_of_voxels(seed, spacing_mm, steps, min_volume_mm3):
    prediction, reference = blobs((17, 13, 11), seed, share=0.04, likeness=0.6)
    expected = challenge_by_hand(prediction, reference, spacing_mm, steps, min_volume_mm3)
    found = lesionwise_brats2023(
        *pair(prediction, reference), spacing_mm, dilation_voxels=steps, min_volume_mm3=min_volume_mm3
    )
    assert (found.tp, found.fp, found.fn) == expected[:3]
    assert (found.dice, found.hd95_mm) == pytest.approx(expected[3:], abs=1e-12)


BIG = [(1, 6), (1, 6), (1, 6)]
STRAY = [(30, 31), (1, 2), (1, 2)]
MM3_50 = [(20, 25), (1, 6), (1, 3)]
MM3_51 = [(20, 37), (1, 4), (1, 2)]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ([], [], (0, 0, 0, 1.0, 0.0)),
        ([BIG], [BIG], (1, 0, 0, 1.0, 0.0)),
        ([], [BIG], (0, 0, 1, 0.0, 374.0)),
        ([BIG], [], (0, 1, 0, 0.0, 374.0)),
        ([BIG, STRAY], [BIG], (1, 1, 0, 0.5, 187.0)),
        ([BIG], [BIG, STRAY], (1, 0, 0, 1.0, 0.0)),  # a small lesion that is missed costs nothing
        ([BIG, STRAY], [BIG, STRAY], (1, 0, 0, 1.0, 0.0)),  # nor is its finding counted as false
        ([BIG], [BIG, MM3_50], (1, 0, 0, 1.0, 0.0)),
        ([BIG], [BIG, MM3_51], (1, 0, 1, 0.5, 187.0)),
    ],
)
def test_what_the_challenge_counts(prediction, reference, expected):
    found = lesionwise_brats2023(*pair(volume(*prediction), volume(*reference)), MM)
    assert (found.tp, found.fp, found.fn, found.dice, found.hd95_mm) == expected


@pytest.mark.parametrize(("gap", "lesions"), [(5, 1), (6, 1), (7, 2), (8, 2)])
def test_lesions_whose_dilations_touch_are_one(gap, lesions):
    second = [(6 + gap, 11 + gap), (1, 6), (1, 6)]
    found = lesionwise_brats2023(*pair(volume(BIG), volume(BIG, second)), MM)
    assert (found.tp, found.fn) == (1, lesions - 1)
    assert found.dice == pytest.approx(2 * 125 / 375 if lesions == 1 else 0.5)


def test_only_volumes_are_scored_as_in_the_challenge():
    with pytest.raises(ValueError, match=r"one shape with 3 axes"):
        lesionwise_brats2023(*pair(np.ones((4, 4), bool), np.ones((4, 4), bool)), (1.0, 1.0))
    with pytest.raises(ValueError, match=r"along each of 3 axes"):
        lesionwise_brats2023(*pair(volume(BIG), volume(BIG)), (1.0, 1.0))
