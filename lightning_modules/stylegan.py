"""StyleGAN 2: the training rule.

Karras, Laine, Aittala, Hellsten, Lehtinen, Aila 2020, "Analyzing and Improving the Image Quality of StyleGAN" (CVPR,
arXiv 1912.04958): non-saturating logistic loss, lazy R1 (Mescheder et al. 2018), path length regularization (section
3.2), style mixing (Karras et al. 2019, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.adversarial import AdversarialGenerator, Phase
from lightning_modules.counter_random import Stream, random_normal, random_uniform, random_words
from lightning_modules.losses import (
    discriminator_logistic_loss,
    generator_nonsaturating_loss,
    path_lengths,
    r1_penalty,
)
from lightning_modules.networks.stylegan2 import StyleGAN2Generator

LEFT_RIGHT_AXIS = -2


class StyleGAN2(AdversarialGenerator):
    """StyleGAN 2 on slices of named channels.

    Args:
        generator: mapping and synthesis network.
        discriminator: image to logit.
        generator_lr: learning rate of the generator.
        discriminator_lr: learning rate of the discriminator.
        adam_betas: decay rates of both Adams.
        r1_gamma: weight of the R1 penalty; the loss term is gamma / 2 times the squared gradient norm.
        r1_interval: R1 every that many iterations.
        path_length_weight: weight of the path length penalty; 0 turns it off.
        path_length_interval: path length every that many iterations.
        path_length_decay: decay of the moving mean of the path length.
        path_length_batch_shrink: only that fraction (1 / n) of the batch enters the path length.
        style_mixing_probability: how many samples use a second latent code from a random layer on.
        w_avg_decay: decay of the mean of w that truncation leads to.
        mirror: show real images and their left-right mirror images alike; changes the anatomy, off by default.
        truncation_psi: truncation of emitted images; 1 is none.
        micro_batches: parts of a batch whose gradients are averaged, to save memory.
        seed: latents and noise of training follow from it and the clock.
    """

    generator: StyleGAN2Generator
    path_length_mean: Tensor

    def __init__(
        self,
        generator: StyleGAN2Generator,
        discriminator: nn.Module,
        generator_lr: float = 0.002,
        discriminator_lr: float = 0.002,
        adam_betas: tuple[float, float] = (0.0, 0.99),
        r1_gamma: float = 10.0,
        r1_interval: int = 16,
        path_length_weight: float = 2.0,
        path_length_interval: int = 4,
        path_length_decay: float = 0.01,
        path_length_batch_shrink: int = 2,
        style_mixing_probability: float = 0.9,
        w_avg_decay: float = 0.998,
        mirror: bool = False,
        truncation_psi: float = 1.0,
        micro_batches: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            generator, discriminator, generator_lr, discriminator_lr, adam_betas, micro_batches=micro_batches, seed=seed
        )
        self.save_hyperparameters()
        self.r1_gamma = r1_gamma
        self.r1_interval = r1_interval
        self.path_length_weight = path_length_weight
        self.path_length_interval = path_length_interval
        self.path_length_decay = path_length_decay
        self.path_length_batch_shrink = path_length_batch_shrink
        self.style_mixing_probability = style_mixing_probability
        self.w_avg_decay = w_avg_decay
        self.mirror = mirror
        self.truncation_psi = truncation_psi
        self.register_buffer("path_length_mean", torch.zeros([]))

    def phases(self) -> Sequence[Phase]:
        """Generator, its path length, discriminator, its R1: the order of the original."""
        phases = [Phase("generator", "generator", self.generator_loss)]
        if self.path_length_weight > 0:
            phases.append(Phase("path_length", "generator", self.path_length_loss, self.path_length_interval))
        phases.append(Phase("discriminator", "discriminator", self.discriminator_loss))
        if self.r1_gamma > 0:
            phases.append(Phase("r1", "discriminator", self.r1_loss, self.r1_interval))
        return phases

    # Every phase draws latents of its own, so that the two networks do not see the same images twice.

    def latents(self, position: Tensor, draw: int) -> Tensor:
        """Latent codes of the samples at these positions: (N, z_dim); `draw` tells the draws of a sample apart."""
        return random_normal(self.seed, Stream.LATENT, position * 8 + draw, (self.generator.z_dim,))

    def noise(self, position: Tensor, draw: int) -> list[Tensor]:
        """Per-layer noise images of the samples at these positions: list of (N, 1, H, W)."""
        return split_noise(self.generator, self.seed, Stream.NOISE, position * 8 + draw)

    def path_direction(self, position: Tensor, shape: Sequence[int]) -> Tensor:
        """Unit-variance noise in image space that the Jacobian is projected on: (N, *shape)."""
        return random_normal(self.seed, Stream.PATH_LENGTH, position, shape)

    def mixed_styles(self, position: Tensor, draw: int) -> Tensor:
        """Mapped latents, some with another sample's styles from a random layer on: (N, num_ws, w_dim)."""
        ws: Tensor = self.generator.mapping(self.latents(position, draw))
        if self.style_mixing_probability > 0:
            others = self.generator.mapping(self.latents(position, draw + 4))
            layer = torch.arange(ws.shape[1], device=ws.device)
            words = random_words(self.seed, Stream.STYLE_MIXING, position * 8 + draw, 2)
            cutoff = 1 + words[:, 0] % (ws.shape[1] - 1)
            chance = random_uniform(self.seed, Stream.STYLE_MIXING, position * 8 + draw, 4)[:, 3]
            swapped = (layer >= cutoff[:, None]) & (chance < self.style_mixing_probability)[:, None]
            ws = torch.where(swapped[..., None], others, ws)
        return ws

    def generator_loss(self, real: Tensor, position: Tensor) -> Tensor:
        """Non-saturating loss of new fakes."""
        fake = self.generator.synthesis(self.mixed_styles(position, 0), noise=self.noise(position, 0))
        logits = self.discriminator(fake)
        loss = generator_nonsaturating_loss(logits)
        self.log_mean("score/fake", logits)
        self.log_mean("loss/generator", loss)
        return loss

    def path_length_loss(self, real: Tensor, position: Tensor) -> Tensor:
        """Squared deviation of the path length from its moving mean, on a part of the batch."""
        position = position[: max(1, len(position) // self.path_length_batch_shrink)]
        ws = self.mixed_styles(position, 1)
        images = self.generator.synthesis(ws, noise=self.noise(position, 1))
        lengths = path_lengths(images, ws, self.path_direction(position, images.shape[1:]))
        mean = self.path_length_mean.lerp(self.mean_over_ranks(lengths), self.path_length_decay)
        self.path_length_mean.copy_(mean.detach())
        penalty = (lengths - mean).square()
        self.log_mean("loss/path_length", penalty)
        return penalty.mean() * self.path_length_weight

    def discriminator_loss(self, real: Tensor, position: Tensor) -> Tensor:
        """Logistic loss of new fakes and of the real images; also updates the mean of w."""
        with torch.no_grad():
            ws = self.mixed_styles(position, 2)
            self.generator.update_w_avg(self.mean_over_ranks(ws[:, 0]), self.w_avg_decay)
            fake = self.generator.synthesis(ws, noise=self.noise(position, 2))
        fake_logits, real_logits = self.discriminator(fake), self.discriminator(self._shown(real, position))
        loss = discriminator_logistic_loss(real_logits, fake_logits)
        self.log_mean("score/real", real_logits)
        self.log_mean("loss/discriminator", loss)
        return loss

    def r1_loss(self, real: Tensor, position: Tensor) -> Tensor:
        """R1 penalty on the real images."""
        real = self._shown(real, position).detach().requires_grad_(True)
        penalty = r1_penalty(real, self.discriminator(real))
        self.log_mean("loss/r1", penalty)
        return penalty.mean() * (self.r1_gamma / 2)

    def _shown(self, real: Tensor, position: Tensor) -> Tensor:
        if not self.mirror:
            return real
        flipped = random_uniform(self.seed, Stream.MIRROR, position, 4)[:, 0] < 0.5
        return torch.where(flipped[:, None, None, None], real.flip(LEFT_RIGHT_AXIS), real)

    def generate(self, index: Tensor, seed: int) -> Tensor:
        """Image i from `(seed, i)`: latent and noise images from a counter-based generator."""
        network = self.generator if self.ema_network is None else self.ema_network
        z = random_normal(seed, Stream.EMISSION_LATENT, index, (self.generator.z_dim,))
        noise = split_noise(self.generator, seed, Stream.EMISSION_NOISE, index)
        images: Tensor = network(z, truncation_psi=self.truncation_psi, noise=noise)
        return images


def split_noise(generator: StyleGAN2Generator, seed: int, stream: Stream, index: Tensor) -> list[Tensor]:
    """Noise images of all layers for these samples: list of (N, 1, H, W)."""
    sizes = [height * width for height, width in generator.noise_shapes]
    flat = random_normal(seed, stream, index, (sum(sizes),))
    shapes = generator.noise_shapes
    return [part.reshape(-1, 1, *shape) for part, shape in zip(torch.split(flat, sizes, dim=1), shapes, strict=True)]
