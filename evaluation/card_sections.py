"""The sections of a data card: what a synthetic set is, how useful, how near to its patients, and what nobody knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from datamodules.slice_set import CLASSES, SliceSet
from evaluation.release_tests import Parts, Results
from evaluation.text import interval_text

NO_PROOF = (
    "Similarity alone proves nothing. That no synthetic slice is measurably nearer to a training slice than slices of "
    "other people are does not show that none reveals anything about a patient: these detectors find what they find "
    "(see their sensitivity), in these patients, and know no other way in which a person might be recognised. Whether "
    "the set may be shared remains a decision of those who are responsible for the data."
)


@dataclass(frozen=True)
class Section:
    """A part of the card: paragraphs, points, a table and a picture, all optional."""

    title: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    picture: str = ""
    file: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """What goes into a data card besides the results of the tests.

    Attributes:
        title: of the card.
        filter_by: the detector that removed slices.
        usefulness: rows of the study's `ratio_to_real.csv`; None if there is no study.
        with_real_images: show the nearest real slices beside the synthetic ones.
        hashes: file -> SHA-256.
    """

    title: str
    filter_by: str
    usefulness: pd.DataFrame | None = None
    with_real_images: bool = False
    hashes: Mapping[str, str] = field(default_factory=dict)


def make_sections(card: Card, parts: Parts, results: Results, pictures: Sequence[Section]) -> list[Section]:
    """Lay the card out, the pictures before the files."""
    content, kept = parts.synthetic.manifest.content, parts.synthetic.subset(~results.removed)
    tables = results.tables
    made_by = [
        f"Generator: {content.get('generator', 'not known')}, after {content.get('images_seen', '?')} images; weights "
        f"{str(content.get('weights_sha256', 'not known'))[:16]}, seed {content.get('seed', '?')}.",
        f"Trained on {len(parts.training)} slices of {len(parts.training.patients)} patients; "
        f"{len(parts.held_out.patients)} patients were held out, and are what every number is compared with.",
        "Every image is a function of the weights, the seed and its number. No patient was imaged for it, and none of "
        "its labels was drawn by a person.",
    ]
    return [
        Section("What it is", made_by, _counts(parts.synthetic, kept)),
        Section(
            "Thresholds",
            ["Declared before the tests. Those that chance enters are compared with the end of a 95 % interval."],
            header=("threshold", "measured", "limit", ""),
            rows=[
                (c.text, f"{c.measured:.4g}", f"{c.limit:.4g}", "holds" if c.holds else "fails")
                for c in results.criteria
            ],
        ),
        _usefulness(card.usefulness),
        Section(
            "What was removed, and what another detector says of the rest",
            [
                f"Slices that the filter ({card.filter_by}) found suspicious were removed: nearer to a training slice "
                "than all but a stated share of the slices of held-out patients. The other detector, which had no part "
                "in the removal, then judged what was left. By chance, each would find the stated share."
            ],
            header=("detector", "role", "suspicious before", "after"),
            rows=[
                (row["detector"], row["role"], _share(row, "before"), _share(row, "after"))
                for row in tables["shares"].to_dict("records")
            ],
        ),
        _judgement(tables["judgement_kept"]),
        _reproduced(tables["patients"]),
        _sensitivity(tables["sensitivity"]),
        _membership(tables.get("membership")),
        _features(tables.get("features")),
        Section("What remains uncertain", [NO_PROOF], _uncertain(parts, results, card)),
        *pictures,
        *_files(card),
    ]


def _files(card: Card) -> list[Section]:
    """None for the card in the evidence, which lies beside no slices."""
    text = ["SHA-256 of every file; the fingerprint is that of pixels and index of the slice set."]
    return [Section("Files", text, header=("file", "SHA-256"), rows=list(card.hashes.items()))] if card.hashes else []


def _counts(made: SliceSet, kept: SliceSet) -> list[str]:
    points = [f"{len(made)} slices were made, {len(made) - len(kept)} removed, {len(kept)} are here."]
    if len(kept):
        tumour = (kept.index[[f"{name}_px" for name in CLASSES[1:]]] > 0).mean()
        shares = ", ".join(f"{name} in {tumour[f'{name}_px']:.1%}" for name in CLASSES[1:])
        points.append(f"Tumour classes: {shares} of the slices.")
    return points


def _usefulness(table: pd.DataFrame | None) -> Section:
    title = "Usefulness"
    if table is None or not len(table):
        return Section(title, ["Not measured: no study was given. Whether a model learns from them is unknown."])
    rows = []
    for row in table.to_dict("records"):
        ratio = interval_text(100 * row["ratio"], 100 * row["ci_low"], 100 * row["ci_high"], 2)
        rows.append((f"{row['arm']} / {row['baseline']}", row["entity"], f"{ratio} %", str(row["pairs"])))
    text = "Mean Dice on unseen real patients, relative to training on real slices (95 % interval over patients)."
    note = "Measured with the set as it was made, before slices were removed."
    return Section(title, [text, note], header=("training", "structure", "ratio", "patients"), rows=rows)


def _share(row: Mapping[Any, Any], when: str) -> str:
    numbers = (100 * row.get(name, np.nan) for name in (when, f"{when}_low", f"{when}_high"))
    share, low, high = numbers
    return interval_text(share, low, high, 2) + " %"


def _judgement(table: pd.DataFrame) -> Section:
    rows = [
        (
            row["score"],
            _value(row, "median"),
            _value(row, "median_held_out"),
            _value(row, "max"),
            _value(row, "max_held_out"),
            f"{interval_text(100 * row['share'], 100 * row['ci_low'], 100 * row['ci_high'], 2)} %",
        )
        for row in table.to_dict("records")
    ]
    return Section(
        "Nearness to training slices, beside held-out patients",
        [
            "The nearest training slice of every slice that was kept, over flips and shifts. Without the "
            "column of held-out patients such numbers mean nothing: unrelated heads correlate at 0.9.",
            "Scores are Pearson's r over the whole image or within the brain; distances are root mean square "
            "differences in grey levels; joint is the largest deviation from what is usual, in standard deviations; "
            "embedding is the cosine that a copy detector gives.",
        ],
        header=("score", "median", "held-out", "nearest", "held-out", "suspicious"),
        rows=rows,
    )


def _value(row: Mapping[Any, Any], name: str) -> str:
    sign, digits = (-1, 1) if str(row["score"]).startswith("distance") else (1, 3)
    value = sign * row[name]
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def _reproduced(table: pd.DataFrame) -> Section:
    hit = table[table["suspicious"] > 0]
    rows = [
        (f"training patient {number}", str(row["suspicious"]), str(row["reproduced"]), str(row["slices"]))
        for number, row in enumerate(hit.head(10).to_dict("records"), 1)
    ]
    text = (
        f"The slices that were removed came near to {len(hit)} of {len(table)} training patients. Patients are "
        "numbered here; their names are in the evidence, which is not shared."
    )
    header = ("patient", "slices removed", "training slices concerned", "of") if rows else ()
    return Section("Patients", [text], header=header, rows=rows)


def _sensitivity(table: pd.DataFrame) -> Section:
    detectors, rates = list(table["detector"].unique()), list(table["false_alarm_rate"].unique())
    cells = {(row["kind"], row["detector"], row["false_alarm_rate"]): row for row in table.to_dict("records")}
    rows = []
    for kind in table["kind"].unique():
        found = [cells[kind, detector, rate] for detector in detectors for rate in rates]
        texts = [interval_text(100 * c["rate"], 100 * c["ci_low"], 100 * c["ci_high"], 1) + " %" for c in found]
        rows.append((kind.replace("_", " "), *texts))
    return Section(
        "What the detectors can find",
        ["Training slices were changed in known ways and given to each detector: the share that it calls suspicious."],
        header=("planted copy", *(f"{name}, {rate:.0%} false alarms" for name in detectors for rate in rates)),
        rows=rows,
    )


def _membership(table: pd.DataFrame | None) -> Section:
    title = "Attack: was this person in the training?"
    if table is None:
        return Section(title, ["Nothing was kept, so there is nothing to attack."])
    rows = [
        (
            row["score"],
            row["rule"],
            interval_text(row["auc"], row["auc_low"], row["auc_high"]),
            interval_text(100 * row["tpr"], 100 * row["tpr_low"], 100 * row["tpr_high"], 1) + " %",
            f"{row['extractable']:.1%}",
        )
        for row in table.to_dict("records")
    ]
    first = table.iloc[0]
    text = (
        f"Somebody has slices of a person and looks for the nearest in this set. {first['patients']} training and "
        f"{first['held_out_patients']} held-out patients; an area under the curve of 0.5 is chance. The last column "
        "bounds the share of training patients that this attack can tell (95 % confidence): with few patients it is "
        "large however well the set behaves."
    )
    header = ("score", "of the slices", "area under the curve", "found at 1 % false alarms", "at most")
    return Section(title, [text], header=header, rows=rows)


def _features(table: pd.DataFrame | None) -> Section:
    title = "Aggregate scores"
    if table is None:
        return Section(title, ["Nothing was kept."])
    rows = [
        (row["score"], row["features"], _number(row["value"]), _number(row["real"]), row["better"], row["blind_to"])
        for row in table.to_dict("records")
    ]
    text = (
        "Each in the features of a network. Real: what slices of other real patients get in the place of synthetic "
        "ones. None of these scores would notice a few copies, so none of them decides."
    )
    return Section(title, [text], header=("score", "features", "value", "real", "better", "blind to"), rows=rows)


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3g}"


def _uncertain(parts: Parts, results: Results, card: Card) -> list[str]:
    n, m = len(parts.training.patients), len(parts.held_out.patients)
    points = [f"All is measured on {n} training and {m} held-out patients; intervals are over these alone."]
    weak = results.tables["sensitivity"]
    weak = weak[weak["false_alarm_rate"] == weak["false_alarm_rate"].min()].groupby("kind")["rate"].max()
    missed = [f"{kind.replace('_', ' ')} ({rate:.0%})" for kind, rate in weak.items() if rate < 0.5]
    if missed:
        points.append(f"Neither detector finds most of these copies: {', '.join(missed)}.")
    if card.usefulness is None:
        points.append("Usefulness was not measured.")
    points.append("Labels are those that the generator drew. Nobody has checked them.")
    points.append(
        "A slice that shows a rare anatomy or a rare tumour may point to a person without being near to any slice."
    )
    return points
