"""The image transformations of adaptive discriminator augmentation: deterministic functions, differentiable twice.

Karras, Aittala, Hellsten, Laine, Lehtinen, Aila 2020, "Training Generative Adversarial Networks with Limited Data"
(NeurIPS, arXiv 2006.06676), appendix B. A transformation changes its sample alone: no number depends on the others in
the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lightning_modules.networks.convolutions import conv2d
from lightning_modules.networks.operators import upfirdn2d, upsample2d

# Low-pass filters of Daubechies' least asymmetric wavelets (1992, "Ten Lectures on Wavelets", section 8.1.1).
SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
GEOMETRIC = ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac")
COLOUR = ("brightness", "contrast", "lumaflip", "hue", "saturation")
BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)  # expected share of the bands in a 1/f spectrum

Parameters = Mapping[str, Tensor]
"""Parameters of the enabled transformations by name, a row per sample; `AdaptiveAugmentation.draw` describes them."""


def filter_bank() -> Tensor:
    """Four band-pass filters that sum to the identity (appendix B, "image-space filtering"): float32 (4, 43).

    With L(z) = H(z) H(1/z) / 2 of the sym2 wavelet and its mirror L(-z), band k is L(-z^s) with s = 2^(3 - k) times
    L of all smaller powers of two; the lowest band ends with L instead.
    """
    h = torch.tensor(SYM2, dtype=torch.float64)
    low = _convolve(h, h.flip(0)) / 2  # L(z), 7 taps
    high = low * torch.tensor([-1.0, 1.0]).repeat(4)[:7]  # L(-z): odd powers of z change their sign
    bands, passed = [], torch.ones(1, dtype=torch.float64)
    for spacing in (1, 2, 4):
        bands.append(_convolve(_stretch(high, spacing), passed))
        passed = _convolve(_stretch(low, spacing), passed)
    bands.append(passed)
    width = len(passed)
    return torch.stack([F.pad(b, [(width - len(b)) // 2] * 2) for b in reversed(bands)]).float()


def _convolve(a: Tensor, b: Tensor) -> Tensor:
    """Product of two polynomials."""
    return F.conv1d(a[None, None], b.flip(0)[None, None], padding=len(b) - 1)[0, 0]


def _stretch(taps: Tensor, spacing: int) -> Tensor:
    """Turn F(z) into F(z^spacing)."""
    stretched = taps.new_zeros((len(taps) - 1) * spacing + 1)
    stretched[::spacing] = taps
    return stretched


class _Resample(Function):
    """Bilinear interpolation at fixed points, linear in the images; PyTorch before 2.12 differentiates it only once."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return F.grid_sample(images, grid, align_corners=False)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (grid,) = ctx.saved_tensors
        return _ResampleAdjoint.apply(g, grid, ctx.shape), None  # type: ignore[no-untyped-call]


