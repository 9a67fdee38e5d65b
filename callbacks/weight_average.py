"""What moving averages of the weights of a model share: they follow its clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.base import ImageClockModule
from lightning_modules.image_generator import ImageGenerator


class WeightAverage(Callback, ABC):
    """Call `average` after every iteration of a model, whatever optimizers it steps.

    Attributes:
        models: the kinds of models that it knows.
    """

    models: ClassVar[dict[str, type[ImageClockModule]]] = {"image generators": ImageGenerator}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other models."""
        if not isinstance(pl_module, tuple(self.models.values())):
            raise ValueError(
                f"{type(self).__name__} averages {' and '.join(self.models)}, but the model is a "
                f"{type(pl_module).__name__}."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the clock, which a resumed run has restored."""
        assert isinstance(pl_module, ImageClockModule)
        self.followed = pl_module.images_seen

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Follow the iteration before this one, where a training step holds several."""
        self._follow(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the last iteration."""
        self._follow(pl_module)

    @torch.no_grad()
    def _follow(self, model: LightningModule) -> None:
        """Average if the clock has moved."""
        assert isinstance(model, ImageClockModule)
        before, self.followed = self.followed, model.images_seen
        if self.followed != before:
            self.average(model, before)

    @abstractmethod
    def average(self, model: Any, before: int) -> None:
        """Move the averages towards the weights; the clock stood at `before` images when they were last moved."""


def move(averages: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """Move averages towards weights in place: decay * average + (1 - decay) * weight."""
    for mean, weight in zip(averages, weights, strict=True):
        mean.copy_(weight.lerp(mean, decay))
