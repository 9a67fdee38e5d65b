"""Check the volumes of a BraTS-like folder: every fault of every patient is found before anything is converted."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.layouts import Fault, Nifti, Volume, map_labels, pick_modality, read_nifti
from datamodules.slice_set import MODALITIES
from datamodules.slices import native_size_px

TOLERANCE = 1e-3
"""Largest difference of two affines (mm) or spacings (mm) that counts as equal."""
MAX_SHARE_OUTSIDE = 0.1
"""Share of the tumour that may lie where all modalities are 0 (0 in 15 patients of BraTS 2021)."""


class FaultyInputError(ValueError):
    """The input has faults; the message is a table of all of them.

    Attributes:
        faults: the rows of the table.
    """

    def __init__(self, faults: Sequence[Fault], root: Path, volumes: int) -> None:
        self.faults = list(faults)
        patients = len({fault.patient for fault in faults})
        super().__init__(
            f"{root}: {len(faults)} faults of {patients} patients ({volumes} complete volumes found). Nothing was "
            "converted. Mend them, or pass --skip_faulty true to go on without these patients (the manifest lists "
            f"them).\n{fault_table(faults)}"
        )


def fault_table(faults: Sequence[Fault]) -> str:
    """Lay out faults as text, one row each."""
    rows = [("patient", "file", "fault", "what to do")]
    rows += [(fault.patient, fault.file, fault.fault, fault.remedy) for fault in faults]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        " | ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return "\n".join(lines)


@dataclass(eq=False)
class Check:
    """What the check of one volume found; everything is JSON.

    Attributes:
        patient: as in `Volume`.
        volume: as in `Volume`.
        faults: nothing else counts if there is any.
        notes: what is odd, but no fault.
        spacing_mm: along the axes of `layouts.AXES`.
        native_px: side of the square that holds a slice.
        hashes: modality (or "seg") -> hash of the voxels.
        input_sha256: hash of the bytes of all files.
    """

    patient: str
    volume: str
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spacing_mm: tuple[float, ...] = ()
    native_px: int = 0
    hashes: dict[str, str] = field(default_factory=dict)
    input_sha256: str = ""


def check_volume(volume: Volume, root: Path) -> Check:
    """Read every voxel of a volume and report all that is wrong with it."""
    check = Check(volume.patient, volume.volume)

    def fault(path: Path, what: str, remedy: str) -> None:
        file = path.relative_to(root) if path.is_relative_to(root) else path
        check.faults.append(Fault(volume.patient, file.as_posix(), what, remedy))

    digest = hashlib.sha256()
    files: dict[Path, Nifti] = {}
    for path in volume.files:
        try:
            content = path.read_bytes()
            digest.update(hashlib.sha256(content).digest())
            files[path] = read_nifti(content, path.name)
        except (OSError, ValueError) as error:
            fault(path, str(error), "Fetch the file again")
    check.input_sha256 = digest.hexdigest()
    if check.faults:
        return check
    _check_geometry(volume, files, fault)
    if check.faults:
        return check
    brain = _check_images(volume, files, fault, check)
    if brain is not None:
        _check_labels(volume, files[volume.segmentation].array, brain, fault, check)
    reference = files[volume.images["T1"]]
    check.spacing_mm = reference.spacing_mm
    check.native_px = native_size_px(reference.array.shape)
    return check


def input_sha256(volume: Volume) -> str:
    """Hash the bytes of the files of a volume, as `check_volume` does."""
    digest = hashlib.sha256()
    for path in volume.files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


_Report = Callable[[Path, str, str], None]


def _check_geometry(volume: Volume, files: Mapping[Path, Nifti], fault: _Report) -> None:
    same = "All files of a patient must lie on one grid: fetch the file again, or register it to T1"
    for path, nifti in files.items():
        shape = nifti.array.shape
        is_image = path != volume.segmentation
        if is_image and volume.channels is not None:
            if len(shape) != 4 or shape[3] != len(MODALITIES):
                fault(path, f"expected 4-D with 4 channels, but got shape {shape}", "Fetch the file again")
        elif len(shape) != 3:
            remedy = "Store one 3-D volume per file"
            fault(path, f"expected a 3-D volume, but got {len(shape)}-D with shape {shape}", remedy)
    first = volume.images["T1"]
    reference = files[first]
    for path, nifti in files.items():
        shape, expected = nifti.array.shape[:3], reference.array.shape[:3]
        if shape != expected:
            fault(path, f"shape {shape}, but {expected} in {first.name}", same)
        elif not np.allclose(nifti.affine, reference.affine, rtol=0, atol=TOLERANCE):
            largest = np.abs(nifti.affine - reference.affine).max()
            fault(path, f"affine differs from that of {first.name} by up to {largest:.4g} mm", same)
    spacing = reference.spacing_mm
    if max(spacing) - min(spacing) > TOLERANCE:
        shown = " x ".join(f"{length:.4g}" for length in spacing)
        fault(first, f"voxels of {shown} mm are not cubes", "Resample to equal spacing, as all BraTS sets are")


def _check_images(
    volume: Volume, files: Mapping[Path, Nifti], fault: _Report, check: Check
) -> npt.NDArray[np.bool_] | None:
    """Check the intensities; give the brain (any modality above 0), or None where they make no sense."""
    brain: npt.NDArray[np.bool_] | None = None
    for name in MODALITIES:
        path = volume.images[name]
        image = pick_modality(volume, name, files[path].array)
        bad = int(np.size(image) - np.count_nonzero(np.isfinite(image)))
        if bad:
            fault(path, f"{name} has {bad} voxels that are NaN or infinite", "Fetch the file again")
            continue
        if not (image > 0).any():
            fault(path, f"{name} is zero everywhere", "Fetch the file again")
            continue
        if (image < 0).any():
            check.notes.append(f"{volume.volume}: {name} has negative voxels; they become 0.")
        key = _voxel_hash(image)
        twins = [other for other, known in check.hashes.items() if known == key]
        if twins:
            fault(path, f"{name} is the same image as {twins[0]}", "Fetch the right file")
        check.hashes[name] = key
        positive = image > 0
        brain = positive if brain is None else brain | positive
    return brain if len(check.hashes) == len(MODALITIES) else None


def _check_labels(
    volume: Volume, array: npt.NDArray[Any], brain: npt.NDArray[np.bool_], fault: _Report, check: Check
) -> None:
    path = volume.segmentation
    if not np.isfinite(array).all():
        fault(path, "segmentation has NaN or infinite voxels", "Fetch the file again")
        return
    fractional = array[array != np.round(array)]
    if fractional.size:
        remedy = "Labels must be whole numbers: resample segmentations with nearest neighbour"
        fault(path, f"{fractional.size} labels that are no whole numbers, such as {fractional[0]:g}", remedy)
        return
    try:
        tumour = map_labels(array, volume.label_codes, volume.layout) > 0
    except ValueError as error:
        fault(path, str(error), "Check which year the file is of, and that its name is of the same year")
        return
    voxels = int(tumour.sum())
    if not voxels:
        check.notes.append(f"{volume.volume}: the segmentation has no tumour.")
        return
    check.hashes["seg"] = _voxel_hash(array)
    outside = int((tumour & ~brain).sum())
    if outside > MAX_SHARE_OUTSIDE * voxels:
        what = f"{outside / voxels:.0%} of the tumour lie outside the brain: the segmentation of another patient?"
        fault(path, what, "Fetch the segmentation of this patient")


def _voxel_hash(array: npt.NDArray[Any]) -> str:
    """Hash shape and voxels; the transpose of what nibabel reads needs no copy."""
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(np.ascontiguousarray(array.T).data)
    return digest.hexdigest()


def check_across(checks: Sequence[Check], volumes: Mapping[str, Volume], root: Path) -> tuple[list[Fault], list[str]]:
    """Find what only shows between volumes: the same images under two names, differing spacing or grids.

    Args:
        checks: of volumes without faults of their own.
        volumes: by volume id.
        root: folder that file names are given relative to.

    Returns:
        Faults, and notes on time points of one patient that share images.
    """
    faults, notes = [], []
    for (first, second), kinds in _twins(checks).items():
        what = "segmentation" if kinds == ["seg"] else f"images ({', '.join(kinds)})"
        if first.patient == second.patient:
            notes.append(f"{first.volume} and {second.volume}, time points of one patient, have the same {what}.")
            continue
        for check, other in ((first, second), (second, first)):
            fault = f"the same {what} as patient {other.patient}"
            remedy = "Keep one of the two: a patient under two names may come to both sides of the split"
            faults.append(Fault(check.patient, _folder(volumes[check.volume], root), fault, remedy))
    for check, usual in _odd(checks, lambda check: round(check.spacing_mm[0] / TOLERANCE)):
        fault = f"spacing {check.spacing_mm[0]:.4g} mm, but {usual.spacing_mm[0]:.4g} mm in most patients"
        remedy = "Resample, or prepare these patients into a set of their own"
        faults.append(Fault(check.patient, _folder(volumes[check.volume], root), fault, remedy))
    for check, usual in _odd(checks, lambda check: check.native_px):
        fault = f"slices need {check.native_px} x {check.native_px} pixels, but {usual.native_px} in most patients"
        remedy = "Crop or pad the volumes, or prepare these patients into a set of their own"
        faults.append(Fault(check.patient, _folder(volumes[check.volume], root), fault, remedy))
    return faults, notes


def _twins(checks: Sequence[Check]) -> dict[tuple[Check, Check], list[str]]:
    owners: dict[tuple[str, str], list[Check]] = defaultdict(list)
    for check in checks:
        for kind, key in check.hashes.items():
            owners[kind, key].append(check)
    pairs: dict[tuple[Check, Check], list[str]] = defaultdict(list)
    for (kind, _), group in owners.items():
        for check in group[1:]:
            pairs[group[0], check].append(kind)
    return pairs


def _odd(checks: Sequence[Check], key: Callable[[Check], Hashable]) -> list[tuple[Check, Check]]:
    """Give the checks whose key is not the most frequent one (the first, if two are), each with a usual one."""
    if not checks:
        return []
    frequent = Counter(key(check) for check in checks).most_common(1)[0][0]
    usual = next(check for check in checks if key(check) == frequent)
    return [(check, usual) for check in checks if key(check) != frequent]


def _folder(volume: Volume, root: Path) -> str:
    folder = volume.images["T1"] if volume.channels is not None else volume.images["T1"].parent
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else folder.as_posix()
