"""How near two images are, from sums of integers: Pearson's r and the Euclidean distance, and float32 bounds on both.

With u = value - 128 (both are free of the offset), n values per image and Sx, Sxx, Sxy the sums of u_x, u_x^2 and
u_x u_y:

    r   = (n Sxy - Sx Sy) / sqrt(n Syy - Sy^2) / sqrt(n Sxx - Sx^2)                                    (1)
    d^2 = Sxx + Syy - 2 Sxy                                                                            (2)

All terms are computed exactly in int64; rounding starts at the square roots of (1), so r of an exact copy is 1 to
within 3e-16, and d^2 is exact.

The bounds serve to dismiss pairs at the speed of float32. Up to a factor and a summand of the query, which do not
change the order of its references, both measures have the form Sxy a_j + p_i w_j. The bound is

    Sxy a_j + p_i w_j + e_i g_j                                                                        (3)

evaluated in float32, where e_i g_j is at least the size of the first two terms times the number of roundings that they
have seen times 2^-24. It bounds the sizes by Cauchy-Schwarz: |Sxy| <= sqrt(Sxx Syy), |Sx| <= sqrt(n Sxx).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_VALUES = 1 << 24
"""Most values per image for which n Sxy fits int64: 2^24 * 2^24 * 2^14 = 2^62."""
UNIT_ROUNDOFF = 2.0**-24
ROUNDINGS = 8
"""Behind a bound, besides the sums over channels: of Sxy, a, p, w, two products and two sums."""


@dataclass(frozen=True)
class Moments:
    """n, and Sx and Sxx of N images: int64 (N,). `channels` says of how many matrix products Sxy is the sum."""

    n: int
    total: Tensor
    square: Tensor
    channels: int = 1

    @property
    def deviation(self) -> Tensor:
        """sqrt(n Sxx - Sx^2), float64; 0 where the image is constant."""
        return (self.n * self.square - self.total.square()).double().sqrt()

    @property
    def slack(self) -> float:
        """Largest relative error of a bound's terms."""
        return (ROUNDINGS + self.channels) * UNIT_ROUNDOFF

    def __getitem__(self, rows: slice | Tensor) -> Moments:
        return Moments(self.n, self.total[rows], self.square[rows], self.channels)


@dataclass(frozen=True)
class RowTerms:
    """What the bound (3) has of each query: float32 p and e, and factor and summand, float64 (Q,).

    A value belongs to the bound `(value - summand) * factor`; the factor is 0 where no value is defined.
    """

    p: Tensor
    e: Tensor
    factor: Tensor
    summand: Tensor

    @staticmethod
    def stack(terms: Sequence[RowTerms]) -> RowTerms:
        """Join those of several scores: (S, Q)."""
        return RowTerms(*(torch.stack([getattr(t, name) for t in terms]) for name in ("p", "e", "factor", "summand")))

    def __getitem__(self, rows: slice | tuple[Tensor, Tensor]) -> RowTerms:
        at = (..., rows) if isinstance(rows, slice) else rows
        return RowTerms(self.p[at], self.e[at], self.factor[at], self.summand[at])

    def bar(self, value: Tensor) -> Tensor:
        """What the bound of a pair must reach if the pair is to reach `value`: float32 of float64, never -inf."""
        bar = torch.where(self.factor > 0, (value - self.summand) * self.factor, torch.inf)
        return bar.clamp(min=torch.finfo(torch.float32).min).float()


@dataclass(frozen=True)
class ColumnTerms:
    """What the bound (3) has of each reference: float32 (B,)."""

    a: Tensor
    w: Tensor
    g: Tensor

    @staticmethod
    def stack(terms: Sequence[ColumnTerms]) -> ColumnTerms:
        """Join those of several scores: (S, B)."""
        return ColumnTerms(*(torch.stack([getattr(t, name) for t in terms]) for name in ("a", "w", "g")))

    def __getitem__(self, columns: slice) -> ColumnTerms:
        return ColumnTerms(self.a[..., columns], self.w[..., columns], self.g[..., columns])


def make_upper_bounds(products: Tensor, rows: RowTerms, columns: ColumnTerms) -> None:
    """Turn float32 Sxy (S, Q, B) into the bounds (3), in place.

    The outer products are elementwise operations, so that no setting for matrix products degrades them.
    """
    products.mul_(columns.a[:, None])
    products.addcmul_(rows.p[..., None], columns.w[:, None])
    products.addcmul_(rows.e[..., None], columns.g[:, None])


class Measure(Protocol):
    """The larger, the nearer."""

    def value(self, sxy: Tensor, x: Moments, y: Moments) -> Tensor:
        """Exact value of pairs: float64 (M,) of int64 (M,)."""
        ...

    def row_terms(self, x: Moments) -> RowTerms:
        """Terms of the queries."""
        ...

    def column_terms(self, y: Moments) -> ColumnTerms:
        """Terms of the references."""
        ...


class Pearson:
    """Pearson's r, equation (1); -inf bounds it where a reference is constant."""

    def value(self, sxy: Tensor, x: Moments, y: Moments) -> Tensor:
        """R in [-1, 1]."""
        covariance = x.n * sxy - x.total * y.total
        return (covariance.double() / y.deviation / x.deviation).clamp(-1.0, 1.0)

    def row_terms(self, x: Moments) -> RowTerms:
        """Of r sqrt(n Sxx - Sx^2)."""
        e = x.slack * x.square.double().sqrt().clamp(min=1.0)
        return RowTerms(-x.total.float(), e.float(), x.deviation, torch.zeros_like(x.deviation))

    def column_terms(self, y: Moments) -> ColumnTerms:
        """With a = n / sqrt(n Syy - Sy^2), w = Sy a / n."""
        constant = y.deviation == 0
        a = torch.where(constant, 0.0, y.n / y.deviation)
        w = y.total * a / y.n
        g = torch.where(constant, -torch.inf, y.square.double().sqrt() * a + y.n**0.5 * w.abs())
        return ColumnTerms(a.float(), w.float(), g.float())


class Distance:
    """Minus the squared Euclidean distance, equation (2)."""

    def value(self, sxy: Tensor, x: Moments, y: Moments) -> Tensor:
        """An integer, at most 0."""
        return -(x.square + y.square - 2 * sxy).double()

    def row_terms(self, x: Moments) -> RowTerms:
        """Of (Sxx - d^2) / 2."""
        e = (x.slack * x.square.double().sqrt()).float()
        half = torch.full_like(x.square, 0.5, dtype=torch.float64)
        return RowTerms(torch.ones_like(e), e, half, -x.square.double())

    def column_terms(self, y: Moments) -> ColumnTerms:
        """With a = 1, w = -Syy / 2; as p is 1, w bears the error of its own term."""
        w = -y.square.double() / 2 * (1 - y.slack)
        return ColumnTerms(torch.ones_like(w).float(), w.float(), y.square.double().sqrt().float())
