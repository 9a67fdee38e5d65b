"""The report: may the synthetic set stand in for the real one? A page, tables as CSV, figures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console

from datamodules.slice_set import write_atomically
from evaluation.card import STYLE
from evaluation.text import align
from study.arms import CLASS_MEAN
from study.further_tables import cost_table, curve_table, distance_table, quality_table, search_table, sensitivity_table
from study.pictures import draw_pictures
from study.results import (
    ALL_MODALITIES,
    class_table,
    dice_per_patient_table,
    dice_table,
    memorization_table,
    ratio_table,
    read_study,
    run_table,
)
from study.sentences import headline, safety_sentence, search_sentences, usefulness_sentences, warnings
from study.words import FEW_ARMS, SHOWN_ENTITIES, Tables, interval, number, percent, percent_interval, rows_of, short

TITLE = "May the synthetic slices stand in for the real ones?"


def report(
    out: Path,
    real: Path = Path("data/slices"),
    generators: tuple[Path, ...] = (),
    segmenters: tuple[Path, ...] = (),
    title: str = TITLE,
) -> None:
    """Write the report of a study to a folder and show its main table, which is kept as summary.txt.

    Args:
        out: folder for index.html, tables/ and figures/.
        real: the real slice set.
        generators: run folders of generators.
        segmenters: run folders of segmenters, tested on the same patients.
        title: of the page.
    """
    index = write_report(out, real, generators, segmenters, title)
    summary = f"{summary_table(index.parent)}\n\nReport: {index}\n"
    write_atomically(index.parent / "summary.txt", summary)
    Console(soft_wrap=True, markup=False, highlight=False).print(f"\n{summary}")


def write_report(
    out: Path, real: Path, generators: Sequence[Path], segmenters: Sequence[Path], title: str = TITLE
) -> Path:
    """Write index.html (self-contained), tables/*.csv and figures/*.png and *.svg, index.html last.

    Args:
        out: folder of the report.
        real: the real slice set.
        generators: run folders of generators, with their synthetic sets and memorization.csv.
        segmenters: run folders of segmenters, with dice_per_patient.csv.
        title: of the page.

    Returns:
        The path of index.html.

    Raises:
        ValueError: naming missing files with the command that makes them, or runs that do not fit together.
    """
    study = read_study(real, generators, segmenters)
    tables: Tables = {
        "dice": dice_table(study),
        "dice_per_patient": dice_per_patient_table(study),
        "ratio_to_real": ratio_table(study),
        "memorization": memorization_table(study),
        "classes": class_table(study),
        "runs": run_table(study),
        "distances": distance_table(study),
        "curves": curve_table(study),
        "quality": quality_table(study),
        "search": search_table(study),
        "sensitivity": sensitivity_table(study),
        "cost": cost_table(study),
    }
    out = Path(out)
    for folder in (out / "tables", out / "figures"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_atomically(out / "tables" / f"{name}.csv", table.to_csv(index=False))
    pictures = {picture.name: picture for picture in draw_pictures(study, tables, out / "figures")}
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, STYLE.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(
        number=number, short=short, percent=percent, interval=interval, percent_interval=percent_interval
    )
    page = environment.get_template("report.html").render(
        title=title,
        study=study,
        tables={name: table.to_dict("records") for name, table in tables.items()},
        pictures=pictures,
        arms=[arm.name for arm in study.arms],
        compared=[arm.name for arm, _ in study.compared()],
        entities=SHOWN_ENTITIES,
        headline=headline(tables),
        usefulness=usefulness_sentences(study, tables),
        safety=[
            *(safety_sentence(row) for row in rows_of(tables["memorization"], image=ALL_MODALITIES)),
            *search_sentences(tables),
        ],
        warnings=warnings(study, tables["memorization"]),
        manifest=study.real.manifest,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomically(out / "index.html", page)
    return out / "index.html"


def summary_table(out: Path) -> str:
    """The main numbers of the report in a folder as plain text, from its CSV tables."""
    tables = {name: pd.read_csv(out / "tables" / f"{name}.csv") for name in ("dice", "ratio_to_real", "memorization")}
    lines = []
    dice, ratio = tables["dice"], tables["ratio_to_real"]
    if len(dice):
        lines.append(f"Dice, mean over {dice['patients'].iloc[0]} unseen patients (95 % interval, bootstrap)")
        lines += _text_columns(dice, "dice", interval)
    if len(ratio):
        lines += ["", "Dice relative to training on real slices (95 % interval, bootstrap)"]
        lines += _text_columns(ratio, "ratio", percent_interval)
    for row in rows_of(tables["memorization"], image=ALL_MODALITIES):
        lines += ["", f"Memorization of {row['generator']}: largest correlation with any training slice"]
        lines.append(f"{'':18}{'median':>9}{'95th pct':>10}{'largest':>9}{'slices':>9}")
        for name, suffix, count in (("synthetic", "", "slices"), ("held-out real", "_held_out", "held_out_slices")):
            values = [f"{number(row[key + suffix])}" for key in ("median", "q95", "max")]
            lines.append(f"  {name:16}{values[0]:>9}{values[1]:>10}{values[2]:>9}{row[count]:>9}")
        share = percent_interval(row["share_above_q95"], row["ci_low"], row["ci_high"])
        lines.append(f"  above the 95th percentile of held-out: {share}; by chance 5 %")
        lines.append(f"  above every held-out slice: {percent(row['share_above_max'])}")
    return "\n".join(lines)


def _text_columns(table: pd.DataFrame, value: str, text: Callable[[float, float, float], str]) -> list[str]:
    """Lay a table out with the arms as columns; many arms as rows, with the mean of the classes alone."""
    arms = list(dict.fromkeys(table["arm"]))
    cells = {(row["entity"], row["arm"]): text(row[value], row["ci_low"], row["ci_high"]) for row in rows_of(table)}
    if len(arms) > FEW_ARMS:
        lines = align([["", CLASS_MEAN], *([arm, cells[CLASS_MEAN, arm]] for arm in arms)])
    else:
        lines = align([["", *arms], *([name, *(cells[name, arm] for arm in arms)] for name in SHOWN_ENTITIES)])
    return [f"  {line}".rstrip() for line in lines]
