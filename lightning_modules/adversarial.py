"""The adversarial base: alternation of generator and discriminator, lazy regularization, gradient accumulation.

A model lists its phases; the base walks through them. Karras et al. 2020, "Analyzing and Improving the Image Quality of
StyleGAN" (CVPR, arXiv 1912.04958), appendix B, gives lazy regularization: a term is evaluated every k-th iteration with
weight k, and Adam's learning rate and decay rates are changed by k / (k + 1). Progressive growing (Karras et al. 2018,
ICLR, arXiv 1710.10196) and adaptive discriminator augmentation (Karras et al. 2020, NeurIPS, arXiv 2006.06676) are
injected objects that any of the models can have.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_modules.ada import AdaptiveAugmentation
from lightning_modules.conditions import Conditions
from lightning_modules.growing import GrowingSchedule, fade_real
from lightning_modules.image_generator import ImageGenerator, Samples


@dataclass(frozen=True)
class Phase:
    """One term of the training objective with the network that it trains.

    Attributes:
        name: how the loss is called in the log.
        network: whose optimizer steps.
        loss: a scalar, the mean over the samples.
        interval: evaluated every that many iterations, with that weight.
    """

    name: str
    network: Literal["generator", "discriminator"]
    loss: Callable[[Samples], Tensor]
    interval: int = 1


class AdversarialGenerator(ImageGenerator):
    """Generator against discriminator with one Adam each.

    Networks with `c_dim` classes are conditional: 2 classes, slices without and with tumour, can be learned. Images are
    emitted with the classes in the proportions of the training.

    Args:
        generator: latent code to image.
        discriminator: image to logit.
        generator_lr: learning rate of the generator's Adam; with `growing` its schedule rules.
        discriminator_lr: learning rate of the discriminator's Adam; likewise.
        adam_betas: decay rates of both.
        growing: schedule of progressive growing; None trains at full resolution throughout.
        augmentation: what the discriminator sees real and generated images through; None is nothing.
        mirror: show real images and their left-right mirror images alike; changes the anatomy.
        micro_batches: the images of an iteration are worked off in that many parts whose gradients are averaged.
        seed: all latents and noise of training follow from it and the clock.
        init_from: checkpoint, of a run or imported, whose networks training starts from.
        label_levels: grey levels (0 to 255) of the classes in training images; the paper's are 0, 51, 102, 204.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        generator_lr: float,
        discriminator_lr: float,
        adam_betas: tuple[float, float],
        growing: GrowingSchedule | None,
        augmentation: AdaptiveAugmentation | None,
        mirror: bool,
        micro_batches: int,
        seed: int,
        init_from: str | None,
        label_levels: Sequence[float],
    ) -> None:
        super().__init__(init_from, label_levels)
        if micro_batches < 1:
            raise ValueError(f"Expected micro_batches to be at least 1, but got {micro_batches}.")
        self.automatic_optimization = False
        self.generator = generator
        self.discriminator = discriminator
        self.generator_lr = generator_lr
        self.discriminator_lr = discriminator_lr
        self.adam_betas = adam_betas
        self.growing = growing
        self.augmentation = augmentation
        self.mirror = mirror
        self.micro_batches = micro_batches
        self.seed = seed
        self._lod: float | None = None
        self.c_dim: int = getattr(generator, "c_dim", 0)
        self.conditions = Conditions(["tumour"]) if self.c_dim == 2 else Conditions.unnamed(self.c_dim)

    @property
    def sampled_network(self) -> nn.Module:
        """The generator."""
        return self.generator

    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """The terms of the objective in the order in which they are worked off."""

    def start_from(self, path: str, channels: Sequence[str] | None = None) -> dict[str, Any]:
        """Take over the networks of a checkpoint, at its level of detail; see `ImageGenerator.start_from`."""
        content = super().start_from(path, channels)
        if content.get("lod"):
            self.set_lod(content["lod"])
        return content

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
            ValueError: for a precision whose gradients are scaled, batches that cut the groups of the minibatch
                standard deviation apart, or minibatches that the batches of the loader do not hold.
        """
        super().on_fit_start()
        problems = []
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            problems.append(
                f"trainer.precision must be 32-true or bf16-mixed, but is {self.trainer.precision}. For half precision "
                "set num_half_res of the networks, which keeps the lowest resolutions in float32."
            )
        if self.c_dim not in (0, 2) or getattr(self.discriminator, "c_dim", 0) != self.c_dim:
            problems.append(
                "c_dim of generator and discriminator must both be 0, or 2 for slices without and with tumour, but are "
                f"{self.c_dim} and {getattr(self.discriminator, 'c_dim', 0)}."
            )
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            problems += self._problems_of_batches(datamodule.batch_size, datamodule.epoch_images)
        if problems:
            raise ValueError("Training: " + " ".join(problems))

    def _problems_of_batches(self, batch_size: int, epoch_images: int) -> list[str]:
        problems = []
        sizes = [batch_size] if self.growing is None else self.growing.minibatches()
        group = getattr(self.discriminator, "mbstd_group_size", None) or 1
        for size in sizes:
            share, left = divmod(size, self.trainer.world_size * self.micro_batches)
            if left or share % group:
                problems.append(
                    f"{size} images over {self.trainer.world_size} processes and {self.micro_batches} micro_batches "
                    f"must be a multiple of {group} each (mbstd_group_size of the discriminator)."
                )
            if batch_size % size:
                problems.append(
                    f"data.batch_size ({batch_size}) must be a multiple of the minibatch of {size} images in "
                    "model.growing; a batch of the loader is worked off in several iterations."
                )
        return problems

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Work off a batch in one or, while growing, several iterations.

        Args:
            batch: slices uint8 (N, 5, H, W), position int64 (N,).
            batch_idx: unused.
        """
        left = self.samples(batch)
        while len(left):
            images = self._begin_iteration(len(left) * self.trainer.world_size) // self.trainer.world_size
            self._iterate(left[:images])
            left = left[images:]

    def _begin_iteration(self, images: int) -> int:
        """Set the networks to the clock; returns how many images, over all processes, this iteration takes."""
        if self.growing is None:
            return images
        lod = self.growing.lod(self.images_seen)
        self.set_lod(lod)
        self.set_learning_rate(self.growing.learning_rate(self.images_seen))
        if self._lod is not None and self.growing.level_changed(self._lod, lod):
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()  # as the originals do whenever layers enter or leave
        self._lod = lod
        return min(images, self.growing.minibatch_size(self.images_seen))

    def set_lod(self, lod: float) -> None:
        """Set the level of detail of all networks: 0 is full resolution, k is a 2^k-th of it."""
        for network in (self.generator, self.discriminator, self.ema_network):
            if network is not None:
                network.lod = lod  # type: ignore[assignment]

    def _iterate(self, samples: Samples) -> None:
        iteration = self.images_seen // (len(samples) * self.trainer.world_size)
        if self.growing is not None:
            faded = fade_real(samples.images, self.growing.lod(self.images_seen))
            samples = Samples(faded, samples.position, samples.condition)
        for phase in self.phases():
            if iteration % phase.interval == 0:
                self._run(phase, samples)
        self.advance(len(samples))
        if self.augmentation is not None:
            self.log_mean("augmentation/p", self.augmentation.p)
        if self.augmentation is not None and (iteration + 1) % self.augmentation.adjust_interval == 0:
            self.augmentation.adjust(len(samples) * self.trainer.world_size * self.augmentation.adjust_interval)

    def _run(self, phase: Phase, samples: Samples) -> None:
        optimizers: Any = self.optimizers()
        optimizer = optimizers[0 if phase.network == "generator" else 1]
        self.generator.requires_grad_(phase.network == "generator")
        self.discriminator.requires_grad_(phase.network == "discriminator")
        optimizer.zero_grad()
        self.backward_in_parts(phase.loss, samples, self.micro_batches, phase.interval)
        for parameter in getattr(self, phase.network).parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        optimizer.step()

    def judge(self, images: Tensor, samples: Samples, draw: int) -> Tensor:
        """Logits (N, 1) of images, real or generated, as the discriminator sees them; `draw` names the augmentation."""
        if self.augmentation is not None:
            images = self.augmentation(images, samples.position, self.seed, draw)
        condition = () if samples.condition is None else (samples.condition,)
        logits: Tensor = self.discriminator(images, *condition)
        return logits

    def judge_real(self, images: Tensor, samples: Samples, draw: int) -> Tensor:
        """Logits (N, 1) of real images, whose signs steer the augmentation."""
        logits = self.judge(images, samples, draw)
        if self.augmentation is not None:
            signs = self.mean_over_ranks(logits.detach().sign().flatten())
            self.augmentation.accumulate(signs, len(samples) * self.trainer.world_size)
        self.log_mean("score/real", logits)
        return logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the level of the last iteration, which decides on the next reset of Adam."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lod"] = self._lod

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the level of the last iteration."""
        super().on_load_checkpoint(checkpoint)
        self._lod = checkpoint.get("lod")
        if self._lod is not None:
            self.set_lod(self._lod)