class _ResampleAdjoint(Function):
    """The transpose of :class:`_Resample`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, grid: Tensor, shape: Sequence[int]) -> Tensor:
        ctx.save_for_backward(grid)
        images = g.new_empty(list(shape))  # only its shape is read
        mask = [True, False]
        return cast(Tensor, torch.ops.aten.grid_sampler_2d_backward(g, images, grid, 0, 0, False, mask)[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (grid,) = ctx.saved_tensors
        return _Resample.apply(g, grid), None, None  # type: ignore[no-untyped-call]


def inverse_affine(parameters: Parameters, size: Sequence[int], xflip_axis: Literal[-2, -1] = -1) -> Tensor:
    """Compose the geometric transformations: a map from points of the result to points of the image.

    Args:
        parameters: the geometric ones are read; a missing one is the identity.
        size: (H, W) in pixels.
        xflip_axis: the axis that `xflip` mirrors.

    Returns:
        float64 (N, 2, 3), [A | t] with x_image = A x_result + t for points (x, y) in pixels from the centre. In double
        precision, which TensorFloat-32 leaves alone.
    """
    given = next(value for name, value in parameters.items() if name in GEOMETRIC)

    def value(name: str, width: int) -> Tensor:
        return parameters.get(name, given.new_zeros(len(given), width))

    def pixels(name: str) -> Tensor:
        x, y = value(name, 2).unbind(1)
        return torch.stack([x * size[1], y * size[0]], 1)

    step, shift = pixels("xint").round().double(), pixels("xfrac").double()
    flip = (1 - 2 * value("xflip", 1)).double()
    mirror = torch.cat([flip, torch.ones_like(flip)] if xflip_axis == -1 else [torch.ones_like(flip), flip], 1)
    stretch = torch.exp2(torch.cat([-value("aniso", 1), value("aniso", 1)], 1) - value("scale", 1)).double()
    before, after = value("rotate", 2).double().unbind(1)

    blit = torch.diag_embed(mirror) @ _rotation(value("rotate90", 1)[:, 0].double() * (math.pi / 2))
    linear = blit @ _rotation(before) @ torch.diag_embed(stretch) @ _rotation(after)  # (N, 2, 2)
    offset = -blit @ step[..., None] - linear @ shift[..., None]  # (N, 2, 1)
    return torch.cat([linear, offset], 2)


def _rotation(angle: Tensor) -> Tensor:
    """(N,) in radians to (N, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).reshape(-1, 2, 2)


def warp(images: Tensor, inverse: Tensor, taps: Tensor) -> Tensor:
    """Resample images under affine maps: reflect, upsample by 2, interpolate, downsample (appendix B).

    The margins are those that the sample itself needs, so that it comes out the same in every batch; samples whose map
    is the identity are not touched.

    Args:
        images: (N, C, H, W).
        inverse: float64 (N, 2, 3) of :func:`inverse_affine`.
        taps: orthogonal low-pass filter, 1-D.

    Returns:
        (N, C, H, W).
    """
    inverse = inverse.cpu()  # margins are shapes: the one wait for the device
    moved = (inverse != torch.eye(2, 3)).flatten(1).any(1).nonzero()[:, 0].tolist()
    if not moved:
        return images
    height, width = images.shape[2:]
    size = inverse.new_tensor([width, height])
    linear, offset = inverse[moved, :, :2], inverse[moved, :, 2]
    reach = len(taps) // 4  # half the support of the filter in pixels of the image
    extent = linear.abs() @ (size - 1) / 2 - (size - 1) / 2 + 2 * reach  # (N, 2)
    margins = torch.stack([extent - offset, extent + offset], 1)  # (N, 2, 2): left, top; right, bottom
    margins = margins.clamp(min=0).minimum(size - 1).ceil()
    canvas = size + margins.sum(1)
    # The canvas is upsampled by 2: its even pixels lie on those of the image, a quarter pixel before its own raster.
    centre = offset + (margins[:, 0] - margins[:, 1]) / 2 - 0.25

    # Points that the downsampling filter reads, in pixels from the centre; in the grid, half the canvas is 1.
    x, y = (torch.arange(2 * n + 4 * reach - 2).sub(n + 2 * reach - 2).to(taps) / 2 for n in (width, height))
    a = (linear * 2 / canvas[..., None])[:, None, None].to(x)  # (N, 1, 1, 2, 2)
    b = (centre * 2 / canvas)[:, None, None].to(x)
    grid = a[..., 0] * x[:, None] + a[..., 1] * y[:, None, None] + b  # (N, 2 H + 10, 2 W + 10, 2)

    rows = list(torch.split(images, 1))
    warped = []
    for n, points, ((left, top), (right, bottom)) in zip(moved, grid, margins.long().tolist(), strict=True):
        upsampled = upsample2d(F.pad(rows[n], [left, right, top, bottom], mode="reflect"), taps)
        warped.append(_Resample.apply(upsampled, points[None].to(upsampled.dtype)))  # type: ignore[no-untyped-call]
    small = upfirdn2d(torch.cat(warped), taps, down=2, flip_filter=True)
    for n, row in zip(moved, torch.split(small, 1), strict=True):
        rows[n] = row
    return torch.cat(rows)


