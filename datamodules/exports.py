"""What the exports of slice sets to other tools share: checks of every slice, and files that a killed export keeps.

Slices are checked for what other tools do not find (nnU-Net's own check passes black images and label files without an
image): modalities that are zero everywhere, labels of no known class or of another slice than the index says, patients
without tumour or on two sides of the split, and foreign files in the folder. NaN cannot occur: a slice set holds whole
numbers, and one with anything else is not opened.

Every slice is a case of its own. Its name is that of its volume, in a real set with its place: `BraTS2021_00002_z077`.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from datamodules.parallel import available_cores, run_in_processes
from datamodules.slice_set import CLASSES, INDEX_COLUMNS, MODALITIES, Slices, SliceSet, class_pixels, write_atomically
from datamodules.splits import SPLITS

FileType = Literal["png", "tiff"]

RECORD = "export.json"
SHOWN = 20
CASES_AT_ONCE = 256
_TUMOUR_PX = [f"{name}_px" for name in CLASSES[1:]]


@dataclass(frozen=True)
class Case:
    """A slice on its way out.

    Attributes:
        name: letters, digits and `._-` only; unique in the set.
        row: its place in the slice set.
        patient: whose slice it is; a synthetic one is a patient of its own.
        volume: as in the index.
        split: train, val or test.
        z: height in the volume, counted from 0.
    """

    name: str
    row: int
    patient: str
    volume: str
    split: str
    z: int


Part = tuple[SliceSet, Sequence[Case]]
"""Some of the slices of a set, and the case that each is."""


class Format(ABC):
    """How a slice becomes files."""

    @abstractmethod
    def paths(self, case: Case) -> list[str]:
        """Name its files, relative to the folder of the export."""

    @abstractmethod
    def contents(self, one: Slices, case: Case) -> list[bytes]:
        """Give what is in them; `one` is uint8 (5, H, W)."""


@dataclass(frozen=True)
class Export:
    """An export that may be written: its slices passed the checks, and the folder is its own.

    Attributes:
        slices: the set that they are from.
        out: folder of the export.
        cases: the slices that go, in the order of the set.
        record: what `export.json` says.
        workers: processes.
    """

    slices: SliceSet
    out: Path
    cases: Sequence[Case]
    record: Mapping[str, Any]
    workers: int

    def by_split(self) -> dict[str, list[Case]]:
        """Divide the cases as their set does, into "train", "val" and "test"."""
        return {split: [case for case in self.cases if case.split == split] for split in SPLITS}

    def write(self, form: Format, texts: Mapping[str, str]) -> None:
        """Write all files of all cases that are not there yet, then `texts`, by name."""
        self.make_room({path for case in self.cases for path in form.paths(case)}, texts)
        parts = in_parts(self.slices, self.cases, CASES_AT_ONCE)
        run_in_processes(partial(_write_part, self.out, form), parts, self.workers, "Writing")
        self.finish(texts)

    def make_room(self, paths: set[str], texts: Iterable[str]) -> None:
        """Make the folders of these files, and find what does not belong there: images without label and the reverse.

        Raises:
            ValueError: naming files that are in the folder, but neither among `paths` nor `texts`.
        """
        for leftover in self.out.rglob(".*.tmp"):
            leftover.unlink()
        there = {path.relative_to(self.out).as_posix() for path in self.out.rglob("*") if path.is_file()}
        if foreign := sorted(there - paths - {*texts, RECORD}):
            raise ValueError(
                f"{self.out} holds {len(foreign)} files that belong to no slice of {self.slices.root}: "
                f"{shown(foreign, ', ')}. Remove them, or choose another folder."
            )
        for folder in sorted({(self.out / path).parent for path in paths}):
            folder.mkdir(parents=True, exist_ok=True)

    def finish(self, texts: Mapping[str, str]) -> None:
        """Write the texts that describe the whole, and the record last: it says that the folder is complete."""
        for name, text in texts.items():
            write_atomically(self.out / name, text)
        write_atomically(self.out / RECORD, as_json({**self.record, "finished": True}))


def open_export(root: Path, out: Path, kind: str, skip_faulty: bool, workers: int | None) -> Export:
    """Check every slice of a set, and take possession of the folder that it goes to.

    Args:
        root: the slice set.
        out: new, empty, or left by the same export of the same set.
        kind: name of the format.
        skip_faulty: leave slices with a fault out and list them in the record, instead of refusing the set.
        workers: processes; None takes one per core.

    Raises:
        ValueError: with the names of all slices that have a fault, or if `out` holds something else.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: expected 1 or more, or null for one per core.")
    workers = workers or available_cores()
    slices = SliceSet(root)
    cases = _name_cases(slices)
    faults = _find_faults(slices, cases, workers)
    if faults and not skip_faulty:
        raise ValueError(
            f"{root}: {len(faults)} of {len(cases)} slices cannot be exported. Mend the set, or pass --skip_faulty "
            f"true to leave them out; {RECORD} then lists them.\n{shown([f'{n}: {f}' for n, f in faults.items()])}"
        )
    left = [case for case in cases if case.name not in faults]
    if not slices.index.loc[[case.row for case in left], _TUMOUR_PX].to_numpy().any():
        raise ValueError(f"{root}: no slice that could be exported shows a tumour. There is nothing to learn from it.")
    record = {
        "format": kind,
        "kind": slices.manifest.kind,
        "fingerprint": slices.manifest.fingerprint,
        "software": f"standin {version('standin')}",
        "slices": len(left),
        "left_out": faults,
    }
    _take(out, record)
    return Export(slices, out, left, record, workers)


