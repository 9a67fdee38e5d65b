"""A small residual network that turns an image of any size into a vector of length 1.

Normalization and activation come before the convolutions: He et al. 2016, "Identity Mappings in Deep Residual Networks"
(ECCV, arXiv 1603.05027). Pooling is the generalized mean of Radenovic, Tolias, Chum 2019, "Fine-Tuning CNN Image
Retrieval with No Human Annotation" (TPAMI, arXiv 1711.02512), section 3.2, which SSCD has too (Pizzi et al. 2022, arXiv
2202.10261), here of each quarter of the image: heads are aligned, and where a feature is tells one from another. Groups
are normalized within an image, so an embedding does not depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

POOLING_POWER = 3.0
SMALLEST_ACTIVATION = 1e-6
"""Keeps the gradient of the pooling finite where all activations are 0."""
CELLS = 2
"""The image is pooled in that many parts along each axis."""


class ResidualBlock(nn.Module):
    """Two convolutions around which the input is added.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        groups: of the normalizations.
        halve: begin with the mean of 2 x 2 pixels, or of those that there are at an odd edge.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, halve: bool) -> None:
        super().__init__()
        self.resample = nn.AvgPool2d(2, ceil_mode=True) if halve else nn.Identity()
        self.residual = nn.Sequential(
            nn.GroupNorm(groups, in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.GroupNorm(groups, out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H, W), or half the size, rounded up."""
        x = self.resample(x)
        y: Tensor = self.shortcut(x) + self.residual(x)
        return y


class EmbeddingNetwork(nn.Module):
    """Residual blocks at falling resolutions, pooled and projected onto the unit sphere.

    Args:
        in_channels: channels of the image.
        widths: channels at every resolution; the first one is half that of the image, each next one half of that.
        blocks: residual blocks at every resolution.
        embedding_width: numbers in an embedding.
        norm_groups: groups of the normalizations; divides all widths.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], blocks: int, embedding_width: int, norm_groups: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, stride=2, padding=1, bias=False)
        layers: list[nn.Module] = []
        before = widths[0]
        for level, width in enumerate(widths):
            for block in range(blocks):
                layers.append(ResidualBlock(before, width, norm_groups, halve=level > 0 and block == 0))
                before = width
        self.body = nn.Sequential(*layers, nn.GroupNorm(norm_groups, before), nn.ReLU())
        self.projection = nn.Linear(before * CELLS**2, embedding_width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> float32 (N, embedding_width) of length 1."""
        features = self.body(self.stem(x)).float()  # (N, C, h, w)
        embedding = self.projection(generalized_mean(features).flatten(1))
        return F.normalize(embedding.float(), dim=1)


def generalized_mean(features: Tensor) -> Tensor:
    """(mean x^3)^(1/3) over each part of the image, between mean and maximum: x >= 0, (N, C, h, w) -> (N, C, 2, 2)."""
    powers = features.clamp(min=SMALLEST_ACTIVATION).pow(POOLING_POWER)
    return F.adaptive_avg_pool2d(powers, CELLS).pow(1.0 / POOLING_POWER)
