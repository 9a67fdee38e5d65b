"""Judgement of segmented volumes: raw scores of every class and region, a named convention for empty ones, then means.

The three steps are apart because the second decides: the same predictions reach other means by the convention alone
(Maier-Hein et al., "Metrics reloaded", Nature Methods 2024). It says what stands where a score is not defined:

| convention | neither prediction nor reference holds the entity | one of them does |
|---|---|---|
| `nan` | left out of the mean | ratios 0, or left out where they are 0 / 0; distances the diagonal of the image |
| `one` | ratios 1, distances 0 | ratios 0; distances the diagonal of the image |
| `brats2023` | ratios 1, distances 0 | ratios 0; distances 374 mm |

Ratios are Dice, NSD, sensitivity, precision and the scores of matched lesions. nnU-Net and brats-evaluation average
Dice by `nan`, MONAI (`ignore_empty=False`) and Metrics Reloaded by `one`. The diagonal of the BraTS grid, 240 x 240 x
155 mm, is the 373.13 mm of the challenges before 2023. The lesion-wise scores of BraTS 2023 carry their own values for
all this, and volumes are always defined: no convention touches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from metrics.lesions import PENALTY_BRATS2023_MM, find_lesions, lesionwise_brats2023, match_lesions
from metrics.segmentation import COUNTS, ENTITIES, N_CLASSES
from metrics.statistics import bootstrap_mean
from metrics.surface_distance import HausdorffKind, Mask, assd, check_masks, content_box, nsd, surface_distances
from metrics.surface_distance import hausdorff as hausdorff_mm

Empty = Literal["nan", "one", "brats2023"]
Labels = npt.NDArray[np.uint8]

NSD_TOLERANCE_MM = 1.0
RATIOS = ("dice", "nsd_1mm", "sensitivity", "precision", "lesion_f1", "lesion_dice")
DISTANCES = ("hd95_mm", "hd100_mm", "assd_mm")
METRICS = (
    "dice", "hd95_mm", "hd100_mm", "assd_mm", "nsd_1mm", "sensitivity", "precision", "volume_reference_ml",
    "volume_prediction_ml", "volume_error_ml", "lesions_reference", "lesions_prediction", "lesions_tp", "lesions_fp",
    "lesions_fn", "lesion_f1", "lesion_dice", "lesion_dice_brats2023", "hd95_brats2023_mm",
)  # fmt: skip
"""Columns of the judgement that are averaged over patients."""


def judge_volume(
    prediction: Labels, reference: Labels, spacing_mm: Sequence[float], hausdorff: HausdorffKind = "maxdir"
) -> pd.DataFrame:
    """Score the segmentation of one patient: every class and region, raw, before any convention for empty ones.

    Args:
        prediction: class indices 0..3, any integer type, shape (X, Y, Z); a volume of one slice is judged in 2-D.
        reference: same shape.
        spacing_mm: size of a voxel along each axis.
        hausdorff: kind of `hd95_mm` and `hd100_mm` (`metrics.surface_distance.hausdorff`).

    Returns:
        One row per entity in the order of `ENTITIES`. `entity`; `tp`, `fp`, `fn` in voxels; the columns of `METRICS`:
        ratios are NaN where they are 0 / 0, distances NaN where neither side holds the entity and inf where one does,
        `volume_error_ml` is prediction - reference, the scores of BraTS 2023 are NaN in 2-D; and `diagonal_mm`, that of
        the volume.

    Raises:
        ValueError: if the shapes differ, the types are no integers, a class index is outside 0..3, or the spacing is
            not three positive numbers.
    """
    check_masks(prediction, reference, spacing_mm, axes=(3,))
    for name, labels in (("prediction", prediction), ("reference", reference)):
        if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0 or labels.max(initial=0) >= N_CLASSES:
            raise ValueError(
                f"Expected {name} to hold class indices 0..{N_CLASSES - 1} of an integer type, but it holds "
                f"{labels.min()}..{labels.max()} of {labels.dtype}. Map the labels first (BraTS label 4 is class 3)."
            )
    box = content_box((prediction != 0) | (reference != 0), margin=1)
    p, r = (np.ascontiguousarray(labels[box]) for labels in (prediction, reference))  # NIfTI comes in Fortran order
    scores = {
        classes: _scores(_mask(p, classes), _mask(r, classes), spacing_mm, hausdorff)
        for classes in set(ENTITIES.values())  # ET is the class enhancing: judged once
    }
    table = pd.DataFrame([{"entity": entity, **scores[classes]} for entity, classes in ENTITIES.items()])
    tp, fp, fn = (table[name] for name in COUNTS)
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    table = table.assign(
        dice=2 * tp / (2 * tp + fp + fn),
        sensitivity=tp / (tp + fn),
        precision=tp / (tp + fp),
        volume_reference_ml=(tp + fn) * voxel_ml,
        volume_prediction_ml=(tp + fp) * voxel_ml,
        volume_error_ml=(fp - fn) * voxel_ml,
        diagonal_mm=float(np.linalg.norm(np.array(prediction.shape) * spacing_mm)),
    )
    return table[["entity", *COUNTS, *METRICS, "diagonal_mm"]]


def apply_convention(table: pd.DataFrame, empty: Empty) -> pd.DataFrame:
    """Put the values of a named convention where raw scores are not defined (table above).

    Args:
        table: rows of `judge_volume`, of any number of patients.
        empty: "nan", "one" or "brats2023".

    Returns:
        A table of the same form, without inf; NaN is what the convention leaves out.
    """
    neither, one = _neither(table), _missed(table) | _false_positive(table)
    penalty_mm = PENALTY_BRATS2023_MM if empty == "brats2023" else table["diagonal_mm"]
    filled = table.copy()
    for name in DISTANCES:
        filled[name] = table[name].mask(one, penalty_mm)
    if empty != "nan":
        for name in DISTANCES:
            filled[name] = filled[name].mask(neither, 0.0)
        for name in RATIOS:
            filled[name] = table[name].mask(one, 0.0).mask(neither, 1.0)
    return filled


def summarize(table: pd.DataFrame, empty: Empty) -> pd.DataFrame:
    """Average every metric of every entity over patients, under a named convention.

    The mean over patients comes before any mean over classes: here for each entity apart, and who wants one number
    takes the mean of these means. The other order, the classes of each patient first, gives another number under "nan",
    as the classes of a patient who lacks some would count for more.

    Args:
        table: raw rows of `judge_volume`, one per case and entity. Patients are what is averaged and resampled: where a
            column `patient` says that cases are time points of one patient, their mean counts once.
        empty: "nan", "one" or "brats2023".

    Returns:
        One row per entity and metric: `entity`, `metric`, `mean`, `sd` (n - 1), `median`, `q25`, `q75` of the defined
        values; `n_valid` patients with a value; `n` cases, `n_both_empty` of them, `n_missed` (only the reference holds
        the entity), `n_false_positive` (only the prediction does); `ci_low`, `ci_high`, the 95 % bootstrap interval of
        the mean.
    """
    filled = apply_convention(table, empty)
    rows = []
    for entity, of_entity in filled.groupby("entity", sort=False):
        numbers = {
            "n": len(of_entity),
            "n_both_empty": int(_neither(of_entity).sum()),
            "n_missed": int(_missed(of_entity).sum()),
            "n_false_positive": int(_false_positive(of_entity).sum()),
        }
        patients = of_entity.get("patient", of_entity.index)
        of_patients = of_entity.groupby(patients, sort=False)[list(METRICS)].mean()
        for metric in METRICS:
            values = of_patients[metric].astype(float)
            mean = bootstrap_mean(values.to_numpy())
            rows.append(
                {
                    "entity": entity,
                    "metric": metric,
                    "mean": mean.estimate,
                    "sd": values.std(ddof=1),
                    "median": values.median(),
                    "q25": values.quantile(0.25),
                    "q75": values.quantile(0.75),
                    **numbers,
                    "n_valid": mean.n,
                    "ci_low": mean.low,
                    "ci_high": mean.high,
                }
            )
    return pd.DataFrame(rows)


def _mask(labels: Labels, classes: tuple[int, ...]) -> Mask:
    return reduce(np.logical_or, (labels == index for index in classes))


def _scores(
    prediction: Mask, reference: Mask, spacing_mm: Sequence[float], kind: HausdorffKind
) -> dict[str, float | int]:
    box = content_box(prediction | reference, margin=1)
    p, r = prediction[box], reference[box]
    distances = surface_distances(p, r, spacing_mm)
    p_lesions, r_lesions = find_lesions(p), find_lesions(r)
    lesions = match_lesions(p_lesions, r_lesions)
    tp, n_p, n_r = (int(np.count_nonzero(mask)) for mask in (p & r, p, r))
    scores: dict[str, float | int] = {
        "tp": tp,
        "fp": n_p - tp,
        "fn": n_r - tp,
        "hd95_mm": hausdorff_mm(distances, 95.0, kind),
        "hd100_mm": hausdorff_mm(distances, 100.0, kind),
        "assd_mm": assd(distances),
        "nsd_1mm": nsd(distances, NSD_TOLERANCE_MM),
        "lesions_reference": lesions.reference,
        "lesions_prediction": lesions.prediction,
        "lesions_tp": lesions.tp,
        "lesions_fp": lesions.fp,
        "lesions_fn": lesions.fn,
        "lesion_f1": lesions.f1,
        "lesion_dice": lesions.dice,
        "lesion_dice_brats2023": float("nan"),
        "hd95_brats2023_mm": float("nan"),
    }
    if 1 not in p.shape:
        brats2023 = lesionwise_brats2023(p_lesions, r_lesions, spacing_mm)
        scores |= {"lesion_dice_brats2023": brats2023.dice, "hd95_brats2023_mm": brats2023.hd95_mm}
    return scores


def _neither(table: pd.DataFrame) -> pd.Series[bool]:
    return table["tp"] + table["fp"] + table["fn"] == 0


def _missed(table: pd.DataFrame) -> pd.Series[bool]:
    return (table["tp"] + table["fp"] == 0) & (table["fn"] > 0)


def _false_positive(table: pd.DataFrame) -> pd.Series[bool]:
    return (table["tp"] + table["fn"] == 0) & (table["fp"] > 0)
