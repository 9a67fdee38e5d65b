"""The exact denoiser of a mixture of Gaussians, and what every sampler makes of a single Gaussian, in closed form.

Write e for the deviation of a state from alpha times the mean of the images. For Gaussian images with standard
deviation s every sampler multiplies e by a gain in each step, and adds noise; neither depends on the mean. The gains
below are derived from the covariances of the states, not from the samplers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lightning_modules.noise_levels import Level
from lightning_modules.sampling import DDIM, Ancestral, Denoised, DPMSolverPP2M, Heun, Sampler, UniPC


class GaussianMixture:
    """Exact denoiser of images that are a mixture of Gaussians of one isotropic covariance.

    Args:
        means: of the components, (K, C, H, W) or without any of the latter dimensions.
        log_weights: (K,), normalized or not.
        std: standard deviation of every pixel around the mean of its component.
    """

    def __init__(self, means: Tensor, log_weights: Tensor, std: float) -> None:
        self.means, self.log_weights, self.std = means, log_weights, std

    def __call__(self, x: Tensor, level: Level) -> Denoised:
        """Give E[x0 | x] of states (N, C, H, W)."""
        alpha, sigma = level
        variance = alpha**2 * self.std**2 + sigma**2  # of x around alpha times the mean of its component
        flat, means = (v.reshape(len(v), -1) for v in (x, self.means.to(x)))  # (N, P), (K, P)
        distances = (flat[:, None] - alpha * means).square().sum(dim=2)  # (N, K)
        responsibilities = (self.log_weights.to(x) - distances / (2 * variance)).softmax(dim=1)
        mean = (responsibilities[:, :, None] * means).sum(dim=1)  # (N, P)
        image = (alpha * self.std**2 / variance) * flat + (sigma**2 / variance) * mean
        return Denoised(image.reshape(x.shape))


class Gain(NamedTuple):
    """What a sampler makes of the deviation e of its first state: gain · e + noise of that variance."""

    gain: float
    noise_variance: float = 0.0

    def then(self, following: Gain) -> Gain:
        """Give this and the following step as one."""
        return Gain(self.gain * following.gain, self.noise_variance * following.gain**2 + following.noise_variance)


def exact_share(std: float, this: Level, following: Level) -> float:
    """Give the share of a :class:`Denoised` with which an ancestral step has exactly the variance of x' given x.

    Args:
        std: standard deviation of Gaussian images.
        this: level of x.
        following: level of x'; the step to a clean image has no noise, whatever the share.
    """
    if following.sigma == 0:
        return 1.0
    excess = math.log(_variance(std, following) / _variance(std, this))
    return 1 - excess / (2 * math.log(following.sigma / this.sigma))


def gaussian_gain(sampler: Sampler, levels: Sequence[Level], std: float) -> Gain:
    """Give what a sampler with the exact denoiser does along the levels, for Gaussian images of that deviation.

    The learned variance of an ancestral sampler is taken to be :func:`exact_share`.

    Raises:
        ValueError: for a sampler of an unknown type.
    """
    match sampler:
        case DPMSolverPP2M() | UniPC():
            return Gain(_multistep(levels, std, corrected=isinstance(sampler, UniPC)))
        case Ancestral():
            steps = [_ancestral(sampler, std, *step) for step in pairwise(levels)]
        case DDIM():
            steps = [_ddim(sampler.eta, std, *step) for step in pairwise(levels)]
        case Heun():
            steps = [_heun(sampler, len(levels) - 1, std, *step) for step in pairwise(levels)]
        case _:
            raise ValueError(f"Expected a sampler with known gains, but got {type(sampler).__name__}.")
    total = Gain(1.0)
    for step in steps:
        total = total.then(step)
    return total


def _variance(std: float, level: Level) -> float:
    return (level.alpha * std) ** 2 + level.sigma**2


def _ancestral(sampler: Ancestral, std: float, this: Level, following: Level) -> Gain:
    # x = a x' + noise of variance v, so the covariance of x and x' is a Var x'.
    a = this.alpha / following.alpha
    v = this.sigma**2 - (a * following.sigma) ** 2
    ratio = _variance(std, following) / _variance(std, this)
    if following.sigma == 0:
        return Gain(a * ratio)
    factors = {"small": (following.sigma / this.sigma) ** 2, "large": 1.0, "learned": ratio}
    return Gain(a * ratio, v * factors[sampler.variance])


def _ddim(eta: float, std: float, this: Level, following: Level) -> Gain:
    # The two states share the image and a part of the noise, whose correlation is that of the chain for eta = 1.
    correlation = this.alpha / following.alpha * following.sigma / this.sigma
    renewed = eta**2 * (1 - correlation**2)
    covariance = this.alpha * following.alpha * std**2
    covariance += this.sigma * following.sigma * math.sqrt(1 - renewed)
    return Gain(covariance / _variance(std, this), following.sigma**2 * renewed)


def _heun(sampler: Heun, steps: int, std: float, this: Level, following: Level) -> Gain:
    added = 0.0
    if this.alpha > 0 and sampler.churn_min <= this.sigma / this.alpha <= sampler.churn_max:
        raised = this.sigma * (1 + min(sampler.churn / steps, math.sqrt(2) - 1))
        added = sampler.noise_scale**2 * (raised**2 - this.sigma**2)
        this = Level(this.alpha, raised)

    def growth(level: Level) -> float:
        """The flow keeps e / sqrt(Var x), so de / e = d Var x / (2 Var x)."""
        half = level.alpha * std**2 * (following.alpha - this.alpha) + level.sigma * (following.sigma - this.sigma)
        return half / _variance(std, level)

    gain = 1 + growth(this)
    if following.sigma > 0:
        gain = 1 + (growth(this) + gain * growth(following)) / 2
    return Gain(1.0, added).then(Gain(gain))


def _multistep(levels: Sequence[Level], std: float, corrected: bool) -> float:
    with np.errstate(divide="ignore"):  # infinite for pure noise and clean images
        alphas, sigmas = np.array(levels).T
        lambdas = np.log(alphas) - np.log(sigmas)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    u = (nodes + 1) / 2
    seen, images = 1.0, [0.0, 0.0]  # e of the state that the denoiser sees, deviations of D from the mean
    for k, (this, following) in enumerate(pairwise(levels)):
        images.append(this.alpha * std**2 / _variance(std, this) * seen)
        earlier, start, end = images[-3:]
        if k == 0 or not corrected:
            state = seen
        elif k == 1:
            state = _exponential_step(state, (start + end) / 2, levels[0], this)
        else:
            h = lambdas[k] - lambdas[k - 1]
            inverse = h / (lambdas[k - 1] - lambdas[k - 2])
            # The parabola through D at u = -1 / inverse, 0, 1
            second = (end - start + (earlier - start) * inverse) / (1 + inverse) * inverse
            parabola = start + (end - start) * u + second * u * (u - 1)
            average = np.average(parabola, weights=weights * np.exp(h * (u - 1)))
            state = _exponential_step(state, float(average), levels[k - 1], this)
        line = end
        if k > 0 and following.sigma > 0:
            line += (end - start) / 2 * float((lambdas[k + 1] - lambdas[k]) / (lambdas[k] - lambdas[k - 1]))
        seen = _exponential_step(state, line, this, following)
    return seen


def _exponential_step(state: float, image: float, this: Level, following: Level) -> float:
    kept = following.sigma / this.sigma
    return kept * state + (following.alpha - kept * this.alpha) * image
