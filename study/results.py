"""What the runs of a study left on disk, checked against each other and put into tables.

The tables hold every number of the report; `report.py` only writes them down. Patients are the unit of every mean,
interval and test of Dice; Dice is computed again from the counts, so both conventions for empty classes are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from datamodules.slice_set import CLASSES, MODALITIES, SliceSet
from metrics.statistics import bootstrap_mean, bootstrap_ratio, bootstrap_share_above, holm, paired_wilcoxon, summarize

ENTITIES = ("core", "oedema", "enhancing", "WT", "TC", "ET")
CLASS_MEAN = "mean of classes"
ALL_MODALITIES = "all four"
R_COLUMNS = {ALL_MODALITIES: "r", **{name: f"r_{name}" for name in MODALITIES}}
FEW_PATIENTS = 20
NULL_QUANTILE = 0.95
DICE_COLUMNS = (
    "arm", "run", "entity", "patients", "valid", "dice", "ci_low", "ci_high", "median", "sd", "dice_empty_one",
)  # fmt: skip
RATIO_COLUMNS = (
    "arm", "baseline", "entity", "pairs", "dropped", "ratio", "ci_low", "ci_high", "ratio_empty_one", "p_wilcoxon",
    "p_holm",
)  # fmt: skip
MEMORIZATION_NUMBERS = (
    "slices", "held_out_slices", "median", "median_held_out", "q95", "q95_held_out", "max", "max_held_out",
    "share_above_q95", "ci_low", "ci_high", "share_above_q99", "share_above_max", "smallest_p",
)  # fmt: skip

ArmKind = Literal["real", "synthetic", "real + synthetic"]
ARM_KINDS: tuple[ArmKind, ...] = ("real", "synthetic", "real + synthetic")


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
class Segmenter:
    """A segmenter run: its record, its arm of the study and Dice (patients x entities) under both conventions."""

    name: str
    run: Mapping[str, Any]
    kind: ArmKind
    source: str
    arm: str
    counts: pd.DataFrame
    dice: pd.DataFrame
    dice_empty_one: pd.DataFrame


@dataclass(frozen=True)
class Study:
    """Everything that a report speaks of."""

    real: SliceSet
    generators: Sequence[Generator]
    segmenters: Sequence[Segmenter]

    @property
    def runs(self) -> list[Generator | Segmenter]:
        """All runs, generators first."""
        return [*self.generators, *self.segmenters]

    @property
    def patients(self) -> list[str]:
        """The patients the segmenters were tested on."""
        return list(self.segmenters[0].dice.index) if self.segmenters else []

    def baseline(self, segmenter: Segmenter) -> Segmenter | None:
        """The arm trained on real slices to compare with: of the same model and seed if there is one."""
        real = [other for other in self.segmenters if other.kind == "real"]

        def differs(other: Segmenter) -> tuple[bool, bool]:
            return other.run["model"] != segmenter.run["model"], other.run["seed"] != segmenter.run["seed"]

        return min(real, key=differs) if real else None

    def compared(self) -> Iterator[tuple[Segmenter, Segmenter]]:
        """Every arm with synthetic slices, beside its real arm."""
        for segmenter in self.segmenters:
            baseline = self.baseline(segmenter)
            if segmenter.kind != "real" and baseline is not None:
                yield segmenter, baseline


def read_study(real: Path, generators: Sequence[Path], segmenters: Sequence[Path]) -> Study:
    """Read a real slice set and the folders of generator and segmenter runs.

    Raises:
        ValueError: naming every missing file with the command that makes it, or what contradicts what.
    """
    real, generators, segmenters = Path(real), [Path(p) for p in generators], [Path(p) for p in segmenters]
    needed = [f / name for f in generators for name in ("run.json", "memorization.csv", "synthetic/dataset.json")]
    needed += [folder / name for folder in segmenters for name in ("run.json", "dice_per_patient.csv")]
    roots = {path: folder for folder in (*generators, *segmenters) for path in needed if path.is_relative_to(folder)}
    missing = [f"{path}, which `{_command(roots[path])}` writes" for path in needed if not path.is_file()]
    if missing:
        raise ValueError("The report lacks files:\n  " + "\n  ".join(missing))
    real_set = SliceSet(real)
    read = [_read_generator(folder, real_set) for folder in generators]
    study = Study(real_set, read, _read_segmenters(segmenters, read))
    names = [run.name for run in study.runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Expected runs of different names, but several are called {', '.join(twice)}: rename folders."
        )
    return study


def _command(folder: Path) -> str:
    record = folder / "run.json"
    if record.is_file():
        command = json.loads(record.read_text()).get("command")
        if command:
            return "python " + " ".join(command)
    return f"python train.py --config configs/NAME.yaml --run_dir {folder}"


def _read_run(folder: Path, kind: str) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    if run["kind"] != kind:
        raise ValueError(f"Expected a {kind} run at {folder}, but run.json says it is a {run['kind']}.")
    return run


def _read_generator(folder: Path, real: SliceSet) -> Generator:
    run = _read_run(folder, "generator")
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
                f"since; run again: `{_command(generator.folder)}`."
            )
    found = table[table["nearest"] >= 0]
    fits = len(found) == 0 or found["nearest"].max() < len(generator.training)
    if fits:
        patients = generator.training.index["patient"].to_numpy()[found["nearest"].to_numpy()]
        fits = bool((patients == found["nearest_patient"].to_numpy()).all())
    if not fits:
        raise ValueError(
            f"{path}: the nearest patients are not those of the training split of {generator.training.root}. The real "
            f"set has changed since; run again: `{_command(generator.folder)}`."
        )


def _read_segmenters(folders: Sequence[Path], generators: Sequence[Generator]) -> list[Segmenter]:
    runs = [_read_run(folder, "segmenter") for folder in folders]
    emitted = {g.synthetic.manifest.fingerprint: g.name for g in generators}
    kinds = [_arm_kind(run) for run in runs]
    sources = [_sources(run, emitted) for run in runs]
    several_sources = len({source for source in sources if source}) > 1
    arms = [
        f"{kind} ({source})" if source and several_sources else kind
        for kind, source in zip(kinds, sources, strict=True)
    ]
    names = [f"{arm}: {run['name']}" if arms.count(arm) > 1 else arm for arm, run in zip(arms, runs, strict=True)]
    result = []
    for folder, run, kind, source, arm in zip(folders, runs, kinds, sources, names, strict=True):
        counts = pd.read_csv(folder / "dice_per_patient.csv", dtype={"patient": str})
        if counts.duplicated(["patient", "entity"]).any() or set(counts["entity"]) != set(ENTITIES):
            raise ValueError(
                f"{folder / 'dice_per_patient.csv'}: expected one row for each patient and entity of "
                f"{', '.join(ENTITIES)}, but got {len(counts)} rows. Run again: `{_command(folder)}`."
            )
        total = 2 * counts["tp"] + counts["fp"] + counts["fn"]
        scored = counts.assign(score=2 * counts["tp"] / total.where(total > 0))
        wide = scored.pivot(index="patient", columns="entity", values="score").sort_index()[list(ENTITIES)]
        result.append(
            Segmenter(
                run["name"], run, kind, source, arm, counts, _with_class_mean(wide), _with_class_mean(wide.fillna(1.0))
            )
        )
        if set(wide.index) != set(result[0].dice.index):
            differing = sorted(set(wide.index) ^ set(result[0].dice.index))
            raise ValueError(
                f"{folder} and {folders[0]} were tested on different patients ({', '.join(differing[:5])}"
                f"{', ...' if len(differing) > 5 else ''} in one of them only). Arms are compared on the same "
                "patients: use one real set and split for all segmenters."
            )
    return sorted(result, key=lambda segmenter: ARM_KINDS.index(segmenter.kind))


def _arm_kind(run: Mapping[str, Any]) -> ArmKind:
    kinds = {part["kind"] for part in run["training_sets"]}
    return cast(ArmKind, " + ".join(sorted(kinds)))


def _sources(run: Mapping[str, Any], emitted: Mapping[str, str]) -> str:
    """The generators whose slices a run was trained on; a set from elsewhere is named by its folder."""
    synthetic = [part for part in run["training_sets"] if part["kind"] == "synthetic"]
    return " + ".join(emitted.get(part["fingerprint"], Path(part["root"]).parent.name) for part in synthetic)


def _with_class_mean(dice: pd.DataFrame) -> pd.DataFrame:
    return dice.assign(**{CLASS_MEAN: dice[list(CLASSES[1:])].mean(axis=1, skipna=True)})


def dice_per_patient_table(study: Study) -> pd.DataFrame:
    """Every Dice with its counts, as the segmenters wrote them."""
    tables = [s.counts.assign(arm=s.arm, run=s.name) for s in study.segmenters]
    columns = ["arm", "run", "patient", "entity", "tp", "fp", "fn", "dice"]
    return pd.concat(tables)[columns] if tables else pd.DataFrame(columns=columns)


def dice_table(study: Study) -> pd.DataFrame:
    """Mean Dice over patients of every arm and entity, with its bootstrap interval."""
    rows = []
    for segmenter in study.segmenters:
        for entity in (*ENTITIES, CLASS_MEAN):
            values = segmenter.dice[entity]
            mean = bootstrap_mean(values.to_numpy())
            rows.append(
                (segmenter.arm, segmenter.name, entity, len(values), mean.n, mean.estimate, mean.low, mean.high,
                 values.median(), values.std(), segmenter.dice_empty_one[entity].mean())
            )  # fmt: skip
    return pd.DataFrame(rows, columns=list(DICE_COLUMNS))


def ratio_table(study: Study) -> pd.DataFrame:
    """Mean Dice of every arm with synthetic slices divided by that of its real arm, with interval and paired test.

    Holm's correction is over the arms for the mean of classes, and over arms and entities for the entities; ET is
    the enhancing class and not counted twice.
    """
    rows = []
    for segmenter, real in study.compared():
        for entity in (*ENTITIES, CLASS_MEAN):
            a, b = real.dice[entity].to_numpy(), segmenter.dice[entity].to_numpy()
            interval, test = bootstrap_ratio(a, b), paired_wilcoxon(a, b)
            one = bootstrap_ratio(real.dice_empty_one[entity], segmenter.dice_empty_one[entity], n_resamples=1)
            rows.append(
                (segmenter.arm, real.arm, entity, interval.n, interval.dropped, interval.estimate, interval.low,
                 interval.high, one.estimate, test.p, np.nan)
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
    rows = []
    for one in study.runs:
        run = one.run
        trained_on = [f"{part['slices']} {part['kind']}" for part in run["training_sets"]]
        rows.append(
            {
                "run": one.name,
                "kind": run["kind"],
                "arm": one.arm if isinstance(one, Segmenter) else "",
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
