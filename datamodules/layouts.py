"""Find the patients of a BraTS-like folder by their file names alone, and read one of their volumes.

| layout | files of a volume | codes of core, oedema, enhancing |
|---|---|---|
| BraTS 2018, 2019, 2020, 2021 | `X_t1`, `X_t1ce`, `X_t2`, `X_flair`, `X_seg` | 1, 2, 4 |
| BraTS 2023 (time points 000-099: before treatment) | `X-t1n`, `X-t1c`, `X-t2w`, `X-t2f`, `X-seg` | 1, 2, 3 |
| BraTS 2024 (time points 100 and up: after treatment) | the same | 1, 2, 3 and 4, the resection cavity |
| Medical Segmentation Decathlon, Task01 | `imagesTr/X` (4-D), `labelsTr/X`, `dataset.json` | 2, 1, 3 |

Every file ends in `.nii` or `.nii.gz` and may lie at any depth. The resection cavity (4) of BraTS 2024 is tissue that
is no longer there, so it becomes background; a 4 in a file of BraTS 2023 is refused. Time points of one patient
(`BraTS-GLI-00005-100`, `-101`) are volumes of one patient, `BraTS-GLI-00005`. Files of hidden names (`._*`) and files
that no layout knows are passed over.

All volumes are turned, by their affine, to the axis directions of the BraTS files (towards left, posterior, superior).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.slice_set import MODALITIES

AXES = ("L", "P", "S")
"""Direction in which each axis of a volume that was read points."""
CODES_2018 = {0: 0, 1: 1, 2: 2, 4: 3}
CODES_2023 = {0: 0, 1: 1, 2: 2, 3: 3}
CODES_2024 = {0: 0, 1: 1, 2: 2, 3: 3, 4: 0}
CODES_MSD = {0: 0, 1: 2, 2: 1, 3: 3}
MSD_LAYOUT = "MSD Task01"

_KINDS_2018 = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR", "seg": "seg"}
_KINDS_2023 = {"t1n": "T1", "t1c": "T1ce", "t2w": "T2", "t2f": "FLAIR", "seg": "seg"}
_KINDS_MSD = {"flair": "FLAIR", "t1w": "T1", "t1": "T1", "t1gd": "T1ce", "t1ce": "T1ce", "t2w": "T2", "t2": "T2"}
_STYLES = (("_", _KINDS_2018), ("-", _KINDS_2023))
_NIFTI = re.compile(r"(?P<stem>.+)\.nii(?:\.gz)?", re.IGNORECASE)
_MISNAMED_SEGMENTATIONS = {"W39_1998.09.19_Segm": "BraTS20_Training_355"}

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Volume:
    """The files of one examination of one patient.

    Attributes:
        patient: unit of every split; several time points share it.
        volume: the examination; equals `patient` where a patient has one.
        layout: name of the layout, for the reader.
        images: file of each modality (Medical Segmentation Decathlon: the same file four times).
        segmentation: the label file.
        label_codes: code in the file -> class index 0 background, 1 core, 2 oedema, 3 enhancing.
        channels: where the images are one 4-D file, the position of each modality in it.
    """

    patient: str
    volume: str
    layout: str
    images: Mapping[str, Path]
    segmentation: Path
    label_codes: Mapping[int, int]
    channels: Mapping[str, int] | None = None

    @property
    def files(self) -> list[Path]:
        """All files, each once: images in the order of the modalities, then the segmentation."""
        return [*dict.fromkeys(self.images[name] for name in MODALITIES), self.segmentation]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the input, and what to do about it."""

    patient: str
    file: str
    fault: str
    remedy: str


