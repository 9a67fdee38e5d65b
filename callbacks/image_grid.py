"""Sample grids in TensorBoard and on disk: the same seeds at every epoch, beside real slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib import image as image_file

from datamodules.pictures import Picture, sheet
from lightning_modules.image_generator import ImageGenerator


class ImageGrid(Callback):
    """Show what the generator makes of fixed seeds: every modality, and the label in colour over FLAIR.

    Args:
        slices: rows of the grid.
        seed: names the series; the rows are its images 0, 1, ....
        every_n_epochs: how often.
    """

    def __init__(self, slices: int = 8, seed: int = 0, every_n_epochs: int = 1) -> None:
        self.slices = slices
        self.seed = seed
        self.every_n_epochs = every_n_epochs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show real training slices once."""
        if trainer.is_global_zero:
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
            real = datamodule.real_train
            chosen = torch.linspace(0, len(real) - 1, min(self.slices, len(real))).long().numpy()
            show(trainer, "samples/real", sheet(real.read(chosen)), 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show generated slices."""
        if trainer.is_global_zero and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            assert isinstance(pl_module, ImageGenerator)
            slices = pl_module.generate_slices(torch.arange(self.slices), self.seed).cpu().numpy()
            show(trainer, "samples/generated", sheet(slices), pl_module.images_seen)


def show(trainer: Trainer, tag: str, picture: Picture, images_seen: int) -> None:
    """Put a picture (rows, columns, 3) into TensorBoard and, as PNG, into `<run_dir>/pictures`."""
    if isinstance(trainer.logger, TensorBoardLogger):
        trainer.logger.experiment.add_image(tag, picture, images_seen, dataformats="HWC")
    folder = Path(trainer.default_root_dir) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    image_file.imsave(folder / f"{tag.replace('/', '-')}-{images_seen:09d}.png", picture)
