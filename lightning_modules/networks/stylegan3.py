"""StyleGAN 3: the generator of configurations T (translation) and R (translation and rotation equivariance).

Karras, Aittala, Laine, Härkönen, Hellsten, Lehtinen, Aila, "Alias-free generative adversarial networks", NeurIPS 2021,
arXiv 2106.12423, section 3 and appendices; the discriminator is that of StyleGAN 2. Configuration R has 1×1
convolutions, radially symmetric filters and twice the channels of T. Parameters and buffers have the names of the
published checkpoints.

Images are float in about [-1, 1], (N, C, H, W). There is no noise.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_modules.networks.filtered_lrelu import design_lowpass_filter, filtered_lrelu
from lightning_modules.networks.layers import (
    SLOPE,
    SQRT2,
    FullyConnectedLayer,
    HalfDtype,
    MappingNetwork,
    fast_layout,
)
from lightning_modules.networks.operators import modulated_conv2d

MeanOverProcesses = Callable[[Tensor], Tensor]


class Signal(NamedTuple):
    """Band-limited feature maps between two layers. Frequencies are in cycles per image.

    Attributes:
        channels: Number of them.
        size_px: Height and width, margins included.
        sampling_rate: Samples per image, without margins.
        cutoff: Frequencies from here on are suppressed.
        half_width: From the cutoff to where they are suppressed completely.
    """

    channels: int
    size_px: int
    sampling_rate: int
    cutoff: float
    half_width: float


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


class SynthesisInput(nn.Module):
    """Fourier features on a canvas that is rotated and translated as w says (section 3.2 and appendix F).

    The buffer `transform` (3, 3) is a further, inverse transform of the image, given by the user.

    Args:
        w_dim: Width of w.
        signal: What comes out; its cutoff is the largest of the frequencies.
    """

    transform: Tensor
    freqs: Tensor
    phases: Tensor

    def __init__(self, w_dim: int, signal: Signal) -> None:
        super().__init__()
        self.signal = signal
        angle = torch.rand(signal.channels) * (2 * math.pi)
        radius = torch.rand(signal.channels).sqrt() * signal.cutoff  # uniform on the disc
        self.weight = nn.Parameter(torch.randn(signal.channels, signal.channels))
        self.affine = FullyConnectedLayer(w_dim, 4)
        with torch.no_grad():
            self.affine.weight.zero_()
            self.affine.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))  # neither rotation nor translation
        self.register_buffer("transform", torch.eye(3))
        self.register_buffer("freqs", torch.stack([angle.cos(), angle.sin()], 1) * radius[:, None])
        self.register_buffer("phases", torch.rand(signal.channels) - 0.5)

    def forward(self, w: Tensor) -> Tensor:
        """W (N, w_dim) -> (N, channels, size_px, size_px), float32 under autocast too."""
        channels, size_px, sampling_rate, cutoff, _ = self.signal
        with torch.autocast(w.device.type, enabled=False):
            transform = self._pose(w) @ self.transform  # (N, 3, 3), of coordinates: the inverse of what the image does
            freqs = self.freqs @ transform[:, :2, :2]  # (N, channels, 2)
            phases = self.phases + (self.freqs @ transform[:, :2, 2:]).squeeze(2)  # (N, channels)
            # Waves whose frequency a magnifying transform brings near half the sampling rate fade out.
            fading = (freqs.norm(dim=2) - cutoff) / (sampling_rate / 2 - cutoff)
            amplitudes = (1 - fading).clamp(0, 1)

            centres = torch.linspace(-1, 1, size_px, device=w.device) * (size_px - 1) / size_px
            position = centres * (0.5 * size_px / sampling_rate)  # of the pixels, in image widths
            x_cycles = position[:, None] * freqs[:, None, :, 0]  # (N, W, channels)
            y_cycles = position[:, None] * freqs[:, None, :, 1]  # (N, H, channels)
            cycles = x_cycles[:, None] + y_cycles[:, :, None] + phases[:, None, None]  # (N, H, W, channels)
            waves = (cycles * (2 * math.pi)).sin() * amplitudes[:, None, None]
            features = waves @ (self.weight / math.sqrt(channels)).t()
        return features.permute(0, 3, 1, 2)

    def _pose(self, w: Tensor) -> Tensor:
        """The transform that w asks for: translate, then rotate; (N, 3, 3)."""
        t = self.affine(w)  # (N, 4): cosine and sine up to their norm, translation
        cos, sin, x, y = (t / t[:, :2].norm(dim=1, keepdim=True)).unbind(1)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        rotation = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], 1)
        translation = torch.stack([one, zero, -x, zero, one, -y, zero, zero, one], 1)
        return rotation.view(-1, 3, 3) @ translation.view(-1, 3, 3)


class SynthesisLayer(nn.Module):
    """Modulated convolution and filtered leaky ReLU (section 3.2, figure 4b).

    Args:
        w_dim: Width of w.
        before: The input.
        after: The output.
        conv_kernel: Size of the convolution kernel.
        is_torgb: Neither demodulation nor nonlinearity.
        filter_size: Taps of the low-pass filters per sample of the lower rate.
        lrelu_upsampling: The nonlinearity works at this multiple of the larger sampling rate.
        use_radial_filter: Downsample with a radially symmetric filter.
        conv_clamp: Limit of the output of the nonlinearity.
        magnitude_ema_beta: Decay of the moving mean of the magnitude of the input.
        dtype: Of convolution and nonlinearity.
    """

    magnitude_ema: Tensor
    up_filter: Tensor | None
    down_filter: Tensor | None

    def __init__(
        self,
        w_dim: int,
        before: Signal,
        after: Signal,
        conv_kernel: int = 3,
        is_torgb: bool = False,
        filter_size: int = 6,
        lrelu_upsampling: int = 2,
        use_radial_filter: bool = False,
        conv_clamp: float | None = 256,
        magnitude_ema_beta: float = 0.999,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.is_torgb, self.conv_clamp, self.dtype = is_torgb, conv_clamp, dtype
        self.magnitude_ema_beta = magnitude_ema_beta
        self.affine = FullyConnectedLayer(w_dim, before.channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(after.channels, before.channels, conv_kernel, conv_kernel))
        self.bias = nn.Parameter(torch.zeros(after.channels))
        self.register_buffer("magnitude_ema", torch.ones([]))

        rate = max(before.sampling_rate, after.sampling_rate) * (1 if is_torgb else lrelu_upsampling)
        self.up, self.down = rate // before.sampling_rate, rate // after.sampling_rate
        up_taps, down_taps = (
            filter_size * factor if factor > 1 and not is_torgb else 1 for factor in (self.up, self.down)
        )
        self.register_buffer(
            "up_filter", design_lowpass_filter(up_taps, before.cutoff, before.half_width * 2, rate)
        )
        self.register_buffer(
            "down_filter", design_lowpass_filter(down_taps, after.cutoff, after.half_width * 2, rate, use_radial_filter)
        )
        # The upsampled signal is as long as the output and the filters need; what is odd goes to the front.
        needed = (after.size_px - 1) * self.down + 1 + up_taps + down_taps - 2
        total = needed - (before.size_px + conv_kernel - 1) * self.up
        first = (total + self.up) // 2
        self.padding = [first, total - first] * 2

    def forward(self, x: Tensor, w: Tensor, update_emas: MeanOverProcesses | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: (N, C_in, H, W).
            w: (N, w_dim).
            update_emas: As in :class:`SynthesisNetwork`.

        Returns:
            (N, C_out, H', W') in the dtype of the layer.
        """
        if update_emas is not None:
            with torch.no_grad():
                magnitude = update_emas(x.float().square().mean())
                self.magnitude_ema.copy_(magnitude.lerp(self.magnitude_ema, self.magnitude_ema_beta))
        styles = self.affine(w)  # (N, C_in)
        if self.is_torgb:
            styles = styles / math.sqrt(self.weight[0].numel())
        x = modulated_conv2d(
            fast_layout(x, self.dtype),
            self.weight,
            styles,
            bias=self.bias,
            demodulate=not self.is_torgb,
            padding=self.weight.shape[2] - 1,
            normalize=True,
            input_gain=self.magnitude_ema.rsqrt(),
        )
        return filtered_lrelu(
            x,
            self.up_filter,
            self.down_filter,
            None,
            self.up,
            self.down,
            self.padding,
            gain=1 if self.is_torgb else SQRT2,
            slope=1 if self.is_torgb else SLOPE,
            clamp=self.conv_clamp,
        )


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
        x = self.input(ws[:, 0])
        for index, name in enumerate(self.layer_names):
            x = self.get_submodule(name)(x, ws[:, index + 1], update_emas)
        return x.float() * self.output_scale


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
