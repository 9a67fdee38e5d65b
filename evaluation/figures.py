"""The figures of a judgement and of a comparison: each a function from numbers to a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator

from datamodules.pictures import CLASS_COLOURS, overlay
from datamodules.slice_set import CLASSES
from evaluation.charts import BLUE, LIGHT, PICTURE, SERIES, Theme, box, groups, legend, style
from evaluation.examples import Example

SHOWN_ENTITIES = ("core", "oedema", "enhancing", "WT", "TC")
"""Groups of the charts; ET is the enhancing class and not drawn twice."""
SHOWN_METRICS = {
    "dice": "Dice",
    "hd95_mm": "HD95 (mm)",
    "nsd_1mm": "NSD at 1 mm",
    "lesion_f1": "F1 of lesions",
}
"""Metrics of the charts and of the printed tables, with their names."""
MM_TICKS = (0, 1, 3, 10, 30, 100, 300)
AGREEMENT = 1.96
"""Limits of agreement, in standard deviations of the differences (Bland and Altman, Lancet 1986)."""


def metric_boxes(table: pd.DataFrame, caption: str, theme: Theme = LIGHT) -> Figure:
    """Box plots of the main metrics over cases.

    Args:
        table: rows of the judgement with the convention put in; NaN is left out and shows in n.
        caption: names the conventions.
        theme: colours.
    """
    figure = Figure(figsize=(11, 7.3), facecolor=theme.background, layout="constrained")
    figure.suptitle(caption, size=9, color=theme.ink)
    for number, (metric, name) in enumerate(SHOWN_METRICS.items()):
        axes = style(figure.add_subplot(2, 2, number + 1), theme)
        names = []
        for group, entity in enumerate(SHOWN_ENTITIES):
            values = table.loc[table["entity"] == entity, metric].dropna().to_numpy(float)
            box(axes, group, values, 0.7, BLUE, theme, group)
            names.append(f"{entity}\nn = {len(values)}")
        _scale(axes, metric, float(table[metric].max()))
        axes.set_ylabel(name)
        groups(axes, names)
    return figure


def _scale(axes: Axes, metric: str, largest: float) -> None:
    """Distances up to the largest on a logarithmic axis that is linear below 1 mm; the other metrics from 0 to 1."""
    if metric.endswith("_mm"):
        _logarithmic(axes)
        axes.set_ylim(-0.1, 1.3 * np.nanmax([largest, 3.0]))
    else:
        axes.set_ylim(-0.02, 1.02)


def _logarithmic(axes: Axes) -> None:
    """Make the vertical axis logarithmic for both signs, linear between -1 and 1, with plain numbers."""
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_locator(FixedLocator(sorted({sign * tick for tick in MM_TICKS for sign in (-1, 1)})))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def volume_agreement(table: pd.DataFrame, theme: Theme = LIGHT) -> Figure:
    """Bland-Altman charts of the volumes in ml: difference (prediction - reference) against the mean of both."""
    figure = Figure(figsize=(11, 6.4), facecolor=theme.background, layout="constrained")
    for number, entity in enumerate(SHOWN_ENTITIES):
        axes = style(figure.add_subplot(2, 3, number + 1), theme)
        rows = table[table["entity"] == entity]
        reference, prediction = (rows[f"volume_{side}_ml"].to_numpy(float) for side in ("reference", "prediction"))
        difference = prediction - reference
        axes.scatter((prediction + reference) / 2, difference, s=16, color=BLUE, edgecolor=theme.background, lw=0.4)
        bias = difference.mean()
        spread = AGREEMENT * difference.std(ddof=1) if len(difference) > 1 else np.nan
        for value, dashes in ((bias, "-"), (bias - spread, "--"), (bias + spread, "--")):
            axes.axhline(value, color=theme.ink, linewidth=1, linestyle=dashes)
            axes.annotate(
                f"{value:+.3g}", (1, value), xycoords=("axes fraction", "data"), xytext=(2, 0), size=8,
                textcoords="offset points", va="center", color=theme.ink, annotation_clip=False,
            )  # fmt: skip
        axes.axhline(0, color=theme.muted, linewidth=0.7, linestyle=":")
        axes.set_title(entity, size=10, color=theme.ink)
        axes.set_xlabel("mean of both (ml)")
        axes.set_ylabel("prediction − reference (ml)")
    text = (
        "Every point is a case.\n\nSolid: mean difference (bias).\nDashed: limits of agreement,\n"
        f"bias ± {AGREEMENT} standard deviations."
    )
    axes = figure.add_subplot(2, 3, 6)
    axes.set_axis_off()
    axes.text(0.05, 0.95, text, va="top", size=9, color=theme.ink)
    return figure


def examples(rows: Sequence[Example]) -> Figure:
    """Show FLAIR, FLAIR with the reference and FLAIR with the prediction of some patients, a row each, on black."""
    height_in = 3.0
    figure = Figure(figsize=(11, height_in * len(rows) + 0.8), facecolor=PICTURE.background, layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False, width_ratios=(0.55, 1, 1, 1))
    for axes, row in zip(grid, rows, strict=True):
        nothing = np.zeros_like(row.reference)
        axes[0].text(1, 0.5, row.text, ha="right", va="center", size=9, color=PICTURE.ink)
        for place, label in zip(axes[1:], (nothing, row.reference, row.prediction), strict=True):
            place.imshow(overlay(row.flair, label), aspect=row.pixel_aspect, interpolation="nearest")
        for place in axes:
            place.set_axis_off()
    for place, title in zip(grid[0, 1:], ("FLAIR", "reference", "prediction"), strict=True):
        place.set_title(title, size=10, color=PICTURE.ink)
    handles = [
        Patch(color=f"#{bytes(colour).hex()}", label=name)
        for colour, name in zip(CLASS_COLOURS, CLASSES[1:], strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower right", ncol=3, frameon=False, fontsize=9, labelcolor=PICTURE.ink)
    return figure


def comparison(
    values: Mapping[str, Mapping[str, pd.Series[float]]],
    rows: pd.DataFrame,
    metric: str,
    name: str,
    caption: str,
    theme: Theme = LIGHT,
) -> Figure:
    """Box plots of all arms side by side for every entity, and below, paired differences from the first arm.

    Args:
        values: arm -> entity -> mean over seeds of each patient, the first arm being the baseline; NaN is left out.
        rows: of `compare.comparison_table`, for this metric and one convention: the intervals of the differences.
        metric: column of the judgement.
        name: what the axis says.
        caption: names the conventions.
        theme: colours.
    """
    arms = list(values)
    figure = Figure(figsize=(11, 7), facecolor=theme.background, layout="constrained")
    above, below = (style(figure.add_subplot(2, 1, place), theme) for place in (1, 2))
    width = 0.8 / len(arms)
    intervals = rows.set_index(["arm", "entity"]).to_dict("index")
    for number, (arm, of_arm) in enumerate(values.items()):
        colour = SERIES[number % len(SERIES)]
        for group, (entity, series) in enumerate(of_arm.items()):
            x = group + (number - (len(arms) - 1) / 2) * width
            box(above, x, series.dropna().to_numpy(float), width, colour, theme, group)
            if number:
                paired = (series - values[arms[0]][entity]).dropna().to_numpy(float)
                spread = np.random.default_rng(group).uniform(-0.3, 0.3, len(paired)) * width
                below.scatter(x + spread, paired, s=11, color=colour, edgecolor=theme.background, linewidth=0.4)
                found = intervals[arm, entity]
                below.vlines(x, found["difference_low"], found["difference_high"], color=theme.ink, linewidth=2)
                below.scatter([x], [found["difference"]], s=42, marker="D", color=theme.ink, zorder=3)
    _scale(above, metric, max(series.max() for of_arm in values.values() for series in of_arm.values()))
    above.set_ylabel(name)
    below.set_ylabel(f"{name}: difference from {arms[0]}")
    below.axhline(0, color=theme.muted, linewidth=1, linestyle="--")
    if metric.endswith("_mm"):
        _logarithmic(below)
    for axes in (above, below):
        groups(axes, SHOWN_ENTITIES)
    legend(figure, arms, theme)
    below.set_title(f"{caption} Diamond and line: mean difference with 95 % interval.", size=9, color=theme.ink)
    return figure
