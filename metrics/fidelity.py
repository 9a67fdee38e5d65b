"""Fidelity of generated images in a feature space: Fréchet and kernel distance, precision and recall, inception score.

All take features (N, D), or class probabilities, that some network has computed; which one is the caller's choice and
decides what the numbers mean. They are those of NVlabs/stylegan3. torchmetrics divides the covariance of its Fréchet
distance by N - 1 instead of N, holds whole kernel matrices, and has no precision and recall of this kind.

Compare equal numbers of images only: the Fréchet distance is biased by an amount that falls with N.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

ROWS = 1000
"""Features that are compared with all others at a time: 100,000 others are 0.4 GB in float32."""


def frechet_distance(real: Tensor, generated: Tensor) -> Tensor:
    """Squared Fréchet distance of the Gaussians fitted to the features (Heusel et al. 2017, arXiv 1706.08500; "FID").

    |mu_r - mu_g|² + tr(S_r + S_g - 2 (S_r S_g)^(1/2)), with covariances over N. If S = F F^T, the trace of the root is
    the sum of the singular values of F_r^T F_g: real and finite for fewer images than features too.

    Args:
        real: features (N, D).
        generated: features (M, D).

    Returns:
        Scalar, float64; 0 is best.

    Raises:
        ValueError: If the features do not fit together or there are fewer than two of a kind.
    """
    _check(real, generated)
    (mean_r, factor_r), (mean_g, factor_g) = _moments(real), _moments(generated)
    spread = factor_r.square().sum() + factor_g.square().sum()
    shared: Tensor = torch.linalg.svdvals(factor_r.t() @ factor_g).sum()
    return (mean_r - mean_g).square().sum() + spread - 2 * shared


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a factor F (D, D) of the covariance F F^T, in float64."""
    mean = features.mean(0, dtype=torch.float64)
    covariance = mean.new_zeros(len(mean), len(mean))
    for part in torch.split(features, ROWS):
        covariance.addmm_((part - mean).t(), part - mean)
    values, vectors = torch.linalg.eigh(covariance / len(features))
    return mean, vectors * values.clamp(min=0).sqrt()  # rounding makes zeros negative


def kernel_distance(
    real: Tensor, generated: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Tensor:
    """Mean of :func:`polynomial_mmd` over random subsets (Bińkowski et al. 2018, arXiv 1801.01401; "KID").

    Args:
        real: features (N, D).
        generated: features (M, D).
        subsets: number of pairs of subsets.
        subset_size: features in each, drawn without replacement; at most min(N, M).
        seed: of the drawing.

    Returns:
        Scalar, float64; 0 is best, and chance makes it negative too.

    Raises:
        ValueError: As :func:`polynomial_mmd`.
    """
    _check(real, generated)
    size = min(len(real), len(generated), subset_size)
    random = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        chosen = [torch.randperm(len(x), generator=random)[:size].to(x.device) for x in (real, generated)]
        values.append(polynomial_mmd(real[chosen[0]], generated[chosen[1]]))
    return torch.stack(values).mean()


def polynomial_mmd(real: Tensor, generated: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³ (arXiv 1801.01401, section 4).

    Args:
        real: features (N, D).
        generated: features (M, D).

    Returns:
        Scalar, float64.

    Raises:
        ValueError: If the features do not fit together or there are fewer than two of a kind.
    """
    _check(real, generated)
    x, y = real.double(), generated.double()
    cross = _kernel_sum(x, y) / (len(x) * len(y))
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * cross


def _mean_of_pairs(x: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different features."""
    same = _kernel(x.square().sum(1), x.shape[1]).sum()
    return (_kernel_sum(x, x) - same) / (len(x) * (len(x) - 1))


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([_kernel(part @ y.t(), x.shape[1]).sum() for part in torch.split(x, ROWS)]).sum()


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Share of generated features in the real manifold and of real ones in the generated (arXiv 1904.06991).

    Kynkäänniemi et al. 2019: a manifold is the union of the balls around its features that reach to the k-th nearest
    neighbour. Precision falls with implausible images, recall with missing variety.

    Args:
        real: features (N, D).
        generated: features (M, D); the distances have their precision.
        k: neighbours, fewer than N and M.

    Returns:
        Precision and recall, scalars in [0, 1].

    Raises:
        ValueError: If the features do not fit together or there are too few.
    """
    _check(real, generated, k + 1)
    return _inside(generated, real, k), _inside(real, generated, k)


def _inside(probes: Tensor, manifold: Tensor, k: int) -> Tensor:
    """Share of the probes that lie in the manifold."""
    # A feature is at distance 0 from itself, so its k-th neighbour is the (k + 1)-th smallest distance.
    radius = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in torch.split(manifold, ROWS)])
    inside = [(torch.cdist(part, manifold) <= radius).any(1) for part in torch.split(probes, ROWS)]
    return torch.cat(inside).double().mean()


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


def _check(real: Tensor, generated: Tensor, least: int = 2) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            "Features must be (N, D) and (M, D), from one network; got "
            f"{tuple(real.shape)} real and {tuple(generated.shape)} generated ones."
        )
    if min(len(real), len(generated)) < least:
        raise ValueError(
            f"At least {least} real and {least} generated images are needed; got {len(real)} and {len(generated)}."
        )
