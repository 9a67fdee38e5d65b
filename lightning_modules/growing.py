"""Progressive growing: what is trained when, and how real images look meanwhile.

Karras, Aila, Laine, Lehtinen 2018, "Progressive Growing of GANs" (ICLR, arXiv 1710.10196), section 2 and appendix A.1.
The level of detail (lod) is 0 at full resolution and k at a 2^k-th of it; a fraction blends two levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from lightning_modules.networks.growing import downsample, upsample


def _is_resolution(value: int) -> bool:
    return value >= 4 and value & (value - 1) == 0


@dataclass(frozen=True)
class GrowingSchedule:
    """Level of detail, minibatch and learning rate as functions of the training images seen.

    Every resolution is trained for `training_kimg`, then the next is blended in over `transition_kimg`. While two
    resolutions are blended, minibatch and learning rate are those of the finer.

    Attributes:
        img_resolution: Full resolution in pixels, a power of two.
        lod_initial_resolution: Resolution to begin with; img_resolution does not grow.
        training_kimg: Thousands of images at a resolution before it is doubled.
        transition_kimg: Thousands of images over which the next resolution is blended in.
        minibatch_base: Images per iteration, over all processes, at resolutions that `minibatch` does not name.
        minibatch: Images per iteration by resolution.
        lr_base: Learning rate at resolutions that `lr` does not name.
        lr: Learning rate by resolution.

    Raises:
        ValueError: With all that is wrong.
    """

    img_resolution: int
    lod_initial_resolution: int = 4
    training_kimg: float = 600.0
    transition_kimg: float = 600.0
    minibatch_base: int = 16
    minibatch: dict[int, int] = field(default_factory=dict)
    lr_base: float = 0.001
    lr: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [
            f"{name} must hold resolutions (powers of two from 4), but holds {resolution}."
            for name, resolutions in (
                ("img_resolution", [self.img_resolution]),
                ("lod_initial_resolution", [self.lod_initial_resolution]),
                ("minibatch", list(self.minibatch)),
                ("lr", list(self.lr)),
            )
            for resolution in resolutions
            if not _is_resolution(resolution)
        ]
        if self.lod_initial_resolution > self.img_resolution:
            problems.append(
                f"lod_initial_resolution ({self.lod_initial_resolution}) must not be above img_resolution "
                f"({self.img_resolution})."
            )
        if self.training_kimg < 0 or self.transition_kimg < 0:
            problems.append(
                f"training_kimg and transition_kimg must not be negative, but are {self.training_kimg} and "
                f"{self.transition_kimg}."
            )
        elif self._phase_images() == 0 and self.lod_initial_resolution < self.img_resolution:
            problems.append(
                "training_kimg and transition_kimg are both 0, so nothing would grow: set lod_initial_resolution to "
                f"img_resolution ({self.img_resolution})."
            )
        if min([self.minibatch_base, *self.minibatch.values()]) < 1:
            problems.append(f"Minibatches must be positive: {self.minibatch_base}, {self.minibatch}.")
        if min([self.lr_base, *self.lr.values()]) <= 0:
            problems.append(f"Learning rates must be positive: {self.lr_base}, {self.lr}.")
        if problems:
            raise ValueError("Growing schedule: " + " ".join(problems))

    def _phase_images(self) -> int:
        return round(self.training_kimg * 1000) + round(self.transition_kimg * 1000)

    def lod(self, images_seen: int) -> float:
        """Level of detail, from that of lod_initial_resolution down to 0."""
        lod = math.log2(self.img_resolution // self.lod_initial_resolution)
        phase_images = self._phase_images()
        if phase_images > 0:
            phase, images = divmod(images_seen, phase_images)
            blended = images - round(self.training_kimg * 1000)
            lod -= phase + (blended / round(self.transition_kimg * 1000) if blended > 0 else 0.0)
        return max(lod, 0.0)

    def resolution(self, images_seen: int) -> int:
        """Resolution in pixels, the finer of two that are blended."""
        return self.img_resolution >> math.floor(self.lod(images_seen))

    def minibatch_size(self, images_seen: int) -> int:
        """Images per iteration, over all processes."""
        return self.minibatch.get(self.resolution(images_seen), self.minibatch_base)

    def learning_rate(self, images_seen: int) -> float:
        """Learning rate of both networks."""
        return self.lr.get(self.resolution(images_seen), self.lr_base)

    def minibatches(self) -> list[int]:
        """Images per iteration of all resolutions, in the order in which they are gone through.

        Raises:
            ValueError: If one does not divide that of the resolution before: a batch of the data module, during which
                the resolution may double, could not be split into whole iterations.
        """
        first, last = self.lod_initial_resolution.bit_length(), self.img_resolution.bit_length()
        resolutions = [2 ** (bits - 1) for bits in range(first, last + 1)]
        sizes = [self.minibatch.get(r, self.minibatch_base) for r in resolutions]
        for i in range(1, len(sizes)):
            if sizes[i - 1] % sizes[i]:
                raise ValueError(
                    f"The minibatch at {resolutions[i]} px ({sizes[i]} images) must divide that at "
                    f"{resolutions[i - 1]} px ({sizes[i - 1]}). Change minibatch of the growing schedule."
                )
        return sizes

    @staticmethod
    def level_changed(before: float, after: float) -> bool:
        """Whether layers have entered or left between two levels of detail; the originals then reset Adam."""
        return math.floor(before) != math.floor(after) or math.ceil(before) != math.ceil(after)


def fade_real(images: Tensor, lod: float) -> Tensor:
    """Real images as the discriminator sees them at a level of detail.

    Averaged over boxes of 2^floor(lod) pixels, blended with the next coarser average by the fraction of lod, pixels
    repeated to full resolution. (The originals store the averages rounded to grey levels; here they are exact.)

    Args:
        images: Float (N, C, H, W) in [-1, 1].
        lod: Level of detail.

    Returns:
        (N, C, H, W).
    """
    level = math.floor(lod)
    images = downsample(images, 2**level)
    if lod > level:
        images = images.lerp(upsample(downsample(images, 2), 2), lod - level)
    return upsample(images, 2**level)
