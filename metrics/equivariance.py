"""Equivariance of a generator: does moving its input move the image, or are details glued to the pixels?

EQ-T and EQ-R of Karras et al. 2021, "Alias-free generative adversarial networks" (StyleGAN 3, NeurIPS, arXiv
2106.12423, section 3 and appendix E): the peak signal-to-noise ratio, in dB, between the image made from the
transformed input and the transformed image,

    EQ = 10 log10(I_max² / E[(g(t[z]; w)(p) - t[g(z; w)](p))²]),    I_max = 2 for images in [-1, 1],         (1)

over latents w, transformations t, channels, and the pixels p that no border touches. Higher is better. Coordinates: x
to the right, y down, origin in the centre of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

I_MAX = 2.0
LARGEST_SHIFT = 0.125  # of the image's width
LOBES = 3  # of the Lanczos windows
OVERSAMPLING = 4  # of the image whose rotation is interpolated linearly
SINC_EXTENT = 64  # pixels to which the ideal filters are sampled
SHARED = 16  # consecutive samples that share a transformation: a generator's input has one at a time

Transformed = tuple[Tensor, Tensor]  # images (N, C, H, H) and mask (H, H) of their valid pixels


def equivariance(generator: nn.Module, count: int = 50_000, batch: int = 8, seed: int = 0) -> dict[str, float]:
    """Measure EQ-T and EQ-R of a generator whose input can be transformed (StyleGAN 3).

    Latent and label of sample i follow from `(seed, i)`, the transformations from `(seed, i // 16)`: not from `batch`.

    Args:
        generator: has `z_dim`, `c_dim`, `mapping(z, c)` and `synthesis(ws)`, which makes images (N, C, H, H) in about
            [-1, 1]; its buffer `synthesis.input.transform` (3, 3) maps coordinates of the image, in widths of it, to
            those of the input: the inverse of what happens to the image.
        count: images.
        batch: images at a time, at most 16.
        seed: of latents, labels and transformations.

    Returns:
        Decibels: `eqt_int` (shifts by whole pixels, up to an eighth of the width), `eqt_frac` (any shifts up to that)
        and `eqr` (any angle).

    Raises:
        ValueError: If the generator has no such buffer.
    """
    squares = dict.fromkeys(("eqt_int", "eqt_frac", "eqr"), 0.0)
    values = dict.fromkeys(squares, 0.0)
    with _transform_of(generator) as transform:
        for first in range(0, count, SHARED):
            random = np.random.default_rng((seed, first, 1))
            shift, angle = random.uniform(-LARGEST_SHIFT, LARGEST_SHIFT, 2), random.uniform(-math.pi, math.pi)
            end = min(first + SHARED, count)
            for begin in range(first, end, batch):
                ws = _styles(generator, seed, range(begin, min(begin + batch, end)), transform.device)
                render = partial(_render, generator, transform, ws)
                for name, (error, mask) in _errors(render, float(shift[0]), float(shift[1]), float(angle)).items():
                    squares[name] += float((error.double().square() * mask).sum())
                    values[name] += float(mask.sum()) * error.shape[0] * error.shape[1]
    return {name: _psnr(squares[name], values[name]) for name in squares}


def _psnr(squares: float, values: float) -> float:
    return 10 * math.log10(I_MAX**2 * values / squares) if squares else math.inf


@contextmanager
def _transform_of(generator: nn.Module) -> Iterator[Tensor]:
    """The buffer that transforms the input of a generator in evaluation mode; both are as before afterwards."""
    transform = dict(generator.named_buffers()).get("synthesis.input.transform")
    if transform is None:
        raise ValueError(
            "Equivariance can only be measured of a generator that transforms its input (buffer "
            f"synthesis.input.transform, as StyleGAN 3 has); {type(generator).__name__} does not."
        )
    before, was_training = transform.clone(), generator.training
    try:
        generator.eval()
        with torch.no_grad():
            yield transform
    finally:
        transform.copy_(before)
        generator.train(was_training)


def _styles(generator: Any, seed: int, samples: range, device: torch.device) -> Tensor:
    """Intermediate latents of these samples."""
    draws = [np.random.default_rng((seed, i, 0)) for i in samples]
    z = torch.tensor(np.stack([random.standard_normal(generator.z_dim) for random in draws]), dtype=torch.float32)
    c = None
    if generator.c_dim:
        c = torch.eye(generator.c_dim)[[int(random.integers(generator.c_dim)) for random in draws]].to(device)
    ws: Tensor = generator.mapping(z.to(device), c)
    return ws


def _render(generator: Any, transform: Tensor, ws: Tensor, matrix: Tensor) -> Tensor:
    transform.copy_(matrix)
    images: Tensor = generator.synthesis(ws)
    return images.float()


def _errors(render: Callable[[Tensor], Tensor], x: float, y: float, angle: float) -> dict[str, Transformed]:
    """Difference of both sides of (1) for a shift (x, y), in widths of the image, and an angle."""
    upright = render(torch.eye(3))
    width = upright.shape[3]
    right, down = round(x * width), round(y * width)

    whole, whole_mask = translate_by_pixels(upright, right, down)
    shifted, shifted_mask = translate(upright, x * width, y * width)
    rotated, rotated_mask = rotate(upright, angle)
    # The input is transformed by the inverse.
    pseudo_rotated, pseudo_mask = pseudo_rotate(render(_rotation(-angle)), angle)
    return {
        "eqt_int": (render(_translation(-right / width, -down / width)) - whole, whole_mask),
        "eqt_frac": (render(_translation(-x, -y)) - shifted, shifted_mask),
        "eqr": (pseudo_rotated - rotated, pseudo_mask & rotated_mask),
    }


def _translation(x: float, y: float) -> Tensor:
    return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]])


def _rotation(angle: float) -> Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


def translate_by_pixels(images: Tensor, right: int, down: int) -> Transformed:
    """Shift images (N, C, H, W) by whole pixels (appendix E.1)."""
    margins = (right, -right, down, -down)
    return F.pad(images, margins), F.pad(torch.ones_like(images[0, 0]), margins) > 0


def translate(images: Tensor, right: float, down: float) -> Transformed:
    """Shift images (N, C, H, W) by any number of pixels with a Lanczos filter (appendix E.2)."""
    images, inside_x = _shift(images, right)
    images, inside_y = _shift(images.mT, down)
    return images.mT, inside_y[:, None] & inside_x


def _shift(x: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """Shift (..., W) to higher indices; also the positions (W,) whose values come from inside alone."""
    whole, width = math.floor(distance), x.shape[-1]
    # Position p takes from p - whole - LOBES ... p - whole + LOBES - 1.
    u = LOBES - torch.arange(2 * LOBES, dtype=torch.float64) - (distance - whole)
    taps = torch.sinc(u) * torch.sinc(u / LOBES)
    padded = F.pad(x.reshape(-1, 1, width), (LOBES + whole, LOBES - 1 - whole))
    y = F.conv1d(padded, (taps / taps.sum()).to(x)[None, None])
    p = torch.arange(width, device=x.device) - whole
    return y.reshape(x.shape), (p >= LOBES) & (p <= width - LOBES)


def rotate(images: Tensor, angle: float) -> Transformed:
    """Rotate images (N, C, H, H) counter-clockwise about their centre (appendix E.3).

    The image is oversampled with a filter that keeps what both the upright and the rotated pixel grid can represent,
    and then interpolated linearly.
    """
    f = _common_lowpass(angle, OVERSAMPLING, images)
    n, c, width, _ = images.shape
    fine = _oversample(images.reshape(-1, 1, width, width), f)
    x, y = _pixels(width, images)
    cos, sin = math.cos(angle), math.sin(angle)
    source = torch.stack([cos * x - sin * y, sin * x + cos * y], 2)  # (H, H, 2)
    grid = (source * (2 * OVERSAMPLING / fine.shape[3])).expand(n * c, -1, -1, -1)  # both share their centre
    rotated = F.grid_sample(fine, grid, mode="bilinear", align_corners=False)
    margin = (f.shape[0] // 2) / OVERSAMPLING
    return rotated.reshape(images.shape), source.abs().amax(2) <= (width - 1) / 2 - margin


def _oversample(x: Tensor, f: Tensor) -> Tensor:
    """Insert zeros between pixels (N, 1, H, H) and filter; as one small convolution for each phase of the fine grid."""
    taps = (f.shape[0] + 1) // OVERSAMPLING
    phases = F.pad(f, (0, 1, 0, 1)).reshape(taps, OVERSAMPLING, taps, OVERSAMPLING).permute(1, 3, 0, 2).flip((2, 3))
    y = F.conv2d(x, phases.reshape(-1, 1, taps, taps), padding=taps - 1)
    return F.pixel_shuffle(y, OVERSAMPLING)[:, :, :-1, :-1]  # the last row and column came from the padding of f


def pseudo_rotate(images: Tensor, angle: float) -> Transformed:
    """Filter images (N, C, H, H) that are already rotated as :func:`rotate` filters upright ones (appendix E.3)."""
    f = _common_lowpass(-angle, 1, images)
    width, margin = images.shape[3], f.shape[0] // 2
    filtered = F.conv2d(images.reshape(-1, 1, width, width), f[None, None], padding=margin)
    return filtered.reshape(images.shape), torch.stack(_pixels(width, images)).abs().amax(0) <= (width - 1) / 2 - margin


def _pixels(width: int, like: Tensor) -> list[Tensor]:
    """Centres of the pixels, x and y, each (width, width), in pixels."""
    axis = torch.arange(width, dtype=like.dtype, device=like.device) - (width - 1) / 2
    return list(torch.meshgrid(axis, axis, indexing="xy"))


def _common_lowpass(angle: float, oversampling: int, like: Tensor) -> Tensor:
    """Filter with the passband that a pixel grid and one rotated by `angle` share (appendix E.3).

    The ideal filter of a grid is a product of two sinc; that of both the convolution of their filters, under a window
    that is the convolution of their Lanczos windows. With one point per pixel the sampled filters are convolved, as in
    the original: at 45 degrees, frequencies above 0.29 cycles per pixel along the axes come out nearly twice as strong.

    Returns:
        (2k - 1, 2k - 1), k = 2 · LOBES · oversampling, with a point every 1 / oversampling pixels; the points
        that fall on pixels sum to one, for every position of the pixels.
    """
    centre = SINC_EXTENT * oversampling - 1
    axis = torch.arange(-centre, centre + 1, dtype=like.dtype, device=like.device) / oversampling
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    cos, sin = math.cos(angle), math.sin(angle)
    grids = (x, y), (cos * x + sin * y, cos * y - sin * x)
    ideal = _convolve(*(torch.sinc(u) * torch.sinc(v) for u, v in grids))
    window = _convolve(*(_lanczos(u) * _lanczos(v) for u, v in grids))
    k = 2 * LOBES * oversampling
    f = (ideal * window)[centre - k + 1 : centre + k, centre - k + 1 : centre + k]
    phases = F.pad(f, (0, 1, 0, 1)).reshape(4 * LOBES, oversampling, 4 * LOBES, oversampling)
    return (phases / phases.sum((0, 2), keepdim=True)).reshape(2 * k, 2 * k)[:-1, :-1]


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < LOBES, torch.sinc(x / LOBES), 0)


def _convolve(a: Tensor, b: Tensor) -> Tensor:
    """Circular convolution of two centred images of odd size."""
    spectrum = torch.fft.rfft2(torch.fft.ifftshift(a)) * torch.fft.rfft2(torch.fft.ifftshift(b))
    result: Tensor = torch.fft.fftshift(torch.fft.irfft2(spectrum, s=a.shape))
    return result
