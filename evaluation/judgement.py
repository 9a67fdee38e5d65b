"""Check and judge one case; a judgement is kept under the hashes of both files, and made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.checks import TOLERANCE
from datamodules.layouts import Fault, map_labels, read_nifti
from datamodules.slice_set import write_atomically
from evaluation.cases import Case, LabelFile
from metrics.surface_distance import HausdorffKind
from metrics.volumes import judge_volume

JUDGEMENT_VERSION = 1
"""Raised when a number of `judge_volume` changes, so that judgements of before are made again."""


@dataclass(frozen=True)
class LabelMap:
    """A label map in memory.

    Attributes:
        classes: class index 0..3, (X, Y, Z), axes turned to `datamodules.layouts.AXES`.
        affine: from voxels to mm, as the file has it.
        spacing_mm: along the turned axes.
    """

    classes: npt.NDArray[np.uint8]
    affine: npt.NDArray[np.float64]
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Check:
    """What the check of a case found.

    Attributes:
        case: that was checked.
        hausdorff: kind of Hausdorff distances that are asked for.
        record: file that keeps the judgement.
        key: all that the judgement depends on, as JSON.
        faults: nothing else counts if there is any.
    """

    case: Case
    hausdorff: HausdorffKind
    record: Path
    key: Mapping[str, Any]
    faults: list[Fault] = field(default_factory=list)

    @property
    def is_judged(self) -> bool:
        """Whether the judgement is on record."""
        return _recorded(self) is not None


def read_label_map(content: bytes, file: LabelFile) -> LabelMap:
    """Decode a label map.

    Raises:
        ValueError: if it is damaged, not 3-D, or has an unknown label; the text goes on from "the file".
    """
    nifti = read_nifti(content, file.path.name)
    if nifti.array.ndim != 3:
        raise ValueError(f"is no 3-D label map, but of shape {nifti.array.shape}")
    return LabelMap(map_labels(nifti.array, file.codes, file.convention), nifti.affine, nifti.spacing_mm)


def check_case(case: Case, records: Path, hausdorff: HausdorffKind) -> Check:
    """Read both files and compare their grids, unless these very files were judged before."""
    faults: list[Fault] = []
    contents = {}
    for side, file in case.files.items():
        try:
            contents[side] = file.path.read_bytes()
        except OSError as error:
            faults.append(Fault(case.name, str(file.path), f"cannot be read ({error.strerror})", "Fetch it again"))
    check = Check(case, hausdorff, records / f"{case.name}.json", _key(case, contents, hausdorff), faults)
    if not faults and check.is_judged:
        return check
    maps = {}
    for side, content in contents.items():
        try:
            maps[side] = read_label_map(content, case.files[side])
        except ValueError as error:
            path = case.files[side].path
            faults.append(Fault(case.name, str(path), str(error), "Make or fetch it again, or state its codes"))
    if not faults:
        faults += _compare(case, **maps)
    return check


def judge_case(check: Check) -> pd.DataFrame:
    """Judge a case that has no faults, or take the record of its judgement.

    Returns:
        One row per entity: the numbers of `judge_volume`.

    Raises:
        ValueError: if a file has changed since the check.
    """
    rows = _recorded(check)
    if rows is None:
        case = check.case
        contents = {side: file.path.read_bytes() for side, file in case.files.items()}
        if _key(case, contents, check.hausdorff) != check.key:
            raise ValueError(f"Case {case.name}: a file changed after it was checked. Run the same command again.")
        maps = [judged_part(case, read_label_map(contents[side], file)) for side, file in case.files.items()]
        table = judge_volume(maps[0].classes, maps[1].classes, maps[1].spacing_mm, check.hausdorff)
        rows = [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
        write_atomically(check.record, json.dumps({"key": check.key, "rows": rows}) + "\n")
    return pd.DataFrame(rows)


def judged_part(case: Case, label_map: LabelMap) -> LabelMap:
    """Make background of the axial slices that are not judged."""
    if case.slices is None:
        return label_map
    classes = np.zeros_like(label_map.classes)
    classes[:, :, case.slices] = label_map.classes[:, :, case.slices]
    return LabelMap(classes, label_map.affine, label_map.spacing_mm)


def slices_text(case: Case) -> str:
    """Say which axial slices of a case are judged: "all", or runs such as "23-98,100"."""
    if case.slices is None:
        return "all"
    z = np.array(sorted(case.slices))
    runs = np.split(z, np.flatnonzero(np.diff(z) > 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _key(case: Case, contents: Mapping[str, bytes], hausdorff: HausdorffKind) -> dict[str, Any]:
    hashes = {f"{side}_sha256": hashlib.sha256(content).hexdigest() for side, content in contents.items()}
    codes = {f"{side}_codes": [list(pair) for pair in sorted(file.codes.items())] for side, file in case.files.items()}
    return {"version": JUDGEMENT_VERSION, "hausdorff": hausdorff, "slices": slices_text(case), **hashes, **codes}


def _recorded(check: Check) -> list[dict[str, Any]] | None:
    if not check.record.is_file():
        return None
    content = json.loads(check.record.read_text())
    return content["rows"] if content["key"] == check.key else None


def _compare(case: Case, prediction: LabelMap, reference: LabelMap) -> list[Fault]:
    """Find out whether both files have the same grid, and all slices that are to be judged."""
    shape, expected = prediction.classes.shape, reference.classes.shape
    remedy = "Resample it to the grid of the reference with nearest neighbour"
    if shape != expected:
        what = f"shape {shape}, but {expected} in {case.reference.path.name}"
    elif not np.allclose(prediction.affine, reference.affine, rtol=0, atol=TOLERANCE):
        largest = np.abs(prediction.affine - reference.affine).max()
        what = f"affine differs from that of {case.reference.path.name} by up to {largest:.4g} mm"
    elif case.slices is not None and max(case.slices) >= shape[2]:
        what = f"{shape[2]} slices, but slice {max(case.slices)} is to be judged"
        remedy = "Give the slice set of these patients"
    else:
        return []
    return [Fault(case.name, str(case.prediction.path), what, remedy)]
