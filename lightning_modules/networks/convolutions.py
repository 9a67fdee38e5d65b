"""Two-dimensional convolutions whose second derivatives are fast.

R1 and path-length regularization differentiate gradients. PyTorch's own second derivative of a convolution loops over
groups and convolves with image-sized kernels: on the CPU 2 times (dense) to 9 times (depthwise) slower than needed. A
convolution is one of the three partial derivatives of the trilinear form

    T(g, x, w) = sum_{n,o,i,p,k} g[n,o,p] x[n,i,s·p+k] w[o,i,k],

with respect to g (`_Convolution`), x (`_InputGradient`, a transposed convolution) and w (`_WeightGradient`). The
derivatives of each are the other two, so every order of differentiation runs on the three fast kernels.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def _wanted(ctx: Any, index: int) -> bool:
    """Whether the running backward pass uses the gradient of input `index`.

    `needs_input_grad` of a Python function is fixed at the forward pass. R1 asks for the gradient of the images alone,
    so without this question every layer would compute a weight gradient that is thrown away.
    """
    if not ctx.needs_input_grad[index]:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(ctx.next_functions[index][0]))
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True


_Geometry = tuple[tuple[int, int], tuple[int, int], int]  # stride (y, x), padding (y, x), groups


class _Convolution(Function):
    """y = dT/dg: cross-correlation of images with kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        stride, padding, groups = geometry
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gx = _input_gradient(g, weight, x.shape[2:], ctx.geometry) if _wanted(ctx, 0) else None
        gw = _weight_gradient(g, x, weight.shape, ctx.geometry) if _wanted(ctx, 1) else None
        gb = g.sum((0, 2, 3)) if ctx.needs_input_grad[2] and _wanted(ctx, 2) else None
        return gx, gw, gb, None


class _InputGradient(Function):
    """dT/dx: transposed convolution; `size` is that of x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, size: Sequence[int], geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.geometry = geometry
        stride, padding, groups = geometry
        # Several sizes of x give the same size of g; the difference is PyTorch's output_padding, in [0, stride).
        extra = [size[i] - ((g.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + weight.shape[2 + i]) for i in (0, 1)]
        return F.conv_transpose2d(g, weight, None, stride, padding, extra, groups)

    @staticmethod
    def backward(ctx: Any, gx: Tensor) -> Any:
        g, weight = ctx.saved_tensors
        gg = _convolution(gx, weight, None, ctx.geometry) if _wanted(ctx, 0) else None
        gw = _weight_gradient(g, gx, weight.shape, ctx.geometry) if _wanted(ctx, 1) else None
        return gg, gw, None, None


class _WeightGradient(Function):
    """dT/dw."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, shape: Sequence[int], geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.geometry = geometry
        stride, padding, groups = geometry
        kernel = g.new_empty(list(shape))  # only its shape is read
        mask = [False, True, False]
        grads = torch.ops.aten.convolution_backward(
            g, x, kernel, None, stride, padding, (1, 1), False, (0, 0), groups, mask
        )
        return cast(Tensor, grads[1])

    @staticmethod
    def backward(ctx: Any, gw: Tensor) -> Any:
        g, x = ctx.saved_tensors
        gg = _convolution(x, gw, None, ctx.geometry) if _wanted(ctx, 0) else None
        gx = _input_gradient(g, gw, x.shape[2:], ctx.geometry) if _wanted(ctx, 1) else None
        return gg, gx, None, None


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    return cast(Tensor, _Convolution.apply(x, weight, bias, geometry))  # type: ignore[no-untyped-call]


def _input_gradient(g: Tensor, weight: Tensor, size: Sequence[int], geometry: _Geometry) -> Tensor:
    return cast(Tensor, _InputGradient.apply(g, weight, tuple(size), geometry))  # type: ignore[no-untyped-call]


def _weight_gradient(g: Tensor, x: Tensor, shape: Sequence[int], geometry: _Geometry) -> Tensor:
    return cast(Tensor, _WeightGradient.apply(g, x, shape, geometry))  # type: ignore[no-untyped-call]


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast as autocast would; a custom function must see the dtype that it computes in."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in tensors]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` with fast second derivatives.

    Args:
        x: Images (N, C_in, H, W).
        weight: Kernels (C_out, C_in / groups, kh, kw), applied as a correlation.
        bias: (C_out,) or None.
        stride: (y, x).
        padding: Zeros on both sides of (y, x).
        groups: Number of channel groups.
    """
    x, weight, bias = _autocast(x, weight, bias)
    return _convolution(x, weight, bias, (stride, padding, groups))


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
) -> Tensor:
    """Adjoint of :func:`conv2d` from images of `size` = (H, W), with fast second derivatives.

    Args:
        x: (N, C_in, h, w), where conv2d would map (H, W) to (h, w).
        weight: (C_in, C_out / groups, kh, kw).
        size: (H, W) of the result.
        stride: (y, x).
        padding: Cropped from both sides of (y, x).
        groups: Number of channel groups.
    """
    x, weight = _autocast(x, weight)
    return _input_gradient(x, weight, size, (stride, padding, groups))
