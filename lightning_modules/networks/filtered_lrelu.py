"""Filtered leaky ReLU and the design of its low-pass filters.

Karras, Aittala, Laine, Härkönen, Hellsten, Lehtinen, Aila, "Alias-free generative adversarial networks" (StyleGAN 3),
NeurIPS 2021, arXiv 2106.12423, sections 2 and 3.1 and appendices B and C: a pointwise nonlinearity makes frequencies
above the limit of its sampling grid, so it is applied to an upsampled signal, which is then low-pass filtered and
downsampled.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lightning_modules.networks.operators import _margins as margins
from lightning_modules.networks.operators import upfirdn2d


def design_lowpass_filter(
    numtaps: int, cutoff: float, width: float, fs: float, radial: bool = False
) -> Tensor | None:
    """Kaiser-windowed low-pass filter with unit gain at zero frequency (appendix C).

    Args:
        numtaps: Number of taps; 1 is the identity.
        cutoff: Frequency of half amplitude, in the units of `fs`.
        width: Width of the transition band, in the units of `fs`.
        fs: Sampling rate of the filter.
        radial: Make a 2-D filter whose ideal response is a disc, radially symmetric up to the square window.

    Returns:
        (numtaps,), or (numtaps, numtaps) for a radial filter, float32; None for the identity.
    """
    if numtaps == 1:
        return None
    if not 0 < cutoff < fs / 2:
        raise ValueError(f"The cutoff of a low-pass filter lies between 0 and half of fs {fs}; got {cutoff}.")
    # Kaiser's formulas (Kaiser 1974): transition width -> attenuation in dB -> shape of the window.
    attenuation = 2.285 * (numtaps - 1) * math.pi * width / (fs / 2) + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    else:
        beta = 0.5842 * max(attenuation - 21, 0) ** 0.4 + 0.07886 * max(attenuation - 21, 0)
    window = torch.kaiser_window(numtaps, periodic=False, beta=beta, dtype=torch.float64)
    t = (torch.arange(numtaps, dtype=torch.float64) - (numtaps - 1) / 2) / fs  # (numtaps,)
    if radial:
        r = torch.hypot(t[:, None], t).clamp(min=1e-9 / fs)  # at 0 the jinc is its limit, up to rounding
        f = torch.special.bessel_j1(2 * math.pi * cutoff * r) / r * torch.outer(window, window)
    else:
        f = torch.sinc(2 * cutoff * t) * window
    return (f / f.sum()).float()


class _Geometry(NamedTuple):
    """What :func:`filtered_lrelu` does to each sample: y = D a(U x), with linear resamplings U and D."""

    up_filter: Tensor | None
    down_filter: Tensor | None
    up: int
    down: int
    rows: slice  # of the input that are used; negative padding drops the others
    columns: slice
    padding: tuple[int, int, int, int]  # of what is left
    slope: float
    clamp: float | None
    gain: float  # positive, and applied after the limit: then it can be a part of the filter
    flip_filter: bool

    def upsample(self, x: Tensor) -> Tensor:
        """U x."""
        return upfirdn2d(x, self.up_filter, self.up, 1, self.padding, self.flip_filter, self.up**2)

    def upsample_adjoint(self, g: Tensor) -> Tensor:
        """U^T g."""
        kh, kw = _taps(self.up_filter)
        px0, px1, py0, py1 = self.padding
        padding = kw - 1 - px0, kw - self.up - px1, kh - 1 - py0, kh - self.up - py1
        return upfirdn2d(g, self.up_filter, 1, self.up, padding, not self.flip_filter, self.up**2)

    def downsample(self, u: Tensor) -> Tensor:
        """D u."""
        return upfirdn2d(u, self.down_filter, 1, self.down, 0, self.flip_filter, self.gain)

    def downsample_adjoint(self, g: Tensor, size: Sequence[int]) -> Tensor:
        """D^T g; (H, W) of u."""
        kh, kw = _taps(self.down_filter)
        padding = kw - 1, size[1] - g.shape[3] * self.down, kh - 1, size[0] - g.shape[2] * self.down
        return upfirdn2d(g, self.down_filter, self.down, 1, padding, not self.flip_filter, self.gain)

    def activate(self, u: Tensor) -> Tensor:
        """a(u), in place."""
        u = F.leaky_relu_(u, self.slope)
        return u if self.clamp is None else u.clamp_(-self.clamp, self.clamp)

    def activate_gradient(self, g: Tensor, u: Tensor) -> Tensor:
        """a'(u) · g, in place of g."""
        torch.ops.aten.leaky_relu_backward.grad_input(g, u, self.slope, False, grad_input=g)
        if self.clamp is not None:
            low = -self.clamp / self.slope if self.slope else -math.inf
            torch.ops.aten.hardtanh_backward.grad_input(g, u, low, self.clamp, grad_input=g)
        return g


def _taps(f: Tensor | None) -> tuple[int, int]:
    """Height and width of a filter."""
    return (1, 1) if f is None else (f.shape[0], f.shape[-1])


