"""From a volume to its slices: intensity scale, square, choice of slices, resolution. Pure functions.

The preset `paper` is the preparation of Usman Akbar, Larsson, Blystad, Eklund, "Brain tumor segmentation using
synthetic MR images", Scientific Data 11:259 (2024), arXiv 2306.02986, as their `split_volumes_to_slices.m` does it: one
hot voxel darkens the whole patient there. The preset `default` scales by a percentile inside the brain and
chooses slices by the brain, not by the brightness of T1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from datamodules.slice_set import CHANNELS, MODALITIES, Slices

Preset = Literal["default", "paper"]

PAPER_T1_LEVEL = 50.0
MIN_SHARE = 0.15
"""Share of the square that T1 above `PAPER_T1_LEVEL` (paper) or the brain (default) must exceed. With it the default
keeps 76.2 slices per patient of 15 patients of BraTS 2021 (68 to 87), the paper's rule 73.1 (64 to 81)."""
PERCENTILE = 99.9
SMALLEST_PX = 16
TIE_ORDER = (0, 2, 1, 3)
"""Class indices by rising precedence in a tie of the majority vote: background, oedema, core, enhancing."""

PRESET_PARAMETERS: Mapping[Preset, Mapping[str, Any]] = {
    "default": {
        "intensity": f"I / (percentile {PERCENTILE} of I inside the brain) * 255, clipped to 0..255, rounded half up",
        "brain": "voxels above 0 in any modality",
        "slice_kept_if": f"brain pixels / pixels of the padded square > {MIN_SHARE}",
    },
    "paper": {
        "intensity": "I / max(I) * 255 per volume and modality, rounded as MATLAB's uint8",
        "slice_kept_if": f"pixels of T1 above {PAPER_T1_LEVEL:g} (before rounding) / padded square > {MIN_SHARE}",
    },
}


@dataclass(frozen=True)
class VolumeSlices:
    """The kept slices of one volume.

    Attributes:
        slices: uint8 (N, 5, H, W), channels as in `CHANNELS`.
        z: index of each slice along the third axis of the volume, (N,).
        slices_in_volume: number of axial slices before the choice.
        tumour_voxels_kept: tumour voxels of the volume that lie in kept slices, at the native resolution.
        tumour_voxels_dropped: those that do not, which an evaluation on kept slices cannot see.
        white_level: intensity of each modality that became grey level 255.
    """

    slices: Slices
    z: npt.NDArray[np.int32]
    slices_in_volume: int
    tumour_voxels_kept: int
    tumour_voxels_dropped: int
    white_level: Mapping[str, float]


def native_size_px(shape: tuple[int, ...]) -> int:
    """Side of the square that holds an axial slice of this shape (X, Y, ...): the next power of two (240 -> 256)."""
    return 1 << (max(shape[:2]) - 1).bit_length()


def reduction_factor(native_px: int, size_px: int | None) -> int:
    """By how much the sides of the native square shrink to become `size_px` (None: not at all).

    Raises:
        ValueError: if the blocks would not fit.
    """
    possible = [native_px >> shift for shift in range(native_px.bit_length()) if native_px >> shift >= SMALLEST_PX]
    if size_px is None or size_px == native_px:
        return 1
    if size_px not in possible:
        sizes = ", ".join(map(str, possible)) or f"{native_px} only"
        raise ValueError(
            f"size_px={size_px} cannot be made from slices of {native_px} x {native_px} pixels. Choose one of {sizes}."
        )
    return native_px // size_px


