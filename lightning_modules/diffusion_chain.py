"""The discrete diffusion chain with its tables, and the choice of the steps that a sampler visits.

Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models" (NeurIPS, arXiv 2006.11239) define the chain; Nichol,
Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (ICML, arXiv 2102.09672) the cosine schedule and the
respaced chain; Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models" (ICLR, arXiv 2010.02502) the strided one.
All numbers equal those of openai/improved-diffusion and openai/guided-diffusion.
"""

from __future__ import annotations

import copy
import math
from itertools import accumulate, repeat
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_modules.noise_levels import CLEAN, Level

LARGEST_COSINE_BETA = 0.999


class DiffusionChain:
    """A Markov chain from an image (t = 0 is one noising step) to nearly pure noise, variance preserving throughout.

    It is a spacing too: called with a number of steps it gives the noise levels that a sampler visits.

    Args:
        steps: T. The linear schedule needs at least 21, as its variances are multiplied by 1000 / T.
        schedule: "linear" is that of Ho et al. 2020 (section 4), from 0.0001 to 0.02, rescaled so that any T ends at
            about the same noise; "cosine" is that of Nichol, Dhariwal 2021 (equation 17).

    Attributes:
        timesteps: int64 (T,), the step of the long chain that every step of this one is: 0 ... T-1, or those that
            :meth:`respaced` kept. A network is told these.
        betas: variance of the noise that a step adds. This and all others are float64 (T,) on the CPU.
        alphas_cumprod: share of the image in the variance after the step, the product of 1 - betas.
        alphas_cumprod_prev: the same before the step; it begins with 1.
        alphas_cumprod_next: the same after the next step; it ends with 0.
        alpha: factor of the image after the step, sqrt(alphas_cumprod).
        sigma: standard deviation of the noise after the step, sqrt(1 - alphas_cumprod).
        snr: signal-to-noise ratio alpha² / sigma².
        posterior_variance: of x_{t-1} given x_t and the image (Ho et al. 2020, equation 7); 0 at t = 0.
        posterior_log_variance_clipped: its logarithm, with the value of t = 1 at t = 0.
        posterior_mean_image: factor of the image in the mean of x_{t-1} given x_t and the image (equation 7).
        posterior_mean_x_t: factor of x_t in that mean.
        fixed_large_variance: betas, but the posterior variance of t = 1 at t = 0.

    Raises:
        ValueError: if T is too small for the schedule.
    """

    timesteps: Tensor
    betas: Tensor
    alphas_cumprod: Tensor

    def __init__(self, steps: int = 4000, schedule: Literal["linear", "cosine"] = "linear") -> None:
        self.betas = torch.tensor(_linear(steps) if schedule == "linear" else _cosine(steps), dtype=torch.float64)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.timesteps = torch.arange(steps)
        self._tabulate()

    def _tabulate(self) -> None:
        """Fill the tables that follow from `betas` and `alphas_cumprod`."""
        self.alphas_cumprod_prev = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        self.alphas_cumprod_next = torch.cat([self.alphas_cumprod[1:], self.alphas_cumprod.new_zeros(1)])
        noise, noise_prev = 1 - self.alphas_cumprod, 1 - self.alphas_cumprod_prev
        self.alpha = self.alphas_cumprod.sqrt()
        self.sigma = noise.sqrt()
        self.snr = self.alphas_cumprod / noise
        self.posterior_variance = self.betas * noise_prev / noise
        self.posterior_mean_image = self.betas * self.alphas_cumprod_prev.sqrt() / noise
        self.posterior_mean_x_t = noise_prev * (1 - self.betas).sqrt() / noise
        # The posterior of t = 0 is a point, whose logarithm is -inf. A chain of a single step has no t = 1.
        second = self.posterior_variance[1:2] if len(self) > 1 else self.betas
        self.posterior_log_variance_clipped = torch.cat([second, self.posterior_variance[1:]]).log()
        self.fixed_large_variance = torch.cat([second, self.betas[1:]])

    def __len__(self) -> int:
        return len(self.betas)

    def __call__(self, steps: int) -> list[Level]:
        """Give the noise levels of that many rounded equidistant steps, noisiest first, then CLEAN."""
        return [*reversed(self.respaced(steps).levels), CLEAN]

    @property
    def levels(self) -> list[Level]:
        """The noise level after every step, t = 0 first."""
        return [Level(*level) for level in zip(self.alpha.tolist(), self.sigma.tolist(), strict=True)]

    def respaced(self, spacing: int | str) -> DiffusionChain:
        """Give the chain that visits only some of the steps, at their noise levels (Nichol, Dhariwal 2021, section 4).

        Args:
            spacing: which steps are kept, see :func:`space_steps`.
        """
        kept = torch.tensor(space_steps(len(self), spacing))
        chain = copy.copy(self)
        chain.timesteps = self.timesteps[kept]
        # The products are taken over, not multiplied anew, so that the levels are exactly those of the long chain.
        chain.alphas_cumprod = self.alphas_cumprod[kept]
        chain.betas = 1 - chain.alphas_cumprod / torch.cat([torch.ones(1), chain.alphas_cumprod[:-1]])
        chain._tabulate()
        return chain

    def timestep_of(self, level: Level) -> float:
        """Give the possibly fractional step whose ratio of noise to image is that of a level.

        So a network that was trained on the chain can be evaluated at any level. Between two steps log(sigma / alpha)
        is interpolated linearly; a ratio outside the chain gives its first or last step; at a level of the chain (to
        a millionth of a step) the result is an integer.
        """
        with np.errstate(divide="ignore"):  # pure noise has alpha 0, a clean image sigma 0
            ratio, ratios = (np.log(np.divide(s, a)) for a, s in (level, (self.alpha.numpy(), self.sigma.numpy())))
        step = float(np.interp(ratio, ratios, self.timesteps.numpy()))
        return float(round(step)) if abs(step - round(step)) < 1e-6 else step


