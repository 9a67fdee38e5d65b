"""Feature likelihood divergence: how likely are held-out features under a density made of the generated ones?

Jiralerspong et al. 2023, "Feature likelihood divergence: evaluating the generalization of generative models using
samples" (NeurIPS, arXiv 2302.04440). The density is a mixture of Gaussians around the M generated features,

    p(x) = 1/M sum_j N(x; y_j, s_j I),                                                                               (1)

whose variances s_j maximize the likelihood of the training features. A copy of a training image gets a variance near
zero: it explains its original perfectly and nothing else.

The authors maximize by 50 steps of Adam, with a weak background density that is dropped afterwards; here it is
expectation maximization of (1) itself, which has no step width. So values are near to theirs, not equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metrics.feature_neighbours import blocks, check_features, squared_distances

MIN_VARIANCE = 1e-9
"""Of features with variance 1: far above the rounding of a distance and far below that of two different images."""


@dataclass(frozen=True)
class FeatureLikelihood:
    """Differences of negative log-likelihoods per feature, times 100.

    `fld`: of the held-out features, to the same with one half of the training features as centres and the other half
    for the fit; about 0 is as good as real images, larger is worse. `gap`: of the training features, to that of the
    held-out ones; far below 0 the density knows the training images better than others: memorization.
    """

    fld: float
    gap: float


def feature_likelihood(
    training: Tensor, heldout: Tensor, generated: Tensor, *, steps: int = 50, seed: int = 0
) -> FeatureLikelihood:
    """Measure quality, variety and overfitting of generated features at once.

    `fld` is blind to rare copies: 5 % of exact ones take 5 % of the weight in (1), and the rest explains held-out
    images as before. `gap` sees them only if they are very near to their originals: a share s of copies whose distance
    is a fraction e of the usual one moves it by about 100 s ln e.

    Features are scaled to mean 0 and variance 1 over the held-out ones, and those constant there are left out. Holds
    three matrices (N, M) in float64: 600 MB for 5,000 of both.

    Args:
        training: features (N, D).
        heldout: features (H, D) of images that the generator has not seen, of other patients.
        generated: features (M, D).
        steps: of expectation maximization.
        seed: of the halves of the training features.

    Returns:
        The divergence and the gap.

    Raises:
        ValueError: If the features do not fit together, there are fewer than two of a kind, or all are constant.
    """
    check_features(training, generated, "training")
    check_features(training, heldout, "training", "held-out")
    deviation, mean = torch.std_mean(heldout.double(), 0)
    varies = deviation > 0
    if not bool(varies.any()):
        raise ValueError("Expected features that differ between held-out images, but all of them are constant.")
    scaled = [((x.double() - mean) / deviation)[:, varies] for x in (training, heldout, generated)]
    training, heldout, generated = scaled
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)).to(training.device)
    centres, others = training[order].tensor_split(2)

    variance = fit_variances(generated, training, steps)
    of_heldout = mean_log_likelihood(generated, variance, heldout)
    of_training = mean_log_likelihood(generated, variance, training)
    of_real = mean_log_likelihood(centres, fit_variances(centres, others, steps), heldout)
    scale = 100 / training.shape[1]
    return FeatureLikelihood(fld=scale * (of_real - of_heldout), gap=scale * (of_heldout - of_training))


def fit_variances(centres: Tensor, points: Tensor, steps: int) -> Tensor:
    """Find the variances (M,) of the mixture (1) with centres (M, D) that make points (N, D) most likely.

    A local maximum, from the squared distances of the nearest points over D; at least `MIN_VARIANCE`.
    """
    width = centres.shape[1]
    square = _squared(points, centres)  # (N, M)
    variance = (square.amin(0) / width).clamp(min=MIN_VARIANCE)
    for _ in range(steps):
        share = _log_densities(square, variance, width).softmax(1)  # of every centre in every point
        total = share.sum(0)
        fitted = (share.mul_(square).sum(0) / (width * total)).clamp(min=MIN_VARIANCE)
        variance = torch.where(total > 0, fitted, variance)  # a centre without any share keeps its own
    return variance


def mean_log_likelihood(centres: Tensor, variance: Tensor, points: Tensor) -> float:
    """Mean of log p (1) over points (N, D), in nats."""
    width = centres.shape[1]
    total = 0.0
    for _, part in blocks(points):
        densities = _log_densities(_squared(part, centres), variance, width)
        total += float((densities.logsumexp(1) - math.log(len(centres))).sum())
    return total / len(points)


def _log_densities(square: Tensor, variance: Tensor, width: int) -> Tensor:
    """Logarithms of N(x_i; y_j, s_j I), (N, M), from squared distances."""
    return square / (-2 * variance) - width / 2 * (2 * math.pi * variance).log()


def _squared(x: Tensor, y: Tensor) -> Tensor:
    return squared_distances(x, y, y.mean(0)).clamp_(min=0)
