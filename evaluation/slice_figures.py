"""Pictures of slices side by side, and how near they come to training slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from datamodules.pictures import CLASS_COLOURS, panels
from datamodules.slice_set import CHANNELS, CLASSES, Slices
from evaluation.charts import BLUE, ORANGE, PICTURE, Theme, style

HELD_OUT, SYNTHETIC = BLUE, ORANGE


@dataclass(frozen=True)
class PictureRow:
    """Slices (5, H, W) side by side with some text; all but the first may be missing."""

    text: str
    slices: Sequence[Slices | None]


def slice_rows(rows: Sequence[PictureRow], titles: Sequence[str]) -> Figure:
    """Show rows of slices, each as T1, T1ce, T2, FLAIR and FLAIR with the label in colour, on black.

    Args:
        rows: with as many slices as there are titles.
        titles: of the blocks side by side.
    """
    blank = np.zeros_like(rows[0].slices[0])
    shown = [[blank if one is None else one for one in row.slices] for row in rows]
    window = _heads(np.stack([one for row in shown for one in row]))
    blocks = [_mosaic([panels(row[side][window]) for row in shown]) for side in range(len(titles))]
    height, width, _ = blocks[0].shape
    text_in = 1.1 if any(row.text for row in rows) else 0.1
    block_in, gap_in, top_in, bottom_in = (12.0 - text_in) / 2, 0.2, 0.55, 0.4
    block_height_in = block_in * height / width
    total = (text_in + len(titles) * (block_in + gap_in) - gap_in, top_in + block_height_in + bottom_in)
    figure = Figure(figsize=total, facecolor=PICTURE.background)
    step = width / len(CHANNELS)
    for number, (block, title) in enumerate(zip(blocks, titles, strict=True)):
        left = (text_in + number * (block_in + gap_in)) / total[0]
        axes = figure.add_axes((left, bottom_in / total[1], block_in / total[0], block_height_in / total[1]))
        axes.imshow(block, interpolation="nearest" if step < 120 else "antialiased", aspect="auto")
        axes.set_axis_off()
        for column, name in enumerate((*CHANNELS[:4], "FLAIR + label")):
            axes.text(
                (column + 0.5) * step, -4 * height / 400, name, ha="center", va="bottom", size=8, color=PICTURE.muted
            )
        figure.text(left, 1 - 0.12 / total[1], title, size=10, color=PICTURE.ink, va="top", weight="bold")
    row_in = block_height_in / len(rows)
    for number, row in enumerate(rows):
        y = 1 - (top_in + (number + 0.5) * row_in) / total[1]
        figure.text((text_in - 0.12) / total[0], y, row.text, ha="right", va="center", size=8.5, color=PICTURE.ink)
    handles = [
        Patch(color=f"#{bytes(colour).hex()}", label=name)
        for colour, name in zip(CLASS_COLOURS, CLASSES[1:], strict=True)
    ]
    figure.legend(
        handles=handles, loc="lower right", ncol=3, frameon=False, fontsize=8.5, labelcolor=PICTURE.ink,
        borderaxespad=0.2,
    )  # fmt: skip
    return figure


def correlation_densities(
    synthetic: Mapping[str, npt.ArrayLike], held_out: Mapping[str, npt.ArrayLike], quantile: float, theme: Theme
) -> Figure:
    """Densities of the largest correlation with any training slice: synthetic and held-out, jointly and per modality.

    Args:
        synthetic: values per image; the first entry (all modalities jointly) gets the large panel.
        held_out: the same for held-out slices.
        quantile: of the held-out values, drawn as a line.
        theme: colours.
    """
    figure = Figure(figsize=(11, 3.9), facecolor=theme.background, layout="constrained")
    grid = figure.add_gridspec(2, 4)
    names = list(synthetic)
    places = [grid[:, :2], grid[0, 2], grid[0, 3], grid[1, 2], grid[1, 3]]
    for number, (name, place) in enumerate(zip(names, places, strict=False)):
        axes = style(figure.add_subplot(place), theme)
        x, y = (np.asarray(values[name], float) for values in (synthetic, held_out))
        x, y = x[~np.isnan(x)], y[~np.isnan(y)]
        axes.set_title(name if number else "all four modalities together", size=9 if number else 10, color=theme.ink)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        if not x.size or not y.size:
            axes.text(0.5, 0.5, "undefined", transform=axes.transAxes, ha="center", color=theme.muted)
            continue
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        bins = np.linspace(low, max(high, low + 1e-6), 41 if number == 0 else 25)
        for values, colour, label in ((y, HELD_OUT, "held-out real slices"), (x, SYNTHETIC, "synthetic slices")):
            axes.hist(values, bins=bins.tolist(), density=True, color=colour, alpha=0.30)
            axes.hist(
                values, bins=bins.tolist(), density=True, color=colour, histtype="step", linewidth=1.4, label=label
            )
        threshold = float(np.quantile(y, quantile))
        label = f"{quantile:.0%} of held-out slices lie below"
        axes.axvline(threshold, color=theme.ink, linewidth=1, linestyle="--", label=label)
        if number == 0:
            axes.set_xlabel("largest Pearson correlation with any training slice")
            axes.set_ylabel("density")
            figure.legend(
                *axes.get_legend_handles_labels(), loc="outside upper left", ncol=3, frameon=False, fontsize=9,
                labelcolor=theme.ink,
            )  # fmt: skip
    return figure


def _heads(slices: Slices) -> tuple[slice, ...]:
    """The window (all channels, rows, columns) outside of which every slice (N, 5, H, W) is dark."""
    bright = np.nonzero(slices[:, :4] > 24)
    if not bright[0].size:
        return (slice(None),)
    rows, columns = (slice(max(0, int(axis.min()) - 2), int(axis.max()) + 3) for axis in bright[2:])
    return slice(None), rows, columns


def _mosaic(rows: Sequence[Sequence[npt.NDArray[np.uint8]]]) -> npt.NDArray[np.uint8]:
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
