"""`standin compare`: segmenters against a baseline, on the same patients, with the patient as the unit.

Several trainings of an arm that differ in their seed are combined as `metrics.statistics` says: a test takes the mean
over seeds of each patient, an interval resamples patients and seeds. Time points of a patient are averaged first.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from datamodules.slice_set import write_atomically
from evaluation.charts import to_png
from evaluation.figures import SHOWN_ENTITIES, SHOWN_METRICS, comparison
from evaluation.results import BOTH_EMPTY, EMPTY_TEXT, HAUSDORFF_TEXT, Results, convention_name, read_results
from evaluation.text import align, interval_text
from metrics.segmentation import ENTITIES
from metrics.statistics import (
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    effect_sizes,
    holm,
    paired_wilcoxon,
)
from metrics.surface_distance import HausdorffKind
from metrics.volumes import DISTANCES, RATIOS, Empty, apply_convention

VOLUME_ERROR = "volume_error_abs_ml"
COMPARED = (*RATIOS, *DISTANCES, "lesion_dice_brats2023", "hd95_brats2023_mm", VOLUME_ERROR)


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only."""

    name: str
    runs: Sequence[Results]

    def values(self, empty: Empty) -> dict[tuple[str, str], pd.DataFrame]:
        """Give (patients x seeds) of every metric and entity under a convention, patients sorted."""
        tables = []
        for run in self.runs:
            table = apply_convention(run.table, empty)
            table[VOLUME_ERROR] = table["volume_error_ml"].abs()
            tables.append(table.groupby(["entity", "patient"])[list(COMPARED)].mean())
        return {
            (metric, entity): pd.concat([table.loc[entity][metric] for table in tables], axis=1)
            for metric in COMPARED
            for entity in ENTITIES
        }


def compare(arms: list[Path] | dict[str, list[Path]], out: Path = Path("comparison")) -> None:
    """Compare segmenters with the first one: means, differences and ratios with intervals, paired tests, effect sizes.

    All must have been judged on the same references, by the same conventions.

    Args:
        arms: folders that `standin evaluate` wrote, or run folders with one in `evaluation`; the first is the baseline.
            Or a mapping from the name of an arm to the folders of its seeds.
        out: folder for compare.csv, compare.json and figures.

    Raises:
        ValueError: naming every folder without results, and every case, reference or convention that differs.
    """
    read = read_arms(arms)
    baseline = read[0]
    empty, hausdorff = baseline.runs[0].empty, baseline.runs[0].hausdorff
    table = comparison_table(read, empty)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    _draw(out / "figures", read, table, empty, hausdorff)
    content = {
        "conventions": {"empty": empty, "empty_means": EMPTY_TEXT[empty], "hausdorff": hausdorff},
        "arms": {arm.name: [str(run.folder) for run in arm.runs] for arm in read},
        "patients": baseline.runs[0].table["patient"].nunique(),
        "comparison": json.loads(table.to_json(orient="records", double_precision=15)),
    }
    write_atomically(out / "compare.csv", table.to_csv(index=False))
    write_atomically(out / "compare.json", json.dumps(content, indent=1) + "\n")
    Console(soft_wrap=True, markup=False, highlight=False).print(
        f"\n{comparison_text(read, table)}\n\nResults: {out}\n"
    )


def read_arms(arms: list[Path] | dict[str, list[Path]]) -> list[Arm]:
    """Read the results of all arms and make sure that they can be compared.

    Raises:
        ValueError: as in `compare`.
    """
    named = arms if isinstance(arms, Mapping) else {_name(folder): [folder] for folder in arms}
    folders = [folder.resolve() for of_arm in named.values() for folder in of_arm]
    if len(named) < 2 or len(named) < len(arms) or len({*folders}) < len(folders) or not all(named.values()):
        raise ValueError(
            f"Expected two or more arms of different names, each of one or more folders, no folder twice, but got "
            f"{', '.join(map(str, arms.items() if isinstance(arms, Mapping) else arms))}. Arms can be named: "
            "'{real: [runs/a-0, runs/a-1], synthetic: [runs/b-0]}'."
        )
    problems, read = [], []
    for name, of_arm in named.items():
        runs = []
        for folder in of_arm:
            try:
                runs.append(read_results(folder))
            except ValueError as error:
                problems.append(str(error))
        read.append(Arm(name, runs))
    if not problems:
        first, *others = [run for arm in read for run in arm.runs]
        problems = [problem for other in others for problem in _differences(first, other)]
    if problems:
        raise ValueError("These results cannot be compared:\n" + "\n".join(problems))
    return read


def _name(folder: Path) -> str:
    folder = folder.resolve()
    return folder.parent.name if folder.name == "evaluation" else folder.name


