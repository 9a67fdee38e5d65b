"""StyleGAN 2: mapping network, 'skip' generator and 'resnet' discriminator (configuration F).

Karras, Laine, Aittala, Hellsten, Lehtinen, Aila, "Analyzing and improving the image quality of StyleGAN", CVPR 2020,
arXiv 1912.04958; the mapping network and truncation from StyleGAN (CVPR 2019, arXiv 1812.04948); channel counts and
clamping from ADA (NeurIPS 2020, arXiv 2006.06676). Parameters and buffers have the names of the published checkpoints.

Images are float in about [-1, 1], (N, C, H, W). Nothing is random in a forward pass: noise images are arguments.
"""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lightning_modules.networks.layers import (
    SQRT2,
    SQRT_HALF,
    ConvLayer,
    FullyConnectedLayer,
    MappingNetwork,
    Resampling,
    fast_layout,
    leaky_relu,
)
from lightning_modules.networks.operators import minibatch_stddev, modulated_conv2d, upsample2d

Noise = Literal["const", "none"] | list[Tensor] | tuple[Tensor, ...]


def _resolutions(img_resolution: int) -> list[int]:
    """4, 8, ..., img_resolution."""
    exponent = int(math.log2(max(img_resolution, 1)))
    if img_resolution < 8 or 2**exponent != img_resolution:
        raise ValueError(f"img_resolution must be a power of two from 8; got {img_resolution}.")
    return [2**i for i in range(2, exponent + 1)]


class SynthesisLayer(Resampling):
    """Modulated convolution 3×3, noise, bias, leaky ReLU (figure 2d).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        w_dim: Width of w.
        resolution: Height and width of the output.
        up: 1 or 2.
        use_noise: Have a noise input.
        conv_clamp: Limit of the output.
        resample_filter: FIR taps.
    """

    noise_const: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        up: int = 1,
        use_noise: bool = True,
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
    ) -> None:
        super().__init__(resample_filter)
        self.resolution, self.up, self.use_noise, self.conv_clamp = resolution, up, use_noise, conv_clamp
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1.0)

    def forward(self, x: Tensor, w: Tensor, noise: Literal["const", "none"] | Tensor = "const") -> Tensor:
        """(N, C_in, H / up, W / up), w (N, w_dim), noise (N, 1, H, W) -> (N, C_out, H, W)."""
        if self.use_noise and not (isinstance(noise, str) and noise == "none"):
            image = self.noise_const if isinstance(noise, str) else noise
            if image.shape[-2:] != (self.resolution, self.resolution) or (image.ndim == 4 and image.shape[1] != 1):
                raise ValueError(
                    f"Noise of the layer at {self.resolution} px must be (N, 1, {self.resolution}, {self.resolution}); "
                    f"got {tuple(image.shape)}. See noise_shapes."
                )
            added: Tensor | None = image * self.noise_strength
        else:
            added = None
        x = modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise=added,
            bias=self.bias,
            gain=SQRT2,
            up=self.up,
            padding=1,
            f=self.resample_filter,
            flip_weight=self.up == 1,
        )
        return leaky_relu(x, self.conv_clamp)


class ToRGBLayer(nn.Module):
    """Modulated 1×1 convolution to image channels, without demodulation (section 4.1, figure 7b)."""

    def __init__(self, in_channels: int, img_channels: int, w_dim: int, conv_clamp: float | None = None) -> None:
        super().__init__()
        self.conv_clamp = conv_clamp
        self.weight_gain = 1 / math.sqrt(in_channels)
        self.weight = nn.Parameter(torch.randn(img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(img_channels))
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1.0)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """(N, C, H, W), w (N, w_dim) -> (N, img_channels, H, W)."""
        styles = self.affine(w) * self.weight_gain  # (N, C)
        kernel = styles[:, :, None] * self.weight.flatten(1).t()  # (N, C, img_channels)
        # A product per sample reads the wide feature maps once; scaling them first would read them twice.
        y = torch.baddbmm(self.bias[None, None], x.flatten(2).mT, kernel.to(x.dtype))  # (N, H·W, img_channels)
        y = y.mT.reshape(x.shape[0], -1, *x.shape[2:])
        return y if self.conv_clamp is None else y.clamp(-self.conv_clamp, self.conv_clamp)


