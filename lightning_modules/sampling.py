"""Samplers as pure functions of a denoiser, noise levels, a starting state and noise; they hold for every path.

With n = (x - alpha D) / sigma, the noise that a denoiser D sees in a state x, probability flow obeys
dx = D dalpha + n dsigma, whichever way alpha and sigma go. Variance-preserving chains, EDM (alpha = 1) and rectified
flow (alpha = 1 - sigma) are the same to a sampler, which therefore never divides by the alpha of a level that it
leaves, zero at the start of rectified flow. Coefficients are Python's float64; states keep the dtype of the first.

DDPM: Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (NeurIPS, arXiv 2006.11239). Improved DDPM: Nichol,
Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (ICML, arXiv 2102.09672). DDIM: Song et al. 2021,
"Denoising Diffusion Implicit Models" (ICLR, arXiv 2010.02502). EDM: Karras et al. 2022, "Elucidating the Design Space
of Diffusion-Based Generative Models" (NeurIPS, arXiv 2206.00364). DPM-Solver++: Lu et al. 2022, "DPM-Solver++: Fast
Solver for Guided Sampling of Diffusion Probabilistic Models" (arXiv 2211.01095). UniPC: Zhao et al. 2023, "UniPC: A
Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (NeurIPS, arXiv 2302.04867).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor

from lightning_modules.noise_levels import Level, Spacing, check_levels


class Denoised(NamedTuple):
    """What a denoiser says of noisy images.

    Attributes:
        image: expected clean images, (N, C, H, W), in [-1, 1] where the training images are.
        log_variance_share: where the logarithm of the variance of an ancestral step lies, from 0 (the smallest) to 1
            (the largest), in the shape of `image`; None for models that do not learn it.
    """

    image: Tensor
    log_variance_share: Tensor | None = None


Denoise = Callable[[Tensor, Level], Denoised]  # of noisy images (N, C, H, W) at one level
Noise = Callable[[int], Tensor]  # standard normal for step k = 0, 1, ..., in the shape of the state


def clipped(denoise: Denoise) -> Denoise:
    """Clip the denoised images to [-1, 1], as DDPM does at every step."""

    def clip(x: Tensor, level: Level) -> Denoised:
        image, share = denoise(x, level)
        return Denoised(image.clamp(-1, 1), share)

    return clip


def guided(denoise: Denoise, other: Denoise, weight: float) -> Denoise:
    """Move denoised images away from those of another denoiser: D + (weight - 1) (D - D_other).

    The other one is the model without its condition (Ho, Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv
    2207.12598) or a worse model (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself",
    NeurIPS, arXiv 2406.02507). A weight of 1 changes nothing.
    """

    def guide(x: Tensor, level: Level) -> Denoised:
        image, share = denoise(x, level)
        return Denoised(image + (weight - 1) * (image - other(x, level).image), share)

    return guide


class Sampler(ABC):
    """Takes a noisy state to an image along noise levels.

    Args:
        steps: how many.
        spacing: which levels to visit; None for those of the model.

    Raises:
        ValueError: if there is no step.
    """

    def __init__(self, steps: int, spacing: Spacing | None = None) -> None:
        if steps < 1:
            raise ValueError(f"Expected a sampler of at least one step, but got {steps}.")
        self.steps, self.spacing = steps, spacing

    def levels(self, own: Spacing) -> list[Level]:
        """Give the levels to visit.

        Args:
            own: the spacing of the model.

        Raises:
            ValueError: if the spacing cannot give that many steps.
        """
        levels = (own if self.spacing is None else self.spacing)(self.steps)
        if len(levels) != self.steps + 1:
            raise ValueError(f"Expected {self.steps} steps, but the spacing gives {len(levels) - 1}.")
        check_levels(levels)
        return levels

    def evaluations(self, steps: int) -> int:
        """Count the calls of the denoiser in that many steps."""
        return steps

    def __call__(self, denoise: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise) -> Tensor:
        """Sample images.

        Args:
            denoise: the model.
            levels: the noisiest first, the last one CLEAN.
            x: state at levels[0], (N, C, H, W).
            noise: standard normal numbers for the steps that need them.

        Returns:
            Images in the shape and dtype of `x`; their range is that of the denoiser.

        Raises:
            ValueError: if the levels do not fall from noise to CLEAN.
        """
        state = x
        for state in self.trajectory(denoise, levels, x, noise):  # noqa: B007 (the last one is the image)
            pass
        return state

    def trajectory(self, denoise: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise) -> Iterator[Tensor]:
        """Give the state after every step; arguments and errors as when called."""
        check_levels(levels)

        def in_dtype(x: Tensor, level: Level) -> Denoised:
            image, share = denoise(x, level)
            return Denoised(image.to(x.dtype), None if share is None else share.to(x.dtype))

        return self._states(in_dtype, levels, x, noise)

    @abstractmethod
    def _states(self, denoise: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise) -> Iterator[Tensor]:
        """Give the state after every step."""


def to_level(x: Tensor, image: Tensor, this: Level, following: Level) -> Tensor:
    """Euler's step of probability flow: the same image with less of the same noise (DDIM, equation 12, eta = 0).

    alpha' D + sigma' n, exact if D stays the same.
    """
    kept = following.sigma / this.sigma
    return kept * x + (following.alpha - this.alpha * kept) * image


def noise_ratio(this: Level, following: Level) -> float:
    """What is left of sigma / alpha after a step: 0 if nothing is, or if it was infinite; less than 1."""
    return (this.alpha * following.sigma) / (following.alpha * this.sigma)


class Ancestral(Sampler):
    """Sampling of the reverse chain, with noise in every step but the last (DDPM, algorithm 2).

    Args:
        steps: how many.
        variance: of a step: "small" is right if the training set is one image, "large" if it is white noise (DDPM,
            section 3.2), "learned" is the model's choice between their logarithms (improved DDPM, equation 15).
        spacing: which levels to visit; None for those of the model.
    """

    def __init__(
        self,
        steps: int = 250,
        variance: Literal["small", "large", "learned"] = "small",
        spacing: Spacing | None = None,
    ) -> None:
        super().__init__(steps, spacing)
        self.variance = variance

    def _states(self, denoise: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise) -> Iterator[Tensor]:
        for k, (this, following) in enumerate(pairwise(levels)):
            image, share = denoise(x, this)
            ratio, kept = noise_ratio(this, following), following.sigma / this.sigma
            # DDPM, equation 7. Its beta, the variance of the forward step, is sigma² (1 - ratio²) on every path.
            renewed = (1 - ratio) * (1 + ratio)
            x = ratio * kept * x + following.alpha * renewed * image
            if following.sigma > 0:
                x = x + this.sigma * math.sqrt(renewed) * self._relative_deviation(kept, share) * noise(k)
            yield x

    def _relative_deviation(self, kept: float, share: Tensor | None) -> float | Tensor:
        """Standard deviation of the noise of a step relative to the large one; the small one is sigma' / sigma."""
        if self.variance != "learned":
            return kept if self.variance == "small" else 1.0
        if share is None:
            raise ValueError(
                "Expected a model that learns its variance, but this one does not; choose the variance small or large."
            )
        return kept ** (1 - share)


