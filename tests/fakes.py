"""Tiny fake patients in every layout: a block of noisy brain with a tumour in it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt

SHAPE = (24, 24, 8)
ENDINGS = {
    "2021": {"T1": "_t1", "T1ce": "_t1ce", "T2": "_t2", "FLAIR": "_flair", "seg": "_seg"},
    "2023": {"T1": "-t1n", "T1ce": "-t1c", "T2": "-t2w", "FLAIR": "-t2f", "seg": "-seg"},
}
CODES = {"2021": (0, 1, 2, 4), "2023": (0, 1, 2, 3), "msd": (0, 2, 1, 3)}
MSD_ORDER = ("FLAIR", "T1", "T1ce", "T2")


def lps_affine(spacing_mm: float = 1.0) -> npt.NDArray[np.float64]:
    """The affine of the BraTS files: axes towards left, posterior, superior."""
    return np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])


def fake_images(patient: str, shape: Sequence[int] = SHAPE) -> dict[str, npt.NDArray[np.int16]]:
    """Four images of int16 whose noise depends on the name; 0 outside the brain, which leaves out the end slices."""
    rng = np.random.default_rng(zlib.crc32(patient.encode()))
    brain = np.zeros(shape, bool)
    brain[3:-3, 2:-2, 1:-1] = True
    return {name: (brain * rng.integers(300, 1000, shape)).astype(np.int16) for name in ("T1", "T1ce", "T2", "FLAIR")}


def fake_labels(shape: Sequence[int] = SHAPE) -> npt.NDArray[np.uint8]:
    """Class indices: oedema around enhancing tumour around a core; 8 x 6 x 4, 4 x 4 x 4 and 2 x 2 x 4 voxels."""
    labels = np.zeros(shape, np.uint8)
    labels[8:16, 9:15, 2:6] = 2
    labels[10:14, 10:14, 2:6] = 3
    labels[11:13, 11:13, 2:6] = 1
    return labels


def write_nifti(path: Path, array: npt.NDArray, affine: npt.NDArray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, lps_affine() if affine is None else affine), path)
    return path


def write_patient(
    folder: Path,
    volume: str,
    layout: str = "2021",
    ending: str = ".nii.gz",
    affine: npt.NDArray | None = None,
    shape: Sequence[int] = SHAPE,
) -> dict[str, Path]:
    """Write the five files of a volume to `folder/volume/` and give their paths."""
    arrays: dict[str, npt.NDArray] = dict(fake_images(volume, shape))
    labels = fake_labels(shape)
    labels[9, 9, 2] = zlib.crc32(volume.encode()) % 3  # no two patients have the same segmentation
    labels[9, 10, 2:6] = np.unpackbits(np.array([zlib.crc32(volume.encode()) >> 8 & 255], np.uint8))[:4]
    arrays["seg"] = np.asarray(CODES[layout], np.uint8)[labels]
    paths = {name: folder / volume / f"{volume}{end}{ending}" for name, end in ENDINGS[layout].items()}
    for name, path in paths.items():
        write_nifti(path, arrays[name], affine)
    return paths


def write_patients(root: Path, count: int) -> list[str]:
    """Write BraTS2021_00000 and so on."""
    names = [f"BraTS2021_{number:05d}" for number in range(count)]
    for name in names:
        write_patient(root, name)
    return names


def write_msd(root: Path, names: Sequence[str], affine: npt.NDArray | None = None) -> Path:
    """Write Task01 of the Medical Segmentation Decathlon and give its folder."""
    folder = root / "Task01_BrainTumour"
    for name in names:
        images = fake_images(name)
        stacked = np.stack([images[modality] for modality in MSD_ORDER], axis=-1)
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", stacked, affine)
        labels = fake_labels()
        labels[9, 9, 2:6] = np.unpackbits(np.array([zlib.crc32(name.encode()) & 255], np.uint8))[:4]
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", np.asarray(CODES["msd"], np.uint8)[labels], affine)
    content = {
        "name": "BRATS",
        "tensorImageSize": "4D",
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "numTraining": len(names),
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder
