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

from lightning_modules.networks import triton_operators
from lightning_modules.networks.bias_act import bias_act
from lightning_modules.networks.operators import conv2d_resample, setup_filter

Architecture = Literal["orig", "skip", "resnet"]  # StyleGAN 2, figure 7
HalfDtype = Literal["float16", "bfloat16"]

SLOPE = 0.2  # of the leaky ReLUs
SQRT2 = math.sqrt(2)  # their gain, which keeps the second moment
SQRT_HALF = math.sqrt(0.5)


def leaky_relu(x: Tensor, clamp: float | None) -> Tensor:
    """Leaky ReLU, perhaps in place. A positive gain commutes with it and was already put into the weights."""
    if clamp is not None and triton_operators.available(x):  # one pass instead of two
        return bias_act(x, None, 1, "lrelu", SLOPE, 1.0, clamp)
    x = F.leaky_relu(x, SLOPE, inplace=True)
    return x if clamp is None else x.clamp(-clamp, clamp)


def powers_of_two(img_resolution: int) -> list[int]:
    """4, 8, ..., img_resolution."""
    exponent = int(math.log2(max(img_resolution, 1)))
    if img_resolution < 8 or 2**exponent != img_resolution:
        raise ValueError(f"img_resolution must be a power of two from 8; got {img_resolution}.")
    return [2**i for i in range(2, exponent + 1)]


def block_dtype(resolution: int, img_resolution: int, num_half_res: int, half_dtype: HalfDtype) -> torch.dtype:
    """Half precision in the `num_half_res` highest resolutions, but never at 4 px (ADA, arXiv 2006.06676)."""
    is_half = resolution > 4 and resolution << num_half_res > img_resolution
    dtype: torch.dtype = getattr(torch, half_dtype) if is_half else torch.float32
    return dtype


def fast_layout(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Channels last on the CPU, where it is two to three times faster, and in half precision, for the tensor cores."""
    last = x.device.type == "cpu" or dtype != torch.float32
    return x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


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
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), float32 under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            x = F.linear(x.float(), self.weight * self.weight_gain, self.bias * self.bias_gain)
        return leaky_relu(x, None) * SQRT2 if self.activation == "lrelu" else x


def unit_second_moment(x: Tensor) -> Tensor:
    """(N, C) scaled to a mean square of one per sample."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class MappingNetwork(nn.Module):
    """z, label -> w (StyleGAN, section 2), one copy of w per layer of the synthesis network; truncation (appendix B).

    The linear embedding of a class label is normalized as z is, and concatenated with it.

    Args:
        z_dim: Width of z; 0 for a network of labels only.
        w_dim: Width of w and of every layer.
        num_ws: Copies of w; None returns w as it is, without a mean to truncate to.
        num_layers: Dense layers.
        lr_multiplier: Of all layers but `embed`.
        c_dim: Number of classes; 0 for no labels.
    """

    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        lr_multiplier: float = 0.01,
        c_dim: int = 0,
    ) -> None:
        super().__init__()
        self.z_dim, self.w_dim, self.num_ws, self.num_layers, self.c_dim = z_dim, w_dim, num_ws, num_layers, c_dim
        if c_dim:
            self.embed = FullyConnectedLayer(c_dim, w_dim)
        for i in range(num_layers):
            width = w_dim if i else z_dim + (w_dim if c_dim else 0)
            self.add_module(f"fc{i}", FullyConnectedLayer(width, w_dim, "lrelu", lr_multiplier))
        if num_ws is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Tensor:
        """Map latents and labels.

        Args:
            z: (N, z_dim), unit normal; None if z_dim is 0.
            c: (N, c_dim), one-hot; None if c_dim is 0.
            truncation_psi: w' = w_avg + psi (w - w_avg).
            truncation_cutoff: Number of leading layers that are truncated; None is all.

        Returns:
            ws (N, num_ws, w_dim), or w (N, w_dim) without `num_ws`; float32 under autocast too.

        Raises:
            ValueError: If latents or labels do not have the width that the network was built for.
        """
        for name, x, width in (("z", z, self.z_dim), ("c", c, self.c_dim)):
            if (x is not None or width) and (x is None or x.ndim != 2 or x.shape[1] != width):
                got = "nothing" if x is None else tuple(x.shape)
                raise ValueError(f"{name} must be (N, {width}), as {name}_dim of the network says; got {got}.")
        inputs = [] if z is None else [unit_second_moment(z.float())]
        if self.c_dim:
            inputs.append(unit_second_moment(self.embed(c)))
        w = torch.cat(inputs, 1)
        for i in range(self.num_layers):
            w = self.get_submodule(f"fc{i}")(w)
        if self.num_ws is None:
            return w
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
    """Equalized convolution with FIR up- or downsampling, bias and leaky ReLU; computes in the dtype of its input.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: 1 or 3.
        bias: Have a bias.
        activation: 'linear', or 'lrelu' with gain sqrt 2.
        up: 1 or 2.
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
        up: int = 1,
        down: int = 1,
        gain: float = 1.0,
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
    ) -> None:
        super().__init__(resample_filter)
        self.activation, self.up, self.down, self.padding = activation, up, down, kernel_size // 2
        self.bias_gain = gain * (SQRT2 if activation == "lrelu" else 1.0)
        self.weight_gain = self.bias_gain / math.sqrt(in_channels * kernel_size**2)
        self.clamp = None if conv_clamp is None else conv_clamp * gain
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H·up / down, W·up / down)."""
        weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = None if self.bias is None else (self.bias * self.bias_gain).to(x.dtype)
        x = conv2d_resample(x, weight, self.resample_filter, self.up, self.down, self.padding, bias=bias)
        if self.activation == "lrelu":
            return leaky_relu(x, self.clamp)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)
