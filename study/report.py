"""The report: may the synthetic set stand in for the real one? One page, its tables as CSV and its figures as PNG."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from rich.console import Console

from datamodules.slice_set import SliceSet, write_atomically
from evaluation.card import STYLE
from evaluation.charts import DARK, LIGHT, Theme, to_png
from evaluation.slice_figures import PictureRow, correlation_densities, slice_rows
from study import figures
from study.arms import CLASS_MEAN
from study.results import (
    ALL_MODALITIES,
    FEW_PATIENTS,
    NULL_QUANTILE,
    R_COLUMNS,
    Generator,
    Study,
    class_table,
    dice_per_patient_table,
    dice_table,
    memorization_table,
    ratio_table,
    read_study,
    run_table,
)

TITLE = "May the synthetic slices stand in for the real ones?"
SHOWN_ENTITIES = ("core", "oedema", "enhancing", "WT", "TC", CLASS_MEAN)
"""Rows and groups of the page; ET equals enhancing and is in the CSV tables only."""
EXAMPLES = 5
NEAREST_SYNTHETIC = 4
NEAREST_HELD_OUT = 2

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it: base64 PNG in a light and, for charts, a dark version."""

    name: str
    caption: str
    light: str
    dark: str | None


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
    """Write index.html (self-contained), tables/*.csv and figures/*.png, index.html last.

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
    }
    out = Path(out)
    for folder in (out / "tables", out / "figures"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_atomically(out / "tables" / f"{name}.csv", table.to_csv(index=False))
    pictures = {picture.name: picture for picture in _pictures(study, tables, out / "figures")}
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, STYLE.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, interval=interval, percent_interval=percent_interval)
    page = environment.get_template("report.html").render(
        title=title,
        study=study,
        tables={name: table.to_dict("records") for name, table in tables.items()},
        pictures=pictures,
        arms=[arm.name for arm in study.arms],
        compared=[arm.name for arm, _ in study.compared()],
        entities=SHOWN_ENTITIES,
        usefulness=usefulness_sentences(study, tables),
        safety=[safety_sentence(row) for row in _rows(tables["memorization"], image=ALL_MODALITIES)],
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
    for row in _rows(tables["memorization"], image=ALL_MODALITIES):
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
    arms = list(dict.fromkeys(table["arm"]))
    widths = [max(20, len(arm) + 2) for arm in arms]
    lines = [f"{'':18}" + "".join(f"{arm:>{width}}" for arm, width in zip(arms, widths, strict=True))]
    for entity in SHOWN_ENTITIES:
        cells = [_rows(table, arm=arm, entity=entity)[0] for arm in arms]
        shown = [text(cell[value], cell["ci_low"], cell["ci_high"]) for cell in cells]
        lines.append(f"  {entity:16}" + "".join(f"{cell:>{width}}" for cell, width in zip(shown, widths, strict=True)))
    return lines


def usefulness_sentences(study: Study, tables: Tables) -> list[str]:
    """What share of the real Dice each arm with synthetic slices reaches, as sentences."""
    if not study.arms:
        return ["No segmenter was given, so nothing is said about usefulness."]
    if not any(arm.kind == "real" for arm in study.arms):
        return ["No segmenter was trained on real slices only, so there is nothing to compare with."]
    sentences = []
    for arm, real in study.compared():
        row = _rows(tables["ratio_to_real"], arm=arm.name, entity=CLASS_MEAN)[0]
        own, reference = (
            _rows(tables["dice"], arm=name, entity=CLASS_MEAN)[0]["dice"] for name in (arm.name, real.name)
        )
        source = arm.source or "synthetic"
        how = {
            "synthetic": f"Trained only on the synthetic slices of {source}",
            "real + synthetic": f"Trained on real slices and those of {source} together",
        }[arm.kind]
        share = percent_interval(row["ratio"], row["ci_low"], row["ci_high"], long=True)
        sentences.append(
            f"{how}, the segmenter reaches {share} of the Dice of training on real slices ({number(own)} against "
            f"{number(reference)}; mean of the three classes, {len(study.patients)} unseen patients)."
        )
    return sentences or ["No segmenter was trained on synthetic slices."]


def safety_sentence(row: dict[str, Any]) -> str:
    """Whether synthetic slices are nearer to training slices than unseen patients are; `row` is of the joint search."""
    name = row["generator"]
    if not row["slices"] or np.isnan(row.get("median", np.nan)):
        return f"The slices of {name} are constant images or none could be compared: memorization is undefined."
    expected = 1 - NULL_QUANTILE
    slices = f"synthetic slices of {name}"
    if np.isnan(row["ci_low"]):
        few = row["held_out_patients"]
        verdict = (
            f"With {few} held-out patient{'s' * (few != 1)} it cannot be said whether the {slices} are nearer to the "
            "training slices than unseen patients are"
        )
    elif row["ci_low"] > expected:
        verdict = f"The {slices} are nearer to the training slices than unseen patients are"
    elif row["ci_high"] < expected:
        verdict = f"The {slices} are less near to the training slices than unseen patients are"
    else:
        verdict = f"The {slices} are not measurably nearer to the training slices than unseen patients are"
    share = percent_interval(row["share_above_q95"], row["ci_low"], row["ci_high"], long=True)
    beyond = round(row["share_above_max"] * row["slices"])
    worst = (
        f"{beyond} of {row['slices']} are nearer than every held-out slice: look at the nearest pairs below."
        if beyond
        else "None is nearer than the nearest held-out slice."
    )
    return (
        f"{verdict}: largest correlation {number(row['median'])} (median) against {number(row['median_held_out'])} for "
        f"held-out patients; {share} of them lie above the held-out 95th percentile, where chance puts 5\u00a0%. "
        f"{worst}"
    )


def warnings(study: Study, memorization: pd.DataFrame) -> list[str]:
    """What a reader must know before believing the numbers; `memorization` is the table of that name."""
    found = []
    runs = [one.run for one in study.runs]
    n = len(study.patients)
    if study.arms and n < FEW_PATIENTS:
        found.append(
            f"Only {n} test patients (fewer than {FEW_PATIENTS}): intervals are wide and, from a bootstrap of so few, "
            "rather too narrow than too wide. Read them as a rough guide."
        )
    few = sorted({int(row["held_out_patients"]) for row in _rows(memorization, image=ALL_MODALITIES)})
    if few and few[0] < FEW_PATIENTS:
        found.append(
            f"The null of the memorization check comes from only {few[0]} held-out patient{'s' * (few[0] != 1)}."
        )
    commits = sorted({str(run["git_commit"])[:8] for run in runs})
    if len(commits) > 1:
        found.append(f"The runs come from different versions of the program (commits {', '.join(commits)}).")
    dirty = [run["name"] for run in runs if run["git_dirty"]]
    if dirty:
        found.append(f"Made with uncommitted changes of the program: {', '.join(dirty)}.")
    found += _foreign_data(study)
    split_of = dict(zip(study.real.index["patient"], study.real.index["split"], strict=True))
    leaked = [patient for patient in study.patients if split_of.get(patient) == "train"]
    if leaked:
        found.append(
            f"{len(leaked)} test patients are in the training split of {study.real.root}: {', '.join(leaked[:5])}. "
            "Their Dice is not that of unseen patients."
        )
    unknown = [patient for patient in study.patients if patient not in split_of]
    if unknown:
        found.append(f"{len(unknown)} test patients are not in {study.real.root}: {', '.join(unknown[:5])}.")
    seen = {str(p) for g in study.generators for p in g.synthetic.manifest.content.get("patients_seen", [])}
    seen &= set(study.patients)
    if seen:
        found.append(f"Generators were trained on {len(seen)} of the test patients: {', '.join(sorted(seen)[:5])}.")
    return found


def _foreign_data(study: Study) -> Iterator[str]:
    known = {study.real.manifest.fingerprint: "real"}
    known |= {g.synthetic.manifest.fingerprint: g.name for g in study.generators}
    for one in study.runs:
        for part in one.run["training_sets"]:
            if part["fingerprint"] not in known:
                whose = "the real set" if part["kind"] == "real" else "any generator"
                yield (
                    f"{one.name} was trained on {part['root']} (fingerprint {part['fingerprint'][:8]}), which is not "
                    f"the set of {whose} of this report: it has changed since, or is another one."
                )


def _pictures(study: Study, tables: Tables, folder: Path) -> Iterator[Picture]:
    """Draw every figure, save it as PNG and hand it over for the page."""
    entities = list(SHOWN_ENTITIES)
    arms = [arm.name for arm in study.arms]
    charts: list[tuple[str, str, Callable[[Theme], Figure]]] = []
    if study.arms:
        dice = {arm.name: arm.mean_dice for arm in study.arms}
        charts.append((
            "dice_per_patient",
            "Dice per patient: every point is a patient. Box: quartiles and median; whiskers: 1.5 box lengths.",
            functools.partial(figures.dice_boxes, dice, entities),
        ))  # fmt: skip
    if len(tables["ratio_to_real"]):
        charts.append((
            "ratio_to_real",
            "Mean Dice relative to training on real slices; line: 95 % interval (bootstrap over patients).",
            functools.partial(figures.ratio_bars, tables["ratio_to_real"], arms, entities),
        ))  # fmt: skip
    for generator in study.generators:
        synthetic, held_out = generator.rows("synthetic"), generator.rows("held-out")
        joint = {image: synthetic[column] for image, column in R_COLUMNS.items()}
        null = {image: held_out[column] for image, column in R_COLUMNS.items()}
        charts.append((
            f"memorization-{generator.name}",
            f"{generator.name}: largest correlation of each slice with any training slice.",
            functools.partial(correlation_densities, joint, null, NULL_QUANTILE),
        ))  # fmt: skip
    charts.append((
        "classes",
        "Tumour classes in the real and in the synthetic slices.",
        functools.partial(figures.class_bars, tables["classes"]),
    ))  # fmt: skip
    for name, caption, draw in charts:
        yield _save(folder, name, caption, to_png(draw(LIGHT)), to_png(draw(DARK)))
    for generator in study.generators:
        caption = (
            f"Drawn at random, not chosen. Left: real training slices. Right: synthetic slices of {generator.name}."
        )
        rows = _examples(generator.training, generator.synthetic)
        figure = slice_rows(rows, ("Real (training split)", f"Synthetic ({generator.name})"))
        yield _save(folder, f"examples-{generator.name}", caption, to_png(figure))
        caption = (
            f"The synthetic slices of {generator.name} with the largest correlation r, each beside its nearest "
            "training slice; below, for comparison, the held-out slices with the largest r."
        )
        figure = slice_rows(_nearest(generator), ("Synthetic or held-out", "Nearest training slice"))
        yield _save(folder, f"nearest-{generator.name}", caption, to_png(figure))


def _save(folder: Path, name: str, caption: str, light: bytes, dark: bytes | None = None) -> Picture:
    write_atomically(folder / f"{name}.png", light)
    encoded = [base64.b64encode(png).decode() if png is not None else None for png in (light, dark)]
    return Picture(name, caption, encoded[0] or "", encoded[1])


def _examples(real: SliceSet, synthetic: SliceSet) -> list[PictureRow]:
    rng = np.random.default_rng(0)
    left, right = (np.sort(rng.permutation(len(part))[:EXAMPLES]) for part in (real, synthetic))
    pairs = zip(real.read(left), synthetic.read(right), strict=False)
    return [PictureRow("", (a, b)) for a, b in pairs]


def _nearest(generator: Generator) -> list[PictureRow]:
    rows = []
    sets = (("synthetic", generator.synthetic, NEAREST_SYNTHETIC), ("held-out", generator.held_out, NEAREST_HELD_OUT))
    for which, slices, count in sets:
        table = generator.memorization
        for _, row in table[(table["set"] == which) & (table["nearest"] >= 0)].nlargest(count, "r").iterrows():
            mine, theirs = slices.read([row["position"]])[0], generator.training.read([row["nearest"]])[0]
            rows.append(PictureRow(f"{which}\nr = {row['r']:.4f}", (mine, theirs)))
    return rows or [PictureRow("none", (generator.training.read([0])[0], None))]


def _rows(table: pd.DataFrame, **where: str) -> list[dict[str, Any]]:
    for column, value in where.items():
        table = table[table[column] == value] if column in table else table[:0]
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def number(value: float, digits: int = 3) -> str:
    """Format a Dice or a correlation; NaN is a dash."""
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """Format a share; NaN is a dash."""
    return "–" if pd.isna(value) else f"{100 * value:.1f}\u00a0%"


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
