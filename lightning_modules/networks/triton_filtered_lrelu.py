"""The filtered leaky ReLU, its gradient and the gradient of that, each as one Triton kernel.

Resampling along an axis is multiplication with a band matrix, so matrix products (on tensor cores) take a tile of an
image to a tile of the fine grid and back: y = D^T a(U x), where both U and D go from coarse samples to fine ones.

    signal   D^T a(U x)        tangent   D^T (a'(U x) · U v)        adjoint   U^T (a'(U x) · D g)

The fine signal, 4 to 16 times as large as the image, never reaches the memory, and only x is kept for the gradient: to
compute a' again costs two more products, to write and read it as a mask would cost as many bytes as x itself. A 2-D
filter is a sum of few separable ones (its singular value decomposition). Products of float32 are made of three products
of TF32, which keeps its accuracy. The matrices are mostly zeros, by which an infinite sample makes NaN of its tile.

Sizes of tiles were chosen by an estimate of the cost, not measured on a card.
"""

import math
from collections.abc import MutableMapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_modules.networks.kernel_choice import Implementation, choose
from lightning_modules.networks.triton_operators import available, ceil_div, launch, power_of_two, speed_key

_FINE = 64  # height and width of a tile of the fine grid
_LOAD = 32  # multiplications in the time of a load

_Kind = Literal["signal", "tangent", "adjoint"]

_cached: MutableMapping[Tensor, dict[Any, Any]] = WeakTensorKeyDictionary()  # of a filter: forgotten with it