def _linear(steps: int) -> list[float]:
    # At 20 the last variance is 1, where nothing of the image is left to predict.
    if steps < 21:
        raise ValueError(
            f"The linear schedule needs at least 21 steps, but got {steps}: its last beta would be "
            f"0.02 · 1000 / {steps}, not below 1. Take more steps or the cosine schedule."
        )
    first, last = 1000 / steps * 1e-4, 1000 / steps * 0.02
    return [first + index * ((last - first) / (steps - 1)) for index in range(steps)]


def _cosine(steps: int) -> list[float]:
    if steps < 1:
        raise ValueError(f"The cosine schedule needs at least 1 step, but got {steps}.")

    # Equation 17 of Nichol, Dhariwal 2021
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - f((index + 1) / steps) / f(index / steps), LARGEST_COSINE_BETA) for index in range(steps)]


def space_steps(total: int, spacing: int | str) -> list[int]:
    """Choose which steps of a long chain to keep.

    Args:
        total: length of the long chain.
        spacing: N or "N": rounded equidistant steps including the first and the last. "a,b,c": the chain is cut into
            sections of equal length (earlier ones longer by one where it does not divide), of which a, b and c steps
            are kept in this way. "ddimN": N steps from the first with an integer stride, as in Song et al. 2021; the
            last kept step is then not the noisiest.

            One single step is the last, total - 1, because a sampler that starts from pure noise must start there.
            (The original takes the first, of the whole chain or of the last section. Of an earlier section a single
            step is the first here too.)

    Returns:
        The steps in ascending order.

    Raises:
        ValueError: if the spacing cannot be read, or there are no such steps.
    """
    text = str(spacing)
    stride, counts = text.removeprefix("ddim"), text.split(",")
    if stride != text and stride.isdecimal():
        return _strided(total, int(stride))
    if not all(count.strip().isdecimal() for count in counts):
        raise ValueError(
            f"Expected the spacing of a chain to be a number of steps like 250, numbers of its sections like "
            f"'10,15,20', or an integer stride like 'ddim50', but got {spacing!r}."
        )
    length, longer = divmod(total, len(counts))
    sizes = [length + (section < longer) for section in range(len(counts))]
    starts = accumulate(sizes, initial=0)
    sections = [
        _equidistant(start, size, int(count), spacing)
        for start, size, count in zip(starts, sizes, counts, strict=False)
    ]
    if int(counts[-1]) == 1:
        sections[-1] = [total - 1]
    return [step for section in sections for step in section]


def _equidistant(start: int, size: int, count: int, spacing: int | str) -> list[int]:
    if not 1 <= count <= size:
        raise ValueError(
            f"Spacing {spacing!r} asks for {count} of the {size} steps from {start} to {start + size - 1}; "
            f"expected 1 to {size}."
        )
    stride = (size - 1) / max(count - 1, 1)
    # Added up as in the original: its rounding error decides where a step lies half-way between two.
    return [start + round(position) for position in accumulate(repeat(stride, count - 1), initial=0.0)]


def _strided(total: int, count: int) -> list[int]:
    stride = max(min(-(-total // max(count, 1)), total - 1), 1)  # the smallest that keeps at most `count`
    kept = range(0, total, stride)
    if len(kept) != count:
        nearest = sorted({len(kept), len(range(0, total, max(stride - 1, 1)))})
        raise ValueError(
            f"No integer stride gives {count} of {total} steps ('ddim{count}'); the nearest that one does are "
            f"{' and '.join(map(str, nearest))}. Rounded steps, without 'ddim', exist for every number up to {total}."
        )
    return list(kept)
