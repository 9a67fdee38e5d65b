"""Surface distances against all pairs of border voxels, MONAI and closed forms."""

from itertools import product

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from metrics.surface_distance import assd, content_box, hausdorff, nsd, surface_distances

SPACINGS = {(14, 11): (1.0, 1.0), (12, 15): (0.7, 1.3), (9, 8, 7): (1.0, 1.0, 1.0), (8, 7, 6): (0.5, 0.8, 2.0)}


def blobs(shape, seed, share=0.25):
    """Two random masks that overlap, reaching the border of the image."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, *[1.2] * len(shape)))
    fields = smooth[0], smooth[0] + 0.7 * smooth[1]
    return tuple(field > np.quantile(field, 1 - share) for field in fields)


def border_by_hand(mask):
    """Voxels with a face neighbour that is outside the mask or the image."""
    found = []
    for voxel in zip(*np.nonzero(mask), strict=True):
        neighbours = [
            tuple(np.add(voxel, step * np.eye(mask.ndim, dtype=int)[axis]))
            for axis in range(mask.ndim)
            for step in (-1, 1)
        ]
        inside = [all(0 <= i < n for i, n in zip(v, mask.shape, strict=True)) and mask[v] for v in neighbours]
        if not all(inside):
            found.append(voxel)
    return np.array(found)


def all_pairs(prediction, reference, spacing_mm):
    p, r = (border_by_hand(mask) * np.array(spacing_mm) for mask in (prediction, reference))
    distance = np.sqrt(((p[:, None] - r[None]) ** 2).sum(axis=-1))
    return distance.min(axis=1), distance.min(axis=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SPACINGS)
def test_distances_and_scores_equal_all_pairs_of_border_voxels(shape, seed):
    prediction, reference = blobs(shape, seed)
    to_reference, to_prediction = all_pairs(prediction, reference, SPACINGS[shape])
    both = np.concatenate([to_reference, to_prediction])
    found = surface_distances(prediction, reference, SPACINGS[shape])
    np.testing.assert_allclose(found.to_reference, to_reference, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.to_prediction, to_prediction, rtol=0, atol=1e-12)
    directed = [np.percentile(to_reference, 95), np.percentile(to_prediction, 95)]
    assert hausdorff(found) == pytest.approx(max(directed), abs=1e-12)
    assert hausdorff(found, kind="pooled") == pytest.approx(np.percentile(both, 95), abs=1e-12)
    assert hausdorff(found, 100) == hausdorff(found, 100, "pooled") == pytest.approx(both.max(), abs=1e-12)
    assert assd(found) == pytest.approx(both.mean(), abs=1e-12)
    assert nsd(found, 1.0) == np.mean(both <= 1.0)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("shape", SPACINGS)
def test_monai_agrees(shape):
    prediction, reference = blobs(shape, 7)
    found = surface_distances(prediction, reference, SPACINGS[shape])
    one_hot = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]
    options = {"include_background": True, "spacing": SPACINGS[shape]}
    theirs = compute_hausdorff_distance(*one_hot, percentile=95, **options)
    assert hausdorff(found) == pytest.approx(theirs.item(), abs=1e-5)
    theirs = compute_average_surface_distance(*one_hot, symmetric=True, **options)
    assert assd(found) == pytest.approx(theirs.item(), abs=1e-5)
    theirs = compute_surface_dice(*one_hot, class_thresholds=[1.5], **options)
    assert nsd(found, 1.5) == pytest.approx(theirs.item(), abs=1e-5)


def test_shift_of_a_box_and_the_hole_in_it():
    box = np.zeros((16, 16, 16), bool)
    box[3:9, 3:9, 3:9] = True
    shifted = surface_distances(box, np.roll(box, 4, axis=2), (1.0, 1.0, 2.5))
    assert hausdorff(shifted, 100) == 10.0
    assert hausdorff(surface_distances(box, box, (1.0, 1.0, 2.5)), 100) == 0
    hollow = box.copy()
    hollow[5:7, 5:7, 5:7] = False
    found = surface_distances(hollow, box, (1.0, 1.0, 1.0))
    assert (found.to_reference > 0).sum() == 6 * 4  # the wall of the hole is a border of its own
    assert hausdorff(found, 100) == 1.0


def test_one_far_voxel_counts_by_the_kind():
    reference = np.zeros((40, 40), bool)
    reference[5:26, 5:26] = True
    prediction = reference.copy()
    prediction[15, 35] = True
    found = surface_distances(prediction, reference, (1.0, 1.0))
    assert (hausdorff(found, 100), hausdorff(found), hausdorff(found, kind="pooled")) == (10.0, 0.0, 0.0)
    prediction[10:20, 35] = True  # 10 of 90 border voxels of the prediction, 10 of 170 of both
    found = surface_distances(prediction, reference, (1.0, 1.0))
    assert (hausdorff(found), hausdorff(found, 94, "pooled")) == (10.0, 0.0)


def test_equal_steps_are_equal_distances_to_the_last_bit():
    for start in range(40):
        prediction, reference = np.zeros((2, 60), bool), np.zeros((2, 60), bool)
        prediction[0, start], reference[0, start + 10] = True, True
        found = surface_distances(prediction, reference, (1.0, 0.1))
        assert nsd(found, 1.0) == 1.0
        assert nsd(found, np.nextafter(1.0, 0)) == 0.0


@pytest.mark.parametrize("axis", range(3))
def test_volume_of_one_slice_is_an_image(axis):
    prediction, reference = blobs((14, 11), 3)
    flat = surface_distances(prediction, reference, (0.7, 1.3))
    spacing_mm = np.insert([0.7, 1.3], axis, 5.0)
    as_volume = surface_distances(*(np.expand_dims(mask, axis) for mask in (prediction, reference)), spacing_mm)
    assert [hausdorff(as_volume), assd(as_volume)] == [hausdorff(flat), assd(flat)]
    thick = [np.zeros((14, 11, 3), bool) for _ in range(2)]
    for volume, mask in zip(thick, (prediction, reference), strict=True):
        volume[:, :, 1] = mask
    in_space = surface_distances(*thick, (0.7, 1.3, 5.0))
    assert in_space.to_reference.size == prediction.sum() > flat.to_reference.size  # every voxel is border in 3-D


@pytest.mark.parametrize("kind", ["maxdir", "pooled"])
def test_empty_masks_are_nan_or_inf_and_never_zero(kind):
    full, empty = np.ones((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    for pair in ((full, empty), (empty, full)):
        one = surface_distances(*pair, (1.0, 1.0, 1.0))
        assert (hausdorff(one, 95, kind), hausdorff(one, 100, kind), assd(one), nsd(one, 1.0)) == (
            np.inf,
            np.inf,
            np.inf,
            0,
        )
    both = surface_distances(empty, empty, (1.0, 1.0, 1.0))
    assert np.isnan([hausdorff(both, 95, kind), assd(both), nsd(both, 1.0)]).all()


def test_box_holds_the_content_and_a_margin_within_the_image():
    volume = np.zeros((9, 8, 7), np.uint8)
    assert content_box(volume, margin=1) == (slice(0, 2), slice(0, 2), slice(0, 2))
    volume[2, 0, 6], volume[4, 3, 6] = 1, 2
    assert volume[content_box(volume, margin=0)].shape == (3, 4, 1)
    assert volume[content_box(volume, margin=1)].shape == (5, 5, 2)
    for margin in range(10):
        cut = volume[content_box(volume, margin)]
        assert sorted(cut[cut > 0]) == [1, 2]


def test_distances_do_not_change_with_the_box():
    pair = blobs((8, 7, 6), 5)
    for low, high in product((0, 3), repeat=2):
        padded = [np.pad(mask, (low, high)) for mask in pair]
        box = content_box(padded[0] | padded[1], margin=1)
        cut = surface_distances(*(mask[box] for mask in padded), (0.5, 0.8, 2.0))
        whole = surface_distances(*padded, (0.5, 0.8, 2.0))
        np.testing.assert_array_equal(cut.pooled, whole.pooled)


def test_shapes_and_spacings_that_do_not_fit_are_refused():
    mask = np.ones((4, 4, 4), bool)
    with pytest.raises(ValueError, match=r"one shape with 2 or 3 axes, but got \(4, 4, 4\) and \(4, 4\)"):
        surface_distances(mask, mask[0], (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"2 or 3 axes"):
        surface_distances(mask[None], mask[None], (1.0, 1.0, 1.0, 1.0))
    for spacing_mm in ((1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, -1.0), (1.0, 1.0, np.nan), (1.0, 1.0, np.inf)):
        with pytest.raises(ValueError, match=r"size of a voxel in mm along each of 3 axes"):
            surface_distances(mask, mask, spacing_mm)