class _Resampling(NamedTuple):
    """fine[i] = sum_j taps[factor · j - i + offset] coarse[j], along both axes."""

    filter: Tensor  # (taps,) or (taps, taps)
    is_reversed: bool
    gain: float  # along each axis
    factor: int
    offset: tuple[int, int]  # y, x

    @property
    def taps(self) -> int:
        return len(self.filter)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Factor, taps, and number of separable filters."""
        return self.factor, self.taps, self.separated()[0].shape[0]

    def separated(self) -> tuple[Tensor, Tensor]:
        """Filters (rank, taps) along y and x, on the CPU, whose outer products sum to the filter up to rounding."""
        f, version = self.filter, 0 if self.filter.is_inference() else self.filter._version
        known = _cached.setdefault(f, {})
        if version not in known:
            known.clear()  # what was made from an earlier content
            taps = f.detach().double().cpu()
            if f.ndim == 1:
                known[version] = taps[None], taps[None]
            else:
                u, s, v = torch.linalg.svd(taps)
                s = s[s > 1e-7 * s[0]].sqrt()[:, None]
                known[version] = u.t()[: len(s)] * s, v[: len(s)] * s
        y, x = known[version]
        return y, x

    def matrices(self, coarse: int, corner: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        """Of y and x, (rank, _FINE, coarse); `corner` is the index of the taps (y, x) in their first entries."""
        filters, known, found = self.separated(), _cached[self.filter], []
        for axis in (0, 1):
            key = axis, self.is_reversed, self.gain, self.factor, coarse, corner[axis], dtype
            if key not in known:
                taps = filters[axis].flip(1) if self.is_reversed else filters[axis]
                t = self.factor * torch.arange(coarse) - torch.arange(_FINE)[:, None] + corner[axis]
                band = torch.where((t >= 0) & (t < self.taps), taps[:, t.clamp(0, self.taps - 1)], 0.0)
                known[key] = (band * self.gain).to(self.filter.device, dtype)
            found.append(known[key])
        return found


class _Tiling(NamedTuple):
    """Sizes of tiles."""

    out: int  # of the result
    coarse: int  # of what is resampled to the fine grid
    gate: int  # of x, whose sign on the fine grid gates that


@cache
def _tiling(
    to_fine: tuple[int, int, int], gate: tuple[int, int, int] | None, back: tuple[int, int, int]
) -> _Tiling | None:
    """The tiles that cost least per sample of the result; None if the filters are too long for a tile.

    Args:
        to_fine: :attr:`_Resampling.shape` of the resampling to the fine grid.
        gate: Of that of x, if there is one.
        back: Of the resampling whose transpose leads back.
    """
    best, least = None, math.inf
    maps = [to_fine] if gate is None else [to_fine, gate]
    step = math.lcm(*(factor // math.gcd(factor, back[0]) for factor, *_ in maps))  # so all tiles have equal matrices
    for out in range(step, (_FINE - back[1]) // back[0] + 2, step):
        used = back[0] * (out - 1) + back[1]  # of the fine tile
        sizes = [max(16, power_of_two((used + taps - 2) // factor + 1)) for factor, taps, _ in maps]
        cost = 0
        for size, (*_, rank) in zip([*sizes, _padded(out)], [*maps, back], strict=True):
            cost += rank * _FINE * size * (size + _FINE + 2 * _LOAD) + size**2 * _LOAD
        if cost / out**2 < least:
            best, least = _Tiling(out, sizes[0], sizes[-1]), cost / out**2
    return best


def _padded(size: int) -> int:
    """A size that tensor cores take."""
    return max(16, power_of_two(size))


class _Activation(NamedTuple):
    up: _Resampling
    down: _Resampling
    padding: tuple[int, int]  # sum of both sides (y, x) of the upsampled signal
    slope: float
    limit: float | None

    def plan(self, kind: _Kind, size: tuple[int, int]) -> tuple[_Resampling, _Resampling, tuple[int, int]]:
        """The resamplings to the fine grid and back, and the size of the result, for x of `size` (H, W)."""
        if kind == "adjoint":
            return self.down, self.up, size
        up, down = self.up, self.down
        fine = [n * up.factor + p - up.taps + 1 for n, p in zip(size, self.padding, strict=True)]
        return up, down, ((fine[0] - down.taps) // down.factor + 1, (fine[1] - down.taps) // down.factor + 1)

    def tiling(self, kind: _Kind) -> _Tiling | None:
        to_fine, back, _ = self.plan(kind, (0, 0))
        return _tiling(to_fine.shape, None if kind == "signal" else self.up.shape, back.shape)


def filtered_lrelu(
    plain: Implementation,
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    up: int,
    down: int,
    padding: Sequence[int],
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool,
) -> Tensor:
    """:func:`lightning_modules.networks.filtered_lrelu.filtered_lrelu` without bias, in the dtype of x.

    Args:
        plain: The same function of x in PyTorch. It is used if a filter is missing, not square or too long.
        x: (N, C, H, W).
        fu: Filter of upsampling, 1-D or 2-D.
        fd: Filter of downsampling.
        up: Factor.
        down: Factor.
        padding: Of the upsampled signal, (x before, x after, y before, y after).
        gain: Multiplies the leaky ReLU.
        slope: Of the leaky ReLU for negative values.
        clamp: Limit of the absolute value after the gain; None for none.
        flip_filter: False is a true convolution, True a correlation.
    """
    if not available(x) or gain <= 0 or fu is None or fd is None or any(f.shape[0] != f.shape[-1] for f in (fu, fd)):
        return plain(x)
    px0, px1, py0, py1 = padding
    activation = _Activation(
        _Resampling(fu, not flip_filter, up, up, (py0, px0)),
        _Resampling(fd, flip_filter, math.sqrt(gain), down, (len(fd) - 1, len(fd) - 1)),
        (py0 + py1, px0 + px1),
        float(slope),
        None if clamp is None else clamp / gain,
    )
    *_, size = activation.plan("signal", (x.shape[2], x.shape[3]))
    if min(size) < 1 or not all(activation.tiling(kind) for kind in get_args(_Kind)):
        return plain(x)
    key = speed_key("filtered_lrelu", x, activation.up.shape, activation.down.shape, activation.padding, clamp is None)
    return choose(key, plain, lambda x: _apply("signal", x, x, activation), x)


class _FilteredLeakyReLU(Function):
    """One of the three maps of v; as a function of x it is constant almost everywhere, or v is x (signal)."""

    @staticmethod
    def forward(ctx: Any, kind: _Kind, v: Tensor, x: Tensor, activation: _Activation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.activation = kind, activation
        ctx.set_materialize_grads(False)
        return _launch(kind, v, x, activation)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        (x,) = ctx.saved_tensors
        transposed: _Kind = "tangent" if ctx.kind == "adjoint" else "adjoint"
        return None, None if g is None else _apply(transposed, g, x, ctx.activation), None, None


def _apply(kind: _Kind, v: Tensor, x: Tensor, activation: _Activation) -> Tensor:
    return cast(Tensor, _FilteredLeakyReLU.apply(kind, v, x, activation))  # type: ignore[no-untyped-call]


def _launch(kind: _Kind, v: Tensor, x: Tensor, activation: _Activation) -> Tensor:
    to_fine, back, size = activation.plan(kind, (x.shape[2], x.shape[3]))
    to_gate, slope, limit = activation.up, activation.slope, activation.limit
    tiling = activation.tiling(kind)
    assert tiling is not None
    is_last = v.is_contiguous(memory_format=torch.channels_last)
    v, x = v.contiguous(), x.contiguous()
    y = v.new_empty(*v.shape[:2], *size)
    if y.numel() == 0:
        return y
    step = tiling.out * back.factor  # from one tile to the next, on the fine grid
    first = back.offset[0] - back.taps + 1, back.offset[1] - back.taps + 1  # on the fine grid
    arguments: list[Any] = []
    for to, coarse in ((to_fine, tiling.coarse), (to_gate, tiling.gate)):
        corner = [ceil_div(f - offset, to.factor) for f, offset in zip(first, to.offset, strict=True)]
        taps = [to.factor * c - f + offset for c, f, offset in zip(corner, first, to.offset, strict=True)]
        arguments += [*to.matrices(coarse, (taps[0], taps[1]), v.dtype), *corner, step // to.factor]
    padded = _padded(tiling.out)
    arguments += [*back.matrices(padded, (back.taps - 1, back.taps - 1), v.dtype)]
    programs = v.shape[0] * v.shape[1] * ceil_div(size[0], tiling.out) * ceil_div(size[1], tiling.out)
    launch(
        "filtered_lrelu", programs, v, x, y, *v.shape[2:], *x.shape[2:], *size, *arguments, tiling.out,
        slope, 0.0 if limit is None else limit, kind != "signal", limit is not None,
        tiling.coarse, tiling.gate, _FINE, padded, to_fine.shape[2], to_gate.shape[2], back.shape[2],
        "tf32x3" if v.dtype == torch.float32 else None,
    )  # fmt: skip
    return y.contiguous(memory_format=torch.channels_last) if is_last else y
