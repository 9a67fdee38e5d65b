"""What is judged: pairs of label maps in NIfTI files, found by their names.

A prediction is called as its reference, `CASE.nii.gz` (a trailing `_seg` or `-seg` does not count). References are the
segmentations of a BraTS folder in any layout of `datamodules.layouts`, or a folder of label maps. What the codes of a
file mean is stated, not guessed: the same numbers mean other classes elsewhere.

| name | core, oedema, enhancing |
|---|---|
| `brats2021` (2018 to 2021) | 1, 2, 4 |
| `brats2023` | 1, 2, 3 |
| `brats2024` | 1, 2, 3; 4, the resection cavity, is background |
| `msd` (Medical Segmentation Decathlon, Task01) | 2, 1, 3 |
| a mapping, such as `{core: 2, oedema: 1, enhancing: 3}` | as it says |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.layouts import (
    CODES_2018,
    CODES_2023,
    CODES_2024,
    CODES_MSD,
    Fault,
    Volume,
    find_volumes,
    patient_of,
    read_nifti,
)
from datamodules.slice_set import CLASSES, SliceSet

Codes = Mapping[int, int]
KnownLabels = Literal["brats2021", "brats2023", "brats2024", "msd"]
OwnLabels = KnownLabels | Mapping[str, int]
Labels = OwnLabels | Literal["reference"]
CODES: Mapping[str, Codes] = {
    "brats2021": CODES_2018,
    "brats2023": CODES_2023,
    "brats2024": CODES_2024,
    "msd": CODES_MSD,
}
STATE_LABELS = (
    "State the codes with --labels: brats2021 (core 1, oedema 2, enhancing 4), brats2023 (1, 2, 3), brats2024 (1, 2, "
    "3; 4 is background), msd (2, 1, 3), reference (as the references), or a mapping such as "
    "'{core: 2, oedema: 1, enhancing: 3}'."
)
NO_REFERENCE = "prediction without reference"
_LABEL_MAP = re.compile(r"(?P<name>.+?)(?:[_-]seg)?\.nii(?:\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class LabelFile:
    """A file with labels.

    Attributes:
        path: NIfTI, 3-D.
        codes: code in the file -> class index 0 background, 1 core, 2 oedema, 3 enhancing.
        convention: name of these codes, for messages.
    """

    path: Path
    codes: Codes
    convention: str


@dataclass(frozen=True)
class Case:
    """A prediction and its reference.

    Attributes:
        name: of the case; the name of its files.
        patient: unit of the statistics; several time points share it.
        prediction: the label map that is judged.
        reference: the label map that counts as right.
        flair: an image to show both on: its file, and its place there where the file is 4-D.
        slices: axial slices that are judged, counted towards superior; None: all.
    """

    name: str
    patient: str
    prediction: LabelFile
    reference: LabelFile
    flair: tuple[Path, int | None] | None = None
    slices: tuple[int, ...] | None = None

    @property
    def files(self) -> dict[str, LabelFile]:
        """Both label maps: "prediction", then "reference"."""
        return {"prediction": self.prediction, "reference": self.reference}


def find_cases(
    predictions: Path,
    references: Path,
    labels: Labels | None = None,
    reference_labels: OwnLabels | None = None,
    listed: Path | None = None,
    slices: Path | None = None,
    ignore_extra: bool = False,
) -> tuple[list[Case], list[Fault]]:
    """Pair predictions with references by their names.

    Args:
        predictions: folder of label maps.
        references: BraTS folder, or folder of label maps.
        labels: codes of the predictions; None recognises BraTS 2018-2021 by a 4 without a 3.
        reference_labels: codes of a folder of label maps; None: as the predictions.
        listed: the cases to judge: a text file with a name per line, or a slice set, of which the test split counts;
            None: all references.
        slices: a slice set; only the axial slices that it holds are judged. None: all.
        ignore_extra: pass over predictions of other cases instead of reporting them.

    Returns:
        The pairs, sorted by name, and the faults: every other name is in one of them.

    Raises:
        ValueError: if a folder holds nothing to judge, or it is not known what the codes mean.
    """
    predicted, faults = _label_maps(predictions)
    known, of_references = _brats(references)
    own = _stated(labels) or _recognise(predicted, known) if labels != "reference" else None
    if not known:
        known, of_references = _plain(references, _stated(reference_labels) or own)
    elif reference_labels is not None:
        raise ValueError(f"{references} is a BraTS folder, whose layout says the codes. Leave out --reference_labels.")
    wanted = {*known} if listed is None else _read_list(listed)
    patients = {patient_of(name) for name in wanted}
    faults += [fault for fault in of_references if listed is None or fault.patient in patients]
    kept = None if slices is None else _slices_of_volumes(slices)
    cases = []
    for name in sorted(wanted | {*predicted}):
        if name not in wanted:
            if not ignore_extra:
                what = f"prediction of a case that is not in {listed}" if name in known else NO_REFERENCE
                faults.append(Fault(name, str(predicted[name]), what, "Remove it, or pass --ignore_extra true"))
        elif name not in known:
            faults.append(Fault(name, str(references), "no reference of this name", "Add it, or correct the list"))
        elif name not in predicted:
            remedy = "Add it, or list the cases to judge with --cases"
            faults.append(Fault(name, str(predictions / f"{name}.nii.gz"), "missing prediction", remedy))
        elif kept is not None and name not in kept:
            faults.append(Fault(name, str(slices), "the slice set has no slice of it", "Give the set it was tested on"))
        else:
            cases.append(_case(known[name], predicted[name], own, None if kept is None else kept[name]))
    return cases, faults


def _case(volume: Volume, prediction: Path, own: _Convention | None, slices: tuple[int, ...] | None) -> Case:
    theirs = _Convention(volume.layout, volume.label_codes)
    flair = None
    if volume.images:
        flair = volume.images["FLAIR"], None if volume.channels is None else volume.channels["FLAIR"]
    return Case(
        name=volume.volume,
        patient=volume.patient,
        prediction=LabelFile(prediction, (own or theirs).codes, (own or theirs).name),
        reference=LabelFile(volume.segmentation, theirs.codes, theirs.name),
        flair=flair,
        slices=slices,
    )


@dataclass(frozen=True)
class _Convention:
    name: str
    codes: Codes


def _stated(labels: Labels | None) -> _Convention | None:
    """Give the codes that an option names."""
    if labels is None or labels == "reference":
        return None
    if isinstance(labels, str):
        return _Convention(labels, CODES[labels])
    values = list(labels.values())
    if sorted(labels) != sorted(CLASSES[1:]) or len({*values}) < len(values) or not all(0 < v < 256 for v in values):
        raise ValueError(
            f"Expected different codes from 1 to 255 for each of {', '.join(CLASSES[1:])}, but got {dict(labels)}."
        )
    codes = {0: 0, **{code: CLASSES.index(name) for name, code in labels.items()}}
    return _Convention(str(dict(labels)), codes)


def _recognise(predicted: Mapping[str, Path], known: Mapping[str, Volume]) -> _Convention:
    """Find a 4 without a 3 in the predictions, which only BraTS 2018-2021 have.

    Raises:
        ValueError: if there is none, or 4 might be the resection cavity of BraTS 2024.
    """
    if not any(volume.layout == "BraTS 2024" for volume in known.values()):
        for path in predicted.values():
            try:
                array = read_nifti(path.read_bytes(), path.name).array
            except (OSError, ValueError):  # it will be reported with all others
                continue
            if (array == 3).any():
                break
            if (array == 4).any():
                return _Convention("brats2021 (recognised by a 4)", CODES["brats2021"])
    raise ValueError(f"What the codes of the predictions mean cannot be told from the files. {STATE_LABELS}")


def _label_maps(folder: Path) -> tuple[dict[str, Path], list[Fault]]:
    """Find the label maps that lie directly in a folder, by the name of the case."""
    found: dict[str, Path] = {}
    faults = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _LABEL_MAP.fullmatch(path.name)
        if match is None or path.name.startswith(".") or not path.is_file():
            continue
        name = match["name"]
        if name in found:
            faults.append(Fault(name, f"{found[name]} and {path.name}", "two files of one case", "Remove one of them"))
        found.setdefault(name, path)
    if not found:
        raise ValueError(f"Expected label maps CASE.nii.gz or CASE.nii directly in the folder {folder}: there is none.")
    return found, faults


def _brats(root: Path) -> tuple[dict[str, Volume], list[Fault]]:
    """Find the volumes of a BraTS folder; none where `root` is no such folder."""
    try:
        volumes, faults = find_volumes(root)
    except ValueError:
        return {}, []
    return {volume.volume: volume for volume in reversed(volumes)}, faults if volumes else []


def _plain(root: Path, convention: _Convention | None) -> tuple[dict[str, Volume], list[Fault]]:
    """Find the references of a folder of label maps."""
    if convention is None:
        raise ValueError(f"{root} is a folder of label maps, whose codes nobody knows. State --reference_labels.")
    found, faults = _label_maps(root)
    name, codes = convention.name, convention.codes
    return {case: Volume(patient_of(case), case, name, {}, path, codes) for case, path in found.items()}, faults


def _read_list(path: Path) -> set[str]:
    if path.is_dir():
        return {*SliceSet(path, "test").index["volume"]}
    if not path.is_file():
        raise ValueError(f"Expected a text file with a case per line, or a slice set, at {path}: there is none.")
    return {line.strip() for line in path.read_text().splitlines() if line.strip()}


def _slices_of_volumes(root: Path) -> dict[str, tuple[int, ...]]:
    groups = SliceSet(root).index.groupby("volume")["z"]
    return {str(name): tuple(sorted(z.tolist())) for name, z in groups}
