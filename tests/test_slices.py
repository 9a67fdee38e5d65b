"""Volumes become slices by the paper's rule, or by one that survives hot voxels; oracles in plain Python."""

import decimal
from collections import Counter

import numpy as np
import pytest
from fakes import fake_images, fake_labels

from datamodules.slices import (
    native_size_px,
    pad_to_square,
    reduction_factor,
    round_half_away,
    shrink_images,
    shrink_labels,
    slice_volume,
)


def volume(patient="A", shape=(24, 24, 8)):
    images = np.stack(list(fake_images(patient, shape).values())).astype(np.float32)
    return images, fake_labels(shape)


def half_up(value):
    return int(decimal.Decimal(value).quantize(decimal.Decimal(1), rounding=decimal.ROUND_HALF_UP))


def test_rounding_is_that_of_matlab():
    rng = np.random.default_rng(0)
    values = [0.5, 1.5, 2.5, 254.5, 254.49999999999997, 0.49999999999999994, *rng.uniform(0, 255, 300)]
    expected = [half_up(float(value)) for value in values]
    assert round_half_away(np.array(values)).tolist() == expected
    assert expected[:6] == [1, 2, 3, 255, 254, 0]
    assert round_half_away(np.array([-3.0, -0.5, 255.5, 1e9])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(("length", "size"), [(240, 256), (120, 128), (24, 32), (256, 256), (218, 256), (257, 512)])
def test_native_size_is_the_next_power_of_two(length, size):
    assert native_size_px((length, 24, 8)) == size
    assert native_size_px((24, length, 8)) == size


def test_240_is_padded_by_8_on_each_side_and_an_odd_pixel_goes_to_the_end():
    padded = pad_to_square(np.ones((2, 240, 240), np.uint8), 256)
    assert padded.shape == (2, 256, 256)
    assert padded[0, 8:248, 8:248].all()
    assert padded.sum() == 2 * 240 * 240
    assert pad_to_square(np.array([[1]]), 2).tolist() == [[1, 0], [0, 0]]


def test_paper_preset_equals_a_recomputation_pixel_by_pixel():
    images, labels = volume()
    result = slice_volume(images, labels, "paper")
    peaks = [float(image.max()) for image in images]
    kept = []
    for z in range(8):
        bright = sum(float(v) / peaks[0] * 255 > 50 for v in images[0, :, :, z].ravel())
        if bright / 32**2 > 0.15:
            kept.append(z)
    assert result.z.tolist() == kept == [1, 2, 3, 4, 5, 6]
    for row, z in ((0, 1), (3, 4)):
        for channel in range(4):
            for x, y in ((3, 3), (10, 11), (20, 21), (0, 0)):
                expected = half_up(float(images[channel, x, y, z]) / peaks[channel] * 255)
                assert result.slices[row, channel, x + 4, y + 4] == expected
    np.testing.assert_array_equal(result.slices[:, 4, 4:28, 4:28], labels[:, :, kept].transpose(2, 0, 1))
    assert result.white_level == dict(zip(("T1", "T1ce", "T2", "FLAIR"), peaks, strict=True))


def test_paper_rule_is_strict_and_counts_the_padded_square():
    images = np.zeros((4, 240, 240, 2), np.float32)
    images[:, 0, 0, :] = 255
    t1 = images[0].reshape(-1, 2)
    t1[1 : 1 + 9829, 0] = 51  # with the peak 9,830 pixels above 50: 0.149994 of 65,536
    t1[1 : 1 + 9830, 1] = 51  # 9,831: 0.150009
    t1[20000:30000, 0] = 50  # not above 50
    result = slice_volume(images, np.zeros((240, 240, 2), np.uint8), "paper", 16)
    assert result.z.tolist() == [1]
    assert result.slices_in_volume == 2


def test_paper_rule_looks_at_values_before_rounding():
    images = np.full((4, 32, 32, 1), 255, np.float32)
    images[0] = 50.4  # rounds to 50, but is above it
    images[0, 0, 0] = 255
    assert len(slice_volume(images, np.zeros((32, 32, 1), np.uint8), "paper").z) == 1


def test_one_hot_voxel_darkens_the_paper_preset_but_not_the_default():
    images, labels = volume(shape=(32, 32, 12))
    clean = {preset: slice_volume(images, labels, preset) for preset in ("default", "paper")}
    images[:, 16, 16, 6] = 1e6
    hot = {preset: slice_volume(images, labels, preset) for preset in ("default", "paper")}
    assert hot["paper"].slices_in_volume == 12
    assert len(hot["paper"].z) == 0
    assert hot["default"].z.tolist() == clean["default"].z.tolist()
    difference = np.abs(hot["default"].slices.astype(int) - clean["default"].slices)
    difference[hot["default"].z.tolist().index(6), :, 16, 16] = 0
    assert difference[:, :4].max() <= 1
    assert np.median(hot["default"].slices[:, 0][hot["default"].slices[:, 0] > 0]) == pytest.approx(
        np.median(clean["default"].slices[:, 0][clean["default"].slices[:, 0] > 0]), abs=1
    )


def test_default_white_is_the_percentile_inside_the_brain():
    images, labels = volume(shape=(32, 32, 12))
    result = slice_volume(images, labels)
    inside = sorted(images[1][(images > 0).any(axis=0)].tolist())
    rank = -(-999 * (len(inside) - 1) // 1000)  # rounded up
    assert result.white_level["T1ce"] == inside[rank]
    x, y, z = 10, 11, 5
    expected = min(255, half_up(float(images[1, x, y, z]) / inside[rank] * 255))
    assert result.slices[result.z.tolist().index(z), 1, x, y] == expected
    assert (result.slices[:, 1].max(), result.slices.dtype) == (255, np.uint8)


def test_default_keeps_slices_by_the_share_of_the_brain():
    images = np.zeros((4, 32, 32, 3), np.float32)
    flat = images.reshape(4, -1, 3)
    flat[3, :153, 0] = 5  # 0.1494 of 1,024 pixels
    flat[3, :154, 1] = 5  # 0.1504
    flat[0, :100, 2], flat[1, 100:154, 2], flat[2, :1, 2] = 1, 1, 1  # any modality counts
    assert slice_volume(images, np.zeros((32, 32, 3), np.uint8)).z.tolist() == [1, 2]


def test_block_means_are_rounded_half_up_in_integers():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, 16, 16), dtype=np.uint8)
    images[0, :2, :2] = [[0, 1], [1, 0]]
    small = shrink_images(images, 2)
    for n, row, column in np.ndindex(small.shape):
        block = images[n, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert small[n, row, column] == half_up(decimal.Decimal(int(block.sum())) / 4)
    assert small[0, 0, 0] == 1


def test_majority_decides_labels_and_a_tie_goes_to_the_rarer_tumour_class():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 4, (2, 16, 16), dtype=np.uint8)
    small = shrink_labels(labels, 4)
    precedence = {0: 0, 2: 1, 1: 2, 3: 3}
    for n, row, column in np.ndindex(small.shape):
        counts = Counter(labels[n, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].ravel().tolist())
        assert small[n, row, column] == max(counts, key=lambda c: (counts[c], precedence[c]))
    ties = {(0, 2): 2, (0, 1): 1, (0, 3): 3, (1, 2): 1, (1, 3): 3, (2, 3): 3}
    for (first, second), winner in ties.items():
        for pair in ((first, second), (second, first)):
            block = np.array([[*pair], [*reversed(pair)]], np.uint8)
            assert shrink_labels(block, 2).item() == winner
    assert shrink_labels(np.array([[0, 1], [2, 3]], np.uint8), 2).item() == 3


