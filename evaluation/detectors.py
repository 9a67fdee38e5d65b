"""Two detectors of copies that do not share their blind spots, under one interface.

Pixels: the exact search over flips and shifts. It misses what is not aligned after them, and changes of contrast.
Embedding: a network that learned to recognise changed copies. It misses what its training did not hold, and says so
only by the planted copies that it does not find. Each gives a slice one number, and is calibrated on the same null: the
slices of held-out patients.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.leak_guard import Seen
from datamodules.slice_set import Slices, SliceSet
from evaluation.embedding_search import Embed, EmbeddingIndex
from evaluation.nearness import JointStatistic, Nearness, larger_is_nearer
from evaluation.pixel_search import PixelSearch, pixel_values, search_slices
from evaluation.sensitivity import Null

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """What a detector says of n slices.

    Attributes:
        statistic: (n,), the larger the nearer to a training slice; NaN where a slice cannot be judged.
        nearest: (n,), position of that training slice; -1 where there is none.
        values: (n, S), the scores behind the statistic, the larger the nearer.
    """

    statistic: Floats
    nearest: npt.NDArray[np.int64]
    values: pd.DataFrame


class Detector(Protocol):
    """Says how near slices come to a training set."""

    name: str
    null: Null
    """The statistic of held-out patients."""
    held_out: Found

    def of_set(self, name: str, slices: SliceSet) -> Found:
        """Judge the slices of a set; `name` is for the progress bar."""
        ...

    def of_slices(self, slices: Slices) -> Floats:
        """Give the statistic of slices in memory, uint8 (n, 5, H, W): (n,)."""
        ...


class PixelDetector:
    """The exact search; its statistic is the joint one of correlations.

    Location and scale of the scores are from training slices among those of all other patients, so that the held-out
    patients serve for calibration alone.

    Args:
        training: the slices to compare with; of at least two patients.
        held_out: slices of other patients.
        search: how; its k is that of the tables.
        folder: for states; the same search in it again is not repeated.
        null_slices: at most that many training slices, evenly spaced, for location and scale; None is all.

    Raises:
        ValueError: if there is one training patient only, or other processes still search here.
    """

    name = "pixels"

    def __init__(
        self,
        training: SliceSet,
        held_out: SliceSet,
        search: PixelSearch,
        folder: Path,
        null_slices: int | None = None,
    ) -> None:
        if len(training.patients) < 2:
            raise ValueError(
                f"{training.root}: expected training slices of at least 2 patients, to compare each with others, but "
                f"got {len(training.patients)}."
            )
        self.training, self.search, self.folder = training, search, folder
        self.tables: dict[str, pd.DataFrame] = {}
        among_others = self._search("train", thinned(training, null_slices), leave_patient_out=True)
        self.joint = JointStatistic.fit(among_others.values)
        self.held_out = self._found(self._search("held-out", held_out))
        self.null = Null(self.held_out.statistic, held_out.index["patient"].to_numpy(dtype=object))
        self._values = pixel_values(training, search, folder / "looked-up")

    def of_set(self, name: str, slices: SliceSet) -> Found:
        """Judge the slices of a set; its table goes to `tables` under `name`."""
        return self._found(self._search(name, slices))

    def of_slices(self, slices: Slices) -> Floats:
        """Give the statistic of slices in memory."""
        return self.joint(larger_is_nearer(self._values(slices)))

    def _search(self, name: str, slices: SliceSet, leave_patient_out: bool = False) -> Nearness:
        table = search_slices(name, slices, self.training, self.folder, self.search, leave_patient_out)
        if table is None:
            raise ValueError(f"{self.folder}: other processes still search here. Wait until they are done.")
        self.tables[name] = table
        return Nearness.of_search(table)

    def _found(self, nearness: Nearness) -> Found:
        z = self.joint.z(nearness.values)
        decisive = np.nan_to_num(z.to_numpy(np.float64), nan=-np.inf).argmax(axis=1)
        nearest = nearness.nearest[list(z.columns)].to_numpy(np.int64)[np.arange(len(z)), decisive]
        return Found(self.joint(nearness.values), nearest, nearness.values)


class EmbeddingDetector:
    """The largest cosine with the embedding of any training slice.

    Args:
        training: the slices to compare with.
        held_out: slices of other patients, which the network has not seen either.
        embed: turns slices into vectors of length 1.
    """

    name = "embedding"

    def __init__(self, training: SliceSet, held_out: SliceSet, embed: Embed) -> None:
        self.index = EmbeddingIndex(training, embed)
        self.held_out = self.of_set("held-out", held_out)
        self.null = Null(self.held_out.statistic, held_out.index["patient"].to_numpy(dtype=object))

    def of_set(self, name: str, slices: SliceSet) -> Found:
        """Judge the slices of a set."""
        found = self.index.nearest_of(slices)
        return Found(found.cosine, found.index, pd.DataFrame({"embedding": found.cosine}))

    def of_slices(self, slices: Slices) -> Floats:
        """Give the cosines of slices in memory."""
        return self.index.nearest(slices).cosine


def thinned(slices: SliceSet, at_most: int | None) -> SliceSet:
    """Keep at most that many slices, evenly spaced; None keeps all."""
    if at_most is None or at_most >= len(slices):
        return slices
    return slices.subset(np.linspace(0, len(slices) - 1, at_most).round().astype(np.int64))


def refuse_spoilt_null(detector: Path, held_out: SliceSet) -> None:
    """Refuse a copy detector that has seen held-out patients: it would know them, and so find fewer false alarms.

    Raises:
        ValueError: naming these patients.
    """
    seen = Seen.of_checkpoint(str(detector))
    known = sorted(set(seen.patients) & set(held_out.patients))
    if known:
        raise ValueError(
            f"{detector} was trained on {len(known)} held-out patients ({', '.join(known[:5])}), who are to calibrate "
            "it. Train a copy detector on the patients of the generator alone."
        )
