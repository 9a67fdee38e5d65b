"""The charts of the report, each a function from numbers to a matplotlib Figure.

Charts come in a light and a dark theme (`evaluation.charts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from evaluation.charts import SERIES, Theme, box, fade, groups, legend, rows, style

RELATIVE_TO_REAL_MAX = 2.0
"""Ratios and their intervals above this are cut off in the chart; the table holds them."""


def patient_boxes(
    values_of: Mapping[str, pd.DataFrame], entities: Sequence[str], label: str, top: float | None, theme: Theme
) -> Figure:
    """Box plots of a number per patient with every patient as a point.

    Args:
        values_of: arm -> (patients x entities).
        entities: groups of boxes.
        label: of the axis.
        top: of the axis; None: what the values need.
        theme: colours.
    """
    figure = Figure(figsize=(11, 4.0), facecolor=theme.background, layout="constrained")
    axes = style(figure.add_subplot(), theme)
    width = 0.8 / len(values_of)
    for number, table in enumerate(values_of.values()):
        colour = SERIES[number % len(SERIES)]
        for group, entity in enumerate(entities):
            values = table[entity].dropna().to_numpy(float)
            x = group + (number - (len(values_of) - 1) / 2) * width
            box(axes, x, values, width, colour, theme, (number, group))
    if top is not None:
        axes.set_ylim(-0.02 * top, 1.02 * top)
    axes.set_ylabel(label)
    groups(axes, entities)
    legend(figure, list(values_of), theme)
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


def arm_boxes(values_of: Mapping[str, pd.Series], colours: Sequence[int], label: str, theme: Theme) -> Figure:
    """Box plots of a number per patient, one lying row per arm.

    Args:
        values_of: arm -> (patients,).
        colours: their numbers in `SERIES`.
        label: of the axis.
        theme: colours.
    """
    figure = Figure(figsize=(11, 0.8 + 0.27 * len(values_of)), facecolor=theme.background, layout="constrained")
    axes = style(figure.add_subplot(), theme)
    for row, (values, colour) in enumerate(zip(values_of.values(), colours, strict=True)):
        box(axes, row, values.dropna().to_numpy(float), 0.8, SERIES[colour], theme, row, lying=True)
    rows(axes, list(values_of), theme)
    axes.set_xlabel(label)
    return figure


def ratio_rows(ratios: pd.DataFrame, colours: Sequence[int], theme: Theme) -> Figure:
    """A forest plot: the ratio to the real arm and its 95 % interval, one row per arm.

    Args:
        ratios: columns arm, ratio, ci_low, ci_high; a row per arm.
        colours: their numbers in `SERIES`.
        theme: colours.
    """
    figure = Figure(figsize=(11, 0.8 + 0.27 * len(ratios)), facecolor=theme.background, layout="constrained")
    axes = style(figure.add_subplot(), theme)
    cut = ratios[["ratio", "ci_low", "ci_high"]].clip(upper=RELATIVE_TO_REAL_MAX).to_numpy(float)
    for row, (colour, (ratio, low, high)) in enumerate(zip(colours, cut, strict=True)):
        axes.hlines(row, low, high, color=SERIES[colour], linewidth=2)
        axes.plot(ratio, row, "o", color=SERIES[colour], markersize=6)
    axes.axvline(1.0, color=theme.muted, linewidth=1, linestyle="--")
    rows(axes, list(ratios["arm"]), theme)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("Dice relative to real")
    return figure


def curves(panels: Mapping[str, pd.DataFrame], arms: Mapping[str, int], label: str, theme: Theme) -> Figure:
    """Lines over images seen, one per arm; those of single runs thin behind them where there are several.

    Args:
        panels: title -> columns run, arm, images_seen, value.
        arms: arm -> number of its colour in `SERIES`.
        label: of the vertical axes.
        theme: colours.
    """
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 0.5 + 3.2 * lines), facecolor=theme.background, layout="constrained")
    for place, (title, table) in enumerate(panels.items()):
        axes = style(figure.add_subplot(lines, min(2, len(panels)), place + 1), theme)
        axes.set_title(title, color=theme.ink, size=9, loc="left")
        for arm, one in table.groupby("arm", sort=False):
            colour = SERIES[arms[str(arm)] % len(SERIES)]
            runs = [run for _, run in one.groupby("run")]
            for run in runs if len(runs) > 1 else []:
                axes.plot(run["images_seen"], run["value"], color=colour, linewidth=0.7, alpha=0.45)
            mean = one.groupby("images_seen")["value"].mean()
            axes.plot(mean.index, mean, color=colour, linewidth=1.8, marker="o", markersize=3)
        axes.set_xlabel("training images seen")
        axes.set_ylabel(label)
    return figure
