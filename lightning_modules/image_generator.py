"""The base of all generators: image i is a function of `(checkpoint, seed, i)` alone."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.base import ImageClockModule
from lightning_modules.conditions import Conditions
from lightning_modules.counter_random import Stream, random_uniform

N_CLASSES = 4
LEFT_RIGHT_AXIS = -2
LABEL_LEVELS = (0.0, 85.0, 170.0, 255.0)
"""Grey levels that generators make of the classes: evenly spaced."""


def check_levels(levels: Sequence[float]) -> list[float]:
    """Check the grey levels of the classes.

    Raises:
        ValueError: if they are not four increasing numbers from 0 to 255.
    """
    levels = list(levels)
    if len(levels) != N_CLASSES or sorted(set(levels)) != levels or not 0 <= levels[0] <= levels[-1] <= 255:
        raise ValueError(f"Expected {N_CLASSES} label_levels from 0 to 255, increasing, but got {levels}.")
    return levels


def slices_to_images(slices: Tensor, label_levels: Sequence[float] = LABEL_LEVELS) -> Tensor:
    """Turn slices as stored into images as generators see them.

    Args:
        slices: uint8 (N, 5, H, W): grey levels 0..255 and, last, the class index 0..3.
        label_levels: grey level 0..255 that each class becomes.

    Returns:
        float32 (N, 5, H, W) in [-1, 1].
    """
    levels = torch.tensor(label_levels, device=slices.device)
    label = levels[slices[:, -1:].long()]
    return torch.cat([slices[:, :-1].float(), label], dim=1) / 127.5 - 1.0


def images_to_slices(images: Tensor, label_levels: Sequence[float] = LABEL_LEVELS) -> Tensor:
    """Turn generated images into slices: grey levels are rounded, the label becomes the nearest class.

    Args:
        images: float (N, 5, H, W), nominally in [-1, 1]; values outside are clamped.
        label_levels: grey level 0..255 of each class.

    Returns:
        uint8 (N, 5, H, W).
    """
    grey = (images.float() + 1.0) * 127.5
    modalities = grey[:, :-1].round().clamp(0, 255)
    levels = torch.tensor(label_levels, device=images.device)
    label = torch.bucketize(grey[:, -1:].contiguous(), (levels[1:] + levels[:-1]) / 2)
    return torch.cat([modalities, label], dim=1).to(torch.uint8)


@dataclass(frozen=True)
class Samples:
    """Real images of an iteration.

    Attributes:
        images: float (N, C, H, W) in [-1, 1].
        position: int64 (N,), their places in the stream of training images; random numbers follow from them.
        condition: float (N, width), see `Conditions`; None for a model without conditions.
    """

    images: Tensor
    position: Tensor
    condition: Tensor | None = None

    def __getitem__(self, chosen: slice) -> Samples:
        condition = None if self.condition is None else self.condition[chosen]
        return Samples(self.images[chosen], self.position[chosen], condition)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImagePlan:
    """Which images `predict` makes; set by the callback that writes them.

    Attributes:
        seed: names the whole series.
        batches: gives the images that this rank is to make, batch by batch; called when the weights are loaded.
    """

    seed: int
    batches: Callable[[], Sequence[range]]


class ImageGenerator(ImageClockModule):
    """A generator of 5-channel slices that learns from a slice set.

    Subclasses give `generate`. The averaged copy of the network (`ema_network`) is made and updated by the EMA
    callback; images come from it when there is one.

    Args:
        init_from: checkpoint, of a run or imported, whose networks a new run starts from; clock, optimizers and
            statistics start anew.
        label_levels: grey levels 0..255 that the classes 0..3 of the label are learned as. The paper's are 0, 51, 102
            and 204.
    """

    ema_network: nn.Module | None
    conditions: Conditions

    def __init__(self, init_from: str | None = None, label_levels: Sequence[float] = LABEL_LEVELS) -> None:
        super().__init__()
        self.label_levels = check_levels(label_levels)
        self.ema_network = None
        self.init_from = init_from
        self.image_plan: ImagePlan | None = None
        self.conditions = Conditions()
        self.mirror = False
        self.seed = 0

    def setup(self, stage: str) -> None:
        """Take over the networks of `init_from`; the checkpoint of a run that is resumed is loaded after this."""
        if self.init_from is not None:
            datamodule: Any = getattr(self.trainer, "datamodule", None)
            content = self.start_from(self.init_from, None if datamodule is None else datamodule.channels)
            counts = content["state_dict"].get("conditions.counts")
            if stage == "predict" and counts is not None and counts.shape == self.conditions.counts.shape:
                self.conditions.counts.copy_(counts)  # emit what that generator would

    def start_from(self, path: str, channels: Sequence[str] | None = None) -> dict[str, Any]:
        """Take over the networks of a checkpoint.

        Args:
            path: checkpoint of a run or of `standin import`; a network that it lacks keeps its weights.
            channels: names of the channels of the data, in order.

        Returns:
            The content of the checkpoint.

        Raises:
            ValueError: if the file cannot be read or its channels or weights do not fit.
        """
        try:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            weights: dict[str, Tensor] = content["state_dict"]
        except Exception as error:
            raise ValueError(
                f"model.init_from: {path} cannot be read as a checkpoint of a run or of `standin import` ({error})."
            ) from error
        theirs = content.get("channels")
        if channels is not None and theirs is not None and list(channels) != list(theirs):
            raise ValueError(
                f"model.init_from: {path} makes the channels {', '.join(theirs)}, but the data has "
                f"{', '.join(channels)}. Name the channels of the original at `standin import --channels`."
            )
        found = {name.split(".")[0] for name in weights}
        if "ema_network" in found:
            self.start_ema()
        elif self.ema_network is not None:
            own = self.sampled_name + "."
            weights |= {name.replace(own, "ema_network.", 1): w for name, w in weights.items() if name.startswith(own)}
        networks = [name for name in (self.sampled_name, "ema_network", "discriminator") if name in found]
        if self.sampled_name not in found:
            raise ValueError(f"model.init_from: {path} holds no weights of a {self.sampled_name}.")
        for name in {*networks, *(["ema_network"] if self.ema_network is not None else [])}:
            _load(getattr(self, name), name, weights, path)
        return content

    def samples(self, batch: dict[str, Tensor]) -> Samples:
        """Turn a batch of the loader into training samples, and count their conditions over all ranks.

        With `mirror`, half of them are mirrored left to right.

        Args:
            batch: slices uint8 (N, 5, H, W), position int64 (N,), height float (N,).
        """
        condition = None
        if self.conditions.width:
            bins = self.conditions.of(batch["slices"], batch["height"])
            condition = self.conditions.vectors(bins)
            shares = self.mean_over_ranks(self.conditions.shares(bins))
            self.conditions.counts += shares * (len(bins) * self.trainer.world_size)
        images = slices_to_images(batch["slices"], self.label_levels)
        if self.mirror:
            flipped = random_uniform(self.seed, Stream.MIRROR, batch["position"], 4)[:, 0] < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(LEFT_RIGHT_AXIS), images)
        return Samples(images, batch["position"], condition)

    def backward_in_parts(
        self, loss: Callable[[Samples], Tensor], samples: Samples, parts: int, weight: float = 1.0
    ) -> None:
        """Add up the gradients of the mean loss over parts of a batch; the processes exchange them once, at the end.

        Args:
            loss: a scalar, the mean over the samples.
            samples: all samples of this process.
            parts: how many; the gradients are those of their mean.
            weight: of the loss.
        """
        strategy: Any = self.trainer.strategy
        for part in range(parts):
            synchronised = part == parts - 1 or self.trainer.world_size == 1
            with nullcontext() if synchronised else strategy.block_backward_sync():
                # Strided, as the samples over the ranks: the groups of the minibatch standard deviation stay together.
                self.manual_backward(loss(samples[part::parts]) * (weight / parts))

    @property
    @abstractmethod
    def sampled_network(self) -> nn.Module:
        """The network whose moving average makes the images."""

    @abstractmethod
    def generate(self, index: Tensor, seed: int) -> Tensor:
        """Make images; image i depends on the weights, `seed` and i, not on the other images of the batch.

        Args:
            index: int64 (N,), which images.
            seed: names the whole series.

        Returns:
            float (N, 5, H, W), nominally in [-1, 1].
        """

    @property
    def evaluations_per_image(self) -> int:
        """How often the network is evaluated for an image."""
        return 1

    def try_out(self, index: Tensor) -> None:
        """Take the memory that `generate` takes, in less time where that is possible."""
        self.generate(index, 0)

    @torch.no_grad()
    def generate_slices(self, index: Tensor, seed: int) -> Tensor:
        """Make slices in the form in which they are stored: uint8 (N, 5, H, W)."""
        return images_to_slices(self.generate(index.to(self.device), seed), self.label_levels)

    @property
    def sampled_name(self) -> str:
        """Attribute that holds the sampled network."""
        return next(name for name, module in self.named_children() if module is self.sampled_network)

    def start_ema(self) -> nn.Module:
        """Make the averaged copy of the network, equal to the network at first."""
        if self.ema_network is None:
            self.ema_network = copy.deepcopy(self.sampled_network).requires_grad_(False).eval()
        return self.ema_network

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the averaged copy if the checkpoint holds one."""
        super().on_load_checkpoint(checkpoint)
        if any(key.startswith("ema_network.") for key in checkpoint["state_dict"]):
            self.start_ema()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the channels that the generator makes."""
        super().on_save_checkpoint(checkpoint)
        datamodule: Any = getattr(self._trainer, "datamodule", None)
        if datamodule is not None:
            checkpoint["channels"] = list(datamodule.channels)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """The indices of the images that this rank is to make."""
        batches = [torch.arange(batch.start, batch.stop) for batch in self._plan().batches()]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Make the slices of these indices: int64 (N,) to uint8 (N, 5, H, W)."""
        return self.generate_slices(batch, self._plan().seed)

    def _plan(self) -> ImagePlan:
        if self.image_plan is None:
            raise ValueError("Nothing says which images to make: add callbacks.SyntheticDataset to trainer.callbacks.")
        return self.image_plan


def _load(network: nn.Module, name: str, weights: dict[str, Tensor], path: str) -> None:
    """Load the weights `<name>.*` strictly, saying what does not fit."""
    theirs = {key.removeprefix(name + "."): w for key, w in weights.items() if key.startswith(name + ".")}
    ours = network.state_dict()
    wrong = [f"{key} is missing" for key in ours if key not in theirs]
    wrong += [f"{key} is unknown" for key in theirs if key not in ours]
    wrong += [
        f"{key} is {tuple(theirs[key].shape)} instead of {tuple(w.shape)}"
        for key, w in ours.items()
        if key in theirs and theirs[key].shape != w.shape
    ]
    if wrong:
        raise ValueError(
            f"model.init_from: the {name} of {path} does not fit the configured one ({len(wrong)} weights): "
            f"{'; '.join(wrong[:5])}. `standin import` writes the fitting model.yaml."
        )
    network.load_state_dict(theirs)
