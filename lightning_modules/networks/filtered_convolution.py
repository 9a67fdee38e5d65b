"""Convolution and filtered leaky ReLU in one, for the CPU.

StyleGAN 3 (Karras et al. 2021, NeurIPS, arXiv 2106.12423, section 3.2 and figure 4b) upsamples the result of every
convolution, and most of the time goes into moving these signals through the memory. Here a few samples run through
convolution, bias and filtered leaky ReLU while they are in the caches, and the gradient goes back likewise. What is
kept for the gradient is the input and the result of the convolution.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_modules.networks.convolutions import conv2d
from lightning_modules.networks.filtered_lrelu import FilteredActivation, activate, together


class FilteredConvolution(NamedTuple):
    """What happens to each sample.

    Attributes:
        activation: After the convolution.
        padding: Zeros around the input.
        crop: Samples that are cut off each side of the input before.
    """

    activation: FilteredActivation
    padding: int
    crop: int

    def inner(self, x: Tensor) -> Tensor:
        """The part of x that is used."""
        return x[:, :, self.crop : x.shape[2] - self.crop, self.crop : x.shape[3] - self.crop]

    def convolve(self, x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        """(n, C_in, H, W), (n, C_out, C_in, k, k), (C_out,) -> (n, C_out, H', W')."""
        x = self.inner(x)
        if weights.shape[-1] == 1:
            return _image(torch.baddbmm(bias, _matrix(x), weights.flatten(2).mT), x.shape[2:])
        samples = zip(torch.split(x, 1), weights, strict=True)
        return together((torch.conv2d(sample, w, bias, 1, self.padding) for sample, w in samples), len(x))

    def gradients(self, g: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `convolve` with respect to x and weights."""
        inner = self.inner(x).contiguous(memory_format=torch.channels_last)
        if weights.shape[-1] == 1:
            gx = _image(_matrix(g) @ weights.flatten(2), inner.shape[2:])
            gw = (_matrix(g).mT @ _matrix(inner))[..., None, None]
        else:
            samples = zip(torch.split(g, 1), torch.split(inner, 1), weights, strict=True)
            gxs, gws = zip(*(_convolution_gradients(*sample, self.padding) for sample in samples), strict=True)
            gx, gw = together(gxs, len(x)), torch.stack(gws)
        if self.crop == 0:
            return gx, gw
        whole = torch.zeros_like(x)
        self.inner(whole).copy_(gx)
        return whole, gw


def _matrix(x: Tensor) -> Tensor:
    """(n, C, H, W), channels last in memory -> (n, H·W, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(x: Tensor, size: torch.Size) -> Tensor:
    """(n, H·W, C) -> (n, C, H, W), channels last in memory."""
    return x.view(len(x), *size, -1).permute(0, 3, 1, 2)


def _convolution_gradients(g: Tensor, x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """As `FilteredConvolution.gradients` for one sample, weight (C_out, C_in, k, k)."""
    backward = torch.ops.aten.convolution_backward
    p, mirrored = [padding] * 2, [weight.shape[-1] - 1 - padding] * 2
    rest = [1, 1], False, [0, 0], 1
    gx: Tensor = backward(g, x, weight, None, [1, 1], p, *rest, [True, False, False])[0]
    if 2 * padding < weight.shape[-1]:
        gw: Tensor = backward(g, x, weight, None, [1, 1], p, *rest, [False, True, False])[1]
        return gx, gw
    # With this much padding, exchanging the roles of x and g is three times as fast.
    gw = backward(x, g, weight.transpose(0, 1), None, [1, 1], mirrored, *rest, [False, True, False])[1]
    return gx, gw.transpose(0, 1).flip((2, 3))


def _twice_differentiable(x: Tensor, weights: Tensor, bias: Tensor, layer: FilteredConvolution) -> Tensor:
    """The same from operators that are; the samples are groups of channels."""
    n, channels = weights.shape[:2]
    groups = layer.inner(x).reshape(1, n * x.shape[1], *layer.inner(x).shape[2:])
    z = conv2d(groups, weights.flatten(0, 1), None, padding=(layer.padding, layer.padding), groups=n)
    return activate(z.view(n, channels, *z.shape[2:]) + bias[:, None, None], layer.activation)


class _FilteredConvolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, bias: Tensor, layer: FilteredConvolution) -> Tensor:
        z = layer.convolve(x, weights, bias)
        ctx.save_for_backward(x, weights, bias, z)
        activation = layer.activation.for_signal(z)
        ctx.layer = layer._replace(activation=activation)
        return activation.apply(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weights, bias, z = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may follow
            y = _twice_differentiable(x, weights, bias, ctx.layer)
            return *torch.autograd.grad(y, (x, weights, bias), g, create_graph=True), None
        gz = ctx.layer.activation.adjoint(g.contiguous(memory_format=torch.channels_last), z)
        return *ctx.layer.gradients(gz, x, weights), gz.sum((0, 2, 3)), None


def filtered_convolution(x: Tensor, weights: Tensor, bias: Tensor, layer: FilteredConvolution) -> Tensor:
    """Convolve each sample with weights of its own, add a bias, apply a filtered leaky ReLU. Differentiable twice.

    Args:
        x: (N, C_in, H, W) on the CPU.
        weights: (N, C_out, C_in, k, k), applied as a correlation.
        bias: (C_out,).
        layer: Crop, padding and activation.

    Returns:
        (N, C_out, H', W'), channels last in memory.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", enabled=False):
        return cast(Tensor, _FilteredConvolution.apply(x, weights, bias, layer))  # type: ignore[no-untyped-call]
