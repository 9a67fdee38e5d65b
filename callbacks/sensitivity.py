"""What a copy detector finds: planted copies of training slices, against patients that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.slice_set import Slices, SliceSet, write_atomically
from evaluation.embedding_search import EmbeddingIndex
from evaluation.sensitivity import FALSE_ALARM_RATES, Floats, Null, sensitivity
from lightning_modules.base import log_epoch
from lightning_modules.copy_detection import CopyDetector


class Sensitivity(Callback):
    """Measure, in the test, the share of planted copies of every kind that is found, and write `sensitivity.csv`.

    The score of a slice is its largest cosine with a training slice. The null are all real slices of patients outside
    the training, of validation and test. `sensitivity/<kind>` is the rate at the first false-alarm rate.

    Args:
        planted: copies of each kind.
        false_alarm_rates: shares of the null that raise a false alarm.
        seed: of the copies.
    """

    def __init__(
        self, planted: int = 256, false_alarm_rates: Sequence[float] = FALSE_ALARM_RATES, seed: int = 0
    ) -> None:
        self.planted = planted
        self.false_alarm_rates = list(false_alarm_rates)
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured, before anything slow starts."""
        if not isinstance(pl_module, CopyDetector):
            raise ValueError(f"Sensitivity measures copy detectors, but the model is a {type(pl_module).__name__}.")
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        datamodule.setup()
        training, held_out = len(datamodule.real_train.patients), len(_held_out(datamodule).patients)
        if training < 2 or not held_out:
            raise ValueError(
                f"Sensitivity: {datamodule.root} has {training} training and {held_out} other patients, but expected "
                "at least 2 and 1: copies are planted of the former and judged against the latter."
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on every rank, as what is logged must be the same on all."""
        assert isinstance(pl_module, CopyDetector)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        index = EmbeddingIndex(datamodule.real_train, pl_module.embed_array)

        def score(slices: Slices) -> Floats:
            return index.nearest(slices).cosine

        held_out = _held_out(datamodule)
        null = Null(index.nearest_of(held_out).cosine, held_out.index["patient"].to_numpy(dtype=object))
        table = sensitivity(
            score,
            null,
            datamodule.real_train,
            planted=self.planted,
            false_alarm_rates=self.false_alarm_rates,
            seed=self.seed,
        )
        first = table[table["false_alarm_rate"] == self.false_alarm_rates[0]]
        rates = zip(first["kind"], first["rate"], strict=True)
        log_epoch(pl_module, {f"sensitivity/{kind}": rate for kind, rate in rates})
        if trainer.is_global_zero:
            write_atomically(Path(trainer.default_root_dir) / "sensitivity.csv", table.to_csv(index=False))


def _held_out(datamodule: Any) -> SliceSet:
    real: SliceSet = datamodule.real
    outside = ~real.index["patient"].isin(datamodule.train_patients).to_numpy()
    return real.subset(np.flatnonzero(outside))
