"""What the progressively grown networks share: equalized layers, levels of detail, the discriminator.

Karras, Aila, Laine, Lehtinen 2018, "Progressive Growing of GANs" (ICLR, arXiv 1710.10196): growing (section 2 and
figure 2), equalized learning rate (section 4.1), pixel normalization (section 4.2), minibatch standard deviation
(section 3). The level of detail is 0 at full resolution and k at a 2^k-th of it; a fraction blends two levels.

Modules have the names of the original TensorFlow variables with dots for slashes ("8x8.Conv0.weight").
"""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.convolutions import conv2d, conv_transpose2d
from lightning_modules.networks.layers import SLOPE, SQRT2, fast_layout, powers_of_two
from lightning_modules.networks.operators import minibatch_stddev, setup_filter, upfirdn2d

Resample = Literal["up", "down"] | None


def feature_maps(resolution: int, fmap_base: int, fmap_max: int, fmap_decay: float) -> int:
    """Channels at a resolution: fmap_base / 2^(decay · s), at most fmap_max, with s = log2(resolution) - 1."""
    stage = int(math.log2(resolution)) - 1
    return min(int(fmap_base / 2 ** (stage * fmap_decay)), fmap_max)


def split_lod(lod: float, levels: int) -> tuple[int, float]:
    """Level in use and share of the next coarser level.

    Args:
        lod: Level of detail.
        levels: Number of levels that the network has.

    Returns:
        Level in [0, levels) and share in [0, 1).

    Raises:
        ValueError: If there is no such level.
    """
    if not 0 <= lod <= levels - 1:
        raise ValueError(f"The level of detail of this network goes from 0 to {levels - 1} (4 px); got lod {lod}.")
    level = math.floor(lod)
    return level, lod - level


def upsample(x: Tensor, factor: int) -> Tensor:
    """Repeat pixels: (N, C, H, W) -> (N, C, H · factor, W · factor)."""
    return x if factor == 1 else F.interpolate(x, scale_factor=float(factor), mode="nearest")


def downsample(x: Tensor, factor: int) -> Tensor:
    """Average boxes of pixels: (N, C, H, W) -> (N, C, H / factor, W / factor)."""
    return x if factor == 1 else F.avg_pool2d(x, factor)


def check_labels(labels: Tensor | None, classes: int) -> None:
    """Refuse labels that are not one-hot (N, classes), and none where there are classes."""
    width = 0 if labels is None else labels.shape[-1]
    if width != classes:
        got = None if labels is None else tuple(labels.shape)
        raise ValueError(f"Labels must be one-hot (N, {classes}), or None for a network without classes; got {got}.")


def check_latents(z: Tensor, width: int, labels: Tensor | None, classes: int) -> None:
    """Refuse latents that are not (N, width), and what :func:`check_labels` refuses."""
    if z.shape[1:] != (width,):
        raise ValueError(f"z must be (N, {width}); got {tuple(z.shape)}.")
    check_labels(labels, classes)


def resampled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, resample: Resample = None) -> Tensor:
    """Convolve images whose pixels were repeated ('up'), or average boxes of the convolved image ('down').

    Repeating and averaging are convolutions themselves, so that one with stride 2 and a 4×4 kernel, the sum of the four
    shifts of the 3×3 kernel, does both (for 'up' the transposed one): 4 instead of 9 products per pixel.

    Args:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, k, k) with odd k, applied as a correlation; borders are zero.
        bias: (C_out,) or None.
        resample: 'up', 'down' or None.

    Returns:
        (N, C_out, 2 H, 2 W) for 'up', (N, C_out, H / 2, W / 2) for 'down', else (N, C_out, H, W).
    """
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    if resample is None:
        return conv2d(x, weight, bias, padding=padding)
    if resample == "down":
        return conv2d(x, F.avg_pool2d(weight, 2, 1, padding=1), bias, (2, 2), padding)
    weight = weight.flip((2, 3)).transpose(0, 1)  # conv_transpose2d is a true convolution
    kernel = 4 * F.avg_pool2d(weight, 2, 1, padding=1)  # (C_in, C_out, k + 1, k + 1)
    y = conv_transpose2d(x, kernel, (2 * x.shape[2], 2 * x.shape[3]), (2, 2), padding)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


