"""StyleGAN 1: mapping network, style-based synthesis network and discriminator, which grow.

Karras, Laine, Aila 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks" (CVPR, arXiv
1812.04948), figure 1b: adaptive instance normalization, constant input, noise inputs, blurred resampling; truncation
(appendix B). Class labels as Mescheder et al. 2018 (ICML, arXiv 1801.04406): one logit per class.

Images are float in about [-1, 1], (N, C, H, W), at full resolution for every level of detail. Nothing is random in a
forward pass: noise images are arguments.
"""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.networks.growing import (
    EqualizedDense,
    GrowingDiscriminator,
    GrowingGenerator,
    blur,
    check_labels,
    check_latents,
    resampled_conv2d,
)
from lightning_modules.networks.layers import SLOPE, SQRT2, fast_layout, unit_second_moment

Noise = Literal["const", "none"] | list[Tensor] | tuple[Tensor, ...]


class MappingNetwork(nn.Module):
    """z, label -> w, one copy of w per layer of the synthesis network, and truncation.

    Unlike that of StyleGAN 2 it normalizes z and the embedding of the label together, and its gains are in the weights
    alone, not in the biases.

    Args:
        z_dim: Width of z.
        c_dim: Number of classes; 0 for no labels.
        w_dim: Width of w.
        num_ws: Copies of w.
        num_layers: Dense layers.
        width: Of the layers but the last.
        lr_multiplier: Of all layers.
        normalize_latents: Scale z and label together to unit mean square.
    """

    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int,
        num_layers: int,
        width: int,
        lr_multiplier: float,
        normalize_latents: bool,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.num_layers, self.normalize_latents = num_layers, normalize_latents
        if c_dim:
            self.LabelConcat = nn.Linear(c_dim, z_dim, bias=False)
            nn.init.normal_(self.LabelConcat.weight)
        widths = [2 * z_dim if c_dim else z_dim, *[width] * (num_layers - 1), w_dim]
        for i in range(num_layers):
            self.add_module(f"Dense{i}", EqualizedDense(widths[i], widths[i + 1], lr_multiplier=lr_multiplier))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self, z: Tensor, c: Tensor | None = None, truncation_psi: float = 1.0, truncation_cutoff: int | None = None
    ) -> Tensor:
        """Map latents.

        Args:
            z: (N, z_dim), unit normal.
            c: One-hot float (N, c_dim); None for a network without classes.
            truncation_psi: w' = w_avg + psi (w - w_avg).
            truncation_cutoff: Number of leading layers that are truncated; None is all.

        Returns:
            ws (N, num_ws, w_dim), float32 under autocast too.
        """
        check_latents(z, self.z_dim, c, self.c_dim)
        w = z.float()
        if c is not None and self.c_dim:
            with torch.autocast(z.device.type, enabled=False):
                w = torch.cat([w, self.LabelConcat(c.float())], 1)
        if self.normalize_latents:
            w = unit_second_moment(w)
        for i in range(self.num_layers):
            w = F.leaky_relu(self.get_submodule(f"Dense{i}")(w), SLOPE, inplace=True)
        ws = w[:, None].expand(-1, self.num_ws, -1)  # (N, num_ws, w_dim)
        if truncation_psi != 1:
            cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
            ws = torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], 1)
        return ws

    @torch.no_grad()
    def update_w_avg(self, w_mean: Tensor, decay: float = 0.995) -> None:
        """Moving mean of w: w_avg <- decay · w_avg + (1 - decay) · w_mean; w_mean (w_dim,), from all processes."""
        self.w_avg.copy_(w_mean.lerp(self.w_avg, decay))


