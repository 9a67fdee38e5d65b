"""What a judgement leaves on disk: tables, conventions and their text; written here, and read again to compare."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from datamodules.slice_set import write_atomically
from evaluation.cases import Case
from evaluation.figures import SHOWN_ENTITIES, SHOWN_METRICS
from evaluation.text import align, interval_text
from metrics.segmentation import COUNTS
from metrics.surface_distance import HausdorffKind
from metrics.volumes import METRICS, Empty, summarize

BOTH_EMPTY: tuple[Empty, Empty] = ("nan", "one")
"""The conventions under which Dice is always given."""
EMPTY_TEXT: dict[Empty, str] = {
    "nan": "absent from both: left out of the mean; absent from one: Dice 0, distances the diagonal of the image",
    "one": "absent from both: Dice 1, distances 0; absent from one: Dice 0, distances the diagonal of the image",
    "brats2023": "absent from both: Dice 1, distances 0; absent from one: Dice 0, distances 374 mm",
}
HAUSDORFF_TEXT: dict[HausdorffKind, str] = {
    "maxdir": "the larger of the two directed 95th percentiles",
    "pooled": "the 95th percentile of both directions together",
}
_NAMES = ("case", "patient", "entity", "slices", "prediction_file", "reference_file")
_HASHES = ("prediction_sha256", "reference_sha256")


@dataclass(frozen=True)
class Results:
    """What a folder of results holds.

    Attributes:
        folder: where they are.
        table: raw values, a row per case and entity.
        empty: convention for absent structures.
        hausdorff: kind of Hausdorff distances.
    """

    folder: Path
    table: pd.DataFrame
    empty: Empty
    hausdorff: HausdorffKind


def save_tables(out: Path, table: pd.DataFrame, cases: Sequence[Case], empty: Empty, hausdorff: HausdorffKind) -> None:
    """Write per_patient.csv, per_patient.parquet, summary.csv and summary.json, the last one last.

    Args:
        out: the folder.
        table: raw values with names and hashes, a row per case and entity.
        cases: what was judged.
        empty: convention of the summary; Dice comes under both `nan` and `one` besides.
        hausdorff: kind of Hausdorff distances in the table.
    """
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_atomically(out / "per_patient.parquet", buffer.getvalue())
    write_atomically(out / "per_patient.csv", table.to_csv(index=False))
    summary = summary_table(table, empty)
    write_atomically(out / "summary.csv", summary.to_csv(index=False))
    content = {
        "conventions": {
            "empty": empty,
            "empty_means": EMPTY_TEXT[empty],
            "hausdorff": hausdorff,
            "hausdorff_means": HAUSDORFF_TEXT[hausdorff],
            "slices": "all" if (table["slices"] == "all").all() else "given, see per_patient.csv",
            "labels_of_predictions": sorted({case.prediction.convention for case in cases}),
            "labels_of_references": sorted({case.reference.convention for case in cases}),
        },
        "cases": len(cases),
        "patients": len({case.patient for case in cases}),
        "summary": json.loads(summary.to_json(orient="records", double_precision=15)),  # NaN becomes null
    }
    write_atomically(out / "summary.json", json.dumps(content, indent=1) + "\n")


def summary_table(table: pd.DataFrame, empty: Empty) -> pd.DataFrame:
    """Summarize all metrics under a convention, and Dice under the others of `BOTH_EMPTY`; column `convention`."""
    parts = [summarize(table, empty).assign(convention=convention_name(empty))]
    for other in BOTH_EMPTY:
        if other != empty:
            summary = summarize(table, other).assign(convention=convention_name(other))
            parts.append(summary[summary["metric"] == "dice"])
    return pd.concat(parts, ignore_index=True)


def convention_name(empty: Empty) -> str:
    """Name a convention in a table; a mere "nan" would be read as a missing value."""
    return f"empty={empty}"


def read_results(folder: Path) -> Results:
    """Read the results in a folder, or in `evaluation` within a run folder.

    Raises:
        ValueError: if there are none.
    """
    places = [folder, folder / "evaluation"]
    place = next((place for place in places if (place / "summary.json").is_file()), None)
    if place is None:
        raise ValueError(
            f"Expected the results of `standin evaluate` in {folder} or {places[1]}, but there is no summary.json. "
            f"Make them: standin evaluate {folder / 'predictions'} REFERENCES {places[1]}"
        )
    conventions = json.loads((place / "summary.json").read_text())["conventions"]
    return Results(place, _read_table(place / "per_patient.csv"), conventions["empty"], conventions["hausdorff"])


def _read_table(path: Path) -> pd.DataFrame:
    names = dict.fromkeys((*_NAMES, *_HASHES), str)
    numbers = {name: ["", "nan"] for name in METRICS}
    table = pd.read_csv(path, dtype=names, keep_default_na=False, na_values=numbers, float_precision="round_trip")
    expected = {*names, *COUNTS, *METRICS}
    if not expected <= set(table.columns) or table.duplicated(["case", "entity"]).any():
        raise ValueError(f"{path}: expected the columns {', '.join(sorted(expected))} and each case and entity once.")
    return table


def results_text(out: Path) -> str:
    """Give the main numbers of the results in a folder as plain text, with the conventions and the counts of cases."""
    content = json.loads((out / "summary.json").read_text())
    conventions = content["conventions"]
    empty: Empty = conventions["empty"]
    other: Empty = "one" if empty == "nan" else "nan"
    rows = pd.read_csv(out / "summary.csv").to_dict("records")
    summary = {(row["convention"], row["entity"], row["metric"]): row for row in rows}
    counts = {"n_valid": "valid", "n_both_empty": "in neither", "n_missed": "missed", "n_false_positive": "false"}
    table = [["", *SHOWN_METRICS.values(), f"Dice ({other})", *counts.values()]]
    for entity in SHOWN_ENTITIES:
        cells = {metric: summary[convention_name(empty), entity, metric] for metric in SHOWN_METRICS}
        shown = [
            interval_text(cell["mean"], cell["ci_low"], cell["ci_high"], 2 if metric.endswith("_mm") else 3)
            for metric, cell in cells.items()
        ]
        under_other = f"{summary[convention_name(other), entity, 'dice']['mean']:.3f}"
        table.append([entity, *shown, under_other, *(str(cells["dice"][name]) for name in counts)])
    lines = [
        f"{content['cases']} cases of {content['patients']} patients; slices: {conventions['slices']}.",
        f"Convention for absent structures: {empty} ({conventions['empty_means']}).",
        f"Dice ({other}): the same with the convention {other}.",
        f"HD95: {conventions['hausdorff']} ({conventions['hausdorff_means']}).",
        "Mean over patients (95 % interval, bootstrap). Patients with a valid Dice; cases with the structure in",
        "neither reference nor prediction, only in the reference (missed), only in the prediction (false).",
        "",
    ]
    return "\n".join(lines + align(table))