def round_half_away(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Convert to uint8 as MATLAB does: round half away from zero, saturate at 0 and 255."""
    clipped = np.clip(values, 0.0, 255.0)
    whole = np.floor(clipped)
    return (whole + (clipped - whole >= 0.5)).astype(np.uint8)


def percentile_in(volume: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> float:
    """Give the intensity at `PERCENTILE` inside the mask; the maximum where that is not above 0."""
    level = float(np.percentile(volume[mask], PERCENTILE, method="higher"))
    return level if level > 0 else float(volume.max())


def pad_to_square(array: npt.NDArray[Any], size_px: int) -> npt.NDArray[Any]:
    """Pad (..., H, W) with zeros to (..., size_px, size_px), centrally (the odd pixel goes to the end)."""
    missing = [size_px - length for length in array.shape[-2:]]
    widths = [(0, 0)] * (array.ndim - 2) + [(m // 2, m - m // 2) for m in missing]
    return np.pad(array, widths)


def shrink_images(images: Slices, factor: int) -> Slices:
    """Average blocks of factor x factor pixels of uint8 (..., H, W), rounded half up, in integer arithmetic."""
    area = factor * factor
    sums = _blocks(images, factor).sum(axis=(-3, -1), dtype=np.uint32)  # (..., H / factor, W / factor)
    means: Slices = ((sums + area // 2) // area).astype(np.uint8)
    return means


def shrink_labels(labels: Slices, factor: int) -> Slices:
    """Take the most frequent class of each block of factor x factor pixels of (..., H, W).

    A tie goes to the tumour before the background, and to the class that is rarer in most patients: enhancing, then
    core, then oedema.
    """
    blocks = _blocks(labels, factor)
    counts = np.stack([(blocks == index).sum(axis=(-3, -1), dtype=np.uint32) for index in TIE_ORDER])
    winner = len(TIE_ORDER) - 1 - np.argmax(counts[::-1], axis=0)  # the last of equal counts
    classes: Slices = np.asarray(TIE_ORDER, np.uint8)[winner]
    return classes


def _blocks(array: Slices, factor: int) -> Slices:
    *lead, height, width = array.shape
    return array.reshape(*lead, height // factor, factor, width // factor, factor)


def slice_volume(
    images: npt.NDArray[np.float32],
    labels: npt.NDArray[np.uint8],
    preset: Preset = "default",
    size_px: int | None = None,
) -> VolumeSlices:
    """Turn a volume into uint8 slices.

    Args:
        images: (4, X, Y, Z) in the order of `MODALITIES`, with a voxel above 0 in each.
        labels: class index 0..3, (X, Y, Z).
        preset: rule of intensity and of the choice of slices, see `PRESET_PARAMETERS`.
        size_px: side of the slices; None keeps the native square.

    Raises:
        ValueError: if `size_px` does not divide the native square.
    """
    native_px = native_size_px(labels.shape)
    factor = reduction_factor(native_px, size_px)
    brain: npt.NDArray[np.bool_] = np.any(images > 0, axis=0)
    covered = brain
    levels = {}
    grey = np.empty(images.shape, np.uint8)
    for index, name in enumerate(MODALITIES):
        image = images[index]
        levels[name] = float(image.max()) if preset == "paper" else percentile_in(image, brain)
        scaled = image.astype(np.float64) / levels[name] * 255.0
        grey[index] = round_half_away(scaled)
        if preset == "paper" and name == "T1":
            covered = scaled > PAPER_T1_LEVEL
    kept = covered.sum(axis=(0, 1)) / native_px**2 > MIN_SHARE  # (Z,)
    z = np.flatnonzero(kept)
    stack = np.concatenate([grey[..., z], labels[None, ..., z]]).transpose(3, 0, 1, 2)  # (N, 5, X, Y)
    stack = pad_to_square(stack, native_px)
    size = native_px // factor
    slices = np.empty((len(z), len(CHANNELS), size, size), np.uint8)
    slices[:, :-1] = shrink_images(stack[:, :-1], factor)
    slices[:, -1] = shrink_labels(stack[:, -1], factor)
    tumour = (labels > 0).sum(axis=(0, 1))
    return VolumeSlices(
        slices=slices,
        z=z.astype(np.int32),
        slices_in_volume=labels.shape[2],
        tumour_voxels_kept=int(tumour[kept].sum()),
        tumour_voxels_dropped=int(tumour[~kept].sum()),
        white_level=levels,
    )
