"""Dice per patient at the end of every evaluation epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.image_grid import show
from datamodules.pictures import overlay, tile
from datamodules.slice_dataset import JoinedSlices
from datamodules.slice_set import SliceSet, to_display, write_atomically
from lightning_modules.base import log_epoch
from metrics.segmentation import COUNTS, ENTITIES, PatientDice, mean_over_patients

Stage = Literal["val", "test"]


class Dice(Callback):
    """Dice of the classes (core, oedema, enhancing) and regions (WT, TC, ET) per patient, in 3-D.

    The mean goes to the log as `dice/<stage>/<entity>`, and `dice/<stage>` is the mean over the three classes of a
    patient, then over patients. A class that neither prediction nor reference of a patient holds is left out of the
    mean ("nan") or counts 1 ("one"). After a test, `dice_per_patient.csv` holds every value with its counts.

    Args:
        empty: the convention for such classes.
        pictures: how many slices to show, prediction beside reference.
    """

    def __init__(self, empty: Literal["nan", "one"] = "nan", pictures: int = 8) -> None:
        self.empty: Literal["nan", "one"] = empty
        self.pictures = pictures

    def _start(self, trainer: Trainer, stage: Stage) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.set: JoinedSlices | SliceSet = datamodule.validation_slices if stage == "val" else datamodule.real_test
        self.metric = PatientDice(len(self.set.patients), self.empty).to(trainer.lightning_module.device)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new table."""
        self._start(trainer, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new table."""
        self._start(trainer, "test")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count; outputs is the predicted class index, uint8 (N, H, W)."""
        self.metric.update(outputs, batch["slices"][:, 4], batch["patient"])

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means and write the table of patients."""
        dice = self._log(trainer, pl_module, "test")
        with self.metric.sync_context():
            counts = self.metric.counts.clone()
        if trainer.is_global_zero:
            rows = [
                {"patient": patient, "entity": entity, **dict(zip(COUNTS, counts[p, e].tolist(), strict=True)),
                 "dice": float(dice[p, e])}
                for p, patient in enumerate(self.set.patients)
                for e, entity in enumerate(ENTITIES)
            ]  # fmt: skip
            table = pd.DataFrame(rows).to_csv(index=False)
            write_atomically(Path(trainer.default_root_dir) / "dice_per_patient.csv", table)

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> torch.Tensor:
        dice: torch.Tensor = self.metric.compute()
        mean, _ = mean_over_patients(dice)
        log_epoch(pl_module, {f"dice/{stage}/{name}": float(mean[i]) for i, name in enumerate(ENTITIES)})
        log_epoch(pl_module, {f"dice/{stage}": float(dice[:, :3].nanmean(dim=1).nanmean())}, prog_bar=True)
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._show(trainer, pl_module, stage)
        return dice.cpu()

    def _slices_with_tumour(self) -> torch.Tensor:
        """Give the slice with most tumour of the first patients: uint8 (pictures, 5, H, W)."""
        tumour = self.set.index[["core_px", "oedema_px", "enhancing_px"]].sum(axis=1)
        best = tumour.groupby(self.set.index["patient"]).idxmax().to_numpy()[: self.pictures]
        return torch.from_numpy(self.set.read(best))

    @torch.no_grad()
    def _show(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Show slices with much tumour: FLAIR, reference, prediction."""
        slices = self._slices_with_tumour().to(pl_module.device)
        step: Any = pl_module.validation_step
        prediction = step({"slices": slices}, 0).cpu().numpy()
        grey, label = to_display(slices.cpu().numpy()[:, 3]), to_display(slices.cpu().numpy()[:, 4])
        shown = zip(overlay(grey, label * 0), overlay(grey, label), overlay(grey, to_display(prediction)), strict=True)
        show(trainer, f"segmentation/{stage}", tile(list(shown)), getattr(pl_module, "images_seen", 0))
