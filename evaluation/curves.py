"""The curves of a run, as `callbacks.CurvesCSV` writes them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

COLUMNS = ("step", "metric", "value")
FILE = "curves.csv"


def read_curves(folder: Path) -> pd.DataFrame:
    """Read the curves of a run: step, metric, value, sorted by metric and step; empty if the run has none.

    A line that a crash has cut off is passed over.
    """
    path = folder / FILE
    if not path.is_file() or not path.stat().st_size:
        return pd.DataFrame(columns=list(COLUMNS))
    table = pd.read_csv(path, on_bad_lines="skip").dropna(subset=list(COLUMNS[:2]))
    table = table.drop_duplicates(["step", "metric"], keep="last")
    return table.sort_values(["metric", "step"], ignore_index=True)