def find_volumes(root: Path) -> tuple[list[Volume], list[Fault]]:
    """Find every volume below `root`, sorted by volume id, and what is wrong with the names.

    Raises:
        ValueError: if `root` is no folder, or nothing in it looks like one of the layouts.
    """
    if not root.is_dir():
        raise ValueError(f"Expected a folder with patients at {root}, but there is none. Check the path.")
    volumes: list[Volume] = []
    faults: list[Fault] = []
    names: list[str] = []
    for folder, subfolders, files in _walk(root):
        names += files
        if "dataset.json" in files and "imagesTr" in subfolders:
            found = _find_msd(root, folder)
            subfolders[:] = [name for name in subfolders if name not in ("imagesTr", "labelsTr", "imagesTs")]
        else:
            found = _find_brats(root, folder, files)
        volumes += found[0]
        faults += found[1]
    if not volumes and not faults:
        seen = f"{len(names)} files, such as {', '.join(names[:3])}" if names else "no file"
        raise ValueError(
            f"No patient was found below {root}. Looked for X_t1, X_t1ce, X_t2, X_flair, X_seg (BraTS 2018-2021), "
            "X-t1n, X-t1c, X-t2w, X-t2f, X-seg (BraTS 2023, 2024), each .nii or .nii.gz, and dataset.json with "
            f"imagesTr and labelsTr (Medical Segmentation Decathlon, Task01). Found {seen}."
        )
    volumes.sort(key=lambda volume: volume.volume)
    places: dict[str, list[Volume]] = defaultdict(list)
    for volume in volumes:
        places[volume.volume].append(volume)
    for copies in places.values():
        for volume in copies[1:]:
            where = " and ".join(_relative(copy.images["T1"].parent, root) for copy in (copies[0], volume))
            remedy = "Keep one of the folders, or rename the files if these are two patients"
            faults.append(Fault(volume.patient, where, f"the patient id {volume.volume} is in two folders", remedy))
    return volumes, faults


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk folders and links to folders, each once, without hidden ones."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders[:] = []
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
        yield Path(folder), subfolders, sorted(name for name in files if not name.startswith("."))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _parse(stem: str) -> tuple[str, str, str] | None:
    """Split a name without ending into volume id, separator and modality (or "seg")."""
    for separator, kinds in _STYLES:
        volume, found, kind = stem.rpartition(separator)
        if found and volume and kind.lower() in kinds:
            return volume, separator, kinds[kind.lower()]
    return None


def _find_brats(root: Path, folder: Path, files: list[str]) -> tuple[list[Volume], list[Fault]]:
    groups: dict[str, dict[str, Path]] = defaultdict(dict)
    styles: dict[str, str] = {}
    strays: dict[str, Path] = {}
    faults: list[Fault] = []
    for name in files:
        match = _NIFTI.fullmatch(name)
        if match is None or not (folder / name).is_file():
            continue
        parsed = _parse(match["stem"])
        if parsed is None:
            if match["stem"] in _MISNAMED_SEGMENTATIONS:
                strays[_MISNAMED_SEGMENTATIONS[match["stem"]]] = folder / name
            continue
        volume, separator, kind = parsed
        styles.setdefault(separator, name)
        if kind in groups[volume]:
            both = f"{_relative(groups[volume][kind], root)} and {name}"
            faults.append(Fault(patient_of(volume), both, f"two files for {kind}", "Remove one of them"))
        groups[volume][kind] = folder / name
    if len(styles) > 1:
        fault = f"one folder with two namings: {styles['_']} (BraTS 2018-2021) and {styles['-']} (BraTS 2023, 2024)"
        remedy = "Move the files of each naming to a folder of their own"
        return [], [Fault(patient_of(volume), _relative(folder, root), fault, remedy) for volume in sorted(groups)]
    for volume, stray in strays.items():
        if volume in groups:
            groups[volume].setdefault("seg", stray)
    lonely = [volume for volume, group in groups.items() if set(group) == {"seg"}]
    volumes = []
    for volume, group in groups.items():
        if volume in lonely:
            continue
        kinds = _KINDS_2018 if "_" in styles else _KINDS_2023
        missing = [f"{volume}{next(iter(styles))}{end}" for end, kind in kinds.items() if kind not in group]
        if "seg" not in group and len(lonely) == 1 and len(groups) == 2:
            foreign = group["seg"] = groups[lonely.pop()]["seg"]
            fault = f"the segmentation is of another patient than the images, {volume}"
            remedy = f"Fetch the file {missing[-1]}.nii.gz of this patient"
            faults.append(Fault(patient_of(volume), _relative(foreign, root), fault, remedy))
            missing = missing[:-1]
        faults += [
            Fault(
                patient_of(volume),
                _relative(folder / f"{name}.nii.gz", root),
                "missing segmentation"
                if name.endswith("seg")
                else f"missing modality {kinds[name[len(volume) + 1 :]]}",
                "Add the file (.nii or .nii.gz) or leave the patient out",
            )
            for name in missing
        ]
        if re.match(r"BraTS-PED", volume, re.IGNORECASE):
            remedy = "Leave BraTS-PED out: its four labels have no counterpart in the other sets"
            faults.append(Fault(patient_of(volume), _relative(folder, root), "unsupported layout", remedy))
        elif {*MODALITIES, "seg"} <= set(group):
            layout, codes = _layout(volume, next(iter(styles)))
            images = {name: group[name] for name in MODALITIES}
            volumes.append(Volume(patient_of(volume), volume, layout, images, group["seg"], codes))
    for volume in lonely:
        faults.append(_orphan(patient_of(volume), _relative(groups[volume]["seg"], root)))
    return volumes, faults


