"""Slice sets in the form of the Medical Segmentation Decathlon, as MONAI's `load_decathlon_datalist` reads it.

Antonelli et al. 2022, "The Medical Segmentation Decathlon" (Nature Communications 13). Every slice is an image of
(H, W, 1, 4) voxels with its label (H, W, 1), so `LoadImaged` with `ensure_channel_first` gives (4, H, W, 1).
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.exports import Case, Format, as_json, open_export, patient_folds
from datamodules.slice_set import CLASSES, MODALITIES, Manifest, Slices, read_manifest


@dataclass(frozen=True)
class Decathlon(Format):
    """One NIfTI file for the modalities of a slice and one for its label.

    Attributes:
        spacing_mm: of the pixels.
        thickness_mm: from one slice of a volume to the next.
    """

    spacing_mm: float
    thickness_mm: float

    @classmethod
    def of(cls, manifest: Manifest) -> Decathlon:
        """Take the geometry of a set; slices that were made smaller are still as thick as the voxels were."""
        return cls(manifest.spacing_mm, float(manifest.content.get("native_spacing_mm", manifest.spacing_mm)))

    def paths(self, case: Case) -> list[str]:
        """The image, then the label."""
        side = "Ts" if case.split == "test" else "Tr"
        return [f"images{side}/{case.name}.nii.gz", f"labels{side}/{case.name}.nii.gz"]

    def contents(self, one: Slices, case: Case) -> list[bytes]:
        """Grey levels (H, W, 1, 4) and class indices (H, W, 1)."""
        image, label = one[:-1].transpose(1, 2, 0)[:, :, None], one[-1][:, :, None]
        return [self._nifti(image, case.z), self._nifti(label, case.z)]

    def _nifti(self, values: npt.NDArray[np.uint8], z: int) -> bytes:
        """Compress an image whose axes point to the left, to posterior and to superior; equal bytes for equal input."""
        import nibabel

        library: Any = nibabel
        affine = np.diag([-self.spacing_mm, -self.spacing_mm, self.thickness_mm, 1.0])
        affine[2, 3] = z * self.thickness_mm
        image = library.Nifti1Image(np.ascontiguousarray(values), affine)
        image.header.set_xyzt_units("mm")
        return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def export_decathlon(
    slice_set: Path,
    out: Path,
    folds: int = 5,
    seed: int = 0,
    skip_faulty: bool = False,
    workers: int | None = None,
) -> Path:
    """Write a slice set as NIfTI files with a Decathlon datalist, for MONAI.

    `load_decathlon_datalist("OUT/dataset.json", data_list_key="training")` gives the slices to train on; "validation"
    and "test" those of the other patients. Every entry names its patient. The same command again goes on after an
    interruption.

    Args:
        slice_set: real or synthetic.
        out: folder, new or left by the same command.
        folds: where the set has no validation patients, entries say in which of so many folds of whole patients they
            are. Synthetic slices are patients of their own.
        seed: of the folds.
        skip_faulty: leave slices with a fault out; `export.json` lists them.
        workers: processes; null takes one per core.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder holds something else, or the set has faults.
    """
    slice_set, out = Path(slice_set), Path(out)
    form = Decathlon.of(read_manifest(slice_set))
    export = open_export(slice_set, out, "decathlon", skip_faulty, workers)
    sides = export.by_split()
    fold_of = {} if sides["val"] else patient_folds(sides["train"], folds, seed)

    def entries(cases: list[Case]) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        for case in cases:
            image, label = form.paths(case)
            fold = {"fold": fold_of[case.patient]} if case.patient in fold_of else {}
            found.append({"image": image, "label": label, "patient": case.patient, **fold})
        return found

    description = {
        "name": out.name,
        "description": f"{export.record['kind']} slices, from the StandIn slice set {export.record['fingerprint']}",
        "tensorImageSize": "4D",
        "modality": {str(number): name for number, name in enumerate(MODALITIES)},
        "labels": {str(number): name for number, name in enumerate(CLASSES)},
        "numTraining": len(sides["train"]),
        "numTest": len(sides["test"]),
        "training": entries(sides["train"]),
        "validation": entries(sides["val"]),
        "test": entries(sides["test"]),
    }
    export.write(form, {"dataset.json": as_json(description)})
    return out
