"""What every training rule shares: the clock that counts images."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


def log_epoch(module: LightningModule, values: Mapping[str, float], prog_bar: bool = False) -> None:
    """Log numbers that are the same on all ranks, once per epoch; Lightning takes "step" as their x-axis.

    Nothing is synchronised by Lightning: it would do so when the progress bar, on the first rank alone, asks for the
    numbers, while the other ranks may be waiting for each other elsewhere.
    """
    options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": False}
    module.log_dict(dict(values), prog_bar=prog_bar, **options)
    if not module.trainer.testing and isinstance(module, ImageClockModule):
        module.log("step", float(module.images_seen), **options)


class ImageClockModule(LightningModule):
    """A LightningModule whose clock is the number of training images seen.

    Lightning's `global_step` counts the steps of every optimizer; `images_seen` depends neither on the number of
    optimizers nor on batch size or number of processes. It is saved with the checkpoint and is TensorBoard's x-axis.
    Rules call `advance` in their training step, once per iteration.
    """

    images_seen: int

    def __init__(self) -> None:
        super().__init__()
        self.images_seen = 0
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def advance(self, images: int) -> None:
        """Advance the clock by the images that this process has seen in an iteration; the others saw as many."""
        self.images_seen += images * self.trainer.world_size

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        total: int = (self.trainer.max_epochs or 1) * datamodule.epoch_images
        return min(self.images_seen / total, 1.0)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of all optimizers."""
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def on_train_epoch_end(self) -> None:
        """Log the means of the epoch over all ranks, with the clock as their x-axis."""
        if self._sums:
            means = torch.stack([total / count for total, count in self._sums.values()])
            values = zip(self._sums, self.mean_over_ranks(means[None]).tolist(), strict=True)
            log_epoch(self, dict(values), prog_bar=True)
            self._sums = {}

    def log_mean(self, name: str, value: Tensor) -> None:
        """Log the mean of a quantity over the epoch and all ranks."""
        total, count = self._sums.get(name, (value.new_zeros([]), 0))
        self._sums[name] = (total + value.detach().float().mean(), count + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the clock."""
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the clock."""
        self.images_seen = checkpoint["images_seen"]

    def over_ranks(self, values: Tensor) -> Tensor:
        """Give the values of the global batch in its order, differentiable: (N, ...) -> (ranks · N, ...).

        Sample j of the global batch is on rank j mod ranks.
        """
        if self.trainer.world_size > 1:
            gathered = self.all_gather(values, sync_grads=values.requires_grad)  # (ranks, N, ...)
            assert isinstance(gathered, Tensor)
            values = gathered.transpose(0, 1).flatten(0, 1)
        return values

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """Give the mean over the batch and all ranks, differentiable across the ranks: (N, ...) -> (...)."""
        return self.over_ranks(values).mean(dim=0)


Module = TypeVar("Module", bound=ImageClockModule)


def load_frozen(kind: type[Module], path: str | Path) -> Module:
    """Load a trained module to use it as it is: frozen, in evaluation mode, on the CPU.

    Args:
        kind: its class.
        path: checkpoint of a run; nothing in it is executed.

    Raises:
        ValueError: if the file cannot be read, or is a checkpoint of something else.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        arguments, weights = content["hyper_parameters"], content["state_dict"]
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of a run of {kind.__name__} ({error}).") from error
    known = signature(kind).parameters
    try:
        module = kind(**{name: value for name, value in arguments.items() if name in known})
        module.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError) as error:
        what = arguments.get("_class_path", "another model")
        raise ValueError(
            f"Expected {path} to hold the weights of {kind.__name__}, but it is a checkpoint of {what}, or its "
            f"settings are not those of the weights ({error})."
        ) from error
    module.on_load_checkpoint(content)
    module.freeze()
    return module
