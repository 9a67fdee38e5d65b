"""The nearest reference slices of every query slice, exactly: all pairs, several scores, flips and shifts.

The only sums over pairs, Sxy of each channel, are matrix products of int8 (`exact_product`); what a score is follows
from them (`similarity`). Almost all pairs are dismissed by a float32 bound; those whose bound reaches the k-th nearest
so far are computed exactly. So an exact copy is told from a copy with one pixel changed, which float32 cannot do, and
no bit of a result depends on tiles, blocks, threads, processes or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from metrics.exact_product import exact_product, result_type
from metrics.nearest import Nearest
from metrics.pixels import IDENTITY, Pixels, Score, Transform
from metrics.similarity import MAX_VALUES, ColumnTerms, Moments, RowTerms, make_upper_bounds

TILE = {"cpu": (2048, 512), "cuda": (4096, 4096)}
"""Queries and references of one matrix product: enough to keep the unit busy, few enough for the last cache."""
STRIPE_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Bounds computed at a time: on a CPU what the second cache holds."""
MANY = 16
"""References that may still be near enough, per query, from which on it is cheaper to raise the k-th best first."""


class Search:
    """The search for the nearest references of some queries; blocks of references are compared as they come.

    Args:
        queries: Q images, on the device of the search.
        scores: S scores over their channels.
        k: references kept for every query and score.
        transforms: of the queries; all of them are tried.
        nearest: what was found so far, to go on from; it is changed in place. None begins anew.

    Raises:
        ValueError: if a score has channels that the queries have not, or more values than can be summed.
    """

    def __init__(
        self,
        queries: Pixels,
        scores: Sequence[Score],
        k: int = 1,
        transforms: Sequence[Transform] = (IDENTITY,),
        nearest: Nearest | None = None,
    ) -> None:
        channels = set(range(len(queries.values)))
        for score in scores:
            if not score.channels or not set(score.channels) <= channels:
                raise ValueError(f"Score {score.name}: expected channels out of {channels}, but got {score.channels}.")
            if queries.moments(score.channels).n > MAX_VALUES:
                raise ValueError(f"Score {score.name}: expected at most {MAX_VALUES} values per image.")
        self.queries = queries
        self.scores = scores
        self.transforms = transforms
        self.nearest = nearest or Nearest.empty(len(scores), len(queries), k, queries.values.device)
        self._used = sorted({channel for score in scores for channel in score.channels})
        self._plan = [_parts(scores[:position], score) for position, score in enumerate(scores)]
        self._x = [queries.moments(score.channels) for score in scores]
        self._rows = RowTerms.stack([score.measure.row_terms(x) for score, x in zip(scores, self._x, strict=True)])
        self._buffers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def compare(self, references: Pixels, first: int) -> None:
        """Compare all queries with a block of references, the first of which has position `first` in the whole set.

        Raises:
            ValueError: if the images are of another size than the queries, or only one side has groups.
        """
        ours, theirs = (tuple(side.values.shape[i] for i in (0, 2, 3)) for side in (self.queries, references))
        if ours != theirs:
            raise ValueError(f"Expected references (B, {', '.join(map(str, ours))}) as the queries, but got {theirs}.")
        if (self.queries.group is None) != (references.group is None):
            raise ValueError("Expected groups of both the queries and the references, or of neither.")
        if not len(self.queries) or not len(references) or not self.scores:
            return
        y = [references.moments(score.channels) for score in self.scores]
        terms = ColumnTerms.stack([s.measure.column_terms(m) for s, m in zip(self.scores, y, strict=True)])
        n_rows, n_columns = TILE[self.queries.values.device.type]
        for number, transform in enumerate(self.transforms):
            undone = self._undone(references, transform)
            for left in range(0, len(references), n_columns):
                columns = slice(left, left + n_columns)
                part, part_terms, part_y = undone[columns], terms[columns], [moments[columns] for moments in y]
                for top in range(0, len(self.queries), n_rows):
                    self._compare_tile(slice(top, top + n_rows), part, part_terms, part_y, first + left, number)

    def _compare_tile(
        self,
        rows: slice,
        references: Pixels,
        columns: ColumnTerms,
        y: Sequence[Moments],
        first: int,
        transform: int,
    ) -> None:
        """Find the pairs whose bound is high enough, compute them exactly and offer them."""
        queries, x, row_terms = self.queries[rows], [moments[rows] for moments in self._x], self._rows[rows]
        values, indices = (tensor[:, rows] for tensor in (self.nearest.value, self.nearest.index))
        bars = row_terms.bar(values[..., -1])
        same_group = _same(queries.group, references.group)
        products = self._products(queries, references)
        stripe = max(1, STRIPE_BYTES[products.device.type] // (4 * len(self.scores) * len(references)))
        found = []
        for start in range(0, len(queries), stripe):
            part = slice(start, start + stripe)
            bounds = self._add_up(products[:, part])
            make_upper_bounds(bounds, row_terms[part], columns)
            if same_group is not None:
                bounds.masked_fill_(same_group[part], -torch.inf)
            active = (bounds.amax(dim=2) >= bars[:, part]).flatten().nonzero()[:, 0]
            if not len(active):
                continue
            s, i = active // bounds.shape[1], active % bounds.shape[1] + start
            bounds = bounds.flatten(0, 1).index_select(0, active)  # (A, B)
            kth = values[s, i, -1]
            a, j = (bounds >= bars[s, i, None]).nonzero(as_tuple=True)
            if len(a) > MANY * len(s):
                kth = self._kth_best(products, x, y, s, i, bounds, values[s, i], indices[s, i] - first)
                a, j = (bounds >= row_terms[s, i].bar(kth)[:, None]).nonzero(as_tuple=True)
            found.append((s[a], i[a], j, kth[a]))
        if not found:
            return
        s, i, j, kth = (torch.cat(part) for part in zip(*found, strict=True))
        s, order = s.sort(stable=True)
        i, j, kth = i[order], j[order], kth[order]
        value = self._exact(products, x, y, s, i, j)
        good = (value >= kth).nonzero()[:, 0]  # where bounds are poor, few keep what they promise
        j = j[good] + first
        self.nearest.offer(s[good], i[good] + rows.start, value[good], j, torch.full_like(j, transform))

    def _undone(self, references: Pixels, transform: Transform) -> Pixels:
        """Instead of the queries the references are changed, by the inverse; their sums stay."""
        if transform == IDENTITY:
            return references
        out = self._buffer("undone", tuple(references.values.shape), torch.int8)
        transform.undo(references.values, out)
        return replace(references, values=out)

    def _products(self, queries: Pixels, references: Pixels) -> Tensor:
        """Sxy of each channel that is used: int32 or int64 (channels, Q, B)."""
        x, y = (side.values.flatten(2) for side in (queries, references))
        out = self._buffer("products", (len(self._used), x.shape[1], y.shape[1]), result_type(x.shape[2]))
        for channel, product in zip(self._used, out, strict=True):
            exact_product(x[channel], y[channel], product)
        return out

    def _add_up(self, products: Tensor) -> Tensor:
        """Sxy of each score in float32, (S, Q, B); scores share what they have in common."""
        out = self._buffer("bounds", (len(self.scores), *products.shape[1:]), torch.float32)
        for sxy, (known, channels) in zip(out, self._plan, strict=True):
            parts = [out[position] for position in known] + [products[self._used.index(c)] for c in channels]
            sxy.copy_(parts[0])
            for part in parts[1:]:
                sxy += part
        return out

    def _kth_best(
        self,
        products: Tensor,
        x: Sequence[Moments],
        y: Sequence[Moments],
        s: Tensor,
        i: Tensor,
        bounds: Tensor,
        known: Tensor,
        listed: Tensor,
    ) -> Tensor:
        """At least how good the k-th best will be, from the k references whose bounds are highest: float64 (A,).

        `known` float64 (A, k) are the best so far, and `listed` int64 (A, k) their positions, counted in this tile.
        """
        highest = bounds.topk(min(self.nearest.k, bounds.shape[1]))
        j = highest.indices
        s, i = (t.repeat_interleave(j.shape[1]) for t in (s, i))
        value = self._exact(products, x, y, s, i, j.flatten()).view_as(j)
        again = (j[:, :, None] == listed[:, None]).any(dim=2)  # under another transform
        value = value.masked_fill(again | (highest.values == -torch.inf), -torch.inf)
        return torch.cat([known, value], dim=1).topk(self.nearest.k).values[:, -1]

    def _exact(
        self, products: Tensor, x: Sequence[Moments], y: Sequence[Moments], s: Tensor, i: Tensor, j: Tensor
    ) -> Tensor:
        """Value of score s (ascending) for query i and reference j: float64 (M,) of int64 (M,)."""
        value, start = torch.empty(len(s), dtype=torch.float64, device=s.device), 0
        for position, count in enumerate(torch.bincount(s, minlength=len(self.scores)).tolist()):
            if count:
                mine, score = slice(start, start + count), self.scores[position]
                here, there = i[mine], j[mine]
                sxy = torch.zeros_like(here)
                for channel in score.channels:
                    sxy += products[self._used.index(channel), here, there]
                value[mine] = score.measure.value(sxy, x[position][here], y[position][there])
                start += count
        return value

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialized memory that tiles use one after the other: fresh memory costs more than the work in it."""
        size = torch.Size(shape).numel()
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size, dtype=dtype, device=self.queries.values.device)
        return self._buffers[name][:size].view(shape)


def _parts(before: Sequence[Score], score: Score) -> tuple[list[int], list[int]]:
    """Of which earlier scores and which further channels the Sxy of a score is the sum."""
    missing, known = set(score.channels), []
    for position in sorted(range(len(before)), key=lambda p: -len(before[p].channels)):
        if set(before[position].channels) <= missing:
            known.append(position)
            missing -= set(before[position].channels)
    return known, sorted(missing)


def _same(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    """Which pairs are of one group, bool (Q, B); None if there are none."""
    if ours is None or theirs is None:
        return None
    same = ours[:, None] == theirs
    return same if bool(same.any()) else None
