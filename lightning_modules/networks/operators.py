"""Operators of the StyleGAN family in plain PyTorch, differentiable twice.

Sources: Karras et al. 2019 (StyleGAN, CVPR, arXiv 1812.04948), Karras et al. 2020 (StyleGAN 2, CVPR, arXiv 1912.04958),
Karras et al. 2020 (ADA, NeurIPS, arXiv 2006.06676), Karras et al. 2021 (StyleGAN 3, NeurIPS, arXiv 2106.12423).

All work in either memory format; on the CPU `torch.channels_last` images are two to three times faster.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.networks import triton_operators
from lightning_modules.networks.convolutions import conv2d, conv_transpose2d


def setup_filter(
    taps: Sequence[float] | Sequence[Sequence[float]] | Tensor | None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1.0,
    separable: bool | None = None,
) -> Tensor:
    """Prepare a FIR filter for :func:`upfirdn2d`.

    Args:
        taps: Coefficients, 1-D or 2-D; None is the identity.
        normalize: Scale to sum 1 (unit gain at zero frequency).
        flip_filter: Reverse the taps.
        gain: Gain in two dimensions; a 1-D filter, which is applied twice, gets its square root.
        separable: Keep 1-D taps 1-D. Default: from 8 taps on; a shorter filter becomes an outer product, because one
            small 2-D pass is faster than two 1-D passes.

    Returns:
        Filter of one or two dimensions, float32.
    """
    f = torch.as_tensor(1.0 if taps is None else taps, dtype=torch.float32)
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(f"A filter has one or two dimensions and at least one tap; got shape {tuple(f.shape)}.")
    f = f.reshape(1) if f.ndim == 0 else f
    if f.ndim == 1 and not (f.numel() >= 8 if separable is None else separable):
        f = torch.outer(f, f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return f * float(gain ** (f.ndim / 2))


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    x, y = (value, value) if isinstance(value, int) else value
    return int(x), int(y)


def _margins(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Padding as (x before, x after, y before, y after)."""
    p = [padding] * 2 if isinstance(padding, int) else list(padding)
    if len(p) == 2:
        p = [p[0], p[0], p[1], p[1]]
    return p[0], p[1], p[2], p[3]


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Insert zeros (`up`), pad, filter, keep every `down`-th pixel.

    The zeros are never made: for up = 1 this is one strided depthwise convolution, otherwise one transposed one.

    Args:
        x: Images (N, C, H, W).
        f: From :func:`setup_filter`; 1-D filters run along both axes. None is the identity.
        up: Factor, or (x, y).
        down: Factor, or (x, y).
        padding: Pixels of the upsampled image: one number, (x, y) or (x before, x after, y before, y after); negative
            values crop.
        flip_filter: False is a true convolution, True a correlation.
        gain: Multiplies the result.

    Returns:
        (N, C, (H·up_y + pad_y - kh) // down_y + 1, and likewise W).
    """
    ux, uy = _pair(up)
    dx, dy = _pair(down)
    px0, px1, py0, py1 = _margins(padding)
    if f is None:
        f = x.new_ones((1, 1), dtype=torch.float32)
    if f.ndim == 1:  # separable: along x, then along y
        root = math.sqrt(gain)
        x = upfirdn2d(x, f[None, :], (ux, 1), (dx, 1), (px0, px1, 0, 0), flip_filter, root)
        return upfirdn2d(x, f[:, None], (1, uy), (1, dy), (0, 0, py0, py1), flip_filter, root)

    (height, width), (kh, kw) = x.shape[2:], f.shape
    if height * uy + py0 + py1 < kh or width * ux + px0 + px1 < kw:
        raise ValueError(f"An image of {height}×{width} with padding {padding} is smaller than the filter ({kh}×{kw}).")
    arguments = f, (ux, uy), (dx, dy), (px0, px1, py0, py1), flip_filter, gain
    return triton_operators.upfirdn2d(lambda x: _upfirdn2d(x, *arguments), x, *arguments)


def _upfirdn2d(
    x: Tensor,
    f: Tensor,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """The same for a 2-D filter, in PyTorch."""
    (ux, uy), (dx, dy), (px0, px1, py0, py1) = up, down, padding
    channels, height, width = x.shape[1:]
    kh, kw = f.shape
    full = height * uy + py0 + py1 - kh + 1, width * ux + px0 + px1 - kw + 1  # size before decimation
    is_up = ux > 1 or uy > 1
    if is_up == flip_filter:  # F.conv2d correlates, its adjoint convolves
        f = f.flip((0, 1))
    kernel = (f * gain).to(x.dtype).expand(channels, 1, kh, kw)

    if not is_up:
        if px0 == px1 >= 0 and py0 == py1 >= 0:
            return conv2d(x, kernel, None, (dy, dx), (py0, px0), channels)
        return conv2d(F.pad(x, [px0, px1, py0, py1]), kernel, None, (dy, dx), (0, 0), channels)

    # The transposed convolution has (n - 1)·up + k outputs; ours begin `skip` later and may end elsewhere.
    natural = (height - 1) * uy + kh, (width - 1) * ux + kw
    skip = kh - 1 - py0, kw - 1 - px0
    if all(s >= 0 and 0 <= t - (n - 2 * s) < u for s, t, n, u in zip(skip, full, natural, (uy, ux), strict=True)):
        y = conv_transpose2d(x, kernel, full, (uy, ux), skip, channels)
    else:
        y = conv_transpose2d(x, kernel, natural, (uy, ux), (0, 0), channels)
        y = F.pad(y, [-skip[1], full[1] + skip[1] - natural[1], -skip[0], full[0] + skip[0] - natural[0]])
    return y[:, :, ::dy, ::dx]


def _filter_size(f: Tensor | None) -> tuple[int, int]:
    """Width and height of a filter."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def filter2d(
    x: Tensor, f: Tensor, padding: int | Sequence[int] = 0, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """Filter images, keeping their size up to `padding` (x, y as in :func:`upfirdn2d`)."""
    px0, px1, py0, py1 = _margins(padding)
    fw, fh = _filter_size(f)
    margins = (px0 + fw // 2, px1 + (fw - 1) // 2, py0 + fh // 2, py1 + (fh - 1) // 2)
    return upfirdn2d(x, f, padding=margins, flip_filter=flip_filter, gain=gain)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsample images (N, C, H, W) to (N, C, H·up, W·up), keeping their mean value."""
    ux, uy = _pair(up)
    margins = _up_margins(f, ux, uy, padding)
    return upfirdn2d(x, f, up=(ux, uy), padding=margins, flip_filter=flip_filter, gain=gain * ux * uy)


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Low-pass and decimate images (N, C, H, W) to (N, C, H / down, W / down)."""
    dx, dy = _pair(down)
    margins = _down_margins(f, dx, dy, padding)
    return upfirdn2d(x, f, down=(dx, dy), padding=margins, flip_filter=flip_filter, gain=gain)


def _up_margins(f: Tensor | None, ux: int, uy: int, padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Padding that centres a filter on the upsampled grid: u - 1 of the kw - 1 lost pixels are trailing zeros."""
    px0, px1, py0, py1 = _margins(padding)
    fw, fh = _filter_size(f)
    return px0 + (fw + ux - 1) // 2, px1 + (fw - ux) // 2, py0 + (fh + uy - 1) // 2, py1 + (fh - uy) // 2


def _down_margins(f: Tensor | None, dx: int, dy: int, padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Padding that centres a filter on the cells of dx × dy pixels that it averages."""
    px0, px1, py0, py1 = _margins(padding)
    fw, fh = _filter_size(f)
    return px0 + (fw - dx + 1) // 2, px1 + (fw - dx) // 2, py0 + (fh - dy + 1) // 2, py1 + (fh - dy) // 2


def conv2d_resample(
    x: Tensor,
    weight: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Convolve, with FIR upsampling before or FIR downsampling after (StyleGAN 2, section 2 and figure 2).

    Both filters commute with the convolution, which therefore always runs at the lower resolution: upsampling is a
    strided transposed convolution and then the filter, downsampling the filter and then a strided convolution.

    Args:
        x: Images (N, C_in, H, W).
        weight: (C_out, C_in / groups, kh, kw).
        f: Resampling filter from :func:`setup_filter`; None is the identity.
        up: Integer factor.
        down: Integer factor.
        padding: As in :func:`upfirdn2d`, for the upsampled image; kh // 2 keeps its size.
        groups: Number of channel groups.
        flip_weight: True is a correlation (as `torch.nn.functional.conv2d`), False a true convolution.
        flip_filter: As in :func:`upfirdn2d`.
        bias: (C_out,), added to the result.

    Returns:
        (N, C_out, H·up / down, W·up / down) for a padding of kh // 2.
    """
    kh, kw = weight.shape[2:]
    margins = _margins(padding)
    if up > 1:
        margins = _up_margins(f, up, up, margins)
    if down > 1:
        margins = _down_margins(f, down, down, margins)
    px0, px1, py0, py1 = margins

    if up > 1:
        kernel = weight.flip((2, 3)) if flip_weight else weight  # conv_transpose2d is a true convolution
        kernel = kernel.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)  # (C_in, C_out/g, kh, kw)
        size = (x.shape[2] - 1) * up + kh, (x.shape[3] - 1) * up + kw
        x = conv_transpose2d(x, kernel, size, (up, up), (0, 0), groups)
        # The transposed convolution has padded by k - 1 before and, less the trailing zeros, k - up after.
        margins = px0 - (kw - 1), px1 - (kw - up), py0 - (kh - 1), py1 - (kh - up)
        x = upfirdn2d(x, f, padding=margins, flip_filter=flip_filter, gain=up**2)
        x = upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x
        return x if bias is None else x + bias.to(x.dtype)[:, None, None]

    weight = weight if flip_weight else weight.flip((2, 3))
    if down > 1 and kh == kw == 1:
        x = upfirdn2d(x, f, down=down, padding=margins, flip_filter=flip_filter)
        return conv2d(x, weight, bias, groups=groups)
    if down > 1:
        x = upfirdn2d(x, f, padding=margins, flip_filter=flip_filter)
        return conv2d(x, weight, bias, (down, down), (0, 0), groups)
    if px0 == px1 >= 0 and py0 == py1 >= 0:
        return conv2d(x, weight, bias, padding=(py0, px0), groups=groups)
    return conv2d(F.pad(x, margins), weight, bias, groups=groups)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    gain: float = 1.0,
    demodulate: bool = True,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    f: Tensor | None = None,
    flip_weight: bool = True,
    normalize: bool = False,
    input_gain: Tensor | float | None = None,
) -> Tensor:
    """Convolve with weights that are scaled per sample (StyleGAN 2, equations 1 and 3).

    Equation 1 scales the weights by the styles; here the input is scaled instead and the output demodulated, which is
    the same and lets the whole batch share one convolution.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, kh, kw).
        styles: (N, C_in), s_i of equation 1.
        noise: Broadcastable to the output, added after demodulation.
        bias: (C_out,), added after demodulation.
        gain: Multiplies everything, noise and bias too.
        demodulate: Divide by the expected standard deviation of the output.
        up: Factor of upsampling.
        down: Factor of downsampling.
        padding: For the upsampled image.
        f: Resampling filter.
        flip_weight: As in :func:`conv2d_resample`.
        normalize: StyleGAN 3 only: first give the weights of each output channel, and the styles of the whole batch,
            unit mean square. Demodulation undoes both scales, so only rounding and the epsilon notice.
        input_gain: StyleGAN 3 only: scalar, (C_in,) or (N, C_in); scales the input but not the demodulation.

    Returns:
        gain · (demodulated convolution + noise + bias).
    """
    if normalize and demodulate:
        weight = weight * weight.square().mean((1, 2, 3), keepdim=True).rsqrt()
        styles = styles * styles.square().mean().rsqrt()
    elif demodulate and x.dtype == torch.float16:  # the same trick keeps sums of clamped features below its 65504
        weight = weight / (weight.abs().amax((1, 2, 3), keepdim=True) * math.sqrt(weight[0].numel()))
        styles = styles / styles.abs().amax(1, keepdim=True)
    scale = styles if input_gain is None else styles * input_gain
    x = x * scale.to(x.dtype)[:, :, None, None]
    y = conv2d_resample(x, weight.to(x.dtype), f, up, down, padding, flip_weight=flip_weight)

    offset = None if bias is None else (bias * gain).to(y.dtype)[None, :, None, None]
    if demodulate:
        d = (demodulation(weight, styles) * gain).to(y.dtype)[:, :, None, None]  # (N, C_out, 1, 1)
        y = y * d if offset is None else torch.addcmul(offset, y, d)
    else:
        y = y if gain == 1 else y * gain
        y = y if offset is None else y + offset
    return y if noise is None else y + (noise * gain).to(y.dtype)


def demodulation(weight: Tensor, styles: Tensor) -> Tensor:
    """1 / sqrt(sum_{i,k} (s_i w_{jik})² + 1e-8), (N, C_out) in float32 (StyleGAN 2, equation 3)."""
    with torch.autocast(styles.device.type, enabled=False):
        energy = weight.float().square().sum((2, 3))  # (C_out, C_in)
        return (styles.float().square() @ energy.t() + 1e-8).rsqrt()


def minibatch_stddev(x: Tensor, group_size: int | None = 4, num_channels: int = 1) -> Tensor:
    """Append the standard deviation over groups of samples (Karras et al. 2018, arXiv 1710.10196, section 3).

    Sample n belongs to group n mod (N / G), so neighbours in the batch are in different groups.

    Args:
        x: (N, C, H, W).
        group_size: G; None, or more than N, is the whole batch.
        num_channels: F; the channels are split into F blocks and each block gives one channel.

    Returns:
        (N, C + F, H, W); the statistic is computed in float32.

    Raises:
        ValueError: If N is not divisible by G or C by F.
    """
    n, c, h, w = x.shape
    g = n if group_size is None else min(group_size, n)
    if n % g or c % num_channels:
        raise ValueError(
            f"Minibatch standard deviation splits {n} samples into groups of {g} and {c} channels into {num_channels} "
            "blocks, without remainder. Choose a batch size that mbstd_group_size divides."
        )
    y = x.float().reshape(g, n // g, c, h, w)  # (G, N/G, C, H, W)
    y = (y.var(0, correction=0) + 1e-8).sqrt()  # (N/G, C, H, W)
    y = y.mean((2, 3)).reshape(n // g, num_channels, -1).mean(2)  # (N/G, F)
    y = y.repeat(g, 1)[:, :, None, None].expand(-1, -1, h, w)  # (N, F, H, W)
    return torch.cat([x, y.to(x.dtype)], 1)
