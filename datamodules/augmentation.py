"""Augmentation of segmentation training: geometry moves image, label and brain mask, intensity changes the image.

Everything random is drawn from one generator per slice, on the CPU; a function of those numbers does the rest on the
device of the slices. So a slice is augmented the same in any batch, process and loader. Only the pixels of the noise
come from a generator of the device, whose numbers differ between CPU and GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from monai.bundle.config_parser import ConfigParser
from monai.transforms.compose import Compose
from monai.transforms.transform import MapTransform
from torch import Tensor

from datamodules.slice_set import MODALITIES

BRAIN_THRESHOLD = 8
BLUR_RADIUS_PX = 4

Numbers = npt.NDArray[np.float64]


def brain_mask(modalities: Tensor) -> Tensor:
    """Say where the brain is: any modality brighter than 8 of 255.

    The background of stored slices is 0 in real sets and nearly black in generated ones.

    Args:
        modalities: uint8 or float (N, 4, H, W), 0..255.

    Returns:
        bool (N, 1, H, W).
    """
    return modalities.amax(dim=1, keepdim=True) > BRAIN_THRESHOLD


class Augmentation(ABC):
    """A random transform of slices."""

    @abstractmethod
    def __call__(self, slices: Tensor, generators: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """Transform a batch; what becomes of a slice follows from its pixels and its generator alone.

        Args:
            slices: uint8 (N, 5, H, W), on any device.
            generators: one per slice, of all that is random about it.

        Returns:
            float32 (N, 5, H, W), the label still a class index, and the brain mask moved along, bool (N, 1, H, W).
        """


class MonaiAugmentation(Augmentation):
    """Random dictionary transforms of MONAI, slice by slice.

    Args:
        transforms: one after the other, each as a component of a MONAI bundle, such as
            `{_target_: RandFlipd, keys: [image, label, brain], prob: 0.5, spatial_axis: 0}`. The keys are image
            (4, H, W) in grey levels, label (1, H, W) and brain (1, H, W); what moves the image must move the other two
            by nearest neighbour.

    Raises:
        ValueError: if MONAI cannot make a dictionary transform of one.
    """

    def __init__(self, transforms: list[dict[str, Any]]) -> None:
        try:
            made = ConfigParser({"transforms": transforms}).get_parsed_content("transforms")
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"MonaiAugmentation: {error}") from error
        if odd := [given for given, one in zip(transforms, made, strict=True) if not isinstance(one, MapTransform)]:
            raise ValueError(
                f"MonaiAugmentation: expected `_target_` to name a dictionary transform, but got {odd[0]}."
            )
        self.transform = Compose(made)

    def __call__(self, slices: Tensor, generators: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """Transform a batch."""
        brains = brain_mask(slices[:, :-1]).float()
        images, masks = [], []
        for one, brain, generator in zip(slices.float(), brains, generators, strict=True):
            self.transform.set_random_state(seed=int(generator.integers(1 << 32)))
            moved = self.transform({"image": one[:-1], "label": one[-1:], "brain": brain})
            images.append(torch.cat([torch.as_tensor(moved["image"]), torch.as_tensor(moved["label"])]))
            masks.append(torch.as_tensor(moved["brain"]) > 0.5)
        return torch.stack(images), torch.stack(masks)


@dataclass(frozen=True)
class Draw:
    """What happens to one slice.

    Attributes:
        matrix: (2, 2), from a pixel of the result to one of the slice, both relative to the centre, (row, column).
        noise: standard deviation in grey levels, (4,) per modality; 0 is none.
        blur: standard deviation in pixels, (4,); 0 is none.
        zoom: resolution as a share of the full one, (4,); 1 is all of it.
        gamma: exponents of the inverted image and then of the image; 1 changes nothing.
        noise_seed: of the pixels of the noise.
    """

    matrix: Numbers
    noise: Numbers
    blur: Numbers
    zoom: Numbers
    gamma: tuple[float, float]
    noise_seed: int


class PaperAugmentation(Augmentation):
    """The augmentation of Usman Akbar et al. 2024, Scientific Data 11:259, as its code has it (`--geoaug --coloraug`).

    Rotation and scaling have probability 0.75 each. Noise (probability 0.5), blur (0.2, standard deviation 0.5 to 1 px)
    and low resolution (0.25, 0.75 to 1 of the full one) then meet every modality with probability 0.5. Gamma from 0.85
    to 1.2 changes the inverted image (0.1) and the image (0.2); mean and standard deviation stay.

    Args:
        rotation_degrees: rotation by up to that angle.
        scaling: each axis is stretched by up to that share.
        noise: largest standard deviation of Gaussian noise as a share of the grey range.
        flip: probability of exchanging left and right, which the paper does not do.
    """

    def __init__(
        self, rotation_degrees: float = 30.0, scaling: float = 0.1, noise: float = 0.05, flip: float = 0.0
    ) -> None:
        self.rotation_degrees = rotation_degrees
        self.scaling = scaling
        self.noise = noise
        self.flip = flip

    def __call__(self, slices: Tensor, generators: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """Transform a batch."""
        done = [augment(one, self.draw(generator)) for one, generator in zip(slices, generators, strict=True)]
        planes = torch.cat([part for image, masks in done for part in (image, masks[:1])])  # (5 N, H, W)
        return planes.view(slices.shape), torch.stack([masks[1:] for _, masks in done]) > 0.5

    def draw(self, generator: np.random.Generator) -> Draw:
        """Draw what happens to a slice."""

        def happens(probability: float) -> bool:
            return generator.random() < probability

        def some(probability: float, low: float, high: float, none: float) -> Numbers:
            chosen = (generator.random(len(MODALITIES)) < 0.5) & happens(probability)
            return np.where(chosen, generator.uniform(low, high, len(MODALITIES)), none)

        angle = np.deg2rad(self.rotation_degrees) * generator.uniform(-1, 1) * happens(0.75)
        scale = 1 + self.scaling * generator.uniform(-1, 1, 2) * happens(0.75)
        scale[0] *= -1 if happens(self.flip) else 1
        cos, sin = np.cos(angle), np.sin(angle)
        deviation = 255 * self.noise * generator.random()
        return Draw(
            matrix=np.array([[cos, -sin], [sin, cos]]) * scale,
            noise=some(0.5, deviation, deviation, none=0),
            blur=some(0.2, 0.5, 1.0, none=0),
            zoom=some(0.25, 0.75, 1.0, none=1),
            gamma=(
                generator.uniform(0.85, 1.2) if happens(0.1) else 1.0,
                generator.uniform(0.85, 1.2) if happens(0.2) else 1.0,
            ),
            noise_seed=int(generator.integers(1 << 63)),
        )


def augment(one: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Do to a slice what was drawn for it.

    Args:
        one: uint8 (5, H, W).
        draw: what happens.

    Returns:
        The image, float32 (4, H, W), and the label, still a class index, with the brain mask (0 or 1) moved along,
        float32 (2, H, W).
    """
    grid = sampling_grid(draw.matrix, one.shape[1:], one.device)
    masks = torch.cat([one[-1:], brain_mask(one[None, :-1])[0]]).float()  # (2, H, W)
    masks = F.grid_sample(masks[None], grid, mode="nearest", align_corners=False)[0]
    image = F.grid_sample(one[None, :-1].float(), grid, mode="bilinear", align_corners=False)[0]  # (4, H, W)
    generator = torch.Generator(one.device).manual_seed(draw.noise_seed)
    for plane, noise, sigma, zoom in zip(image, draw.noise, draw.blur, draw.zoom, strict=True):
        if noise:
            plane.add_(torch.randn(plane.shape, generator=generator, device=plane.device), alpha=noise)
        if sigma:
            plane.copy_(blur(plane, sigma))
        if zoom != 1:
            plane.copy_(lower_resolution(plane, zoom))
    inverted, plain = draw.gamma
    if inverted != 1:
        image = -change_gamma(-image, inverted)
    if plain != 1:
        image = change_gamma(image, plain)
    return image, masks


