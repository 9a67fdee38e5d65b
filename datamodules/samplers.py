"""Order of the data as a pure function of the seed: an endless stream for training, whole volumes for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch.utils.data import Sampler


class StreamSampler(Sampler[int]):
    """Positions in an endless training stream; an epoch is a tick of a fixed number of images.

    Epoch e covers positions e * epoch_images to (e + 1) * epoch_images - 1; sample j of a global batch goes to rank
    j mod world size. Lightning calls `set_epoch` before every epoch, after a resumption too.

    Args:
        epoch_images: images per epoch over all ranks.
        rank: of this process.
        world_size: number of processes; must divide `epoch_images`.
    """

    def __init__(self, epoch_images: int, rank: int = 0, world_size: int = 1) -> None:
        if epoch_images % world_size:
            raise ValueError(
                f"Expected epoch_images to be a multiple of {world_size} processes, but got {epoch_images}."
            )
        self.epoch_images, self.rank, self.world_size, self.epoch = epoch_images, rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.epoch_images
        return iter(range(start + self.rank, start + self.epoch_images, self.world_size))

    def __len__(self) -> int:
        return self.epoch_images // self.world_size


class StreamOrder:
    """Which slice stands at a position of the stream: endless shuffled passes over `n` slices.

    Pass p is the permutation drawn from `(seed, p)`, so every slice is seen equally often and any position can be
    looked up without going through those before it.
    """

    def __init__(self, n: int, seed: int | tuple[int, ...]) -> None:
        self.n, self.seed = n, seed if isinstance(seed, tuple) else (seed,)
        self._pass, self._order = -1, np.empty(0, np.int64)

    def __call__(self, positions: Sequence[int]) -> npt.NDArray[np.int64]:
        """Look positions up: slice numbers 0..n-1."""
        out = np.empty(len(positions), np.int64)
        for i, position in enumerate(positions):
            number, offset = divmod(position, self.n)
            if number != self._pass:
                self._pass, self._order = number, np.random.default_rng((*self.seed, number)).permutation(self.n)
            out[i] = self._order[offset]
        return out


class MixedOrder:
    """Which slice stands at a position of a stream that mixes groups of slices, each with a share of every batch.

    A batch has its exact share of each group, to the next whole slice, and any number of batches too. Within a group,
    slices come in endless shuffled passes. Everything follows from the seed and the position, so neither the number of
    processes nor an interruption enters.

    Args:
        groups: row numbers of the slices of each group; groups may overlap, and a row may be there several times.
        shares: of the groups, adding up to 1.
        batch_size: images of a batch over all ranks; where in it the groups stand is shuffled.
        seed: of everything.
    """

    def __init__(
        self, groups: Sequence[npt.NDArray[np.int64]], shares: Sequence[float], batch_size: int, seed: int
    ) -> None:
        self.groups, self.batch_size, self.seed = groups, batch_size, seed
        self.orders = [StreamOrder(len(rows), (seed, number + 1)) for number, rows in enumerate(groups)]
        exact = [Fraction(share).limit_denominator(1_000_000) for share in shares]
        # The share of a group among those that follow it; whole numbers, so that no rounding error adds up.
        self._of_rest = [share / sum(exact[number:]) for number, share in enumerate(exact)]
        self._batch, self._places = -1, np.empty(0, np.int64)

    def __call__(self, positions: Sequence[int]) -> npt.NDArray[np.int64]:
        """Look positions up: row numbers."""
        out = np.empty(len(positions), np.int64)
        for i, position in enumerate(positions):
            group, place = self._place(position)
            out[i] = self.groups[group][self.orders[group]([place])[0]]
        return out

    def _place(self, position: int) -> tuple[int, int]:
        """Say which group has its turn at a position, and the how-manieth slice of that group it is."""
        batch, offset = divmod(position, self.batch_size)
        if batch != self._batch:
            shuffled = np.random.default_rng((self.seed, 0, batch)).permutation(self.batch_size)
            self._batch, self._places = batch, shuffled
        place = batch * self.batch_size + int(self._places[offset])
        for group, share in enumerate(self._of_rest):
            before = place * share.numerator // share.denominator  # slices of the group at the places before
            if (place + 1) * share.numerator // share.denominator > before:
                return group, before
            place -= before
        raise AssertionError("The last group takes what is left.")


def volume_batches(index: pd.DataFrame, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Deal every slice exactly once over all ranks, all slices of a patient to one rank, in order of z.

    Patients are dealt, the largest first, to the rank that has the fewest slices; no rank is padded. A rank without
    patients gets one empty batch, because Lightning calls no hooks, where the ranks meet, for an empty loader.

    Args:
        index: rows of the slice set with the columns patient, volume, z.
        batch_size: most slices in a batch.
        rank: of this process.
        world_size: number of processes.

    Returns:
        Positions, batch by batch.
    """
    sizes = index.groupby("patient").size().sort_index().sort_values(ascending=False, kind="stable")
    load, mine = np.zeros(world_size, np.int64), set()
    for patient, size in sizes.items():
        target = int(load.argmin())
        load[target] += size
        if target == rank:
            mine.add(patient)
    chosen = index.reset_index(drop=True)
    chosen = chosen[chosen["patient"].isin(mine)].sort_values(["patient", "volume", "z"], kind="stable")
    positions: list[int] = chosen.index.to_list()
    return [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)] or [[]]
