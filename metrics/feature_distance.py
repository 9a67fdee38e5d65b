"""Fréchet and kernel distance of images, collected over batches and processes.

Thin classes around :mod:`metrics.fidelity`. The feature network is injected, so images may have any channels. All that
is synchronised is a sum or a set, so two processes give what one gives, to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from metrics.fidelity import frechet_distance_of_moments, polynomial_mmd


class _FeatureDistance(Metric):
    """What both distances share: images in, features of a frozen network out."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> _FeatureDistance:
        """Switch the mode, but never that of the network: batch statistics would enter the features."""
        super().train(mode)
        self.network.eval()
        return self

    def _features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = self.network(images)
        if features.ndim != 2:
            raise ValueError(f"Expected features (N, D) from the network, but got {tuple(features.shape)}; pool them.")
        return features


class FrechetDistance(_FeatureDistance):
    """:func:`metrics.fidelity.frechet_distance` from sums: two (D, D) matrices, however many images.

    Args:
        network: makes features (N, D) from images; it is frozen and put in evaluation mode, so give a copy of one that
            is being trained.
        width: D.
    """

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__(network)
        for kind in ("real", "generated"):
            self.add_state(f"{kind}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_sum", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_products", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, real: bool) -> None:
        """Add images (N, ...) as the network takes them, real or generated ones."""
        features = self._features(images).double()
        kind = "real" if real else "generated"
        getattr(self, f"{kind}_count").add_(len(features))
        getattr(self, f"{kind}_sum").add_(features.sum(0))
        getattr(self, f"{kind}_products").addmm_(features.t(), features)

    def compute(self) -> Tensor:
        """Give the distance, a float64 scalar.

        Raises:
            ValueError: If there are fewer than two images of a kind.
        """
        moments = []
        for kind in ("real", "generated"):
            count = getattr(self, f"{kind}_count")
            if count < 2:
                raise ValueError(f"At least 2 {kind} images are needed; got {int(count)}.")
            mean = getattr(self, f"{kind}_sum") / count
            moments += [mean, getattr(self, f"{kind}_products") / count - mean.outer(mean)]
        return frechet_distance_of_moments(*moments)


class KernelDistance(_FeatureDistance):
    """:func:`metrics.fidelity.polynomial_mmd` of all images: no subsets, which would depend on the processes.

    Holds the features of all images on every process: 0.2 GB for 100,000 of width 512 in float32.

    Args:
        network: as for :class:`FrechetDistance`.
    """

    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, real: bool) -> None:
        """Add images (N, ...) as the network takes them, real or generated ones."""
        (self.real if real else self.generated).append(self._features(images))

    def compute(self) -> Tensor:
        """Give the distance, a float64 scalar.

        Raises:
            ValueError: If there are fewer than two images of a kind.
        """
        if not len(self.real) or not len(self.generated):
            raise ValueError("Real and generated images are needed; got none of a kind.")
        return polynomial_mmd(dim_zero_cat(self.real), dim_zero_cat(self.generated))
