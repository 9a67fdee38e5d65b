"""Moving average of the weights of a generator or a segmenter.

Karras et al. 2018, "Progressive Growing of GANs" (ICLR, arXiv 1710.10196), appendix A.3; half-life in images with a
ramp-up as in Karras et al. 2020 (NeurIPS, arXiv 2006.06676).
"""

from __future__ import annotations

from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer

from callbacks.weight_average import WeightAverage, move
from lightning_modules.base import ImageClockModule
from lightning_modules.image_generator import ImageGenerator
from lightning_modules.segmentation import SegmentationModule


class EMA(WeightAverage):
    """Keep the moving average `ema_network` of an image generator, then used for its images, or of a segmenter.

    Args:
        halflife_kimg: half-life of the average in thousands of images.
        rampup: the half-life is at most this share of the images seen so far; None starts with the full half-life, as
            does a model that starts from a trained one (`init_from`).
    """

    models: ClassVar[dict[str, type[ImageClockModule]]] = {**WeightAverage.models, "segmenters": SegmentationModule}

    def __init__(self, halflife_kimg: float = 10.0, rampup: float | None = 0.05) -> None:
        if halflife_kimg <= 0:
            raise ValueError(f"Expected halflife_kimg to be positive, but got {halflife_kimg}.")
        self.halflife_kimg = halflife_kimg
        self.rampup = rampup

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert isinstance(pl_module, ImageGenerator | SegmentationModule)
            pl_module.start_ema()

    def average(self, model: ImageGenerator | SegmentationModule, before: int) -> None:
        """Move the average towards the weights; buffers are copied."""
        halflife = self.halflife_kimg * 1000
        if self.rampup is not None and model.init_from is None:
            halflife = min(halflife, before * self.rampup)
        decay = 0.5 ** ((self.followed - before) / max(halflife, 1e-8))
        network, average = model.sampled_network, model.start_ema()
        move(average.parameters(), network.parameters(), decay)
        for copied, buffer in zip(average.buffers(), network.buffers(), strict=True):
            copied.copy_(buffer)
