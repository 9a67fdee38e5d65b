"""StyleGAN 2 and 3: the training rules.

Karras, Laine, Aittala, Hellsten, Lehtinen, Aila 2020, "Analyzing and Improving the Image Quality of StyleGAN" (CVPR,
arXiv 1912.04958): non-saturating logistic loss, lazy R1 (Mescheder et al. 2018), path length regularization (section
3.2), style mixing (Karras et al. 2019, section 3.1). Karras, Aittala, Laine, Härkönen, Hellsten, Lehtinen, Aila 2021,
"Alias-Free Generative Adversarial Networks" (StyleGAN 3, NeurIPS, arXiv 2106.12423).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.ada import AdaptiveAugmentation
from lightning_modules.adversarial import AdversarialGenerator, Phase
from lightning_modules.counter_random import Stream, random_normal, random_uniform, random_words
from lightning_modules.growing import GrowingSchedule
from lightning_modules.image_generator import LABEL_LEVELS, Samples
from lightning_modules.losses import (
    discriminator_logistic_loss,
    generator_nonsaturating_loss,
    path_lengths,
    r1_penalty,
)
from lightning_modules.networks.operators import filter2d
from lightning_modules.networks.stylegan1 import StyleGAN1Generator
from lightning_modules.networks.stylegan2 import StyleGAN2Generator
from lightning_modules.networks.stylegan3 import StyleGAN3Generator

StyleBasedGenerator = StyleGAN1Generator | StyleGAN2Generator | StyleGAN3Generator


class StyleGAN(AdversarialGenerator):
    """What the three style-based models share: latents, styles, noise and the emission of images.

    Args:
        generator: mapping and synthesis network.
        discriminator: image to logit.
        generator_lr: learning rate of the generator.
        discriminator_lr: learning rate of the discriminator.
        adam_betas: decay rates of both Adams.
        r1_gamma: weight of the R1 penalty; the loss term is gamma / 2 times the squared gradient norm.
        style_mixing_probability: how many samples use a second latent code from a random layer on.
        w_avg_decay: decay of the mean of w that truncation leads to.
        truncation_psi: truncation of emitted images; 1 is none.
        truncation_cutoff: number of layers that are truncated; None is all.
        growing: schedule of progressive growing.
        augmentation: what the discriminator sees images through.
        mirror: show real images and their left-right mirror images alike.
        micro_batches: parts of a batch whose gradients are averaged, to save memory.
        seed: latents and noise of training follow from it and the clock.
        init_from: checkpoint whose networks training starts from.
        label_levels: grey levels (0 to 255) of the classes in training images; the paper's are 0, 51, 102, 204.
    """

    generator: StyleBasedGenerator

    def __init__(
        self,
        generator: StyleBasedGenerator,
        discriminator: nn.Module,
        generator_lr: float,
        discriminator_lr: float,
        adam_betas: tuple[float, float],
        r1_gamma: float,
        style_mixing_probability: float,
        w_avg_decay: float,
        truncation_psi: float,
        truncation_cutoff: int | None,
        growing: GrowingSchedule | None,
        augmentation: AdaptiveAugmentation | None,
        mirror: bool,
        micro_batches: int,
        seed: int,
        init_from: str | None,
        label_levels: Sequence[float],
    ) -> None:
        super().__init__(
            generator,
            discriminator,
            generator_lr,
            discriminator_lr,
            adam_betas,
            growing=growing,
            augmentation=augmentation,
            mirror=mirror,
            micro_batches=micro_batches,
            seed=seed,
            init_from=init_from,
            label_levels=label_levels,
        )
        self.r1_gamma = r1_gamma
        self.style_mixing_probability = style_mixing_probability
        self.w_avg_decay = w_avg_decay
        self.truncation_psi = truncation_psi
        self.truncation_cutoff = truncation_cutoff

    # Every phase draws latents of its own, so that the two networks do not see the same images twice.

    def latents(self, position: Tensor, draw: int) -> Tensor:
        """Latent codes of the samples at these positions: (N, z_dim); `draw` tells the draws of a sample apart."""
        return random_normal(self.seed, Stream.LATENT, position * 8 + draw, (self.generator.z_dim,))

    def noise(self, position: Tensor, draw: int) -> list[Tensor]:
        """Per-layer noise images of the samples at these positions: list of (N, 1, H, W)."""
        return split_noise(self.generator.noise_shapes, self.seed, Stream.NOISE, position * 8 + draw)

    def layers_in_use(self) -> int:
        """How many of the layers, counted from the lowest, the images go through."""
        return self.generator.num_ws

    def mixed_styles(self, samples: Samples, draw: int) -> Tensor:
        """Mapped latents, some with another sample's styles from a random layer on: (N, num_ws, w_dim)."""
        ws: Tensor = self.generator.mapping(self.latents(samples.position, draw), samples.condition)
        if self.style_mixing_probability > 0:
            others = self.generator.mapping(self.latents(samples.position, draw + 4), samples.condition)
            layer = torch.arange(ws.shape[1], device=ws.device)
            index = samples.position * 8 + draw
            words = random_words(self.seed, Stream.STYLE_MIXING, index, 2)
            cutoff = 1 + words[:, 0] % (self.layers_in_use() - 1)
            chance = random_uniform(self.seed, Stream.STYLE_MIXING, index, 4)[:, 3]
            swapped = (layer >= cutoff[:, None]) & (chance < self.style_mixing_probability)[:, None]
            ws = torch.where(swapped[..., None], others, ws)
        return ws

    def synthesize(self, ws: Tensor, samples: Samples, draw: int) -> Tensor:
        """Images (N, C, H, W) of styles (N, num_ws, w_dim)."""
        images: Tensor = self.generator.synthesis(ws, noise=self.noise(samples.position, draw))
        return images

    def update_w_avg(self, ws: Tensor) -> None:
        """Move the mean of w towards that of these styles (N, num_ws, w_dim)."""
        decay = self.w_avg_decay ** (1 / self.micro_batches)
        with torch.no_grad():
            self.generator.update_w_avg(self.mean_over_ranks(ws[:, 0].detach()), decay)

    def generator_loss(self, samples: Samples) -> Tensor:
        """Non-saturating loss of new fakes."""
        return self.nonsaturating_loss(self.mixed_styles(samples, 0), samples)

    def nonsaturating_loss(self, ws: Tensor, samples: Samples) -> Tensor:
        """Non-saturating loss of the fakes with these styles (N, num_ws, w_dim)."""
        logits = self.judge(self.synthesize(ws, samples, 0), samples, 0)
        loss = generator_nonsaturating_loss(logits)
        self.log_mean("score/fake", logits)
        self.log_mean("loss/generator", loss)
        return loss

    def generate(self, index: Tensor, seed: int) -> Tensor:
        """Image i from `(seed, i)`: latent and noise images from a counter-based generator."""
        network = self.generator if self.ema_network is None else self.ema_network
        z = random_normal(seed, Stream.EMISSION_LATENT, index, (self.generator.z_dim,))
        noise = split_noise(self.generator.noise_shapes, seed, Stream.EMISSION_NOISE, index)
        images: Tensor = network(
            z,
            self.conditions.draw(index, seed),
            truncation_psi=self.truncation_psi,
            truncation_cutoff=self.truncation_cutoff,
            noise=noise,
        )
        return images


