"""Filtered leaky ReLU, alone and after a convolution, against zero insertion; filters against scipy."""

import math

import numpy as np
import pytest
import scipy.signal
import scipy.special
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.networks import filtered_lrelu as module
from lightning_modules.networks.filtered_convolution import FilteredConvolution, filtered_convolution
from lightning_modules.networks.filtered_lrelu import design_lowpass_filter, filtered_activation, filtered_lrelu

# Zero insertion: what the operator is defined as.


def filtered(x: Tensor, f: Tensor | None, flip: bool, gain: float) -> Tensor:
    f = x.new_ones(1, 1) if f is None else f.to(x)
    f = (torch.outer(f, f) if f.ndim == 1 else f) * gain
    f = f if flip else f.flip((0, 1))
    return F.conv2d(x, f.expand(x.shape[1], 1, *f.shape), groups=x.shape[1])


def by_zero_insertion(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip):
    x = x if b is None else x + b[:, None, None]
    n, c, h, w = x.shape
    u = x.new_zeros(n, c, h * up, w * up)
    u[:, :, ::up, ::up] = x
    u = filtered(F.pad(u, padding), fu, flip, up**2)
    u = torch.where(u > 0, u, slope * u) * gain
    u = u if clamp is None else u.clamp(-clamp, clamp)
    return filtered(u, fd, flip, 1)[:, :, ::down, ::down]


