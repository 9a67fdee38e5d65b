"""Planted positives: closed forms of every kind, and dependence on nothing but slices, seed and index."""

import json

import numpy as np
import pytest

from datamodules.slice_dataset import relative_height
from datamodules.slice_set import SliceSet
from evaluation.planted import KINDS, plant, plant_in

SIDE = 24


def slices(seed=0, low=0, high=256):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.integers(low, high, (4, SIDE, SIDE)), rng.integers(0, 4, (1, SIDE, SIDE))]).astype(
        np.uint8
    )


SOURCE, PARTNER = slices(1), slices(2)


def planted(kind, index=0, source=SOURCE, partner=PARTNER, seed=3):
    made, parameters = plant(kind, source, partner, seed, index)
    assert made.dtype == np.uint8
    assert made.shape == source.shape
    assert made[4].max() <= 3
    return made, parameters


def near(ours, expected):
    """Equal up to the rounding to integers."""
    np.testing.assert_allclose(ours.astype(float), np.clip(expected, 0, 255), rtol=0, atol=0.5 + 1e-6)


def enlarged(image, axis, factor):
    """Linear interpolation between the centres of pixels that become `factor` pixels; constant beyond the last ones."""
    places = (np.arange(SIDE) + 0.5) / factor - 0.5
    return np.apply_along_axis(lambda line: np.interp(places, np.arange(len(line)), line), axis, image)


@pytest.mark.parametrize("kind", KINDS)
def test_positives_follow_from_slices_seed_and_index(kind):
    first, parameters = planted(kind, index=5)
    planted(kind, index=6)
    again, same = planted(kind, index=5)
    assert np.array_equal(first, again)
    assert parameters == same
    assert json.loads(json.dumps(parameters)) == parameters
    if parameters.keys() - {"weight", "modality"}:
        assert planted(kind, index=6)[1] != parameters
        assert planted(kind, index=5, seed=4)[1] != parameters


def test_exact_mirrored_and_unlabelled_copies():
    assert np.array_equal(planted("exact")[0], SOURCE)
    assert np.array_equal(planted("mirrored")[0], SOURCE[:, ::-1])
    unlabelled = planted("label_removed")[0]
    assert np.array_equal(unlabelled[:4], SOURCE[:4])
    assert not unlabelled[4].any()


def test_shifts_of_1_to_5_px_fill_up_with_zero():
    seen = set()
    for index in range(400):
        made, parameters = planted("shifted", index)
        rows, columns = parameters["rows_px"], parameters["columns_px"]
        seen.add((rows, columns))
        expected = np.zeros((5, SIDE + 10, SIDE + 10), np.uint8)
        expected[:, 5 + rows : 5 + rows + SIDE, 5 + columns : 5 + columns + SIDE] = SOURCE
        assert np.array_equal(made, expected[:, 5:-5, 5:-5])
    assert (0, 0) not in seen
    assert {max(abs(rows), abs(columns)) for rows, columns in seen} == {1, 2, 3, 4, 5}
    assert len(seen) > 100  # of 120


def test_rotation_turns_a_ramp_and_leaves_classes_classes():
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    ramp = SOURCE.copy()
    ramp[:4] = 128 + 6 * rows  # integers
    inside = np.hypot(rows, columns) < SIDE / 2 - 2
    angles = []
    for index in range(30):
        made, parameters = planted("rotated", index, ramp)
        angle = np.deg2rad(parameters["degrees"])
        expected = 128 + 6 * (np.cos(angle) * rows + np.sin(angle) * columns)
        near(made[:4, inside], np.broadcast_to(expected[inside], (4, inside.sum())))
        angles.append(parameters["degrees"])
    assert 1 <= np.abs(angles).min() < 2
    assert 4 < np.abs(angles).max() <= 5
    assert min(angles) < 0 < max(angles)
    quarters = np.zeros_like(SOURCE)
    quarters[:, :12, :12] = quarters[:, 12:, 12:] = 3
    made = planted("rotated", 0, quarters)[0]
    assert set(np.unique(made[4])) == {0, 3}


def test_intensity_is_gain_and_gamma_of_every_modality():
    for index in range(20):
        made, parameters = planted("intensity", index)
        gain, gamma = np.array(parameters["gain"]), np.array(parameters["gamma"])
        assert (np.abs(np.log2([gain, gamma])) <= 0.5).all()
        near(made[:4], 255 * gain[:, None, None] * (SOURCE[:4] / 255.0) ** gamma[:, None, None])
        assert np.array_equal(made[4], SOURCE[4])


