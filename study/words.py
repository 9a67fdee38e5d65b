"""Numbers of the report as words, and the rows of its tables."""

from __future__ import annotations

from typing import Any

import pandas as pd

from study.arms import CLASS_MEAN

SHOWN_ENTITIES = ("core", "oedema", "enhancing", "WT", "TC", CLASS_MEAN)
"""Of the page; ET equals enhancing and is in the CSV tables only."""

FEW_ARMS = 6
"""More are shown in rows."""

Tables = dict[str, pd.DataFrame]


def rows_of(table: pd.DataFrame, **where: str) -> list[dict[str, Any]]:
    """The rows in which these columns have these values."""
    for column, value in where.items():
        table = table[table[column] == value] if column in table else table[:0]
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def number(value: float, digits: int = 3) -> str:
    """Format a Dice or a correlation; NaN is a dash."""
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def short(value: float) -> str:
    """Format to four digits; whole numbers in full, and NaN is a dash."""
    return "–" if pd.isna(value) else f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"


def percent(value: float, digits: int = 1) -> str:
    """Format a share; NaN is a dash."""
    return "–" if pd.isna(value) else f"{100 * value:.{digits}f}\u00a0%"


def interval(value: float, low: float, high: float) -> str:
    """Format 0.812 (0.75–0.86)."""
    return number(value) if pd.isna(low) else f"{number(value)} ({low:.2f}–{high:.2f})"


def percent_interval(value: float, low: float, high: float, long: bool = False) -> str:
    """Format 87.1 % (80–93), or with `long` 87.1 % (95 % interval 80 to 93 %)."""
    if pd.isna(value) or pd.isna(low):
        return percent(value)
    inside = (
        f"95\u00a0% interval {100 * low:.0f} to {100 * high:.0f}\u00a0%"
        if long
        else f"{100 * low:.0f}–{100 * high:.0f}"
    )
    return f"{percent(value)} ({inside})"
