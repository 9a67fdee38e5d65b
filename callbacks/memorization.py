"""Memorization at the end of training epochs and over the emitted set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track

from callbacks.evaluation import gathered
from callbacks.image_grid import show
from datamodules.pictures import panels, tile
from datamodules.slice_set import LEFT_RIGHT_AXIS, MODALITIES, Slices, SliceSet, write_atomically
from evaluation.sensitivity import Null
from evaluation.suspicion import share_suspicious
from lightning_modules.base import log_epoch
from lightning_modules.image_generator import ImageGenerator
from metrics.memorization import largest_correlation, summarize
from metrics.statistics import MIN_PATIENTS, Interval

BLOCK = 1024
QUERIES = 4096


class Memorization(Callback):
    """Largest Pearson correlation of synthetic slices with any training slice, beside held-out real slices.

    The held-out slices are those of the validation patients, or of the test patients where there are none. They say how
    near a slice comes to the training set without having been copied from it.

    Args:
        slices: synthetic slices per check during training (images 0, 1, ... of the seed).
        held_out_slices: at most that many held-out slices, evenly spaced; None takes all.
        seed: of the synthetic slices.
        every_n_epochs: how often during training; the last epoch is always checked.
        pictures: nearest pairs to show.
        false_alarm_rate: share of the held-out slices that are suspicious.
        stop_when_memorizing: end the training once more of the synthetic slices are suspicious than chance allows: the
            95 % interval of their share (bootstrap over held-out patients) lies above the false-alarm rate.
    """

    def __init__(
        self,
        slices: int = 256,
        held_out_slices: int | None = 2048,
        seed: int = 0,
        every_n_epochs: int = 1,
        pictures: int = 6,
        false_alarm_rate: float = 0.05,
        stop_when_memorizing: bool = False,
    ) -> None:
        self.slices = slices
        self.held_out_slices = held_out_slices
        self.seed = seed
        self.every_n_epochs = every_n_epochs
        self.pictures = pictures
        self.false_alarm_rate = false_alarm_rate
        self.stop_when_memorizing = stop_when_memorizing
        self.null: pd.DataFrame | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be judged, before anything slow starts."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        datamodule.setup()
        if not len(datamodule.real_val) and not len(datamodule.real_test):
            raise ValueError(
                f"Memorization: {datamodule.root} has neither validation nor test patients to compare with. Prepare it "
                "with some, or leave callbacks.Memorization out."
            )
        held_out = datamodule.real_val if len(datamodule.real_val) else datamodule.real_test
        if self.stop_when_memorizing and len(held_out.patients) < MIN_PATIENTS:
            raise ValueError(
                f"Memorization: stop_when_memorizing needs {MIN_PATIENTS} held-out patients or more, but "
                f"{datamodule.root} has {len(held_out.patients)}. Prepare it with more validation patients."
            )
        fingerprints = {part.manifest.fingerprint for part in datamodule.training_sets}
        if fingerprints != {datamodule.real.manifest.fingerprint}:
            raise ValueError(
                f"Memorization searches the training patients of {datamodule.root}, but data.train names other sets: "
                "copies of their slices would not be found. Train on root, or leave callbacks.Memorization out."
            )
        # A generator that was shown mirror images may have memorized them.
        self.mirror_axis = LEFT_RIGHT_AXIS if getattr(pl_module, "mirror", False) else None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check images of fixed indices."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs and epoch != trainer.max_epochs:
            return
        assert isinstance(pl_module, ImageGenerator)
        mine = range(trainer.global_rank, self.slices, trainer.world_size)
        made = [
            pl_module.generate_slices(torch.tensor(mine[i : i + 64]), self.seed).cpu() for i in range(0, len(mine), 64)
        ]
        synthetic = torch.cat(made).numpy() if made else np.empty((0, 5, 1, 1), np.uint8)
        table = self._search(trainer, pl_module, synthetic, np.asarray(mine))
        null = self._held_out(trainer, pl_module)
        share = self._share_suspicious(table, null)
        numbers = {"share_suspicious": share.estimate, "share_suspicious_low": share.low}
        log_epoch(pl_module, _headline(table, null) | {f"memorization/{name}": x for name, x in numbers.items()})
        if self.stop_when_memorizing and share.low > self.false_alarm_rate:
            rank_zero_info(
                f"Memorization: {share.estimate:.1%} of the synthetic slices are suspicious (95 % interval from "
                f"{share.low:.1%}), where chance makes {self.false_alarm_rate:.1%}. The training ends here."
            )
            trainer.should_stop = True
        if trainer.is_global_zero:
            top = table.nlargest(self.pictures, "r")["position"].to_numpy()
            shown = pl_module.generate_slices(torch.tensor(top), self.seed).cpu().numpy()
            self._show(trainer, pl_module, table, shown, top)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the whole emitted set and write `memorization.csv`."""
        folder = Path(trainer.default_root_dir)
        manifest, written = folder / "synthetic" / "dataset.json", folder / "memorization.csv"
        done = written.exists() and written.stat().st_mtime_ns > manifest.stat().st_mtime_ns
        if trainer.strategy.broadcast(done):
            return
        emitted = SliceSet(folder / "synthetic")
        mine = np.arange(trainer.global_rank, len(emitted), trainer.world_size)
        table = self._search(trainer, pl_module, emitted, mine)
        null = self._held_out(trainer, pl_module)
        if trainer.is_global_zero:
            both = pd.concat([table.assign(set="synthetic"), null.assign(set="held-out")])
            columns = ["set", "position", "r", *(f"r_{m}" for m in MODALITIES), "nearest", "nearest_patient"]
            write_atomically(written, both[columns].to_csv(index=False))
            top = table.nlargest(self.pictures, "r")["position"].to_numpy()
            self._show(trainer, pl_module, table, emitted.read(top), top)

    def _held_out(self, trainer: Trainer, pl_module: LightningModule) -> pd.DataFrame:
        if self.null is None:  # the training patients and the held-out ones stay the same
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
            real: SliceSet = datamodule.real_val if len(datamodule.real_val) else datamodule.real_test
            count = len(real) if self.held_out_slices is None else min(len(real), self.held_out_slices)
            chosen = np.linspace(0, len(real) - 1, count).round().astype(np.int64)
            mine = chosen[trainer.global_rank :: trainer.world_size]
            null = self._search(trainer, pl_module, real, mine)
            self.null = null.assign(patient=real.index["patient"].to_numpy(dtype=object)[null["position"]])
        return self.null

    def _share_suspicious(self, table: pd.DataFrame, null: pd.DataFrame) -> Interval:
        patients = null["patient"].to_numpy(dtype=object)
        return share_suspicious(table["r"].to_numpy(), Null(null["r"].to_numpy(), patients), self.false_alarm_rate)

    def _search(
        self, trainer: Trainer, pl_module: LightningModule, queries: SliceSet | Slices, positions: np.ndarray
    ) -> pd.DataFrame:
        """Search this rank's queries in the training set, and gather: one row per query over all ranks.

        Args:
            trainer: gives the training set and the ranks.
            pl_module: gives the device.
            queries: a set that is read at `positions`, or the slices at these positions themselves.
            positions: which slices, of this rank.
        """
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        training: SliceSet = datamodule.real_train
        columns = ["position", "r", *(f"r_{m}" for m in MODALITIES), "nearest"]
        rows = [np.empty((0, len(columns)))]
        for start in range(0, len(positions), QUERIES):
            part = positions[start : start + QUERIES]
            slices = queries.read(part) if isinstance(queries, SliceSet) else queries[start : start + QUERIES]
            query = torch.from_numpy(slices[:, :4]).to(pl_module.device)
            found = largest_correlation(
                query, self._blocks(trainer, training, query.device), mirror_axis=self.mirror_axis
            )
            columns_of = [torch.from_numpy(part).double(), found.r.cpu(), *found.r_channel.cpu().T, found.index.cpu()]
            rows.append(torch.stack([c.double() for c in columns_of], dim=1).numpy())
        everything = np.concatenate(gathered(trainer, [np.concatenate(rows)]))
        table = pd.DataFrame(everything, columns=columns).sort_values("position", ignore_index=True)
        table = table.astype({"position": "int64", "nearest": "int64"})
        # A constant slice has no correlation and no neighbour.
        patient = np.append(training.index["patient"].to_numpy(dtype=object), "")[table["nearest"]]
        return table.assign(nearest_patient=patient)

    def _blocks(self, trainer: Trainer, training: SliceSet, device: torch.device) -> Iterator[torch.Tensor]:
        starts = range(0, len(training), BLOCK)
        long = len(starts) > 20 and trainer.is_global_zero
        for start in track(starts, description="memorization", transient=True) if long else starts:
            block = training.read(range(start, min(start + BLOCK, len(training))))
            yield torch.from_numpy(block[:, :4]).to(device)

    def _show(
        self, trainer: Trainer, pl_module: LightningModule, table: pd.DataFrame, synthetic: Slices, top: np.ndarray
    ) -> None:
        """Show the nearest pairs: a row with the synthetic slice, a row with its training slice, and so on."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        nearest = table.set_index("position").loc[top, "nearest"].to_numpy()
        real = datamodule.real_train.read(nearest)
        rows = [panels(one) for pair in zip(synthetic, real, strict=True) for one in pair]
        show(trainer, "memorization/nearest_pairs", tile(rows), getattr(pl_module, "images_seen", 0))


def _headline(table: pd.DataFrame, null: pd.DataFrame) -> dict[str, float]:
    """Name the numbers for the log; r is over the four modalities jointly and the whole image."""
    if table["r"].isna().all():  # a collapsed generator: every slice is constant
        return {"memorization/synthetic_max_r": float("nan")}
    comparison = summarize(table["r"].to_numpy(), null["r"].to_numpy())
    return {
        "memorization/synthetic_mean_r": comparison.mean,
        "memorization/synthetic_max_r": comparison.max,
        "memorization/held_out_mean_r": comparison.mean_null,
        "memorization/held_out_max_r": comparison.max_null,
        "memorization/share_above_null_q99": comparison.share_above_q99,
    }
