"""Images as the search compares them, what is compared of them, and under which flips and shifts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metrics.exact_product import sums, sums_of_squares
from metrics.similarity import Measure, Moments

OFFSET = 128
CHUNK_BYTES = 1 << 23
"""Pixels prepared at a time."""


Shape = tuple[int, ...]
View = Callable[[Tensor], Sequence[Tensor]]
"""Makes of uint8 images (n, C, H, W) the channels that are compared, uint8 (n, H, W) each."""


def as_they_are(images: Tensor) -> Sequence[Tensor]:
    """Compare the channels themselves."""
    return images.unbind(1)


def shape_of(view: View, images: Tensor) -> Shape:
    """Give the shape (C', H, W) of what a view makes of an image."""
    channels = view(images[:1])
    return len(channels), *channels[0].shape[1:]


def chunk_size(shape: Shape) -> int:
    """Give how many images (C, H, W) are prepared at a time."""
    return max(1, CHUNK_BYTES // max(1, math.prod(shape)))


@dataclass(frozen=True)
class Score:
    """What is compared, and how: these channels together, by this measure."""

    name: str
    channels: tuple[int, ...]
    measure: Measure


@dataclass(frozen=True)
class Transform:
    """A change of the query before it is compared: first the flip along an image axis (-1, -2 or None), then the shift.

    The shift is cyclic: what leaves at one side enters at the other, which is background in images of a head. So the
    sums over an image stay, and shifting the query is shifting the reference back.

    Raises:
        ValueError: if there is no such axis.
    """

    mirror_axis: int | None = None
    shift_px: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.mirror_axis not in (None, -1, -2):
            raise ValueError(f"Expected mirror_axis to be -1, -2 or None, but got {self.mirror_axis}.")

    def undo(self, images: Tensor, out: Tensor) -> None:
        """Write the inverse of (C, N, H, W) into `out`, few images at a time: fresh memory is slow."""
        step = CHUNK_BYTES // max(1, images[0, 0].numel()) + 1
        for source, target in zip(images, out, strict=True):
            for start in range(0, len(source), step):
                part = source[start : start + step]
                if any(self.shift_px):
                    part = part.roll([-shift for shift in self.shift_px], dims=(-2, -1))
                target[start : start + step] = part if self.mirror_axis is None else part.flip(self.mirror_axis)


IDENTITY = Transform()


def flips_and_shifts(mirror_axis: int | None, max_shift_px: int) -> tuple[Transform, ...]:
    """All shifts of at most `max_shift_px` along each axis, each as it is and (unless None) flipped; shortest first.

    Raises:
        ValueError: if the axis is not -1, -2 or None, or the shift is negative.
    """
    if max_shift_px < 0:
        raise ValueError(f"Expected max_shift_px to be 0 or more, but got {max_shift_px}.")
    reach = range(-max_shift_px, max_shift_px + 1)
    shifts = sorted(((h, w) for h in reach for w in reach), key=lambda shift: (shift[0] ** 2 + shift[1] ** 2, shift))
    axes = (None,) if mirror_axis is None else (None, mirror_axis)
    return tuple(Transform(axis, shift) for shift in shifts for axis in axes)


@dataclass(frozen=True)
class Pixels:
    """Images as the search needs them.

    Attributes:
        values: int8 (C, N, H, W), value - 128.
        total: int64 (C, N), sums.
        square: int64 (C, N), sums of squares.
        group: int64 (N,) or None; images of equal group are not compared.
    """

    values: Tensor
    total: Tensor
    square: Tensor
    group: Tensor | None = None

    @staticmethod
    def of(images: Tensor, group: Tensor | None = None, view: View = as_they_are) -> Pixels:
        """Prepare uint8 (N, C, H, W).

        Args:
            images: on the device where the search shall run.
            group: int (N,), for instance the patient.
            view: what is made of the images before they are compared.

        Raises:
            ValueError: if images are not uint8 (N, C, H, W), or there is not one group per image.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"Expected images uint8 (N, C, H, W), but got {images.dtype} {tuple(images.shape)}.")
        if group is not None:
            if len(group) != len(images):
                raise ValueError(f"Expected one group per image, but got {len(group)} for {len(images)} images.")
            group = group.to(images.device)
        shape = shape_of(view, images)
        pixels, step = Pixels.empty(len(images), shape, images.device, group), chunk_size(shape)
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            pixels[rows].fill(view(images[rows]))
        return pixels

    @staticmethod
    def empty(
        count: int, shape: Shape, device: torch.device, group: Tensor | None = None, out: Tensor | None = None
    ) -> Pixels:
        """Make room for images of shape (C, H, W); `out` is int8 memory to use for their values."""
        channels, height, width = shape
        size = count * math.prod(shape)
        values = torch.empty(size, dtype=torch.int8, device=device) if out is None else out[:size]
        total, square = torch.empty(2, channels, count, dtype=torch.int64, device=device)
        return Pixels(values.view(channels, count, height, width), total, square, group)

    def fill(self, channels: Sequence[Tensor], sum_up: bool = True) -> None:
        """Take over channels, uint8 (N, H, W) each; without `sum_up` the sums are left to the caller."""
        for channel, (image, values) in enumerate(zip(channels, self.values, strict=True)):
            torch.bitwise_xor(image, OFFSET, out=values.view(torch.uint8))  # the sign bit: 128 less
            if sum_up:
                flat = values.flatten(1)
                self.total[channel], self.square[channel] = sums(flat), sums_of_squares(flat)

    def __len__(self) -> int:
        return self.values.shape[1]

    def __getitem__(self, rows: slice) -> Pixels:
        group = None if self.group is None else self.group[rows]
        return Pixels(self.values[:, rows], self.total[:, rows], self.square[:, rows], group)

    def moments(self, channels: Sequence[int]) -> Moments:
        """Sums over some channels together."""
        rows, n = list(channels), len(channels) * self.values[0, 0].numel()
        return Moments(n, self.total[rows].sum(dim=0), self.square[rows].sum(dim=0), len(rows))
