"""Noise levels of a diffusion model, and the rules by which a sampler chooses which of them to visit.

A noisy image at a level is alpha · image + sigma · noise. A variance-preserving chain has alpha² + sigma² = 1, EDM
alpha = 1, rectified flow alpha + sigma = 1.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM; NeurIPS, arXiv
2206.00364), table 1; Liu et al. 2023, "Flow Straight and Fast" (ICLR, arXiv 2209.03003).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol


class Level(NamedTuple):
    """How much of the image and how much noise: alpha · image + sigma · noise."""

    alpha: float
    sigma: float


CLEAN = Level(1.0, 0.0)


class Spacing(Protocol):
    """Chooses the levels that a sampler visits."""

    def __call__(self, steps: int) -> list[Level]:
        """Give steps + 1 levels, the noisiest first, the last one CLEAN.

        Raises:
            ValueError: if the rule cannot give that number of steps.
        """
        ...


def check_levels(levels: Sequence[Level]) -> None:
    """Refuse levels that no sampler can follow.

    Raises:
        ValueError: if there is no step, if they do not end at CLEAN, or if one is not less noisy than the one before.
    """
    if len(levels) < 2 or levels[-1] != CLEAN:
        raise ValueError(f"Expected at least two noise levels, the last of them {CLEAN}, but got {list(levels)}.")
    for k, (this, following) in enumerate(pairwise(levels)):
        # sigma / alpha falls; cross-multiplied, as rectified flow begins with alpha = 0. Not-a-number fails as well.
        if not following.sigma * this.alpha < this.sigma * following.alpha:
            raise ValueError(
                f"Expected every noise level to be less noisy than the one before, but number {k} is {this} and "
                f"number {k + 1} is {following}; use fewer steps or another spacing."
            )


def _fractions(steps: int) -> list[float]:
    """Split 0 to 1 evenly, both included (0 alone for one step)."""
    if steps < 1:
        raise ValueError(f"Expected at least one step, but got {steps}.")
    return [i / max(steps - 1, 1) for i in range(steps)]


def _without_scaling(sigmas: Sequence[float]) -> list[Level]:
    return [*(Level(1.0, sigma) for sigma in sigmas), CLEAN]


class Karras:
    """Even in sigma^(1/rho), which spends most steps where there is little noise (EDM, equation 5).

    Args:
        sigma_min: the last noise before none.
        sigma_max: the first noise.
        rho: 7 in the paper; 1 is even in sigma.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def __call__(self, steps: int) -> list[Level]:
        """Give steps + 1 levels."""
        most, least = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return _without_scaling([(most + u * (least - most)) ** self.rho for u in _fractions(steps)])


class Geometric:
    """Even in log sigma: the variance-exploding discretization (EDM, table 1, column VE).

    Args:
        sigma_min: the last noise before none.
        sigma_max: the first noise.
    """

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __call__(self, steps: int) -> list[Level]:
        """Give steps + 1 levels."""
        ratio = self.sigma_min / self.sigma_max
        return _without_scaling([self.sigma_max * ratio**u for u in _fractions(steps)])


class LinearBeta:
    """Even in the time of the continuous variance-preserving process, without its scaling (EDM, table 1, column VP).

    Args:
        beta_min: noise rate at time 0.
        beta_slope: what it grows by until time 1, where sampling begins.
        last_time: the last time before 0.
    """

    def __init__(self, beta_min: float = 0.1, beta_slope: float = 19.9, last_time: float = 1e-3) -> None:
        self.beta_min, self.beta_slope, self.last_time = beta_min, beta_slope, last_time

    def __call__(self, steps: int) -> list[Level]:
        """Give steps + 1 levels."""
        times = [1 + u * (self.last_time - 1) for u in _fractions(steps)]
        exponents = [t * (self.beta_slope * t / 2 + self.beta_min) for t in times]
        return _without_scaling([math.sqrt(math.expm1(exponent)) for exponent in exponents])


class CosineChain:
    """Some of the levels of the discrete cosine chain, without its scaling (EDM, table 1, column iDDPM).

    Args:
        length: steps of the chain.
        sigma_max: noisier levels are left out.
        offset: shifts the cosine away from zero noise (C2 of the paper).
        least_ratio: lower bound of the ratio of cumulative alphas (C1 of the paper).
    """

    def __init__(
        self, length: int = 1000, sigma_max: float = 81.0, offset: float = 0.008, least_ratio: float = 0.001
    ) -> None:
        cumulative = [math.sin(math.pi / 2 * j / (length * (offset + 1))) ** 2 for j in range(length + 1)]
        sigmas = [0.0]
        for j in range(length, 0, -1):
            ratio = max(cumulative[j - 1] / cumulative[j], least_ratio)
            sigmas.append(math.sqrt((sigmas[-1] ** 2 + 1) / ratio - 1))
        self.sigmas = [sigma for sigma in reversed(sigmas[1:]) if sigma <= sigma_max]

    def __call__(self, steps: int) -> list[Level]:
        """Give steps + 1 levels."""
        if steps > len(self.sigmas):
            raise ValueError(f"Expected at most {len(self.sigmas)} steps, the levels of the chain, but got {steps}.")
        last = len(self.sigmas) - 1
        return _without_scaling([self.sigmas[math.floor(u * last + 0.5)] for u in _fractions(steps)])


class Straight:
    """The straight path of rectified flow, (1 - t) · image + t · noise, in even steps of t from 1 to 0."""

    def __call__(self, steps: int) -> list[Level]:
        """Give steps + 1 levels."""
        if steps < 1:
            raise ValueError(f"Expected at least one step, but got {steps}.")
        return [Level(i / steps, (steps - i) / steps) for i in range(steps + 1)]
