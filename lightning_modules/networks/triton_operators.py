"""upfirdn2d and bias + leaky ReLU with Triton kernels, differentiable any number of times.

Used on CUDA where :mod:`kernel_choice` finds a kernel faster than plain PyTorch. On the CPU the kernels run only in
Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported), and only if forced: that is how they are tested.
Sizes of tiles were chosen by estimate, not measured on a card.
"""

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_modules.networks.convolutions import _autocast
from lightning_modules.networks.kernel_choice import Implementation, choose

try:
    from triton import knobs

    from lightning_modules.networks import triton_kernels
except ImportError:  # CPU builds of PyTorch come without Triton; before Triton 3.4 it has no knobs
    knobs = None

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 1024  # numbers that one program makes


def available(x: Tensor) -> bool:
    """Whether kernels exist for x and are wanted; under `torch.compile` they are not."""
    if knobs is None or choose.mode == "plain" or x.dtype not in _DTYPES or torch.compiler.is_compiling():
        return False
    return x.is_cuda or (choose.mode == "triton" and bool(knobs.runtime.interpret))


def speed_key(name: str, x: Tensor, *geometry: Hashable) -> Hashable:
    """What the speed of an operator depends on.

    Sizes count up to the next power of two: ADA makes images of many sizes, and each key costs a measurement.
    """
    sizes = tuple((size - 1).bit_length() for size in x.shape)
    return name, geometry, sizes, x.is_contiguous(), x.dtype, x.device


def launch(name: str, programs: int, x: Tensor, *arguments: Any) -> None:
    """Run a kernel of `triton_kernels` on the card of x."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        getattr(triton_kernels, name)[(programs,)](x, *arguments)


def ceil_div(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The next one from n on."""
    return 1 << (n - 1).bit_length()


class _Geometry(NamedTuple):
    """A resampling, up to the size of the image. Pairs are (y, x)."""

    up: tuple[int, int]
    down: tuple[int, int]
    before: tuple[int, int]  # padding in front
    flip_filter: bool
    gain: float

    def adjoint(self, taps: tuple[int, int]) -> "_Geometry":
        """The transposed linear map."""
        before = taps[0] - 1 - self.before[0], taps[1] - 1 - self.before[1]
        return _Geometry(self.down, self.up, before, not self.flip_filter, self.gain)


