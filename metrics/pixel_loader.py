"""Slices of a set, read and prepared for the search block by block, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metrics.pixels import Pixels, View, as_they_are, chunk_size, shape_of

Positions = npt.NDArray[np.int64]
Images = npt.NDArray[np.uint8]


class Source(Protocol):
    """A set of slices that are read by position."""

    def __len__(self) -> int: ...

    def read(self, positions: Positions) -> Images:
        """uint8 (n, C, H, W)."""
        ...


class PixelLoader:
    """Reads slices and turns them into `Pixels`.

    Args:
        source: the slices, for instance a memory-mapped set.
        view: what is made of them before they are compared.
        device: of the search.
        group: int (N,), for instance the patient of every slice; images of equal group are not compared.
    """

    def __init__(
        self,
        source: Source,
        view: View = as_they_are,
        device: torch.device | str = "cpu",
        group: Tensor | None = None,
    ) -> None:
        self.source, self.view, self.device = source, view, torch.device(device)
        self.group = None if group is None else group.to(self.device)
        first = torch.from_numpy(source.read(np.arange(min(1, len(source)))))
        self.shape = shape_of(view, first)  # (C', H, W)
        self._sums: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def load(self, positions: Positions) -> Pixels:
        """Read some slices."""
        group = None if self.group is None else self.group[torch.from_numpy(positions).to(self.device)]
        pixels = Pixels.empty(len(positions), self.shape, self.device, group)
        self._fill(pixels, positions)
        return pixels

    def blocks(self, size: int, first: int = 0) -> Iterator[tuple[int, Pixels]]:
        """Read all slices from position `first` on, `size` at a time, with the position of the first of each block.

        A block uses the memory of the one before. Its sums are computed once; later passes remember them.
        """
        count = len(self.source)
        memory = torch.empty(min(size, count) * math.prod(self.shape), dtype=torch.int8, device=self.device)
        for start in range(first, count, size):
            positions = np.arange(start, min(start + size, count))
            group = None if self.group is None else self.group[start : start + size]
            pixels = Pixels.empty(len(positions), self.shape, self.device, group, memory)
            known = self._sums.get((start, size))
            self._fill(pixels, positions, known is None)
            if known is None:
                self._sums[start, size] = pixels.total, pixels.square
            else:
                pixels = replace(pixels, total=known[0], square=known[1])
            yield start, pixels

    def _fill(self, pixels: Pixels, positions: Positions, sum_up: bool = True) -> None:
        step = chunk_size(self.shape)
        for start in range(0, len(positions), step):
            images = torch.from_numpy(self.source.read(positions[start : start + step])).to(self.device)
            pixels[start : start + step].fill(self.view(images), sum_up)
