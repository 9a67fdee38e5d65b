"""Tables of what runs leave besides Dice and the largest correlations; empty where they have not left it.

Distances in mm come from the judgement of the label maps, curves from what was logged, costs from the records of
training and emission, quality from `standin quality` and the search over flips and shifts from `standin memorization`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.curves import read_curves
from evaluation.memorization import JOINT
from evaluation.results import read_results
from metrics.statistics import bootstrap_mean
from metrics.volumes import apply_convention
from study.arms import ENTITIES, Arm, command_of
from study.results import Generator, Study

DISTANCES = {"hd95_mm": "HD95 (mm)", "nsd_1mm": "NSD at 1 mm"}
VALIDATION_DICE = "dice/val"
SEARCHED_SCORES = (JOINT, "all", "brain all", "label")


def distance_per_patient(arm: Arm, metric: str, entity: str) -> pd.DataFrame:
    """A distance of every patient under the convention of its judgement: (patients, seeds).

    By default a structure that only prediction or reference holds has the diagonal of the volume, one that neither
    holds NaN. There are no columns if nothing was judged.
    """
    columns = {}
    for one in arm.segmenters:
        if (one.folder / "evaluation" / "summary.json").is_file():
            results = read_results(one.folder)
            table = apply_convention(results.table, results.empty)
            of_entity = table[table["entity"] == entity]
            columns[one.name] = of_entity.groupby("patient")[metric].mean().reindex(arm.patients)
    return pd.DataFrame(columns, index=arm.patients)


def distance_table(study: Study) -> pd.DataFrame:
    """Mean distances of every arm and entity over patients and seeds, beside how many structures were missed.

    missed and false_positive count predictions, of all patients and seeds; held is how often a reference holds the
    structure, so missed is of so many.
    """
    columns = [
        "arm", "entity", "metric", "patients", "valid", "mean", "ci_low", "ci_high", "held", "missed", "false_positive",
    ]  # fmt: skip
    rows = []
    for arm in study.arms:
        counts = pd.concat([one.counts for one in arm.segmenters])
        for entity in ENTITIES:
            of_entity = counts[counts["entity"] == entity]
            reference, prediction = of_entity["tp"] + of_entity["fn"] > 0, of_entity["tp"] + of_entity["fp"] > 0
            wrong = [int(these.sum()) for these in (reference, reference & ~prediction, prediction & ~reference)]
            for metric in DISTANCES:
                values = distance_per_patient(arm, metric, entity)
                if values.shape[1]:
                    mean = bootstrap_mean(values.to_numpy(float))
                    rows.append(
                        (arm.name, entity, metric, len(values), mean.n, mean.estimate, mean.low, mean.high, *wrong)
                    )
    _check_one_kind(study)
    return pd.DataFrame(rows, columns=columns)


def _check_one_kind(study: Study) -> None:
    """Refuse Hausdorff distances of two kinds, or penalties of two conventions, in one table."""
    kinds: dict[str, str] = {}
    for arm in study.arms:
        for one in arm.segmenters:
            if (one.folder / "evaluation" / "summary.json").is_file():
                results = read_results(one.folder)
                kinds.setdefault(f"hausdorff {results.hausdorff}, empty {results.empty}", one.name)
    if len(kinds) > 1:
        whose = "; ".join(f"{name}: {kind}" for kind, name in kinds.items())
        raise ValueError(f"The segmenters were judged by different conventions ({whose}). Judge all alike.")


def curve_table(study: Study) -> pd.DataFrame:
    """Everything that was logged while the runs were trained: run, arm, images_seen, metric, value."""
    arms = {one.name: arm.name for arm in study.arms for one in arm.segmenters}
    tables = []
    for run in study.runs:
        table = read_curves(run.folder).rename(columns={"step": "images_seen"})
        table = table[~table["metric"].str.contains("/test")]  # logged once, when no images are counted
        table = table[table["images_seen"] <= run.run["images_seen"]]  # a run of before may have been longer
        tables.append(table.assign(run=run.name, arm=arms.get(run.name, "")))
    columns = ["run", "arm", "images_seen", "metric", "value"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def cost_table(study: Study) -> pd.DataFrame:
    """What training and emission took: a row per run.

    hours is the time of training and of emission times the number of processes, so GPU-hours on GPUs. Numbers of an
    emission are NaN where it left no record; its rate is that of its last start.
    """
    rows = []
    for run in study.runs:
        record, emission = run.run, _json(run.folder / "emission.json")
        processes = record.get("processes", 1)
        hours, seconds = record["train_seconds"] * processes / 3600, record["train_seconds"]
        rate = emission["images"] / emission["seconds"] if emission.get("seconds") else np.nan
        slices = len(run.synthetic) if isinstance(run, Generator) else 0
        emission_hours = slices / rate * emission["processes"] / 3600 if emission else np.nan
        rows.append(
            {
                "run": run.name,
                "kind": record["kind"],
                "device": record["device"],
                "processes": processes,
                "images_seen": record["images_seen"],
                "train_images_per_second": record["images_seen"] / seconds if seconds else np.nan,
                "train_hours": hours,
                "emitted": slices if emission else np.nan,
                "emitted_per_second": rate,
                "emission_hours": emission_hours,
                "evaluations_per_image": emission["evaluations_per_image"] if emission else np.nan,
            }
        )
    return pd.DataFrame(rows)


def quality_table(study: Study) -> pd.DataFrame:
    """The scores in feature spaces that `standin quality` has left in <run>/quality, with the generator's name.

    Raises:
        ValueError: if they are of another synthetic set.
    """
    tables = []
    for generator in study.generators:
        path = generator.folder / "quality" / "quality.csv"
        if path.is_file():
            table = pd.read_csv(path)
            _check_current(generator, path, set(table["fingerprint"]), set(table["real_fingerprint"]))
            tables.append(table.assign(generator=generator.name))
    columns = ["generator", "features", "score", "value", "real", "better", "blind_to"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def search_table(study: Study) -> pd.DataFrame:
    """The judgement that `standin memorization` has left in <run>/nearest: a row per generator and score.

    Raises:
        ValueError: if it is of another synthetic set.
    """
    tables = []
    for generator in study.generators:
        folder = generator.folder / "nearest"
        search = _json(folder / "search.json")
        if search:
            sets = search["sets"]
            _check_current(
                generator, folder / "search.json", {sets["synthetic"]["fingerprint"]}, {sets["training"]["fingerprint"]}
            )
            judgement, patients = (pd.read_csv(folder / name) for name in ("judgement.csv", "patients.csv"))
            tables.append(
                judgement[judgement["score"].isin(SEARCHED_SCORES)].assign(
                    generator=generator.name,
                    false_alarm_rate=search["false_alarm_rate"],
                    mirror=search["mirror"],
                    max_shift_px=search["max_shift_px"],
                    training_patients=len(patients),
                    reproduced_patients=int((patients["suspicious"] > 0).sum()),
                )
            )
    if not tables:
        return pd.DataFrame(columns=["generator", "score"])
    table = pd.concat(tables, ignore_index=True)
    return table[["generator", *table.columns.drop("generator")]]


def sensitivity_table(study: Study) -> pd.DataFrame:
    """Which share of planted copies the same search finds: a row per generator and kind."""
    tables = []
    for generator in study.generators:
        folder = generator.folder / "nearest"
        if _json(folder / "search.json").get("planted"):
            tables.append(pd.read_csv(folder / "sensitivity.csv").assign(generator=generator.name))
    columns = ["generator", "kind", "false_alarm_rate", "rate", "ci_low", "ci_high", "slices"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _check_current(generator: Generator, path: Path, synthetic: set[str], real: set[str]) -> None:
    """Refuse results of other sets than those of the report."""
    for slices, found in ((generator.synthetic, synthetic), (generator.training, real)):
        own = slices.manifest.fingerprint
        if found != {own}:
            raise ValueError(
                f"{path} is of another set than {slices.root} (fingerprint {own[:8]}). Remove it, or make it again; "
                f"the generator was `{command_of(generator.folder)}`."
            )


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content
