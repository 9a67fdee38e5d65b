"""The variational bound of a diffusion chain and the losses that follow from it.

Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models" (NeurIPS, arXiv 2006.11239); Nichol, Dhariwal 2021,
"Improved Denoising Diffusion Probabilistic Models" (ICML, arXiv 2102.09672) for learned variances and the hybrid loss;
Salimans, Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models" (ICLR, arXiv 2202.00512) for v; Hang
et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy" (ICCV, arXiv 2303.09556).

Everywhere x0 are images (N, C, H, W) in [-1, 1], x_t the same images after step t, t int64 (N,) with values 0 ... T-1
of the chain that is given, and noise is standard normal. Results have the type of the images; the tables are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_modules.diffusion_chain import DiffusionChain

HALF_BIN = 1 / 255  # the 256 grey levels of [-1, 1] are 2 / 255 apart
SMALLEST_PROBABILITY = 1e-12

Prediction = Literal["eps", "x0", "xprev", "v"]


class Parameterization(NamedTuple):
    """What the output of a network means.

    Attributes:
        predict: its first C channels are the noise "eps", the clean image "x0", the mean of the image before the step
            "xprev", or the velocity "v".
        variance: that of the reverse step. "fixed_large" (beta) and "fixed_small" (of the posterior given x0) are
            tables; else C more channels give it: "learned" is its logarithm, "learned_range" where it lies between the
            logarithms of the two tables, from -1 (small) to 1 (large).
    """

    predict: Prediction = "eps"
    variance: Literal["learned_range", "learned", "fixed_small", "fixed_large"] = "fixed_large"


class Gaussian(NamedTuple):
    """A normal distribution with independent pixels, (N, C, H, W) or broadcastable to it.

    At t = 0 the posterior has variance 0, but a finite log-variance: the clipped one.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class ReverseStep(NamedTuple):
    """The model's distribution of x_{t-1} given x_t, and its estimate of x0."""

    previous: Gaussian
    image: Tensor


def _at(table: Tensor, t: Tensor, images: Tensor) -> Tensor:
    """Values of a table at t, in the type of the images: (N, 1, 1, 1)."""
    return table.to(t.device)[t].to(images.dtype).reshape(-1, *[1] * (images.ndim - 1))


