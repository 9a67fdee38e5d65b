"""Progressive GAN: the training rule.

Karras, Aila, Laine, Lehtinen 2018, "Progressive Growing of GANs for Improved Quality, Stability, and Variation" (ICLR,
arXiv 1710.10196): growing (section 2), WGAN-GP loss (Gulrajani et al. 2017, arXiv 1704.00028) with a drift term
(appendix A.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.ada import AdaptiveAugmentation
from lightning_modules.adversarial import AdversarialGenerator, Phase
from lightning_modules.counter_random import Stream, random_normal, random_uniform
from lightning_modules.growing import GrowingSchedule
from lightning_modules.image_generator import LABEL_LEVELS, Samples
from lightning_modules.losses import (
    gradient_penalty,
    wasserstein_discriminator_loss,
    wasserstein_drift,
    wasserstein_generator_loss,
)
from lightning_modules.networks.progressive_gan import ProgressiveGenerator


class ProgressiveGAN(AdversarialGenerator):
    """Progressive GAN on slices of named channels.

    Args:
        generator: latent code to image.
        discriminator: image to score.
        growing: resolution, minibatch and learning rate as functions of the images seen.
        adam_betas: decay rates of both Adams.
        penalty_weight: weight of the gradient penalty.
        penalty_target: norm of the gradient that the penalty asks for.
        drift_weight: weight of the squared scores of real images.
        augmentation: what the discriminator sees images through, for small data sets.
        mirror: show real images and their left-right mirror images alike; changes the anatomy, off by default.
        micro_batches: parts of a batch whose gradients are averaged, to save memory.
        seed: latents of training follow from it and the clock.
        init_from: checkpoint, of a run or imported, whose networks training starts from.
        label_levels: grey levels (0 to 255) of the classes in training images; the paper's are 0, 51, 102, 204.
    """

    generator: ProgressiveGenerator

    def __init__(
        self,
        generator: ProgressiveGenerator,
        discriminator: nn.Module,
        growing: GrowingSchedule,
        adam_betas: tuple[float, float] = (0.0, 0.99),
        penalty_weight: float = 10.0,
        penalty_target: float = 1.0,
        drift_weight: float = 0.001,
        augmentation: AdaptiveAugmentation | None = None,
        mirror: bool = False,
        micro_batches: int = 1,
        seed: int = 0,
        init_from: str | None = None,
        label_levels: Sequence[float] = LABEL_LEVELS,
    ) -> None:
        super().__init__(
            generator,
            discriminator,
            growing.learning_rate(0),
            growing.learning_rate(0),
            adam_betas,
            growing=growing,
            augmentation=augmentation,
            mirror=mirror,
            micro_batches=micro_batches,
            seed=seed,
            init_from=init_from,
            label_levels=label_levels,
        )
        self.save_hyperparameters()
        if generator.label_size:
            raise ValueError("The progressive GAN is trained without classes: leave out label_size of its networks.")
        self.penalty_weight = penalty_weight
        self.penalty_target = penalty_target
        self.drift_weight = drift_weight

    def phases(self) -> Sequence[Phase]:
        """Discriminator, generator: the order of the original."""
        return [
            Phase("discriminator", "discriminator", self.discriminator_loss),
            Phase("generator", "generator", self.generator_loss),
        ]

    def _fakes(self, position: Tensor, draw: int) -> Tensor:
        z = random_normal(self.seed, Stream.LATENT, position * 8 + draw, (self.generator.z_dim,))
        images: Tensor = self.generator(z)
        return images

    def generator_loss(self, samples: Samples) -> Tensor:
        """Negative score of new fakes."""
        scores = self.judge(self._fakes(samples.position, 0), samples, 0)
        loss = wasserstein_generator_loss(scores)
        self.log_mean("score/fake", scores)
        self.log_mean("loss/generator", loss)
        return loss

    def discriminator_loss(self, samples: Samples) -> Tensor:
        """Wasserstein distance between new fakes and the real images, gradient penalty between them, and drift."""
        with torch.no_grad():
            fake = self._fakes(samples.position, 2)
        fake_scores, real_scores = self.judge(fake, samples, 2), self.judge_real(samples.images, samples, 3)
        share = random_uniform(self.seed, Stream.GRADIENT_PENALTY, samples.position, 4)[:, :1, None, None]
        mixed = samples.images.lerp(fake, share).requires_grad_(True)
        penalty = gradient_penalty(mixed, self.judge(mixed, samples, 4), self.penalty_target)
        loss = wasserstein_discriminator_loss(real_scores, fake_scores)
        self.log_mean("loss/discriminator", loss)
        self.log_mean("loss/gradient_penalty", penalty)
        return loss + penalty.mean() * self.penalty_weight + wasserstein_drift(real_scores).mean() * self.drift_weight

    def generate(self, index: Tensor, seed: int) -> Tensor:
        """Image i from `(seed, i)`: latent from a counter-based generator."""
        network = self.generator if self.ema_network is None else self.ema_network
        images: Tensor = network(random_normal(seed, Stream.EMISSION_LATENT, index, (self.generator.z_dim,)))
        return images
