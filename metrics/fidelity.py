"""Fidelity of generated images in a feature space: Fréchet distance, kernel distance, inception score.

All take features (N, D), or class probabilities, that some network has computed; which one is the caller's choice and
decides what the numbers mean. By default they are those of NVlabs/stylegan3. None of them sees memorization: the
training images themselves get the best value there is.

Compare equal numbers of images only, and beside the distance of real images to real ones of other patients
(:mod:`metrics.floor`): the Fréchet distance is biased by an amount that falls with N.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from metrics.feature_neighbours import blocks, check_features


def frechet_distance(real: Tensor, generated: Tensor, correction: Literal[0, 1] = 0) -> Tensor:
    """Squared Fréchet distance of the Gaussians fitted to the features (Heusel et al. 2017, arXiv 1706.08500; "FID").

    Blind to memorization, and to whatever leaves mean and covariance as they are: with 5 % of exact copies it is lower.

    Args:
        real: features (N, D).
        generated: features (M, D).
        correction: covariances are over N - `correction`: 0 as NVlabs/stylegan3, 1 as most others (torchmetrics,
            torch-fidelity, MONAI).

    Returns:
        Scalar, float64; 0 is best.

    Raises:
        ValueError: If the features do not fit together or there are fewer than two of a kind.
    """
    check_features(real, generated)
    return frechet_distance_of_moments(*_moments(real, correction), *_moments(generated, correction))


def frechet_distance_of_moments(mean_r: Tensor, covariance_r: Tensor, mean_g: Tensor, covariance_g: Tensor) -> Tensor:
    """Squared Fréchet distance of two Gaussians given by means (D,) and covariances (D, D), in float64.

    |mu_r - mu_g|² + tr(S_r + S_g - 2 (S_r S_g)^(1/2)). If S = F F^T, the trace of the root is the sum of the singular
    values of F_r^T F_g: real and finite for fewer images than features too.
    """
    factor_r, factor_g = _factor(covariance_r), _factor(covariance_g)
    spread = factor_r.square().sum() + factor_g.square().sum()
    shared: Tensor = torch.linalg.svdvals(factor_r.t() @ factor_g).sum()
    return (mean_r - mean_g).square().sum() + spread - 2 * shared


def _factor(covariance: Tensor) -> Tensor:
    """A matrix F with F F^T = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    factor: Tensor = vectors * values.clamp(min=0).sqrt()  # rounding makes zeros negative
    return factor


def _moments(features: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    mean = features.mean(0, dtype=torch.float64)
    covariance = mean.new_zeros(len(mean), len(mean))
    for _, part in blocks(features):
        covariance.addmm_((part - mean).t(), part - mean)
    return mean, covariance / (len(features) - correction)


def kernel_distance(
    real: Tensor, generated: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean of :func:`polynomial_mmd` over random subsets (Bińkowski et al. 2018, arXiv 1801.01401; "KID").

    Unbiased, so values at different N may be compared; blind to memorization all the same.

    Args:
        real: features (N, D).
        generated: features (M, D).
        subsets: number of pairs of subsets.
        subset_size: features in each, drawn without replacement; at most min(N, M).
        seed: of the drawing.

    Returns:
        Mean and standard deviation over the subsets, scalars, float64; 0 is best, and chance makes the mean negative
        too. The deviation is that of one subset, not of the mean.

    Raises:
        ValueError: As :func:`polynomial_mmd`.
    """
    check_features(real, generated)
    size = min(len(real), len(generated), subset_size)
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        chosen = [torch.randperm(len(x), generator=random)[:size].to(x.device) for x in (real, generated)]
        found.append(polynomial_mmd(real[chosen[0]], generated[chosen[1]]))
    values = torch.stack(found)
    return values.mean(), values.std(correction=0)


def polynomial_mmd(real: Tensor, generated: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³ (arXiv 1801.01401, section 4).

    Over all pairs, so its variance is the smallest an unbiased estimate can have; the time is that of
    (N + M)² products.

    Args:
        real: features (N, D).
        generated: features (M, D).

    Returns:
        Scalar, float64.

    Raises:
        ValueError: If the features do not fit together or there are fewer than two of a kind.
    """
    check_features(real, generated)
    cross = _kernel_sum(real, generated) / (len(real) * len(generated))
    return _mean_of_pairs(real) + _mean_of_pairs(generated) - 2 * cross


def _mean_of_pairs(x: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different features."""
    same = torch.stack([_kernel(part.double().square().sum(1), x.shape[1]).sum() for _, part in blocks(x)]).sum()
    return (_kernel_sum(x, x) - same) / (len(x) * (len(x) - 1))


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for _, a in blocks(x):
        for _, b in blocks(y):
            total += _kernel(a.double() @ b.double().t(), x.shape[1]).sum()
    return total


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[Tensor, Tensor]:
    """Exponential of the mean divergence of p(class | image) from p(class) (Salimans et al. 2016, arXiv 1606.03498).

    Args:
        probabilities: (N, classes), rows that sum to 1.
        splits: contiguous parts in which p(class) is estimated apart.

    Returns:
        Mean and standard deviation over the parts, float64, from 1 (no information) to the number of classes.

    Raises:
        ValueError: If there are fewer images than parts.
    """
    if len(probabilities) < splits:
        raise ValueError(f"{len(probabilities)} images cannot be split into {splits} parts; pass fewer splits.")
    edges = [i * len(probabilities) // splits for i in range(splits + 1)]
    scores = []
    for begin, end in pairwise(edges):
        p = probabilities[begin:end].double()
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # 0 log 0 = 0
        scores.append(divergence.sum(1).mean().exp())
    values = torch.stack(scores)
    return values.mean(), values.std(correction=0)
