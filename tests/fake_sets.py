"""Slice sets for the tests of recipes and of the leak guard: real ones under chosen names, synthetic ones."""

from pathlib import Path

import numpy as np
from fake_study import heads

from datamodules.brats import BraTSDataModule
from datamodules.slice_set import SliceSet, class_pixels, finish_slice_set, save_shard

SLICES_PER_PATIENT = 6


def synthetic_set(root: Path, count: int = 10, size_px: int = 16, **content) -> Path:
    """Slices of grey level 3; every other one has tumour, every fifth enhancing tumour."""
    root.mkdir(parents=True)
    slices = np.full((count, 5, size_px, size_px), 3, np.uint8)
    slices[:, 4] = 0
    slices[::2, 4, 4:8, 4:8] = 2
    slices[::5, 4, 5:7, 5:7] = 3
    save_shard(root / "slices-00000.npy", slices)
    name = [f"{root.name}-{i}" for i in range(count)]
    index = class_pixels(slices[:, 4]).assign(patient=name, volume=name, z=0, split="train")
    finish_slice_set(root, index, {"kind": "synthetic", "spacing_mm": 1.0, "patients_seen": ["P0", "P1"], **content})
    return root


def real_set(root: Path, sides: dict[str, str], images: dict[str, np.ndarray] | None = None, size: int = 16) -> Path:
    """A real set of these patients (name -> split), each with images of its own unless they are given."""
    root.mkdir(parents=True)
    slices = [
        (images or {}).get(name, None) if name in (images or {}) else heads(SLICES_PER_PATIENT, size, [*name.encode()])
        for name in sides
    ]
    stacked = np.concatenate(slices)
    save_shard(root / "slices-00000.npy", stacked)
    patient = np.repeat(list(sides), [len(own) for own in slices])
    index = class_pixels(stacked[:, 4]).assign(
        patient=patient,
        volume=patient,
        z=np.concatenate([np.arange(len(own)) for own in slices]),
        split=np.repeat(list(sides.values()), [len(own) for own in slices]),
    )
    finish_slice_set(root, index, {"kind": "real", "spacing_mm": 1.0})
    return root


def resplit(root: Path, **columns) -> Path:
    """Write the index of a real set again with other columns."""
    index = SliceSet(root).index.drop(columns=["shard", "row"]).assign(**columns)
    finish_slice_set(root, index, {"kind": "real", "spacing_mm": 1.0})
    return root


def ready(root: Path, **options) -> BraTSDataModule:
    """A DataModule that is set up, with batches of 4 and epochs of 8."""
    data = BraTSDataModule(str(root), **{"batch_size": 4, "epoch_images": 8, **options})
    data.setup()
    return data
