"""Memorization: the largest Pearson correlation of a slice with any training slice, in exact integer arithmetic.

The number is that of Usman Akbar, Wang, Eklund, "Beware of diffusion models for synthesizing medical images"
(arXiv 2305.07644): Pearson over the whole image with every training image, and the largest of these. It means nothing
by itself (unrelated heads correlate at 0.9: shared outline and background), so it is always put beside its null: the
same number for held-out real patients against the same training slices (`summarize`).

Pixels are integers and so are all sums. With u = value - 128 (Pearson is free of the offset), |u| <= 128, and n pixels:

    r = (n Sxy - Sx Sy) / sqrt(n Sxx - Sx^2) / sqrt(n Syy - Sy^2)                                     (1)

All terms of (1) are computed exactly in int64; rounding starts at the square roots (r of an exact copy is 1 to within
3e-16). So an exact copy is told from a copy with one pixel changed (float32 cannot: its sums of 65,536 products are off
by more than that pixel), and the result does not depend on block sizes, threads or processes by a single bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from metrics.statistics import NullComparison, conformal_p_values, summarize

__all__ = ["LargestCorrelation", "NullComparison", "conformal_p_values", "largest_correlation", "summarize"]

OFFSET = 128
INT32_SAFE_LENGTH = 1 << 16
"""Longest dot product of int8 vectors that cannot overflow int32: 2^16 terms of at most 2^14 are at most 2^30."""
MAX_PIXELS = 1 << 24
"""Most values per slice (channels x height x width) for which n Sxy fits int64: 2^24 * 2^24 * 2^14 = 2^62."""

CACHE_FRIENDLY = 1 << 18
"""Values converted to float64 at a time."""


@dataclass(frozen=True)
class LargestCorrelation:
    """The nearest reference slice of every query slice.

    `r` (Q,) float64 in [-1, 1], `index` (Q,) int64 and `mirrored` (Q,) bool come from all channels jointly
    (flattened); `r_channel`, `index_channel` and `mirrored_channel` (Q, C) from each channel alone. A query that is
    constant, or that meets no reference slice it may be compared with, has r NaN and index -1.
    """

    r: torch.Tensor
    index: torch.Tensor
    mirrored: torch.Tensor
    r_channel: torch.Tensor
    index_channel: torch.Tensor
    mirrored_channel: torch.Tensor


def largest_correlation(
    queries: torch.Tensor,
    reference_blocks: Iterable[torch.Tensor],
    *,
    query_groups: torch.Tensor | None = None,
    reference_groups: torch.Tensor | None = None,
    mirror_axis: int | None = None,
    query_rows: int = 512,
) -> LargestCorrelation:
    """Find the reference slice with the largest Pearson correlation for every query slice, exactly.

    Args:
        queries: uint8 (Q, C, H, W).
        reference_blocks: uint8 blocks (B, C, H, W), B may vary; they are read once, one at a time, so a memory-mapped
            set streams through. Positions count on over the blocks.
        query_groups: int (Q,), for instance the patient of each query.
        reference_groups: int (total of the B,). Slices of equal group are not compared (leave one patient out).
        mirror_axis: image axis (-1 or -2) along which queries are flipped too; None compares them as they are.
        query_rows: queries compared at a time, which bounds memory to about 40 * query_rows * B bytes; no influence on
            the result.

    Returns:
        The nearest neighbours. Among equal correlations the lowest position wins, and then the image as it is over its
        mirror image.

    Raises:
        ValueError: if types or shapes do not fit, or groups are given for one side only.
    """
    if queries.dtype != torch.uint8 or queries.ndim != 4:
        raise ValueError(f"Expected queries uint8 (Q, C, H, W), but got {queries.dtype} {tuple(queries.shape)}.")
    if queries[:1].numel() > MAX_PIXELS:
        raise ValueError(f"Expected at most {MAX_PIXELS} values per slice, but got {queries[:1].numel()}.")
    if (query_groups is None) != (reference_groups is None):
        raise ValueError("Expected groups of both the queries and the references, or of neither.")
    if query_groups is not None and len(query_groups) != len(queries):
        raise ValueError(f"Expected one group per query, but got {len(query_groups)} for {len(queries)} queries.")
    if mirror_axis not in (None, -1, -2):
        raise ValueError(f"Expected mirror_axis to be -1, -2 or None, but got {mirror_axis}.")

    images = [queries] if mirror_axis is None else [queries, queries.flip(mirror_axis)]
    query = _Moments.of(queries)
    views = [_centred(view) for view in images]  # int8 (Q, C, H * W) each
    n_queries, n_scores = len(queries), queries.shape[1] + 1
    best = torch.full((n_scores, n_queries), -torch.inf, dtype=torch.float64, device=queries.device)
    index = torch.full_like(best, -1, dtype=torch.int64)
    mirrored = torch.zeros_like(best, dtype=torch.bool)

    first = 0
    for block in reference_blocks:
        if block.dtype != torch.uint8 or block.shape[1:] != queries.shape[1:]:
            raise ValueError(
                f"Expected reference blocks uint8 (B, {', '.join(map(str, queries.shape[1:]))}), "
                f"but got {block.dtype} {tuple(block.shape)}."
            )
        if not len(block):
            continue
        block = block.to(queries.device)
        reference, pixels = _Moments.of(block), _centred(block)
        if reference_groups is not None and len(reference_groups) < first + len(block):
            raise ValueError(f"Expected one group per reference slice, but got only {len(reference_groups)} groups.")
        for start in range(0, n_queries, query_rows):
            rows = slice(start, start + query_rows)
            forbidden = None
            if query_groups is not None and reference_groups is not None:
                theirs = reference_groups[first : first + len(block)].to(queries.device)
                forbidden = query_groups[rows, None].to(queries.device) == theirs
            scores = [_scores(view[rows], query.rows(rows), pixels, reference) for view in views]
            for i in range(n_scores):
                score = scores[0][i] if mirror_axis is None else torch.maximum(scores[0][i], scores[1][i])
                if forbidden is not None:
                    score = score.masked_fill(forbidden, -torch.inf)
                value, position = score.max(dim=1)  # the first of equal maxima
                flipped = value > scores[0][i].gather(1, position[:, None])[:, 0]
                better = value > best[i, rows]
                best[i, rows] = torch.where(better, value, best[i, rows])
                index[i, rows] = torch.where(better, position + first, index[i, rows])
                mirrored[i, rows] = torch.where(better, flipped, mirrored[i, rows])
        first += len(block)

    if reference_groups is not None and len(reference_groups) != first:
        raise ValueError(f"Expected one group per reference slice, but got {len(reference_groups)} for {first} slices.")
    scale = query.deviation.T  # (C + 1, Q)
    defined = (index >= 0) & (scale > 0)
    r = torch.where(defined, (best / scale).clamp(-1.0, 1.0), torch.nan)
    index = torch.where(defined, index, -1)
    mirrored = mirrored & defined
    return LargestCorrelation(r[-1], index[-1], mirrored[-1], r[:-1].T, index[:-1].T, mirrored[:-1].T)


@dataclass(frozen=True)
class _Moments:
    """n, Sx and sqrt(n Sxx - Sx^2) per slice; the last column is all channels together."""

    n: torch.Tensor  # int64 (C + 1,)
    total: torch.Tensor  # int64 (N, C + 1)
    deviation: torch.Tensor  # float64 (N, C + 1)

    @staticmethod
    def of(images: torch.Tensor) -> _Moments:
        n_channels, n_pixels = images.shape[1], images.shape[2] * images.shape[3]
        total, square = torch.zeros(2, len(images), n_channels + 1, dtype=torch.int64, device=images.device)
        step = max(1, CACHE_FRIENDLY // (n_channels * n_pixels))
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            u = _centred(images[rows]).double()  # integers, and so are all partial sums: exact
            total[rows, :-1] = u.sum(dim=2).long()
            square[rows, :-1] = u.square_().sum(dim=2).long()
        total[:, -1], square[:, -1] = total.sum(dim=1), square.sum(dim=1)
        n = torch.tensor([n_pixels] * n_channels + [n_pixels * n_channels], device=images.device)
        return _Moments(n, total, (n * square - total.square()).double().sqrt())

    def rows(self, rows: slice) -> _Moments:
        return _Moments(self.n, self.total[rows], self.deviation[rows])


def _scores(x: torch.Tensor, mx: _Moments, y: torch.Tensor, my: _Moments) -> list[torch.Tensor]:
    """Equation (1) without the query's own square root, which does not change the order: C + 1 times (Q, B)."""
    joint = torch.zeros(len(x), len(y), dtype=torch.int64, device=x.device)
    scores = []
    for channel in range(x.shape[1] + 1):
        if channel < x.shape[1]:
            sxy = _dot(x[:, channel], y[:, channel])
            joint += sxy
        else:
            sxy = joint
        covariance = sxy * mx.n[channel] - mx.total[:, channel, None] * my.total[None, :, channel]
        score = covariance.double() / my.deviation[None, :, channel]
        constant = my.deviation[:, channel] == 0
        scores.append(score.masked_fill_(constant, -torch.inf) if bool(constant.any()) else score)
    return scores


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Exact int64 (Q, B) products of int8 (Q, K) and (B, K)."""
    if _int8_is_exact(x.device):
        total = torch.zeros(len(x), len(y), dtype=torch.int64, device=x.device)
        for start in range(0, x.shape[1], INT32_SAFE_LENGTH):
            part = slice(start, start + INT32_SAFE_LENGTH)
            total += torch._int_mm(x[:, part].contiguous(), y[:, part].T)
        return total
    return (x.double() @ y.double().T).long()  # every partial sum is an integer below 2^53


@cache
def _int8_is_exact(device: torch.device) -> bool:
    """Whether this machine's int8 matrix product can be trusted at its extremes.

    It is 3 to 10 times as fast as float64 where the CPU has VNNI or AMX. Some kernels for older CPUs add pairs of
    products in int16 and saturate; others are missing. So the worst cases are multiplied once, and float64 serves
    elsewhere.
    """
    if device.type != "cpu":
        return False
    extremes = torch.tensor([-128, 127, -127, 1, 0, -1, 64, -128], dtype=torch.int8)
    x = extremes[:, None].expand(8, 1024).clone()
    x[1::2, ::3] = -128
    y = x.flip(1).roll(1, 0)
    try:
        product = torch._int_mm(x, y.T)
    except RuntimeError:
        return False
    return torch.equal(product.long(), (x.double() @ y.double().T).long())


def _centred(images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) uint8 to int8 (N, C, H * W): value - 128, which is the sign bit flipped."""
    return (images ^ OFFSET).view(torch.int8).flatten(2)
