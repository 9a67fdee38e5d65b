"""The DataModule that every model shares: slices of real and / or synthetic sets."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.augmentation import PaperAugmentation
from datamodules.samplers import StreamOrder, StreamSampler, volume_batches
from datamodules.slice_set import SliceSet

Batch = dict[str, Tensor]
BRAIN_THRESHOLD = 8


def brain_mask(modalities: Tensor) -> Tensor:
    """Say where the brain is: any modality brighter than 8 of 255.

    The background of stored slices is 0 in real sets and nearly black in generated ones.

    Args:
        modalities: uint8 or float (N, 4, H, W), 0..255.

    Returns:
        bool (N, 1, H, W).
    """
    return modalities.amax(dim=1, keepdim=True) > BRAIN_THRESHOLD


def relative_height(slices: SliceSet) -> npt.NDArray[np.float32]:
    """Say where slices are among those of their volume, 0 the lowest and 1 the highest; 0.5 for the only one: (n,)."""
    z = slices.index["z"].groupby(slices.index["volume"])
    low, high = z.transform("min"), z.transform("max")
    height = (slices.index["z"] - low) / (high - low).clip(lower=1)
    return height.where(high > low, 0.5).to_numpy(np.float32)


class Augmentation(Protocol):
    """A random transform of one slice that can be made deterministic."""

    def set_random_state(self, seed: int) -> None:
        """Make the next call a function of this seed."""

    def __call__(self, sample: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Transform {"image": (4, H, W), "label": (1, H, W), "brain": (1, H, W)}."""


@dataclass
class TrainingPart:
    """A share of a slice set to train on.

    Args:
        path: folder of the slice set; of a real set the training split is taken.
        amount: None takes all slices, an integer that many, a float from 0 to 1 that share; drawn with the seed.
    """

    path: str
    amount: int | float | None = None


