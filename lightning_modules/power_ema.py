"""Power-function averages of weights, and how an average of any length follows from stored ones.

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models" (CVPR, arXiv 2312.02696),
section 3 and appendix C. The average at time t weighs the weights of time tau by the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 <= tau <= t,

whose width grows in proportion to t. Its length is named by the relative standard deviation of the profile, which is
its standard deviation divided by t. Time is images seen; everything is in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_STD = 12.0**-0.5
"""Relative standard deviation of the mean over the whole training, gamma = 0."""


class Profile(NamedTuple):
    """Which average: its time and its relative standard deviation."""

    images_seen: int
    std: float


class Reconstruction(NamedTuple):
    """How stored averages make other ones.

    Attributes:
        coefficients: float64 (snapshots, targets); those of a target sum to 1.
        errors: float64 (targets,), distance of the reconstructed profile from the wanted one, in units of the norm of
            the wanted one. Where the weights fluctuate like white noise, it is the deviation of the reconstructed
            average in units of the noise that the wanted average itself still has.
    """

    coefficients: Tensor
    errors: Tensor


def relative_std(exponent: float) -> float:
    """Give the relative standard deviation of the profile with this exponent gamma >= 0 (section 3.1)."""
    return math.sqrt(exponent + 1.0) / ((exponent + 2.0) * math.sqrt(exponent + 3.0))


def exponent(std: float) -> float:
    """Find the exponent gamma of the profile with this relative standard deviation, by bisection.

    Raises:
        ValueError: if no profile that favours late weights has it.
    """
    if not 0.0 < std < MAX_STD:
        raise ValueError(
            f"Expected a relative standard deviation above 0 and below {MAX_STD:.4f}, that of the mean over the whole "
            f"training, but got {std}."
        )
    low, high = 0.0, 1.0 / std  # relative_std decreases, and is below 1 / gamma
    while low < (middle := (low + high) / 2.0) < high:
        low, high = (middle, high) if relative_std(middle) > std else (low, middle)
    return high


def decay(exponent: float, before: int, after: int) -> float:
    """Give the share that the average keeps of itself when the clock goes from `before` to `after` images seen.

    It is 0 at the first step: the average then equals the weights, whatever it was (section 3.1).
    """
    return math.pow(before / after, exponent + 1.0)


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> Tensor:
    """Integrate the products of two profiles over time (appendix C).

    With t <= t', the integral over [0, t] is (gamma + 1) (gamma' + 1) / (gamma + gamma' + 1) (t / t')^gamma' / t'.

    Returns:
        float64 (len(first), len(second)).
    """
    (t1, gamma1), (t2, gamma2) = _columns(first), _columns(second)
    t1, gamma1 = t1[:, None], gamma1[:, None]
    early, late = torch.minimum(t1, t2), torch.maximum(t1, t2)
    gamma_of_late = torch.where(t1 < t2, gamma2, gamma1)
    return (gamma1 + 1) * (gamma2 + 1) / (gamma1 + gamma2 + 1) * (early / late) ** gamma_of_late / late


def reconstruct(snapshots: Sequence[Profile], targets: Sequence[Profile]) -> Reconstruction:
    """Combine stored averages to others by least squares between the profiles (section 3.2, appendix C).

    The coefficients of a target are scaled to sum 1, so that weights that do not move are kept.
    """
    gram = inner_products(snapshots, snapshots)
    overlap = inner_products(snapshots, targets)
    coefficients: Tensor = torch.linalg.solve(gram, overlap)
    coefficients = coefficients / coefficients.sum(dim=0)
    square = inner_products(targets, targets).diagonal()
    difference = square - 2.0 * (coefficients * overlap).sum(dim=0) + (coefficients * (gram @ coefficients)).sum(dim=0)
    return Reconstruction(coefficients, (difference.clamp(min=0.0) / square).sqrt())


def _columns(profiles: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    """Times and exponents: float64 (len(profiles),) each."""
    times = torch.tensor([profile.images_seen for profile in profiles], dtype=torch.float64)
    exponents = torch.tensor([exponent(profile.std) for profile in profiles], dtype=torch.float64)
    return times, exponents
