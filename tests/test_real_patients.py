"""The preparation on real patients of BraTS 2021; needs the environment variable BRATS_DIR."""

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from datamodules.prepare import prepare
from datamodules.slice_set import SliceSet

pytestmark = pytest.mark.skipif("BRATS_DIR" not in os.environ, reason="BRATS_DIR names no folder with real patients")


def read(patient, kind):
    folder = Path(os.environ["BRATS_DIR"]) / patient
    return nibabel.load(folder / f"{patient}_{kind}.nii.gz").get_fdata()


@pytest.fixture(scope="module")
def patients():
    return sorted(path.name for path in Path(os.environ["BRATS_DIR"]).iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return SliceSet(prepare(Path(os.environ["BRATS_DIR"]), tmp_path_factory.mktemp("real") / "set", size_px=64))


def test_every_patient_comes_through_the_checks(prepared, patients):
    content = prepared.manifest.content
    assert prepared.patients == patients
    assert content["skipped_patients"] == []
    assert content["layouts"] == {"BraTS 2021": len(patients)}
    assert (prepared.manifest.size_px, prepared.manifest.spacing_mm) == ((64, 64), 4.0)


def test_about_75_slices_of_a_patient_are_kept(prepared):
    kept = prepared.index.groupby("patient").size()
    assert kept.between(60, 95).all()
    assert kept.mean() == pytest.approx(76, abs=4)


def test_small_images_are_block_means_of_the_scaled_volume(prepared, patients):
    patient = patients[0]
    entry = next(e for e in prepared.manifest.content["volumes"] if e["patient"] == patient)
    rows = prepared.index.index[prepared.index["patient"] == patient]
    slices = prepared.read(rows)
    for channel, (name, kind) in enumerate((("T1", "t1"), ("T1ce", "t1ce"), ("T2", "t2"), ("FLAIR", "flair"))):
        image = np.clip(read(patient, kind) / entry["white_level"][name] * 255, 0, 255)
        image = np.pad(image, ((8, 8), (8, 8), (0, 0)))[:, :, prepared.index["z"][rows]]
        means = image.reshape(64, 4, 64, 4, -1).mean(axis=(1, 3))
        assert np.abs(slices[:, channel] - means.transpose(2, 0, 1)).max() <= 1.0  # two roundings of at most 1/2


def test_paper_preset_keeps_the_slices_of_its_rule(tmp_path, patients):
    root = tmp_path / "two"
    root.mkdir()
    for patient in (patients[0], patients[-1]):
        (root / patient).symlink_to(Path(os.environ["BRATS_DIR"]) / patient)
    slices = SliceSet(prepare(root, tmp_path / "set", preset="paper", split="paper"))
    for patient in (patients[0], patients[-1]):
        t1 = read(patient, "t1")
        t1 = t1 / t1.max() * 255
        expected = [z for z in range(155) if np.count_nonzero(t1[:, :, z] > 50) >= 9831]
        rows = slices.index.index[slices.index["patient"] == patient]
        assert slices.index["z"][rows].tolist() == expected
        labels = read(patient, "seg")[:, :, expected]
        stored = slices.read(rows)
        assert (stored[:, 4] == 3).sum() == (labels == 4).sum()
        middle = len(expected) // 2
        np.testing.assert_array_equal(
            stored[middle, 0, 8:248, 8:248], np.floor(t1[:, :, expected[middle]] + 0.5).astype(np.uint8)
        )
