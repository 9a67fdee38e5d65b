"""The figures of the report: pictures of slices and charts, each a function from numbers to a matplotlib Figure.

Charts come in a light and a dark theme (`evaluation.charts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from datamodules.pictures import CLASS_COLOURS, panels
from datamodules.slice_set import CHANNELS, CLASSES, Slices
from evaluation.charts import BLUE, ORANGE, PICTURE, SERIES, Theme, box, fade, groups, legend, style

HELD_OUT, SYNTHETIC = BLUE, ORANGE
RELATIVE_TO_REAL_MAX = 2.0
"""Ratios and their intervals above this are cut off in the chart; the table holds them."""


@dataclass(frozen=True)
class PictureRow:
    """Two slices (5, H, W) side by side with a line of text; the right one may be missing."""

    text: str
    left: Slices
    right: Slices | None


def picture_pairs(rows: Sequence[PictureRow], left_title: str, right_title: str) -> Figure:
    """Show rows of two slices, each as T1, T1ce, T2, FLAIR and FLAIR with the label in colour, on black."""
    pairs = [(row.left, row.right if row.right is not None else np.zeros_like(row.left)) for row in rows]
    window = _heads(np.stack([one for pair in pairs for one in pair]))
    blocks = [_mosaic([panels(pair[side][window]) for pair in pairs]) for side in range(2)]
    height, width, _ = blocks[0].shape
    text_in = 1.1 if any(row.text for row in rows) else 0.1
    block_in, gap_in, top_in, bottom_in = (12.0 - text_in) / 2, 0.2, 0.55, 0.4
    block_height_in = block_in * height / width
    total = (text_in + 2 * block_in + gap_in, top_in + block_height_in + bottom_in)
    figure = Figure(figsize=total, facecolor=PICTURE.background)
    step = width / len(CHANNELS)
    for number, (block, title) in enumerate(zip(blocks, (left_title, right_title), strict=True)):
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


def dice_boxes(dice: Mapping[str, pd.DataFrame], entities: Sequence[str], theme: Theme) -> Figure:
    """Box plots of Dice per patient with every patient as a point; `dice` maps arm to (patients x entities)."""
    figure = Figure(figsize=(11, 4.0), facecolor=theme.background, layout="constrained")
    axes = style(figure.add_subplot(), theme)
    width = 0.8 / len(dice)
    for number, table in enumerate(dice.values()):
        colour = SERIES[number % len(SERIES)]
        for group, entity in enumerate(entities):
            values = table[entity].dropna().to_numpy(float)
            x = group + (number - (len(dice) - 1) / 2) * width
            box(axes, x, values, width, colour, theme, (number, group))
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("Dice per patient")
    groups(axes, entities)
    legend(figure, list(dice), theme)
    return figure


def ratio_bars(ratios: pd.DataFrame, arms: Sequence[str], entities: Sequence[str], theme: Theme) -> Figure:
    """Bars of mean Dice relative to the real arm with 95 % intervals.

    Args:
        ratios: columns arm, entity, ratio, ci_low, ci_high.
        arms: all arms in the order of the colours (the real ones have no bars).
        entities: groups of bars.
        theme: colours.
    """
    figure = Figure(figsize=(11, 3.7), facecolor=theme.background, layout="constrained")
    axes = style(figure.add_subplot(), theme)
    shown = [arm for arm in arms if (ratios["arm"] == arm).any()]
    width = 0.8 / max(1, len(shown))
    top = 1.1
    for number, arm in enumerate(shown):
        rows = ratios[ratios["arm"] == arm].set_index("entity").loc[list(entities)]
        x = np.arange(len(entities)) + (number - (len(shown) - 1) / 2) * width
        height = rows["ratio"].clip(upper=RELATIVE_TO_REAL_MAX)
        colour = SERIES[list(arms).index(arm) % len(SERIES)]
        axes.bar(x, height, width * 0.86, color=fade(colour, theme), edgecolor=colour, linewidth=1.3)
        low, high = rows["ci_low"], rows["ci_high"].clip(upper=RELATIVE_TO_REAL_MAX)
        axes.vlines(x, low, high, color=theme.ink, linewidth=1.3)
        top = max(top, float(np.nanmax([height.max(), high.max(), 0])) + 0.05)
        for position, value in zip(x, rows["ratio"], strict=True):
            text = "undefined" if np.isnan(value) else f"{value:.0%}"
            axes.text(position, 0.02, text, ha="center", va="bottom", size=8, color=theme.ink)
    axes.axhline(1.0, color=theme.muted, linewidth=1, linestyle="--")
    axes.set_ylim(0, top)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("Dice relative to real")
    groups(axes, entities)
    legend(figure, shown, theme, [list(arms).index(arm) for arm in shown])
    return figure


def class_bars(classes: pd.DataFrame, theme: Theme) -> Figure:
    """Share of slices with each class and mean area where present; columns as in `results.class_table`."""
    figure = Figure(figsize=(11, 3.3), facecolor=theme.background, layout="constrained")
    sets, shown = list(dict.fromkeys(classes["set"])), list(dict.fromkeys(classes["class"]))
    width = 0.8 / len(sets)
    quantities = (("share_with_class", "slices with the class"), ("mean_area_cm2", "mean area where present (cm²)"))
    for column, (quantity, label) in enumerate(quantities):
        axes = style(figure.add_subplot(1, 2, column + 1), theme)
        for number, name in enumerate(sets):
            rows = classes[classes["set"] == name].set_index("class").loc[shown]
            x = np.arange(len(shown)) + (number - (len(sets) - 1) / 2) * width
            colour = SERIES[number % len(SERIES)]
            axes.bar(x, rows[quantity], width * 0.86, color=fade(colour, theme), edgecolor=colour, linewidth=1.3)
        axes.set_ylabel(label)
        if column == 0:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        groups(axes, shown)
    legend(figure, sets, theme)
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
