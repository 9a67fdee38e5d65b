"""Batches of slices from one or several slice sets, for a loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.augmentation import Augmentation
from datamodules.slice_set import Slices, SliceSet

Batch = dict[str, Tensor]
Order = Callable[[Sequence[int]], npt.NDArray[np.int64]]
"""Looks up which row stands at each of these positions of the training stream."""


class JoinedSlices:
    """Several slice sets as one: the rows of the first, then those of the second, and so on.

    Args:
        sets: (parts of) slice sets of one size.
    """

    def __init__(self, sets: Sequence[SliceSet]) -> None:
        self.sets = list(sets)
        self.starts = np.cumsum([0, *(len(part) for part in self.sets)])
        self.index = pd.concat([part.index for part in self.sets], ignore_index=True)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def patients(self) -> list[str]:
        """The patients of these slices, sorted; every synthetic slice is a patient of its own."""
        return sorted(self.index["patient"].unique())

    def read(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Slices:
        """Read slices by row number over all sets: uint8 (n, 5, H, W)."""
        rows = np.asarray(rows, np.int64)
        if len(self.sets) == 1:
            return self.sets[0].read(rows)
        which = np.searchsorted(self.starts, rows, side="right") - 1
        out = np.empty((len(rows), *self.sets[0].read([]).shape[1:]), np.uint8)
        for number in np.unique(which):
            where = which == number
            out[where] = self.sets[number].read(rows[where] - self.starts[number])
        return out


def relative_height(slices: SliceSet) -> npt.NDArray[np.float32]:
    """Say where slices are among those of their volume, 0 the lowest and 1 the highest; 0.5 for the only one: (n,)."""
    z = slices.index["z"].groupby(slices.index["volume"])
    low, high = z.transform("min"), z.transform("max")
    height = (slices.index["z"] - low) / (high - low).clip(lower=1)
    return height.where(high > low, 0.5).to_numpy(np.float32)


class SliceDataset(Dataset[Batch]):
    """Batches of slices from one or several sets, read straight from the memory maps.

    Args:
        sets: the sets, one after the other.
        order: if given, positions are those of an endless stream and go through it.
        augmentation: if given, every slice goes through it, with what is random from (seed, position).
        seed: of the augmentation.
    """

    def __init__(
        self,
        sets: Sequence[SliceSet],
        order: Order | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.slices = JoinedSlices(sets)
        self.order = order
        self.augmentation, self.seed = augmentation, seed
        row = {patient: number for number, patient in enumerate(self.slices.patients)}
        self._patient = self.slices.index["patient"].map(row).to_numpy(np.int64)
        self._height = np.concatenate([relative_height(part) for part in self.slices.sets])

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, position: int | list[int]) -> Batch:
        if isinstance(position, list):
            return self.__getitems__(position)
        return {key: value[0] for key, value in self.__getitems__([position]).items()}

    def __getitems__(self, positions: list[int]) -> Batch:
        """Give a batch: slices uint8 (N, 5, H, W), and of each its position, patient and height in the volume.

        position is int64 (N,) as asked for, patient int64 (N,) a number in the order of the names, height float32 (N,)
        from 0 to 1. Augmented batches are as `augmented` gives them.
        """
        rows = np.asarray(positions, np.int64) if self.order is None else self.order(positions)
        batch = {
            "slices": torch.from_numpy(self.slices.read(rows)),
            "position": torch.tensor(positions, dtype=torch.int64),
            "patient": torch.from_numpy(self._patient[rows]),
            "height": torch.from_numpy(self._height[rows]),
        }
        return batch if self.augmentation is None else augmented(batch, self.augmentation, self.seed, positions)


def augmented(batch: Batch, augmentation: Augmentation, seed: int, positions: Sequence[int]) -> Batch:
    """Augment a batch: its slices become float32, and `brain`, bool (N, 1, H, W), is the brain mask moved along.

    Args:
        batch: with slices uint8 (N, 5, H, W).
        augmentation: what to do.
        seed: what is random about a slice follows from it and the position.
        positions: of the slices in the training stream.
    """
    generators = [np.random.default_rng((seed, position)) for position in positions]
    slices, brain = augmentation(batch["slices"], generators)
    return {**batch, "slices": slices, "brain": brain}
