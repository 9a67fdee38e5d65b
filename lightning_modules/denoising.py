"""What a diffusion network learns, and how it denoises: the objectives.

An objective mixes images with noise, has the network predict something of them, and turns that prediction into the
expected clean image at any noise level, so that every sampler works with every objective.

Discrete chain: Ho et al. 2020 (NeurIPS, arXiv 2006.11239), Nichol, Dhariwal 2021 (ICML, arXiv 2102.09672), Hang et al.
2023 (min-SNR, ICCV, arXiv 2303.09556). EDM: Karras et al. 2022 (NeurIPS, arXiv 2206.00364). Rectified flow: Liu et al.
2023 (ICLR, arXiv 2209.03003); logit-normal times: Esser et al. 2024 (ICML, arXiv 2403.03206).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.diffusion_chain import DiffusionChain
from lightning_modules.noise_levels import Karras, Level, Spacing, Straight
from lightning_modules.sampling import Denoise, Denoised
from lightning_modules.time_sampling import TimeSampler, UniformTimes
from lightning_modules.variational import (
    Parameterization,
    hybrid_loss,
    min_snr_weight,
    noised,
    simple_loss,
)

LARGEST_RATIO = 1e4  # of noise to image that a continuous network is asked for; pure noise has none


class Losses(NamedTuple):
    """Losses of samples.

    Attributes:
        loss: (N,), without the weight.
        step: step of the chain, int64 (N,); None for a continuous time.
        weight: (N,), against the frequency with which the step is drawn.
    """

    loss: Tensor
    step: Tensor | None = None
    weight: Tensor | None = None


class Objective(nn.Module, ABC):
    """Training loss and denoiser of a network that is called as network(x, time (N,), condition)."""

    @property
    @abstractmethod
    def spacing(self) -> Spacing:
        """The noise levels that a sampler visits unless it is told others."""

    @abstractmethod
    def losses(
        self, network: nn.Module, images: Tensor, condition: Tensor | None, uniform: Tensor, noise: Tensor
    ) -> Losses:
        """Give the loss of every sample.

        Args:
            network: the network.
            images: (N, C, H, W) in [-1, 1].
            condition: multi-hot (N, width) or None.
            uniform: (N,) in [0, 1), from which the times follow.
            noise: standard normal, in the shape of the images.
        """

    @abstractmethod
    def denoiser(self, network: nn.Module, condition: Tensor | None) -> Denoise:
        """Give the network as a denoiser of noisy images with that condition."""

    def observe(self, step: Tensor, loss: Tensor) -> None:
        """Learn from the losses of all ranks which steps to train on; most objectives do not."""


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Make (N,) fit for products with (N, C, H, W)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class ChainObjective(Objective):
    """The discrete chain: the network predicts noise, image or velocity, and the variance if it is to learn it.

    Args:
        chain: noise levels of the T steps.
        predict: the noise "eps", the clean image "x0" or the velocity "v" (Salimans, Ho 2022, arXiv 2202.00512).
        learn_variance: the network has a second head for the variance, trained by the variational bound.
        bits_weight: of the bound in bits per dimension: 1 as guided-diffusion, T / 1000 as in improved DDPM.
        min_snr_gamma: weight the squared error by min(SNR, gamma) on the image; 5 in the paper, None for none.
        times: how the steps of a batch are drawn.
        rescale_timesteps: the network is told t · 1000 / T, as that of improved-diffusion, instead of t.

    Raises:
        ValueError: if min-SNR weights meet a learned variance, or `times` has other steps than the chain.
    """

    def __init__(
        self,
        chain: DiffusionChain,
        predict: Literal["eps", "x0", "v"] = "eps",
        learn_variance: bool = False,
        bits_weight: float = 1.0,
        min_snr_gamma: float | None = None,
        times: TimeSampler | None = None,
        rescale_timesteps: bool = False,
    ) -> None:
        super().__init__()
        if learn_variance and min_snr_gamma is not None:
            raise ValueError(
                "min_snr_gamma weights the squared error alone, and learn_variance adds the variational bound to it: "
                "leave one of them out."
            )
        self.chain = chain
        self.parameterization = Parameterization(predict, "learned_range" if learn_variance else "fixed_large")
        self.learn_variance = learn_variance
        self.bits_weight = bits_weight
        self.min_snr_gamma = min_snr_gamma
        self.times = UniformTimes(len(chain)) if times is None else times
        if self.times.steps != len(chain):
            raise ValueError(
                f"times draws from {self.times.steps} steps, but the chain has {len(chain)}: name {len(chain)}."
            )
        self.time_scale = 1000 / len(chain) if rescale_timesteps else 1.0

    @property
    def spacing(self) -> Spacing:
        """Equidistant steps of the chain."""
        return self.chain

    def losses(
        self, network: nn.Module, images: Tensor, condition: Tensor | None, uniform: Tensor, noise: Tensor
    ) -> Losses:
        """Give L_simple or L_hybrid of a random step (see `variational`)."""
        t, weight = self.times.draw(uniform)
        x_t = noised(self.chain, images, t, noise)
        output = network(x_t, t.float() * self.time_scale, condition)
        if self.learn_variance:
            loss = hybrid_loss(self.chain, output, images, x_t, noise, t, self.parameterization, self.bits_weight)
        else:
            loss = simple_loss(self.chain, output, images, x_t, noise, t, self.parameterization.predict)
        if self.min_snr_gamma is not None:
            snr = self.chain.snr.to(t.device)[t]
            loss = loss * min_snr_weight(snr, self.min_snr_gamma, self.parameterization.predict).float()
        return Losses(loss, t, weight)

    def observe(self, step: Tensor, loss: Tensor) -> None:
        """Tell the drawing of the steps which losses they had."""
        self.times.update(step, loss)

    def denoiser(self, network: nn.Module, condition: Tensor | None) -> Denoise:
        """Denoise at any level: the network is asked for the step of the same ratio of noise to image."""

        def denoise(x: Tensor, level: Level) -> Denoised:
            t = self.chain.timestep_of(level)
            # The network knows variance-preserving images, no noisier than the last step.
            sigma, alpha = (v / math.hypot(*level) for v in (level.sigma, max(level.alpha, self._least_alpha(level))))
            scaled = x / math.hypot(*level)
            output = network(scaled, torch.full((len(x),), t * self.time_scale, device=x.device), condition)
            prediction, share = output.to(x.dtype), None
            if self.learn_variance:
                prediction, head = prediction.chunk(2, dim=1)
                share = (head + 1) / 2
            match self.parameterization.predict:
                case "eps":
                    prediction = (scaled - sigma * prediction) / alpha
                case "v":
                    prediction = alpha * scaled - sigma * prediction
            return Denoised(prediction, share)

        return denoise

    def _least_alpha(self, level: Level) -> float:
        return level.sigma * float(self.chain.alpha[-1] / self.chain.sigma[-1])


class EDMObjective(Objective):
    """EDM: preconditioned denoiser, noise of log-normal standard deviation (table 1, column "Ours").

    Args:
        sigma_data: standard deviation of the images.
        p_mean: mean of ln sigma in training.
        p_std: standard deviation of ln sigma in training.
        sampling: levels that a sampler visits.
    """

    def __init__(
        self, sigma_data: float = 0.5, p_mean: float = -1.2, p_std: float = 1.2, sampling: Karras | None = None
    ) -> None:
        super().__init__()
        self.sigma_data, self.p_mean, self.p_std = sigma_data, p_mean, p_std
        self.sampling = Karras() if sampling is None else sampling

    @property
    def spacing(self) -> Spacing:
        """Steps even in sigma^(1/7) (equation 5)."""
        return self.sampling

    def losses(
        self, network: nn.Module, images: Tensor, condition: Tensor | None, uniform: Tensor, noise: Tensor
    ) -> Losses:
        """Give the squared error of the denoised images, weighted to be even at first (equations 2 and 8)."""
        normal = torch.special.ndtri(uniform.double() + 2.0**-25)  # strictly between 0 and 1
        sigma = (self.p_mean + self.p_std * normal).exp()
        noisy = images + per_sample(sigma.float(), images) * noise
        denoised = self._denoise(network, noisy, torch.ones_like(sigma), sigma, condition)
        return Losses((denoised - images).square().flatten(1).mean(dim=1) * self.weight(sigma).float())

    def denoiser(self, network: nn.Module, condition: Tensor | None) -> Denoise:
        """Denoise at any level, scaled to alpha = 1."""

        def denoise(x: Tensor, level: Level) -> Denoised:
            alpha, sigma = (torch.full((len(x),), v, dtype=torch.float64, device=x.device) for v in level)
            return Denoised(self._denoise(network, x, alpha, sigma, condition))

        return denoise

    def _denoise(self, network: nn.Module, x: Tensor, alpha: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        """Equation 7 at levels (N,)."""
        c_skip, c_out, c_in = (per_sample(c, x).to(x.dtype) for c in self.scaling(alpha, sigma))
        c_noise = (sigma / torch.maximum(alpha, sigma / LARGEST_RATIO)).log() / 4
        denoised: Tensor = c_skip * x + c_out * network(c_in * x, c_noise.float(), condition).to(x.dtype)
        return denoised

    def scaling(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give c_skip, c_out and c_in of table 1 at levels (N,), multiplied out so that nothing is divided by alpha."""
        total = (sigma**2 + (alpha * self.sigma_data) ** 2).sqrt()
        return alpha * self.sigma_data**2 / total**2, sigma * self.sigma_data / total, 1 / total

    def weight(self, sigma: Tensor) -> Tensor:
        """Give lambda(sigma) of table 1, by which all levels begin with the same loss."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class FlowObjective(Objective):
    """Rectified flow: the network predicts noise - image on the straight line between them.

    Args:
        logit_normal: times are more often in the middle than at the ends (Esser et al. 2024, section 3.1).
        time_scale: the network is told the time in [0, 1] times this, as its time embedding was made for steps.
    """

    def __init__(self, logit_normal: bool = True, time_scale: float = 1000.0) -> None:
        super().__init__()
        self.logit_normal, self.time_scale = logit_normal, time_scale

    @property
    def spacing(self) -> Spacing:
        """Even steps of time."""
        return Straight()

    def losses(
        self, network: nn.Module, images: Tensor, condition: Tensor | None, uniform: Tensor, noise: Tensor
    ) -> Losses:
        """Give the squared error of the velocity (Liu et al. 2023, equation 1)."""
        time = uniform
        if self.logit_normal:
            time = torch.special.ndtri(uniform.double() + 2.0**-25).sigmoid().float()
        mixed = images.lerp(noise, per_sample(time, images))
        velocity = network(mixed, time * self.time_scale, condition)
        return Losses((velocity - (noise - images)).square().flatten(1).mean(dim=1))

    def denoiser(self, network: nn.Module, condition: Tensor | None) -> Denoise:
        """Denoise at any level, scaled to alpha + sigma = 1."""

        def denoise(x: Tensor, level: Level) -> Denoised:
            scale = level.alpha + level.sigma
            time = level.sigma / scale
            mixed = x / scale
            velocity = network(mixed, torch.full((len(x),), time * self.time_scale, device=x.device), condition)
            return Denoised(mixed - time * velocity.to(x.dtype))

        return denoise