class SynthesisBlock(Resampling):
    """Two synthesis layers (one at 4 px, after the learned constant) and ToRGB, added to the upsampled image.

    Args:
        in_channels: Channels of the input; 0 for the first block.
        out_channels: Channels of the output.
        w_dim: Width of w.
        resolution: Height and width of the output.
        img_channels: Channels of the image.
        use_noise: Have noise inputs.
        conv_clamp: Limit of the outputs of the layers.
        resample_filter: FIR taps.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        use_noise: bool = True,
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
    ) -> None:
        super().__init__(resample_filter)
        self.is_first = in_channels == 0
        self.num_conv = 1 if self.is_first else 2
        if self.is_first:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(
                in_channels, out_channels, w_dim, resolution, 2, use_noise, conv_clamp, resample_filter
            )
        self.conv1 = SynthesisLayer(
            out_channels, out_channels, w_dim, resolution, 1, use_noise, conv_clamp, resample_filter
        )
        self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, conv_clamp)

    def forward(
        self, x: Tensor | None, img: Tensor | None, ws: Tensor, noise: Sequence[Literal["const", "none"] | Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run one block.

        Args:
            x: Features of the block before (N, C_in, H/2, W/2); None for the first.
            img: Image so far (N, img_channels, H/2, W/2); None for the first.
            ws: (N, num_conv + 1, w_dim), the last for ToRGB.
            noise: One per layer.

        Returns:
            Features (N, C_out, H, W) and image (N, img_channels, H, W).
        """
        if x is None:
            x = fast_layout(self.const.expand(ws.shape[0], -1, -1, -1))
        else:
            x = cast(Tensor, self.conv0(x, ws[:, 0], noise[0]))
        x = self.conv1(x, ws[:, self.num_conv - 1], noise[-1])
        y = self.torgb(x, ws[:, self.num_conv]).float()
        return x, y if img is None else upsample2d(img, self.resample_filter).float() + y


class SynthesisNetwork(nn.Module):
    """ws -> image: blocks b4, b8, ... to img_resolution, with min(channel_base / resolution, channel_max) channels."""

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        use_noise: bool = True,
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
    ) -> None:
        super().__init__()
        self.w_dim, self.use_noise = w_dim, use_noise
        self.resolutions = _resolutions(img_resolution)
        channels = 0
        for resolution in self.resolutions:
            before, channels = channels, min(channel_base // resolution, channel_max)
            block = SynthesisBlock(
                before, channels, w_dim, resolution, img_channels, use_noise, conv_clamp, resample_filter
            )
            self.add_module(f"b{resolution}", block)
        self.num_ws = 2 * len(self.resolutions)  # 2 per resolution less one at 4 px, and the last ToRGB

    @property
    def noise_shapes(self) -> list[tuple[int, int]]:
        """(H, W) of the noise of each layer, in order; empty without noise inputs."""
        sizes = [self.resolutions[0], *(r for r in self.resolutions[1:] for _ in (0, 1))]
        return [(r, r) for r in sizes] if self.use_noise else []

    def forward(self, ws: Tensor, noise: Noise = "const") -> Tensor:
        """Make images.

        Args:
            ws: (N, num_ws, w_dim).
            noise: 'const' (the stored noise images), 'none', or one tensor (N, 1, H, W) per layer, see `noise_shapes`.

        Returns:
            Images (N, img_channels, H, W), float32.
        """
        if ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws must be (N, {self.num_ws}, {self.w_dim}); got {tuple(ws.shape)}.")
        layers = self.num_ws - 1
        if isinstance(noise, str):
            per_layer: list[Literal["const", "none"] | Tensor] = [noise] * layers
        elif len(noise) == len(self.noise_shapes):
            per_layer = list(noise) if self.use_noise else ["none"] * layers
        else:
            raise ValueError(f"noise must hold {len(self.noise_shapes)} tensors, one per layer; got {len(noise)}.")
        x = img = None
        first = 0
        for resolution in self.resolutions:
            block = cast(SynthesisBlock, self.get_submodule(f"b{resolution}"))
            last = first + block.num_conv
            x, img = block(x, img, ws[:, first : last + 1], per_layer[first:last])
            first = last
        return cast(Tensor, img)


class StyleGAN2Generator(nn.Module):
    """z -> image.

    Args:
        z_dim: Width of the latent z.
        w_dim: Width of the intermediate latent w.
        img_resolution: Height and width in pixels, a power of two from 8.
        img_channels: Channels of the image.
        channel_base: Channels times resolution.
        channel_max: Largest number of channels of a layer.
        mapping_num_layers: Dense layers of the mapping network.
        mapping_lr_multiplier: Learning-rate multiplier of the mapping network.
        use_noise: Have noise inputs.
        conv_clamp: Limit of the outputs of convolutions, for half precision (the original uses 256); None for none.
        resample_filter: FIR taps of up- and downsampling.
    """

    def __init__(
        self,
        z_dim: int = 512,
        w_dim: int = 512,
        img_resolution: int = 256,
        img_channels: int = 5,
        channel_base: int = 32768,
        channel_max: int = 512,
        mapping_num_layers: int = 8,
        mapping_lr_multiplier: float = 0.01,
        use_noise: bool = True,
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
    ) -> None:
        super().__init__()
        self.z_dim, self.w_dim, self.img_resolution, self.img_channels = z_dim, w_dim, img_resolution, img_channels
        self.synthesis = SynthesisNetwork(
            w_dim, img_resolution, img_channels, channel_base, channel_max, use_noise, conv_clamp, resample_filter
        )
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, w_dim, self.num_ws, mapping_num_layers, mapping_lr_multiplier)

    @property
    def noise_shapes(self) -> list[tuple[int, int]]:
        """(H, W) of the noise of each layer."""
        return self.synthesis.noise_shapes

    def update_w_avg(self, w_mean: Tensor, decay: float = 0.998) -> None:
        """See :meth:`MappingNetwork.update_w_avg`."""
        self.mapping.update_w_avg(w_mean, decay)

    def forward(
        self, z: Tensor, truncation_psi: float = 1.0, truncation_cutoff: int | None = None, noise: Noise = "const"
    ) -> Tensor:
        """(N, z_dim) -> images (N, img_channels, H, W); see :class:`MappingNetwork` and :class:`SynthesisNetwork`."""
        ws = self.mapping(z, truncation_psi, truncation_cutoff)
        return cast(Tensor, self.synthesis(ws, noise))