class DDIM(Sampler):
    """Euler's method with part of the noise replaced by new noise (DDIM, equations 12 and 16).

    Args:
        steps: how many.
        eta: 0 is deterministic (Euler's method on any path), 1 is :class:`Ancestral` with small variance.
        spacing: which levels to visit; None for those of the model.

    Raises:
        ValueError: if eta is not in [0, 1].
    """

    def __init__(self, steps: int = 50, eta: float = 0.0, spacing: Spacing | None = None) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"Expected eta of DDIM from 0 to 1, but got {eta}.")
        super().__init__(steps, spacing)
        self.eta = eta

    def _states(self, denoise: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise) -> Iterator[Tensor]:
        for k, (this, following) in enumerate(pairwise(levels)):
            image = denoise(x, this).image
            renewed = self.eta**2 * (1 - noise_ratio(this, following) ** 2)  # share of the variance that is new
            old = Level(following.alpha, following.sigma * math.sqrt(1 - renewed))
            x = to_level(x, image, this, old)
            if renewed * following.sigma > 0:
                x = x + following.sigma * math.sqrt(renewed) * noise(k)
            yield x


class Heun(Sampler):
    """Trapezoidal rule, of second order, with or without noise on the way (EDM, algorithm 2).

    Every step but the last evaluates the denoiser twice. Churn first raises sigma at the same alpha, so it asks the
    denoiser for levels beside the path unless alpha = 1.

    Args:
        steps: how many.
        churn: new noise, spread over all steps; 0 is deterministic.
        churn_min: the least sigma / alpha with new noise.
        churn_max: the greatest sigma / alpha with new noise.
        noise_scale: standard deviation of the new noise, slightly above 1 against lost detail.
        spacing: which levels to visit; None for those of the model.

    Raises:
        ValueError: if churn is negative.
    """

    def __init__(
        self,
        steps: int = 18,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        noise_scale: float = 1.0,
        spacing: Spacing | None = None,
    ) -> None:
        if churn < 0:
            raise ValueError(f"Expected churn of at least 0, but got {churn}.")
        super().__init__(steps, spacing)
        self.churn, self.churn_min, self.churn_max, self.noise_scale = churn, churn_min, churn_max, noise_scale

    def evaluations(self, steps: int) -> int:
        """Count the calls of the denoiser in that many steps."""
        return 2 * steps - 1

    def _states(self, denoise: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise) -> Iterator[Tensor]:
        # EDM, algorithm 2: the same share of sigma in every step, at most sqrt 2 - 1
        gamma = min(self.churn / (len(levels) - 1), math.sqrt(2) - 1)
        for k, (this, following) in enumerate(pairwise(levels)):
            # Pure noise, whose sigma / alpha is infinite, gets none (infinity · 0 is not a number, and compares false).
            if gamma > 0 and self.churn_min * this.alpha <= this.sigma <= self.churn_max * this.alpha:
                x = x + self.noise_scale * this.sigma * math.sqrt(gamma * (2 + gamma)) * noise(k)
                this = Level(this.alpha, (1 + gamma) * this.sigma)
            image = denoise(x, this).image
            euler = to_level(x, image, this, following)
            if following.sigma == 0:
                x = euler
            else:
                # The slope at both ends: D dalpha + (x - alpha D) / sigma dsigma. Half of each.
                dalpha, dsigma = following.alpha - this.alpha, following.sigma - this.sigma
                ahead = denoise(euler, following).image
                rate = dsigma / following.sigma
                x = (x + euler) / 2 + (rate / 2) * euler + ((dalpha - following.alpha * rate) / 2) * ahead
            yield x


