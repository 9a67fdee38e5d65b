"""Slices as pictures: every modality in grey, and the label in colour over FLAIR, as a radiologist looks at them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from datamodules.slice_set import Slices, to_display

CLASS_COLOURS = ((213, 94, 0), (0, 158, 115), (240, 228, 66))
"""Core, oedema, enhancing: vermilion, bluish green and yellow of Okabe and Ito (2008), told apart by all eyes."""

Picture = npt.NDArray[np.uint8]


def overlay(grey: Picture, label: Picture, strength: float = 0.55) -> Picture:
    """Lay the label in colour over a grey image.

    Args:
        grey: uint8 (..., H, W).
        label: class index 0..3, same shape.
        strength: opacity of the colours.

    Returns:
        uint8 (..., H, W, 3).
    """
    colours = np.array([(0, 0, 0), *CLASS_COLOURS], np.float32)
    picture = np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)
    tumour = (label > 0)[..., None]
    mixed = (1 - strength) * picture + strength * colours[label]
    return np.where(tumour, mixed, picture).round().astype(np.uint8)


def panels(one: Slices) -> list[Picture]:
    """Give the pictures of a slice (5, H, W): T1, T1ce, T2, FLAIR, and FLAIR with the label; each (H', W', 3)."""
    shown = to_display(one)
    grey = [np.repeat(channel[..., None], 3, axis=-1) for channel in shown[:4]]
    return [*grey, overlay(shown[3], shown[4])]


def sheet(slices: Slices, gap_px: int = 2) -> Picture:
    """Lay slices out in a sheet: one row per slice, one column per panel.

    Args:
        slices: uint8 (N, 5, H, W).
        gap_px: white space between the pictures.

    Returns:
        uint8 (rows, columns, 3).
    """
    return tile([panels(one) for one in slices], gap_px)


def tile(rows: Sequence[Sequence[Picture]], gap_px: int = 2) -> Picture:
    """Lay pictures of one size out in rows and columns on white."""
    height, width, _ = rows[0][0].shape
    columns = max(len(row) for row in rows)
    out = np.full((len(rows) * (height + gap_px) - gap_px, columns * (width + gap_px) - gap_px, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = r * (height + gap_px), c * (width + gap_px)
            out[top : top + height, left : left + width] = picture
    return out
