"""StyleGAN 2: the discriminator, in the three architectures of figure 7, with and without class labels.

Karras et al., "Analyzing and improving the image quality of StyleGAN", CVPR 2020, arXiv 1912.04958; channel counts,
labels, half precision and clamping from ADA (Karras et al., NeurIPS 2020, arXiv 2006.06676). Labels enter by projection
(Miyato, Koyama, "cGANs with projection discriminator", ICLR 2018, arXiv 1802.05637). Parameters and buffers have the
names of the published checkpoints.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.networks.layers import (
    SQRT_HALF,
    Architecture,
    ConvLayer,
    FullyConnectedLayer,
    HalfDtype,
    MappingNetwork,
    Resampling,
    block_dtype,
    fast_layout,
    powers_of_two,
)
from lightning_modules.networks.operators import downsample2d, minibatch_stddev


class DiscriminatorBlock(Resampling):
    """Two convolutions that halve the resolution.

    Args:
        img_channels: Channels of the image that enters here (1×1, `fromrgb`); 0 for none.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        architecture: With 'resnet', a linear shortcut around the convolutions; with 'skip', the image goes on.
        conv_clamp: Limit of the outputs of the convolutions.
        resample_filter: FIR taps.
        dtype: Of the features.
    """

    def __init__(
        self,
        img_channels: int,
        in_channels: int,
        out_channels: int,
        architecture: Architecture = "resnet",
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(resample_filter)
        self.has_image, self.architecture, self.dtype = bool(img_channels), architecture, dtype
        is_residual = architecture == "resnet"
        f = resample_filter
        if self.has_image:
            self.fromrgb = ConvLayer(img_channels, in_channels, 1, conv_clamp=conv_clamp)
        self.conv0 = ConvLayer(in_channels, in_channels, 3, conv_clamp=conv_clamp)
        gain = SQRT_HALF if is_residual else 1.0
        self.conv1 = ConvLayer(
            in_channels, out_channels, 3, down=2, gain=gain, conv_clamp=conv_clamp, resample_filter=f
        )
        if is_residual:
            self.skip = ConvLayer(in_channels, out_channels, 1, False, "linear", down=2, gain=gain, resample_filter=f)

    def forward(self, x: Tensor | None, img: Tensor) -> tuple[Tensor, Tensor]:
        """Run one block.

        Args:
            x: Features (N, C_in, H, W) of the block before; None for the first.
            img: Image (N, img_channels, H, W), float32; read where `img_channels` is not 0.

        Returns:
            Features (N, C_out, H/2, W/2), and the image, of that size too with 'skip'.
        """
        x = None if x is None else fast_layout(x, self.dtype)
        if self.has_image:
            y = self.fromrgb(fast_layout(img, self.dtype))
            x = y if x is None else x + y
        if self.architecture == "skip":
            img = downsample2d(img, self.resample_filter)
        y = self.conv1(self.conv0(x))
        return (y + self.skip(x) if self.architecture == "resnet" else y), img


class DiscriminatorEpilogue(nn.Module):
    """Minibatch standard deviation, 3×3 convolution and two dense layers at 4 px, in float32.

    Args:
        img_channels: Channels of the image that enters here too; 0 for none.
        in_channels: Channels of the input.
        cmap_dim: Width of a mapped label; 0 for no labels.
        conv_clamp: Limit of the output of the convolution.
        mbstd_group_size: Samples per group of the minibatch standard deviation; None is the whole batch.
        mbstd_num_channels: Channels of it; 0 leaves it out.
    """

    def __init__(
        self,
        img_channels: int,
        in_channels: int,
        cmap_dim: int,
        conv_clamp: float | None,
        mbstd_group_size: int | None,
        mbstd_num_channels: int,
    ) -> None:
        super().__init__()
        self.has_image, self.cmap_dim = bool(img_channels), cmap_dim
        self.mbstd_group_size, self.mbstd_num_channels = mbstd_group_size, mbstd_num_channels
        if self.has_image:
            self.fromrgb = ConvLayer(img_channels, in_channels, 1)
        self.conv = ConvLayer(in_channels + mbstd_num_channels, in_channels, 3, conv_clamp=conv_clamp)
        self.fc = FullyConnectedLayer(in_channels * 4 * 4, in_channels, "lrelu")
        self.out = FullyConnectedLayer(in_channels, cmap_dim or 1)

    def forward(self, x: Tensor, img: Tensor, cmap: Tensor | None) -> Tensor:
        """Features (N, C, 4, 4), image (N, img_channels, 4, 4), mapped labels (N, cmap_dim) -> logits (N, 1)."""
        x = fast_layout(x, torch.float32)
        if self.has_image:
            x = x + self.fromrgb(img)
        if self.mbstd_num_channels:
            x = minibatch_stddev(x, self.mbstd_group_size, self.mbstd_num_channels)
        logits: Tensor = self.out(self.fc(self.conv(x).flatten(1)))
        if cmap is None:
            return logits
        return (logits * cmap).sum(1, keepdim=True) / math.sqrt(self.cmap_dim)


class StyleGAN2Discriminator(nn.Module):
    """Image, and a class label -> logit of being real.

    Args:
        img_resolution: Height and width in pixels, a power of two from 8.
        img_channels: Channels of the image.
        channel_base: Channels times resolution.
        channel_max: Largest number of channels of a layer.
        conv_clamp: Limit of the outputs of convolutions, for half precision (the original uses 256); None for none.
        mbstd_group_size: Samples per group of the minibatch standard deviation; None is the whole batch.
        mbstd_num_channels: Channels of it; 0 leaves it out.
        resample_filter: FIR taps of downsampling.
        c_dim: Number of classes; 0 for no labels.
        architecture: 'resnet' has shortcuts, 'skip' shows the image to every resolution, 'orig' neither (figure 7).
        cmap_dim: Width of a mapped label; None is the number of channels at 4 px.
        mapping_num_layers: Dense layers of the mapping network of labels.
        mapping_lr_multiplier: Learning-rate multiplier of that network.
        freeze_layers: So many convolutions, counted from the image, keep their weights (Freeze-D: Mo et al. 2020,
            arXiv 2002.10964); for fine-tuning.
        num_half_res: So many of the highest resolutions run in half precision; the logits are float32.
        half_dtype: That precision.
    """

    def __init__(
        self,
        img_resolution: int = 256,
        img_channels: int = 5,
        channel_base: int = 32768,
        channel_max: int = 512,
        conv_clamp: float | None = None,
        mbstd_group_size: int | None = 4,
        mbstd_num_channels: int = 1,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        c_dim: int = 0,
        architecture: Architecture = "resnet",
        cmap_dim: int | None = None,
        mapping_num_layers: int = 8,
        mapping_lr_multiplier: float = 0.01,
        freeze_layers: int = 0,
        num_half_res: int = 0,
        half_dtype: HalfDtype = "float16",
    ) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.c_dim = img_resolution, img_channels, c_dim
        self.resolutions = powers_of_two(img_resolution)[::-1]  # from the image to 4 px
        channels = {r: min(channel_base // r, channel_max) for r in self.resolutions}
        layers: list[nn.Module] = []
        for r in self.resolutions[:-1]:
            block = DiscriminatorBlock(
                img_channels if architecture == "skip" or r == img_resolution else 0,
                channels[r],
                channels[r // 2],
                architecture,
                conv_clamp,
                resample_filter,
                block_dtype(r, img_resolution, num_half_res, half_dtype),
            )
            self.add_module(f"b{r}", block)
            layers += block.children()
        for layer in layers[:freeze_layers]:
            _freeze(layer)

        width = (channels[4] if cmap_dim is None else cmap_dim) if c_dim else 0
        if c_dim:
            self.mapping = MappingNetwork(0, width, None, mapping_num_layers, mapping_lr_multiplier, c_dim)
        self.mbstd_group_size = mbstd_group_size
        image = img_channels if architecture == "skip" else 0
        self.b4 = DiscriminatorEpilogue(image, channels[4], width, conv_clamp, mbstd_group_size, mbstd_num_channels)

    def forward(self, images: Tensor, c: Tensor | None = None) -> Tensor:
        """Judge images.

        Args:
            images: (N, img_channels, H, W), float.
            c: Labels (N, c_dim), one-hot; None if c_dim is 0.

        Returns:
            Logits (N, 1), float32.

        Raises:
            ValueError: If the images or labels are not of the shape that the network was built for.
        """
        if images.shape[1:] != (self.img_channels, self.img_resolution, self.img_resolution):
            expected = f"(N, {self.img_channels}, {self.img_resolution}, {self.img_resolution})"
            raise ValueError(f"The discriminator was built for images {expected}; got {tuple(images.shape)}.")
        if not self.c_dim and c is not None and c.shape[1:] != (0,):
            raise ValueError(f"The discriminator was built without labels (c_dim 0); got labels {tuple(c.shape)}.")
        x, img = None, fast_layout(images, torch.float32)
        for r in self.resolutions[:-1]:
            x, img = self.get_submodule(f"b{r}")(x, img)
        cmap = self.mapping(None, c) if self.c_dim else None
        logits: Tensor = self.b4(x, img, cmap)
        return logits


def _freeze(layer: nn.Module) -> None:
    """Turn parameters into buffers, so that no optimizer sees them and checkpoints keep their names."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        delattr(layer, name)
        layer.register_buffer(name, parameter.detach())
