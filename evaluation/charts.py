"""Parts of charts: themes, colours, axes and box plots in which every patient is a point.

Figures are made without pyplot, so nothing global is touched and nothing stays open. Colours: Okabe and Ito (2008),
told apart with any colour vision.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

BLUE, ORANGE, GREEN, SKY, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
SERIES = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE)
DPI = 150


@dataclass(frozen=True)
class Theme:
    """The colours of a chart."""

    background: str
    ink: str
    muted: str
    grid: str


LIGHT = Theme("#ffffff", "#1c2128", "#57606a", "#e1e4e8")
DARK = Theme("#161b22", "#e6edf3", "#9aa4af", "#30363d")
PICTURE = Theme("#000000", "#e6edf3", "#9aa4af", "#000000")


def to_png(figure: Figure) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def to_svg(figure: Figure) -> bytes:
    """Render a figure for print and for changes by hand; text stays text."""
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "standin"}):
        figure.savefig(buffer, format="svg", facecolor=figure.get_facecolor(), metadata={"Date": None})
    return buffer.getvalue()


def style(axes: Axes, theme: Theme) -> Axes:
    """Give axes the look of all charts."""
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0, labelcolor=theme.ink)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    axes.grid(axis="y", color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def box(
    axes: Axes,
    at: float,
    values: npt.NDArray[Any],
    width: float,
    colour: str,
    theme: Theme,
    seed: int | Sequence[int],
    lying: bool = False,
) -> None:
    """Draw the box plot of values (n,) at a place of the axis, with every value as a point beside the middle line.

    Box: quartiles and median; whiskers reach 1.5 box lengths. `seed` decides how the points are spread. With `lying`
    the values are on the horizontal axis.
    """
    line = {"color": colour, "linewidth": 1.3}
    axes.boxplot(
        [values], positions=[at], widths=width * 0.78, showfliers=False, patch_artist=True, manage_ticks=False,
        boxprops={"facecolor": fade(colour, theme), "edgecolor": colour, "linewidth": 1.3},
        medianprops={"color": colour, "linewidth": 2.2}, whiskerprops=line, capprops=line,
        orientation="horizontal" if lying else "vertical",
    )  # fmt: skip
    places = at + np.random.default_rng(seed).uniform(-0.22, 0.22, len(values)) * width
    x, y = (values, places) if lying else (places, values)
    axes.scatter(x, y, s=11, color=colour, edgecolor=theme.background, linewidth=0.4, zorder=3)


def rows(axes: Axes, names: Sequence[str], theme: Theme) -> None:
    """Name the rows at 0, 1, ... of the vertical axis, the first one at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=theme.grid, linewidth=0.7)


def groups(axes: Axes, names: Sequence[str]) -> None:
    """Name the groups at 0, 1, ... of the horizontal axis."""
    axes.set_xticks(range(len(names)), [name.replace(" of ", "\nof ") for name in names])
    axes.set_xlim(-0.55, len(names) - 0.45)


def legend(figure: Figure, names: Sequence[str], theme: Theme, colours: Sequence[int] | None = None) -> None:
    """Name the series above the chart; `colours` are their numbers in `SERIES`, by default 0, 1, ..."""
    numbers = range(len(names)) if colours is None else colours
    handles: list[Any] = [
        Patch(color=SERIES[i % len(SERIES)], label=name) for i, name in zip(numbers, names, strict=True)
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncol=min(4, len(names)), frameon=False, fontsize=9,
        labelcolor=theme.ink, handlelength=1.0, handleheight=1.0,
    )  # fmt: skip


def fade(colour: str, theme: Theme) -> tuple[float, float, float]:
    """Mix a colour with the background."""
    mine, back = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for c in (colour, theme.background))
    red, green, blue = (0.35 * mine + 0.65 * back).tolist()
    return red, green, blue
