"""Moving average of a generator's weights.

Karras et al. 2018, "Progressive Growing of GANs" (ICLR, arXiv 1710.10196), appendix A.3; half-life in images with a
ramp-up as in Karras et al. 2020 (NeurIPS, arXiv 2006.06676).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_modules.image_generator import ImageGenerator


class EMA(Callback):
    """Keep the moving average `ema_network` of an image generator.

    Args:
        halflife_kimg: half-life of the average in thousands of images.
        rampup: the half-life is at most this share of the images seen so far; None starts with the full half-life, as
            does a generator that starts from a trained one (`init_from`).
    """

    def __init__(self, halflife_kimg: float = 10.0, rampup: float | None = 0.05) -> None:
        if halflife_kimg <= 0:
            raise ValueError(f"Expected halflife_kimg to be positive, but got {halflife_kimg}.")
        self.halflife_kimg = halflife_kimg
        self.rampup = rampup

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average before a checkpoint is loaded."""
        if not isinstance(pl_module, ImageGenerator):
            raise ValueError(f"EMA averages image generators, but the model is a {type(pl_module).__name__}.")
        if stage == "fit":
            pl_module.start_ema()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the clock, which a resumed run has restored."""
        assert isinstance(pl_module, ImageGenerator)
        self.followed = pl_module.images_seen

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Follow the iteration before this one, where a training step holds several."""
        self._follow(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the last iteration."""
        self._follow(pl_module)

    @torch.no_grad()
    def _follow(self, generator: LightningModule) -> None:
        """Move the average towards the weights if the clock has moved; buffers are copied."""
        assert isinstance(generator, ImageGenerator)
        before, self.followed = self.followed, generator.images_seen
        if self.followed == before:
            return
        halflife = self.halflife_kimg * 1000
        if self.rampup is not None and generator.init_from is None:
            halflife = min(halflife, before * self.rampup)
        decay = 0.5 ** ((self.followed - before) / max(halflife, 1e-8))
        network, average = generator.sampled_network, generator.start_ema()
        for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
            mean.copy_(parameter.lerp(mean, decay))
        for copied, buffer in zip(average.buffers(), network.buffers(), strict=True):
            copied.copy_(buffer)
