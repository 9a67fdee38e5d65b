"""Planted positives: copies of training slices, changed in known ways, on which a detector shows what it can find.

| kind | what it is | parameters |
|---|---|---|
| `exact` | the training slice | |
| `mirrored` | left and right exchanged | |
| `shifted` | by 1 to 5 px along the farther axis, filled up with 0 | rows_px, columns_px |
| `rotated` | by 1 to 5 degrees either way, bilinear | degrees |
| `intensity` | every modality v -> 255 gain (v / 255)^gamma, both 2^-0.5 to 2^0.5 | gain, gamma |
| `blurred` | Gaussian, standard deviation 0.5 to 1.5 px | sigma_px |
| `noisy` | Gaussian noise in the brain, standard deviation 5 to 20 grey levels | sigma |
| `resampled` | to 1/2, 1/3 or 1/4 of the size by area, and back bilinearly | factor |
| `blended_3_to_1`, `blended_1_to_1` | with a slice of another patient of about the same height | weight, own |
| `label_removed` | no tumour in the label | |
| `modality_removed` | one modality is 0 everywhere | modality |
| `modality_replaced` | one modality is that of the slice of the other patient | modality |

Pixels are those of the slices that are given: 5 px are much at 64 px and little at 256 px. Geometry moves the label by
nearest neighbour, removal removes it, and nothing else touches it; a blend has that of the slice that is copied. A
positive is a function of its slices, the seed and an index alone.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import ndimage

from datamodules.slice_dataset import relative_height
from datamodules.slice_set import LEFT_RIGHT_AXIS, MODALITIES, Slices, SliceSet

Kind = Literal[
    "exact",
    "mirrored",
    "shifted",
    "rotated",
    "intensity",
    "blurred",
    "noisy",
    "resampled",
    "blended_3_to_1",
    "blended_1_to_1",
    "label_removed",
    "modality_removed",
    "modality_replaced",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_SHIFT_PX = 5

Parameters = Mapping[str, Any]
_Plant = Callable[[Slices, Slices, np.random.Generator], tuple[npt.NDArray[Any], Parameters]]


@dataclass(frozen=True)
class Planted:
    """Positives of one kind.

    Attributes:
        slices: uint8 (n, 5, H, W).
        table: a row per positive: kind, source and partner (positions in the training set), source_patient,
            partner_patient, and parameters, in JSON. The partner enters in blends and replaced modalities only.
    """

    slices: Slices
    table: pd.DataFrame


def plant(kind: Kind, source: Slices, partner: Slices, seed: int, index: int) -> tuple[Slices, Parameters]:
    """Make one positive.

    Args:
        kind: see the table above.
        source: the slice that is copied, uint8 (5, H, W).
        partner: a slice of another patient, uint8 (5, H, W).
        seed: names the series.
        index: of the positive in it.

    Returns:
        The positive, uint8 (5, H, W), and its parameters.
    """
    rng = np.random.default_rng((seed, index, zlib.crc32(kind.encode())))
    planted, parameters = _PLANTS[kind](source, partner, rng)
    return np.clip(np.rint(planted), 0, 255).astype(np.uint8), parameters


def plant_in(training: SliceSet, kind: Kind, count: int, seed: int) -> Planted:
    """Make positives of slices drawn from a training set; the slices, and their partners, are the same for every kind.

    Args:
        training: with at least two patients.
        kind: see the table above.
        count: how many; all slices of a smaller set.
        seed: names the series.

    Raises:
        ValueError: if there is only one patient.
    """
    if len(training.patients) < 2:
        raise ValueError(
            f"{training.root}: expected training slices of at least 2 patients to plant blends, but got "
            f"{len(training.patients)}."
        )
    rng = np.random.default_rng(seed)
    sources = np.sort(rng.permutation(len(training))[:count])
    patients, height = training.index["patient"].to_numpy(dtype=object), relative_height(training)
    partners = np.array([_partner(patients, height, source, rng) for source in sources])
    pairs = zip(training.read(sources), training.read(partners), strict=True)
    made = [plant(kind, one, other, seed, index) for index, (one, other) in enumerate(pairs)]
    table = pd.DataFrame(
        {
            "kind": kind,
            "source": sources,
            "source_patient": patients[sources],
            "partner": partners,
            "partner_patient": patients[partners],
            "parameters": [json.dumps(parameters) for _, parameters in made],
        }
    )
    return Planted(np.stack([slices for slices, _ in made]), table)


def _partner(
    patients: npt.NDArray[np.object_], height: npt.NDArray[np.float32], source: int, rng: np.random.Generator
) -> int:
    """Choose another patient, and the slice of that patient which is nearest in height."""
    chosen = rng.choice(np.unique(patients[patients != patients[source]]))
    rows = np.flatnonzero(patients == chosen)
    return int(rows[np.abs(height[rows] - height[source]).argmin()])


def _exact(source: Slices, partner: Slices, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Parameters]:
    return source, {}


def _mirrored(source: Slices, partner: Slices, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Parameters]:
    return np.flip(source, LEFT_RIGHT_AXIS), {}


def _shifted(source: Slices, partner: Slices, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Parameters]:
    side = 2 * MAX_SHIFT_PX + 1
    place = (side * side // 2 + 1 + int(rng.integers(side * side - 1))) % (side * side)  # the middle is no shift
    rows, columns = (number - MAX_SHIFT_PX for number in divmod(place, side))
    moved = ndimage.shift(source, (0, rows, columns), order=0)
    return moved, {"rows_px": rows, "columns_px": columns}


def _rotated(source: Slices, partner: Slices, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Parameters]:
    degrees = float(rng.uniform(1, 5) * rng.choice([-1, 1]))
    turned = [
        ndimage.rotate(channels.astype(np.float64), degrees, axes=(2, 1), reshape=False, order=order)
        for channels, order in ((source[:-1], 1), (source[-1:], 0))
    ]
    return np.concatenate(turned), {"degrees": degrees}


def _intensity(source: Slices, partner: Slices, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Parameters]:
    gain, gamma = np.exp2(rng.uniform(-0.5, 0.5, (2, len(MODALITIES))))
    grey = 255 * gain[:, None, None] * (source[:-1] / 255) ** gamma[:, None, None]
    return _with_label(grey, source), {"gain": gain.tolist(), "gamma": gamma.tolist()}


def _blurred(source: Slices, partner: Slices, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Parameters]:
    sigma = float(rng.uniform(0.5, 1.5))
    grey = ndimage.gaussian_filter(source[:-1].astype(np.float64), (0, sigma, sigma), mode="constant")
    return _with_label(grey, source), {"sigma_px": sigma}


def _noisy(source: Slices, partner: Slices, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Parameters]:
    sigma = float(rng.uniform(5, 20))
    brain = source[:-1].any(axis=0)
    grey = source[:-1] + brain * rng.normal(0, sigma, source[:-1].shape)
    return _with_label(grey, source), {"sigma": sigma}


def _resampled(source: Slices, partner: Slices, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Parameters]:
    factor, size = int(rng.integers(2, 5)), source.shape[1:]
    small = [-(-side // factor) for side in size]
    image = torch.from_numpy(source[None].astype(np.float64))
    grey = F.interpolate(F.interpolate(image[:, :-1], small, mode="area"), size, mode="bilinear")
    label = F.interpolate(F.interpolate(image[:, -1:], small, mode="nearest-exact"), size, mode="nearest-exact")
    return torch.cat([grey, label], dim=1)[0].numpy(), {"factor": factor}


def _blended(
    source: Slices, partner: Slices, rng: np.random.Generator, weight: float
) -> tuple[npt.NDArray[Any], Parameters]:
    grey = weight * source[:-1] + (1 - weight) * partner[:-1]
    return _with_label(grey, source), {"weight": weight}


def _label_removed(source: Slices, partner: Slices, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Parameters]:
    return _with_label(source[:-1], np.zeros_like(source)), {}


def _modality_removed(source: Slices, partner: Slices, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Parameters]:
    return _modality_replaced(source, np.zeros_like(source), rng)


def _modality_replaced(
    source: Slices, partner: Slices, rng: np.random.Generator
) -> tuple[npt.NDArray[Any], Parameters]:
    modality, changed = int(rng.integers(len(MODALITIES))), source.copy()
    changed[modality] = partner[modality]
    return changed, {"modality": MODALITIES[modality]}


def _with_label(grey: npt.NDArray[Any], source: Slices) -> npt.NDArray[Any]:
    return np.concatenate([grey, source[-1:]])


_PLANTS: Mapping[Kind, _Plant] = {
    "exact": _exact,
    "mirrored": _mirrored,
    "shifted": _shifted,
    "rotated": _rotated,
    "intensity": _intensity,
    "blurred": _blurred,
    "noisy": _noisy,
    "resampled": _resampled,
    "blended_3_to_1": partial(_blended, weight=0.75),
    "blended_1_to_1": partial(_blended, weight=0.5),
    "label_removed": _label_removed,
    "modality_removed": _modality_removed,
    "modality_replaced": _modality_replaced,
}