class DiscriminatorBlock(Resampling):
    """Residual block that halves the resolution (figure 7c); the first also takes the image (1×1, `fromrgb`)."""

    def __init__(
        self,
        img_channels: int,
        in_channels: int,
        out_channels: int,
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
    ) -> None:
        super().__init__(resample_filter)
        f = resample_filter
        if img_channels:
            self.fromrgb = ConvLayer(img_channels, in_channels, 1, conv_clamp=conv_clamp, resample_filter=f)
        self.conv0 = ConvLayer(in_channels, in_channels, 3, conv_clamp=conv_clamp, resample_filter=f)
        self.conv1 = ConvLayer(
            in_channels, out_channels, 3, down=2, gain=SQRT_HALF, conv_clamp=conv_clamp, resample_filter=f
        )
        self.skip = ConvLayer(in_channels, out_channels, 1, False, "linear", 2, SQRT_HALF, resample_filter=f)
        self.has_image = bool(img_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, img_channels or C_in, H, W) -> (N, C_out, H/2, W/2)."""
        if self.has_image:
            x = self.fromrgb(x)
        skip = self.skip(x)
        return cast(Tensor, self.conv1(self.conv0(x)) + skip)


class DiscriminatorEpilogue(nn.Module):
    """Minibatch standard deviation, 3×3 convolution and two dense layers at 4 px."""

    def __init__(
        self,
        in_channels: int,
        conv_clamp: float | None,
        mbstd_group_size: int | None,
        mbstd_num_channels: int,
    ) -> None:
        super().__init__()
        self.mbstd_group_size, self.mbstd_num_channels = mbstd_group_size, mbstd_num_channels
        self.conv = ConvLayer(in_channels + mbstd_num_channels, in_channels, 3, conv_clamp=conv_clamp)
        self.fc = FullyConnectedLayer(in_channels * 4 * 4, in_channels, "lrelu")
        self.out = FullyConnectedLayer(in_channels, 1)  # with classes: a projection on an embedding of the label

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 4, 4) -> logits (N, 1)."""
        if self.mbstd_num_channels:
            x = minibatch_stddev(x, self.mbstd_group_size, self.mbstd_num_channels)
        return cast(Tensor, self.out(self.fc(self.conv(x).flatten(1))))


class StyleGAN2Discriminator(nn.Module):
    """Image -> logit of being real.

    Args:
        img_resolution: Height and width in pixels, a power of two from 8.
        img_channels: Channels of the image.
        channel_base: Channels times resolution.
        channel_max: Largest number of channels of a layer.
        conv_clamp: Limit of the outputs of convolutions, for half precision (the original uses 256); None for none.
        mbstd_group_size: Samples per group of the minibatch standard deviation; None is the whole batch.
        mbstd_num_channels: Channels of it; 0 leaves it out.
        resample_filter: FIR taps of downsampling.
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
    ) -> None:
        super().__init__()
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.resolutions = _resolutions(img_resolution)[::-1]  # from the image to 4 px
        channels = {r: min(channel_base // r, channel_max) for r in self.resolutions}
        for r in self.resolutions[:-1]:
            image = img_channels if r == img_resolution else 0
            block = DiscriminatorBlock(image, channels[r], channels[r // 2], conv_clamp, resample_filter)
            self.add_module(f"b{r}", block)
        self.mbstd_group_size = mbstd_group_size
        self.b4 = DiscriminatorEpilogue(channels[4], conv_clamp, mbstd_group_size, mbstd_num_channels)

    def forward(self, images: Tensor) -> Tensor:
        """(N, img_channels, H, W) -> logits (N, 1)."""
        if images.shape[1:] != (self.img_channels, self.img_resolution, self.img_resolution):
            expected = f"(N, {self.img_channels}, {self.img_resolution}, {self.img_resolution})"
            raise ValueError(f"The discriminator was built for images {expected}; got {tuple(images.shape)}.")
        x = fast_layout(images)
        for r in self.resolutions:
            x = self.get_submodule(f"b{r}")(x)
        return x
