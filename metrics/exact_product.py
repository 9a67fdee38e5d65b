"""Matrix products of 8-bit integers without rounding, on the fastest unit that a machine has for them.

Three ways give the same integers. The first that passes `_is_exact` on a device serves it:

1. int8 factors and int32 sums: the matrix units of CUDA devices, AMX or VNNI of CPUs (through oneDNN).
2. float32: a product of two int8 is at most 2^14 and any sum of up to 1024 of them an integer of at most 2^24, which
   float32 holds exactly, in whatever order it is formed. These short sums are added as integers.
3. float64, exact up to 2^53.

The first is refused where kernels for older CPUs add pairs of products in saturating int16, the second where a user has
allowed a reduced precision that keeps fewer bits of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

INT32_SAFE_LENGTH = 1 << 16
"""Longest sum kept in int32: 2^16 products of at most 2^14 are at most 2^30."""
FLOAT32_SAFE_LENGTH = 1 << 10
SUM_ROWS = 32
CUBLAS_MULTIPLE = 8
CUBLAS_MIN_ROWS = 17


def exact_product(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply every row of x with every row of y.

    Args:
        x: int8 (Q, K).
        y: int8 (B, K).
        out: contiguous (Q, B) of the type of the result, which is written there.

    Returns:
        (Q, B) of type `result_type(K)`.
    """
    if out is None:
        out = torch.empty(len(x), len(y), dtype=result_type(x.shape[1]), device=x.device)
    product = _fastest(x.device)
    if x.shape[1] <= INT32_SAFE_LENGTH:
        return product(x, y, out)
    part = torch.empty_like(out, dtype=torch.int32)
    out.zero_()
    for start in range(0, x.shape[1], INT32_SAFE_LENGTH):
        stop = start + INT32_SAFE_LENGTH
        out += product(x[:, start:stop], y[:, start:stop], part)
    return out


def result_type(length: int) -> torch.dtype:
    """Give the integers that hold products of rows of this length: int32 up to `INT32_SAFE_LENGTH`, int64 beyond."""
    return torch.int32 if length <= INT32_SAFE_LENGTH else torch.int64


def sums(x: torch.Tensor) -> torch.Tensor:
    """Sum of every row: int64 (N,) of int8 (N, K)."""
    ones = torch.ones(CUBLAS_MULTIPLE, x.shape[1], dtype=torch.int8, device=x.device)
    return exact_product(x, ones)[:, 0].long()


def sums_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of every row: int64 (N,) of int8 (N, K)."""
    if not len(x):
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    parts = [x[start : start + SUM_ROWS] for start in range(0, len(x), SUM_ROWS)]
    return torch.cat([exact_product(part, part).diagonal() for part in parts]).long()


def _int8(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        return _for_cublas(x, y, out)
    if x.shape[1] == 1:  # torch 2.13 writes nothing then
        return torch.mul(x.int(), y.int().T, out=out)
    return torch._int_mm(x, y.T, out=out)


def _for_cublas(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fill up with zeros to what cuBLASLt wants: more than 16 rows, lengths and columns in eights."""
    length, rows, columns = -x.shape[1] % CUBLAS_MULTIPLE, max(0, CUBLAS_MIN_ROWS - len(x)), -len(y) % CUBLAS_MULTIPLE
    if not (length or rows or columns):
        return torch._int_mm(x, y.T, out=out)
    padded = torch._int_mm(F.pad(x, (0, length, 0, rows)), F.pad(y, (0, length, 0, columns)).T)
    return out.copy_(padded[: len(x), : len(y)])


def _float32(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out.zero_()
    for start in range(0, x.shape[1], FLOAT32_SAFE_LENGTH):
        part = slice(start, start + FLOAT32_SAFE_LENGTH)
        out += (x[:, part].float() @ y[:, part].float().T).int()
    return out


def _float64(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(x.double() @ y.double().T)


@cache
def _fastest(device: torch.device) -> Product:
    return next(product for product in (_int8, _float32, _float64) if product is _float64 or _is_exact(product, device))


def _is_exact(product: Product, device: torch.device) -> bool:
    """Try the largest and smallest products, in sums that saturate int16 and whose last bits float32 would lose."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (24, INT32_SAFE_LENGTH), dtype=torch.int8, generator=generator)
    x[0], x[1] = -128, 127
    x[2, ::2] = -128
    x[3, : INT32_SAFE_LENGTH // 2] = 127
    y = x[:16]
    try:
        out = torch.empty(len(x), len(y), dtype=torch.int32, device=device)
        found = product(x.to(device), y.to(device), out)
    except RuntimeError:  # no such kernel on this device
        return False
    return torch.equal(found.cpu().long(), (x.double() @ y.double().T).long())
