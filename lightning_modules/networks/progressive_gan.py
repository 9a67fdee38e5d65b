"""Progressive GAN: generator and discriminator that grow.

Karras, Aila, Laine, Lehtinen 2018, "Progressive Growing of GANs for Improved Quality, Stability, and Variation" (ICLR,
arXiv 1710.10196), table 2; class labels by an auxiliary classifier (Odena et al. 2017, ICML, arXiv 1610.09585).

Images are float in about [-1, 1], (N, C, H, W), at full resolution for every level of detail.
"""

from typing import cast

import torch
from torch import Tensor, nn

from lightning_modules.networks.growing import (
    EqualizedConv,
    EqualizedDense,
    GrowingDiscriminator,
    GrowingGenerator,
    PixelNorm,
    check_latents,
)
from lightning_modules.networks.layers import SLOPE, SQRT2, fast_layout


class FirstBlock(nn.Module):
    """Latent code -> features at 4 px."""

    def __init__(self, in_features: int, out_channels: int, before: nn.Module, after: nn.Module, wscale: bool) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.Dense = EqualizedDense(in_features, out_channels * 4 * 4, gain=SQRT2 / 4, use_wscale=wscale, pixels=4 * 4)
        self.Conv = EqualizedConv(out_channels, out_channels, 3, use_wscale=wscale)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, C_out, 4, 4)."""
        x = self.Dense(self.before(x)).unflatten(1, (-1, 4, 4))
        x = self.after(fast_layout(x, x.dtype))
        return cast(Tensor, self.after(self.Conv(x)))


class Block(nn.Module):
    """Double the resolution: two 3×3 convolutions, each followed by `after`."""

    def __init__(self, in_channels: int, out_channels: int, after: nn.Module, wscale: bool) -> None:
        super().__init__()
        self.after = after
        self.Conv0 = EqualizedConv(in_channels, out_channels, 3, resample="up", use_wscale=wscale)
        self.Conv1 = EqualizedConv(out_channels, out_channels, 3, use_wscale=wscale)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, 2 H, 2 W)."""
        return cast(Tensor, self.after(self.Conv1(self.after(self.Conv0(x)))))


class ProgressiveGenerator(GrowingGenerator):
    """Latent code -> image, at a level of detail.

    Args:
        latent_size: Width of the latent code.
        img_resolution: Height and width in pixels, a power of two from 8.
        img_channels: Channels of the image.
        fmap_base: Channels are fmap_base / 2^(fmap_decay · (log2(resolution) - 1)), at most fmap_max.
        fmap_max: Largest number of channels of a layer.
        fmap_decay: See fmap_base.
        label_size: Number of classes; 0 for no labels.
        normalize_latents: Scale latent code and label together to unit mean square.
        use_pixelnorm: Normalize the feature vector of every pixel after every layer.
        pixelnorm_epsilon: Added to the mean square.
        use_leakyrelu: Leaky ReLU; otherwise ReLU.
        use_wscale: Equalized learning rate.

    Attributes:
        lod: Level of detail of the next images: 0 is full resolution, k a 2^k-th of it, a fraction between blends.
    """

    def __init__(
        self,
        latent_size: int = 512,
        img_resolution: int = 256,
        img_channels: int = 5,
        fmap_base: int = 8192,
        fmap_max: int = 512,
        fmap_decay: float = 1.0,
        label_size: int = 0,
        normalize_latents: bool = True,
        use_pixelnorm: bool = True,
        pixelnorm_epsilon: float = 1e-8,
        use_leakyrelu: bool = True,
        use_wscale: bool = True,
    ) -> None:
        super().__init__(img_resolution, img_channels, fmap_base, fmap_max, fmap_decay, use_wscale)
        fmaps = self.fmaps
        self.z_dim, self.label_size = latent_size, label_size
        after = nn.Sequential(nn.LeakyReLU(SLOPE, inplace=True) if use_leakyrelu else nn.ReLU(inplace=True))
        if use_pixelnorm:
            after.append(PixelNorm(pixelnorm_epsilon))
        before = PixelNorm(pixelnorm_epsilon) if normalize_latents else nn.Identity()
        self.add_module("4x4", FirstBlock(latent_size + label_size, fmaps[4], before, after, use_wscale))
        for r in self.resolutions[1:]:
            self.add_module(f"{r}x{r}", Block(fmaps[r // 2], fmaps[r], after, use_wscale))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Make images.

        Args:
            z: (N, latent_size), unit normal.
            labels: One-hot float (N, label_size); None for a network without classes.

        Returns:
            Images (N, img_channels, H, W), float32: pixels of the level in use are repeated.

        Raises:
            ValueError: If a shape is another, or there is no such level of detail.
        """
        check_latents(z, self.z_dim, labels, self.label_size)
        x = before = (z if labels is None else torch.cat([z, labels], 1)).float()
        for r in self.resolutions_in_use():
            before, x = x, self.get_submodule(f"{r}x{r}")(x)
        return self.images(x, before)


class ProgressiveDiscriminator(GrowingDiscriminator):
    """Image -> score, and logits of an auxiliary classifier.

    Args:
        img_resolution: Height and width in pixels, a power of two from 8.
        img_channels: Channels of the image.
        fmap_base: Channels are fmap_base / 2^(fmap_decay · (log2(resolution) - 1)), at most fmap_max.
        fmap_max: Largest number of channels of a layer.
        fmap_decay: See fmap_base.
        label_size: Number of classes that the auxiliary classifier tells apart; 0 for none.
        mbstd_group_size: Samples per group of the minibatch standard deviation; 0 or 1 leaves it out.
        fused_scale: Average to half the resolution before the activation (faster); otherwise after it.
        use_wscale: Equalized learning rate.

    Attributes:
        lod: Level of detail, as that of the generator.
    """

    def __init__(
        self,
        img_resolution: int = 256,
        img_channels: int = 5,
        fmap_base: int = 8192,
        fmap_max: int = 512,
        fmap_decay: float = 1.0,
        label_size: int = 0,
        mbstd_group_size: int = 4,
        fused_scale: bool = True,
        use_wscale: bool = True,
    ) -> None:
        super().__init__(
            img_resolution,
            img_channels,
            num_outputs=1 + label_size,
            fmap_base=fmap_base,
            fmap_max=fmap_max,
            fmap_decay=fmap_decay,
            mbstd_group_size=mbstd_group_size,
            mbstd_num_features=1,
            use_wscale=use_wscale,
            before_down=nn.Identity(),
            fused_scale=fused_scale,
        )

    def forward(self, images: Tensor) -> Tensor:
        """(N, img_channels, H, W) -> scores (N, 1)."""
        return self.outputs(images)[:, :1]

    def scores_and_labels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, img_channels, H, W) -> scores (N, 1) and label logits (N, label_size)."""
        outputs = self.outputs(images)
        return outputs[:, :1], outputs[:, 1:]
