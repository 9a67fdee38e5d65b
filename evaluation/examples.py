"""The patients with the best, the median and the worst Dice, as slices to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.layouts import read_nifti
from datamodules.slice_set import CLASSES, to_display
from evaluation.cases import Case
from evaluation.judgement import judged_part, read_label_map

WHITE_PERCENTILE = 99.8
"""Of the FLAIR of a slice inside the head, shown as white."""
MARGIN_PX = 6

Grey = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Example:
    """One axial slice of a patient: grey levels and class indices as rows and columns on the screen, (H, W) each.

    Attributes:
        text: who it is, and the scores.
        flair: grey levels.
        reference: class indices.
        prediction: class indices.
        pixel_aspect: height of a pixel over its width.
    """

    text: str
    flair: Grey
    reference: Grey
    prediction: Grey
    pixel_aspect: float


def best_median_worst(cases: Sequence[Case], table: pd.DataFrame) -> list[Example]:
    """Show the slice with most tumour of the cases with the best, median and worst Dice, the mean over the classes.

    Args:
        cases: those without an image are passed over.
        table: rows of the judgement, with the convention put in; cases without a valid Dice are passed over.
    """
    by_name = {case.name: case for case in cases if case.flair is not None}
    dice = table.pivot(index="case", columns="entity", values="dice")[list(CLASSES[1:])]
    mean = dice[dice.index.isin(by_name)].mean(axis=1).dropna().sort_values(kind="stable")
    words: dict[int, str] = {}
    for word, place in (("best", len(mean) - 1), ("worst", 0), ("median", len(mean) // 2)):
        if len(mean):
            words.setdefault(place, word)
    examples = []
    for place in sorted(words, reverse=True):
        name = str(mean.index[place])
        scores = [f"{entity} {'–' if np.isnan(value) else f'{value:.3f}'}" for entity, value in dice.loc[name].items()]
        text = "\n".join([words[place], name, f"mean Dice {mean.iloc[place]:.3f}", "", *scores])
        examples.append(_example(by_name[name], text))
    return examples


def _example(case: Case, text: str) -> Example:
    assert case.flair is not None
    path, channel = case.flair
    image = read_nifti(path.read_bytes(), path.name)
    flair = image.array if channel is None else image.array[..., channel]
    prediction, reference = (
        judged_part(case, read_label_map(file.path.read_bytes(), file)).classes for file in case.files.values()
    )
    tumour = reference if reference.any() else prediction
    z = int((tumour > 0).sum(axis=(0, 1)).argmax())
    one = flair[:, :, z]
    head = one > 0
    white = np.percentile(one[head], WHITE_PERCENTILE) if head.any() else 1.0
    grey = np.clip(one / white * 255, 0, 255).astype(np.uint8)
    window = _window(head | (prediction[:, :, z] > 0) | (reference[:, :, z] > 0))
    width_mm, height_mm, _ = image.spacing_mm
    return Example(
        text=text,
        flair=to_display(grey[window]),
        reference=to_display(reference[:, :, z][window]),
        prediction=to_display(prediction[:, :, z][window]),
        pixel_aspect=height_mm / width_mm,
    )


def _window(mask: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    """The box of a mask with a margin; everything where it is empty."""
    places = np.nonzero(mask)
    if not places[0].size:
        return (slice(None), slice(None))
    return tuple(slice(max(0, int(axis.min()) - MARGIN_PX), int(axis.max()) + MARGIN_PX + 1) for axis in places)
