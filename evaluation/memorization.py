"""`standin memorization`: how near synthetic slices come to training slices, beside what owes nothing to them.

Every number has two nulls, from the same search among the same training slices: slices of held-out patients, and
training slices among those of all other patients.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from datamodules.slice_set import SliceSet, write_atomically
from evaluation.pixel_search import PixelSearch, search_slices

STATES = ".search"


def memorization(
    synthetic: Path,
    real: Path,
    out: Path,
    k: int = 5,
    mirror: bool = True,
    max_shift_px: int = 3,
    null_slices: int | None = None,
    memory_gib: float | None = None,
    device: str = "auto",
    shard: int = 0,
    shards: int = 1,
) -> None:
    """Find the nearest training slices of every synthetic slice, and of real slices that owe nothing to them.

    All pairs are compared, in exact integer arithmetic: Pearson over the whole image and within the brain, and
    Euclidean distance, in each modality and over all four, with the label and without. The same command again continues
    after an interruption; what it goes on from is in OUT/.search.

    Args:
        synthetic: slice set that a generator made; its manifest says whom the generator has seen.
        real: the slice set that it was trained on, with other patients in it.
        out: folder for nearest-synthetic.parquet, nearest-held-out.parquet, nearest-train.parquet and search.json.
        k: nearest training slices of every slice, by every score.
        mirror: left-right flips are tried too: twice the work.
        max_shift_px: all shifts of up to that many pixels along each axis are tried: 9, 25, 49, ... times the work.
        null_slices: at most that many slices of each null, evenly spaced; null: all.
        memory_gib: for queries, blocks and products; null: 2 on a CPU, half of what is free on a GPU.
        device: cpu, cuda, cuda:1, ...; auto: a GPU if there is one.
        shard: number of this process among shards, from 0.
        shards: processes that work in the same folder at the same time, each started with its own number.

    Raises:
        ValueError: if the sets do not fit, or there are no training or held-out slices.
    """
    search = PixelSearch(k, mirror, max_shift_px, memory_gib, device, shard, shards)
    made, source = SliceSet(synthetic), SliceSet(real)
    training, held_out = training_and_held_out(made, source)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    queries = {
        "synthetic": made,
        "held-out": thinned(held_out, null_slices),
        "train": thinned(training, null_slices),
    }
    tables: dict[str, pd.DataFrame | None] = {}
    for _ in range(2):  # again for what other shards have finished in the meantime
        for name, slices in queries.items():
            if tables.get(name) is None:
                tables[name] = search_slices(name, slices, training, out / STATES, search, name == "train")
    missing = [name for name, table in tables.items() if table is None]
    if missing:
        console.print(f"Done here; other shards are still at work on {', '.join(missing)}.")
        return
    for name, table in tables.items():
        assert table is not None
        temporary = out / f".nearest-{name}.{os.getpid()}.tmp"
        table.to_parquet(temporary)
        temporary.replace(out / f"nearest-{name}.parquet")
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
    }
    write_atomically(out / "search.json", json.dumps(description, indent=1) + "\n")
    console.print(f"Nearest training slices: {out}")


def training_and_held_out(synthetic: SliceSet, real: SliceSet) -> tuple[SliceSet, SliceSet]:
    """Divide a real set into the patients whom the generator of a synthetic set has seen, and all others.

    Raises:
        ValueError: if the manifest does not say whom it has seen, or one of the two parts is empty.
    """
    seen = synthetic.manifest.content.get("patients_seen")
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


def thinned(slices: SliceSet, at_most: int | None) -> SliceSet:
    """Keep at most that many slices, evenly spaced; None keeps all."""
    if at_most is None or at_most >= len(slices):
        return slices
    return slices.subset(np.linspace(0, len(slices) - 1, at_most).round().astype(np.int64))