def _differences(one: Results, other: Results) -> Iterator[str]:
    """Say what keeps two results from being compared."""
    where = f"{other.folder} and {one.folder}"
    for name in ("empty", "hausdorff"):
        here, there = getattr(other, name), getattr(one, name)
        if here != there:
            yield f"{where}: convention {name} is {here} and {there}. Run `standin evaluate` again with --{name}."
    mine, theirs = (run.table.drop_duplicates("case").set_index("case") for run in (other, one))
    if lacking := sorted({*mine.index} ^ {*theirs.index}):
        yield f"{where}: judged on different cases; only one of them has {_few(lacking)}."
    both = mine.index.intersection(theirs.index)
    for column, what in (("reference_sha256", "other references"), ("slices", "other slices"), ("patient", "patients")):
        differing = both[(mine.loc[both, column] != theirs.loc[both, column]).to_numpy()]
        if len(differing):
            yield f"{where}: judged against {what} of {_few(list(differing))}."


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def comparison_table(arms: Sequence[Arm], empty: Empty) -> pd.DataFrame:
    """Compare every arm with the first one, in every metric and entity under one convention, Dice under all.

    Holm's correction is over the arms and entities of a metric and convention. ET is the enhancing class: it is the
    same test.

    Returns:
        A row per arm (the baseline first, with its means only), convention, metric and entity.
    """
    tables = []
    for convention in dict.fromkeys((empty, *BOTH_EMPTY)):
        values = [arm.values(convention) for arm in arms]
        for metric in COMPARED if convention == empty else ("dice",):
            rows = [
                {"arm": arm.name, "convention": convention_name(convention), "metric": metric, "entity": entity}
                | _compared(values[0][metric, entity], own[metric, entity], arm is arms[0])
                for arm, own in zip(arms, values, strict=True)
                for entity in ENTITIES
            ]
            table = pd.DataFrame(rows)
            once = table["entity"] != "ET"
            table.loc[once, "p_holm"] = holm(table.loc[once, "p_wilcoxon"])
            table.loc[~once, "p_holm"] = table.loc[table["entity"] == "enhancing", "p_holm"].to_numpy()
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _compared(baseline: pd.DataFrame, arm: pd.DataFrame, is_baseline: bool) -> dict[str, Any]:
    """The numbers of one arm, and of its comparison unless it is the baseline; both are (patients x seeds)."""
    a, b = baseline.to_numpy(np.float64), arm.to_numpy(np.float64)
    mean = bootstrap_mean(b)
    numbers = {
        "seeds": b.shape[1],
        "patients": len(b),
        "valid": mean.n,
        "mean": mean.estimate,
        "mean_low": mean.low,
        "mean_high": mean.high,
    }
    if is_baseline:
        return numbers
    difference, ratio = bootstrap_difference(a, b), bootstrap_ratio(a, b)
    effects = effect_sizes(a, b)
    return numbers | {
        "pairs": difference.n,
        "dropped": difference.dropped,
        "difference": difference.estimate,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "ratio": ratio.estimate,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "p_wilcoxon": paired_wilcoxon(a, b).p,
        "d_z": effects.d_z,
        "rank_biserial": effects.rank_biserial,
    }


def _draw(folder: Path, arms: Sequence[Arm], table: pd.DataFrame, empty: Empty, hausdorff: HausdorffKind) -> None:
    caption = f"Absent structures: {empty}. HD95: {hausdorff}. Points: patients, mean over seeds."
    values = {arm.name: arm.values(empty) for arm in arms}
    for metric, name in SHOWN_METRICS.items():
        of_arms = {arm: {e: parts[metric, e].mean(axis=1) for e in SHOWN_ENTITIES} for arm, parts in values.items()}
        rows = table[(table["metric"] == metric) & (table["convention"] == convention_name(empty))]
        write_atomically(folder / f"{metric}.png", to_png(comparison(of_arms, rows, metric, name, caption)))


def comparison_text(arms: Sequence[Arm], table: pd.DataFrame) -> str:
    """Give the main numbers as plain text, with conventions, numbers of pairs and of dropped patients."""
    first = arms[0].runs[0]
    seeds = ", ".join(f"{arm.name} {len(arm.runs)}" for arm in arms)
    lines = [
        f"Baseline: {arms[0].name}. {first.table['patient'].nunique()} patients. Seeds: {seeds}.",
        f"Convention for absent structures: {first.empty} ({EMPTY_TEXT[first.empty]}).",
        f"HD95: {first.hausdorff} ({HAUSDORFF_TEXT[first.hausdorff]}).",
        "95 % intervals: bootstrap over patients and seeds. p: Wilcoxon's signed-rank test over patients, Holm's",
        "correction over arms and entities. Dropped: patients without a value in one of the arms.",
    ]
    head = ["", "baseline", "arm", "difference", "ratio", "p (Holm)", "d_z", "rank-bis.", "pairs", "dropped"]
    other: Empty = "one" if first.empty == "nan" else "nan"
    parts = (("dice", first.empty), ("dice", other), ("hd95_mm", first.empty))
    by_name = table.set_index(["convention", "metric", "arm", "entity"]).to_dict("index")
    for arm in arms[1:]:
        for metric, empty in parts:
            cells = [head]
            for entity in SHOWN_ENTITIES:
                base, own = (by_name[convention_name(empty), metric, name.name, entity] for name in (arms[0], arm))
                cells.append([entity, *_cells(base, own, 2 if metric.endswith("_mm") else 3)])
            title = f"{SHOWN_METRICS[metric]} ({empty}): {arm.name} against {arms[0].name}"
            lines += ["", title, *align(cells)]
    return "\n".join(lines)


def _cells(baseline: Mapping[Hashable, Any], arm: Mapping[Hashable, Any], digits: int) -> list[str]:
    intervals = ((baseline, "mean"), (arm, "mean"), (arm, "difference"), (arm, "ratio"))
    return [
        *(interval_text(row[name], row[f"{name}_low"], row[f"{name}_high"], digits) for row, name in intervals),
        f"{arm['p_holm']:.3g}",
        f"{arm['d_z']:.2f}",
        f"{arm['rank_biserial']:.2f}",
        f"{arm['pairs']:.0f}",
        f"{arm['dropped']:.0f}",
    ]
