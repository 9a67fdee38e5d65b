"""The training rule of segmenters: four modalities in, one class per pixel out.

Isensee et al. 2021, "nnU-Net" (Nature Methods 18), as used by Usman Akbar et al. 2024 (Scientific Data 11:259): sum of
Dice and cross-entropy on every head of a network. What the channels mean, the terms of the loss, optimizer and learning
rate are injected, so that other recipes are configurations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.base import ImageClockModule
from lightning_modules.learning_rates import Decay, Polynomial
from lightning_modules.network_trial import heads_of
from lightning_modules.networks.batch_norm import normalize_over_ranks
from lightning_modules.segmentation_losses import CrossEntropy, Dice, SegmentationLoss
from lightning_modules.segmentation_targets import Classes, Target

BRAIN_THRESHOLD = 8
N_MODALITIES = 4
Mirror = Literal["left-right", "front-back"]
MIRROR_AXES: dict[Mirror, int] = {"left-right": -2, "front-back": -1}


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


class SegmentationModule(ImageClockModule):
    """A segmenter on slices with an injected network.

    Args:
        network: (N, 4, H, W) to logits (N, C, H, W); one with several heads gives (N, heads, C, H, W) in training, the
            head that predicts first.
        target: what the C channels mean; None is `Classes`, C = 4.
        losses: terms that are added up; None is Dice + cross-entropy.
        head_weights: factor of the loss of each head; None is 1, 1/2, 1/4, ..., normalized to sum 1, as nnU-Net's.
        optimizer: its learning rate is the largest of the training.
        no_decay: parameters whose name has one of these words in it are without weight decay.
        decay: how the learning rate falls with the progress in images; None is `Polynomial`, power 0.9.
        rampup_kimg: the learning rate also rises linearly until then.
        mirror: predict the mean of the probabilities over the slice and its mirror images, in all combinations.
        init_from: checkpoint of a segmenter whose network a new run starts from.
        seed: of dropout in training; that of the initial weights is `seed_everything`.

    Raises:
        ValueError: if an option is impossible.
    """

    def __init__(
        self,
        network: nn.Module,
        target: Target | None = None,
        losses: list[SegmentationLoss] | None = None,
        head_weights: list[float] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.SGD(
            parameters, lr=0.01, momentum=0.99, weight_decay=3e-5, nesterov=True
        ),
        no_decay: Sequence[str] = (),
        decay: Decay | None = None,
        rampup_kimg: float = 0.0,
        mirror: Sequence[Mirror] = (),
        init_from: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network
        self.ema_network: nn.Module | None = None
        self.target = target or Classes()
        self.losses = [Dice(), CrossEntropy()] if losses is None else losses
        self.head_weights = head_weights
        self.optimizer = optimizer
        self.no_decay = no_decay
        self.decay = decay or Polynomial()
        self.rampup_kimg = rampup_kimg
        self.mirror_axes = [MIRROR_AXES[name] for name in mirror]
        self.init_from = init_from
        self.seed = seed
        if problems := self._problems():
            raise ValueError("SegmentationModule: " + " ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if not self.losses:
            problems.append("losses must have at least one term, or be left out.")
        if self.head_weights is not None and (min(self.head_weights, default=0) < 0 or not any(self.head_weights)):
            problems.append(f"head_weights must be 0 or more and not all 0, but are {self.head_weights}.")
        if self.rampup_kimg < 0:
            problems.append(f"rampup_kimg must be at least 0, but is {self.rampup_kimg}.")
        if len(set(self.mirror_axes)) != len(self.mirror_axes):
            problems.append("mirror names an axis twice.")
        names = [name for name, _ in self.network.named_parameters()]
        if unused := [word for word in self.no_decay if not any(word in name for name in names)]:
            problems.append(
                f"no_decay: no parameter of {type(self.network).__name__} has {', '.join(unused)} in its name."
            )
        return problems

    def setup(self, stage: str) -> None:
        """Find out whether the network takes the slices of the data; take over that of `init_from`."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit":
            height, width = datamodule.real.manifest.size_px
            heads = heads_of(self.network, (datamodule.batch_size, N_MODALITIES, height, width), self.target.channels)
            if len(self.weights_of(heads)) != heads:
                raise ValueError(
                    f"model.head_weights: {type(self.network).__name__} has {heads} heads in training, but there are "
                    f"{len(self.weights_of(heads))} weights, {self.head_weights}."
                )
        if self.init_from is not None:
            self._start_from(self.init_from)
        if self.trainer.world_size > 1:
            self.network = normalize_over_ranks(self.network, self.trainer.strategy.root_device.type)

    def _start_from(self, path: str) -> None:
        """Take over the network of a segmenter, its moving average where it has one.

        Raises:
            ValueError: if the file cannot be read or the network does not fit.
        """
        try:
            weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        except Exception as error:
            raise ValueError(
                f"model.init_from: {path} cannot be read as a checkpoint of a segmenter ({error})."
            ) from error
        name = "ema_network." if any(key.startswith("ema_network.") for key in weights) else "network."
        try:
            self.network.load_state_dict({k.removeprefix(name): w for k, w in weights.items() if k.startswith(name)})
        except RuntimeError as error:
            raise ValueError(
                f"model.init_from: the network of {path} does not fit the configured one: {error}"
            ) from error
        if self.ema_network is not None:
            self.ema_network.load_state_dict(self.network.state_dict())

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer, with a second group of parameters for those without weight decay."""
        named = list(self.network.named_parameters())
        exempt = {name for name, _ in named if any(word in name for word in self.no_decay)}
        groups: list[dict[str, Any]] = [{"params": [weight for name, weight in named if name not in exempt]}]
        if exempt:
            groups.append({"params": [weight for name, weight in named if name in exempt], "weight_decay": 0.0})
        return self.optimizer(groups)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Set the learning rate for this position of the clock."""
        rampup = min(1.0, (self.images_seen + 1) / max(self.rampup_kimg * 1000, 1))
        self.set_learning_rate(self.trainer.optimizers[0].defaults["lr"] * rampup * self.decay(self.progress))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Give the loss of a batch: slices (N, 5, H, W), and brain, bool (N, 1, H, W), if they are augmented."""
        # Dropout is all that draws from PyTorch's own generator.
        torch.manual_seed((self.seed << 32) + self.images_seen + self.global_rank)
        logits = self.network(normalize(batch["slices"][:, :N_MODALITIES], batch.get("brain")))
        loss = self.loss(logits, batch["slices"][:, N_MODALITIES:].long())
        self.log_mean("loss/train", loss)
        self.advance(len(logits))
        return loss

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Add up the weighted terms of every head.

        Args:
            logits: (N, C, H, W), or (N, heads, C, H, W).
            label: class index, int64 (N, 1, H, W).

        Returns:
            scalar.
        """
        heads = logits.unbind(1) if logits.ndim == 5 else (logits,)
        terms = [
            factor * term.weight * term(head.float(), label, self.target, self._sum_over_ranks)
            for factor, head in zip(self.weights_of(len(heads)), heads, strict=True)
            for term in self.losses
        ]
        return torch.stack(terms).sum()

    def weights_of(self, heads: int) -> list[float]:
        """Give the factor of each head."""
        if self.head_weights is not None:
            return self.head_weights
        halves = [0.5**head for head in range(heads)]
        return [half / sum(halves) for half in halves]

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.mean_over_ranks(values[None]) * self.trainer.world_size

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Predict class indices: uint8 (N, H, W); N may be 0."""
        if not len(batch["slices"]):
            return batch["slices"][:, N_MODALITIES]
        return self.target.decode(self.probabilities(batch["slices"]))

    test_step = predict_step = validation_step

    def probabilities(self, slices: Tensor) -> Tensor:
        """Predict by the moving average of the network where there is one.

        Args:
            slices: uint8 (N, 5, H, W); the label is not looked at.

        Returns:
            float32 (N, C, H, W), the mean over the mirror images if `mirror` asks for them.
        """
        network = self.network if self.ema_network is None else self.ema_network
        images = normalize(slices[:, :N_MODALITIES])
        flips = [axes for count in range(len(self.mirror_axes) + 1) for axes in combinations(self.mirror_axes, count)]
        predicted = [self.target.probabilities(network(images.flip(axes)).float()).flip(axes) for axes in flips]
        return torch.stack(predicted).mean(dim=0)

    @property
    def sampled_network(self) -> nn.Module:
        """The network whose moving average `callbacks.EMA` keeps."""
        return self.network

    def start_ema(self) -> nn.Module:
        """Make the averaged copy of the network, equal to the network at first."""
        if self.ema_network is None:
            self.ema_network = copy.deepcopy(self.network).requires_grad_(False).eval()
        return self.ema_network

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the averaged copy if the checkpoint holds one."""
        super().on_load_checkpoint(checkpoint)
        if any(key.startswith("ema_network.") for key in checkpoint["state_dict"]):
            self.start_ema()
