"""Post-hoc moving averages: exponents, decay per step, tracked averages and what snapshots of them give."""

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_modules.power_ema import Profile, decay, exponent, reconstruct

Arrays = dict[str, npt.NDArray[Any]]


def averages(path: npt.NDArray[Any], betas: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The average after every step: path (steps, weights), betas (steps,)."""
    mean = np.zeros(path.shape[1])
    out = []
    for weights, beta in zip(path, betas, strict=True):
        mean = beta * mean + (1 - beta) * weights
        out.append(mean)
    return np.stack(out)


def posthoc_ema(stem: str, ref: Arrays) -> dict[str, Any]:
    images_seen = ref["images_seen"].tolist()
    steps = [(after - int(ref["batch"]), after) for after in images_seen]

    def betas(std: float) -> npt.NDArray[Any]:
        return np.array([decay(exponent(std), *step) for step in steps])

    stds = ref["stds"].tolist()
    snapshots = [
        Profile(*pair) for pair in zip(*(ref[f"snapshot_{k}"].tolist() for k in ("images", "stds")), strict=True)
    ]
    tracked = {std: averages(ref["theta"], betas(std)) for _, std in snapshots}
    stored = np.stack([tracked[std][images_seen.index(time)] for time, std in snapshots])
    coefficients = reconstruct(snapshots, [Profile(images_seen[-1], std) for std in stds]).coefficients.numpy()
    ours = {
        "gammas": [exponent(std) for std in stds],
        "snapshots": stored,
        "coefficients": coefficients,
        "reconstructed": coefficients.T @ stored,
        "direct_ema": np.stack([averages(ref["theta"], betas(std))[-1] for std in stds]),
    }
    for key in ref:
        named = [int(hundredths) / 100 for hundredths in re.findall(r"_std(\d{3})", key)]
        if key.startswith("beta_"):
            ours[key] = np.stack([betas(std) for std in named], axis=1)
        elif key.startswith("ema_"):
            ours[key] = np.stack([averages(ref["theta"], betas(std)) for std in named], axis=1)
    return ours


FAMILIES = {"posthoc_ema": posthoc_ema}
TOLERANCES = {"posthoc_ema": (1e-12, 1e-12)}
INPUTS = {
    "posthoc_ema": {
        *("stds", "images_seen", "batch", "theta", "snapshot_steps", "snapshot_images", "snapshot_stds"),
    }
}
