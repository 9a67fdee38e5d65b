"""Equivariance of StyleGAN 3 during training: are details glued to the pixels?"""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.base import log_epoch
from lightning_modules.image_generator import ImageGenerator
from metrics.equivariance import equivariance


class Equivariance(Callback):
    """Log EQ-T and EQ-R (dB, higher is better) of the averaged generator.

    Published figures take 50,000 samples; a curve over the training needs fewer.

    Args:
        samples: number of images.
        batch_size: images at a time, at most 16.
        seed: of latents and transformations.
        every_n_epochs: how often.

    Raises:
        ValueError: for a generator whose input cannot be transformed.
    """

    def __init__(self, samples: int = 256, batch_size: int = 16, seed: int = 0, every_n_epochs: int = 25) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.every_n_epochs = every_n_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what has no equivariance before training begins."""
        buffers = dict(pl_module.named_buffers())
        if not isinstance(pl_module, ImageGenerator) or "generator.synthesis.input.transform" not in buffers:
            raise ValueError(
                "callbacks.Equivariance measures StyleGAN 3, whose input can be moved, but the model is a "
                f"{type(pl_module).__name__}. Leave the callback out."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure; every rank finds the same numbers."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            assert isinstance(pl_module, ImageGenerator)
            network = pl_module.sampled_network if pl_module.ema_network is None else pl_module.ema_network
            found = equivariance(network, self.samples, self.batch_size, self.seed)
            log_epoch(pl_module, {f"equivariance/{name}_db": value for name, value in found.items()})
