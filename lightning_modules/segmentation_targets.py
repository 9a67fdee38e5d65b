"""What the channels of a segmenter mean: one class each, or regions that contain one another.

Regions: Isensee et al. 2020, "nnU-Net for Brain Tumor Segmentation" (BrainLes, arXiv 2011.00848), section 3.1: the
network is trained on what BraTS measures, whole tumour, tumour core and enhancing tumour, with a sigmoid for each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

N_CLASSES = 4
CORE, OEDEMA, ENHANCING = 1, 2, 3


class Target(ABC):
    """The meaning of the channels of a network.

    Attributes:
        channels: how many logits the network gives per pixel.
        foreground: the channels that are not background.
    """

    channels: int
    foreground: slice

    @abstractmethod
    def encode(self, label: Tensor) -> Tensor:
        """Say which channels are true: class index, int64 (N, 1, H, W), to 0 or 1, float32 (N, channels, H, W)."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits into probabilities, both (N, channels, H, W)."""

    @abstractmethod
    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """Give the negative logarithm of the probability of the truth, for every independent statement about a pixel.

        Args:
            logits: (N, channels, H, W).
            label: class index, int64 (N, 1, H, W).

        Returns:
            (N, statements, H, W), not below 0.
        """

    @abstractmethod
    def decode(self, probabilities: Tensor) -> Tensor:
        """Decide: probabilities (N, channels, H, W) to class indices, uint8 (N, H, W)."""


class Classes(Target):
    """One channel for background, core, oedema and enhancing each; a pixel is one of them (softmax)."""

    channels = N_CLASSES
    foreground = slice(1, None)

    def encode(self, label: Tensor) -> Tensor:
        """One-hot."""
        shape = (len(label), N_CLASSES, *label.shape[2:])
        return torch.zeros(shape, device=label.device).scatter_(1, label, 1.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax."""
        return logits.softmax(dim=1)

    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """-log of the softmax of the true class, (N, 1, H, W)."""
        return F.cross_entropy(logits, label[:, 0], reduction="none")[:, None]

    def decode(self, probabilities: Tensor) -> Tensor:
        """The most probable class."""
        return probabilities.argmax(dim=1).to(torch.uint8)


class Regions(Target):
    """One channel for whole tumour, tumour core and enhancing tumour each, which a pixel may be in or not (sigmoids).

    A pixel of probability above 1/2 becomes oedema if it is in the whole tumour, core if it is in the tumour core,
    enhancing if it is in the enhancing tumour, the last of these that applies (nnU-Net: `regions_class_order` 2, 1, 3).
    """

    channels = 3
    foreground = slice(0, None)

    _REGIONS = ((CORE, OEDEMA, ENHANCING), (CORE, ENHANCING), (ENHANCING,))
    _BECOMES = (OEDEMA, CORE, ENHANCING)

    def encode(self, label: Tensor) -> Tensor:
        """Say of each region whether the pixel is in it."""
        member = torch.tensor(
            [[k in region for region in self._REGIONS] for k in range(N_CLASSES)], dtype=torch.float32
        )
        return member.to(label.device)[label[:, 0]].movedim(-1, 1).contiguous()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid of each."""
        return logits.sigmoid()

    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """Binary cross-entropy of each region, (N, 3, H, W)."""
        return F.binary_cross_entropy_with_logits(logits, self.encode(label).to(logits), reduction="none")

    def decode(self, probabilities: Tensor) -> Tensor:
        """Paint one region over the other."""
        classes = torch.zeros_like(probabilities[:, 0], dtype=torch.uint8)
        for region, becomes in enumerate(self._BECOMES):
            classes = classes.masked_fill(probabilities[:, region] > 0.5, becomes)
        return classes
