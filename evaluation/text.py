"""Numbers and tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def interval_text(value: float, low: float, high: float, digits: int = 3) -> str:
    """Format 0.812 (0.75–0.86), with a minus -0.02 (-0.05 to 0.01); without interval 0.812, and NaN as a dash."""
    if np.isnan(value):
        return "–"
    if np.isnan(low) or np.isnan(high):
        return f"{value:.{digits}f}"
    between = "–" if low >= 0 else " to "
    return f"{value:.{digits}f} ({low:.{digits - 1}f}{between}{high:.{digits - 1}f})"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows of cells out in columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