def test_a_factor_of_one_changes_nothing():
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    np.testing.assert_array_equal(shrink_images(image, 1), image)
    np.testing.assert_array_equal(shrink_labels(image % 4, 1), image % 4)


def test_smaller_slices_are_the_reduction_of_the_native_ones():
    images, labels = volume()
    native, small = slice_volume(images, labels), slice_volume(images, labels, size_px=16)
    assert small.slices.shape == (6, 5, 16, 16)
    np.testing.assert_array_equal(small.slices[:, :4], shrink_images(native.slices[:, :4], 2))
    np.testing.assert_array_equal(small.slices[:, 4], shrink_labels(native.slices[:, 4], 2))


def test_tumour_in_dropped_slices_is_counted():
    images, labels = volume()
    images[:, :, :, 2:4] = 0
    result = slice_volume(images, labels)
    assert result.z.tolist() == [1, 4, 5, 6]
    assert (result.tumour_voxels_kept, result.tumour_voxels_dropped) == (2 * 48, 2 * 48)


def test_a_size_that_does_not_divide_names_those_that_do():
    assert [reduction_factor(256, size) for size in (None, 256, 128, 64, 16)] == [1, 1, 2, 4, 16]
    for size in (512, 100, 96, 8):
        with pytest.raises(ValueError, match=rf"size_px={size} cannot .* 256 x 256 .*one of 256, 128, 64, 32, 16\."):
            reduction_factor(256, size)
