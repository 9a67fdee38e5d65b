"""Moving averages whose length is chosen after training.

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models" (CVPR, arXiv 2312.02696),
section 3: two power-function averages are tracked and stored now and then; `standin ema` makes any other from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.atomic_checkpoint import AtomicCheckpointIO
from callbacks.weight_average import WeightAverage, move
from lightning_modules.image_generator import ImageGenerator
from lightning_modules.power_ema import Profile, decay, exponent, reconstruct

FOLDER = Path("checkpoints", "ema")
MAX_ERROR = 0.05
"""How far a reconstructed profile may be from the wanted one, see `power_ema.Reconstruction`."""


class PosthocEMA(WeightAverage):
    """Track power-function averages of a generator's sampled network and store snapshots of them.

    A snapshot is a file of float32 weights, `<run_dir>/checkpoints/ema/<images seen>-std<std>.pt`. Of averages of 0.05
    and 0.10, 8 moments of equal distance give those of 0.04 to 0.17, 64 moments those of 0.011 to 0.27. Images of the
    run itself still come from the average of `EMA`. In a run that has begun without them, the averages take the weights
    before to have been as they are.

    Args:
        stds: relative standard deviations of the averages: their width as a share of the training so far.
        every_n_epochs: how often snapshots are taken; the end of training is always one.
    """

    def __init__(self, stds: Sequence[float] = (0.05, 0.10), every_n_epochs: int = 1) -> None:
        if len(set(stds)) != len(stds) or len(stds) < 2:
            raise ValueError(f"PosthocEMA: expected stds to be two different numbers or more, but got {list(stds)}.")
        if every_n_epochs < 1:
            raise ValueError(f"PosthocEMA: expected every_n_epochs to be at least 1, but got {every_n_epochs}.")
        self.exponents = {std: exponent(std) for std in stds}
        self.every_n_epochs = every_n_epochs
        self.averages: dict[float, dict[str, Tensor]] = {}
        self.run = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights, or go on from the averages of the checkpoint."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, ImageGenerator)
        if not self.averages:
            self.run = _fingerprint(trainer, pl_module)
            weights = dict(pl_module.sampled_network.named_parameters())
            self.averages = {std: {k: w.detach().clone() for k, w in weights.items()} for std in self.exponents}
        for average in self.averages.values():
            average.update({name: weight.to(pl_module.device) for name, weight in average.items()})

    def average(self, generator: ImageGenerator, before: int) -> None:
        """Move every average by the decay of this step."""
        for std, average in self.averages.items():
            share = decay(self.exponents[std], before, generator.images_seen)
            move(average.values(), generator.sampled_network.parameters(), share)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store a snapshot of every average."""
        epoch = trainer.current_epoch + 1
        if trainer.is_global_zero and (epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs):
            assert isinstance(pl_module, ImageGenerator)
            checkpoint: dict[str, Any] = {"state_dict": _statistics(pl_module)}
            pl_module.on_save_checkpoint(checkpoint)
            weights = pl_module.sampled_network.state_dict()
            for std, average in self.averages.items():
                content = {
                    "run": self.run,
                    "std": std,
                    "network": pl_module.sampled_name,
                    "parameters": average,
                    # Constants, or statistics, which are averages already.
                    "buffers": {name: value for name, value in weights.items() if name not in average},
                    "checkpoint": checkpoint,
                }
                path = Path(trainer.default_root_dir) / FOLDER / f"{pl_module.images_seen:09d}-std{std:g}.pt"
                AtomicCheckpointIO().save_checkpoint(content, path)

    def state_dict(self) -> dict[str, Any]:
        """The averages so far, and of what run they are."""
        return {"averages": self.averages, "run": self.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these averages.

        Raises:
            ValueError: if they are others than those to track.
        """
        if set(state_dict["averages"]) != set(self.exponents):
            raise ValueError(
                f"PosthocEMA: the run tracks the relative standard deviations {list(state_dict['averages'])}, but stds "
                f"is {list(self.exponents)}. Leave stds as they were, or start anew in another --run_dir."
            )
        self.averages, self.run = state_dict["averages"], state_dict["run"]


def _statistics(generator: ImageGenerator) -> dict[str, Tensor]:
    """The buffers that are no part of a network, such as the counts of the conditions."""
    networks = {name for name, child in generator.named_children() if list(child.parameters())}
    return {key: value for key, value in generator.state_dict().items() if key.split(".")[0] not in networks}


def _fingerprint(trainer: Trainer, generator: ImageGenerator) -> str:
    """Tell runs apart by what they are made from: the same command gives the same run."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    data = None if datamodule is None else datamodule.state_dict()
    made_from = [type(generator).__qualname__, dict(generator.hparams), data]
    text = json.dumps(made_from, sort_keys=True, default=lambda value: type(value).__qualname__)
    return hashlib.sha256(text.encode()).hexdigest()


def reconstruct_ema(run: Path, out: Path, *, std: float, images_seen: int | None = None) -> Path:
    """Make the moving average of another length from the snapshots of a run that had callbacks.PosthocEMA.

    Writes a checkpoint that `python train.py ... --model.init_from OUT` reads, with `--task predict` to sample from it.

    Args:
        run: the run folder.
        out: the checkpoint to write; a new file.
        std: length of the average, as its relative standard deviation: 0.1 means that the weights of about the last
            tenth of training count.
        images_seen: take the average at this moment of training instead of the last one; one that has snapshots.

    Returns:
        The checkpoint.

    Raises:
        ValueError: if there are no snapshots, one cannot be read or is of another run, or they cannot give this length
            at this moment.
    """
    run, out = Path(run), Path(out)
    if out.exists():
        raise ValueError(f"Expected {out} to be a new file, but it exists. Choose another.")
    exponent(std)
    paths = _snapshots(run / FOLDER)
    moments = sorted({profile.images_seen for profile in paths})
    moment = moments[-1] if images_seen is None else images_seen
    if moment not in moments:
        raise ValueError(
            f"{run / FOLDER} holds no snapshots at {moment} images seen, but at {', '.join(map(str, moments))}."
        )
    used = [profile for profile in paths if profile.images_seen <= moment]
    coefficients, errors = reconstruct(used, [Profile(moment, std)])
    if errors[0] > MAX_ERROR:
        stds = sorted({*(n / 1000 for n in range(1, 289)), *(p.std for p in used if p.images_seen == moment)})
        fits = reconstruct(used, [Profile(moment, value) for value in stds]).errors <= MAX_ERROR
        possible = [value for value, fit in zip(stds, fits.tolist(), strict=True) if fit]
        raise ValueError(
            f"The {len(used)} snapshots in {run / FOLDER} up to {moment} images seen cannot give an average of "
            f"--std {std}: its profile would be {float(errors[0]):.0%} off. They can give {possible[0]:g} to "
            f"{possible[-1]:g}; more snapshots (every_n_epochs of PosthocEMA) would give more."
        )
    content = _combine([paths[profile] for profile in used], coefficients[:, 0].tolist())
    AtomicCheckpointIO().save_checkpoint({**content, "ema_std": std}, out)
    return out


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a snapshot of PosthocEMA ({type(error).__name__}).") from error
    return content


def _snapshots(folder: Path) -> dict[Profile, Path]:
    """Find the snapshots of a run, in the order of time."""
    paths = sorted(folder.glob("*.pt"))
    if not paths:
        raise ValueError(f"{folder} holds no snapshots: train with callbacks.PosthocEMA in trainer.callbacks.")
    found: dict[Profile, Path] = {}
    runs: dict[str, str] = {}
    for path in paths:
        content = _read(path)
        found[Profile(content["checkpoint"]["images_seen"], content["std"])] = path
        runs.setdefault(content["run"], path.name)
    if len(runs) > 1:
        raise ValueError(
            f"{folder} holds snapshots of {len(runs)} different runs, such as {' and '.join(runs.values())}. "
            "Keep those of one run."
        )
    return found


def _combine(paths: Sequence[Path], coefficients: Sequence[float]) -> dict[str, Any]:
    """Add snapshots up in double precision and make a checkpoint of the sum; buffers and the rest are of the last."""
    sums: dict[str, Tensor] = {}
    for path, coefficient in zip(paths, coefficients, strict=True):
        snapshot = _read(path)
        for name, weight in snapshot["parameters"].items():
            sums[name] = coefficient * weight.double() + sums.get(name, 0.0)
    weights = {name: total.to(snapshot["parameters"][name].dtype) for name, total in sums.items()} | snapshot["buffers"]
    networks = {f"{name}.{key}": w for name in (snapshot["network"], "ema_network") for key, w in weights.items()}
    checkpoint: dict[str, Any] = snapshot["checkpoint"]
    return {**checkpoint, "state_dict": {**checkpoint["state_dict"], **networks}}