class EqualizedDense(nn.Module):
    """x W^T · gain · lr_multiplier / sqrt(in) + b · lr_multiplier; the stored weights are 1 / lr_multiplier wide.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        gain: sqrt 2 before a leaky ReLU, 1 before nothing.
        lr_multiplier: Of the learning rate.
        use_wscale: Scale at run time (equalized learning rate); otherwise the start values are scaled.
        pixels: Neighbouring outputs that share a bias, as the pixels of a channel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        gain: float = SQRT2,
        lr_multiplier: float = 1.0,
        use_wscale: bool = True,
        pixels: int = 1,
    ) -> None:
        super().__init__()
        he_std = gain / math.sqrt(in_features)
        self.weight_gain = (he_std if use_wscale else 1.0) * lr_multiplier
        self.bias_gain, self.pixels = lr_multiplier, pixels
        std = (1.0 if use_wscale else he_std) / lr_multiplier
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * std)
        self.bias = nn.Parameter(torch.zeros(out_features // pixels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), float32 under autocast too."""
        bias = self.bias.repeat_interleave(self.pixels) * self.bias_gain
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight * self.weight_gain, bias)


class EqualizedConv(nn.Module):
    """Equalized convolution that keeps the size, doubles it (repeated pixels first) or halves it (box average after).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd; 3 if it resamples.
        gain: sqrt 2 before a leaky ReLU, 1 before nothing.
        resample: 'up', 'down' or None.
        use_wscale: Scale at run time (equalized learning rate); otherwise the start values are scaled.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        gain: float = SQRT2,
        resample: Resample = None,
        use_wscale: bool = True,
    ) -> None:
        super().__init__()
        self.resample = resample
        he_std = gain / math.sqrt(in_channels * kernel_size**2)
        self.weight_gain = he_std if use_wscale else 1.0
        std = 1.0 if use_wscale else he_std
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size) * std)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H, W), (N, C_out, 2 H, 2 W) or (N, C_out, H / 2, W / 2)."""
        return resampled_conv2d(x, self.weight * self.weight_gain, self.bias, self.resample)


class PixelNorm(nn.Module):
    """Scale every feature vector to unit mean square (section 4.2), in float32."""

    def __init__(self, epsilon: float = 1e-8) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> same."""
        return x * (x.float().square().mean(1, keepdim=True) + self.epsilon).rsqrt().to(x.dtype)


class Blur(nn.Module):
    """Low-pass filter that keeps the size; borders are zero."""

    taps: Tensor

    def __init__(self, taps: Sequence[float]) -> None:
        super().__init__()
        self.margins = [(len(taps) - 1) // 2, len(taps) // 2] * 2
        self.register_buffer("taps", setup_filter(taps), persistent=False)  # not a variable of the original

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> same."""
        return upfirdn2d(x, self.taps, padding=self.margins, flip_filter=True)


def blur(taps: Sequence[float] | None) -> nn.Module:
    """Low-pass filter, or nothing."""
    return Blur(taps) if taps else nn.Identity()


class MinibatchStddev(nn.Module):
    """See :func:`lightning_modules.networks.operators.minibatch_stddev`."""

    def __init__(self, group_size: int, num_features: int) -> None:
        super().__init__()
        self.group_size, self.num_features = group_size, num_features

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + num_features, H, W)."""
        return minibatch_stddev(x, self.group_size, self.num_features)


class GrowingGenerator(nn.Module):
    """What a generator needs to grow: an output to image channels per level, and their blend (figure 2).

    Args:
        img_resolution: Height and width in pixels, a power of two from 8.
        img_channels: Channels of the image.
        fmap_base: Channels are fmap_base / 2^(fmap_decay · (log2(resolution) - 1)), at most fmap_max.
        fmap_max: Largest number of channels of a layer.
        fmap_decay: See fmap_base.
        use_wscale: Equalized learning rate.

    Attributes:
        lod: Level of detail of the next images.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        fmap_base: int,
        fmap_max: int,
        fmap_decay: float,
        use_wscale: bool = True,
    ) -> None:
        super().__init__()
        self.lod = 0.0
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.resolutions = powers_of_two(img_resolution)
        self.fmaps = {r: feature_maps(r, fmap_base, fmap_max, fmap_decay) for r in self.resolutions}
        for lod, r in enumerate(reversed(self.resolutions)):
            to_rgb = EqualizedConv(self.fmaps[r], img_channels, 1, gain=1, use_wscale=use_wscale)
            self.add_module(f"ToRGB_lod{lod}", to_rgb)

    def resolutions_in_use(self) -> list[int]:
        """4, 8, ... to that of the current level."""
        level, _ = split_lod(self.lod, len(self.resolutions))
        return self.resolutions[: len(self.resolutions) - level]

    def images(self, x: Tensor, before: Tensor) -> Tensor:
        """Images (N, C, H, W) at full resolution, float32, from the features of the last block in use and before it."""
        level, share = split_lod(self.lod, len(self.resolutions))
        images = self._to_rgb(x, level)
        if share > 0:
            images = images.lerp(upsample(self._to_rgb(before, level + 1), 2), share)
        return upsample(images, 2**level)

    def _to_rgb(self, x: Tensor, level: int) -> Tensor:
        """Features of a level -> image of that level, float32."""
        return cast(Tensor, self.get_submodule(f"ToRGB_lod{level}")(x)).float()


