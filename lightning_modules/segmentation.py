"""The training rule of segmenters: four modalities in, one class per pixel out.

Isensee et al. 2021, "nnU-Net" (Nature Methods 18), as used by Usman Akbar et al. 2024 (Scientific Data 11:259): sum of
Dice and cross-entropy on every scale of a deeply supervised network, SGD with Nesterov momentum, polynomial decay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.base import ImageClockModule

BRAIN_THRESHOLD = 8


def normalize(modalities: Tensor, brain: Tensor | None = None) -> Tensor:
    """Give each modality of each slice zero mean and unit variance inside the brain; outside it is 0.

    Args:
        modalities: uint8 or float (N, 4, H, W), 0..255.
        brain: bool (N, 1, H, W); None takes the pixels where any modality is brighter than 8 of 255 (the background of
            generated slices is nearly black only).

    Returns:
        float32 (N, 4, H, W).
    """
    modalities = modalities.float()
    if brain is None:
        brain = modalities.amax(dim=1, keepdim=True) > BRAIN_THRESHOLD
    inside = brain.float()  # (N, 1, H, W)
    count = inside.sum(dim=(2, 3), keepdim=True).clamp(min=1.0)
    mean = (modalities * inside).sum(dim=(2, 3), keepdim=True) / count
    centred = (modalities - mean) * inside
    deviation = (centred.square().sum(dim=(2, 3), keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=1.0)


def batch_dice_loss(logits: Tensor, target: Tensor, over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """Soft Dice loss of the whole global batch, mean over all classes.

    Sums run over the batch of all processes, as nnU-Net does for slices, of which most lack some class; the mean of the
    Dice of parts would be another number.

    Args:
        logits: (N, classes, H, W).
        target: class index, int64 (N, 1, H, W).
        over_ranks: sum over the processes, differentiable.

    Returns:
        scalar, 0 for a perfect prediction.
    """
    probability = logits.softmax(dim=1)
    truth = torch.zeros_like(probability).scatter_(1, target, 1.0)
    sums = torch.stack([(probability * truth).sum(dim=(0, 2, 3)), (probability + truth).sum(dim=(0, 2, 3))])
    overlap, total = over_ranks(sums)  # (classes,) each
    dice: Tensor = (2.0 * overlap + 1e-5) / (total + 1e-5)
    return 1.0 - dice.mean()


class SegmentationModule(ImageClockModule):
    """A segmenter on slices with an injected network.

    Args:
        network: (N, 4, H, W) to logits (N, 4, H, W); a deeply supervised one gives (N, heads, 4, H, W) in training.
        lr: initial learning rate; decays as (1 - progress)^poly_power, progress in images.
        momentum: Nesterov momentum of SGD.
        weight_decay: L2 penalty.
        poly_power: exponent of the decay.
        seed: of the initial weights is `seed_everything`; this one is recorded with the run.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 0.01,
        momentum: float = 0.99,
        weight_decay: float = 3e-5,
        poly_power: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.poly_power = poly_power
        self.seed = seed

    def configure_optimizers(self) -> Optimizer:
        """SGD with Nesterov momentum."""
        return torch.optim.SGD(
            self.network.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True
        )

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Set the learning rate for this position of the clock."""
        self.set_learning_rate(self.lr * (1.0 - self.progress) ** self.poly_power)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Dice + cross-entropy, on every head of a deeply supervised network."""
        logits = self.network(normalize(batch["slices"][:, :4], batch.get("brain")))
        target = batch["slices"][:, 4:].long()
        loss = self.deep_supervision_loss(logits, target)
        self.log_mean("loss/train", loss)
        self.advance(len(logits))
        return loss

    def deep_supervision_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Weigh the heads by 1, 1/2, 1/4, ... normalised to sum 1; the finest comes first."""
        heads = logits.unbind(1) if logits.ndim == 5 else (logits,)
        weights = torch.tensor([0.5**i for i in range(len(heads))])
        weights = weights / weights.sum()
        losses = [w * self.loss(head.float(), target) for w, head in zip(weights.tolist(), heads, strict=True)]
        return torch.stack(losses).sum()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Dice + cross-entropy with weight 1 each; logits (N, classes, H, W), target int64 (N, 1, H, W)."""
        dice = batch_dice_loss(logits, target, lambda sums: self.mean_over_ranks(sums[None]) * self.trainer.world_size)
        return dice + F.cross_entropy(logits, target[:, 0])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Predict class indices: uint8 (N, H, W); N may be 0."""
        if not len(batch["slices"]):
            return batch["slices"][:, 4]
        logits: Tensor = self.network(normalize(batch["slices"][:, :4]))
        return logits.argmax(dim=1).to(torch.uint8)

    test_step = validation_step
