"""`standin release`: may this synthetic set leave the house? It filters, tests again, and writes what may be shared.

One detector removes what is suspicious, the other, which does not share its blind spots, tests what is left; planted
copies show what both can find; attacks show what somebody learns who has the set alone. What is shared and what is
evidence are apart: OUT holds no real image and no name of a patient unless that is asked for, EVIDENCE holds both.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from rich.console import Console

from datamodules.export_decathlon import export_decathlon
from datamodules.export_images import export_images
from datamodules.slice_set import INDEX_COLUMNS, SliceSet, finish_slice_set, save_shard, write_atomically
from evaluation.card import write_card
from evaluation.card_sections import Card
from evaluation.detectors import Detector, EmbeddingDetector, PixelDetector, refuse_spoilt_null
from evaluation.feature_spaces import feature_space
from evaluation.memorization import check_null, draw_pairs, training_and_held_out
from evaluation.pixel_search import PixelSearch
from evaluation.release_tests import Parts, Results, run_release_tests
from evaluation.remembered import remembered
from evaluation.thresholds import Thresholds
from lightning_modules.base import load_frozen
from lightning_modules.copy_detection import CopyDetector

Filter = Literal["pixels", "embedding"]
SHARD_SLICES = 4096
OWN_KEYS = (
    "format", "format_version", "channels", "classes", "size_px", "slices", "slices_per_split", "fingerprint",
)  # fmt: skip
"""Entries of the manifest that are made anew."""
PRIVATE_KEYS = ("patients_seen", "patients_also_known_as", "signatures_seen", "training_unknown_of", "trained_on")
"""Entries of the manifest that name training patients, or lets somebody who has their images recognise them."""


def release(
    synthetic: Path,
    real: Path,
    detector: Path,
    out: Path,
    evidence: Path | None = None,
    filter: Filter = "pixels",
    thresholds: Thresholds = Thresholds(),  # noqa: B008 (it is frozen)
    mirror: bool = True,
    max_shift_px: int = 3,
    planted: int = 256,
    study: Path | None = None,
    losses: Path | None = None,
    features: list[str] | None = None,
    also_as: Literal["png", "tiff", "nifti"] | None = None,
    name_patients: bool = False,
    with_real_images: bool = False,
    title: str = "Synthetic brain tumour MR slices",
    memory_gib: float | None = None,
    device: str = "auto",
) -> None:
    """Filter a synthetic set, test what is left, and write it for sharing with a data card.

    OUT is written only if all thresholds hold, and the exit status is 0 only then. The card is in EVIDENCE in any case.
    The same command again goes on after an interruption.

    Args:
        synthetic: slice set that a generator made; its manifest says whom the generator has seen.
        real: the slice set that it was trained on, with other patients in it.
        detector: checkpoint of a copy detector that was trained on the same patients (configs/copy_detector.yaml).
        out: new folder for slices/, card.html, card.md, card.json and SHA256SUMS, complete and ready to share.
        evidence: folder for what must not be shared: nearest pairs, names of patients; null: OUT-evidence.
        filter: the detector that removes slices; the other one tests what is left.
        thresholds: what must hold.
        mirror: left-right flips are searched too.
        max_shift_px: all shifts of up to that many pixels along each axis are searched too.
        planted: planted copies of each kind, to measure what the detectors find.
        study: folder of a report, whose Dice ratios come into the card.
        losses: table of the generator's losses on real slices (callbacks.MembershipLosses), for another attack.
        features: further feature spaces of the aggregate scores: "imagenet", or TorchScript files that turn float
            (N, 3, H, W) in [0, 1] into features (N, D).
        also_as: write images/ too, a PNG or TIFF per channel as `standin export images` does, or NIfTI files as
            `standin export decathlon` does; slices that these refuse are listed in images/export.json.
        name_patients: keep the names and image signatures of the training patients in the manifest, so that others can
            leave them out of their tests; only where membership is public.
        with_real_images: show the nearest real slices in the card too.
        title: of the card.
        memory_gib: of the search; null: 2 on a CPU, half of what is free on a GPU.
        device: cpu, cuda, cuda:1, ...; auto: a GPU if there is one.

    Raises:
        ValueError: if the sets do not fit, the detector saw held-out patients, or OUT holds something else.
    """
    evidence = out.with_name(f"{out.name}-evidence") if evidence is None else evidence
    if out.exists():
        raise ValueError(f"{out} exists already. Choose another folder, or remove it.")
    if evidence.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{evidence} is inside {out}, which is shared. Choose another folder.")
    made, source = SliceSet(synthetic), SliceSet(real)
    training, held_out = training_and_held_out(made, source)
    check_null(held_out, thresholds.false_alarm_rate)
    network = load_frozen(CopyDetector, detector)
    refuse_spoilt_null(detector, held_out)
    loss_table = None if losses is None else pd.read_parquet(losses)
    card = Card(title, filter, None if study is None else read_usefulness(study), with_real_images)
    search = PixelSearch(1, mirror, max_shift_px, memory_gib, device)
    spaces = {name: feature_space(name, search.where) for name in features or []}
    evidence.mkdir(parents=True, exist_ok=True)
    network.to(search.where)
    embed = remembered(network.embed_array, sha256(detector), evidence / ".embeddings")
    detectors: dict[str, Detector] = {
        "pixels": PixelDetector(training, held_out, search, evidence / ".search"),
        "embedding": EmbeddingDetector(training, held_out, embed),
    }
    parts = Parts(made, training, held_out)
    results = run_release_tests(
        parts, detectors, filter, thresholds, embed, search, evidence, planted, loss_table, spaces
    )
    write_evidence(evidence, parts, detectors, results)
    write_card(evidence / "card", card, parts, results)
    if results.verdict:
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_kept(partial / "slices", made.subset(~results.removed), name_patients)
        if also_as == "nifti":
            export_decathlon(partial / "slices", partial / "images", skip_faulty=True)
        elif also_as:
            export_images(partial / "slices", partial / "images", also_as, skip_faulty=True)
        hashes = {f"slices/{path.name}": sha256(path) for path in sorted((partial / "slices").iterdir())}
        write_card(partial, replace(card, hashes=hashes), parts, results)
        write_hashes(partial)
        partial.replace(out)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for criterion in results.criteria:
        console.print(f"{'holds' if criterion.holds else 'FAILS'}  {criterion.text}")
    console.print(f"Evidence, not to be shared: {evidence}")
    if not results.verdict:
        failed = sum(not criterion.holds for criterion in results.criteria)
        sys.exit(f"Not released: {failed} of {len(results.criteria)} thresholds do not hold.")
    kept, removed = int((~results.removed).sum()), int(results.removed.sum())
    console.print(f"Released: {out} ({kept} slices, {removed} removed)")


def read_usefulness(study: Path) -> pd.DataFrame:
    """Read the Dice ratios of a report.

    Raises:
        ValueError: if the folder is none of a report.
    """
    path = study / "tables" / "ratio_to_real.csv"
    if not path.is_file():
        raise ValueError(f"Expected a report in {study}, but there is no {path}. `standin report` makes it.")
    return pd.read_csv(path)


def write_evidence(folder: Path, parts: Parts, detectors: Mapping[str, Detector], results: Results) -> None:
    """Write all tables, and the nearest pairs as pictures, by detector."""
    for name, table in results.tables.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False))
    for name, detector in detectors.items():
        found, null = results.found[name], detector.held_out
        draw_pairs(folder / f"pairs-{name}.png", parts.synthetic, parts.held_out, parts.training, found, null)


def write_kept(folder: Path, kept: SliceSet, name_patients: bool) -> None:
    """Write the slices that are kept as a slice set, without what names patients or lets somebody recognise them."""
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, len(kept), SHARD_SLICES)):
        positions = np.arange(start, min(start + SHARD_SLICES, len(kept)))
        save_shard(folder / f"slices-{shard:05d}.npy", kept.read(positions))
    content = {key: value for key, value in kept.manifest.content.items() if key not in OWN_KEYS}
    if not name_patients:
        content = {key: value for key, value in content.items() if key not in PRIVATE_KEYS}
    content["filtered"] = "slices that a search for memorization found suspicious were removed"
    finish_slice_set(folder, kept.index[list(INDEX_COLUMNS)], content)


def sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashes(folder: Path) -> None:
    """Write SHA256SUMS, as `sha256sum --check` reads it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    write_atomically(folder / "SHA256SUMS", "\n".join(lines) + "\n")
