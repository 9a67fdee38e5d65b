"""Diffusion models: the training rule and the emission of images.

Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models" (NeurIPS, arXiv 2006.11239). What is learned
(`denoising`), how it is sampled (`sampling`) and the network are injected, in any combination.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_modules.autoencoder import Autoencoder
from lightning_modules.base import load_frozen
from lightning_modules.conditions import Condition, Conditions
from lightning_modules.counter_random import Stream, random_normal, random_uniform
from lightning_modules.denoising import Objective
from lightning_modules.image_generator import LABEL_LEVELS, ImageGenerator, Samples, slices_to_images
from lightning_modules.noise_levels import CLEAN, Level
from lightning_modules.sampling import Sampler, clipped, guided

STEPS_PER_IMAGE = 1 << 14  # most steps of a sampler, so that no two images share noise


class Diffusion(ImageGenerator):
    """A diffusion model on slices of named channels, or on the latents of an autoencoder.

    Args:
        network: noisy images, time and condition to a prediction.
        objective: what the network learns.
        sampler: how images are made.
        learning_rate: of AdamW.
        rampup_kimg: the learning rate rises linearly until then.
        adam_betas: decay rates.
        weight_decay: of AdamW.
        conditions: what the network is told of a slice: `tumour`, `height`, `areas`. Images are emitted with the
            conditions in the proportions of the training. None: an imported network with classes emits all alike.
        condition_dropout: how many samples are trained without condition, for guidance.
        guidance: weight of the condition when images are made: 1 is the plain model, more exaggerates it.
        clip: clip the denoised images to [-1, 1] in every step, as the originals do with chains.
        autoencoder: checkpoint of an `Autoencoder` whose latents are learned instead of images.
        mirror: show real images and their left-right mirror images alike; changes the anatomy, off by default.
        micro_batches: parts of a batch whose gradients are averaged, to save memory.
        seed: times and noise of training follow from it and the clock.
        init_from: checkpoint, of a run or imported, whose networks training starts from.
        label_levels: grey levels (0 to 255) of the classes in training images; the paper's are 0, 51, 102, 204.

    Raises:
        ValueError: if conditions and network do not fit together, or a rate is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        sampler: Sampler,
        learning_rate: float = 1e-4,
        rampup_kimg: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        conditions: Sequence[Condition] = (),
        condition_dropout: float = 0.1,
        guidance: float = 1.0,
        clip: bool = False,
        autoencoder: str | None = None,
        mirror: bool = False,
        micro_batches: int = 1,
        seed: int = 0,
        init_from: str | None = None,
        label_levels: Sequence[float] = LABEL_LEVELS,
    ) -> None:
        super().__init__(init_from, label_levels)
        self.save_hyperparameters()
        self.automatic_optimization = False
        width: int = getattr(network, "condition_width", 0)
        self.conditions = Conditions(conditions) if conditions else Conditions.unnamed(width)
        self.network = network
        self.objective = objective
        self.sampler = sampler
        self.autoencoder = None if autoencoder is None else load_frozen(Autoencoder, autoencoder)
        self.autoencoder_path = autoencoder
        self.learning_rate = learning_rate
        self.rampup_kimg = rampup_kimg
        self.adam_betas = adam_betas
        self.weight_decay = weight_decay
        self.condition_dropout = condition_dropout
        self.guidance = guidance
        self.clip = clip
        self.mirror = mirror
        self.micro_batches = micro_batches
        self.seed = seed
        self.levels = sampler.levels(objective.spacing)
        if problems := self._problems():
            raise ValueError("Diffusion: " + " ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        width = getattr(self.network, "condition_width", 0)
        if width != self.conditions.width:
            problems.append(
                f"condition_width of the network is {width}, but conditions {list(self.conditions.names)} need "
                f"{self.conditions.width}."
            )
        if not 0 <= self.condition_dropout < 1:
            problems.append(f"condition_dropout must be from 0 to below 1, but is {self.condition_dropout}.")
        if self.guidance != 1 and not (self.conditions.width and self.condition_dropout):
            problems.append(f"guidance of {self.guidance} needs conditions and condition_dropout above 0.")
        if self.autoencoder is not None:
            channels = getattr(self.network, "img_channels", None)
            if channels != self.autoencoder.latent_channels:
                problems.append(
                    f"The network makes {channels} channels, but the latents of {self.autoencoder_path} have "
                    f"{self.autoencoder.latent_channels}."
                )
            if self.label_levels != list(LABEL_LEVELS):
                problems.append("label_levels belong to images, but the autoencoder knows classes: leave them out.")
        if self.micro_batches < 1:
            problems.append(f"micro_batches must be at least 1, but is {self.micro_batches}.")
        if self.sampler.steps > STEPS_PER_IMAGE:
            problems.append(f"A sampler makes at most {STEPS_PER_IMAGE} steps, but {self.sampler.steps} are asked for.")
        return problems

    @property
    def sampled_network(self) -> nn.Module:
        """The network."""
        return self.network

    def setup(self, stage: str) -> None:
        """Compare the channels of the autoencoder with those of the data."""
        super().setup(stage)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.autoencoder is not None and datamodule is not None:
            self.autoencoder.check_channels(datamodule.channels)

    def configure_optimizers(self) -> AdamW:
        """Give AdamW over the network alone: an autoencoder stays as it is."""
        return AdamW(
            self.network.parameters(), lr=self.learning_rate, betas=self.adam_betas, weight_decay=self.weight_decay
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Take one step on a batch.

        Args:
            batch: slices uint8 (N, 5, H, W), position int64 (N,), height float (N,).
            batch_idx: unused.
        """
        optimizer: Any = self.optimizers()
        self.set_learning_rate(self.learning_rate * min(1.0, (self.images_seen + 1) / max(self.rampup_kimg * 1000, 1)))
        # Dropout is all that draws from PyTorch's own generator.
        torch.manual_seed((self.seed << 32) + self.images_seen + self.global_rank)
        samples = self.samples(batch)
        optimizer.zero_grad()
        self.backward_in_parts(self.loss, samples, self.micro_batches)
        optimizer.step()
        self.advance(len(samples))

    def loss(self, samples: Samples) -> Tensor:
        """Give the mean loss of samples, each at a random time."""
        position, images = samples.position, samples.images
        if self.autoencoder is not None:
            images = self.autoencoder.encode(images)
        condition = samples.condition
        if condition is not None:
            chance = random_uniform(self.seed, Stream.CONDITION_DROPOUT, position, 4)[:, :1]
            condition = condition * (chance >= self.condition_dropout)
        uniform = random_uniform(self.seed, Stream.DIFFUSION_TIME, position, 4)[:, 0]
        noise = random_normal(self.seed, Stream.DIFFUSION_NOISE, position, images.shape[1:])
        losses = self.objective.losses(self.network, images, condition, uniform, noise)
        if losses.step is not None:
            self.objective.observe(self.over_ranks(losses.step), self.over_ranks(losses.loss.detach()))
        self.log_mean("loss/diffusion", losses.loss)
        return (losses.loss if losses.weight is None else losses.loss * losses.weight).mean()

    @torch.no_grad()
    def losses_of(self, slices: Tensor, index: Tensor, height: Tensor, draws: int, seed: int) -> Tensor:
        """Give the mean loss of each slice over evenly spaced times: what a membership attack looks at.

        Carlini et al. 2023, "Extracting training data from diffusion models" (USENIX Security, arXiv 2301.13188),
        section 5.2. The network is the averaged one, without dropout; time and noise follow from (seed, index, draw).

        Args:
            slices: uint8 (N, 5, H, W).
            index: int64 (N,), names the noise of every slice.
            height: (N,), 0 to 1 in the volume, for conditions.
            draws: times of each slice.
            seed: of the noise.

        Returns:
            float32 (N,).
        """
        network: Any = self.network if self.ema_network is None else self.ema_network
        images = slices_to_images(slices, self.label_levels)
        if self.autoencoder is not None:
            images = self.autoencoder.encode(images)
        condition = None
        if self.conditions.width:
            condition = self.conditions.vectors(self.conditions.of(slices, height))
        total = torch.zeros(len(slices), device=images.device)
        for draw in range(draws):
            uniform = torch.full_like(total, (draw + 0.5) / draws)
            noise = random_normal(seed, Stream.MEMBERSHIP, index * draws + draw, images.shape[1:])
            total += self.objective.losses(network, images, condition, uniform, noise).loss.float()
        return total / draws

    def generate(self, index: Tensor, seed: int) -> Tensor:
        """Image i from `(seed, i)`: start, noise of every step and condition from a counter-based generator."""
        return self._sample(index, seed, self.levels)

    @property
    def evaluations_per_image(self) -> int:
        """Those of the sampler; guidance doubles them."""
        guided = bool(self.conditions.width) and self.guidance != 1
        return self.sampler.evaluations(self.sampler.steps) * (1 + guided)

    def try_out(self, index: Tensor) -> None:
        """Take two steps."""
        self._sample(index, 0, [*self.levels[:2], CLEAN] if len(self.levels) > 2 else self.levels)

    def _sample(self, index: Tensor, seed: int, levels: Sequence[Level]) -> Tensor:
        network: Any = self.network if self.ema_network is None else self.ema_network
        shape = (network.img_channels, network.img_resolution, network.img_resolution)
        # Where the image is not scaled down on the way, the noise is as large as the noisiest level says.
        x = random_normal(seed, Stream.EMISSION_LATENT, index, shape) * max(1.0, levels[0].sigma)

        def noise(step: int) -> Tensor:
            return random_normal(seed, Stream.EMISSION_NOISE, index * STEPS_PER_IMAGE + step, shape)

        condition = self.conditions.draw(index, seed)
        denoise = self.objective.denoiser(network, condition)
        if condition is not None and self.guidance != 1:
            denoise = guided(denoise, self.objective.denoiser(network, torch.zeros_like(condition)), self.guidance)
        images = self.sampler(clipped(denoise) if self.clip else denoise, levels, x, noise)
        return images if self.autoencoder is None else self.autoencoder.decode(images)
