"""How well an autoencoder restores slices: numbers and pictures."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torchmetrics.regression import MeanSquaredError

from callbacks.dice import Dice, Stage
from callbacks.image_grid import show
from datamodules.pictures import panels, tile
from lightning_modules.base import log_epoch
from lightning_modules.image_generator import images_to_slices


class Reconstruction(Dice):
    """Dice of the restored label, and peak signal-to-noise ratio of the restored modalities.

    `psnr/<stage>/<modality>`, in dB, compares the range of grey levels with the mean squared difference over all pixels
    of all slices, background included.

    Args:
        empty: what a class counts that neither restored nor true label of a patient holds: nothing or 1.
        pictures: how many slices to show, above what became of them.
    """

    def _start(self, trainer: Trainer, stage: Stage) -> None:
        super()._start(trainer, stage)
        self.modalities: list[str] = trainer.datamodule.channels[:-1]  # type: ignore[attr-defined]
        self.error = MeanSquaredError(num_outputs=len(self.modalities)).to(trainer.lightning_module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Compare; outputs is the restored images, float (N, 5, H, W) in [-1, 1]."""
        restored = images_to_slices(outputs)
        super().on_validation_batch_end(trainer, pl_module, restored[:, -1], batch, *args)
        ours, truth = (slices[:, :-1].movedim(1, -1).flatten(0, -2).float() for slices in (restored, batch["slices"]))
        self.error.update(ours, truth)  # (pixels, modalities) each

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> torch.Tensor:
        psnr = 10.0 * torch.log10(255.0**2 / self.error.compute())
        values = dict(zip(self.modalities, psnr.tolist(), strict=True))
        log_epoch(pl_module, {f"psnr/{stage}/{name}": value for name, value in values.items()})
        log_epoch(pl_module, {f"psnr/{stage}": float(psnr.mean())}, prog_bar=True)
        return super()._log(trainer, pl_module, stage)

    @torch.no_grad()
    def _show(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Show slices with much tumour, and below each what became of it."""
        slices = self._slices_with_tumour().to(pl_module.device)
        step: Any = pl_module.validation_step
        restored = images_to_slices(step({"slices": slices}, 0)).cpu().numpy()
        rows = [panels(one) for pair in zip(slices.cpu().numpy(), restored, strict=True) for one in pair]
        show(trainer, f"reconstruction/{stage}", tile(rows), getattr(pl_module, "images_seen", 0))