_CHUNK_BYTES = 2**23  # of the upsampled signal on the CPU: what fits into the caches and what the allocator keeps


def _in_chunks(function: Callable[..., Tensor], geometry: _Geometry, *signals: Tensor) -> Tensor:
    """Apply `function` to a few samples at a time, so that no upsampled signal of a whole batch exists on the CPU."""
    if signals[0].device.type != "cpu":
        return function(geometry, *signals)
    x = signals[-1]
    step = max(1, _CHUNK_BYTES // (x[0].numel() * geometry.up**2 * x.element_size()))
    # Depthwise convolutions are many times faster in this memory format.
    chunks = zip(*(s.contiguous(memory_format=torch.channels_last).split(step) for s in signals), strict=True)
    results = [function(geometry, *chunk) for chunk in chunks]
    return results[0] if len(results) == 1 else torch.cat(results)


def _signal(geometry: _Geometry, x: Tensor) -> Tensor:
    u = geometry.upsample(x[:, :, geometry.rows, geometry.columns])
    return geometry.downsample(geometry.activate(u))


def _signal_tangent(geometry: _Geometry, v: Tensor, x: Tensor) -> Tensor:
    u, uv = (geometry.upsample(z[:, :, geometry.rows, geometry.columns]) for z in (x, v))
    return geometry.downsample(geometry.activate_gradient(uv, u))


def _signal_adjoint(geometry: _Geometry, g: Tensor, x: Tensor) -> Tensor:
    u = geometry.upsample(x[:, :, geometry.rows, geometry.columns])
    gu = geometry.activate_gradient(geometry.downsample_adjoint(g, u.shape[2:]), u)
    gx = torch.zeros_like(x)
    gx[:, :, geometry.rows, geometry.columns] = geometry.upsample_adjoint(gu)
    return gx


class _FilteredLeakyReLU(Function):
    """y = D a(U x). Only x is kept; U x is computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x)
        ctx.geometry = geometry
        return _in_chunks(_signal, geometry, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _adjoint(g, *ctx.saved_tensors, ctx.geometry), None


class _Adjoint(Function):
    """U^T (a'(U x) · D^T g): linear in g, and constant in x almost everywhere."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x)
        ctx.geometry = geometry
        return _in_chunks(_signal_adjoint, geometry, g, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return _tangent(v, *ctx.saved_tensors, ctx.geometry), None, None


class _Tangent(Function):
    """D (a'(U x) · U v): the adjoint of `_Adjoint`."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x)
        ctx.geometry = geometry
        return _in_chunks(_signal_tangent, geometry, v, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _adjoint(g, *ctx.saved_tensors, ctx.geometry), None, None


def _adjoint(g: Tensor, x: Tensor, geometry: _Geometry) -> Tensor:
    return cast(Tensor, _Adjoint.apply(g, x, geometry))  # type: ignore[no-untyped-call]


def _tangent(v: Tensor, x: Tensor, geometry: _Geometry) -> Tensor:
    return cast(Tensor, _Tangent.apply(v, x, geometry))  # type: ignore[no-untyped-call]


def _crop(size: int, before: int, after: int, up: int) -> tuple[slice, int, int]:
    """Samples that negative padding leaves, and the padding of these: an upsampled sample and then up - 1 zeros."""
    first, last = max(0, -(before // up)), max(0, -after) // up
    return slice(first, size - last), before + first * up, after + last * up


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
    """Add a bias, upsample, apply a leaky ReLU, downsample (section 3.1, figure 4b).

    Differentiable twice. The upsampled signal is neither kept nor made for more than a few samples at a time.

    Args:
        x: (N, C, H, W).
        fu: Filter of upsampling, 1-D (along both axes) or 2-D; None is the identity.
        fd: Filter of downsampling.
        b: Bias (C,).
        up: Integer factor.
        down: Integer factor.
        padding: Of the upsampled signal, as in :func:`upfirdn2d`; negative values crop.
        gain: Positive; multiplies the leaky ReLU.
        slope: Of the leaky ReLU for negative values, in [0, 1].
        clamp: Limit of the absolute value after the gain; None for none.
        flip_filter: False is a true convolution, True a correlation.

    Returns:
        (N, C, (H·up + pad_y - kh_up - kh_down + 1) // down + 1, and likewise W), in the dtype of x.
    """
    if gain <= 0:
        raise ValueError(f"The gain of a filtered leaky ReLU must be positive; got {gain}.")
    if b is not None:
        x = x + b.to(x.dtype)[:, None, None]
    px0, px1, py0, py1 = margins(padding)
    columns, px0, px1 = _crop(x.shape[3], px0, px1, up)
    rows, py0, py1 = _crop(x.shape[2], py0, py1, up)
    limit = None if clamp is None else clamp / gain
    geometry = _Geometry(fu, fd, up, down, rows, columns, (px0, px1, py0, py1), slope, limit, gain, flip_filter)
    with torch.autocast(x.device.type, enabled=False):  # the convolutions inside work in the dtype of x
        return cast(Tensor, _FilteredLeakyReLU.apply(x, geometry))  # type: ignore[no-untyped-call]