def _name_cases(slices: SliceSet) -> list[Case]:
    """Name every slice, and refuse a set whose index or manifest makes no sense."""
    index, spacing, root = slices.index, slices.manifest.spacing_mm, slices.root
    if index[list(INDEX_COLUMNS)].isna().any(axis=None):
        raise ValueError(f"{root}/index.parquet lacks values. Make the slice set again.")
    if not (math.isfinite(spacing) and spacing > 0):
        raise ValueError(f"{root}/dataset.json: expected spacing_mm above 0, but got {spacing}.")
    if unknown := sorted(set(index["split"]) - set(SPLITS)):
        raise ValueError(f"{root}: expected the splits {', '.join(SPLITS)}, but got {', '.join(unknown)}.")
    sides = index.groupby("patient")["split"].unique()
    if torn := [f"{patient} in {' and '.join(sorted(own))}" for patient, own in sides.items() if len(own) > 1]:
        raise ValueError(f"{root}: {len(torn)} patients are on two sides of the split.\n{shown(torn)}")
    is_real = slices.manifest.kind == "real"
    cases = []
    for row, (patient, volume, split, z) in enumerate(index[["patient", "volume", "split", "z"]].to_numpy()):
        name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{volume}_z{z:03d}" if is_real else volume)
        cases.append(Case(name, row, patient, volume, split, int(z)))
    if twice := sorted(name for name, count in Counter(case.name for case in cases).items() if count > 1):
        raise ValueError(f"{root}: {len(twice)} slices are there more than once.\n{shown(twice)}")
    return cases


def _find_faults(slices: SliceSet, cases: Sequence[Case], workers: int) -> dict[str, str]:
    """Give the faults by the names of the slices."""
    faults: dict[str, str] = {}
    for found in run_in_processes(_check_part, in_parts(slices, cases, CASES_AT_ONCE), workers, "Checking"):
        faults |= found
    if slices.manifest.kind == "real":
        of_volume = slices.index[_TUMOUR_PX].sum(axis=1).groupby(slices.index["volume"]).transform("sum")
        for case, pixels in zip(cases, of_volume, strict=True):
            if not pixels:
                faults.setdefault(case.name, f"no slice of {case.volume} shows a tumour: are its labels missing?")
    return dict(sorted(faults.items()))


def _check_part(part: Part) -> dict[str, str]:
    slices, cases = part
    pixels = slices.read(range(len(cases)))
    counted = class_pixels(pixels[:, -1])
    is_other = (counted.to_numpy() != slices.index[list(counted)].to_numpy()).any(axis=1)
    faults = {}
    for case, one, other in zip(cases, pixels, is_other, strict=True):
        black = [name for name, image in zip(MODALITIES, one, strict=False) if not image.any()]
        if black:
            faults[case.name] = f"{', '.join(black)} zero everywhere"
        elif one[-1].max() >= len(CLASSES):
            faults[case.name] = f"its label has the value {one[-1].max()}, but classes are 0 to {len(CLASSES) - 1}"
        elif other:
            faults[case.name] = "its label is not the one of index.parquet (other numbers of pixels)"
    return faults


def _write_part(out: Path, form: Format, part: Part) -> None:
    slices, cases = part
    for place, case in enumerate(cases):
        paths = [out / path for path in form.paths(case)]
        if not all(path.exists() for path in paths):
            for path, content in zip(paths, form.contents(slices.read([place])[0], case), strict=True):
                write_file(path, content)


def write_file(path: Path, content: bytes) -> None:
    """Write one of very many files under a temporary name and rename it.

    Unlike `write_atomically` it does not wait for the disk, which takes longer than all the rest.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _take(out: Path, record: Mapping[str, Any]) -> None:
    """Write the record of the export that begins in a folder.

    Raises:
        ValueError: if the folder holds anything that does not belong to the same export.
    """
    path = out / RECORD
    if out.exists() and not path.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and holds no export. Choose another folder.")
    before = json.loads(path.read_text()) if path.is_file() else record
    if different := [key for key in ("format", "fingerprint", "left_out") if before.get(key) != record[key]]:
        raise ValueError(
            f"{out} holds an export with another {' and '.join(different)} than is asked for. Choose another folder."
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, as_json({**record, "finished": False}))


def in_parts(slices: SliceSet, cases: Sequence[Case], size: int) -> list[Part]:
    """Cut cases into parts of that many, each with its own slices in the same order, to hand them to processes."""
    chunks = [cases[start : start + size] for start in range(0, len(cases), size)]
    return [(slices.subset([case.row for case in chunk]), chunk) for chunk in chunks]


def patient_folds(cases: Sequence[Case], folds: int, seed: int) -> dict[str, int]:
    """Deal the patients of the cases to train on to folds of nearly equal numbers of patients.

    Raises:
        ValueError: if there are fewer patients than folds, or fewer than two folds.
    """
    patients = sorted({case.patient for case in cases})
    if not 2 <= folds <= len(patients):
        raise ValueError(f"folds={folds}: expected 2 to {len(patients)}, the number of patients to train on.")
    order = np.random.default_rng((seed, len(patients), folds)).permutation(len(patients))
    return {patients[place]: number % folds for number, place in enumerate(order)}


def picture(image: Slices, file_type: FileType = "png") -> bytes:
    """Encode uint8 (H, W) as an 8-bit grey picture without loss, whose rows are the first axis."""
    buffer = io.BytesIO()
    compression = {"compression": "tiff_adobe_deflate"} if file_type == "tiff" else {}
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, file_type, **compression)
    return buffer.getvalue()


def as_json(content: Any) -> str:
    """Lay out JSON with a line break at its end."""
    return json.dumps(content, indent=1) + "\n"


def shown(words: Sequence[str], separator: str = "\n") -> str:
    """Join the first of many words, and say how many more there are."""
    more = [f"... and {len(words) - SHOWN} more"] if len(words) > SHOWN else []
    return separator.join([*words[:SHOWN], *more])