def noised(chain: DiffusionChain, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Give x_t of clean images (Ho et al. 2020, equation 4)."""
    return _at(chain.alpha, t, x0) * x0 + _at(chain.sigma, t, x0) * noise


def marginal(chain: DiffusionChain, x0: Tensor, t: Tensor) -> Gaussian:
    """Give q(x_t | x0) (Ho et al. 2020, equation 4)."""
    variance = 1 - chain.alphas_cumprod
    return Gaussian(_at(chain.alpha, t, x0) * x0, _at(variance, t, x0), _at(variance.log(), t, x0))


def posterior(chain: DiffusionChain, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
    """Give q(x_{t-1} | x_t, x0) (Ho et al. 2020, equations 6 and 7)."""
    mean = _at(chain.posterior_mean_image, t, x_t) * x0 + _at(chain.posterior_mean_x_t, t, x_t) * x_t
    log_variance = _at(chain.posterior_log_variance_clipped, t, x_t)
    return Gaussian(mean, _at(chain.posterior_variance, t, x_t), log_variance)


def velocity(chain: DiffusionChain, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Give v = alpha · noise - sigma · x0 (Salimans, Ho 2022, section 4)."""
    return _at(chain.alpha, t, x0) * noise - _at(chain.sigma, t, x0) * x0


def target(chain: DiffusionChain, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, predict: Prediction) -> Tensor:
    """Give what a network should predict, (N, C, H, W); x_t comes from x0, noise and t."""
    if predict == "eps":
        return noise
    if predict == "x0":
        return x0
    if predict == "v":
        return velocity(chain, x0, noise, t)
    return posterior(chain, x0, x_t, t).mean


def predicted_image(chain: DiffusionChain, prediction: Tensor, x_t: Tensor, t: Tensor, predict: Prediction) -> Tensor:
    """Give the estimate of x0, (N, C, H, W), that a prediction of that shape implies."""

    def combine(of_x_t: Tensor, of_prediction: Tensor) -> Tensor:
        return _at(of_x_t, t, x_t) * x_t - _at(of_prediction, t, x_t) * prediction

    if predict == "eps":
        return combine(1 / chain.alpha, chain.sigma / chain.alpha)
    if predict == "x0":
        return prediction
    if predict == "v":
        return combine(chain.alpha, chain.sigma)
    return -combine(chain.posterior_mean_x_t / chain.posterior_mean_image, 1 / chain.posterior_mean_image)


def reverse_step(
    chain: DiffusionChain, output: Tensor, x_t: Tensor, t: Tensor, parameterization: Parameterization, clip: bool
) -> ReverseStep:
    """Give p(x_{t-1} | x_t) of a model (Ho et al. 2020, section 3.2; Nichol, Dhariwal 2021, equation 15).

    Args:
        chain: the chain.
        output: of the network, (N, C, H, W), or (N, 2 C, H, W) with a learned variance.
        x_t: noisy images.
        t: their steps.
        parameterization: what the output means.
        clip: clamp the estimate of x0 to [-1, 1]; a predicted mean ("xprev") stays as it is.

    Raises:
        ValueError: if the output has not the channels that the parameterization needs.
    """
    prediction, variance_head = _heads(output, x_t, parameterization)
    image = predicted_image(chain, prediction, x_t, t, parameterization.predict)
    if clip:
        image = image.clamp(-1, 1)
    mean = prediction if parameterization.predict == "xprev" else posterior(chain, image, x_t, t).mean
    small, large = chain.posterior_log_variance_clipped, chain.betas.log()
    if parameterization.variance == "fixed_small":
        variance, log_variance = _at(chain.posterior_variance, t, x_t), _at(small, t, x_t)
    elif parameterization.variance == "fixed_large":
        table = chain.fixed_large_variance
        variance, log_variance = _at(table, t, x_t), _at(table.log(), t, x_t)
    else:
        log_variance = variance_head
        if parameterization.variance == "learned_range":
            share = (variance_head + 1) / 2
            log_variance = share * _at(large, t, x_t) + (1 - share) * _at(small, t, x_t)
        variance = log_variance.exp()
    return ReverseStep(Gaussian(mean, variance, log_variance), image)


def _heads(output: Tensor, x_t: Tensor, parameterization: Parameterization) -> tuple[Tensor, Tensor]:
    """Split an output into prediction and variance head, of which the latter may be empty."""
    channels = x_t.shape[1]
    expected = channels * 2 if parameterization.variance.startswith("learned") else channels
    if output.shape[1] != expected:
        raise ValueError(
            f"Expected {expected} channels of a network that predicts {parameterization.predict} of {channels} "
            f"channels with {parameterization.variance} variance, but got {output.shape[1]}: give the network that "
            "many output channels or change the variance."
        )
    output = output.to(x_t.dtype)
    return output[:, :channels], output[:, channels:]


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(dim=1)


def _bits(nats: Tensor) -> Tensor:
    """Mean over pixels and channels in bits: (N, C, H, W) -> (N,)."""
    return nats.flatten(1).mean(dim=1) / math.log(2)


def _kl(p: Gaussian, q: Gaussian) -> Tensor:
    """Kullback-Leibler divergence of every pixel in nats, from means and log-variances."""
    # Added up in the order of the original: the float32 rounding is larger than the smallest divergences.
    spread = -1 + q.log_variance - p.log_variance + (p.log_variance - q.log_variance).exp()
    return 0.5 * (spread + (p.mean - q.mean).square() * (-q.log_variance).exp())


def _log_likelihood_of_grey_levels(x0: Tensor, p: Gaussian) -> Tensor:
    """Logarithm of the probability of every pixel's grey level (Ho et al. 2020, equation 13).

    The lowest and the highest level have open tails. The normal distribution function is the tanh approximation of the
    original, within 0.0003 of the exact one.
    """

    def cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    inverse_deviation = (-0.5 * p.log_variance).exp()
    upper = cdf(inverse_deviation * (x0 - p.mean + HALF_BIN))
    lower = cdf(inverse_deviation * (x0 - p.mean - HALF_BIN))
    probability = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=SMALLEST_PROBABILITY).log()


