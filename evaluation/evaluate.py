"""`standin evaluate`: judge any folder of label maps per patient and in mm, and leave no case out in silence.

All pairs are read and checked before the first is judged. Judgements are kept in `OUT/.judged` under the hashes of both
files, so the same command goes on where a killed one stopped, and another convention needs no new judgement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
from rich.console import Console

from datamodules.checks import fault_table
from datamodules.layouts import Fault
from datamodules.parallel import available_cores, run_in_processes
from datamodules.slice_set import write_atomically
from evaluation.cases import Case, KnownLabels, find_cases
from evaluation.charts import to_png
from evaluation.examples import best_median_worst
from evaluation.figures import examples, metric_boxes, volume_agreement
from evaluation.judgement import check_case, judge_case, slices_text
from evaluation.results import results_text, save_tables
from metrics.surface_distance import HausdorffKind
from metrics.volumes import Empty, apply_convention


def evaluate(
    predictions: Path,
    references: Path,
    out: Path,
    labels: KnownLabels | Literal["reference"] | dict[str, int] | None = None,
    reference_labels: KnownLabels | dict[str, int] | None = None,
    cases: Path | None = None,
    slices: Path | None = None,
    ignore_extra: bool = False,
    empty: Empty = "nan",
    hausdorff: HausdorffKind = "maxdir",
    workers: int | None = None,
) -> None:
    """Judge label maps per patient: classes and BraTS regions, in 3-D, in mm, each number with its convention.

    A missing prediction, a prediction without reference, another shape or affine (by more than 0.001 mm), an unknown
    label or an unreadable file is an error, and all come in one table. The same command again continues after an
    interruption.

    Args:
        predictions: folder of label maps CASE.nii.gz or CASE.nii, such as nnU-Net's output or RUN_DIR/predictions.
        references: BraTS folder, or folder of label maps of the same names.
        out: folder for per_patient.csv, summary.csv, summary.json and figures; new, empty, or left by this command.
        labels: codes of the predictions: brats2021 (core 1, oedema 2, enhancing 4; since 2018), brats2023 (1, 2, 3),
            brats2024 (1, 2, 3; 4 is background), msd (2, 1, 3), reference (as the references; StandIn writes these), or
            a mapping such as '{core: 2, oedema: 1, enhancing: 3}'. null: brats2021 where a 4 without a 3 tells it.
        reference_labels: codes of references that are no BraTS folder; null: as the predictions.
        cases: which cases must be there: a text file with a name per line, or a slice set, of which the test split
            counts; null: all references.
        slices: a slice set; only the axial slices that it holds are judged, the others are background on both sides.
            null: all slices.
        ignore_extra: pass over predictions of other cases.
        empty: a structure absent from reference and prediction is left out (nan), or has Dice 1 and distance 0 (one,
            brats2023).
        hausdorff: the larger 95th percentile of the two directions (maxdir), or that of both together (pooled).
        workers: processes; null takes one per core.

    Raises:
        ValueError: a table of all faults of all cases, before anything is judged.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: expected 1 or more, or null for one per core.")
    found, faults = find_cases(predictions, references, labels, reference_labels, cases, slices, ignore_extra)
    judge_cases(found, out, empty, hausdorff, workers or available_cores(), faults)
    Console(soft_wrap=True, markup=False, highlight=False).print(f"\n{results_text(out)}\n\nResults: {out}\n")


def judge_cases(
    cases: Iterable[Case],
    out: Path,
    empty: Empty = "nan",
    hausdorff: HausdorffKind = "maxdir",
    workers: int = 1,
    faults: Sequence[Fault] = (),
) -> pd.DataFrame:
    """Check and judge cases and write tables and figures.

    Args:
        cases: at least one, of different names.
        out: folder for the results; new, empty, or left by an earlier judgement.
        empty: convention of the summary for structures that are absent from one side or both.
        hausdorff: kind of Hausdorff distances.
        workers: processes.
        faults: found before; they are reported together with those of the files.

    Returns:
        One row per case and entity, raw values, as in per_patient.csv.

    Raises:
        ValueError: a table of all faults, before anything is judged; or if `out` holds something else.
    """
    cases = list(cases)
    records = out / ".judged"
    if out.exists() and not records.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no judgement. Choose another folder.")
    checks = run_in_processes(partial(check_case, records=records, hausdorff=hausdorff), cases, workers, "Checking")
    faults = sorted(
        [*faults, *(f for check in checks for f in check.faults)], key=lambda fault: (fault.patient, fault.file)
    )
    if faults or not cases:
        text = f"{len(faults)} faults, {len(cases)} pairs of label maps. Nothing was judged."
        raise ValueError(f"{text}\n{fault_table(faults)}" if faults else text)
    records.mkdir(parents=True, exist_ok=True)
    run_in_processes(judge_case, [check for check in checks if not check.is_judged], workers, "Judging")
    table = pd.concat(
        [
            rows.assign(
                case=case.name,
                patient=case.patient,
                slices=slices_text(case),
                prediction_file=case.prediction.path.name,
                reference_file=case.reference.path.name,
                prediction_sha256=check.key["prediction_sha256"],
                reference_sha256=check.key["reference_sha256"],
            )
            for case, check, rows in zip(cases, checks, map(judge_case, checks), strict=True)
        ],
        ignore_index=True,
    )
    table = table[["case", "patient", *table.columns.drop(["case", "patient"])]]
    caption = f"Every point is a case. Absent structures: {empty}. HD95: {hausdorff}."
    _draw(out / "figures", cases, apply_convention(table, empty), caption)
    save_tables(out, table, cases, empty, hausdorff)
    return table


def _draw(folder: Path, cases: Sequence[Case], table: pd.DataFrame, caption: str) -> None:
    """Draw all figures; `table` has the convention put in."""
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "metrics.png", to_png(metric_boxes(table, caption)))
    write_atomically(folder / "volumes.png", to_png(volume_agreement(table)))
    shown = best_median_worst(cases, table)
    if shown:
        write_atomically(folder / "patients.png", to_png(examples(shown)))
    else:
        (folder / "patients.png").unlink(missing_ok=True)
