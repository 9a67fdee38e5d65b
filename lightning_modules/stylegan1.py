"""StyleGAN 1: the training rule.

Karras, Laine, Aila 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks" (CVPR, arXiv
1812.04948): progressive growing, non-saturating logistic loss with R1 in every iteration (appendix C), style mixing
(section 3.1), truncation of the lower layers (appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.ada import AdaptiveAugmentation
from lightning_modules.adversarial import Phase
from lightning_modules.growing import GrowingSchedule
from lightning_modules.image_generator import LABEL_LEVELS, Samples
from lightning_modules.losses import discriminator_logistic_loss, r1_penalty
from lightning_modules.networks.stylegan1 import StyleGAN1Generator
from lightning_modules.stylegan import StyleGAN


class StyleGAN1(StyleGAN):
    """StyleGAN 1 on slices of named channels.

    Args:
        generator: mapping and synthesis network.
        discriminator: image to logit.
        growing: resolution, minibatch and learning rate as functions of the images seen.
        adam_betas: decay rates of both Adams.
        r1_gamma: weight of the R1 penalty, in every iteration; the loss term is gamma / 2 times the squared gradient.
        style_mixing_probability: how many samples use a second latent code from a random layer on.
        w_avg_decay: decay of the mean of w that truncation leads to.
        truncation_psi: truncation of emitted images; 1 is none. The paper samples with 0.7.
        truncation_cutoff: number of layers that are truncated; None is all.
        augmentation: what the discriminator sees images through, for small data sets.
        mirror: show real images and their left-right mirror images alike; changes the anatomy, off by default.
        micro_batches: parts of a batch whose gradients are averaged, to save memory.
        seed: latents and noise of training follow from it and the clock.
        init_from: checkpoint, of a run or imported, whose networks training starts from.
        label_levels: grey levels (0 to 255) of the classes in training images; the paper's are 0, 51, 102, 204.
    """

    generator: StyleGAN1Generator

    def __init__(
        self,
        generator: StyleGAN1Generator,
        discriminator: nn.Module,
        growing: GrowingSchedule,
        adam_betas: tuple[float, float] = (0.0, 0.99),
        r1_gamma: float = 10.0,
        style_mixing_probability: float = 0.9,
        w_avg_decay: float = 0.995,
        truncation_psi: float = 0.7,
        truncation_cutoff: int | None = 8,
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
            r1_gamma=r1_gamma,
            style_mixing_probability=style_mixing_probability,
            w_avg_decay=w_avg_decay,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            growing=growing,
            augmentation=augmentation,
            mirror=mirror,
            micro_batches=micro_batches,
            seed=seed,
            init_from=init_from,
            label_levels=label_levels,
        )
        self.save_hyperparameters()

    def phases(self) -> Sequence[Phase]:
        """Discriminator, generator: the order of the original."""
        return [
            Phase("discriminator", "discriminator", self.discriminator_loss),
            Phase("generator", "generator", self.generator_loss),
        ]

    def layers_in_use(self) -> int:
        """Two per resolution that has been reached."""
        return self.generator.num_ws - 2 * int(self.generator.lod)

    def generator_loss(self, samples: Samples) -> Tensor:
        """Non-saturating loss of new fakes; also updates the mean of w."""
        ws = self.mixed_styles(samples, 0)
        self.update_w_avg(ws)
        return self.nonsaturating_loss(ws, samples)

    def discriminator_loss(self, samples: Samples) -> Tensor:
        """Logistic loss of new fakes and of the real images, and R1; also updates the mean of w."""
        with torch.no_grad():
            ws = self.mixed_styles(samples, 2)
            self.update_w_avg(ws)
            fake = self.synthesize(ws, samples, 2)
        real = samples.images.detach().requires_grad_(True)
        real_logits = self.judge_real(real, samples, 3)
        penalty = r1_penalty(real, real_logits)
        loss = discriminator_logistic_loss(real_logits, self.judge(fake, samples, 2))
        self.log_mean("loss/discriminator", loss)
        self.log_mean("loss/r1", penalty)
        return loss + penalty.mean() * (self.r1_gamma / 2)
