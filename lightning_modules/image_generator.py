"""The base of all generators: image i is a function of `(checkpoint, seed, i)` alone."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.base import ImageClockModule

N_CLASSES = 4


def slices_to_images(slices: Tensor) -> Tensor:
    """Turn slices as stored into images as generators see them.

    Args:
        slices: uint8 (N, 5, H, W): grey levels 0..255 and, last, the class index 0..3.

    Returns:
        float32 (N, 5, H, W) in [-1, 1]; the classes become four evenly spaced intensities.
    """
    images = slices.float()
    modalities, label = images[:, :-1], images[:, -1:]
    return torch.cat([modalities / 127.5 - 1.0, label * (2.0 / (N_CLASSES - 1)) - 1.0], dim=1)


def images_to_slices(images: Tensor) -> Tensor:
    """Turn generated images into slices: grey levels are rounded, the label becomes the nearest class.

    Args:
        images: float (N, 5, H, W), nominally in [-1, 1]; values outside are clamped.

    Returns:
        uint8 (N, 5, H, W).
    """
    images = images.float()
    modalities = ((images[:, :-1] + 1.0) * 127.5).round().clamp(0, 255)
    label = ((images[:, -1:] + 1.0) * ((N_CLASSES - 1) / 2.0)).round().clamp(0, N_CLASSES - 1)
    return torch.cat([modalities, label], dim=1).to(torch.uint8)


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
    """

    ema_network: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.ema_network = None
        self.image_plan: ImagePlan | None = None

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

    @torch.no_grad()
    def generate_slices(self, index: Tensor, seed: int) -> Tensor:
        """Make slices in the form in which they are stored: uint8 (N, 5, H, W)."""
        return images_to_slices(self.generate(index.to(self.device), seed))

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
