"""Changes of a slice under which a copy is still a copy: drawn from `(seed, index)`, then applied deterministically.

Pixels lose a copy that was shifted by a few of them or mirrored; a detector that is trained on such changes need not.
What is changed decides what is learned: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
Representations" (ICML, arXiv 2002.05709), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.ada_transforms import inverse_affine
from lightning_modules.counter_random import Stream, random_normal, random_uniform

N_MODALITIES = 4
SHIFT = 0.1
"""Largest shift along each axis, as a share of the side."""
ROTATION_DEGREES = 10.0
SCALING = 0.1
"""The image becomes larger or smaller by at most this share."""
GAIN_LOG2, GAMMA_LOG2 = 0.5, 0.7
"""Factor and exponent of the grey levels of each modality are at most 2 to that power, and at least 1 over it."""
BIAS_LOG2 = 0.3
"""Each modality is brighter towards one side: by at most 2 to that power at the edge of each axis."""
NOISE = 25.0
"""Largest standard deviation of the noise that half of the views have in the brain, in grey levels."""
COARSER = 4
"""Half of the views are mixed, to a random share, with what is left of them at this fraction of the resolution."""
DROP_MODALITY, DROP_LABEL = 0.3, 0.3
"""Probabilities that one of the modalities, and that the label is missing."""

Parameters = Mapping[str, Tensor]
"""A row per view, see `draw`."""


def copy_views(slices: Tensor, seed: int, index: Tensor) -> Tensor:
    """Give a view of each slice.

    Args:
        slices: uint8 or float (N, 5, H, W): grey levels 0..255 and, last, the class index.
        seed: names the series.
        index: int64 (N,), numbers of the views in it.

    Returns:
        float32 (N, 5, H, W) in the same units; grey levels are not rounded.
    """
    noise = random_normal(seed, Stream.NOISE, index, (N_MODALITIES, *slices.shape[2:]))
    return change(slices, draw(seed, index), noise)


def draw(seed: int, index: Tensor) -> Parameters:
    """Draw the parameters of views.

    Args:
        seed: names the series.
        index: int64 (N,).

    Returns:
        float32, a row per view. Of the geometry, as `inverse_affine` has it: `xflip` (N, 1), `xfrac`, `rotate` (N, 2),
        `scale` (N, 1). Of the modalities: `gain`, `gamma` (N, 4); `bias` (N, 4, 2), log2 of the factor at the edge of
        each image axis. Of all: `blur` (N, 1), the share of the coarse image; `noise` (N, 1), its standard deviation;
        `keep` (N, 5), 0 for a channel that is missing.
    """
    u = random_uniform(seed, Stream.AUGMENTATION, index, 26)
    signed = 2.0 * u - 1.0
    angle = signed[:, 3:4] * math.radians(ROTATION_DEGREES)
    modality = torch.arange(N_MODALITIES, device=index.device)
    missing = (u[:, 23:24] < DROP_MODALITY) & ((u[:, 24:25] * N_MODALITIES).long() == modality)
    return {
        "xflip": (u[:, :1] < 0.5).float(),
        "xfrac": signed[:, 1:3] * SHIFT,
        "rotate": torch.cat([angle, torch.zeros_like(angle)], dim=1),
        "scale": signed[:, 4:5] * math.log2(1.0 + SCALING),
        "gain": torch.exp2(signed[:, 5:9] * GAIN_LOG2),
        "gamma": torch.exp2(signed[:, 9:13] * GAMMA_LOG2),
        "bias": (signed[:, 13:21] * BIAS_LOG2).reshape(-1, N_MODALITIES, 2),
        "blur": signed[:, 21:22].clamp(min=0.0),
        "noise": signed[:, 22:23].clamp(min=0.0) * NOISE,
        "keep": torch.cat([~missing, u[:, 25:] >= DROP_LABEL], dim=1).float(),
    }


def change(slices: Tensor, parameters: Parameters, noise: Tensor) -> Tensor:
    """Apply drawn parameters: geometry, then blur, intensity and noise of the modalities, then what is missing.

    The label moves by nearest neighbour.

    Args:
        slices: uint8 or float (N, 5, H, W).
        parameters: see `draw`.
        noise: standard normal (N, 4, H, W).

    Returns:
        float32 (N, 5, H, W).
    """
    grey, label = _move(slices.float(), parameters)
    brain = grey.amax(dim=1, keepdim=True) > 0.5  # interpolation leaves traces of rounding outside
    per_slice = {name: parameters[name][..., None, None] for name in ("blur", "gamma", "gain", "noise", "keep")}
    coarse = F.interpolate(grey, scale_factor=1 / COARSER, mode="area")
    grey = grey.lerp(F.interpolate(coarse, size=grey.shape[2:], mode="bilinear"), per_slice["blur"])
    grey = 255.0 * per_slice["gain"] * (grey / 255.0).pow(per_slice["gamma"])
    grey = grey * _bias_field(parameters["bias"], grey.shape[2:])
    grey = grey + brain * per_slice["noise"] * noise
    return torch.cat([grey.clamp(0.0, 255.0), label], dim=1) * per_slice["keep"]


def _move(slices: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Flip left and right, scale, rotate and shift; what comes from outside is 0."""
    size = slices.shape[2:]
    affine = inverse_affine(parameters, size, xflip_axis=-2)  # (N, 2, 3), pixels from the centre
    half = affine.new_tensor([size[1], size[0]]) / 2.0  # (x, y); of PyTorch's grids a side is 2 long
    linear, offset = affine[:, :, :2] * half / half[:, None], affine[:, :, 2:] / half[:, None]
    theta = torch.cat([linear, offset], dim=2).float()
    grid = F.affine_grid(theta, list(slices.shape), align_corners=False)
    grey = F.grid_sample(slices[:, :-1], grid, mode="bilinear", align_corners=False)
    return grey, F.grid_sample(slices[:, -1:], grid, mode="nearest", align_corners=False)


def _bias_field(slopes: Tensor, size: torch.Size) -> Tensor:
    """2^(a x + b y) with x and y from -1 to 1 along the image axes: (N, 4, 2) -> (N, 4, H, W)."""
    x, y = (torch.linspace(-1.0, 1.0, side, device=slopes.device) for side in size)
    along_x, along_y = slopes[..., None, None].unbind(2)  # (N, 4, 1, 1)
    return torch.exp2(along_x * x[:, None] + along_y * y)