def sampling_grid(matrix: Numbers, size_px: Sequence[int], device: torch.device) -> Tensor:
    """Give where `grid_sample` shall look, (1, H, W, 2), for a (2, 2) matrix of pixels about the centre."""
    height, width = size_px
    rows = torch.arange(height, device=device)[:, None] - (height - 1) / 2
    columns = torch.arange(width, device=device) - (width - 1) / 2
    grid = torch.empty((2, height, width), device=device)  # (column, row), -1 to 1 from edge to edge
    for target, (by_row, by_column), side in zip(grid, matrix[::-1].tolist(), (width, height), strict=True):
        torch.add(rows * (2 * by_row / side), columns * (2 * by_column / side), out=target)
    return grid.permute(1, 2, 0)[None]


def blur(plane: Tensor, sigma: float) -> Tensor:
    """Blur a plane (H, W) by a Gaussian whose standard deviation is at most 1 px; outside is 0.

    The weights are the integrals of the Gaussian over the pixels.
    """
    edges = (np.arange(BLUR_RADIUS_PX + 2) - 0.5) / (sigma * 2**0.5)
    weights = [(erf(high) - erf(low)) / 2 for low, high in pairwise(edges)]  # from the centre on
    for axis in (0, 1):
        blurred = weights[0] * plane
        for shift in range(1, BLUR_RADIUS_PX + 1):
            kept = plane.shape[axis] - shift
            blurred.narrow(axis, shift, kept).add_(plane.narrow(axis, 0, kept), alpha=weights[shift])
            blurred.narrow(axis, 0, kept).add_(plane.narrow(axis, shift, kept), alpha=weights[shift])
        plane = blurred
    return plane


def lower_resolution(plane: Tensor, zoom: float) -> Tensor:
    """Take a plane (H, W) to a share of its resolution by nearest neighbour, and back linearly."""
    small = [max(1, round(zoom * side)) for side in plane.shape]
    reduced = F.interpolate(plane[None, None], small, mode="nearest-exact")
    return F.interpolate(reduced, list(plane.shape), mode="bilinear", align_corners=False)[0, 0]


def change_gamma(image: Tensor, gamma: float) -> Tensor:
    """Raise an image (C, H, W), each channel scaled to 0..1, to a power; mean and deviation of each channel stay."""
    pixels = image.flatten(1)
    low, high = pixels.amin(dim=1, keepdim=True), pixels.amax(dim=1, keepdim=True)
    scaled = (pixels - low).div_((high - low).clamp(min=1e-7))
    raised = scaled.clamp_(min=1e-7).log_().mul_(gamma).exp_()  # five times as fast as pow; infinity would be slow
    (mean, deviation), (mean_now, deviation_now) = moments(pixels), moments(raised)
    factor = deviation / deviation_now.clamp(min=1e-7)
    return raised.mul_(factor).add_(mean - factor * mean_now).view_as(image)


def moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and standard deviation of each row of (C, P), (C, 1) each."""
    mean = pixels.mean(dim=1, keepdim=True)
    square = torch.linalg.vector_norm(pixels, dim=1, keepdim=True).square() / pixels.shape[1]
    return mean, (square - mean.square()).clamp(min=0).sqrt()
