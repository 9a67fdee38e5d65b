"""The training rule of segmenters: four modalities in, one class per pixel out.

Isensee et al. 2021, "nnU-Net" (Nature Methods 18), as used by Usman Akbar et al. 2024 (Scientific Data 11:259): sum of
Dice and cross-entropy on every scale of a deeply supervised network, SGD with Nesterov momentum, polynomial decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.losses.dice import DiceCELoss
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.base import ImageClockModule
from lightning_modules.counter_random import Stream, random_words

BRAIN_THRESHOLD = 8


def normalize(modalities: Tensor) -> Tensor:
    """Give each modality of each slice zero mean and unit variance inside the brain; outside it is 0.

    Brain is where any modality is brighter than 8 of 255: the background of generated slices is nearly black only.

    Args:
        modalities: uint8 or float (N, 4, H, W), 0..255.

    Returns:
        float32 (N, 4, H, W).
    """
    modalities = modalities.float()
    brain = (modalities.amax(dim=1, keepdim=True) > BRAIN_THRESHOLD).float()  # (N, 1, H, W)
    count = brain.sum(dim=(2, 3), keepdim=True).clamp(min=1.0)
    mean = (modalities * brain).sum(dim=(2, 3), keepdim=True) / count
    centred = (modalities - mean) * brain
    deviation = (centred.square().sum(dim=(2, 3), keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=1.0)


class SegmentationModule(ImageClockModule):
    """A segmenter on slices with an injected network.

    Args:
        network: (N, 4, H, W) to logits (N, 4, H, W); a deeply supervised one gives (N, heads, 4, H, W) in training.
        lr: initial learning rate; decays as (1 - progress)^poly_power, progress in images.
        momentum: Nesterov momentum of SGD.
        weight_decay: L2 penalty.
        poly_power: exponent of the decay.
        augmentation: transform of {"image": (4, H, W), "label": (1, H, W)}, a MONAI `Compose` of random transforms; its
            random state is set for every sample from the seed and the clock.
        seed: of the augmentation.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 0.01,
        momentum: float = 0.99,
        weight_decay: float = 3e-5,
        poly_power: float = 0.9,
        augmentation: Callable[[dict[str, Any]], Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.poly_power = poly_power
        self.augmentation = augmentation
        self.seed = seed
        # Dice over the whole batch: most slices lack some class (nnU-Net does the same for 2-D).
        self.loss = DiceCELoss(softmax=True, to_onehot_y=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)

    def configure_optimizers(self) -> Optimizer:
        """SGD with Nesterov momentum."""
        return torch.optim.SGD(
            self.network.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True
        )

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Set the learning rate for this position of the clock."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        total = (self.trainer.max_epochs or 1) * datamodule.epoch_images
        progress = min(self.images_seen / total, 1.0)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1.0 - progress) ** self.poly_power

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Dice + cross-entropy, on every head of a deeply supervised network."""
        slices = batch["slices"]
        if self.augmentation is not None:
            slices = self._augment(slices, batch["position"])
        logits = self.network(normalize(slices[:, :4]))
        target = slices[:, 4:].long()
        loss = self.deep_supervision_loss(logits, target)
        self.log("loss/train", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def deep_supervision_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Weigh the heads by 1, 1/2, 1/4, ... normalised to sum 1; the finest comes first."""
        heads = logits.unbind(1) if logits.ndim == 5 else (logits,)
        weights = torch.tensor([0.5**i for i in range(len(heads))])
        weights = weights / weights.sum()
        losses = [w * self.loss(head.float(), target) for w, head in zip(weights.tolist(), heads, strict=True)]
        return torch.stack(losses).sum()

    def _augment(self, slices: Tensor, position: Tensor) -> Tensor:
        """Augment sample by sample with random states that follow from (seed, position): uint8 to float slices."""
        states = random_words(self.seed, Stream.AUGMENTATION, position, 4)[:, 0].tolist()
        augmentation: Any = self.augmentation
        out = []
        for sample, state in zip(slices.float(), states, strict=True):
            augmentation.set_random_state(seed=state)
            result = augmentation({"image": sample[:4], "label": sample[4:]})
            out.append(torch.cat([torch.as_tensor(result["image"]), torch.as_tensor(result["label"])]))
        return torch.stack(out)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Predict class indices: uint8 (N, H, W); N may be 0."""
        if not len(batch["slices"]):
            return batch["slices"][:, 4]
        logits: Tensor = self.network(normalize(batch["slices"][:, :4]))
        return logits.argmax(dim=1).to(torch.uint8)

    test_step = validation_step