class GrowingDiscriminator(nn.Module):
    """Image -> outputs, at a level of detail (figure 2, and table 2 on the right).

    Args:
        img_resolution: Height and width in pixels, a power of two from 8.
        img_channels: Channels of the image.
        num_outputs: Width of the last dense layer.
        fmap_base: Channels are fmap_base / 2^(fmap_decay · (log2(resolution) - 1)), at most fmap_max.
        fmap_max: Largest number of channels of a layer.
        fmap_decay: See fmap_base.
        mbstd_group_size: Samples per group of the minibatch standard deviation; 0 or 1 leaves it out.
        mbstd_num_features: Channels of it.
        use_wscale: Equalized learning rate.
        before_down: What the features go through before the convolution that halves them.
        fused_scale: Average in one convolution, before the activation; otherwise after it.

    Attributes:
        lod: Level of detail of the next images.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        num_outputs: int,
        fmap_base: int,
        fmap_max: int,
        fmap_decay: float,
        mbstd_group_size: int,
        mbstd_num_features: int,
        use_wscale: bool,
        before_down: nn.Module,
        fused_scale: bool,
    ) -> None:
        super().__init__()
        self.lod = 0.0
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.mbstd_group_size = mbstd_group_size
        self.resolutions = powers_of_two(img_resolution)[::-1]  # from the image to 4 px
        fmaps = {r: feature_maps(r, fmap_base, fmap_max, fmap_decay) for r in [*self.resolutions, 2]}
        for lod, r in enumerate(self.resolutions):
            self.add_module(f"FromRGB_lod{lod}", EqualizedConv(img_channels, fmaps[r], 1, use_wscale=use_wscale))

        for r in self.resolutions[:-1]:
            block = nn.Sequential()
            block.add_module("Conv0", EqualizedConv(fmaps[r], fmaps[r], 3, use_wscale=use_wscale))
            block.add_module("activation0", nn.LeakyReLU(SLOPE, inplace=True))
            block.add_module("before_down", before_down)
            resample: Resample = "down" if fused_scale else None
            conv1 = EqualizedConv(fmaps[r], fmaps[r // 2], 3, resample=resample, use_wscale=use_wscale)
            block.add_module("Conv1_down" if fused_scale else "Conv1", conv1)
            block.add_module("activation1", nn.LeakyReLU(SLOPE, inplace=True))
            block.add_module("down", nn.Identity() if fused_scale else nn.AvgPool2d(2))
            self.add_module(f"{r}x{r}", block)

        last = nn.Sequential()
        has_stddev = mbstd_group_size > 1
        if has_stddev:
            last.add_module("stddev", MinibatchStddev(mbstd_group_size, mbstd_num_features))
        in_channels = fmaps[4] + (mbstd_num_features if has_stddev else 0)
        last.add_module("Conv", EqualizedConv(in_channels, fmaps[4], 3, use_wscale=use_wscale))
        last.add_module("activation", nn.LeakyReLU(SLOPE, inplace=True))
        last.add_module("flatten", nn.Flatten())
        last.add_module("Dense0", EqualizedDense(fmaps[4] * 4 * 4, fmaps[2], use_wscale=use_wscale))
        last.add_module("activation0", nn.LeakyReLU(SLOPE, inplace=True))
        last.add_module("Dense1", EqualizedDense(fmaps[2], num_outputs, gain=1, use_wscale=use_wscale))
        self.add_module("4x4", last)

    def outputs(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) at full resolution -> (N, num_outputs); only the level in use of them is looked at."""
        if images.shape[1:] != (self.img_channels, self.img_resolution, self.img_resolution):
            expected = f"(N, {self.img_channels}, {self.img_resolution}, {self.img_resolution})"
            raise ValueError(f"The discriminator was built for images {expected}; got {tuple(images.shape)}.")
        level, share = split_lod(self.lod, len(self.resolutions))
        images = downsample(images, 2**level)
        x = self._from_rgb(images, level)
        for i, r in enumerate(self.resolutions[level:]):
            x = self.get_submodule(f"{r}x{r}")(x)
            if i == 0 and share > 0:
                x = x.lerp(self._from_rgb(downsample(images, 2), level + 1), share)
        return x

    def _from_rgb(self, images: Tensor, level: int) -> Tensor:
        """(N, C, H, W) at a level -> features of that level."""
        x = self.get_submodule(f"FromRGB_lod{level}")(fast_layout(images, images.dtype))
        return F.leaky_relu(x, SLOPE, inplace=True)
