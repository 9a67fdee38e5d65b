"""Slice sets as raw data sets of nnU-Net v2 (Isensee et al. 2021, Nature Methods 18).

| file | content |
|---|---|
| `imagesTr/CASE_0000.png` ... `_0003.png`, `labelsTr/CASE.png` | slices to train on, 8-bit grey, label 0..3 |
| `imagesTs/`, `labelsTs/` | slices of the test patients; nnU-Net does not look at the labels |
| `dataset.json` | names of channels and labels |
| `splits_final.json` | folds of whole patients; the planner of nnU-Net copies it to where training reads it |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.exports import Case, Format, as_json, open_export, patient_folds, picture
from datamodules.slice_set import CLASSES, MODALITIES, Slices


class RawDataSet(Format):
    """One PNG per modality and one for the label."""

    def paths(self, case: Case) -> list[str]:
        """Images in the order of `MODALITIES`, then the label."""
        side = "Ts" if case.split == "test" else "Tr"
        images = [f"images{side}/{case.name}_{channel:04d}.png" for channel in range(len(MODALITIES))]
        return [*images, f"labels{side}/{case.name}.png"]

    def contents(self, one: Slices, case: Case) -> list[bytes]:
        """Grey levels and class indices as they are stored."""
        return [picture(channel) for channel in one]


def export_nnunet(
    slice_set: Path,
    out: Path,
    folds: int | None = None,
    seed: int = 0,
    skip_faulty: bool = False,
    workers: int | None = None,
) -> Path:
    """Write a slice set as a raw data set of nnU-Net v2, each slice a 2D case.

    The same command again goes on after an interruption. Then, in an environment with nnU-Net:
    nnUNetv2_plan_and_preprocess -d 501 -c 2d --verify_dataset_integrity; nnUNetv2_train 501 2d 0.

    Args:
        slice_set: real or synthetic.
        out: folder `nnUNet_raw/Dataset501_NAME`, new or left by the same command.
        folds: of the cross-validation over whole patients; null takes the validation patients of the set as the only
            fold, or 5 folds if it has none. Synthetic slices are patients of their own.
        seed: of the folds.
        skip_faulty: leave slices with a fault out; `export.json` lists them.
        workers: processes; null takes one per core.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder is called otherwise or holds something else, or the set has faults.
    """
    slice_set, out = Path(slice_set), Path(out)
    if not re.fullmatch(r"Dataset\d{3}_[A-Za-z0-9_-]+", out.name):
        raise ValueError(f"Expected a folder as nnU-Net wants it, such as nnUNet_raw/Dataset501_Brain, but got {out}.")
    export = open_export(slice_set, out, "nnunet", skip_faulty, workers)
    sides = export.by_split()
    learned = [*sides["train"], *sides["val"]]
    description = {
        "name": out.name,
        "description": f"{export.record['kind']} slices, from the StandIn slice set {export.record['fingerprint']}",
        "channel_names": {str(number): name for number, name in enumerate(MODALITIES)},
        "labels": {name: number for number, name in enumerate(CLASSES)},
        "numTraining": len(learned),
        "file_ending": ".png",
    }
    texts = {
        "splits_final.json": as_json(splits_final(sides, folds, seed)),
        "dataset.json": as_json(description),
    }
    export.write(RawDataSet(), texts)
    return out


def splits_final(sides: dict[str, list[Case]], folds: int | None, seed: int) -> list[dict[str, list[str]]]:
    """Give the names of the cases that each fold trains on and is validated by; no patient is on both sides."""
    if folds is None and sides["val"]:
        return [{"train": _names(sides["train"]), "val": _names(sides["val"])}]
    learned = sorted([*sides["train"], *sides["val"]], key=lambda case: case.row)
    count = 5 if folds is None else folds
    fold_of = patient_folds(learned, count, seed)
    splits: list[dict[str, Any]] = []
    for fold in range(count):
        kept = [case for case in learned if fold_of[case.patient] == fold]
        rest = [case for case in learned if fold_of[case.patient] != fold]
        splits.append({"train": _names(rest), "val": _names(kept)})
    return splits


def _names(cases: Sequence[Case]) -> list[str]:
    return [case.name for case in cases]
