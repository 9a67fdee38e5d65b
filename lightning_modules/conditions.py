"""What a generator may be told about a slice, as classes.

Whether there is tumour, the height of the slice in the head and the area of each tumour class are put into bins. A
slice has one bin of each condition; the network is shown them as a vector with a one for each (multi-hot), and a vector
of zeros where it is told nothing (Ho, Salimans 2021, "Classifier-Free Diffusion Guidance", arXiv 2207.12598).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_modules.counter_random import Stream, random_uniform

Condition = Literal["tumour", "height", "areas"]

HEIGHT_BINS = 8
AREA_LIMITS = (0.0, 0.005, 0.02)  # shares of the image; with the class absent, four bins
AREA_CLASSES = (1, 2, 3)


class Conditions(nn.Module):
    """Turn slices into conditions, count them in training, and draw them for emission in the same proportions.

    Args:
        names: `tumour` (without, with), `height` (8 bins from the lowest to the highest slice of the volume) and
            `areas` (of core, oedema, enhancing: absent, up to 0.5 %, up to 2 %, above 2 % of the image). Empty: none.

    Raises:
        ValueError: for unknown or repeated names.
    """

    counts: Tensor

    def __init__(self, names: Sequence[Condition] = ()) -> None:
        super().__init__()
        unknown = [name for name in names if name not in get_args(Condition)]
        if unknown or len(set(names)) != len(names):
            raise ValueError(f"Expected conditions of {', '.join(get_args(Condition))}, each once, but got {names}.")
        self.names = tuple(names)
        bins = {"tumour": [2], "height": [HEIGHT_BINS], "areas": [len(AREA_LIMITS) + 1] * len(AREA_CLASSES)}
        self.bins = [count for name in self.names for count in bins[name]]
        combinations = math.prod(self.bins) if self.bins else 0
        self.register_buffer("counts", torch.zeros(combinations, dtype=torch.float64), persistent=bool(self.bins))

    @classmethod
    def unnamed(cls, classes: int) -> Conditions:
        """Classes that nobody here can recognise, as those of an imported network: drawn with equal chances.

        One can emit images with them, but not train.
        """
        conditions = cls()
        conditions.bins = [classes] if classes else []
        conditions.register_buffer("counts", torch.zeros(classes, dtype=torch.float64), persistent=classes > 0)
        return conditions

    @property
    def width(self) -> int:
        """Length of a vector; 0 without conditions."""
        return sum(self.bins)

    def of(self, slices: Tensor, height: Tensor) -> Tensor:
        """Say which bins slices are in.

        Args:
            slices: uint8 (N, 5, H, W), as stored.
            height: float (N,), 0 for the lowest and 1 for the highest slice of a volume.

        Returns:
            int64 (N, K): tumour 1, height 1, areas 3 columns.

        Raises:
            ValueError: for classes that have no names.
        """
        if self.bins and not self.names:
            raise ValueError(
                f"Expected classes that slices can be sorted into, but the {self.width} of this network have no names: "
                "it can emit images, but not be trained. Train one with `conditions`."
            )
        label, columns = slices[:, -1], []
        for name in self.names:
            if name == "tumour":
                columns.append((label > 0).flatten(1).any(dim=1).long())
            elif name == "height":
                columns.append((height * HEIGHT_BINS).long().clamp(0, HEIGHT_BINS - 1))
            else:
                limits = torch.tensor(AREA_LIMITS, device=label.device)
                areas = [(label == c).flatten(1).float().mean(dim=1) for c in AREA_CLASSES]
                columns += [torch.bucketize(area, limits) for area in areas]
        return torch.stack(columns, dim=1) if columns else label.new_zeros(len(label), 0, dtype=torch.int64)

    def vectors(self, bins: Tensor) -> Tensor | None:
        """Turn bins (N, K) into multi-hot float (N, width); None without conditions."""
        if not self.bins:
            return None
        parts = [nn.functional.one_hot(bins[:, k], count) for k, count in enumerate(self.bins)]
        return torch.cat(parts, dim=1).float()

    def shares(self, bins: Tensor) -> Tensor:
        """Say for every combination of bins which of the samples have it: float64 (N, combinations)."""
        combination = torch.zeros(len(bins), dtype=torch.int64, device=bins.device)
        for k, count in enumerate(self.bins):
            combination = combination * count + bins[:, k]
        return nn.functional.one_hot(combination, len(self.counts)).double()

    def draw(self, index: Tensor, seed: int) -> Tensor | None:
        """Draw conditions for the emitted images of these indices, in the proportions of the training so far.

        Args:
            index: int64 (N,), which images.
            seed: names the series of images.

        Returns:
            Multi-hot float (N, width), or None without conditions. Before any training all are equally likely.
        """
        if not self.bins:
            return None
        counts = self.counts if bool(self.counts.any()) else torch.ones_like(self.counts)
        below = (counts.cumsum(0) / counts.sum())[:-1]
        chance = random_uniform(seed, Stream.EMISSION_CLASS, index, 4)[:, :1].double()
        combination, columns = (chance >= below).sum(dim=1), []
        for count in reversed(self.bins):
            columns.append(combination % count)
            combination = combination // count
        return self.vectors(torch.stack(columns[::-1], dim=1))
