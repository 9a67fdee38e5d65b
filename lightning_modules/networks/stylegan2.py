"""StyleGAN 2: the generator; its discriminator is in stylegan2_discriminator.py and importable from here.

Karras, Laine, Aittala, Hellsten, Lehtinen, Aila, "Analyzing and improving the image quality of StyleGAN", CVPR 2020,
arXiv 1912.04958; the mapping network and truncation from StyleGAN (CVPR 2019, arXiv 1812.04948); channel counts, class
labels, half precision and clamping from ADA (NeurIPS 2020, arXiv 2006.06676). Parameters and buffers have the names of
the published checkpoints.

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
    Architecture,
    ConvLayer,
    FullyConnectedLayer,
    HalfDtype,
    MappingNetwork,
    Resampling,
    block_dtype,
    fast_layout,
    leaky_relu,
    powers_of_two,
)
from lightning_modules.networks.operators import modulated_conv2d, upsample2d
from lightning_modules.networks.stylegan2_discriminator import StyleGAN2Discriminator

__all__ = ["StyleGAN2Discriminator", "StyleGAN2Generator"]

Noise = Literal["const", "none"] | list[Tensor] | tuple[Tensor, ...]


class SynthesisLayer(Resampling):
    """Modulated convolution 3×3, noise, bias, leaky ReLU (figure 2d).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        w_dim: Width of w.
        resolution: Height and width of the output.
        up: 1 or 2.
        use_noise: Have a noise input.
        gain: Multiplies the output, and the limit too.
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
        gain: float = 1.0,
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
    ) -> None:
        super().__init__(resample_filter)
        self.resolution, self.up, self.use_noise, self.gain = resolution, up, use_noise, gain * SQRT2
        self.clamp = None if conv_clamp is None else conv_clamp * gain
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
            gain=self.gain,
            up=self.up,
            padding=1,
            f=self.resample_filter,
            flip_weight=self.up == 1,
        )
        return leaky_relu(x, self.clamp)


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
        bias = self.bias.to(x.dtype)[None, None]
        y = torch.baddbmm(bias, x.flatten(2).mT, kernel.to(x.dtype))  # (N, H·W, img_channels)
        y = y.mT.reshape(x.shape[0], -1, *x.shape[2:])
        return y if self.conv_clamp is None else y.clamp(-self.conv_clamp, self.conv_clamp)


class SynthesisBlock(Resampling):
    """Two synthesis layers (one at 4 px, after the learned constant), and what the architecture adds (figure 7).

    Args:
        in_channels: Channels of the input; 0 for the first block.
        out_channels: Channels of the output.
        w_dim: Width of w.
        resolution: Height and width of the output.
        img_channels: Channels of the image that ToRGB makes; 0 for no ToRGB.
        architecture: With 'resnet', a linear shortcut around the two layers.
        use_noise: Have noise inputs.
        conv_clamp: Limit of the outputs of the layers.
        resample_filter: FIR taps.
        dtype: Of the features.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        architecture: Architecture = "skip",
        use_noise: bool = True,
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(resample_filter)
        self.is_first, self.has_image, self.dtype = in_channels == 0, bool(img_channels), dtype
        self.is_residual = architecture == "resnet" and not self.is_first
        self.num_conv = 1 if self.is_first else 2
        f = resample_filter
        if self.is_first:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(
                in_channels, out_channels, w_dim, resolution, 2, use_noise, conv_clamp=conv_clamp, resample_filter=f
            )
        gain = SQRT_HALF if self.is_residual else 1.0
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, 1, use_noise, gain, conv_clamp)
        if self.has_image:
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, conv_clamp)
        if self.is_residual:
            self.skip = ConvLayer(
                in_channels, out_channels, 1, False, "linear", up=2, gain=SQRT_HALF, resample_filter=f
            )

    def forward(
        self, x: Tensor | None, img: Tensor | None, ws: Tensor, noise: Sequence[Literal["const", "none"] | Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Run one block.

        Args:
            x: Features of the block before (N, C_in, H/2, W/2); None for the first.
            img: Image so far (N, img_channels, H/2, W/2), float32; None where no block before made one.
            ws: (N, num_conv + 1, w_dim), the last for ToRGB.
            noise: One per layer.

        Returns:
            Features (N, C_out, H, W) and image (N, img_channels, H, W), float32, or None.
        """
        x = fast_layout(self.const.expand(ws.shape[0], -1, -1, -1) if x is None else x, self.dtype)
        shortcut = self.skip(x) if self.is_residual else None
        if not self.is_first:
            x = cast(Tensor, self.conv0(x, ws[:, 0], noise[0]))
        x = self.conv1(x, ws[:, self.num_conv - 1], noise[-1])
        x = x if shortcut is None else x + shortcut
        if img is not None:
            img = upsample2d(img, self.resample_filter).float()
        if self.has_image:
            y = self.torgb(x, ws[:, self.num_conv]).float()
            img = y if img is None else img + y
        return x, img


class SynthesisNetwork(nn.Module):
    """ws -> image: blocks b4, b8, ... to img_resolution, with min(channel_base / resolution, channel_max) channels."""

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: Architecture = "skip",
        use_noise: bool = True,
        conv_clamp: float | None = None,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        num_half_res: int = 0,
        half_dtype: HalfDtype = "float16",
    ) -> None:
        super().__init__()
        self.w_dim, self.use_noise = w_dim, use_noise
        self.resolutions = powers_of_two(img_resolution)
        channels = 0
        for resolution in self.resolutions:
            before, channels = channels, min(channel_base // resolution, channel_max)
            block = SynthesisBlock(
                before,
                channels,
                w_dim,
                resolution,
                img_channels if architecture == "skip" or resolution == img_resolution else 0,
                architecture,
                use_noise,
                conv_clamp,
                resample_filter,
                block_dtype(resolution, img_resolution, num_half_res, half_dtype),
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
    """z, and a class label -> image.

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
        c_dim: Number of classes; 0 for no labels.
        architecture: 'skip' adds the images of all resolutions, 'resnet' has shortcuts, 'orig' neither (figure 7).
        num_half_res: So many of the highest resolutions run in half precision; the image is summed in float32.
        half_dtype: That precision.
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
        c_dim: int = 0,
        architecture: Architecture = "skip",
        num_half_res: int = 0,
        half_dtype: HalfDtype = "float16",
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(
            w_dim,
            img_resolution,
            img_channels,
            channel_base,
            channel_max,
            architecture,
            use_noise,
            conv_clamp,
            resample_filter,
            num_half_res,
            half_dtype,
        )
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, w_dim, self.num_ws, mapping_num_layers, mapping_lr_multiplier, c_dim)

    @property
    def noise_shapes(self) -> list[tuple[int, int]]:
        """(H, W) of the noise of each layer."""
        return self.synthesis.noise_shapes

    def update_w_avg(self, w_mean: Tensor, decay: float = 0.998) -> None:
        """See :meth:`MappingNetwork.update_w_avg`."""
        self.mapping.update_w_avg(w_mean, decay)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise: Noise = "const",
    ) -> Tensor:
        """(N, z_dim), (N, c_dim) -> (N, img_channels, H, W); see :class:`MappingNetwork`, :class:`SynthesisNetwork`."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return cast(Tensor, self.synthesis(ws, noise))
