"""Layers of the StyleGAN 3 generator: Fourier input, and modulated convolution with filtered leaky ReLU.

Karras, Aittala, Laine, Härkönen, Hellsten, Lehtinen, Aila, "Alias-free generative adversarial networks", NeurIPS 2021,
arXiv 2106.12423, section 3 and appendices. Parameters and buffers have the names of the published checkpoints.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.networks.filtered_convolution import FilteredConvolution, filtered_convolution
from lightning_modules.networks.filtered_lrelu import (
    FilteredActivation,
    design_lowpass_filter,
    filtered_activation,
    filtered_lrelu,
)
from lightning_modules.networks.layers import SLOPE, SQRT2, FullyConnectedLayer, fast_layout
from lightning_modules.networks.operators import demodulation, modulated_conv2d

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


class SynthesisInput(nn.Module):
    """Fourier features on a canvas that is rotated and translated as w says (section 3.2 and appendix F).

    The buffer `transform` (3, 3) is a transform of coordinates besides, which the user may set: the inverse of what the
    image is to undergo.

    Args:
        w_dim: Width of w.
        signal: The output; its cutoff is the largest of the frequencies.
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
        """(N, w_dim) -> (N, channels, size_px, size_px), float32 under autocast too."""
        channels, size_px, sampling_rate, cutoff, _ = self.signal
        # The layers amplify rounding, so every step is taken in the order of the original.
        with torch.autocast(w.device.type, enabled=False):
            transform = self._pose(w) @ self.transform  # (N, 3, 3)
            freqs = self.freqs @ transform[:, :2, :2]  # (N, channels, 2)
            phases = self.phases + (self.freqs @ transform[:, :2, 2:]).squeeze(2)  # (N, channels)
            # A transform that shrinks the image raises frequencies: they fade out on the way to aliasing.
            fading = (freqs.norm(dim=2) - cutoff) / (sampling_rate / 2 - cutoff)
            amplitudes = (1 - fading).clamp(0, 1)

            centres = torch.linspace(-1, 1, size_px, device=w.device) * (size_px - 1) / size_px
            position = centres * (0.5 * size_px / sampling_rate)  # of the pixels, in image widths
            x_cycles = position[:, None] * freqs[:, None, :, 0]  # (N, W, channels)
            y_cycles = position[:, None] * freqs[:, None, :, 1]  # (N, H, channels)
            cycles = x_cycles[:, None] + y_cycles[:, :, None] + phases[:, None, None]  # (N, H, W, channels)
            waves = (cycles * (2 * math.pi)).sin() * amplitudes[:, None, None]
            features: Tensor = waves @ (self.weight / math.sqrt(channels)).t()
        return features.permute(0, 3, 1, 2)

    def _pose(self, w: Tensor) -> Tensor:
        """The transform of coordinates that w asks for: translate, then rotate; (N, 3, 3)."""
        t = self.affine(w)  # (N, 4): cosine, sine and translation, all times one factor
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
        conv_clamp: Limit of the output of the nonlinearity; None for none.
        magnitude_ema_beta: Decay of the moving mean of the magnitude of the input.
        dtype: Of convolution and nonlinearity, outside autocast.
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
        factors = self.up, self.down
        up_taps, down_taps = (filter_size * f if f > 1 and not is_torgb else 1 for f in factors)
        up_filter = design_lowpass_filter(up_taps, before.cutoff, before.half_width * 2, rate)
        down_filter = design_lowpass_filter(down_taps, after.cutoff, after.half_width * 2, rate, use_radial_filter)
        self.register_buffer("up_filter", up_filter)
        self.register_buffer("down_filter", down_filter)
        # The upsampled signal is as long as the output and the filters need; of an odd rest more goes to the front.
        needed = (after.size_px - 1) * self.down + 1 + up_taps + down_taps - 2
        rest = needed - (before.size_px + conv_kernel - 1) * self.up
        first = (rest + self.up) // 2
        self.padding = first, rest - first  # of the upsampled signal, on both axes

    def forward(self, parts: Sequence[Tensor], w: Tensor, update_emas: MeanOverProcesses | None = None) -> list[Tensor]:
        """Run the layer on a batch that comes, and goes, in parts: on the CPU in such as stay in the caches.

        Args:
            parts: (n, C_in, H, W), together N samples.
            w: (N, w_dim).
            update_emas: As in :class:`lightning_modules.networks.stylegan3.SynthesisNetwork`.

        Returns:
            Parts (n', C_out, H', W') in the dtype of the layer, or of autocast.
        """
        if update_emas is not None:
            with torch.no_grad():
                energy = torch.stack([x.float().square().sum() for x in parts]).sum()
                magnitude = update_emas(energy / sum(x.numel() for x in parts))
                self.magnitude_ema.copy_(magnitude.lerp(self.magnitude_ema, self.magnitude_ema_beta))
        device = w.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
        parts = [fast_layout(x, dtype) for x in parts]
        styles = self.affine(w)  # (N, C_in)
        if self.is_torgb:
            styles = styles / math.sqrt(self.weight[0].numel())
        input_gain = self.magnitude_ema.rsqrt()
        if self._by_sample(parts[0]):
            return self._filtered_convolutions(parts, styles, input_gain)
        x = modulated_conv2d(
            parts[0] if len(parts) == 1 else torch.cat(parts),
            self.weight,
            styles,
            bias=self.bias,
            demodulate=not self.is_torgb,
            padding=self.weight.shape[2] - 1,
            normalize=True,
            input_gain=input_gain,
        )
        return [
            filtered_lrelu(
                x,
                self.up_filter,
                self.down_filter,
                None,
                self.up,
                self.down,
                [*self.padding, *self.padding],
                1.0 if self.is_torgb else SQRT2,
                1.0 if self.is_torgb else SLOPE,
                self.conv_clamp,
            )
        ]

    def _by_sample(self, x: Tensor) -> bool:
        """Whether to modulate the weights instead of the features: on the CPU, if there are fewer of them."""
        return x.device.type == "cpu" and self.weight.numel() < x[0].numel() and not torch.compiler.is_exporting()

    def _activation(self, like: Tensor, size_px: int, first: int, last: int) -> FilteredActivation:
        """Of signals with `size_px` pixels a side and this padding on both axes."""
        return filtered_activation(
            (self.weight.shape[0], size_px, size_px),
            like,
            self.up_filter,
            self.down_filter,
            self.up,
            self.down,
            (first, last, first, last),
            1.0 if self.is_torgb else SQRT2,
            1.0 if self.is_torgb else SLOPE,
            self.conv_clamp,
        )

    def _filtered_convolutions(self, parts: list[Tensor], styles: Tensor, input_gain: Tensor) -> list[Tensor]:
        """The same as `modulated_conv2d` and `activate`."""
        weight: Tensor = self.weight
        if not self.is_torgb:
            weight = weight * weight.square().mean((1, 2, 3), keepdim=True).rsqrt()
            styles = styles * styles.square().mean().rsqrt()
        scale = (styles * input_gain)[:, None]  # (N, 1, C_in)
        if not self.is_torgb:
            scale = scale * demodulation(weight, styles)[:, :, None]  # (N, C_out, C_in)
        weights = (weight * scale[..., None, None]).to(parts[0].dtype)  # (N, C_out, C_in, k, k)
        weights = weights.flatten(0, 1).contiguous(memory_format=torch.channels_last).view_as(weights)
        # What the upsampled signal drops at both ends is not even convolved.
        first, last = self.padding
        crop = max(0, min(-(first // self.up), -last // self.up))
        margin = weight.shape[2] - 1 - crop  # zeros around the input; where negative, samples that are cut off
        size_px = parts[0].shape[2] + 2 * margin - (weight.shape[2] - 1)
        activation = self._activation(parts[0], size_px, first + crop * self.up, last + crop * self.up)
        layer = FilteredConvolution(activation, max(margin, 0), max(-margin, 0))

        n = activation.samples_at_a_time(parts[0])
        parts = [piece for x in parts for piece in (torch.split(x, n) if len(x) > n else [x])]
        each = zip(parts, torch.split(weights, [len(x) for x in parts]), strict=True)
        bias = self.bias.to(weights.dtype)
        return [filtered_convolution(x, w, bias, layer) for x, w in each]
