"""The figures of the report: drawn, saved as files, and handed over for the page."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from datamodules.slice_set import SliceSet, write_atomically
from evaluation.charts import DARK, LIGHT, Theme, to_png, to_svg
from evaluation.slice_figures import PictureRow, correlation_densities, slice_rows
from study import figures
from study.arms import ARM_KINDS, CLASS_MEAN, Arm
from study.further_tables import VALIDATION_DICE, distance_per_patient
from study.results import NULL_QUANTILE, R_COLUMNS, Generator, Study
from study.words import FEW_ARMS, SHOWN_ENTITIES, Tables

EXAMPLES = 5
NEAREST_SYNTHETIC = 4
NEAREST_HELD_OUT = 2


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it: base64 PNG in a light and, for charts, a dark version."""

    name: str
    caption: str
    light: str
    dark: str | None


Chart = tuple[str, str, Callable[[Theme], Figure]]
"""Name, caption, and what draws it."""


def draw_pictures(study: Study, tables: Tables, folder: Path) -> Iterator[Picture]:
    """Draw every figure, save it as PNG and charts as SVG too, and hand it over for the page."""
    for path in folder.iterdir():
        path.unlink()  # those of runs that are no longer in the study
    for name, caption, draw in _charts(study, tables):
        light = draw(LIGHT)
        write_atomically(folder / f"{name}.svg", to_svg(light))
        yield _save(folder, name, caption, to_png(light), to_png(draw(DARK)))
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


def _charts(study: Study, tables: Tables) -> Iterator[Chart]:
    if study.arms:
        yield from _arm_charts(study, tables)
    for generator in study.generators:
        synthetic, held_out = generator.rows("synthetic"), generator.rows("held-out")
        joint = {image: synthetic[column] for image, column in R_COLUMNS.items()}
        null = {image: held_out[column] for image, column in R_COLUMNS.items()}
        yield (
            f"memorization-{generator.name}",
            f"{generator.name}: largest correlation of each slice with any training slice.",
            functools.partial(correlation_densities, joint, null, NULL_QUANTILE),
        )
    yield (
        "classes",
        "Tumour classes in the real and in the synthetic slices.",
        functools.partial(figures.class_bars, tables["classes"]),
    )


def _arm_charts(study: Study, tables: Tables) -> Iterator[Chart]:
    """Charts of what the segmenters reach: by entity for few arms, the mean of classes in rows for many."""
    arms = [arm.name for arm in study.arms]
    few = len(arms) <= FEW_ARMS
    colours = {arm.name: place if few else ARM_KINDS.index(arm.kind) for place, arm in enumerate(study.arms)}
    ratios = tables["ratio_to_real"]
    boxes = "Every point is a patient. Box: quartiles and median; whiskers: 1.5 box lengths."
    bar = "Mean Dice relative to training on real slices; line: 95 % interval (bootstrap over patients)."
    if few:
        entities = list(SHOWN_ENTITIES)
        dice = {arm.name: arm.mean_dice for arm in study.arms}
        draw = functools.partial(figures.patient_boxes, dice, entities, "Dice per patient", 1.0)
        yield "dice_per_patient", f"Dice per patient. {boxes}", draw
        if len(ratios):
            yield "ratio_to_real", bar, functools.partial(figures.ratio_bars, ratios, arms, entities)
        hd95 = {arm.name: _distances(arm, entities[:-1]) for arm in study.arms}
        if all(len(table.columns) for table in hd95.values()):
            draw = functools.partial(figures.patient_boxes, hd95, entities[:-1], "HD95 (mm)", None)
            yield "hd95_per_patient", f"95th percentile of the Hausdorff distance. {boxes}", draw
    else:
        mean = {arm.name: arm.mean_dice[CLASS_MEAN] for arm in study.arms}
        draw = functools.partial(figures.arm_boxes, mean, list(colours.values()), "Dice per patient")
        yield "dice_per_patient", f"Dice per patient, mean of the three classes. {boxes}", draw
        if len(ratios):
            of_mean = ratios[ratios["entity"] == CLASS_MEAN]
            draw = functools.partial(figures.ratio_rows, of_mean, [colours[arm] for arm in of_mean["arm"]])
            yield "ratio_to_real", f"{bar} Mean of the three classes.", draw
    yield from _curve_chart(study, tables, colours)


def _curve_chart(study: Study, tables: Tables, colours: Mapping[str, int]) -> Iterator[Chart]:
    table = tables["curves"]
    table = table[(table["metric"] == VALIDATION_DICE) & (table["arm"] != "")]
    panels: dict[str, list[str]] = {}
    for arm in study.arms:
        baseline = arm if arm.kind == "real" else study.baseline(arm)
        panels.setdefault("" if baseline is None else baseline.stem, []).append(arm.name)
    shown = {title: table[table["arm"].isin(names)] for title, names in panels.items()}
    shown = {title: rows for title, rows in shown.items() if len(rows)}
    if shown:
        caption = (
            "Validation Dice while training, mean of the classes; on synthetic slices where a run chose its model by "
            "them. A panel for each segmenter trained on real slices and those compared with it; colours as above."
        )
        yield "learning_curves", caption, functools.partial(figures.curves, shown, colours, "validation Dice")


def _distances(arm: Arm, entities: Sequence[str]) -> pd.DataFrame:
    """HD95 of an arm, mean over seeds: (patients, entities); no columns where nothing was judged."""
    columns = {entity: distance_per_patient(arm, "hd95_mm", entity) for entity in entities}
    return pd.DataFrame({entity: table.mean(axis=1) for entity, table in columns.items() if table.shape[1]})


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
