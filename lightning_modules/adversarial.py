"""The adversarial base: alternation of generator and discriminator, lazy regularization, gradient accumulation.

A model lists its phases; the base walks through them. Karras et al. 2020, "Analyzing and Improving the Image Quality of
StyleGAN" (CVPR, arXiv 1912.04958), appendix B, gives lazy regularization: a term is evaluated every k-th iteration with
weight k, and Adam's learning rate and decay rates are changed by k / (k + 1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_modules.image_generator import ImageGenerator, slices_to_images


@dataclass(frozen=True)
class Phase:
    """One term of the training objective with the network that it trains.

    Attributes:
        name: how the loss is called in the log.
        network: whose optimizer steps.
        loss: `(real images (N, C, H, W), position (N,)) -> scalar`, a mean over the batch.
        interval: evaluated every that many iterations, with that weight.
    """

    name: str
    network: Literal["generator", "discriminator"]
    loss: Callable[[Tensor, Tensor], Tensor]
    interval: int = 1


class AdversarialGenerator(ImageGenerator):
    """Generator against discriminator with one Adam each.

    Args:
        generator: latent code to image.
        discriminator: image to logit.
        generator_lr: learning rate of the generator's Adam.
        discriminator_lr: learning rate of the discriminator's Adam.
        adam_betas: decay rates of both.
        micro_batches: a training batch is worked off in that many parts whose gradients are averaged.
        seed: all latents and noise of training follow from it and the clock.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        generator_lr: float,
        discriminator_lr: float,
        adam_betas: tuple[float, float],
        micro_batches: int,
        seed: int,
    ) -> None:
        super().__init__()
        if micro_batches < 1:
            raise ValueError(f"Expected micro_batches to be at least 1, but got {micro_batches}.")
        self.automatic_optimization = False
        self.generator = generator
        self.discriminator = discriminator
        self.generator_lr = generator_lr
        self.discriminator_lr = discriminator_lr
        self.adam_betas = adam_betas
        self.micro_batches = micro_batches
        self.seed = seed

    @property
    def sampled_network(self) -> nn.Module:
        """The generator."""
        return self.generator

    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """The terms of the objective in the order in which they are worked off."""

    def configure_optimizers(self) -> list[Optimizer]:
        """One Adam per network, adapted to the interval of its lazy regularization."""
        return [
            self._adam(self.generator, self.generator_lr, "generator"),
            self._adam(self.discriminator, self.discriminator_lr, "discriminator"),
        ]

    def _adam(self, network: nn.Module, lr: float, name: str) -> Adam:
        lazy = [phase.interval for phase in self.phases() if phase.network == name and phase.interval > 1]
        ratio = max(lazy) / (max(lazy) + 1.0) if lazy else 1.0
        beta1, beta2 = self.adam_betas
        return Adam(network.parameters(), lr=lr * ratio, betas=(beta1**ratio, beta2**ratio), eps=1e-8)

    def on_fit_start(self) -> None:
        """Refuse what would train wrongly in silence.

        Raises:
            ValueError: for a precision whose gradients are scaled, or batches that cut the groups of the minibatch
                standard deviation apart.
        """
        problems = []
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            problems.append(f"trainer.precision must be 32-true or bf16-mixed, but is {self.trainer.precision}.")
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        group = getattr(self.discriminator, "mbstd_group_size", None)
        if datamodule is not None and group is not None:
            share = datamodule.batch_size // (self.trainer.world_size * self.micro_batches)
            if share % group:
                problems.append(
                    f"data.batch_size {datamodule.batch_size} over {self.trainer.world_size} processes and "
                    f"{self.micro_batches} micro_batches is {share}, but must be a multiple of the groups of {group} "
                    "of the minibatch standard deviation (discriminator.mbstd_group_size)."
                )
        if problems:
            raise ValueError("Training: " + " ".join(problems))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Work off the phases that are due; shapes: slices uint8 (N, 5, H, W), position int64 (N,)."""
        real, position = slices_to_images(batch["slices"]), batch["position"]
        if len(real) % self.micro_batches:
            raise ValueError(
                f"Expected the batch of a process to be a multiple of micro_batches ({self.micro_batches}), but got "
                f"{len(real)}. Change data.batch_size or model.micro_batches."
            )
        iteration = self.images_seen // (len(real) * self.trainer.world_size)
        for phase in self.phases():
            if iteration % phase.interval == 0:
                self._run(phase, real, position)

    def _run(self, phase: Phase, real: Tensor, position: Tensor) -> None:
        optimizers: Any = self.optimizers()
        optimizer = optimizers[0 if phase.network == "generator" else 1]
        self.generator.requires_grad_(phase.network == "generator")
        self.discriminator.requires_grad_(phase.network == "discriminator")
        optimizer.zero_grad()
        for part in range(self.micro_batches):
            # Strided, as the samples over the ranks: the groups of the minibatch standard deviation stay together.
            chosen = slice(part, None, self.micro_batches)
            last = part == self.micro_batches - 1
            strategy: Any = self.trainer.strategy
            synchronised = nullcontext() if last or self.trainer.world_size == 1 else strategy.block_backward_sync()
            with synchronised:
                loss = phase.loss(real[chosen], position[chosen])
                self.manual_backward(loss * (phase.interval / self.micro_batches))
        for parameter in getattr(self, phase.network).parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        optimizer.step()