def _orphan(patient: str, file: str) -> Fault:
    return Fault(patient, file, "segmentation without images", "Add the images, or move the file out of the folder")


def patient_of(volume: str) -> str:
    """Give the patient of a volume id: that of BraTS 2023 and 2024 ends in the time point."""
    match = re.fullmatch(r"(BraTS-[A-Z]+-\d+)-\d+", volume, re.IGNORECASE)
    return match[1] if match else volume


def _layout(volume: str, separator: str) -> tuple[str, dict[int, int]]:
    if separator == "_":
        match = re.match(r"BraTS(2021|20|19|18)_", volume, re.IGNORECASE)
        return f"BraTS 20{match[1][-2:]}" if match else "BraTS 2018-2021", CODES_2018
    match = re.fullmatch(r"BraTS-[A-Z]+-\d+-(\d+)", volume, re.IGNORECASE)
    return ("BraTS 2024", CODES_2024) if match and int(match[1]) >= 100 else ("BraTS 2023", CODES_2023)


def _find_msd(root: Path, folder: Path) -> tuple[list[Volume], list[Fault]]:
    file = _relative(folder / "dataset.json", root)
    try:
        content = json.loads((folder / "dataset.json").read_text())
        order = {_KINDS_MSD[str(name).lower()]: int(index) for index, name in content["modality"].items()}
        fits = all(word in content["labels"][code] for code, word in (("1", "edema"), ("2", "non-enh"), ("3", "enh")))
        listed = {Path(entry["image"]).name for entry in content.get("training", [])}
        problem = "" if fits and set(order) == set(MODALITIES) else "other modalities or labels"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        remedy = (
            "Give a folder whose dataset.json has FLAIR, T1w, t1gd, T2w and the labels edema, non-enhancing, enhancing"
        )
        return [], [Fault("-", file, f"not Task01 of the Medical Segmentation Decathlon ({problem})", remedy)]
    images, labels = (_nifti_files(folder / name) for name in ("imagesTr", "labelsTr"))
    listed = {stem for name in listed if (stem := _stem(name)) is not None}
    volumes, faults = [], []
    for stem in sorted({*images, *labels, *listed}):
        if stem in images and stem in labels:
            files = dict.fromkeys(MODALITIES, images[stem])
            volumes.append(Volume(stem, stem, MSD_LAYOUT, files, labels[stem], CODES_MSD, order))
        elif stem in images:
            remedy = "Add the file or leave the patient out"
            faults.append(
                Fault(stem, _relative(folder / "labelsTr" / images[stem].name, root), "missing segmentation", remedy)
            )
        elif stem in labels:
            faults.append(_orphan(stem, _relative(labels[stem], root)))
        else:
            remedy = "Fetch the file again, or take it off the list in dataset.json"
            faults.append(Fault(stem, file, f"dataset.json lists {stem}, but imagesTr has no such file", remedy))
    return volumes, faults


def _stem(name: str) -> str | None:
    match = _NIFTI.fullmatch(name)
    return match["stem"] if match and not name.startswith(".") else None


