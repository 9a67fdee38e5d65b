"""An autoencoder of slices, in whose latents a diffusion model works.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR, arXiv 2112.10752), section
3.1 and appendix G; Pinaya et al. 2022, "Brain Imaging Generation with Latent Diffusion Models" (arXiv 2209.07162). The
network is MONAI's, without attention: a part of a latent image says what is in that part of the slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets.autoencoderkl import AutoencoderKL
from torch import Tensor
from torch.optim import Adam

from lightning_modules.base import ImageClockModule
from lightning_modules.counter_random import Stream, random_normal
from lightning_modules.image_generator import LABEL_LEVELS, N_CLASSES, images_to_slices, slices_to_images
from lightning_modules.power_ema import decay, exponent

N_MODALITIES = 4
STATISTICS_EXPONENT = exponent(0.05)
"""The statistics of the latents are those of about the last twentieth of the training."""


class Autoencoder(ImageClockModule):
    """Compress slices of 4 modalities and a label to latents, and restore them.

    The label goes in as one channel per class and comes out as one logit per class: as a grey level, the edge between
    background and enhancing tumour would pass through core and oedema, and an error of a few grey levels would be
    another class. Modalities are restored by L1 alone, without the perceptual and adversarial losses of Rombach et al.:
    what is restored is what was measured, if less sharp.

    Args:
        widths: feature channels at every resolution, the full one first; each next one has half the resolution.
        res_blocks: residual blocks at every resolution.
        latent_channels: channels of the latents, which have the lowest resolution.
        norm_groups: groups of the normalizations; divides all widths.
        label_weight: of the cross-entropy of the label, in nats per pixel; the modalities' mean absolute difference, of
            values in [-1, 1], has weight 1.
        kl_weight: of the divergence of the posterior from a standard normal, in nats per latent value.
        learning_rate: of Adam at the start; falls linearly to 0 at the end of training, where the latents then stand
            still and their statistics are right.
        seed: noise of the posterior in training follows from it and the position of the sample.
    """

    latent_moments: Tensor

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256),
        res_blocks: int = 2,
        latent_channels: int = 4,
        norm_groups: int = 32,
        label_weight: float = 1.0,
        kl_weight: float = 1e-4,
        learning_rate: float = 3e-4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = AutoencoderKL(
            spatial_dims=2,
            in_channels=N_MODALITIES + N_CLASSES,
            out_channels=N_MODALITIES + N_CLASSES,
            num_res_blocks=res_blocks,
            channels=widths,
            attention_levels=[False] * len(widths),
            latent_channels=latent_channels,
            norm_num_groups=norm_groups,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
        self.downsampling = 2 ** (len(widths) - 1)
        self.latent_channels = latent_channels
        self.label_weight = label_weight
        self.kl_weight = kl_weight
        self.learning_rate = learning_rate
        self.seed = seed
        self.channels: list[str] = []
        # Means of the latents and of their squares.
        moments = torch.stack([torch.zeros(latent_channels), torch.ones(latent_channels)])
        self.register_buffer("latent_moments", moments)

    def configure_optimizers(self) -> Adam:
        """Adam."""
        return Adam(self.network.parameters(), lr=self.learning_rate)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Set the learning rate for this position of the clock."""
        self.set_learning_rate(self.learning_rate * (1.0 - self.progress))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Give the latents of images, normalised: those of training slices have mean 0 and variance 1 per channel.

        Args:
            images: float (N, 5, H, W) in [-1, 1], the label in the evenly spaced grey levels `LABEL_LEVELS`; H and W
                are multiples of `downsampling`.
            noise: standard normal (N, latent_channels, H / downsampling, W / downsampling) to draw from the posterior;
                None gives its mean.

        Returns:
            float (N, latent_channels, H / downsampling, W / downsampling).

        Raises:
            ValueError: if the size cannot be halved that often.
        """
        mean, std = self.posterior(images)
        latents = mean if noise is None else mean + std * noise
        shift, scale = self._shift_and_scale()
        return (latents - shift) / scale

    def decode(self, latents: Tensor) -> Tensor:
        """Give the images of normalised latents.

        Args:
            latents: float (N, latent_channels, h, w).

        Returns:
            float (N, 5, H, W) in [-1, 1]; the label is the grey level of the most likely class.
        """
        shift, scale = self._shift_and_scale()
        modalities, logits = self.restore(latents * scale + shift)
        levels = torch.tensor(LABEL_LEVELS, device=latents.device) / 127.5 - 1.0
        return torch.cat([modalities.clamp(-1.0, 1.0), levels[logits.argmax(dim=1, keepdim=True)]], dim=1)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and standard deviation of the latents, not normalised: (N, latent_channels, h, w) each."""
        if any(size % self.downsampling for size in images.shape[2:]):
            raise ValueError(
                f"Expected images whose sides are multiples of {self.downsampling}, as the autoencoder halves them "
                f"{self.downsampling.bit_length() - 1} times, but got {images.shape[2]} x {images.shape[3]} px."
            )
        classes = images_to_slices(images)[:, -1].long()
        channels = F.one_hot(classes, N_CLASSES).movedim(-1, 1).to(images.dtype)  # (N, classes, H, W)
        mean, std = self.network.encode(torch.cat([images[:, :-1], channels], dim=1))
        return mean.float(), std.float()

    def restore(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Give modalities (N, 4, H, W) and logits of the classes (N, 4, H, W) of latents, not normalised."""
        restored: Tensor = self.network.decode(latents).float()
        return restored[:, :N_MODALITIES], restored[:, N_MODALITIES:]

    def _shift_and_scale(self) -> tuple[Tensor, Tensor]:
        mean, square = self.latent_moments[:, :, None, None]  # (latent_channels, 1, 1) each
        return mean, (square - mean.square()).sqrt()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Restore slices from latents drawn from their posterior.

        Args:
            batch: slices uint8 (N, 5, H, W), position int64 (N,).
            batch_idx: unused.
        """
        images = slices_to_images(batch["slices"])
        mean, std = self.posterior(images)
        latents = mean + std * random_normal(self.seed, Stream.AUTOENCODER, batch["position"], mean.shape[1:])
        modalities, logits = self.restore(latents)
        absolute = (modalities - images[:, :-1]).abs().mean()
        entropy = F.cross_entropy(logits, batch["slices"][:, -1].long())
        divergence = kl_divergence(mean, std).mean()
        self.log_mean("loss/modalities", absolute)
        self.log_mean("loss/label", entropy)
        self.log_mean("loss/kl", divergence)
        self._track(latents.detach())
        self.advance(len(images))
        return absolute + self.label_weight * entropy + self.kl_weight * divergence

    def _track(self, latents: Tensor) -> None:
        """Move the moments of the latents towards those of this batch of all processes."""
        moments = torch.stack([latents.mean(dim=(2, 3)), latents.square().mean(dim=(2, 3))], dim=1)  # (N, 2, channels)
        seen = self.images_seen + len(latents) * self.trainer.world_size
        kept = decay(STATISTICS_EXPONENT, self.images_seen, seen)
        self.latent_moments.copy_(self.mean_over_ranks(moments).lerp(self.latent_moments, kept))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Restore slices from the means of their posteriors: float (N, 5, H, W) in [-1, 1]; N may be 0."""
        images = slices_to_images(batch["slices"])
        return self.decode(self.encode(images)) if len(images) else images

    test_step = validation_step

    def setup(self, stage: str) -> None:
        """Learn the names of the channels."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.channels = list(datamodule.channels)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the channels of the slices."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["channels"] = self.channels

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the names of the channels."""
        super().on_load_checkpoint(checkpoint)
        self.channels = checkpoint["channels"]

    def check_channels(self, channels: Sequence[str]) -> None:
        """Refuse slices of other channels than those of the training, or in another order.

        Raises:
            ValueError: saying which.
        """
        if list(channels) != self.channels:
            raise ValueError(
                f"The autoencoder was trained on the channels {', '.join(self.channels)}, but the data has "
                f"{', '.join(channels)}. Train one on this data."
            )


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """Divergence of normal distributions from the standard one, in nats (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + std.square() - 1.0) - std.log()
