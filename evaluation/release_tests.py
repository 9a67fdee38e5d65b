"""The tests of a release: what is removed, what another detector says of the rest, and what either can find at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.slice_set import SliceSet
from evaluation.attack import equal_shares, fewest_slices, membership_table, nearest_synthetic
from evaluation.detectors import Detector, Found
from evaluation.embedding_search import Embed
from evaluation.feature_scores import scores_of_sets
from evaluation.memorization import JOINT, name_suspicious
from evaluation.pixel_search import PixelSearch
from evaluation.sensitivity import sensitivity
from evaluation.suspicion import judge_scores, share_suspicious, suspicious
from evaluation.thresholds import Criterion, Thresholds, at_least, at_most

SLICES_OF_A_PATIENT = 16
"""In membership attacks, at most."""
MUST_FIND = {"filter": ("exact", "mirrored"), "test": ("exact",)}

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Parts:
    """The slices of a release: those that are judged, and real ones that its generator has and has not seen."""

    synthetic: SliceSet
    training: SliceSet
    held_out: SliceSet


@dataclass(frozen=True)
class Results:
    """What the tests of a release found.

    Attributes:
        removed: (n,), which slices were removed.
        found: what each detector says of every slice.
        tables: shares (suspicious slices by detector, before and after), judgement and judgement_kept (every score
            beside held-out patients), suspicious and patients (see `memorization.judge`), sensitivity, membership,
            features.
        criteria: the thresholds.
    """

    removed: Flags
    found: Mapping[str, Found]
    tables: Mapping[str, pd.DataFrame]
    criteria: list[Criterion]

    @property
    def verdict(self) -> bool:
        """Whether all thresholds hold."""
        return all(criterion.holds for criterion in self.criteria)


def run_release_tests(
    parts: Parts,
    detectors: Mapping[str, Detector],
    filter_by: str,
    thresholds: Thresholds,
    embed: Embed,
    search: PixelSearch,
    folder: Path,
    planted: int,
    losses: pd.DataFrame | None = None,
    spaces: Mapping[str, Embed] = MappingProxyType({}),
) -> Results:
    """Filter with one detector, test with all others, measure what they can find, and attack what is left.

    Args:
        parts: the slices.
        detectors: by name.
        filter_by: name of the one that removes slices.
        thresholds: what must hold.
        embed: the feature space of the aggregate scores.
        search: of the attack.
        folder: for states.
        planted: copies of each kind.
        losses: of the generator on real slices: patient, loss.
        spaces: further feature spaces of the aggregate scores, by name.

    Returns:
        The results; nothing is written but states.
    """
    rate = thresholds.false_alarm_rate
    found = {name: detector.of_set("synthetic", parts.synthetic) for name, detector in detectors.items()}
    removed = suspicious(found[filter_by].statistic, detectors[filter_by].null, rate)
    kept = parts.synthetic.subset(~removed)
    of_training = parts.training.index["patient"].to_numpy(dtype=object)
    tables = {
        "shares": _shares(found, detectors, filter_by, removed, rate),
        "judgement": _judgement(found, detectors, np.zeros_like(removed), rate),
        "judgement_kept": _judgement(found, detectors, removed, rate),
        **name_suspicious(found[filter_by], detectors[filter_by].null, of_training, rate),
        "sensitivity": _sensitivity(detectors, parts.training, rate, planted),
    }
    if len(kept):
        tables["membership"] = _membership(parts, kept, embed, search, folder, losses)
        tables["features"] = scores_of_sets(parts.training, parts.held_out, kept, {"copy detector": embed, **spaces})
    return Results(removed, found, tables, _criteria(parts, tables, removed, filter_by, thresholds))


def _shares(
    found: Mapping[str, Found], detectors: Mapping[str, Detector], filter_by: str, removed: Flags, rate: float
) -> pd.DataFrame:
    """Shares of suspicious slices by detector: before and after the filter."""
    rows = []
    for name, detector in detectors.items():
        row: dict[str, object] = {"detector": name, "role": "filter" if name == filter_by else "test"}
        for suffix, kept in (("before", np.ones_like(removed)), ("after", ~removed)):
            statistic = found[name].statistic[kept]
            if not len(statistic):
                continue
            share = share_suspicious(statistic, detector.null, rate)
            row |= {suffix: share.estimate, f"{suffix}_low": share.low, f"{suffix}_high": share.high}
        rows.append(row)
    return pd.DataFrame(rows)


def _judgement(
    found: Mapping[str, Found], detectors: Mapping[str, Detector], removed: Flags, rate: float
) -> pd.DataFrame:
    tables = []
    for name, detector in detectors.items():
        if removed.all():
            continue
        values, null = found[name].values[~removed], detector.held_out.values
        if len(values.columns) > 1:
            values = values.assign(**{JOINT: found[name].statistic[~removed]})
            null = null.assign(**{JOINT: detector.held_out.statistic})
        tables.append(judge_scores(values, null, detector.null.patients, rate).assign(detector=name))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _sensitivity(detectors: Mapping[str, Detector], training: SliceSet, rate: float, planted: int) -> pd.DataFrame:
    rates = sorted({rate, 0.05})
    tables = []
    for name, detector in detectors.items():
        table = sensitivity(detector.of_slices, detector.null, training, planted=planted, false_alarm_rates=rates)
        tables.append(table.assign(detector=name))
    return pd.concat(tables, ignore_index=True)


def _membership(
    parts: Parts, kept: SliceSet, embed: Embed, search: PixelSearch, folder: Path, losses: pd.DataFrame | None
) -> pd.DataFrame:
    count = min(SLICES_OF_A_PATIENT, fewest_slices(parts.training, parts.held_out))
    scores = []
    for part in (parts.training, parts.held_out):
        some = part.subset(equal_shares(part, count))
        scores.append(nearest_synthetic(some, kept, embed, search, folder / ".search"))
    table = membership_table(scores[0], scores[1])
    if losses is None:
        return table
    likely = pd.DataFrame({"patient": losses["patient"], "loss": -losses["loss"]})
    sides = [likely[likely["patient"].isin(part.patients)] for part in (parts.training, parts.held_out)]
    return pd.concat([table, membership_table(sides[0], sides[1])], ignore_index=True)


def _criteria(
    parts: Parts, tables: Mapping[str, pd.DataFrame], removed: Flags, filter_by: str, thresholds: Thresholds
) -> list[Criterion]:
    share, rate = float(removed.mean()), thresholds.false_alarm_rate
    patients = len(parts.held_out.patients)
    criteria = [
        at_least(
            "held-out patients",
            patients,
            thresholds.min_held_out_patients,
            f"{patients} held-out patients calibrate the detectors; {thresholds.min_held_out_patients} are needed",
        ),
        at_most(
            "removed",
            share,
            thresholds.max_removed,
            f"{share:.2%} of the slices were suspicious to the filter ({filter_by}) and removed; "
            f"{thresholds.max_removed:.2%} are allowed",
        ),
    ]
    for row in tables["shares"].to_dict("records"):
        if row["role"] == "filter":
            continue
        name, after, low = row["detector"], row.get("after", np.nan), row.get("after_low", np.nan)
        words = f"{after:.2%} of the slices that are kept are suspicious to the other detector ({name})"
        criteria += [
            at_most(f"retest by {name}", after, thresholds.max_retest, f"{words}; {thresholds.max_retest:.2%} allowed"),
            at_most(
                f"retest by {name}, beside chance",
                low,
                rate,
                f"the interval of that share begins at {low:.2%}; chance makes {rate:.2%} suspicious",
            ),
        ]
    table = tables["sensitivity"]
    for name in table["detector"].unique():
        for kind in MUST_FIND["filter" if name == filter_by else "test"]:
            at = table["false_alarm_rate"] == rate
            rows = table[at & (table["detector"] == name) & (table["kind"] == kind)]
            detected = float(rows["rate"].iloc[0])
            criteria.append(
                at_least(
                    f"{kind} copies found by {name}",
                    detected,
                    thresholds.min_copies_found,
                    f"{name} finds {detected:.1%} of planted copies ({kind}); {thresholds.min_copies_found:.1%} needed",
                )
            )
    if "membership" in tables:
        attack = tables["membership"]
        worst = attack["auc_low"].max(skipna=False)
        criteria.append(
            at_most(
                "membership inference",
                float(worst),
                thresholds.max_membership_auc,
                f"the best of {len(attack)} membership attacks has an area under the curve of at least {worst:.3f} "
                f"(95 % interval; chance 0.5, {thresholds.max_membership_auc:g} allowed)",
            )
        )
    return criteria