def _nifti_files(folder: Path) -> dict[str, Path]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {stem: path for path in files if (stem := _stem(path.name)) is not None and path.is_file()}


@dataclass(frozen=True)
class Nifti:
    """The voxels of one file, turned to `AXES`; `spacing_mm` along these axes; `affine` as the file has it."""

    array: Images
    affine: npt.NDArray[np.float64]
    spacing_mm: tuple[float, float, float]


def read_nifti(content: bytes, name: str) -> Nifti:
    """Decode a whole NIfTI file, checking the check sum of its compression to the last byte.

    Args:
        content: the bytes of the file.
        name: its name; `.gz` says that it is compressed.

    Raises:
        ValueError: if the file is truncated or no NIfTI file; the text goes on from "the file".
    """
    import nibabel

    orientations: Any = nibabel.orientations

    try:
        raw = gzip.decompress(content) if name.lower().endswith(".gz") else content
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"cannot be read ({error})") from error
    header_bytes = {int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big")}
    if not header_bytes & {348, 540}:
        raise ValueError(f"is no NIfTI file ({len(raw)} bytes, and no NIfTI header)")
    try:
        image = (nibabel.Nifti2Image if 540 in header_bytes else nibabel.Nifti1Image).from_bytes(raw)
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel has many kinds for damaged headers, without a common base
        raise ValueError(f"cannot be read ({' '.join(str(error).split())[:90]})") from error
    affine = np.asarray(image.affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9 or array.ndim < 3:
        raise ValueError(f"is no volume with a valid affine (shape {array.shape}, affine {affine[:3].tolist()})")
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(AXES))
    turned = affine @ orientations.inv_ornt_aff(turn, array.shape[:3])
    spacing = np.sqrt((turned[:3, :3] ** 2).sum(axis=0))
    with np.errstate(over="ignore"):
        voxels = np.asarray(orientations.apply_orientation(array, turn)).astype(np.float32)
    return Nifti(voxels, affine, (float(spacing[0]), float(spacing[1]), float(spacing[2])))


def pick_modality(volume: Volume, modality: str, array: npt.NDArray[Any]) -> Images:
    """Give the (X, Y, Z) image of a modality from the array of its file."""
    return array if volume.channels is None else array[..., volume.channels[modality]]


def map_labels(array: npt.NDArray[Any], codes: Mapping[int, int], convention: str) -> Labels:
    """Turn the codes of a label file into class indices.

    Args:
        array: what the file holds.
        codes: code -> class index.
        convention: whose codes these are, for the message.

    Raises:
        ValueError: if a code does not belong to them; the text goes on from "the file".
    """
    with np.errstate(invalid="ignore"):
        small = array.astype(np.uint8)
    whole = np.array_equal(small, array)
    found = np.flatnonzero(np.bincount(small.ravel())) if whole else np.unique(array)
    unknown = [f"{code:g}" for code in found if code not in codes]
    if unknown:
        expected = ", ".join(str(code) for code in sorted(codes))
        raise ValueError(f"has the label {', '.join(unknown[:5])}, but {convention} has only {expected}")
    table = np.zeros(256, np.uint8)
    table[list(codes)] = list(codes.values())
    return table[small]


def read_volume(volume: Volume) -> tuple[Images, Labels, tuple[float, float, float]]:
    """Read one volume, turned to `AXES`.

    Returns:
        Images (4, X, Y, Z) in the order of `MODALITIES`, as the file has them; class index (X, Y, Z); spacing in mm.

    Raises:
        ValueError: if a file cannot be read or a label is unknown; `check_volume` finds the other faults.
    """
    files: dict[Path, Nifti] = {}
    path = volume.segmentation
    try:
        for path in volume.files:
            files[path] = read_nifti(path.read_bytes(), path.name)
        labels = map_labels(files[volume.segmentation].array, volume.label_codes, volume.layout)
    except ValueError as error:
        raise ValueError(f"Patient {volume.patient}: {path} {error}.") from error
    images = np.stack([pick_modality(volume, name, files[volume.images[name]].array) for name in MODALITIES])
    return images, labels, files[volume.images["T1"]].spacing_mm
