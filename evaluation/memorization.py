"""`standin memorization`: how near synthetic slices come to training slices, beside what owes nothing to them.

Every number has two nulls, from the same search among the same training slices: slices of held-out patients, and
training slices among those of all other patients.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console

from datamodules.slice_set import MODALITIES, SliceSet, write_atomically
from evaluation.charts import LIGHT, to_png
from evaluation.detectors import Found, PixelDetector, thinned
from evaluation.pixel_search import PixelSearch, search_slices
from evaluation.sensitivity import Null, sensitivity
from evaluation.slice_figures import PictureRow, correlation_densities, slice_rows
from evaluation.suspicion import judge_scores, reproduced_patients, suspicious
from evaluation.text import align, interval_text

STATES = ".search"
JOINT = "joint"
SHOWN_SCORES = ("T1", "T1ce", "T2", "FLAIR", "all", "brain all", "label", JOINT)
PAIRS = 8
NULL_QUANTILE = 0.99

Tables = dict[str, pd.DataFrame]


def memorization(
    synthetic: Path,
    real: Path,
    out: Path,
    k: int = 5,
    mirror: bool = True,
    max_shift_px: int = 3,
    false_alarm_rate: float = 0.01,
    null_slices: int | None = None,
    planted: int = 64,
    memory_gib: float | None = None,
    device: str = "auto",
    shard: int = 0,
    shards: int = 1,
) -> None:
    """Find the nearest training slices of every synthetic slice, and of real slices that owe nothing to them.

    All pairs are compared, in exact integer arithmetic: Pearson over the whole image and within the brain, and
    Euclidean distance, in each modality and over all four, with the label and without. A slice is suspicious if it is
    nearer than the false-alarm rate allows, as the slices of held-out patients are. The same command again continues
    after an interruption; what it goes on from is in OUT/.search.

    Args:
        synthetic: slice set that a generator made; its manifest says whom the generator has seen.
        real: the slice set that it was trained on, with other patients in it.
        out: folder for nearest-synthetic.parquet, nearest-held-out.parquet, nearest-train.parquet, judgement.csv,
            suspicious.csv, patients.csv, sensitivity.csv, pairs.png, correlations.png and search.json. It shows
            training patients.
        k: nearest training slices of every slice, by every score.
        mirror: left-right flips are tried too: twice the work.
        max_shift_px: all shifts of up to that many pixels along each axis are tried: 9, 25, 49, ... times the work.
        false_alarm_rate: share of the slices of held-out patients that would be suspicious.
        null_slices: at most that many slices of each null, evenly spaced; null: all.
        planted: changed copies of training slices, of each kind, that measure what the search can find; 0: none.
        memory_gib: for queries, blocks and products; null: 2 on a CPU, half of what is free on a GPU.
        device: cpu, cuda, cuda:1, ...; auto: a GPU if there is one.
        shard: number of this process among shards, from 0.
        shards: processes that work in the same folder at the same time, each started with its own number.

    Raises:
        ValueError: if the sets do not fit, or there are no training slices or too few held-out ones.
    """
    search = PixelSearch(k, mirror, max_shift_px, memory_gib, device, shard, shards)
    made, source = SliceSet(synthetic), SliceSet(real)
    training, held_out = training_and_held_out(made, source)
    held_out = thinned(held_out, null_slices)
    check_null(held_out, false_alarm_rate)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    queries = {"synthetic": made, "held-out": held_out, "train": thinned(training, null_slices)}
    for _ in range(2):  # again for what other shards have finished in the meantime
        missing = [
            name
            for name, slices in queries.items()
            if search_slices(name, slices, training, out / STATES, search, name == "train") is None
        ]
    if missing:
        console.print(f"Done here; other shards are still at work on {', '.join(missing)}.")
        return
    detector = PixelDetector(training, held_out, search, out / STATES, null_slices)
    found = detector.of_set("synthetic", made)
    for name in ("search.json", "sensitivity.csv"):  # of a search of before; search.json comes last and says what holds
        (out / name).unlink(missing_ok=True)
    for name, table in detector.tables.items():
        write_atomically(out / f"nearest-{name}.parquet", table.to_parquet())
    tables = judge(detector, found, training, false_alarm_rate)
    if planted:
        rates = [false_alarm_rate]
        found_of = sensitivity(detector.of_slices, detector.null, training, planted=planted, false_alarm_rates=rates)
        tables["sensitivity"] = found_of
    for name, table in tables.items():
        write_atomically(out / f"{name}.csv", table.to_csv(index=False))
    draw_pairs(out / "pairs.png", made, held_out, training, found, detector.held_out)
    mine, null = ({name: part.values[name] for name in ("all", *MODALITIES)} for part in (found, detector.held_out))
    write_atomically(out / "correlations.png", to_png(correlation_densities(mine, null, NULL_QUANTILE, LIGHT)))
    sets = {"synthetic": made, "training": training, "held_out": held_out}
    description = {
        "sets": {
            name: {
                "root": str(slices.root),
                "fingerprint": slices.manifest.fingerprint,
                "slices": len(slices),
                "patients": None if slices is made else slices.patients,
            }
            for name, slices in sets.items()
        },
        "k": k,
        "mirror": mirror,
        "max_shift_px": max_shift_px,
        "null_slices": null_slices,
        "false_alarm_rate": false_alarm_rate,
        "planted": planted,
    }
    write_atomically(out / "search.json", json.dumps(description, indent=1) + "\n")
    console.print("\n".join(summary(tables, false_alarm_rate)))
    console.print(f"\nTables and pictures: {out}")


def check_null(held_out: SliceSet, false_alarm_rate: float) -> None:
    """Refuse a null that is too small for anything to be suspicious.

    Raises:
        ValueError: if there are fewer than 1 / rate - 1 slices, or the rate is not between 0 and 1.
    """
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate={false_alarm_rate:g}: expected a number between 0 and 1.")
    needed = math.ceil(1 / false_alarm_rate - 1 - 1e-9)
    if len(held_out) < needed:
        raise ValueError(
            f"false_alarm_rate={false_alarm_rate:g} needs {needed} slices of held-out patients or more, but in "
            f"{held_out.root} there are {len(held_out)}: nothing could be suspicious. Raise the rate, or hold out more "
            "patients."
        )


def judge(detector: PixelDetector, found: Found, training: SliceSet, false_alarm_rate: float) -> Tables:
    """Say what is suspicious.

    Returns:
        judgement: a row per score and one for the joint statistic; see `judge_scores`. suspicious: position, statistic,
        nearest, nearest_patient of every suspicious slice, the nearest first. patients: see `reproduced_patients`.
    """
    patients = training.index["patient"].to_numpy(dtype=object)
    parts = [part.values.assign(**{JOINT: part.statistic}) for part in (found, detector.held_out)]
    return {
        "judgement": judge_scores(parts[0], parts[1], detector.null.patients, false_alarm_rate),
        **name_suspicious(found, detector.null, patients, false_alarm_rate),
    }


def name_suspicious(
    found: Found, null: Null, patients: npt.NDArray[np.object_], false_alarm_rate: float
) -> dict[str, pd.DataFrame]:
    """List the suspicious slices, and the training patients whom they come near to; see `judge`."""
    flags = suspicious(found.statistic, null, false_alarm_rate)
    nearest = found.nearest[flags]
    columns = {"position": np.flatnonzero(flags), "statistic": found.statistic[flags], "nearest": nearest}
    table = pd.DataFrame(columns).assign(nearest_patient=patients[nearest])
    return {
        "suspicious": table.sort_values("statistic", ascending=False, ignore_index=True),
        "patients": reproduced_patients(found.nearest, flags, patients),
    }


def draw_pairs(
    path: Path, synthetic: SliceSet, held_out: SliceSet, training: SliceSet, found: Found, null: Found
) -> None:
    """Draw the nearest synthetic slice of every training patient, the nearest first, and held-out ones below."""
    rows, patients = [], training.index["patient"].to_numpy(dtype=object)
    for name, slices, part, count in (("synthetic", synthetic, found, PAIRS), ("held-out", held_out, null, PAIRS // 2)):
        order = np.argsort(-np.nan_to_num(part.statistic, nan=-np.inf), kind="stable")
        order = order[part.nearest[order] >= 0]
        _, first = np.unique(patients[part.nearest[order]], return_index=True)
        for position in order[np.sort(first)[:count]]:
            pair = slices.read([position])[0], training.read([part.nearest[position]])[0]
            r = part.values["all"].iloc[position] if "all" in part.values else part.statistic[position]
            rows.append(PictureRow(f"{name} {position}\nr = {r:.4f}", pair))
    if rows:
        write_atomically(path, to_png(slice_rows(rows, ("Synthetic or held-out slice", "Nearest training slice"))))


def summary(tables: Tables, false_alarm_rate: float) -> list[str]:
    """Give the main numbers as lines of text."""
    judgement = {row["score"]: row for row in tables["judgement"].to_dict("records")}
    first = judgement[JOINT]
    rows = [["", "median", "held-out", "largest", "held-out", "suspicious"]]
    for score in SHOWN_SCORES:
        row = judgement[score]
        numbers = [f"{row[name]:.3f}" for name in ("median", "median_held_out", "max", "max_held_out")]
        share = interval_text(100 * row["share"], 100 * row["ci_low"], 100 * row["ci_high"], digits=2)
        rows.append([score, *numbers, f"{share} %"])
    patients = tables["patients"]
    hit = int((patients["suspicious"] > 0).sum())
    lines = [
        f"{first['slices']:.0f} synthetic slices, beside {first['held_out_slices']:.0f} slices of "
        f"{first['held_out_patients']:.0f} held-out patients; by chance {100 * false_alarm_rate:g} % are suspicious",
        "(Pearson's r with the nearest training slice; joint: standard deviations above what is usual)",
        *align(rows),
        f"Suspicious slices come near to {hit} of {len(patients)} training patients"
        + (f", most often {patients['patient'][0]} ({patients['suspicious'][0]} slices)." if hit else "."),
    ]
    if "sensitivity" in tables:
        rates = zip(tables["sensitivity"]["kind"], tables["sensitivity"]["rate"], strict=True)
        shares = ", ".join(f"{kind.replace('_', ' ')} {100 * rate:.0f} %" for kind, rate in rates)
        lines.append(f"Planted copies that it finds: {shares}.")
    if np.isnan(first["ci_low"]):
        lines.append("Too few held-out patients for an interval: the share may be anything.")
    return lines


def training_and_held_out(synthetic: SliceSet, real: SliceSet) -> tuple[SliceSet, SliceSet]:
    """Divide a real set into the patients whom the generator of a synthetic set has seen, and all others.

    Raises:
        ValueError: if the manifest does not say whom it has seen, or one of the two parts is empty.
    """
    seen: Any = synthetic.manifest.content.get("patients_seen")
    if seen is None:
        raise ValueError(
            f"{synthetic.root / 'dataset.json'}: expected patients_seen, the patients that the generator was trained "
            "on, but it is not there. Add it, as a list of their names."
        )
    is_seen = real.index["patient"].isin(seen).to_numpy()
    training, held_out = real.subset(is_seen), real.subset(~is_seen)
    for part, what in ((training, "has seen"), (held_out, "has not seen")):
        if not len(part):
            raise ValueError(
                f"{real.root}: expected patients that the generator of {synthetic.root} {what}, but there are none. "
                "Give the real set that it was trained on, with validation or test patients."
            )
    return training, held_out
