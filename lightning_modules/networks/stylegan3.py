"""StyleGAN 3: the generator of configurations T (translation) and R (translation and rotation equivariance).

Karras, Aittala, Laine, Härkönen, Hellsten, Lehtinen, Aila, "Alias-free generative adversarial networks", NeurIPS 2021,
arXiv 2106.12423, section 3 and appendices; the discriminator is that of StyleGAN 2. Configuration R has 1×1
convolutions, radially symmetric filters and twice the channels of T. Parameters and buffers have the names of the
published checkpoints.

Images are float in about [-1, 1], (N, C, H, W). There is no noise.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_modules.networks.layers import HalfDtype, MappingNetwork, powers_of_two
from lightning_modules.networks.stylegan3_layers import MeanOverProcesses, Signal, SynthesisInput, SynthesisLayer


def signals(
    img_resolution: int,
    img_channels: int,
    channel_base: int,
    channel_max: int,
    num_layers: int,
    num_critical: int,
    first_cutoff: float,
    first_stopband: float,
    last_stopband_rel: float,
    margin_size: int,
) -> list[Signal]:
    """What leaves each layer: bandwidths grow geometrically up to the `num_critical` last layers (appendix D)."""
    powers_of_two(img_resolution)
    if num_layers <= num_critical:
        raise ValueError(f"num_layers must be larger than num_critical ({num_critical}); got {num_layers}.")
    last_cutoff = img_resolution / 2
    last_stopband = last_cutoff * last_stopband_rel
    found = []
    for layer in range(num_layers + 1):
        exponent = min(layer / (num_layers - num_critical), 1)
        cutoff = first_cutoff * (last_cutoff / first_cutoff) ** exponent
        stopband = first_stopband * (last_stopband / first_stopband) ** exponent
        sampling_rate = 2 ** math.ceil(math.log2(min(2 * stopband, img_resolution)))
        is_cropped = layer >= num_layers - 1
        size_px = img_resolution if is_cropped else sampling_rate + 2 * margin_size
        channels = img_channels if layer == num_layers else round(min(channel_base / 2 / cutoff, channel_max))
        found.append(Signal(channels, size_px, sampling_rate, cutoff, max(stopband, sampling_rate / 2) - cutoff))
    return found


class SynthesisNetwork(nn.Module):
    """ws -> image: the Fourier input, `num_layers` layers and ToRGB; the arguments are those of the generator."""

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_layers: int = 14,
        num_critical: int = 2,
        first_cutoff: float = 2,
        first_stopband: float = 2**2.1,
        last_stopband_rel: float = 2**0.3,
        margin_size: int = 10,
        output_scale: float = 0.25,
        conv_kernel: int = 3,
        filter_size: int = 6,
        lrelu_upsampling: int = 2,
        use_radial_filters: bool = False,
        conv_clamp: float | None = 256,
        magnitude_ema_beta: float = 0.999,
        num_half_res: int = 0,
        half_dtype: HalfDtype = "float16",
    ) -> None:
        super().__init__()
        self.w_dim, self.num_ws, self.output_scale = w_dim, num_layers + 2, output_scale
        between = signals(
            img_resolution,
            img_channels,
            channel_base,
            channel_max,
            num_layers,
            num_critical,
            first_cutoff,
            first_stopband,
            last_stopband_rel,
            margin_size,
        )
        self.input = SynthesisInput(w_dim, between[0])
        self.layer_names = []
        for index, (before, after) in enumerate(zip([between[0], *between], between, strict=False)):
            is_torgb = index == num_layers
            is_half = after.sampling_rate << num_half_res > img_resolution
            layer = SynthesisLayer(
                w_dim,
                before,
                after,
                1 if is_torgb else conv_kernel,
                is_torgb,
                filter_size,
                lrelu_upsampling,
                use_radial_filters and index < num_layers - num_critical,
                conv_clamp,
                magnitude_ema_beta,
                getattr(torch, half_dtype) if is_half else torch.float32,
            )
            self.layer_names.append(f"L{index}_{after.size_px}_{after.channels}")
            self.add_module(self.layer_names[-1], layer)

    def forward(
        self, ws: Tensor, noise: Sequence[Tensor] | str = (), update_emas: MeanOverProcesses | None = None
    ) -> Tensor:
        """Make images.

        Args:
            ws: (N, num_ws, w_dim).
            noise: Empty, or any word; other generators have noise.
            update_emas: If given, the moving means of the magnitudes are updated, before they are used, with what this
                function makes of the mean square of each layer's input: its mean over all processes.

        Returns:
            Images (N, img_channels, H, W), float32.
        """
        if ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws must be (N, {self.num_ws}, {self.w_dim}); got {tuple(ws.shape)}.")
        if not isinstance(noise, str) and len(noise):
            raise ValueError(f"StyleGAN 3 has no noise inputs; got {len(noise)} tensors.")
        parts: list[Tensor] = [self.input(ws[:, 0])]
        for index, name in enumerate(self.layer_names):
            parts = self.get_submodule(name)(parts, ws[:, index + 1], update_emas)
        return torch.cat(parts).float() * self.output_scale


class StyleGAN3Generator(nn.Module):
    """z -> image. The defaults are those of configuration T.

    Args:
        z_dim: Width of the latent z.
        w_dim: Width of the intermediate latent w.
        img_resolution: Height and width in pixels, a power of two from 8.
        img_channels: Channels of the image.
        channel_base: Channels times resolution; 65536 for configuration R.
        channel_max: Largest number of channels of a layer; 1024 for configuration R.
        mapping_num_layers: Dense layers of the mapping network.
        mapping_lr_multiplier: Learning-rate multiplier of the mapping network.
        c_dim: Number of classes; 0 for no labels.
        num_layers: Layers without ToRGB.
        num_critical: Last layers that are critically sampled: cutoff at half the sampling rate.
        first_cutoff: Of the first layer, in cycles per image.
        first_stopband: Of the first layer, in cycles per image.
        last_stopband_rel: Stopband of the last layer, relative to its cutoff.
        margin_size: Samples around the image that hide its border from the layers.
        output_scale: Multiplies the image.
        conv_kernel: Size of the convolution kernels; 1 for configuration R.
        filter_size: Taps of the low-pass filters per sample of the lower rate.
        lrelu_upsampling: The nonlinearity works at this multiple of the sampling rate.
        use_radial_filters: Downsample with radially symmetric filters, as configuration R.
        conv_clamp: Limit of the activations, for half precision; None for none.
        magnitude_ema_beta: Decay of the moving means of the activations' magnitudes, per update.
        num_half_res: So many of the highest resolutions compute in half precision; the original has 4.
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
        mapping_num_layers: int = 2,
        mapping_lr_multiplier: float = 0.01,
        c_dim: int = 0,
        num_layers: int = 14,
        num_critical: int = 2,
        first_cutoff: float = 2,
        first_stopband: float = 2**2.1,
        last_stopband_rel: float = 2**0.3,
        margin_size: int = 10,
        output_scale: float = 0.25,
        conv_kernel: int = 3,
        filter_size: int = 6,
        lrelu_upsampling: int = 2,
        use_radial_filters: bool = False,
        conv_clamp: float | None = 256,
        magnitude_ema_beta: float = 0.999,
        num_half_res: int = 0,
        half_dtype: HalfDtype = "float16",
    ) -> None:
        super().__init__()
        self.z_dim, self.w_dim, self.c_dim = z_dim, w_dim, c_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(
            w_dim,
            img_resolution,
            img_channels,
            channel_base,
            channel_max,
            num_layers,
            num_critical,
            first_cutoff,
            first_stopband,
            last_stopband_rel,
            margin_size,
            output_scale,
            conv_kernel,
            filter_size,
            lrelu_upsampling,
            use_radial_filters,
            conv_clamp,
            magnitude_ema_beta,
            num_half_res,
            half_dtype,
        )
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, w_dim, self.num_ws, mapping_num_layers, mapping_lr_multiplier, c_dim)
        self.noise_shapes: list[tuple[int, int]] = []

    def update_w_avg(self, w_mean: Tensor, decay: float = 0.998) -> None:
        """See :meth:`MappingNetwork.update_w_avg`."""
        self.mapping.update_w_avg(w_mean, decay)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise: Sequence[Tensor] | str = (),
        update_emas: MeanOverProcesses | None = None,
    ) -> Tensor:
        """(N, z_dim) -> images (N, img_channels, H, W); see :class:`MappingNetwork` and :class:`SynthesisNetwork`."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return cast(Tensor, self.synthesis(ws, noise, update_emas))
