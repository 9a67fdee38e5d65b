"""The record of a run: what it was (`run.json`) and what came out (`metrics.json`)."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.signatures import SAME_PATIENT
from datamodules.slice_set import write_atomically
from lightning_modules.autoencoder import Autoencoder
from lightning_modules.copy_detection import CopyDetector
from lightning_modules.image_generator import ImageGenerator

PACKAGES = ("standin", "torch", "lightning", "monai", "torchmetrics", "numpy")


class RunRecord(Callback):
    """Write `run.json` when a run starts and `metrics.json` when a step of it ends.

    `metrics.json` collects the last logged value of every metric over fit, test and predict. The training time counts
    on over interruptions.
    """

    def __init__(self) -> None:
        self.train_seconds = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what this run is, before anything slow starts; single steps later do not change that."""
        if stage == "fit":
            self._write_run(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the epoch."""
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch to the training time, and keep the record true for a run that is stopped later."""
        self.train_seconds += time.monotonic() - self._started
        self._write_run(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of training."""
        self._write_run(trainer, pl_module)
        self._write_metrics(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of the test."""
        self._write_metrics(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The training time so far."""
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the training time so far."""
        self.train_seconds = state_dict["train_seconds"]

    def _write_metrics(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "metrics.json"
            old = json.loads(path.read_text()) if path.exists() else {}
            new = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "step"}
            write_atomically(path, json.dumps({**old, **new}, indent=1, sort_keys=True) + "\n")

    def _write_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        datamodule.setup()
        folder = Path(trainer.default_root_dir)
        commit, dirty = git_state(Path(__file__).parent)
        record = {
            "name": folder.name,
            "kind": _kind(pl_module),
            "model": f"{type(pl_module).__module__}.{type(pl_module).__name__} ({_networks(pl_module)})",
            "seed": getattr(pl_module, "seed", None),
            "images_seen": getattr(pl_module, "images_seen", 0),
            "train_seconds": round(self.train_seconds, 1),
            "training_sets": [
                {
                    "root": str(part.root),
                    "kind": part.manifest.kind,
                    "slices": len(part),
                    "patients": len(part.patients) if part.manifest.kind == "real" else None,
                    "fingerprint": part.manifest.fingerprint,
                    "share_of_images": round(share, 6),
                    "drawn": drawn,
                }
                for part, share, drawn in zip(
                    datamodule.training_sets, datamodule.mixture.shares_of_parts(), datamodule.drawn, strict=True
                )
            ],
            "patients_seen": datamodule.patients_seen,
            "real_set": {"root": str(datamodule.root), "fingerprint": datamodule.real.manifest.fingerprint},
            "held_out_split": "val" if len(datamodule.real_val) else "test",
            "model_selection": {"validation": datamodule.validation, "slices": len(datamodule.validation_slices)},
            "validation_patients": datamodule.val_patients,
            "test_patients": datamodule.test_patients,
            "leak_guard": {
                "closest_images": datamodule.guard.closest,
                "same_patient_up_to": SAME_PATIENT,
                "different_patients": datamodule.different_patients,
            },
            "command": sys.argv,
            "processes": trainer.world_size,
            "precision": str(trainer.precision),
            "device": f"{pl_module.device.type}, {platform.machine()}, Python {platform.python_version()}",
            "git_commit": commit,
            "git_dirty": dirty,
            "versions": {name: _version(name) for name in PACKAGES},
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "run.json", json.dumps(record, indent=1) + "\n")


def _kind(module: LightningModule) -> str:
    if isinstance(module, ImageGenerator):
        return "generator"
    kinds = {Autoencoder: "autoencoder", CopyDetector: "copy_detector"}
    return next((kind for rule, kind in kinds.items() if isinstance(module, rule)), "segmenter")


def _networks(module: LightningModule) -> str:
    """The classes of the networks and their sizes, so that runs of different networks are told apart."""
    parts = {name: child for name, child in module.named_children() if name != "ema_network"}
    return ", ".join(
        f"{type(child).__name__} {sum(p.numel() for p in child.parameters()):,}" for child in parts.values()
    )


def git_state(folder: Path) -> tuple[str | None, bool]:
    """Give commit and whether files differ from it; (None, False) outside a repository."""
    try:
        return _git(folder, "rev-parse", "HEAD"), bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, False


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
