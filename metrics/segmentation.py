"""Dice per patient on the volume rebuilt from its slices, for the classes and the BraTS regions.

Dice is a function of three counts, and counts add up: the sum over the slices of a patient is exactly the count on the
volume rebuilt from these slices. So the state of the metric is one integer table, sums of which are exact on any number
of processes.

Empty classes: Dice is 0/0 where neither prediction nor reference holds the class. Published conventions differ and
decide the score (Maier-Hein et al., "Metrics reloaded", Nature Methods 2024), so every function asks for one by name:
"nan" leaves the patient out of the mean of that class (nnU-Net, brats-evaluation), "one" counts 1 (BraTS up to 2023).
Where only one of the two is empty, Dice is 0 under both.
"""

from __future__ import annotations

from typing import Literal

import torch
from torchmetrics import Metric

N_CLASSES = 4
ENTITIES: dict[str, tuple[int, ...]] = {
    "core": (1,),
    "oedema": (2,),
    "enhancing": (3,),
    "WT": (1, 2, 3),
    "TC": (1, 3),
    "ET": (3,),
}
"""Name of each entity and the class indices it consists of; the order of every table of this package."""
COUNTS = ("tp", "fp", "fn")

Empty = Literal["nan", "one"]


def entity_counts(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Count true positive, false positive and false negative pixels of every entity.

    Args:
        prediction: class indices 0..3, any integer type, shape (N, ...).
        target: the reference, same shape.

    Returns:
        int64 (N, 6, 3): entities in the order of `ENTITIES`, then TP, FP, FN.

    Raises:
        ValueError: if the shapes differ, the type is not an integer one, or a class index is outside 0..3.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            "Expected prediction and target of one shape (N, ...), "
            f"but got {tuple(prediction.shape)} and {tuple(target.shape)}."
        )
    for name, labels in (("prediction", prediction), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"Expected {name} to hold class indices of an integer type, but got {labels.dtype}.")
    n = prediction.shape[0]
    p, t = prediction.flatten(1).long(), target.flatten(1).long()  # (N, pixels)
    if bool(((p | t) & ~(N_CLASSES - 1)).any()):
        raise ValueError(
            f"Expected class indices 0..{N_CLASSES - 1}, but prediction spans {int(p.min())}..{int(p.max())} and "
            f"target {int(t.min())}..{int(t.max())}. Map the labels first (BraTS label 4 is class 3)."
        )
    cell = (torch.arange(n, device=p.device)[:, None] * N_CLASSES + t) * N_CLASSES + p
    confusion = torch.bincount(cell.flatten(), minlength=n * N_CLASSES**2)
    confusion = confusion.view(n, N_CLASSES, N_CLASSES)  # (N, target, prediction)
    member = torch.zeros(len(ENTITIES), N_CLASSES, dtype=torch.bool, device=p.device)
    for row, classes in enumerate(ENTITIES.values()):
        member[row, list(classes)] = True
    in_target = member[:, :, None]  # (6, 4, 1)
    in_prediction = member[:, None, :]  # (6, 1, 4)
    cells = torch.stack(
        [in_target & in_prediction, ~in_target & in_prediction, in_target & ~in_prediction], dim=1
    )  # (6, 3, 4, 4)
    return (confusion[:, None, None] * cells).sum(dim=(-1, -2))  # (N, 6, 3)


def dice_from_counts(counts: torch.Tensor, empty: Empty) -> torch.Tensor:
    """Dice = 2 TP / (2 TP + FP + FN), in float64.

    Args:
        counts: integers (..., 3): TP, FP, FN.
        empty: the value where all three are zero (neither prediction nor reference holds the class): "nan" or "one".

    Returns:
        float64 (...), in [0, 1] or NaN. One side empty gives 0.
    """
    tp, fp, fn = counts.to(torch.float64).unbind(-1)
    total = 2 * tp + fp + fn
    undefined = torch.full_like(total, float("nan") if empty == "nan" else 1.0)
    return torch.where(total > 0, 2 * tp / total, undefined)


def mean_over_patients(dice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Average over patients, leaving NaN out and saying how many values remain.

    Args:
        dice: float (patients, ...).

    Returns:
        mean (...), NaN (never 0) where no patient has a value; and int64 n_valid (...).
    """
    valid = ~dice.isnan()
    n_valid = valid.sum(dim=0)
    return dice.nan_to_num(nan=0.0).where(valid, torch.zeros_like(dice)).sum(dim=0) / n_valid, n_valid


class PatientDice(Metric):
    """Dice per patient and entity on the volumes rebuilt from the slices that were given, in any order, on any rank.

    Args:
        n_patients: number of rows of the table.
        empty: convention for classes that neither prediction nor reference holds: "nan" or "one".

    Raises:
        ValueError: in `update`, if a row number is outside the table.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    counts: torch.Tensor
    slices: torch.Tensor

    def __init__(self, n_patients: int, empty: Empty = "nan") -> None:
        super().__init__()
        self.empty: Empty = empty
        self.add_state(
            "counts", torch.zeros(n_patients, len(ENTITIES), len(COUNTS), dtype=torch.int64), dist_reduce_fx="sum"
        )
        self.add_state("slices", torch.zeros(n_patients, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: torch.Tensor, target: torch.Tensor, patient: torch.Tensor) -> None:
        """Add slices: class indices (N, H, W) twice, and the row number of the patient of each, int64 (N,)."""
        n_patients = self.slices.shape[0]
        if patient.shape != prediction.shape[:1] or bool(((patient < 0) | (patient >= n_patients)).any()):
            raise ValueError(
                f"Expected one patient row in 0..{n_patients - 1} for each of {prediction.shape[0]} slices, "
                f"but got {patient.tolist()}."
            )
        patient = patient.to(device=self.counts.device, dtype=torch.int64)
        self.counts.index_add_(0, patient, entity_counts(prediction, target))
        self.slices.index_add_(0, patient, torch.ones_like(patient))

    def compute(self) -> torch.Tensor:
        """Give float64 (n_patients, 6); patients of whom no slice was seen are NaN under either convention."""
        dice = dice_from_counts(self.counts, self.empty)
        return torch.where(self.slices[:, None] > 0, dice, torch.full_like(dice, float("nan")))