def change_colours(images: Tensor, groups: Sequence[int], parameters: Parameters) -> Tensor:
    """Brightness, contrast, luma flip, hue and saturation, in this order, of groups of channels.

    With v = (1, 1, 1) / √3, the grey axis of three colours, the transformations after brightness b multiply by

        c [(1 - 2i) v vᵀ + s (cos θ (I - v vᵀ) + sin θ [v]×)]

    for contrast c, luma flip i, hue θ and saturation s. A single channel is all grey.

    Args:
        images: (N, M, H, W).
        groups: sizes of the groups of neighbouring channels, 1 or 3; their sum is M.
        parameters: those of colour are read, (N, number of groups) each.

    Returns:
        (N, M, H, W).
    """
    zero = images.new_zeros(len(images), len(groups))
    brightness, flip, hue = (parameters.get(name, zero) for name in ("brightness", "lumaflip", "hue"))
    contrast, saturation = (torch.exp2(parameters.get(name, zero)) for name in ("contrast", "saturation"))
    coefficients = [brightness, contrast * (1 - 2 * flip), contrast * saturation * hue.cos()]
    coefficients.append(contrast * saturation * hue.sin() / math.sqrt(3))
    changed = []
    for k, part in enumerate(torch.split(images, list(groups), 1)):
        offset, grey, parallel, across = (value[:, k, None, None, None] for value in coefficients)
        x = part + offset
        if groups[k] == 1:
            changed.append(x * grey)
        else:
            luma = x.mean(1, keepdim=True)
            changed.append(luma * grey + (x - luma) * parallel + (x.roll(1, 1) - x.roll(-1, 1)) * across)
    return torch.cat(changed, 1)


def amplify_bands(images: Tensor, amplification: Tensor, bank: Tensor) -> Tensor:
    """Amplify frequency bands, keeping the power that is expected of a natural image (appendix B).

    Args:
        images: (N, M, H, W), at least 2 × 2 pixels; reflected as often as the filter needs.
        amplification: log2 of the amplification, (N, M, bands).
        bank: (bands, odd number of taps) of :func:`filter_bank`.

    Returns:
        (N, M, H, W).
    """
    n, m, height, width = images.shape
    t = torch.exp2(amplification)
    power = t.new_tensor(BAND_POWER)
    gain = t * (1 + power * (t.square() - 1)).prod(-1, keepdim=True).rsqrt()  # each band is normalized, then multiplied
    kernel = (gain[..., None] * bank).sum(-2).reshape(n * m, 1, 1, -1).to(images.dtype)  # (N M, 1, 1, taps)
    x = _reflect(images, bank.shape[1] // 2).reshape(1, n * m, -1, width + bank.shape[1] - 1)
    x = conv2d(conv2d(x, kernel, groups=n * m), kernel.transpose(2, 3), groups=n * m)
    return x.reshape(n, m, height, width)


def _reflect(images: Tensor, margin: int) -> Tensor:
    """Reflect at all four edges, again and again if the image is smaller than the margin."""
    x = y = margin
    while x > 0 or y > 0:
        dx, dy = min(x, images.shape[3] - 1), min(y, images.shape[2] - 1)
        images = F.pad(images, [dx, dx, dy, dy], mode="reflect")
        x, y = x - dx, y - dy
    return images


def cut_out(images: Tensor, rectangle: Tensor) -> Tensor:
    """Set a rectangle to 0 in all channels.

    Args:
        images: (N, C, H, W).
        rectangle: (N, 3): side, x and y of the centre, relative to the image; a side of 0 cuts nothing.

    Returns:
        (N, C, H, W).
    """
    side, x, y = rectangle[:, :, None].unbind(1)  # (N, 1) each
    height, width = images.shape[2:]
    columns = (torch.arange(width, device=images.device) + 0.5) / width
    rows = (torch.arange(height, device=images.device) + 0.5) / height
    kept_x, kept_y = (columns - x).abs() >= side / 2, (rows - y).abs() >= side / 2  # (N, W), (N, H)
    return images * (kept_y[:, None, :, None] | kept_x[:, None, None, :])
