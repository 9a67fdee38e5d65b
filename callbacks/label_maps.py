"""Predicted label maps as NIfTI files in the patients' own space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.native_space import native_space, save_label_map, to_native
from datamodules.slice_set import Slices, SliceSet


class LabelMaps(Callback):
    """Write what a segmenter predicts of the test volumes: `<run_dir>/predictions/<volume>.nii.gz`.

    The files have grid, orientation and label codes of the patient's own segmentation, so they open over the original
    images; slices that the slice set does not hold are background. Every process writes the volumes that it predicts,
    each when its last slice is there, and holds no more than the volumes of the current batch.

    Attributes:
        files: of the volumes that this process has written in the current test or prediction.
    """

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self._unfinished: dict[str, dict[int, Slices]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look up the spaces of all test volumes, so that a set without them is refused before anything slow."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.set: SliceSet = datamodule.real_test
        self.slices_of = self.set.index.groupby("volume").size().to_dict()
        self.spaces = {volume: native_space(self.set.manifest, volume) for volume in self.slices_of}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.files, self._unfinished = {}, {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect slices, and write the volumes that are complete; outputs is the class index, uint8 (N, H, W)."""
        rows = self.set.index.iloc[batch["position"].cpu().numpy()]
        for volume, z, classes in zip(rows["volume"], rows["z"], outputs.cpu().numpy(), strict=True):
            slices = self._unfinished.setdefault(volume, {})
            slices[z] = classes
            if len(slices) == self.slices_of[volume]:
                path = Path(trainer.default_root_dir) / "predictions" / f"{volume}.nii.gz"
                self._write(path, volume, self._unfinished.pop(volume))
                self.files[volume] = path

    def _write(self, path: Path, volume: str, slices: dict[int, Slices]) -> None:
        downsampling = self.set.manifest.content["downsampling"]
        labels = to_native(np.stack(list(slices.values())), list(slices), self.spaces[volume], downsampling)
        save_label_map(path, labels, self.spaces[volume])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a test of parts of volumes."""
        parts = [f"{len(slices)} of {self.slices_of[name]} of {name}" for name, slices in self._unfinished.items()]
        if parts:
            raise ValueError(
                f"LabelMaps: expected all slices of a volume, but got {', '.join(parts)}. Leave out "
                "trainer.limit_test_batches and trainer.limit_predict_batches."
            )

    on_predict_epoch_start = on_test_epoch_start
    on_predict_batch_end = on_test_batch_end
    on_predict_epoch_end = on_test_epoch_end
