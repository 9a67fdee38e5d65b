"""The DataModule that every model shares: slices of real and / or synthetic sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from datamodules.augmentation import Augmentation
from datamodules.leak_guard import LeakGuard, Seen, read_aliases
from datamodules.recipe import (
    Mixture,
    Oversampling,
    TrainingPart,
    draw_part,
    keep_for_validation,
    problems_of,
    record,
)
from datamodules.samplers import StreamSampler, volume_batches
from datamodules.slice_dataset import Batch, JoinedSlices, SliceDataset, augmented
from datamodules.slice_set import SliceSet


def _as_is(batch: Any) -> Any:
    return batch


class BraTSDataModule(LightningDataModule):
    """Training, validation and test slices.

    Test slices are always real. Validation slices are too, unless `validation` says otherwise; if the set at `root` has
    no validation patients, a share of its training patients is kept from training for validation.

    Args:
        root: real slice set.
        train: what to train on; None trains on all training slices of `root`.
        validation: what the best checkpoint is chosen by; `synthetic` keeps a share of the synthetic slices of `train`
            from training, for when no real slice may be seen before the test.
        oversampling: if slices with tumour, or a class of it, shall come more often.
        batch_size: images of a training batch over all processes.
        epoch_images: images of an epoch (a tick: logs, checkpoints and evaluations come at its end); a multiple of
            batch_size.
        eval_batch_size: slices of an evaluation batch of one process.
        val_fraction: share of the training patients for validation where the set has none, 0 for generators; with
            synthetic validation, share of the synthetic slices.
        augmentation: transform of training slices, done by the GPU or, if there is none, by the loader processes.
        different_patients: pairs of patients whom the leak guard takes for one because their images are alike, and who
            are known to be two; they are recorded in run.json.
        num_workers: loader processes per training process; 0 reads in the process itself.
        seed: order of the data, draw of the parts, of the validation patients and slices.

    Raises:
        ValueError: with all that does not fit together: sizes, splits, shares, a training set that contains patients of
            the test split, or whose generator saw them.
    """

    def __init__(
        self,
        root: str,
        train: list[TrainingPart] | None = None,
        validation: Literal["real", "synthetic"] = "real",
        oversampling: Oversampling | None = None,
        batch_size: int = 32,
        epoch_images: int = 10_000,
        eval_batch_size: int = 32,
        val_fraction: float = 0.0,
        augmentation: Augmentation | None = None,
        different_patients: list[tuple[str, str]] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = root
        self.parts = [TrainingPart(root)] if train is None else train
        self.validation: Literal["real", "synthetic"] = validation
        self.oversampling = oversampling
        self.batch_size = batch_size
        self.epoch_images = epoch_images
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.augmentation = augmentation
        self.different_patients = different_patients or []
        self.num_workers = num_workers
        self.seed = seed
        problems = problems_of(self.parts, oversampling)
        if batch_size < 1 or epoch_images < 1 or epoch_images % batch_size:
            problems.append(f"epoch_images ({epoch_images}) must be a positive multiple of batch_size ({batch_size}).")
        if not 0 <= val_fraction < 1:
            problems.append(f"val_fraction must be from 0 to below 1, but is {val_fraction}.")
        if problems:
            raise ValueError("Data: " + " ".join(problems))
        self._ready = False
        self.ancestors = Seen()
        self._positions: list[int] = []

    def setup(self, stage: str | None = None) -> None:
        """Open the sets, divide the patients and check that everything fits together."""
        if not self._ready:
            self._open()
            self._ready = True
        if self.trainer is not None:
            self._look_at_ancestors(self.trainer.lightning_module)

    def _open(self) -> None:
        self.real = SliceSet(self.root)
        self.train_patients, self.val_patients, self.test_patients = self._divide_patients()
        patient = self.real.index["patient"]
        self.real_train, self.real_val, self.real_test = (
            self.real.subset(patient.isin(side).to_numpy())
            for side in (self.train_patients, self.val_patients, self.test_patients)
        )
        self.training_sets, kept = [], []
        for part in self.parts:
            slices = draw_part(self._available(part), part, self.seed)
            if self.validation == "synthetic" and slices.manifest.kind == "synthetic":
                slices, own = keep_for_validation(slices, self.val_fraction, self.seed)
                kept.append(own)
            self.training_sets.append(slices)
        self._check_sets(has_validation=bool(kept) or self.validation == "real")
        self.validation_slices = JoinedSlices([self.real_val] if self.validation == "real" else kept)
        self.drawn = [record(slices, part) for slices, part in zip(self.training_sets, self.parts, strict=True)]
        self.mixture = Mixture(self.training_sets, self.parts, self.oversampling)
        self._guard_against_leaks()

    def _divide_patients(self) -> tuple[list[str], list[str], list[str]]:
        index = self.real.index
        by_split = {s: sorted(index.loc[index["split"] == s, "patient"].unique()) for s in ("train", "val", "test")}
        train, val = by_split["train"], by_split["val"]
        self.carved = not val and self.val_fraction > 0 and len(train) > 1 and self.validation == "real"
        if self.carved:
            count = min(len(train) - 1, max(1, round(self.val_fraction * len(train))))
            chosen = np.random.default_rng(self.seed).permutation(len(train))[:count]
            val = sorted(train[i] for i in chosen)
            train = sorted(set(train) - set(val))
        return train, val, by_split["test"]

    def _available(self, part: TrainingPart) -> SliceSet:
        slices = SliceSet(part.path)
        if slices.manifest.kind == "synthetic":
            return slices
        own = slices.manifest.fingerprint == self.real.manifest.fingerprint
        wanted = self.train_patients if own else slices.index.loc[slices.index["split"] == "train", "patient"]
        return slices.subset(slices.index["patient"].isin(wanted).to_numpy())

    def _check_sets(self, has_validation: bool) -> None:
        problems = []
        if self.real.manifest.kind != "real":
            problems.append(f"{self.root} is a {self.real.manifest.kind} set; root must be a real one.")
        if not has_validation:
            problems.append("validation is synthetic, but train names no synthetic set.")
        for part in self.training_sets:
            if not len(part):
                problems.append(f"{part.root} has no training slices.")
            if part.manifest.size_px != self.real.manifest.size_px:
                problems.append(
                    f"{part.root} has slices of {part.manifest.size_px} px, but {self.root} of "
                    f"{self.real.manifest.size_px} px."
                )
        if problems:
            raise ValueError("Data: " + " ".join(problems))

    def _guard_against_leaks(self) -> None:
        aliases = read_aliases([self.real.root, *(part.root for part in self.training_sets)])
        held_out = {"test": Seen.of_slices(self.real_test, aliases)}
        if len(self.real_val):
            held_out["validation"] = Seen.of_slices(self.real_val, aliases)
        self.guard = LeakGuard(self.root, held_out, self.carved, self.different_patients)
        self.seen_in, problems = [], []
        for part in self.training_sets:
            is_real = part.manifest.kind == "real"
            seen = Seen.of_slices(part, aliases) if is_real else Seen.of_synthetic(part.manifest)
            verb = "contains" if is_real else "is of a generator that saw"
            problems += self.guard.problems_with(f"{part.root} {verb}", seen, is_real)
            self.seen_in.append(seen)
        if problems:
            raise ValueError("Data: " + " ".join(problems))

    def _look_at_ancestors(self, model: Any) -> None:
        """Take in whom the checkpoints that a model starts from, or works with, have seen."""
        paths = [getattr(model, name, None) for name in ("init_from", "autoencoder_path")]
        self.ancestors, problems = Seen(), []
        for path in dict.fromkeys(path for path in paths if path is not None and Path(path).is_file()):
            seen = Seen.of_checkpoint(path)
            problems += self.guard.problems_with(f"{path} was trained on", seen)
            self.ancestors |= seen
        if problems:
            raise ValueError("Data: " + " ".join(problems))

    @property
    def channels(self) -> list[str]:
        """Names of the channels of all slices, in order."""
        return list(self.real.manifest.content["channels"])

    @property
    def seen(self) -> Seen:
        """Whom training sees, through synthetic sets and the checkpoints that it starts from as well."""
        everybody = self.ancestors
        for seen in self.seen_in:
            everybody |= seen
        return everybody

    @property
    def patients_seen(self) -> list[str]:
        """The real patients whom training sees."""
        return self.seen.patients

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint was trained on."""
        return {**self._identity(), **self.seen.as_json()}

    def _identity(self) -> dict[str, Any]:
        return {
            "real": self.real.manifest.fingerprint,
            "training_sets": [part.manifest.fingerprint for part in self.training_sets],
            "drawn": self.drawn,
            "training_patients": self.train_patients,
            "test_patients": self.test_patients,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on other data or another split.

        Raises:
            ValueError: saying what differs.
        """
        self.setup()
        ours = self._identity()
        different = [name for name, value in ours.items() if name in state_dict and state_dict[name] != value]
        if different:
            raise ValueError(
                f"Data: the checkpoint of this run was trained on other data than {self.root} (different: "
                f"{', '.join(different)}). Choose another --run_dir, or give the data that it was trained on."
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of the endless training stream; the loader's batch is the share of one process."""
        rank, world_size = self._ranks()
        if self.batch_size % world_size:
            raise ValueError(f"Data: batch_size {self.batch_size} cannot be divided over {world_size} processes.")
        order = self.mixture.order(self.batch_size, self.seed)
        augmentation = None if self._has_gpu() else self.augmentation
        return DataLoader(
            SliceDataset(self.training_sets, order, augmentation, self.seed),
            batch_size=self.batch_size // world_size,
            sampler=StreamSampler(self.epoch_images, rank, world_size),
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            drop_last=True,
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note the positions of a training batch while they can be read without waiting for the GPU."""
        if self._augments_here():
            self._positions = batch["position"].tolist()
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment a training batch on the GPU."""
        if self._augments_here():
            assert self.augmentation is not None
            return augmented(batch, self.augmentation, self.seed, self._positions)
        return batch

    def _augments_here(self) -> bool:
        return self.augmentation is not None and self._has_gpu() and self.trainer is not None and self.trainer.training

    def _has_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Slices that the best checkpoint is chosen by, each once; those of `validation_slices`."""
        return self._evaluation(self.validation_slices.sets)

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Slices of the test patients, each once."""
        return self._evaluation([self.real_test])

    def predict_dataloader(self) -> Any:
        """What to predict from is a matter of the model if it says so, as generators do; else the test slices."""
        assert self.trainer is not None
        model = self.trainer.lightning_module
        return model.predict_dataloader() if is_overridden("predict_dataloader", model) else self.test_dataloader()

    def _evaluation(self, sets: Sequence[SliceSet]) -> DataLoader[Batch] | list[Any]:
        slices = SliceDataset(sets)
        if not len(slices):
            return []
        rank, world_size = self._ranks()
        return DataLoader(
            slices,
            batch_size=None,  # the positions of a batch come as a whole; Lightning cannot wrap a batch sampler of ours
            sampler=volume_batches(slices.slices.index, self.eval_batch_size, rank, world_size),
            collate_fn=_as_is,
            num_workers=self.num_workers,
        )

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
