"""The losses of a diffusion model on real slices: what an attacker who has the weights would look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.evaluation import gathered
from datamodules.slice_dataset import relative_height
from datamodules.slice_set import SliceSet, write_atomically
from lightning_modules.diffusion import Diffusion


class MembershipLosses(Callback):
    """Write `membership_losses.parquet` in a prediction: patient, position and mean loss of real slices.

    Training patients and all others have the same number of slices each, evenly spaced. `standin release --losses`
    attacks with them.

    Args:
        slices_per_patient: at most; as many as the patient with the fewest has.
        draws: times of each slice at which the loss is taken.
        batch_size: slices at a time.
        seed: of the noise.
    """

    def __init__(self, slices_per_patient: int = 16, draws: int = 10, batch_size: int = 32, seed: int = 0) -> None:
        self.slices_per_patient = slices_per_patient
        self.draws = draws
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other models."""
        if not isinstance(pl_module, Diffusion):
            raise ValueError(
                f"MembershipLosses needs a diffusion model, but the model is a {type(pl_module).__name__}, which "
                "has no loss of single slices. Leave it out."
            )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the losses, each rank those of its share."""
        assert isinstance(pl_module, Diffusion)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        real: SliceSet = datamodule.real
        rows = real.index.groupby("patient").indices
        count = min(self.slices_per_patient, *(len(own) for own in rows.values()))
        chosen = np.concatenate([own[np.linspace(0, len(own) - 1, count).round().astype(int)] for own in rows.values()])
        mine, height = np.sort(chosen)[trainer.global_rank :: trainer.world_size], relative_height(real)
        losses = []
        for start in range(0, len(mine), self.batch_size):
            part = mine[start : start + self.batch_size]
            slices, index, heights = (
                torch.from_numpy(values).to(pl_module.device) for values in (real.read(part), part, height[part])
            )
            losses.append(pl_module.losses_of(slices, index, heights, self.draws, self.seed).cpu().numpy())
        table = pd.DataFrame({"position": mine, "loss": np.concatenate(losses) if losses else []})
        table = pd.concat(gathered(trainer, [table])).sort_values("position", ignore_index=True)
        table["patient"] = real.index["patient"].to_numpy(dtype=object)[table["position"]]
        if trainer.is_global_zero:
            write_atomically(Path(trainer.default_root_dir) / "membership_losses.parquet", table.to_parquet())