class StyleGAN2(StyleGAN):
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
        truncation_psi: truncation of emitted images; 1 is none.
        truncation_cutoff: number of layers that are truncated; None is all.
        augmentation: what the discriminator sees images through, for small data sets.
        mirror: show real images and their left-right mirror images alike; changes the anatomy, off by default.
        micro_batches: parts of a batch whose gradients are averaged, to save memory.
        seed: latents and noise of training follow from it and the clock.
        init_from: checkpoint, of a run or imported, whose networks training starts from.
        label_levels: grey levels (0 to 255) of the classes in training images; the paper's are 0, 51, 102, 204.
    """

    path_length_mean: Tensor

    def __init__(
        self,
        generator: StyleGAN2Generator | StyleGAN3Generator,
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
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
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
            generator_lr,
            discriminator_lr,
            adam_betas,
            r1_gamma=r1_gamma,
            style_mixing_probability=style_mixing_probability,
            w_avg_decay=w_avg_decay,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            growing=None,
            augmentation=augmentation,
            mirror=mirror,
            micro_batches=micro_batches,
            seed=seed,
            init_from=init_from,
            label_levels=label_levels,
        )
        self.save_hyperparameters()
        self.r1_interval = r1_interval
        self.path_length_weight = path_length_weight
        self.path_length_interval = path_length_interval
        self.path_length_decay = path_length_decay
        self.path_length_batch_shrink = path_length_batch_shrink
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

    def path_direction(self, position: Tensor, shape: Sequence[int]) -> Tensor:
        """Unit-variance noise in image space that the Jacobian is projected on: (N, *shape)."""
        return random_normal(self.seed, Stream.PATH_LENGTH, position, shape)

    def path_length_loss(self, samples: Samples) -> Tensor:
        """Squared deviation of the path length from its moving mean, on a part of the batch."""
        samples = samples[: max(1, len(samples) // self.path_length_batch_shrink)]
        ws = self.mixed_styles(samples, 1)
        images = self.synthesize(ws, samples, 1)
        lengths = path_lengths(images, ws, self.path_direction(samples.position, images.shape[1:]))
        share = 1 - (1 - self.path_length_decay) ** (1 / self.micro_batches)
        mean = self.path_length_mean.lerp(self.mean_over_ranks(lengths), share)
        self.path_length_mean.copy_(mean.detach())
        penalty = (lengths - mean).square()
        self.log_mean("loss/path_length", penalty)
        return penalty.mean() * self.path_length_weight

    def fakes_to_judge(self, samples: Samples) -> Tensor:
        """New fakes for the discriminator, without gradient; updates the moving averages of the generator."""
        with torch.no_grad():
            ws = self.mixed_styles(samples, 2)
            self.update_w_avg(ws)
            return self.synthesize(ws, samples, 2)

    def discriminator_loss(self, samples: Samples) -> Tensor:
        """Logistic loss of new fakes and of the real images."""
        fake_logits = self.judge(self.fakes_to_judge(samples), samples, 2)
        loss = discriminator_logistic_loss(self.judge_real(samples.images, samples, 3), fake_logits)
        self.log_mean("loss/discriminator", loss)
        return loss

    def r1_loss(self, samples: Samples) -> Tensor:
        """R1 penalty on the real images, through the augmentation."""
        real = samples.images.detach().requires_grad_(True)
        penalty = r1_penalty(real, self.judge_real(real, samples, 4))
        self.log_mean("loss/r1", penalty)
        return penalty.mean() * (self.r1_gamma / 2)


class StyleGAN3(StyleGAN2):
    """StyleGAN 3 (configurations T and R) on slices of named channels: the rule of StyleGAN 2 with other defaults.

    There is no path length, no style mixing and no noise (section 3.2); the generator tracks the magnitudes of its
    activations; configuration R begins with images blurred for the discriminator (appendix G).

    Args:
        generator: mapping and synthesis network.
        discriminator: image to logit, as in StyleGAN 2.
        generator_lr: learning rate of the generator.
        discriminator_lr: learning rate of the discriminator.
        adam_betas: decay rates of both Adams.
        r1_gamma: weight of the R1 penalty.
        r1_interval: R1 every that many iterations.
        blur_sigma_px: standard deviation of the blur at the start: 0 for T, 10 for R.
        blur_fade_kimg: the blur shrinks linearly to nothing by then.
        w_avg_decay: decay of the mean of w that truncation leads to.
        truncation_psi: truncation of emitted images; 1 is none.
        truncation_cutoff: number of layers that are truncated; None is all.
        augmentation: what the discriminator sees images through, for small data sets.
        mirror: show real images and their left-right mirror images alike; changes the anatomy, off by default.
        micro_batches: parts of a batch whose gradients are averaged, to save memory.
        seed: latents of training follow from it and the clock.
        init_from: checkpoint, of a run or imported, whose networks training starts from.
        label_levels: grey levels (0 to 255) of the classes in training images; the paper's are 0, 51, 102, 204.
    """

    generator: StyleGAN3Generator

    def __init__(
        self,
        generator: StyleGAN3Generator,
        discriminator: nn.Module,
        generator_lr: float = 0.0025,
        discriminator_lr: float = 0.002,
        adam_betas: tuple[float, float] = (0.0, 0.99),
        r1_gamma: float = 2.0,
        r1_interval: int = 16,
        blur_sigma_px: float = 0.0,
        blur_fade_kimg: float = 200.0,
        w_avg_decay: float = 0.998,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
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
            generator_lr,
            discriminator_lr,
            adam_betas,
            r1_gamma=r1_gamma,
            r1_interval=r1_interval,
            path_length_weight=0.0,
            style_mixing_probability=0.0,
            w_avg_decay=w_avg_decay,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            augmentation=augmentation,
            mirror=mirror,
            micro_batches=micro_batches,
            seed=seed,
            init_from=init_from,
            label_levels=label_levels,
        )
        self.save_hyperparameters()
        if blur_fade_kimg <= 0:
            raise ValueError(f"Expected blur_fade_kimg to be positive, but got {blur_fade_kimg}; no blur is sigma 0.")
        self.blur_sigma_px = blur_sigma_px
        self.blur_fade_kimg = blur_fade_kimg

    def fakes_to_judge(self, samples: Samples) -> Tensor:
        """New fakes for the discriminator; tracks the mean of w and the magnitudes of the activations."""
        with torch.no_grad():
            ws = self.mixed_styles(samples, 2)
            self.update_w_avg(ws)
            images: Tensor = self.generator.synthesis(ws, update_emas=lambda mean: self.mean_over_ranks(mean[None]))
            return images

    def judge(self, images: Tensor, samples: Samples, draw: int) -> Tensor:
        """Logits of images that are blurred in early training: exp2(-(i / sigma)²) over a radius of 3 sigma."""
        sigma = max(1 - self.images_seen / (self.blur_fade_kimg * 1000), 0) * self.blur_sigma_px
        radius = math.floor(3 * sigma)
        if radius > 0:
            taps = torch.arange(-radius, radius + 1, device=images.device).div(sigma).square().neg().exp2()
            images = filter2d(images, taps / taps.sum())
        return super().judge(images, samples, draw)


def split_noise(shapes: Sequence[tuple[int, int]], seed: int, stream: Stream, index: Tensor) -> list[Tensor]:
    """Noise images (N, 1, H, W) of these shapes (H, W) for these samples."""
    if not shapes:
        return []
    sizes = [height * width for height, width in shapes]
    flat = random_normal(seed, stream, index, (sum(sizes),))
    return [part.reshape(-1, 1, *shape) for part, shape in zip(torch.split(flat, sizes, dim=1), shapes, strict=True)]