def _lambda_steps(levels: Sequence[Level]) -> list[float]:
    """Give h of every step, the growth of log(alpha / sigma): infinite from pure noise and to a clean image."""
    ratios = [noise_ratio(this, following) for this, following in pairwise(levels)]
    return [-math.log(ratio) if ratio > 0 else math.inf for ratio in ratios]


def _growths(h: Sequence[float]) -> list[float]:
    """Give every step h relative to the one before: 0, which means first order, for the first and the last one."""
    inner = [this / before for before, this in pairwise(h[:-1])]
    return [0.0, *inner, 0.0][: len(h)]


class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M): the denoised image is a line through its last two values (algorithm 2).

    Args:
        steps: how many.
        spacing: which levels to visit; None for those of the model.
    """

    def __init__(self, steps: int = 20, spacing: Spacing | None = None) -> None:
        super().__init__(steps, spacing)

    def _states(self, denoise: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise) -> Iterator[Tensor]:
        images: list[Tensor] = []  # the last two, the newest at the end
        for (this, following), growth in zip(pairwise(levels), _growths(_lambda_steps(levels)), strict=True):
            images = [*images[-1:], denoise(x, this).image]
            x = to_level(x, _extrapolated(images, growth), this, following)
            yield x


class UniPC(Sampler):
    """UniPC-2 (B2): DPM-Solver++(2M), and every step again once the denoised image at its end is known.

    The states of a trajectory are the predicted ones, which the denoiser sees. The image at the end of a step serves
    the next prediction too, so the corrector (section 3.1) costs no evaluation.

    Args:
        steps: how many.
        spacing: which levels to visit; None for those of the model.
    """

    def __init__(self, steps: int = 20, spacing: Spacing | None = None) -> None:
        super().__init__(steps, spacing)

    def _states(self, denoise: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise) -> Iterator[Tensor]:
        h = _lambda_steps(levels)
        growths = _growths(h)
        images: list[Tensor] = []  # the last three, the newest at the end
        predicted = x
        for k, (this, following) in enumerate(pairwise(levels)):
            images = [*images[-2:], denoise(predicted, this).image]
            if k > 0:
                x = to_level(x, _interpolated(images, h[k - 1], growths[k - 1]), levels[k - 1], this)
            predicted = to_level(x, _extrapolated(images, growths[k]), this, following)
            yield predicted


def _extrapolated(images: Sequence[Tensor], growth: float) -> Tensor:
    """Give the average of D over the coming step: a line through two values (DPM-Solver++, algorithm 2)."""
    return images[-1] if growth == 0 else images[-1] + growth / 2 * (images[-1] - images[-2])


def _interpolated(images: Sequence[Tensor], h: float, growth: float) -> Tensor:
    """Give the average of D over the past step, weighted by e^(h u) for u from 0 to 1: a parabola through three values.

    UniC-2 (UniPC, section 3.1) written out; its B(h) cancels. With two values alone, as B2 has it, their mean.
    """
    *earlier, start, end = images
    if not earlier:
        return (start + end) / 2
    # Averages of u and u², then of the Lagrange polynomials of u = 1 and u = -1 / growth (u = 0 is the third).
    constant = -1 / math.expm1(-h)
    first = constant - 1 / h
    second = constant - 2 * first / h
    weight = (first + growth * second) / (1 + growth)
    earlier_weight = (second - first) * growth**2 / (1 + growth)
    return start + weight * (end - start) + earlier_weight * (earlier[0] - start)