def taps(*shape: int) -> Tensor:
    """Without any symmetry, so that a wrong orientation shows."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.1


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


CASES = {
    "as in a layer": (taps(12), taps(12), 2, 2, [9, 8, 9, 8], False),
    "up by 4": (taps(24), taps(12), 4, 2, [-2, -5, -2, -5], False),
    "critical, cropped": (taps(12), taps(12), 2, 2, [-9, -10, -9, -10], False),
    "2-D filters": (taps(5, 4), taps(6, 3), 2, 2, [4, 3, 2, 5], False),
    "correlation": (taps(5, 4), taps(7), 2, 3, [4, 3, 2, 5], True),
    "long padding": (taps(3), None, 3, 1, [11, 2, 0, 13], False),
    "no filters": (None, None, 2, 1, [1, -3, -1, 2], False),
    "no upsampling": (taps(4), taps(2), 1, 2, [3, 0, 0, 3], False),
    "decimation only": (None, None, 1, 3, [-1, 0, 2, -2], False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("gain", "slope", "clamp"), [(math.sqrt(2), 0.2, None), (0.7, 0.0, 0.5), (1.0, 1.0, 2.0)])
def test_equals_zero_insertion_with_gradients(case, gain, slope, clamp):
    fu, fd, up, down, padding, flip = case
    torch.manual_seed(1)
    x, b = torch.randn(3, 2, 21, 23, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    inputs = x.requires_grad_(), b.requires_grad_()
    y = filtered_lrelu(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip)
    expected = by_zero_insertion(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip)
    close(y, expected)
    g = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("clamp", [None, 0.6])
def test_first_and_second_derivatives_equal_finite_differences(clamp):
    torch.manual_seed(2)
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def operator(x: Tensor, b: Tensor) -> Tensor:
        return filtered_lrelu(x, taps(4), taps(6), b, 2, 2, [2, 1, -1, 2], 1.3, 0.2, clamp)

    # A smooth function of the piecewise linear operator has second derivatives that do not vanish.
    assert torch.autograd.gradcheck(lambda x, b: operator(x, b).square(), (x, b))
    assert torch.autograd.gradgradcheck(lambda x, b: operator(x, b).square(), (x, b))


def test_signals_in_parts_and_in_any_memory_format_give_the_same(monkeypatch):
    x = torch.randn(5, 3, 9, 9, requires_grad=True)
    results = []
    for size, layout in ((2**30, torch.contiguous_format), (2**30, torch.channels_last), (1, torch.channels_last)):
        monkeypatch.setattr(module, "_CHUNK_BYTES", size)
        y = filtered_lrelu(x.contiguous(memory_format=layout), taps(4), taps(4), None, 2, 2, 2, clamp=0.8)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for result in results[1:]:
        for ours, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, expected)


def test_only_the_input_is_kept_for_the_gradient():
    x = torch.randn(4, 8, 32, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        filtered_lrelu(x, taps(12), taps(12), None, 2, 2, 10)
    assert kept == [x.numel()]


def test_the_limit_is_only_left_out_where_it_cannot_be_reached():
    f = design_lowpass_filter(12, 3, 5, 32)
    x = torch.randn(2, 3, 10, 10)
    for clamp in (0.1, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0):
        activation = filtered_activation(x.shape[1:], x, f, f, 2, 2, [9, 8, 9, 8], 1.0, 0.2, clamp)
        reached = activation._spread(x).abs().max() >= clamp
        assert activation.for_signal(x).limit is not None or not reached
    assert activation.for_signal(x).limit is None
    assert activation.for_signal(x * math.nan).limit is not None


def test_the_dtype_of_the_signal_is_kept_under_autocast_too():
    x = torch.randn(2, 3, 8, 8)
    expected = filtered_lrelu(x, taps(12), taps(12), None, 2, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(filtered_lrelu(x, taps(12), taps(12), None, 2, 2, 8), expected)
    assert filtered_lrelu(x.bfloat16(), taps(12), taps(12), None, 2, 2, 8).dtype == torch.bfloat16


def test_a_gain_that_does_not_commute_and_too_short_signals_are_refused():
    with pytest.raises(ValueError, match=r"gain .* must be positive; got -1"):
        filtered_lrelu(torch.zeros(1, 1, 4, 4), gain=-1.0)
    with pytest.raises(ValueError, match=r"4×5 with padding \[0, 0, 0, 0\] are shorter than the filters"):
        filtered_lrelu(torch.zeros(1, 1, 4, 5), fd=taps(5))


# After a convolution


def convolved(x, weights, bias, layer_args, padding, crop):
    """One sample after the other, by zero insertion."""
    x = x[:, :, crop : x.shape[2] - crop, crop : x.shape[3] - crop]
    z = torch.cat([F.conv2d(s[None], w, bias, padding=padding) for s, w in zip(x, weights, strict=True)])
    return by_zero_insertion(z, *layer_args)


@pytest.mark.parametrize(
    ("kernel", "padding", "crop"), [(3, 2, 0), (3, 1, 0), (3, 0, 0), (3, 0, 2), (1, 0, 0), (1, 0, 1)]
)
def test_convolution_and_activation_equal_one_after_the_other(kernel, padding, crop):
    torch.manual_seed(3)
    x = torch.randn(5, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 4, 3, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    size = 9 - 2 * crop + 2 * padding - kernel + 1
    fu, fd, margins, clamp = taps(6), taps(4), [4, 3, 4, 3], 9.0
    activation = filtered_activation((4, size, size), x, fu, fd, 2, 2, margins, 1.4, 0.2, clamp)
    y = filtered_convolution(x, weights, bias, FilteredConvolution(activation, padding, crop))
    arguments = (fu, fd, None, 2, 2, margins, 1.4, 0.2, clamp, False)
    expected = convolved(x, weights, bias, arguments, padding, crop)
    close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    inputs, g = (x, weights, bias), torch.randn_like(y)
    once = torch.autograd.grad(y, inputs, g, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, g, create_graph=True)
    for ours, other in zip(once, theirs, strict=True):
        close(ours, other)
    twice = torch.autograd.grad(y, inputs, g, create_graph=True)
    scalars = [sum((a * a.detach().cos()).sum() for a in first) for first in (twice, theirs)]
    for ours, other in zip(*(torch.autograd.grad(scalar, (x, weights)) for scalar in scalars), strict=True):
        close(ours, other)


def test_convolution_and_activation_keep_nothing_upsampled():
    x, weights = torch.randn(4, 8, 32, 32, requires_grad=True), torch.randn(4, 6, 8, 3, 3, requires_grad=True)
    activation = filtered_activation((6, 34, 34), x, taps(12), taps(12), 2, 2, [9, 8, 9, 8], 1.0, 0.2, None)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        filtered_convolution(x, weights, torch.zeros(6), FilteredConvolution(activation, 2, 0))
    assert sum(kept) <= x.numel() + 4 * 6 * 34 * 34 + 2 * weights.numel() + 6


# Filters


@pytest.mark.parametrize(("numtaps", "cutoff", "width", "fs"), [(12, 2, 12, 32), (24, 4, 8, 64), (11, 3.3, 2, 16)])
def test_separable_filters_equal_those_of_scipy(numtaps, cutoff, width, fs):
    f = design_lowpass_filter(numtaps, cutoff, width, fs)
    expected = scipy.signal.firwin(numtaps, cutoff, width=width, fs=fs)
    np.testing.assert_allclose(f.numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("numtaps", "cutoff", "width", "fs"), [(12, 2, 12, 32), (24, 4, 8, 64), (11, 3.3, 2, 16)])
def test_radial_filters_are_windowed_transforms_of_a_disc(numtaps, cutoff, width, fs):
    f = design_lowpass_filter(numtaps, cutoff, width, fs, radial=True).double().numpy()
    beta = scipy.signal.kaiser_beta(scipy.signal.kaiser_atten(numtaps, width / (fs / 2)))
    window = np.kaiser(numtaps, beta)
    # Numerically: the plane waves of all directions and frequencies below the cutoff, summed up.
    angle = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    radius = (np.arange(400) + 0.5) / 400 * cutoff
    t = (np.arange(numtaps) - (numtaps - 1) / 2) / fs
    along_x, along_y = (np.outer(t, np.outer(radius, way(angle)).ravel()) for way in (np.cos, np.sin))
    weight = np.repeat(radius, len(angle))
    disc = (np.cos(2 * np.pi * along_y) * weight) @ np.cos(2 * np.pi * along_x).T
    disc -= (np.sin(2 * np.pi * along_y) * weight) @ np.sin(2 * np.pi * along_x).T
    expected = disc * np.outer(window, window)
    np.testing.assert_allclose(f, expected / expected.sum(), rtol=1e-4, atol=1e-5 * f.max())


def test_one_tap_is_the_identity_and_impossible_cutoffs_are_refused():
    assert design_lowpass_filter(1, 2, 4, 32) is None
    with pytest.raises(ValueError, match=r"between 0 and half of fs=32; got 16"):
        design_lowpass_filter(12, 16, 4, 32)
