"""Layers that the style-based networks share: equalized dense and convolution layers and the mapping network.

Weights are stored with unit variance and multiplied at run time by gain / sqrt(fan-in) (equalized learning rate, Karras
et al. 2018, ICLR, arXiv 1710.10196, section 4.1). Mapping network and truncation: Karras et al. 2019 (StyleGAN, CVPR,
arXiv 1812.04948), section 2 and appendix B. Parameters and buffers have the names of the published checkpoints.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.operators import conv2d_resample, setup_filter

SLOPE = 0.2  # of the leaky ReLUs
SQRT2 = math.sqrt(2)  # their gain, which keeps the second moment
SQRT_HALF = math.sqrt(0.5)


def leaky_relu(x: Tensor, clamp: float | None) -> Tensor:
    """Leaky ReLU in place. A positive gain commutes with it and was already put into the weights."""
    x = F.leaky_relu(x, SLOPE, inplace=True)
    return x if clamp is None else x.clamp(-clamp, clamp)


def fast_layout(x: Tensor) -> Tensor:
    """Channels last on the CPU, where it is two to three times faster; elsewhere as it comes."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class Resampling(nn.Module):
    """A layer with the FIR filter that published checkpoints store in each (also in those that do not resample)."""

    resample_filter: Tensor

    def __init__(self, resample_filter: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("resample_filter", setup_filter(resample_filter))


class FullyConnectedLayer(nn.Module):
    """Equalized dense layer: activation(x W^T · lr_multiplier / sqrt(in) + b · lr_multiplier).

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        activation: 'linear', or 'lrelu' with gain sqrt 2.
        lr_multiplier: Of the learning rate; the stored weights are larger by its inverse.
        bias_init: Effective start value of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Literal["linear", "lrelu"] = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        gain = SQRT2 if activation == "lrelu" else 1.0
        self.weight_gain = gain * lr_multiplier / math.sqrt(in_features)
        self.bias_gain = gain * lr_multiplier
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), float32 under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            x = F.linear(x.float(), self.weight * self.weight_gain, self.bias * self.bias_gain)
        return leaky_relu(x, None) if self.activation == "lrelu" else x


class MappingNetwork(nn.Module):
    """z -> w (StyleGAN, section 2), one copy of w per layer of the synthesis network, and truncation (appendix B).

    Args:
        z_dim: Width of z.
        w_dim: Width of w and of every layer.
        num_ws: Copies of w.
        num_layers: Dense layers.
        lr_multiplier: Of all layers.
    """

    w_avg: Tensor

    def __init__(self, z_dim: int, w_dim: int, num_ws: int, num_layers: int = 8, lr_multiplier: float = 0.01) -> None:
        super().__init__()
        self.z_dim, self.w_dim, self.num_ws, self.num_layers = z_dim, w_dim, num_ws, num_layers
        for i in range(num_layers):  # a class label's embedding would widen the input of the first
            width = z_dim if i == 0 else w_dim
            self.add_module(f"fc{i}", FullyConnectedLayer(width, w_dim, "lrelu", lr_multiplier))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor, truncation_psi: float = 1.0, truncation_cutoff: int | None = None) -> Tensor:
        """Map latents.

        Args:
            z: (N, z_dim), unit normal.
            truncation_psi: w' = w_avg + psi (w - w_avg).
            truncation_cutoff: Number of leading layers that are truncated; None is all.

        Returns:
            ws (N, num_ws, w_dim), float32 under autocast too.
        """
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z must be (N, {self.z_dim}); got {tuple(z.shape)}.")
        w = z.float()
        w = w * (w.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for i in range(self.num_layers):
            w = self.get_submodule(f"fc{i}")(w)
        ws = w[:, None].expand(-1, self.num_ws, -1)  # (N, num_ws, w_dim)
        if truncation_psi != 1:
            cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
            ws = torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], 1)
        return ws

    @torch.no_grad()
    def update_w_avg(self, w_mean: Tensor, decay: float = 0.998) -> None:
        """Moving mean of w: w_avg <- decay · w_avg + (1 - decay) · w_mean; w_mean (w_dim,), from all processes."""
        self.w_avg.copy_(w_mean.lerp(self.w_avg, decay))


class ConvLayer(Resampling):
    """Equalized convolution of the discriminator, with FIR downsampling, bias and leaky ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: 1 or 3.
        bias: Have a bias.
        activation: 'linear', or 'lrelu' with gain sqrt 2.
        down: 1 or 2.
        gain: Multiplies the output, and the limit too.
        conv_clamp: Limit of the output.
        resample_filter: FIR taps.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: Literal["linear", "lrelu"] = "lrelu",
        down: int = 1,
        gain: float = 1.0,
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
    ) -> None:
        super().__init__(resample_filter)
        self.activation, self.down, self.padding = activation, down, kernel_size // 2
        self.bias_gain = gain * (SQRT2 if activation == "lrelu" else 1.0)
        self.weight_gain = self.bias_gain / math.sqrt(in_channels * kernel_size**2)
        self.clamp = None if conv_clamp is None else conv_clamp * gain
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H / down, W / down)."""
        weight = self.weight * self.weight_gain
        bias = None if self.bias is None else self.bias * self.bias_gain
        x = conv2d_resample(x, weight, self.resample_filter, down=self.down, padding=self.padding, bias=bias)
        if self.activation == "lrelu":
            return leaky_relu(x, self.clamp)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)
