"""Curves of a run as CSV, beside those in TensorBoard."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from evaluation.curves import COLUMNS, FILE


class CurvesCSV(Logger):
    """Append every logged number to `<save_dir>/curves.csv`, one line each: step, metric, value.

    Step is what TensorBoard shows, the images seen. Lines are only ever added (Lightning's CSVLogger begins a new file
    when a run is resumed); those of an epoch that was repeated are there twice, and `read_curves` takes the last.

    Args:
        save_dir: folder of the run.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._path = Path(save_dir) / FILE

    @property
    def name(self) -> str:
        """None; the file is in the folder itself."""
        return ""

    @property
    def version(self) -> str:
        """None."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self._path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: argparse.Namespace | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Leave them to config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a line for every number but the epoch."""
        lines = [(step, name, float(value)) for name, value in metrics.items() if name != "epoch"]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        known = self._path.read_bytes() if self._path.is_file() else b""
        with self._path.open("a", newline="") as file:
            if known and not known.endswith(b"\n"):
                file.write("\n")  # behind a line that was cut off
            csv.writer(file).writerows(lines if known else [COLUMNS, *lines])
