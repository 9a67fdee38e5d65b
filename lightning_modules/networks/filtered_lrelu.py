"""Filtered leaky ReLU and the design of its low-pass filters.

Karras, Aittala, Laine, Härkönen, Hellsten, Lehtinen, Aila, "Alias-free generative adversarial networks" (StyleGAN 3),
NeurIPS 2021, arXiv 2106.12423, sections 2 and 3.1 and appendices B and C: a pointwise nonlinearity makes frequencies
above what its sampling grid can represent, so it is applied to an upsampled signal, which is then low-pass filtered and
downsampled.

No zeros are inserted and nothing is filtered that is thrown away: downsampling is a strided depthwise convolution,
upsampling a transposed one. Upsampled signals are made for a few samples at a time, and again for the gradient.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lightning_modules.networks import triton_filtered_lrelu

_CHUNK_BYTES = 2**23  # of an upsampled signal on the CPU: measured; more does not stay in the caches


def design_lowpass_filter(numtaps: int, cutoff: float, width: float, fs: float, radial: bool = False) -> Tensor | None:
    """Kaiser-windowed low-pass filter with unit gain at zero frequency (appendix C).

    Args:
        numtaps: Number of taps; 1 is the identity.
        cutoff: Frequency of half amplitude, in the units of `fs`.
        width: Width of the transition band, in the units of `fs`.
        fs: Sampling rate of the filter.
        radial: Make a 2-D filter whose ideal response is a disc: a jinc instead of a sinc.

    Returns:
        (numtaps,), or (numtaps, numtaps) for a radial filter, float32; None for the identity.
    """
    if numtaps == 1:
        return None
    if not 0 < cutoff < fs / 2:
        raise ValueError(f"The cutoff of a low-pass filter lies between 0 and half of fs={fs}; got {cutoff}.")
    # Kaiser's empirical formulas (1974): width of the transition -> attenuation in dB -> shape of the window.
    attenuation = 2.285 * (numtaps - 1) * math.pi * width / (fs / 2) + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    else:
        excess = max(attenuation - 21, 0)
        beta = 0.5842 * excess**0.4 + 0.07886 * excess
    window = torch.kaiser_window(numtaps, periodic=False, beta=beta, dtype=torch.float64)
    t = (torch.arange(numtaps, dtype=torch.float64) - (numtaps - 1) / 2) / fs  # (numtaps,)
    if radial:
        r = torch.hypot(t[:, None], t).clamp(min=1e-6 / fs)  # (numtaps, numtaps); the jinc is finite at 0
        f = torch.special.bessel_j1(2 * math.pi * cutoff * r) / r * torch.outer(window, window)
    else:
        f = torch.sinc(2 * cutoff * t) * window
    return cast(Tensor, (f / f.sum()).float())


class Resampling(NamedTuple):
    """Strided depthwise convolutions (`gather`) and their adjoint (`spread`): transposed ones with the same kernels.

    Attributes:
        kernels: (C, 1, kh, kw), applied one after the other: two for a separable filter.
        strides: (y, x) of each.
        paddings: (y, x) of each, at the higher rate.
    """

    kernels: list[Tensor]
    strides: list[tuple[int, int]]
    paddings: list[tuple[int, int]]

    def gather(self, x: Tensor) -> Tensor:
        """To the lower rate."""
        for kernel, stride, padding in zip(*self, strict=True):
            x = torch.conv2d(x, kernel, None, stride, padding, 1, x.shape[1])
        return x

    def spread(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """To the higher rate with `size` = (H, W); several sizes have the same lower one."""
        for kernel, stride, padding in zip(*self, strict=True):
            axes = zip(size, x.shape[2:], stride, kernel.shape[2:], padding, strict=True)
            extra = [n - (m - 1) * s - k + 2 * p if k * s > 1 else 0 for n, m, s, k, p in axes]
            x = torch.conv_transpose2d(x, kernel, None, stride, padding, extra, x.shape[1])
        return x


def _resampling(f: Tensor, factor: int, padding: tuple[int, int], gain: float, channels: int) -> Resampling:
    """`f` correlates in `gather` and convolves in `spread`; 1-D filters run along x, then along y."""
    if f.ndim == 2:
        filters, strides, paddings = [f * gain], [(factor, factor)], [padding]
    else:
        f = f * math.sqrt(gain)
        filters, strides, paddings = (
            [f[None], f[:, None]],
            [(1, factor), (factor, 1)],
            [(0, padding[1]), (padding[0], 0)],
        )
    return Resampling([f.repeat(channels, 1, 1, 1) for f in filters], strides, paddings)


def _alignment(before: int, after: int, up: int, taps: int) -> tuple[int, int, int]:
    """Express the padding of an upsampled signal by samples that are added before upsampling.

    Returns:
        Samples to add at the beginning and at the end (to drop, where negative), and the pixels that the transposed
        convolution of these samples must crop at both ends; at the end less, if the size of the result says so.
    """
    first, last = min(0, before // up), min(0, -(-after // up))  # a sample is followed by up - 1 zeros
    before, after = before - first * up, after - last * up
    more_first, more_last = max(0, -((after - before + up - 1) // up)), max(0, -((before - after) // up))
    before -= more_first * up
    both = max(0, -((taps - 1 - before) // up))
    return first + more_first + both, last + more_last + both, taps - 1 - before + both * up


class FilteredActivation(NamedTuple):
    """y = D a(U x) for signals of one size, with linear resamplings U, D and a leaky ReLU a; and its derivatives.

    These work on plain tensors, a few samples at a time, and not through autograd.
    """

    up: Resampling
    down: Resampling
    margins: list[int]  # samples to add to x: x before, x after, y before, y after; negative values drop
    size: tuple[int, int]  # (H, W) of U x
    slope: float
    limit: float | None  # of the absolute value of a

    def apply(self, x: Tensor) -> Tensor:
        """D a(U x)."""
        u = F.leaky_relu_(self._spread(x), self.slope)
        return self.down.gather(u if self.limit is None else u.clamp_(-self.limit, self.limit))

    def tangent(self, v: Tensor, x: Tensor) -> Tensor:
        """D (a'(U x) · U v)."""
        return self.down.gather(self._times_derivative(self._spread(v), x))

    def adjoint(self, g: Tensor, x: Tensor) -> Tensor:
        """U^T (a'(U x) · D^T g)."""
        gx = self.up.gather(self._times_derivative(self.down.spread(g, self.size), x))
        return F.pad(gx, [-m for m in self.margins]) if any(self.margins) else gx

    def for_signal(self, x: Tensor) -> "FilteredActivation":
        """Without the limit if U x cannot reach it: that is quickly seen on the CPU and saves passes over U x."""
        if self.limit is None or x.device.type != "cpu":
            return self
        low, high = x.permute(0, 2, 3, 1).aminmax()  # in the order of the memory
        largest = max(-float(low), float(high)) * math.prod(float(k[0].abs().sum()) for k in self.up.kernels)
        return self._replace(limit=None) if largest < self.limit else self

    def samples_at_a_time(self, x: Tensor) -> int:
        """So few on the CPU that the upsampled signals of (N, C, H, W) stay in the caches; elsewhere all."""
        if x.device.type != "cpu":
            return len(x)
        values = len(self.up.kernels[0]) * math.prod(self.size)
        return max(1, _CHUNK_BYTES // (values * x.element_size()))

    def _spread(self, x: Tensor) -> Tensor:
        return self.up.spread(F.pad(x, self.margins) if any(self.margins) else x, self.size)

    def _times_derivative(self, g: Tensor, x: Tensor) -> Tensor:
        """a'(U x) · g, in place of g."""
        u = self._spread(x)
        torch.ops.aten.leaky_relu_backward.grad_input(g, u, self.slope, False, grad_input=g)
        if self.limit is not None:
            lowest = -self.limit / self.slope if self.slope else -math.inf
            torch.ops.aten.hardtanh_backward.grad_input(g, u, lowest, self.limit, grad_input=g)
        return g


def filtered_activation(
    shape: Sequence[int],
    like: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    up: int,
    down: int,
    padding: Sequence[int],
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool = False,
) -> FilteredActivation:
    """The operator of :func:`filtered_lrelu`, without bias, for signals of `shape` (C, H, W) in the dtype of `like`."""
    if gain <= 0:  # a positive one commutes with the leaky ReLU and becomes a part of the last filter
        raise ValueError(f"The gain of a filtered leaky ReLU must be positive; got {gain}.")
    fu, fd = (like.new_ones(1, 1) if f is None else f.to(like.dtype) for f in (fu, fd))
    fu, fd = (fu.flip(list(range(fu.ndim))), fd) if flip_filter else (fu, fd.flip(list(range(fd.ndim))))
    channels, height, width = shape
    px0, px1, py0, py1 = padding
    left, right, crop_x = _alignment(px0, px1, up, fu.shape[-1])
    top, bottom, crop_y = _alignment(py0, py1, up, fu.shape[0])
    size = height * up + py0 + py1 - fu.shape[0] + 1, width * up + px0 + px1 - fu.shape[-1] + 1
    if size[0] < fd.shape[0] or size[1] < fd.shape[-1]:
        raise ValueError(f"Signals of {height}×{width} with padding {list(padding)} are shorter than the filters.")
    return FilteredActivation(
        _resampling(fu, up, (crop_y, crop_x), up**2, channels),
        _resampling(fd, down, (0, 0), gain, channels),
        [left, right, top, bottom],
        size,
        slope,
        None if clamp is None else clamp / gain,
    )


def together(results: Iterable[Tensor], n: int) -> Tensor:
    """The parts of a batch of `n` samples as one tensor; each is copied as soon as it is made, from the caches."""
    whole, first = None, 0
    for part in results:
        if len(part) == n:
            return part
        if whole is None:
            size = (n, *part.shape[1:])
            whole = torch.empty(size, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
        whole[first : first + len(part)] = part
        first += len(part)
    return cast(Tensor, whole)


_Method = Callable[..., Tensor]  # of FilteredActivation


def _in_parts(method: _Method, activation: FilteredActivation, *signals: Tensor) -> Tensor:
    """`method` on a few samples at a time, on the CPU in the memory format that depthwise convolutions like best."""
    if signals[0].device.type == "cpu":
        signals = tuple(signal.contiguous(memory_format=torch.channels_last) for signal in signals)
    step = activation.samples_at_a_time(signals[0])
    parts = zip(*(torch.split(signal, step) for signal in signals), strict=True)
    return together((method(activation.for_signal(part[-1]), *part) for part in parts), len(signals[0]))


class _FilteredLeakyReLU(Function):
    """D a(U x). Only x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: FilteredActivation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return _in_parts(FilteredActivation.apply, activation, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _adjoint(g, x, ctx.activation), None


class _Adjoint(Function):
    """Linear in g, and constant in x almost everywhere."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, activation: FilteredActivation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return _in_parts(FilteredActivation.adjoint, activation, g, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _tangent(v, x, ctx.activation), None, None


class _Tangent(Function):
    """Linear in v, and constant in x almost everywhere."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor, activation: FilteredActivation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return _in_parts(FilteredActivation.tangent, activation, v, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _adjoint(g, x, ctx.activation), None, None


def _adjoint(g: Tensor, x: Tensor, activation: FilteredActivation) -> Tensor:
    return cast(Tensor, _Adjoint.apply(g, x, activation))  # type: ignore[no-untyped-call]


def _tangent(v: Tensor, x: Tensor, activation: FilteredActivation) -> Tensor:
    return cast(Tensor, _Tangent.apply(v, x, activation))  # type: ignore[no-untyped-call]


def activate(x: Tensor, activation: FilteredActivation) -> Tensor:
    """Apply an activation to (N, C, H, W); differentiable twice."""
    if torch.compiler.is_exporting():  # a graph for any batch: nothing may be done by parts or depend on values
        return activation.apply(x)
    with torch.autocast(x.device.type, enabled=False):  # the convolutions inside work in the dtype of x
        return cast(Tensor, _FilteredLeakyReLU.apply(x, activation))  # type: ignore[no-untyped-call]


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """Add a bias, upsample, apply a leaky ReLU, downsample (section 3.1, figure 4b). Differentiable twice.

    Args:
        x: (N, C, H, W).
        fu: Filter of upsampling, 1-D (along both axes) or 2-D; None is the identity.
        fd: Filter of downsampling.
        b: Bias (C,).
        up: Integer factor.
        down: Integer factor.
        padding: Of the upsampled signal: one number, (x, y) or (x before, x after, y before, y after); negative values
            crop.
        gain: Positive; multiplies the leaky ReLU.
        slope: Of the leaky ReLU for negative values, in [0, 1].
        clamp: Limit of the absolute value after the gain; None for none.
        flip_filter: False is a true convolution, True a correlation.

    Returns:
        (N, C, (H·up + pad_y - kh_up - kh_down + 1) // down + 1, and likewise W), in the dtype of x.
    """
    p = [padding] * 4 if isinstance(padding, int) else list(padding)
    p = p if len(p) == 4 else [p[0], p[0], p[1], p[1]]
    x = x if b is None else x + b.to(x.dtype)[:, None, None]

    def plain(x: Tensor) -> Tensor:
        return activate(x, filtered_activation(x.shape[1:], x, fu, fd, up, down, p, gain, slope, clamp, flip_filter))

    return triton_filtered_lrelu.filtered_lrelu(plain, x, fu, fd, up, down, p, gain, slope, clamp, flip_filter)
