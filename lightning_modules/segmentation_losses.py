"""Terms of the loss of segmenters; a rule adds up any list of them.

Soft counts of Dice and Tversky run over the batch of all processes, as nnU-Net does for slices (Isensee et al. 2021,
Nature Methods 18): most slices lack some class, and the mean of the Dice of parts would be another number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.segmentation_targets import Target

SumOverRanks = Callable[[Tensor], Tensor]
"""Sum of a tensor over the processes, differentiable."""


class SegmentationLoss(ABC):
    """A term of the loss.

    Args:
        weight: factor of the term, above 0.

    Raises:
        ValueError: if the weight is not positive.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if weight <= 0:
            raise ValueError(f"{type(self).__name__}: expected weight to be positive, but got {weight}.")
        self.weight = weight

    @abstractmethod
    def __call__(self, logits: Tensor, label: Tensor, target: Target, sum_over_ranks: SumOverRanks) -> Tensor:
        """Compute the term, without its weight.

        Args:
            logits: float32 (N, channels, H, W).
            label: class index, int64 (N, 1, H, W).
            target: what the channels mean.
            sum_over_ranks: sum over the processes; what is a mean over pixels needs none, as gradients are averaged.

        Returns:
            scalar, 0 for a perfect prediction.
        """


def soft_counts(
    logits: Tensor, label: Tensor, target: Target, include_background: bool, squared: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum p t, p and t over batch and pixels, where p is the probability and t the truth.

    Args:
        logits: (N, channels, H, W).
        label: class index, int64 (N, 1, H, W).
        target: what the channels mean.
        include_background: whether the background, where it is a channel, is counted as well.
        squared: sum p² instead of p.

    Returns:
        (channels,) each.
    """
    channels = slice(0, None) if include_background else target.foreground
    p, t = target.probabilities(logits)[:, channels], target.encode(label)[:, channels]
    axes = (0, 2, 3)
    return (p * t).sum(axes), (p.square() if squared else p).sum(axes), t.sum(axes)


class Dice(SegmentationLoss):
    """1 - soft Dice, 2 Σ p t / (Σ p + Σ t), of the global batch, mean over the channels.

    Milletari et al. 2016, "V-Net" (3DV, arXiv 1606.04797) for the squares in the denominator, without them nnU-Net.

    Args:
        weight: factor of the term.
        include_background: whether the background counts as a class.
        squared: Σ p² + Σ t² in the denominator.
        smooth: added to numerator and denominator.
    """

    def __init__(
        self, weight: float = 1.0, include_background: bool = True, squared: bool = False, smooth: float = 1e-5
    ) -> None:
        super().__init__(weight)
        self.include_background = include_background
        self.squared = squared
        self.smooth = smooth

    def __call__(self, logits: Tensor, label: Tensor, target: Target, sum_over_ranks: SumOverRanks) -> Tensor:
        """Compute the term, see the base."""
        overlap, predicted, true = soft_counts(logits, label, target, self.include_background, self.squared)
        overlap, total = sum_over_ranks(torch.stack([overlap, predicted + true]))
        dice: Tensor = (2.0 * overlap + self.smooth) / (total + self.smooth)
        return 1.0 - dice.mean()


class Tversky(SegmentationLoss):
    """1 - Tversky index, TP / (TP + a FP + b FN), of the global batch, mean over the channels.

    Salehi et al. 2017 (MLMI, arXiv 1706.05721), equation 4. A large b makes missed tumour cost more than false tumour.

    Args:
        weight: factor of the term.
        false_positives: a.
        false_negatives: b; with a = b = 1/2 the index is Dice.
        include_background: whether the background counts as a class.
        smooth: added to numerator and denominator.
    """

    def __init__(
        self,
        weight: float = 1.0,
        false_positives: float = 0.3,
        false_negatives: float = 0.7,
        include_background: bool = True,
        smooth: float = 1e-5,
    ) -> None:
        super().__init__(weight)
        self.false_positives = false_positives
        self.false_negatives = false_negatives
        self.include_background = include_background
        self.smooth = smooth

    def __call__(self, logits: Tensor, label: Tensor, target: Target, sum_over_ranks: SumOverRanks) -> Tensor:
        """Compute the term, see the base."""
        counts = torch.stack(soft_counts(logits, label, target, self.include_background))
        tp, predicted, true = sum_over_ranks(counts)
        errors = self.false_positives * (predicted - tp) + self.false_negatives * (true - tp)
        index: Tensor = (tp + self.smooth) / (tp + errors + self.smooth)
        return 1.0 - index.mean()


class CrossEntropy(SegmentationLoss):
    """-log p of the truth, mean over pixels (and regions)."""

    def __call__(self, logits: Tensor, label: Tensor, target: Target, sum_over_ranks: SumOverRanks) -> Tensor:
        """Compute the term, see the base."""
        return target.cross_entropy(logits, label).mean()


class Focal(SegmentationLoss):
    """-(1 - p)^gamma log p of the truth, mean over pixels (and regions): pixels that are right already count less.

    Lin et al. 2017, "Focal loss for dense object detection" (ICCV, arXiv 1708.02002), equation 4.

    Args:
        weight: factor of the term.
        gamma: 0 is cross-entropy; 1 or more otherwise, as the slope between them is infinite at a perfect prediction.
    """

    def __init__(self, weight: float = 1.0, gamma: float = 2.0) -> None:
        super().__init__(weight)
        if gamma != 0 and gamma < 1:
            raise ValueError(f"Focal: expected gamma to be 0, or 1 or more, but got {gamma}.")
        self.gamma = gamma

    def __call__(self, logits: Tensor, label: Tensor, target: Target, sum_over_ranks: SumOverRanks) -> Tensor:
        """Compute the term, see the base."""
        surprise = target.cross_entropy(logits, label)
        # 1 - exp(-x) without cancellation where the prediction is nearly right.
        return ((-torch.expm1(-surprise)) ** self.gamma * surprise).mean()
