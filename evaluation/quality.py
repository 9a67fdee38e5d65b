"""`standin quality`: the aggregate scores of a synthetic set that papers report, beside the real-to-real floor."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.console import Console

from datamodules.slice_set import SliceSet, write_atomically
from evaluation.detectors import refuse_spoilt_null
from evaluation.feature_scores import scores_of_sets
from evaluation.feature_spaces import IMAGENET, feature_space
from evaluation.memorization import training_and_held_out
from evaluation.pixel_search import chosen_device
from evaluation.text import align


def quality(synthetic: Path, real: Path, out: Path, features: list[str] | None = None, device: str = "auto") -> None:
    """Score a synthetic set in feature spaces, and write OUT/quality.csv.

    Every score stands beside what real slices of other patients get in the place of the synthetic ones. None of them
    says whether a slice may be shared: copies make several of them better.

    Args:
        synthetic: slice set that a generator made; its manifest says whom the generator has seen.
        real: the slice set that it was trained on, with other patients in it.
        out: folder for quality.csv; its last columns are the fingerprints of the sets.
        features: the feature spaces; null: imagenet (EfficientNet-Lite0, of photographs). A checkpoint of a copy
            detector (.ckpt), or TorchScript files that turn float (N, 3, H, W) in [0, 1] into features (N, D).
        device: cpu, cuda, cuda:1, ...; auto: a GPU if there is one.

    Raises:
        ValueError: if the sets do not fit, a feature space cannot be made, or a copy detector saw held-out patients.
    """
    made, source = SliceSet(synthetic), SliceSet(real)
    training, held_out = training_and_held_out(made, source)
    spaces = {name: feature_space(name, chosen_device(device)) for name in features or [IMAGENET]}
    for space in features or []:
        if space.endswith(".ckpt"):
            refuse_spoilt_null(Path(space), held_out)
    table = scores_of_sets(training, held_out, made, spaces)
    table = table.assign(fingerprint=made.manifest.fingerprint, real_fingerprint=source.manifest.fingerprint)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "quality.csv", table.to_csv(index=False))
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for name, rows in table.groupby("features", sort=False):
        console.print(f"\n{made.root} in the feature space {name}")
        console.print("\n".join(align(_lines(rows))))
    console.print(f"\nTable: {out / 'quality.csv'}")


def _lines(table: pd.DataFrame) -> list[list[str]]:
    rows = table[["score", "value", "real", "better"]].itertuples(index=False)
    return [["", "synthetic", "real", "better"], *([s, f"{v:.4g}", f"{r:.4g}", b] for s, v, r, b in rows)]
