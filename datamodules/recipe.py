"""What training sees: parts of real and synthetic sets, how much of each, and how often it comes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from datamodules.samplers import MixedOrder, StreamOrder
from datamodules.slice_dataset import Order
from datamodules.slice_set import CLASSES, SliceSet

Holding = Literal["tumour", "core", "oedema", "enhancing"]
Rows = npt.NDArray[np.int64]


@dataclass
class TrainingPart:
    """A part of the training data.

    Args:
        path: folder of a slice set; of a real set the training split is taken.
        amount: None takes all slices, an integer that many, a float from 0 to 1 that share; drawn with the seed.
        patients: of a real set, only so many patients, of whose slices `amount` then takes some; a larger number
            includes the patients of a smaller one.
        repeat: how often every slice comes in a pass over the data.
        share: of the images of every batch. Parts without one divide the rest by their number of slices and repeats.
    """

    path: str
    amount: int | float | None = None
    patients: int | None = None
    repeat: int = 1
    share: float | None = None


@dataclass
class Oversampling:
    """Let a share of every batch be slices that hold something; the rest comes from all slices, these included.

    Args:
        what: the slices must have a pixel of this class, or of any.
        share: of the images of every batch; a third is nnU-Net's (Isensee et al. 2021, Nature Methods 18).
    """

    what: Holding = "tumour"
    share: float = 1 / 3


def problems_of(parts: Sequence[TrainingPart], oversampling: Oversampling | None) -> list[str]:
    """List what is impossible about a recipe, before any set is opened."""
    problems = []
    if not parts:
        problems.append("train must name at least one slice set, or be left out.")
    paths = [Path(part.path).resolve() for part in parts]
    problems += [
        f"train names {part.path} twice. Name it once; repeat and share say how often its slices come."
        for number, part in enumerate(parts)
        if paths[number] in paths[:number]
    ]
    for part in parts:
        if part.repeat < 1:
            problems.append(f"repeat of {part.path} must be at least 1, but is {part.repeat}.")
        if part.share is not None and not 0 < part.share <= 1:
            problems.append(f"share of {part.path} must be above 0 and at most 1, but is {part.share}.")
        if part.share is not None and part.repeat != 1:
            problems.append(f"{part.path} has a share ({part.share}), which repeat ({part.repeat}) cannot change.")
    shares = [part.share for part in parts if part.share is not None]
    left = 1 - sum(shares)
    if shares and (abs(left) > 1e-6 if len(shares) == len(parts) else left < 1e-6):
        wanted = "add up to 1" if len(shares) == len(parts) else "leave something for the parts without one"
        problems.append(f"the shares of train, {', '.join(map(str, shares))}, must {wanted}.")
    if oversampling is not None and not 0 < oversampling.share < 1:
        problems.append(f"oversampling.share must be between 0 and 1, but is {oversampling.share}.")
    return problems


def draw_part(slices: SliceSet, part: TrainingPart, seed: int) -> SliceSet:
    """Take the patients and the amount of slices that a part asks for, drawn with the seed.

    Raises:
        ValueError: if there are not so many.
    """
    if part.patients is not None:
        names = slices.patients
        if slices.manifest.kind != "real" or not 0 < part.patients <= len(names):
            held = f"{len(names)} training patients" if slices.manifest.kind == "real" else "synthetic slices"
            raise ValueError(f"Data: {part.path} has {held}, but patients asks for {part.patients} of them.")
        chosen = np.random.default_rng((seed, len(names), 1)).permutation(len(names))[: part.patients]
        slices = slices.subset(slices.index["patient"].isin([names[i] for i in chosen]).to_numpy())
    if part.amount is None:
        return slices
    count = round(part.amount * len(slices)) if isinstance(part.amount, float) else part.amount
    if not 0 < count <= len(slices):
        raise ValueError(
            f"Data: expected amount to choose 1 to {len(slices)} slices of {part.path}, but {part.amount} is {count}."
        )
    rows = np.random.default_rng((seed, len(slices))).permutation(len(slices))[:count]
    return slices.subset(np.sort(rows))


def keep_for_validation(slices: SliceSet, fraction: float, seed: int) -> tuple[SliceSet, SliceSet]:
    """Divide synthetic slices, each a patient of its own, into those to train on and those to choose the model by.

    Raises:
        ValueError: if one of the two would be empty.
    """
    count = round(fraction * len(slices))
    if not 0 < count < len(slices):
        raise ValueError(
            f"Data: val_fraction {fraction} of the {len(slices)} slices of {slices.root} is {count}, but training and "
            "validation need at least one each."
        )
    shuffled = np.random.default_rng((seed, len(slices), 2)).permutation(len(slices))
    return slices.subset(np.sort(shuffled[count:])), slices.subset(np.sort(shuffled[:count]))


class Mixture:
    """The training stream of a recipe, as groups of rows and the share of every batch that each has.

    Rows are counted over all sets, one after the other.

    Args:
        sets: the drawn slices of each part.
        parts: of the recipe.
        oversampling: if slices that hold something shall come more often.

    Raises:
        ValueError: if no slice of a group holds what is to be oversampled.
    """

    def __init__(
        self, sets: Sequence[SliceSet], parts: Sequence[TrainingPart], oversampling: Oversampling | None = None
    ) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, sets)])
        rows = [np.arange(start, start + len(slices)) for start, slices in zip(self.starts, sets, strict=False)]
        self.groups: list[Rows] = []
        self.shares: list[float] = []
        for part, own in zip(parts, rows, strict=True):
            if part.share is not None:
                self.groups.append(own)
                self.shares.append(part.share)
        if pooled := [np.repeat(own, p.repeat) for p, own in zip(parts, rows, strict=True) if p.share is None]:
            self.groups.append(np.concatenate(pooled))
            self.shares.append(1 - sum(self.shares))
        self.is_plain = len(self.groups) == 1 and all(part.repeat == 1 for part in parts) and oversampling is None
        if oversampling is not None:
            held = np.concatenate([holds(slices, oversampling.what) for slices in sets])
            wanted = [group[held[group]] for group in self.groups]
            if not all(map(len, wanted)):
                names = ", ".join(str(slices.root) for slices in sets)
                raise ValueError(f"Data: oversampling: a part of {names} has no slice with {oversampling.what}.")
            self.groups = [*wanted, *self.groups]
            self.shares = [s * f for f in (oversampling.share, 1 - oversampling.share) for s in self.shares]

    def order(self, batch_size: int, seed: int) -> Order:
        """Give the order of the stream."""
        if self.is_plain:
            return StreamOrder(int(self.starts[-1]), seed)
        return MixedOrder(self.groups, self.shares, batch_size, seed)

    def shares_of_parts(self) -> list[float]:
        """Give the share of all training images that each part has."""
        total = np.zeros(len(self.parts))
        for group, share in zip(self.groups, self.shares, strict=True):
            part = np.searchsorted(self.starts, group, side="right") - 1
            total += share * np.bincount(part, minlength=len(self.parts)) / len(group)
        return [float(share) for share in total]


def holds(slices: SliceSet, what: Holding) -> npt.NDArray[np.bool_]:
    """Say which slices have a pixel of a class, or of any tumour: (n,)."""
    names = CLASSES[1:] if what == "tumour" else (what,)
    found: npt.NDArray[np.bool_] = (slices.index[[f"{name}_px" for name in names]] > 0).any(axis=1).to_numpy()
    return found


def record(slices: SliceSet, part: TrainingPart) -> dict[str, Any]:
    """Say what was drawn, as JSON: the options of the part and a hash of the rows."""
    options = {key: value for key, value in asdict(part).items() if key != "path"}
    rows = slices.index[["volume", "z"]].to_csv(index=False).encode()
    return {**options, "rows_sha256": hashlib.sha256(rows).hexdigest()}
