"""A study as the training runs leave it on disk, with numbers that a test chooses."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from datamodules.slice_set import MODALITIES, class_pixels, find_shards, finish_slice_set, read_manifest, save_shard

ENTITIES = ("core", "oedema", "enhancing", "WT", "TC", "ET")
SPLITS = {"train": 4, "val": 3, "test": 4}
SLICES_PER_PATIENT = 6


def heads(n, size, seed, tumour=0.7):
    """uint8 (n, 5, size, size): ellipses with a smooth texture, and a round tumour in a share of them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    out = np.zeros((n, 5, size, size), np.uint8)
    for one in out:
        brain = (x / rng.uniform(0.6, 0.75)) ** 2 + (y / rng.uniform(0.75, 0.9)) ** 2 < 1
        phase = rng.uniform(0, 6, 4)
        texture = np.sin(7 * x + phase[0]) * np.cos(5 * y + phase[1]) + np.sin(11 * y + phase[2] + 3 * x)
        if rng.random() < tumour:
            cx, cy, r = *rng.uniform(-0.3, 0.3, 2), rng.uniform(0.15, 0.35)
            d = np.hypot(x - cx, y - cy) / r
            one[4] = np.select([d < 0.4, d < 0.6, d < 1], [1, 3, 2]) * brain
        for channel, (base, core, oedema, ring) in enumerate(
            ((130, 60, 90, 110), (120, 60, 90, 240), (110, 230, 200, 180), (100, 120, 230, 190))
        ):
            value = base + 22 * texture
            for label, level in ((1, core), (2, oedema), (3, ring)):
                value = np.where(one[4] == label, level + 6 * texture, value)
            one[channel] = np.where(brain, value + rng.normal(0, 5, value.shape), 0).clip(0, 255)
    return out


def write_real(root: Path, size=16):
    root.mkdir(parents=True)
    patients = [(f"P{i:03d}", split) for i, split in enumerate(np.repeat(list(SPLITS), list(SPLITS.values())))]
    slices = np.concatenate([heads(SLICES_PER_PATIENT, size, seed) for seed in range(len(patients))])
    save_shard(root / "slices-00000.npy", slices)
    index = class_pixels(slices[:, 4]).assign(
        patient=np.repeat([p for p, _ in patients], SLICES_PER_PATIENT),
        split=np.repeat([s for _, s in patients], SLICES_PER_PATIENT),
        z=np.tile(np.arange(SLICES_PER_PATIENT), len(patients)),
    )
    finish_slice_set(root, index.assign(volume=index["patient"]), {"kind": "real", "spacing_mm": 4.0})


def training_set(root: Path):
    manifest = read_manifest(root)
    part = {"root": str(root), "kind": manifest.kind, "fingerprint": manifest.fingerprint}
    return {**part, "slices": manifest.content["slices_per_split"]["train"]}


def write_run(folder: Path, kind, trained_on, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "name": folder.name,
        "kind": kind,
        "model": {"generator": "lightning_modules.stylegan.StyleGAN2"}.get(kind, "lightning_modules.segmentation.UNet"),
        "seed": 0,
        "images_seen": 1000,
        "train_seconds": 90.0,
        "training_sets": [training_set(Path(root)) for root in trained_on],
        "held_out_split": "val",
        "command": ["train.py", "--config", f"configs/{folder.name}.yaml"],
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
    }
    (folder / "run.json").write_text(json.dumps({**run, **changes}))
    (folder / "metrics.json").write_text("{}")


def write_generator(folder: Path, real: Path, r_synthetic, r_held_out, size=16, slices=None, **changes):
    """A generator run; the nearest training slice of row i is slice i modulo their number."""
    synthetic = folder / "synthetic"
    synthetic.mkdir(parents=True)
    slices = heads(len(r_synthetic), size, 99, tumour=0.5) if slices is None else slices
    save_shard(synthetic / "slices-00000.npy", slices)
    names = [f"synthetic-{i}" for i in range(len(slices))]
    index = class_pixels(slices[:, 4]).assign(patient=names, volume=names, z=0, split="train")
    finish_slice_set(synthetic, index, {"kind": "synthetic", "spacing_mm": 4.0, "patients_seen": ["P000"]})
    tables = []
    for name, r in (("synthetic", r_synthetic), ("held-out", r_held_out)):
        position = np.arange(len(r))
        nearest = position % (SPLITS["train"] * SLICES_PER_PATIENT)
        table = pd.DataFrame({"set": name, "position": position, "r": r})
        for shift, modality in enumerate(MODALITIES):
            table[f"r_{modality}"] = np.asarray(r) - 0.01 * shift
        tables.append(
            table.assign(nearest=nearest, nearest_patient=[f"P{n // SLICES_PER_PATIENT:03d}" for n in nearest])
        )
    write_run(folder, "generator", [real], **changes)
    pd.concat(tables).to_csv(folder / "memorization.csv", index=False)


def write_segmenter(folder: Path, trained_on, dice, **changes):
    """A segmenter run; `dice` maps a patient to its six Dice values (NaN: class absent from both)."""
    write_run(folder, "segmenter", trained_on, **changes)
    rows = []
    for patient, values in dice.items():
        for entity, value in zip(ENTITIES, values, strict=True):
            tp = 0 if np.isnan(value) else round(1000 * value)
            errors = 0 if np.isnan(value) else 2000 - 2 * tp  # 2 tp / (2 tp + errors) = value
            rows.append((patient, entity, tp, errors // 2, errors - errors // 2, value))
    pd.DataFrame(rows, columns=["patient", "entity", "tp", "fp", "fn", "dice"]).to_csv(
        folder / "dice_per_patient.csv", index=False
    )


def shard(root: Path):
    return np.load(find_shards(root)[0])
