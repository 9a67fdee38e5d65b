"""The charts of the report, each a function from numbers to a matplotlib Figure.

Charts come in a light and a dark theme (`evaluation.charts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from evaluation.charts import SERIES, Theme, box, fade, groups, legend, style

RELATIVE_TO_REAL_MAX = 2.0
"""Ratios and their intervals above this are cut off in the chart; the table holds them."""


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
