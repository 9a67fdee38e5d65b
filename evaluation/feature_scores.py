"""Aggregate scores of a synthetic set in a feature space, each beside what real slices of other patients get.

They are what most papers report, and they are blind to a share of copies that would be a breach: 5 % of exact copies
make several of them better. None of them decides on a release.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from datamodules.slice_set import SliceSet
from evaluation.embedding_search import Embed, embed_set
from metrics.data_copying import authentic, data_copying, k_means_cells
from metrics.duplicates import duplicates, vendi_score
from metrics.feature_likelihood import feature_likelihood
from metrics.fidelity import frechet_distance, polynomial_mmd
from metrics.floor import beside_floor, halves_of_patients
from metrics.manifolds import manifold_scores
from metrics.statistics import MIN_PATIENTS

Features = npt.NDArray[np.float32]
Score = Callable[[Tensor, Tensor], float]

MAX_SLICES = 2000
"""Of each kind, so that the matrices fit into memory; drawn by a fixed seed."""
CELLS = 3
K = 5


def scores_of_sets(
    training: SliceSet, held_out: SliceSet, synthetic: SliceSet, spaces: Mapping[str, Embed]
) -> pd.DataFrame:
    """Compute all aggregate scores of a synthetic set in several feature spaces.

    Args:
        training: real slices that the generator has seen.
        held_out: real slices of other patients.
        synthetic: the slices that are judged.
        spaces: by name.

    Returns:
        The rows of `feature_scores` for every space, and its name as features.
    """
    parts = [part.subset(_some(len(part), seed)) for seed, part in enumerate((training, held_out, synthetic))]
    patients = parts[0].index["patient"].to_numpy(dtype=object)
    tables = []
    for name, embed in spaces.items():
        features = [embed_set(part, embed) for part in parts]
        tables.append(feature_scores(features[0], features[1], features[2], patients).assign(features=name))
    return pd.concat(tables, ignore_index=True)


def feature_scores(
    training: Features,
    held_out: Features,
    synthetic: Features,
    training_patients: npt.NDArray[np.object_],
    seed: int = 0,
) -> pd.DataFrame:
    """Compute all aggregate scores in one feature space.

    Args:
        training: (N, D).
        held_out: (H, D), of patients whom the generator has not seen.
        synthetic: (M, D).
        training_patients: (N,).
        seed: of divisions.

    Returns:
        A row per score: score, value, real (what real slices of other patients get in the place of synthetic ones; NaN
        for scores that need a third group of patients), better ("lower", "higher", "near 0" or "near the real one"),
        blind_to. NaN where there are too few patients or slices.
    """
    rng = np.random.default_rng(seed)
    t, h, s = (torch.from_numpy(part) for part in (training, held_out, synthetic))
    rows: list[tuple[str, float, float, str, str]] = []

    def add(score: str, value: float, real: float, better: str, blind_to: str) -> None:
        rows.append((score, value, real, better, blind_to))

    copies = "memorization"
    enough = len(np.unique(training_patients)) >= 2
    for name, score in (("Fréchet distance", _frechet), ("kernel distance", _kernel)):
        beside = beside_floor(score, t, training_patients, s, seeds=range(3)) if enough else None
        value, floor = (float(x.mean()) for x in (beside.score, beside.floor)) if beside else (np.nan, np.nan)
        add(name, value, floor, "lower", copies)
    halves = halves_of_patients(training_patients, seed) if enough else None
    if halves is not None and min(len(halves[0]), len(halves[1]), len(s)) > K:
        n = min(len(halves[0]), len(halves[1]), len(s))
        first, second = (t[torch.from_numpy(np.sort(rng.permutation(half)[:n]))] for half in halves)
        mine, floor_scores = (
            manifold_scores(first, s[rng.permutation(len(s))[:n]], K),
            manifold_scores(first, second, K),
        )
        for name in ("precision", "recall", "density", "coverage"):
            add(name, getattr(mine, name), getattr(floor_scores, name), "higher", copies)
    copying = data_copying(t, h, s, _cells(t, h, s, seed), 0.0)
    add("data-copying C_T", copying.c_t, np.nan, "near 0", "rare copies")
    numbers = torch.from_numpy(np.unique(training_patients, return_inverse=True)[1])
    if enough:
        add(
            "authenticity",
            float(authentic(t, s, numbers).double().mean()),
            float(authentic(t, h, numbers).double().mean()),
            "near the real one",
            "rare copies",
        )
    likelihood = feature_likelihood(t, h, s, seed=seed)
    add("feature likelihood divergence", likelihood.fld, np.nan, "lower", "rare copies")
    add("feature likelihood gap", likelihood.gap, np.nan, "near 0", "copies that are a little changed")
    if len(np.unique(training_patients)) >= MIN_PATIENTS and len(s) >= MIN_PATIENTS:
        found = duplicates(s, t, training_patients, seed=seed)
        add("share of duplicates", found.share.estimate, np.nan, "lower", "copies of training slices")
    n = min(len(s), len(t))
    drawn = [part[rng.permutation(len(part))[:n]] for part in (s, t)]
    add("Vendi score", vendi_score(drawn[0]), vendi_score(drawn[1]), "higher", "quality and copies")
    return pd.DataFrame(rows, columns=["score", "value", "real", "better", "blind_to"])


def _some(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.sort(np.random.default_rng(seed).permutation(count)[:MAX_SLICES])


def _frechet(reference: Tensor, compared: Tensor) -> float:
    return float(frechet_distance(reference, compared))


def _kernel(reference: Tensor, compared: Tensor) -> float:
    return float(polynomial_mmd(reference, compared))


def _cells(training: Tensor, held_out: Tensor, synthetic: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Divide into as many cells as all have held-out features in, without which C_T is not defined."""
    for count in range(CELLS, 1, -1):
        cells = k_means_cells(training, held_out, synthetic, count, seed)
        if set(cells[0].tolist()) <= set(cells[1].tolist()):
            return cells
    whole = [torch.zeros(len(part), dtype=torch.int64) for part in (training, held_out, synthetic)]
    return whole[0], whole[1], whole[2]