def _step_bits(chain: DiffusionChain, step: ReverseStep, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    kl = _bits(_kl(posterior(chain, x0, x_t, t), step.previous))
    return torch.where(t == 0, -_bits(_log_likelihood_of_grey_levels(x0, step.previous)), kl)


def variational_bits(
    chain: DiffusionChain,
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    parameterization: Parameterization,
    clip: bool = False,
) -> Tensor:
    """Give the terms L_t of the variational bound (Ho et al. 2020, equation 5) in bits per dimension.

    Args:
        chain: the chain.
        output: of the network, see :func:`reverse_step`.
        x0: clean images.
        x_t: noisy images.
        t: their steps; 0 gives the negative log-likelihood of the grey levels, the others the divergence of the
            posterior from the model.
        parameterization: what the output means.
        clip: clamp the estimate of x0; training does not.

    Returns:
        (N,), non-negative.
    """
    return _step_bits(chain, reverse_step(chain, output, x_t, t, parameterization, clip), x0, x_t, t)


def prior_bits(chain: DiffusionChain, x0: Tensor) -> Tensor:
    """Give L_T, how far the end of the chain is from pure noise, in bits per dimension: (N,)."""
    end = marginal(chain, x0, torch.full((len(x0),), len(chain) - 1, device=x0.device))
    zero = torch.zeros_like(end.log_variance)
    return _bits(_kl(end, Gaussian(zero, zero + 1, zero)))


def simple_loss(
    chain: DiffusionChain, output: Tensor, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, predict: Prediction
) -> Tensor:
    """Give the mean squared error of the predictions (Ho et al. 2020, equation 14): (N,).

    The first C channels of the output are compared with :func:`target`.
    """
    prediction = output[:, : x0.shape[1]].to(x0.dtype)
    return _mean_square(prediction - target(chain, x0, x_t, noise, t, predict))


def hybrid_loss(
    chain: DiffusionChain,
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    parameterization: Parameterization,
    bits_weight: float,
) -> Tensor:
    """Give L_simple + bits_weight · L_t, where L_t trains the variance only (Nichol, Dhariwal 2021, equation 16).

    Args:
        chain: the chain.
        output: of the network, with a learned variance.
        x0: clean images.
        x_t: the noisy images that come from x0, noise and t.
        noise: their noise.
        t: their steps.
        parameterization: what the output means.
        bits_weight: 1 is what guided-diffusion does by default: T is not in it, so at T = 4000 the variance learns
            from a quarter of the paper's term. T / 1000 is the paper's (its 0.001 times the sum over the T terms).

    Returns:
        (N,).
    """
    simple = simple_loss(chain, output, x0, x_t, noise, t, parameterization.predict)
    prediction, variance_head = _heads(output, x_t, parameterization)
    frozen_mean = torch.cat([prediction.detach(), variance_head], dim=1)
    return simple + bits_weight * variational_bits(chain, frozen_mean, x0, x_t, t, parameterization)


def min_snr_weight(snr: Tensor, gamma: float, predict: Prediction) -> Tensor:
    """Give the weight of a squared error that is min(SNR, gamma) on the error of x0 (Hang et al. 2023, section 3.4).

    Args:
        snr: signal-to-noise ratios alpha² / sigma², any shape.
        gamma: largest weight of the error of x0; the paper's is 5.
        predict: what the error is of: "eps", "x0" or "v".

    Raises:
        ValueError: for "xprev", whose error has no such weight.
    """
    clamped = snr.clamp(max=gamma)
    # The error of x0 is that of eps over sqrt(SNR), and that of v over sqrt(SNR + 1).
    if predict == "eps":
        return clamped / snr
    if predict == "v":
        return clamped / (snr + 1)
    if predict == "x0":
        return clamped
    raise ValueError(f"Min-SNR weights exist for eps, x0 and v, but got {predict}: train without them or predict v.")


class ChainBits(NamedTuple):
    """The variational bound of images under a model, term by term.

    Attributes:
        steps: L_t in bits per dimension, (N, T), noisiest step first.
        prior: L_T in bits per dimension, (N,).
        image_error: mean squared error of the estimate of x0, (N, T).
        noise_error: mean squared error of the noise that this estimate implies, (N, T).
    """

    steps: Tensor
    prior: Tensor
    image_error: Tensor
    noise_error: Tensor

    @property
    def total(self) -> Tensor:
        """The bound on the negative log-likelihood in bits per dimension, (N,)."""
        return self.steps.sum(dim=1) + self.prior


def full_vlb(
    chain: DiffusionChain,
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    noise: Callable[[int], Tensor],
    parameterization: Parameterization,
    clip: bool = True,
) -> ChainBits:
    """Evaluate every term of the variational bound, one noise each (Ho et al. 2020, equation 5).

    Args:
        chain: the chain, usually respaced.
        network: gives the output for x_t and its steps of the long chain, int64 (N,).
        x0: clean images.
        noise: standard normal of the shape of x0 for the k-th evaluated step, k = 0 is the noisiest.
        parameterization: what the output means.
        clip: clamp the estimates of x0.
    """
    columns = []
    with torch.no_grad():
        for index in range(len(chain)):
            t = torch.full((len(x0),), len(chain) - 1 - index, device=x0.device)
            drawn = noise(index)
            x_t = noised(chain, x0, t, drawn)
            output = network(x_t, chain.timesteps.to(t.device)[t])
            step = reverse_step(chain, output, x_t, t, parameterization, clip)
            implied = (_at(1 / chain.alpha, t, x_t) * x_t - step.image) / _at(chain.sigma / chain.alpha, t, x_t)
            bits = _step_bits(chain, step, x0, x_t, t)
            columns.append((bits, _mean_square(step.image - x0), _mean_square(implied - drawn)))
    steps, image_error, noise_error = (torch.stack(values, dim=1) for values in zip(*columns, strict=True))
    return ChainBits(steps, prior_bits(chain, x0), image_error, noise_error)