def test_blur_is_gaussian():
    impulse = SOURCE.copy()
    impulse[:4] = 0
    impulse[:4, 12, 10] = 255
    for index in range(20):
        made, parameters = planted("blurred", index, impulse)
        sigma = parameters["sigma_px"]
        assert 0.5 <= sigma <= 1.5
        reach = np.arange(-8, 9)
        kernel = np.exp(-(reach**2) / (2 * sigma**2))
        kernel[np.abs(reach) > int(4 * sigma + 0.5)] = 0
        kernel /= kernel.sum()
        near(made[:4, 4:21, 2:19], np.broadcast_to(255 * np.outer(kernel, kernel), (4, 17, 17)))
        assert np.array_equal(made[4], impulse[4])


def test_noise_is_gaussian_in_the_brain_and_nothing_outside():
    grey = SOURCE.copy()
    grey[:4] = 128
    grey[:4, :6] = 0
    for index in range(10):
        made, parameters = planted("noisy", index, grey)
        noise = made[:4, 6:].astype(float) - 128
        assert 5 <= parameters["sigma"] <= 20
        assert noise.std() == pytest.approx(parameters["sigma"], rel=0.06)
        assert abs(noise.mean()) < 4 * parameters["sigma"] / np.sqrt(noise.size)
        assert not made[:4, :6].any()
        assert np.array_equal(made[4], grey[4])


def test_resampling_goes_through_means_of_blocks():
    factors = set()
    for index in range(20):
        made, parameters = planted("resampled", index)
        factor = parameters["factor"]
        factors.add(factor)
        small = SIDE // factor
        means = SOURCE[:4].reshape(4, small, factor, small, factor).mean(axis=(2, 4))
        near(made[:4], enlarged(enlarged(means, 1, factor), 2, factor))
        chosen = (np.arange(small) * factor + factor // 2).repeat(factor)
        assert np.array_equal(made[4], SOURCE[4][np.ix_(chosen, chosen)])
    assert factors == {2, 3, 4}


@pytest.mark.parametrize(("kind", "weight"), [("blended_3_to_1", 0.75), ("blended_1_to_1", 0.5)])
def test_blends_have_the_label_of_the_copied_slice(kind, weight):
    made, parameters = planted(kind)
    assert parameters == {"weight": weight}
    near(made[:4], weight * SOURCE[:4] + (1 - weight) * PARTNER[:4])
    assert np.array_equal(made[4], SOURCE[4])


@pytest.mark.parametrize(
    ("kind", "other"), [("modality_removed", np.zeros_like(SOURCE)), ("modality_replaced", PARTNER)]
)
def test_one_modality_is_another(kind, other):
    seen = set()
    for index in range(40):
        made, parameters = planted(kind, index)
        seen.add(parameters["modality"])
        changed = ["T1", "T1ce", "T2", "FLAIR"].index(parameters["modality"])
        expected = SOURCE.copy()
        expected[changed] = other[changed]
        assert np.array_equal(made, expected)
    assert seen == {"T1", "T1ce", "T2", "FLAIR"}


def test_positives_of_a_set_name_their_slices(slice_set):
    training = SliceSet(slice_set, "train")
    patients, height = training.index["patient"].to_numpy(), relative_height(training)
    tables = {}
    for kind in ("exact", "blended_3_to_1"):
        made = plant_in(training, kind, 12, seed=1)
        tables[kind] = made.table
        for index, row in enumerate(made.table.itertuples()):
            source, partner = training.read([row.source, row.partner])
            expected, parameters = plant(kind, source, partner, 1, index)
            assert np.array_equal(made.slices[index], expected)
            assert json.loads(row.parameters) == parameters
            assert (row.source_patient, row.partner_patient) == (patients[row.source], patients[row.partner])
            assert row.partner_patient != row.source_patient
            others = np.abs(height[patients == row.partner_patient] - height[row.source])
            assert abs(height[row.partner] - height[row.source]) == others.min()
    same = ["source", "partner"]
    assert tables["exact"][same].equals(tables["blended_3_to_1"][same])
    assert tables["exact"]["source"].is_unique
    assert len(tables["exact"]) == 12
    assert len(plant_in(training, "exact", 1000, seed=1).table) == len(training)
    assert not plant_in(training, "exact", 12, seed=2).table["source"].equals(tables["exact"]["source"])


def test_a_single_patient_is_refused(slice_set):
    training = SliceSet(slice_set, "train")
    alone = training.subset((training.index["patient"] == "P1").to_numpy())
    with pytest.raises(ValueError, match="training slices of at least 2 patients to plant blends, but got 1"):
        plant_in(alone, "exact", 3, seed=0)