class NoiseInput(nn.Module):
    """Add the noise image, scaled per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """(N, C, H, W), noise (N or 1, 1, H, W) -> (N, C, H, W)."""
        return torch.addcmul(x, noise.to(x.dtype), self.weight.to(x.dtype)[:, None, None])


class SynthesisLayer(nn.Module):
    """What follows the constant or the convolution: noise, bias, leaky ReLU, AdaIN (equation 1).

    Args:
        channels: Channels of the features.
        w_dim: Width of w.
        resolution: Height and width of the features.
        use_noise: Have a noise input.
    """

    def __init__(self, channels: int, w_dim: int, resolution: int, use_noise: bool) -> None:
        super().__init__()
        self.resolution = resolution
        self.bias = nn.Parameter(torch.zeros(channels))
        if use_noise:
            self.Noise = NoiseInput(channels)
        self.StyleMod = EqualizedDense(w_dim, 2 * channels, gain=1)

    def finish(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """(N, C, H, W), w (N, w_dim), noise (N or 1, 1, H, W) -> (N, C, H, W)."""
        if noise is not None:
            if noise.shape[1:] != (1, self.resolution, self.resolution):
                raise ValueError(
                    f"Noise of the layer at {self.resolution} px must be (N, 1, {self.resolution}, {self.resolution}); "
                    f"got {tuple(noise.shape)}. See noise_shapes."
                )
            x = self.Noise(x, noise)
        x = F.leaky_relu(x + self.bias.to(x.dtype)[:, None, None], SLOPE, inplace=True)
        scale, shift = self.StyleMod(w)[:, :, None, None].chunk(2, 1)  # (N, C, 1, 1)
        variance, mean = torch.var_mean(x.float(), (2, 3), correction=0, keepdim=True)
        scale = (scale + 1) * (variance + 1e-8).rsqrt()
        return torch.addcmul(shift.to(x.dtype), x - mean.to(x.dtype), scale.to(x.dtype))


class ConstantLayer(SynthesisLayer):
    """The learned constant at 4 px."""

    def __init__(self, channels: int, w_dim: int, use_noise: bool) -> None:
        super().__init__(channels, w_dim, 4, use_noise)
        self.const = nn.Parameter(torch.ones(1, channels, 4, 4))

    def forward(self, w: Tensor, noise: Tensor | None) -> Tensor:
        """(N, w_dim), noise (N or 1, 1, 4, 4) -> (N, C, 4, 4)."""
        x = self.const.expand(w.shape[0], -1, -1, -1)
        return self.finish(fast_layout(x, x.dtype), w, noise)


class ConvLayer(SynthesisLayer):
    """3×3 convolution, at twice the resolution and blurred if `up`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        w_dim: Width of w.
        resolution: Height and width of the output.
        use_noise: Have a noise input.
        up: Low-pass filter of an upsampling layer; None does not upsample.
    """

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, resolution: int, use_noise: bool, up: nn.Module | None
    ) -> None:
        super().__init__(out_channels, w_dim, resolution, use_noise)
        self.up = up
        self.weight_gain = SQRT2 / math.sqrt(in_channels * 3 * 3)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """(N, C_in, H, W), w (N, w_dim), noise (N or 1, 1, H_out, W_out) -> (N, C_out, H_out, W_out)."""
        weight = self.weight * self.weight_gain
        x = resampled_conv2d(x, weight) if self.up is None else self.up(resampled_conv2d(x, weight, resample="up"))
        return self.finish(x, w, noise)


class SynthesisNetwork(GrowingGenerator):
    """ws -> image: blocks 4x4, 8x8, ... of two layers each."""

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        fmap_base: int,
        fmap_max: int,
        fmap_decay: float,
        use_noise: bool,
        blur_filter: Sequence[float] | None,
    ) -> None:
        super().__init__(img_resolution, img_channels, fmap_base, fmap_max, fmap_decay)
        fmaps = self.fmaps
        self.w_dim, self.use_noise = w_dim, use_noise
        self.num_ws = 2 * len(self.resolutions)
        first = nn.ModuleDict({"Const": ConstantLayer(fmaps[4], w_dim, use_noise)})
        first["Conv"] = ConvLayer(fmaps[4], fmaps[4], w_dim, 4, use_noise, None)
        self.add_module("4x4", first)
        for r in self.resolutions[1:]:
            up = ConvLayer(fmaps[r // 2], fmaps[r], w_dim, r, use_noise, blur(blur_filter))
            conv = ConvLayer(fmaps[r], fmaps[r], w_dim, r, use_noise, None)
            self.add_module(f"{r}x{r}", nn.ModuleDict({"Conv0_up": up, "Conv1": conv}))
        for i, shape in enumerate(self.noise_shapes):
            self.register_buffer(f"noise{i}", torch.randn(1, 1, *shape))

    @property
    def noise_shapes(self) -> list[tuple[int, int]]:
        """(H, W) of the noise of each layer at full resolution, in order; empty without noise inputs."""
        return [(r, r) for r in self.resolutions for _ in (0, 1)] if self.use_noise else []

    def forward(self, ws: Tensor, noise: Noise = "const") -> Tensor:
        """Make images.

        Args:
            ws: (N, num_ws, w_dim).
            noise: 'const' (the stored noise images), 'none', or one tensor (N, 1, H, W) per layer, see `noise_shapes`;
                those of layers beyond the level of detail are not looked at.

        Returns:
            Images (N, img_channels, H, W), float32: pixels of the level in use are repeated.

        Raises:
            ValueError: If a shape is another, or there is no such level of detail.
        """
        if ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws must be (N, {self.num_ws}, {self.w_dim}); got {tuple(ws.shape)}.")
        per_layer: list[Tensor | None] = [None] * self.num_ws
        if noise == "const":
            per_layer[: len(self.noise_shapes)] = [self.get_buffer(f"noise{i}") for i in range(len(self.noise_shapes))]
        elif not isinstance(noise, str):
            if len(noise) != len(self.noise_shapes):
                raise ValueError(f"noise must hold {len(self.noise_shapes)} tensors, one per layer; got {len(noise)}.")
            per_layer[: len(noise)] = noise

        before = x = ws
        for i, r in enumerate(self.resolutions_in_use()):
            before = x
            first, second = cast(nn.ModuleDict, self.get_submodule(f"{r}x{r}")).values()
            w0, w1 = ws[:, 2 * i], ws[:, 2 * i + 1]
            x = first(w0, per_layer[2 * i]) if i == 0 else first(x, w0, per_layer[2 * i])
            x = second(x, w1, per_layer[2 * i + 1])
        return self.images(x, before)


class StyleGAN1Generator(nn.Module):
    """z, label -> image, at a level of detail.

    Args:
        z_dim: Width of the latent z.
        c_dim: Number of classes; 0 for no labels.
        w_dim: Width of the intermediate latent w.
        img_resolution: Height and width in pixels, a power of two from 8.
        img_channels: Channels of the image.
        fmap_base: Channels are fmap_base / 2^(fmap_decay · (log2(resolution) - 1)), at most fmap_max.
        fmap_max: Largest number of channels of a layer.
        fmap_decay: See fmap_base.
        mapping_num_layers: Dense layers of the mapping network.
        mapping_width: Width of its layers but the last.
        mapping_lr_multiplier: Learning-rate multiplier of the mapping network.
        normalize_latents: Scale z, with the embedding of the label, to unit mean square.
        use_noise: Have noise inputs.
        blur_filter: FIR taps that follow upsampling; None for none.
    """

    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 0,
        w_dim: int = 512,
        img_resolution: int = 256,
        img_channels: int = 5,
        fmap_base: int = 8192,
        fmap_max: int = 512,
        fmap_decay: float = 1.0,
        mapping_num_layers: int = 8,
        mapping_width: int = 512,
        mapping_lr_multiplier: float = 0.01,
        normalize_latents: bool = True,
        use_noise: bool = True,
        blur_filter: Sequence[float] | None = (1, 2, 1),
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(
            w_dim, img_resolution, img_channels, fmap_base, fmap_max, fmap_decay, use_noise, blur_filter
        )
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(
            z_dim,
            c_dim,
            w_dim,
            self.num_ws,
            mapping_num_layers,
            mapping_width,
            mapping_lr_multiplier,
            normalize_latents,
        )

    @property
    def lod(self) -> float:
        """Level of detail of the next images: 0 is full resolution, k a 2^k-th of it, a fraction between blends."""
        return self.synthesis.lod

    @lod.setter
    def lod(self, lod: float) -> None:
        self.synthesis.lod = lod

    @property
    def noise_shapes(self) -> list[tuple[int, int]]:
        """(H, W) of the noise of each layer."""
        return self.synthesis.noise_shapes

    def update_w_avg(self, w_mean: Tensor, decay: float = 0.995) -> None:
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


class StyleGAN1Discriminator(GrowingDiscriminator):
    """Image, label -> logit of being real.

    Args:
        img_resolution: Height and width in pixels, a power of two from 8.
        img_channels: Channels of the image.
        c_dim: Number of classes; the logit is that of the image's class. 0 for no labels.
        fmap_base: Channels are fmap_base / 2^(fmap_decay · (log2(resolution) - 1)), at most fmap_max.
        fmap_max: Largest number of channels of a layer.
        fmap_decay: See fmap_base.
        mbstd_group_size: Samples per group of the minibatch standard deviation; 0 or 1 leaves it out.
        mbstd_num_features: Channels of it.
        blur_filter: FIR taps before downsampling; None for none.

    Attributes:
        lod: Level of detail, as that of the generator.
    """

    def __init__(
        self,
        img_resolution: int = 256,
        img_channels: int = 5,
        c_dim: int = 0,
        fmap_base: int = 8192,
        fmap_max: int = 512,
        fmap_decay: float = 1.0,
        mbstd_group_size: int = 4,
        mbstd_num_features: int = 1,
        blur_filter: Sequence[float] | None = (1, 2, 1),
    ) -> None:
        super().__init__(
            img_resolution,
            img_channels,
            num_outputs=max(c_dim, 1),
            fmap_base=fmap_base,
            fmap_max=fmap_max,
            fmap_decay=fmap_decay,
            mbstd_group_size=mbstd_group_size,
            mbstd_num_features=mbstd_num_features,
            use_wscale=True,
            before_down=blur(blur_filter),
            fused_scale=True,
        )
        self.c_dim = c_dim

    def forward(self, images: Tensor, c: Tensor | None = None) -> Tensor:
        """(N, img_channels, H, W), one-hot (N, c_dim) -> logits (N, 1)."""
        check_labels(c, self.c_dim)
        logits = self.outputs(images)
        return (logits * c).sum(1, keepdim=True) if c is not None and self.c_dim else logits