class SliceDataset(Dataset[Batch]):
    """Batches of slices from one or several sets, read straight from the memory maps.

    Args:
        sets: the sets, one after the other.
        order: if given, positions are those of an endless stream and go through it.
        augmentation: if given, every slice goes through it with a random state that follows from (seed, position).
        seed: of the augmentation.
    """

    def __init__(
        self,
        sets: Sequence[SliceSet],
        order: StreamOrder | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.sets = list(sets)
        self.augmentation, self.seed = augmentation, seed
        self.starts = np.cumsum([0, *(len(part) for part in self.sets)])
        self.order = order
        self.patients = sorted({patient for part in self.sets for patient in part.patients})
        row = {patient: number for number, patient in enumerate(self.patients)}
        self._patient = np.concatenate([part.index["patient"].map(row).to_numpy(np.int64) for part in self.sets])
        self._height = np.concatenate([relative_height(part) for part in self.sets])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, position: int) -> Batch:
        return {key: value[0] for key, value in self.__getitems__([position]).items()}

    def __getitems__(self, positions: list[int]) -> Batch:
        """Give a batch: slices uint8 (N, 5, H, W), and of each its position, patient and height in the volume.

        position is int64 (N,) as asked for, patient int64 (N,) a row number, height float32 (N,) from 0 to 1. Augmented
        slices are float32, and `brain`, bool (N, 1, H, W), is the brain mask moved along with them.
        """
        rows = np.asarray(positions, np.int64) if self.order is None else self.order(positions)
        batch = {
            "slices": torch.from_numpy(self.read(rows)),
            "position": torch.tensor(positions, dtype=torch.int64),
            "patient": torch.from_numpy(self._patient[rows]),
            "height": torch.from_numpy(self._height[rows]),
        }
        return batch if self.augmentation is None else {**batch, **self._augment(self.augmentation, batch)}

    def _augment(self, augmentation: Augmentation, batch: Batch) -> Batch:
        slices, brains = [], []
        for one, position in zip(batch["slices"].float(), batch["position"].tolist(), strict=True):
            state = np.random.default_rng((self.seed, position)).integers(1 << 32)
            augmentation.set_random_state(int(state))
            brain = brain_mask(one[None, :4])[0].float()
            moved = augmentation({"image": one[:4], "label": one[4:], "brain": brain})
            slices.append(torch.cat([torch.as_tensor(moved["image"]), torch.as_tensor(moved["label"])]))
            brains.append(torch.as_tensor(moved["brain"]) > 0.5)
        return {"slices": torch.stack(slices), "brain": torch.stack(brains)}

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Read slices by row number over all sets: uint8 (n, 5, H, W)."""
        if len(self.sets) == 1:
            return self.sets[0].read(rows)
        which = np.searchsorted(self.starts, rows, side="right") - 1
        out = np.empty((len(rows), *self.sets[0].read([]).shape[1:]), np.uint8)
        for number in np.unique(which):
            where = which == number
            out[where] = self.sets[number].read(rows[where] - self.starts[number])
        return out


def _as_is(batch: Any) -> Any:
    return batch


class BraTSDataModule(LightningDataModule):
    """Training, validation and test slices.

    Validation and test slices are always real. If the set at `root` has no validation patients, a share of its training
    patients is kept from training for validation.

    Args:
        root: real slice set.
        train: what to train on; None trains on all training slices of `root`.
        batch_size: images of a training batch over all processes.
        epoch_images: images of an epoch (a tick: logs, checkpoints and evaluations come at its end); a multiple of
            batch_size.
        eval_batch_size: slices of an evaluation batch of one process.
        val_fraction: share of the training patients for validation where the set has none; 0 for generators.
        augmentation: transform of training slices, done by the loader processes.
        num_workers: loader processes per training process; 0 reads in the process itself.
        seed: order of the data, draw of the parts and of the validation patients.

    Raises:
        ValueError: with all that does not fit together: sizes, splits, a synthetic set whose generator saw patients of
            the test split.
    """

    def __init__(
        self,
        root: str,
        train: list[TrainingPart] | None = None,
        batch_size: int = 32,
        epoch_images: int = 10_000,
        eval_batch_size: int = 32,
        val_fraction: float = 0.0,
        augmentation: PaperAugmentation | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.root = root
        self.parts = [TrainingPart(root)] if train is None else train
        self.batch_size = batch_size
        self.epoch_images = epoch_images
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.seed = seed
        problems = []
        if batch_size < 1 or epoch_images < 1 or epoch_images % batch_size:
            problems.append(f"epoch_images ({epoch_images}) must be a positive multiple of batch_size ({batch_size}).")
        if not 0 <= val_fraction < 1:
            problems.append(f"val_fraction must be from 0 to below 1, but is {val_fraction}.")
        if not self.parts:
            problems.append("train must name at least one slice set, or be left out.")
        if problems:
            raise ValueError("Data: " + " ".join(problems))
        self._ready = False

    def setup(self, stage: str | None = None) -> None:
        """Open the sets, divide the patients and check that everything fits together."""
        if self._ready:
            return
        self.real = SliceSet(self.root)
        self.train_patients, self.val_patients, self.test_patients = self._divide_patients()
        self.training_sets = [self._open(part) for part in self.parts]
        self._check()
        patient = self.real.index["patient"]
        self.real_train = self.real.subset(patient.isin(self.train_patients).to_numpy())
        self.real_val = self.real.subset(patient.isin(self.val_patients).to_numpy())
        self.real_test = self.real.subset(patient.isin(self.test_patients).to_numpy())
        self._ready = True

    def _divide_patients(self) -> tuple[list[str], list[str], list[str]]:
        index = self.real.index
        by_split = {s: sorted(index.loc[index["split"] == s, "patient"].unique()) for s in ("train", "val", "test")}
        train, val = by_split["train"], by_split["val"]
        if not val and self.val_fraction > 0 and len(train) > 1:
            count = min(len(train) - 1, max(1, round(self.val_fraction * len(train))))
            chosen = np.random.default_rng(self.seed).permutation(len(train))[:count]
            val = sorted(train[i] for i in chosen)
            train = sorted(set(train) - set(val))
        return train, val, by_split["test"]

    def _open(self, part: TrainingPart) -> SliceSet:
        slices = SliceSet(part.path)
        if slices.manifest.kind == "real":
            own = slices.manifest.fingerprint == self.real.manifest.fingerprint
            wanted = self.train_patients if own else slices.index.loc[slices.index["split"] == "train", "patient"]
            slices = slices.subset(slices.index["patient"].isin(wanted).to_numpy())
        if part.amount is None:
            return slices
        count = round(part.amount * len(slices)) if isinstance(part.amount, float) else part.amount
        if not 0 < count <= len(slices):
            raise ValueError(
                f"Data: expected amount to choose 1 to {len(slices)} slices of {part.path}, "
                f"but {part.amount} is {count}."
            )
        chosen = np.random.default_rng((self.seed, len(slices))).permutation(len(slices))[:count]
        return slices.subset(np.sort(chosen))

    def _check(self) -> None:
        problems = []
        carved = not (self.real.index["split"] == "val").any()
        if self.real.manifest.kind != "real":
            problems.append(f"{self.root} is a {self.real.manifest.kind} set; root must be a real one.")
        unseen = {"test": set(self.test_patients), "validation": set() if carved else set(self.val_patients)}
        for part in self.training_sets:
            if not len(part):
                problems.append(f"{part.root} has no training slices.")
            if part.manifest.size_px != self.real.manifest.size_px:
                problems.append(
                    f"{part.root} has slices of {part.manifest.size_px} px, but {self.root} of "
                    f"{self.real.manifest.size_px} px."
                )
            if part.manifest.kind == "synthetic" and "patients_seen" not in part.manifest.content:
                problems.append(f"{part.root}/dataset.json does not say which patients its generator saw.")
            seen = set(part.patients) | set(part.manifest.content.get("patients_seen", []))
            for split, patients in unseen.items():
                if leaked := patients & seen:
                    problems.append(
                        f"{part.root} contains, or its generator saw, {len(leaked)} patients of the {split} split of "
                        f"{self.root} ({', '.join(sorted(leaked)[:5])}, ...). Train the generator on the same split."
                    )
            if carved and set(self.val_patients) & seen:
                warnings.warn(
                    f"Validation patients, taken from the training patients of {self.root}, were seen by the generator "
                    f"of {part.root}: the choice of the best checkpoint favours it. `standin prepare` can set "
                    "validation patients apart.",
                    stacklevel=2,
                )
        if problems:
            raise ValueError("Data: " + " ".join(problems))

    @property
    def channels(self) -> list[str]:
        """Names of the channels of all slices, in order."""
        return list(self.real.manifest.content["channels"])

    @property
    def patients_seen(self) -> list[str]:
        """The real patients that training sees, through synthetic sets as well."""
        seen: set[str] = set()
        for part in self.training_sets:
            real = part.manifest.kind == "real"
            seen.update(part.patients if real else part.manifest.content.get("patients_seen", []))
        return sorted(seen)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint was trained on."""
        return {
            "real": self.real.manifest.fingerprint,
            "training_sets": [part.manifest.fingerprint for part in self.training_sets],
            "training_patients": self.train_patients,
            "test_patients": self.test_patients,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on other data or another split.

        Raises:
            ValueError: saying what differs.
        """
        self.setup()
        ours = self.state_dict()
        different = [name for name, value in state_dict.items() if ours.get(name) != value]
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
        total = sum(len(part) for part in self.training_sets)
        return DataLoader(
            SliceDataset(self.training_sets, StreamOrder(total, self.seed), self.augmentation, self.seed),
            batch_size=self.batch_size // world_size,
            sampler=StreamSampler(self.epoch_images, rank, world_size),
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            drop_last=True,
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Slices of the validation patients, each once."""
        return self._evaluation(self.real_val)

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Slices of the test patients, each once."""
        return self._evaluation(self.real_test)

    def predict_dataloader(self) -> Any:
        """What to predict from is the model's matter: a generator starts from the numbers of its images."""
        assert self.trainer is not None
        return self.trainer.lightning_module.predict_dataloader()

    def _evaluation(self, slices: SliceSet) -> DataLoader[Batch] | list[Any]:
        if not len(slices):
            return []
        rank, world_size = self._ranks()
        return DataLoader(
            SliceDataset([slices]),
            batch_sampler=volume_batches(slices.index, self.eval_batch_size, rank, world_size),
            collate_fn=_as_is,
            num_workers=self.num_workers,
        )

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
