"""The yardstick of gan_training.py: the operators of StyleGAN 2 and 3 as their papers define them, step by step.

Resampling inserts zeros, pads, filters every pixel and throws away what is not kept; StyleGAN 3 convolves each sample
with weights of its own; images are in PyTorch's default memory format. This is what the reference operators of the
originals do on a machine without their CUDA kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.networks import layers, operators, stylegan2, stylegan2_discriminator, stylegan3


def _both(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """As `operators.upfirdn2d`."""
    n, channels, height, width = x.shape
    (ux, uy), (dx, dy) = _both(up), _both(down)
    margins = [padding] * 4 if isinstance(padding, int) else list(padding)
    margins = margins if len(margins) == 4 else [margins[0], margins[0], margins[1], margins[1]]
    x = F.pad(x[:, :, :, None, :, None], [0, ux - 1, 0, 0, 0, uy - 1])
    x = F.pad(x.reshape(n, channels, height * uy, width * ux), margins)
    f = x.new_ones(1) if f is None else f.to(x.dtype)
    f = f * gain ** (f.ndim / 2)
    f = f if flip_filter else f.flip(list(range(f.ndim)))
    for kernel in [f] if f.ndim == 2 else [f[None, :], f[:, None]]:
        x = F.conv2d(x, kernel.expand(channels, 1, -1, -1), groups=channels)
    return x[:, :, ::dy, ::dx]


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """As `filtered_lrelu.filtered_lrelu`."""
    x = x if b is None else x + b.to(x.dtype)[:, None, None]
    x = upfirdn2d(x, fu, up, 1, padding, flip_filter, up**2)
    x = F.leaky_relu(x, slope) * gain
    x = x if clamp is None else x.clamp(-clamp, clamp)
    return upfirdn2d(x, fd, 1, down, 0, flip_filter)


def stylegan3_layer(
    self: stylegan3.SynthesisLayer,
    parts: Sequence[Tensor],
    w: Tensor,
    update_emas: stylegan3.MeanOverProcesses | None = None,
) -> list[Tensor]:
    """As `stylegan3.SynthesisLayer.forward`: a grouped convolution with modulated weights, one group per sample."""
    (x,) = parts
    if update_emas is not None:
        with torch.no_grad():
            magnitude = update_emas(x.float().square().mean())
            self.magnitude_ema.copy_(magnitude.lerp(self.magnitude_ema, self.magnitude_ema_beta))
    n, channels = x.shape[:2]
    weight, styles = self.weight, self.affine(w)
    if self.is_torgb:
        weights = weight * (styles / math.sqrt(weight[0].numel()))[:, None, :, None, None]  # (N, C_out, C_in, k, k)
    else:
        weight = weight * weight.square().mean((1, 2, 3), keepdim=True).rsqrt()
        styles = styles * styles.square().mean().rsqrt()
        weights = weight * styles[:, None, :, None, None]
        weights = weights * (weights.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    weights = (weights * self.magnitude_ema.rsqrt()).to(self.dtype)
    grouped = x.to(self.dtype).reshape(1, n * channels, *x.shape[2:])
    y = F.conv2d(grouped, weights.flatten(0, 1), padding=weight.shape[2] - 1, groups=n)
    y = filtered_lrelu(
        y.reshape(n, -1, *y.shape[2:]),
        self.up_filter,
        self.down_filter,
        self.bias,
        self.up,
        self.down,
        [*self.padding, *self.padding],
        1 if self.is_torgb else math.sqrt(2),
        1 if self.is_torgb else 0.2,
        self.conv_clamp,
    )
    return [y]


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, 1, groups)


def _transposed_convolution(
    x: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> Tensor:
    return F.conv_transpose2d(x, weight, None, stride, padding, 0, groups)


def _default_layout(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format)


def install() -> None:
    """Replace the operators of the networks in this process."""
    operators.upfirdn2d = upfirdn2d
    operators.conv2d = _convolution
    operators.conv_transpose2d = _transposed_convolution
    stylegan3.SynthesisLayer.forward = stylegan3_layer
    for module in (layers, stylegan2, stylegan2_discriminator):
        module.fast_layout = _default_layout
