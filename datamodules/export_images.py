"""Slice sets as the pictures that the paper's own programs read and write: one 8-bit grey PNG per channel, or TIFF.

Usman Akbar, Larsson, Blystad, Eklund, Scientific Data 11:259 (2024), arXiv 2306.02986; names and grey levels are those
of `Preparation/split_volumes_to_slices.m` in their repository muhamadusman/Assist (commit 43035d2, MIT): folders T1,
T1CE, T2, FLAIR and Seg, files `Subject_0002_slice_78_T1.png`, slices counted from 1. The rows of a picture are the
first axis of the volume, as in a slice set. The label is (BraTS code) / 5 · 255: 0, 51, 102 and 204.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.exports import Case, FileType, Format, open_export, picture
from datamodules.slice_set import Slices, read_manifest

FOLDERS = ("T1", "T1CE", "T2", "FLAIR", "Seg")
"""Of the channels, in the order of a slice set."""
ENDINGS = ("T1", "T1ce", "T2", "flair", "seg")
PAPER_LEVELS = (0, 51, 102, 204)
"""Grey levels of the classes 0..3 in the paper's pictures."""
_PAPER_ID = re.compile(r"BraTS20_Training_(\d{3})|BraTS2021_0(\d{4})")


@dataclass(frozen=True)
class Pictures(Format):
    """Five pictures per slice.

    Attributes:
        kind: slices of a real set lie in a folder for each split; those of a synthetic one have no split.
        file_type: how they are encoded, and the ending of their names.
    """

    kind: Literal["real", "synthetic"]
    file_type: FileType

    def paths(self, case: Case) -> list[str]:
        """One in the folder of each channel."""
        root, name = "", case.name
        if self.kind == "real":
            root, name = f"{case.split}/", f"Subject_{subject(case)}_slice_{case.z + 1}"
        return [
            f"{root}{folder}/{name}_{ending}.{self.file_type}" for folder, ending in zip(FOLDERS, ENDINGS, strict=True)
        ]

    def contents(self, one: Slices, case: Case) -> list[bytes]:
        """Grey levels as they are, and those of the classes."""
        label = np.asarray(PAPER_LEVELS, np.uint8)[one[-1]]
        return [picture(channel, self.file_type) for channel in (*one[:-1], label)]


def subject(case: Case) -> str:
    """Name a patient as the paper does, by the last digits (BraTS 2020: three, 2021: four), others by their volume."""
    match = _PAPER_ID.fullmatch(case.volume)
    return next(filter(None, match.groups())) if match else case.name.rpartition("_z")[0]


def export_images(
    slice_set: Path,
    out: Path,
    file_type: FileType = "png",
    skip_faulty: bool = False,
    workers: int | None = None,
) -> Path:
    """Write a slice set as pictures in the folders T1, T1CE, T2, FLAIR and Seg, as the paper's programs have them.

    Pictures of a real set come into a folder for each split, so that no test patient is trained on. The same command
    again goes on after an interruption.

    Args:
        slice_set: real or synthetic.
        out: folder, new or left by the same command.
        file_type: of the pictures: png, as the paper's, or tiff (deflated).
        skip_faulty: leave slices with a fault out; `export.json` lists them.
        workers: processes; null takes one per core.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder holds something else, or the set has faults.
    """
    slice_set, out = Path(slice_set), Path(out)
    form = Pictures(read_manifest(slice_set).kind, file_type)
    export = open_export(slice_set, out, f"{file_type} images", skip_faulty, workers)
    export.write(form, {})
    return out