def upfirdn2d(
    plain: Implementation,
    x: Tensor,
    f: Tensor,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """:func:`operators.upfirdn2d` with a 2-D filter.

    It is linear: its gradient is another upfirdn2d, with up and down exchanged and the filter reversed, and the
    gradient of that is the first again.

    Args:
        plain: The same function of x in PyTorch.
        x: Images (N, C, H, W).
        f: (kh, kw).
        up: Factors (x, y).
        down: Factors (x, y).
        padding: (x before, x after, y before, y after).
        flip_filter: False is a true convolution, True a correlation.
        gain: Multiplies the result.
    """
    (x,) = _autocast(x)  # as the convolutions of the plain operator do
    if not available(x):
        return plain(x)
    px0, px1, py0, py1 = padding
    height = (x.shape[2] * up[1] + py0 + py1 - f.shape[0]) // down[1] + 1
    width = (x.shape[3] * up[0] + px0 + px1 - f.shape[1]) // down[0] + 1
    geometry = _Geometry((up[1], up[0]), (down[1], down[0]), (py0, px0), flip_filter, float(gain))
    key = speed_key("upfirdn2d", x, geometry, tuple(f.shape))
    return choose(key, plain, lambda x: _upfirdn2d(x, f, geometry, (height, width)), x)


class _Upfirdn2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, geometry: _Geometry, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(f)
        ctx.geometry, ctx.size = geometry, x.shape[2:]
        return _launch_upfirdn2d(x, f, geometry, size)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (f,) = ctx.saved_tensors
        adjoint = ctx.geometry.adjoint((f.shape[0], f.shape[1]))
        return _upfirdn2d(g, f, adjoint, ctx.size), None, None, None


def _upfirdn2d(x: Tensor, f: Tensor, geometry: _Geometry, size: tuple[int, int]) -> Tensor:
    return cast(Tensor, _Upfirdn2d.apply(x, f, geometry, size))  # type: ignore[no-untyped-call]


def _launch_upfirdn2d(x: Tensor, f: Tensor, geometry: _Geometry, size: tuple[int, int]) -> Tensor:
    n, c, height, width = x.shape
    is_last = c > 1 and x.stride(1) == 1
    layout = torch.channels_last if is_last else torch.contiguous_format
    y = torch.empty((n, c, *size), dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y
    # The grid of the kernel begins so many samples before the image that it divides no negative numbers.
    skip = [max(0, before // up) for before, up in zip(geometry.before, geometry.up, strict=True)]
    lead = [s * up - before for s, up, before in zip(skip, geometry.up, geometry.before, strict=True)]
    channels = min(64, power_of_two(c)) if is_last else 1  # of a tile: neighbours in memory
    pixels = _BLOCK // 2 // channels
    programs = n * ceil_div(c, channels) * ceil_div(size[0] * size[1], pixels)
    launch(
        "upfirdn2d", programs, x, f.float().contiguous(), y, height, width, *size, c, *x.stride(), *y.stride(),
        *lead, *skip, geometry.gain,
        *geometry.up, *geometry.down, *f.shape, not geometry.flip_filter, pixels, channels,
    )  # fmt: skip
    return y


class _Activation(NamedTuple):
    dim: int
    slope: float
    gain: float
    clamp: float | None


def bias_lrelu(
    plain: Implementation,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    slope: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """clamp(gain · leaky_relu(x + b)) in one pass, and its gradient in one.

    Args:
        plain: The same function of x in PyTorch.
        x: Any shape.
        b: Bias along `dim`, or None.
        dim: Dimension of the bias.
        slope: For negative values; 1 is the identity.
        gain: Multiplies the leaky ReLU.
        clamp: Limit of the absolute value; None for none.
    """
    is_mixed = b is not None and b.dtype != x.dtype
    if is_mixed or slope < 0 or gain <= 0 or not available(x):  # the kernel takes signs from the result
        return plain(x)
    activation = _Activation(dim, float(slope), float(gain), None if clamp is None else float(clamp))
    key = speed_key("bias_lrelu", x, activation, b is None)
    return choose(key, plain, lambda x: cast(Tensor, _BiasLeakyReLU.apply(x, b, activation)), x)  # type: ignore[no-untyped-call]


class _BiasLeakyReLU(Function):
    """Keeps the result, as the next layer does; it has the sign of x + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, activation: _Activation) -> Tensor:
        dim, slope, gain, clamp = activation
        if not (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        y = torch.empty_like(x)
        ctx.save_for_backward(y)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        if y.numel() == 0:
            return y
        channels, inner = x.shape[dim], x.stride(dim)
        columns = channels if inner == 1 else inner  # of x as a matrix: all channels, or a part of one channel
        rows, bias = x.numel() // columns, x if b is None else b.contiguous()
        tile_columns = min(_BLOCK, power_of_two(columns))
        tile_rows = _BLOCK // tile_columns
        launch(
            "bias_lrelu", ceil_div(rows, tile_rows) * ceil_div(columns, tile_columns), x, bias, y,
            rows, columns, channels, slope, gain, 0.0 if clamp is None else clamp,
            b is not None, inner == 1, clamp is not None, tile_rows, tile_columns,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:  # from `_LeakyReLUGradient`, which is constant in y
            return None, None, None
        (y,) = ctx.saved_tensors
        gx = _lrelu_gradient(g, y, ctx.activation)
        others = [i for i in range(g.ndim) if i != ctx.activation.dim]
        return gx, gx.sum(others) if ctx.needs_input_grad[1] else None, None


class _LeakyReLUGradient(Function):
    """Linear in g, and its own gradient."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor, activation: _Activation) -> Tensor:
        _, slope, gain, clamp = activation
        ctx.save_for_backward(y)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        result = torch.empty_like(y)
        if y.numel():
            g = g if g.stride() == y.stride() else torch.empty_like(y).copy_(g)
            launch(
                "lrelu_gradient", ceil_div(g.numel(), _BLOCK), g, y, result,
                g.numel(), slope, gain, 0.0 if clamp is None else clamp, clamp is not None, _BLOCK,
            )  # fmt: skip
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        (y,) = ctx.saved_tensors
        return None if g is None else _lrelu_gradient(g, y, ctx.activation), None, None


def _lrelu_gradient(g: Tensor, y: Tensor, activation: _Activation) -> Tensor:
    return cast(Tensor, _LeakyReLUGradient.apply(g, y, activation))  # type: ignore[no-untyped-call]
