"""Attack view: can somebody who has the synthetic set alone tell whom its generator was trained on?

The attacker holds slices of a person and looks for the nearest synthetic ones. If the set is nearer to the training
patients than to held-out ones, it tells who was among them. Every patient counts once, with as many slices as all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.slice_set import SliceSet
from evaluation.embedding_search import Embed, EmbeddingIndex
from evaluation.nearness import Nearness
from evaluation.pixel_search import PixelSearch, search_slices
from metrics.membership import Rule, extractable_share, membership_inference, patient_scores

PIXEL_SCORES = ("all", "brain all")
RULES: tuple[Rule, ...] = ("max", "mean")
FALSE_POSITIVE_RATE = 0.01


def nearest_synthetic(
    real: SliceSet, synthetic: SliceSet, embed: Embed, search: PixelSearch, folder: Path
) -> pd.DataFrame:
    """Look up real slices in a synthetic set: a row per slice with patient, "all", "brain all" and "embedding"."""
    table = search_slices("patients", real, synthetic, folder, search)
    if table is None:
        raise ValueError(f"{folder}: other processes still search here. Wait until they are done.")
    scores = Nearness.of_search(table).values[list(PIXEL_SCORES)].reset_index(drop=True)
    found = EmbeddingIndex(synthetic, embed).nearest_of(real)
    return scores.assign(embedding=found.cosine, patient=real.index["patient"].to_numpy(dtype=object))


def membership_table(training: pd.DataFrame, held_out: pd.DataFrame) -> pd.DataFrame:
    """Attack with every score, by the largest and by the mean of the slices of a patient.

    Args:
        training: a row per slice: patient, and a column per score, the larger the more likely a training slice.
        held_out: the same of patients whom the generator has not seen.

    Returns:
        A row per score and rule: score, rule, auc, auc_low, auc_high, tpr (at a false-positive rate of 1 %), tpr_low,
        tpr_high, extractable (upper confidence limit of the share of training patients that can be told), patients,
        held_out_patients.
    """
    rows = []
    for score in [name for name in training.columns if name != "patient"]:
        for rule in RULES:
            members, strangers = (patient_scores(part[score], part["patient"], rule) for part in (training, held_out))
            found = membership_inference(members, strangers, false_positive_rate=FALSE_POSITIVE_RATE)
            bound = extractable_share(members, strangers, false_positive_rate=FALSE_POSITIVE_RATE)
            rows.append(
                {
                    "score": score,
                    "rule": rule,
                    "auc": found.auc.estimate,
                    "auc_low": found.auc.low,
                    "auc_high": found.auc.high,
                    "tpr": found.tpr.estimate,
                    "tpr_low": found.tpr.low,
                    "tpr_high": found.tpr.high,
                    "extractable": bound.upper,
                    "patients": bound.n,
                    "held_out_patients": bound.n_heldout,
                }
            )
    return pd.DataFrame(rows)


def equal_shares(slices: SliceSet, count: int) -> npt.NDArray[np.int64]:
    """Choose `count` slices of every patient, evenly spaced along their order: positions, ascending.

    Raises:
        ValueError: if a patient has fewer.
    """
    chosen = []
    for patient, rows in slices.index.groupby("patient").indices.items():
        if len(rows) < count:
            raise ValueError(f"{slices.root}: expected {count} slices of every patient, but {patient} has {len(rows)}.")
        chosen.append(np.asarray(rows)[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def fewest_slices(*sets: SliceSet) -> int:
    """Count the slices of the patient who has fewest."""
    return min(int(slices.index["patient"].value_counts().min()) for slices in sets)
