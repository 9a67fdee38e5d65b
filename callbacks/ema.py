"""Moving average of a generator's weights.

Karras et al. 2018, "Progressive Growing of GANs" (ICLR, arXiv 1710.10196), appendix A.3; half-life in images with a
ramp-up as in Karras et al. 2020 (NeurIPS, arXiv 2006.06676).
"""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from callbacks.weight_average import WeightAverage, move
from lightning_modules.image_generator import ImageGenerator


class EMA(WeightAverage):
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
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert isinstance(pl_module, ImageGenerator)
            pl_module.start_ema()

    def average(self, generator: ImageGenerator, before: int) -> None:
        """Move the average towards the weights; buffers are copied."""
        halflife = self.halflife_kimg * 1000
        if self.rampup is not None and generator.init_from is None:
            halflife = min(halflife, before * self.rampup)
        decay = 0.5 ** ((self.followed - before) / max(halflife, 1e-8))
        network, average = generator.sampled_network, generator.start_ema()
        move(average.parameters(), network.parameters(), decay)
        for copied, buffer in zip(average.buffers(), network.buffers(), strict=True):
            copied.copy_(buffer)
