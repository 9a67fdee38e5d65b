"""What the runs of a study left on disk, checked against each other and put into tables.

The tables hold every number of the report; `report.py` only writes them down. Patients are the unit of every mean,
interval and test of Dice; Dice is computed again from the counts, so both conventions for empty classes are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from datamodules.slice_set import CLASSES, MODALITIES, SliceSet
from metrics.statistics import bootstrap_mean, bootstrap_ratio, bootstrap_share_above, holm, paired_wilcoxon, summarize
from study.arms import CLASS_MEAN, ENTITIES, Arm, Segmenter, command_of, read_arms, read_run

ALL_MODALITIES = "all four"
R_COLUMNS = {ALL_MODALITIES: "r", **{name: f"r_{name}" for name in MODALITIES}}
FEW_PATIENTS = 20
NULL_QUANTILE = 0.95
DICE_COLUMNS = (
    "arm", "seeds", "entity", "patients", "valid", "dice", "ci_low", "ci_high", "median", "sd", "sd_seeds",
    "dice_empty_one",
)  # fmt: skip
RATIO_COLUMNS = (
    "arm", "kind", "source", "runs", "baseline", "entity", "pairs", "dropped", "ratio", "ci_low", "ci_high",
    "ratio_empty_one", "p_wilcoxon", "p_holm",
)  # fmt: skip
MEMORIZATION_NUMBERS = (
    "slices", "held_out_slices", "median", "median_held_out", "q95", "q95_held_out", "max", "max_held_out",
    "share_above_q95", "ci_low", "ci_high", "share_above_q99", "share_above_max", "smallest_p",
)  # fmt: skip


@dataclass(frozen=True)
class Generator:
    """A generator run: its record, the set it emitted, and the search for memorized slices."""

    name: str
    folder: Path
    run: Mapping[str, Any]
    synthetic: SliceSet
    training: SliceSet
    held_out: SliceSet
    memorization: pd.DataFrame

    def rows(self, which: Literal["synthetic", "held-out"]) -> pd.DataFrame:
        """The rows of the memorization table of one of its two sets."""
        return self.memorization[self.memorization["set"] == which].reset_index(drop=True)


@dataclass(frozen=True)
class Study:
    """Everything that a report speaks of."""

    real: SliceSet
    generators: Sequence[Generator]
    arms: Sequence[Arm]

    @property
    def runs(self) -> list[Generator | Segmenter]:
        """All runs, generators first."""
        return [*self.generators, *(segmenter for arm in self.arms for segmenter in arm.segmenters)]

    @property
    def patients(self) -> list[str]:
        """The patients the segmenters were tested on."""
        return self.arms[0].patients if self.arms else []

    def baseline(self, arm: Arm) -> Arm | None:
        """The arm trained on real slices to compare with: of the same model and the most alike settings."""
        real = [other for other in self.arms if other.kind == "real"]

        def differs(other: Arm) -> tuple[bool, int, bool]:
            return other.model != arm.model, len({*other.settings} ^ {*arm.settings}), other.seeds != arm.seeds

        return min(real, key=differs) if real else None

    def compared(self) -> Iterator[tuple[Arm, Arm]]:
        """Every arm with synthetic slices, beside its real arm."""
        for arm in self.arms:
            baseline = self.baseline(arm)
            if arm.kind != "real" and baseline is not None:
                yield arm, baseline


def read_study(real: Path, generators: Sequence[Path], segmenters: Sequence[Path]) -> Study:
    """Read a real slice set and the folders of generator and segmenter runs.

    Raises:
        ValueError: naming every missing file with the command that makes it, or what contradicts what.
    """
    real, generators, segmenters = Path(real), [Path(p) for p in generators], [Path(p) for p in segmenters]
    needed = [f / name for f in generators for name in ("run.json", "memorization.csv", "synthetic/dataset.json")]
    needed += [folder / name for folder in segmenters for name in ("run.json", "dice_per_patient.csv")]
    roots = {path: folder for folder in (*generators, *segmenters) for path in needed if path.is_relative_to(folder)}
    missing = [f"{path}, which `{command_of(roots[path])}` writes" for path in needed if not path.is_file()]
    if missing:
        raise ValueError("The report lacks files:\n  " + "\n  ".join(missing))
    real_set = SliceSet(real)
    read = [_read_generator(folder, real_set) for folder in generators]
    study = Study(real_set, read, read_arms(segmenters, {g.synthetic.manifest.fingerprint: g.name for g in read}))
    names = [run.name for run in study.runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Expected runs of different names, but several are called {', '.join(twice)}: rename folders."
        )
    return study


def _read_generator(folder: Path, real: SliceSet) -> Generator:
    run = read_run(folder, "generator")
    split = real.index["split"]
    held_out = real.index["patient"].isin(run.get("validation_patients", []))
    training = (split == "train") & ~held_out
    if not held_out.any():
        held_out = split == run.get("held_out_split", "val" if (split == "val").any() else "test")
    generator = Generator(
        name=run["name"],
        folder=folder,
        run=run,
        synthetic=SliceSet(folder / "synthetic"),
        training=real.subset(training.to_numpy()),
        held_out=real.subset(held_out.to_numpy()),
        memorization=pd.read_csv(
            folder / "memorization.csv",
            dtype={"nearest_patient": str},
            keep_default_na=False,
            na_values={column: ["", "nan"] for column in R_COLUMNS.values()},
        ),
    )
    _check_positions(generator)
    return generator


def _check_positions(generator: Generator) -> None:
    path = generator.folder / "memorization.csv"
    table = generator.memorization
    for which, source in (("synthetic", generator.synthetic), ("held-out", generator.held_out)):
        position = table.loc[table["set"] == which, "position"]
        if not len(position) or position.min() < 0 or position.max() >= len(source):
            raise ValueError(
                f"{path}: expected rows of the {which} set with positions 0..{len(source) - 1}, but found "
                f"{len(position)} rows{f' up to {position.max()}' if len(position) else ''}. The sets have changed "
                f"since; run again: `{command_of(generator.folder)}`."
            )
    found = table[table["nearest"] >= 0]
    fits = len(found) == 0 or found["nearest"].max() < len(generator.training)
    if fits:
        patients = generator.training.index["patient"].to_numpy()[found["nearest"].to_numpy()]
        fits = bool((patients == found["nearest_patient"].to_numpy()).all())
    if not fits:
        raise ValueError(
            f"{path}: the nearest patients are not those of the training split of {generator.training.root}. The real "
            f"set has changed since; run again: `{command_of(generator.folder)}`."
        )


def dice_per_patient_table(study: Study) -> pd.DataFrame:
    """Every Dice with its counts, as the segmenters wrote them."""
    tables = [
        one.counts.assign(arm=arm.name, run=one.name, seed=one.run["seed"])
        for arm in study.arms
        for one in arm.segmenters
    ]
    columns = ["arm", "run", "seed", "patient", "entity", "tp", "fp", "fn", "dice"]
    return pd.concat(tables)[columns] if tables else pd.DataFrame(columns=columns)


def dice_table(study: Study) -> pd.DataFrame:
    """Mean Dice of every arm and entity over patients and seeds, with its bootstrap interval.

    Standard deviations are over patients (of their means over seeds) and over seeds (of the means over patients).
    """
    rows = []
    for arm in study.arms:
        for entity in (*ENTITIES, CLASS_MEAN):
            values = arm.dice(entity)
            mean, of_patients = bootstrap_mean(values), pd.Series(values.mean(axis=1))
            of_seeds = pd.DataFrame(values).mean().std() if len(arm.seeds) > 1 else np.nan
            rows.append(
                (arm.name, len(arm.seeds), entity, len(values), mean.n, mean.estimate, mean.low, mean.high,
                 of_patients.median(), of_patients.std(), of_seeds, float(arm.dice_empty_one(entity).mean()))
            )  # fmt: skip
    return pd.DataFrame(rows, columns=list(DICE_COLUMNS))


def ratio_table(study: Study) -> pd.DataFrame:
    """Mean Dice of every arm with synthetic slices divided by that of its real arm, with interval and paired test.

    Holm's correction is over the arms for the mean of classes, and over arms and entities for the entities; ET is
    the enhancing class and not counted twice.
    """
    rows = []
    for arm, real in study.compared():
        for entity in (*ENTITIES, CLASS_MEAN):
            a, b = real.dice(entity), arm.dice(entity)
            interval, test = bootstrap_ratio(a, b), paired_wilcoxon(a, b)
            one = bootstrap_ratio(real.dice_empty_one(entity), arm.dice_empty_one(entity), n_resamples=1)
            rows.append(
                (arm.name, arm.kind, arm.source, arm.stem, real.name, entity, interval.n, interval.dropped,
                 interval.estimate, interval.low, interval.high, one.estimate, test.p, np.nan)
            )  # fmt: skip
    table = pd.DataFrame(rows, columns=list(RATIO_COLUMNS))
    if rows:
        primary = table["entity"] == CLASS_MEAN
        for family in (primary, ~primary & (table["entity"] != "ET")):
            table.loc[family, "p_holm"] = holm(table.loc[family, "p_wilcoxon"].to_numpy())
        table.loc[table["entity"] == "ET", "p_holm"] = table.loc[table["entity"] == "enhancing", "p_holm"].to_numpy()
    return table


def memorization_table(study: Study) -> pd.DataFrame:
    """Largest correlations of the synthetic slices beside those of the held-out patients, jointly and per modality."""
    rows = []
    for generator in study.generators:
        synthetic, null = generator.rows("synthetic"), generator.rows("held-out")
        patients = generator.held_out.index["patient"].to_numpy()[null["position"].to_numpy()]
        for image, column in R_COLUMNS.items():
            x, y = synthetic[column].to_numpy(float), null[column].to_numpy(float)
            row = {"generator": generator.name, "image": image, "held_out_patients": len(set(patients))}
            if np.isnan(x).all() or np.isnan(y).all():
                rows.append({**row, "slices": 0, "held_out_slices": int((~np.isnan(y)).sum())})
                continue
            s = summarize(x, y)
            share = bootstrap_share_above(x, y, patients, quantile=NULL_QUANTILE)
            values = (
                s.n, s.n_null, s.median, s.median_null, s.q95, s.q95_null, s.max, s.max_null,
                s.share_above_q95, share.low, share.high, s.share_above_q99, s.share_above_max, np.nanmin(s.p_values),
            )  # fmt: skip
            rows.append({**row, **dict(zip(MEMORIZATION_NUMBERS, values, strict=True))})
    columns = ("generator", "image", "held_out_patients", *MEMORIZATION_NUMBERS)
    return pd.DataFrame(rows, columns=list(columns))


def class_table(study: Study) -> pd.DataFrame:
    """How often and how large the tumour classes are in the real training slices and in every synthetic set."""
    real_train = study.real.subset((study.real.index["split"] == "train").to_numpy())
    sets = {"real (training split)": real_train, **{g.name: g.synthetic for g in study.generators}}
    rows = []
    for name, slices in sets.items():
        pixel_cm2 = slices.manifest.spacing_mm**2 / 100
        columns = [f"{label}_px" for label in CLASSES[1:]]
        pixels = slices.index[columns].astype(float).assign(tumour_px=slices.index[columns].sum(axis=1))
        for column in pixels:
            present = pixels[column][pixels[column] > 0]
            rows.append(
                {
                    "set": name,
                    "class": str(column).removesuffix("_px"),
                    "slices": len(slices),
                    "slices_with_class": len(present),
                    "share_with_class": len(present) / len(slices) if len(slices) else float("nan"),
                    "mean_area_cm2": present.mean() * pixel_cm2,
                    "median_area_cm2": present.median() * pixel_cm2,
                }
            )
    return pd.DataFrame(rows)


def run_table(study: Study) -> pd.DataFrame:
    """What every run was, from its run.json."""
    rows, arm_of = [], {one.name: arm.name for arm in study.arms for one in arm.segmenters}
    for one in study.runs:
        run = one.run
        trained_on = [f"{part['slices']} {part['kind']}" for part in run["training_sets"]]
        rows.append(
            {
                "run": one.name,
                "kind": run["kind"],
                "arm": arm_of.get(one.name, ""),
                "model": run["model"].rsplit(".", 1)[-1],
                "seed": run["seed"],
                "slices_trained_on": " + ".join(trained_on),
                "images_seen": run["images_seen"],
                "train_minutes": round(run["train_seconds"] / 60, 1),
                "device": run["device"],
                "torch": run["versions"].get("torch"),
                "commit": (run["git_commit"] or "unknown")[:8] + ("*" if run["git_dirty"] else ""),
                "command": " ".join(run["command"]),
            }
        )
    return pd.DataFrame(rows)
