"""The k nearest of a stream, as a state that may be filled in any order, in pieces, saved and merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOTHING = (-torch.inf, -1, -1)
"""Value, index and transform where there is no reference."""

MANY = 4
"""Candidates of a query, in units of k, from which on they are sorted out before they meet the kept ones."""


@dataclass
class Nearest:
    """The k nearest references of Q queries by S scores, nearest first.

    A reference is listed once, with the transform under which it is nearest. Among equal values the lowest index comes
    first, and the first transform counts; so the content depends on what was offered and not on the order.

    Attributes:
        value: float64 (S, Q, k), the larger the nearer; -inf where there are fewer than k references.
        index: int64 (S, Q, k), the position of the reference; -1 where there is none.
        transform: int64 (S, Q, k), the position of the transform; -1 where there is none.
    """

    value: Tensor
    index: Tensor
    transform: Tensor

    @staticmethod
    def empty(scores: int, queries: int, k: int, device: torch.device | str = "cpu") -> Nearest:
        """The state before any reference was offered."""
        value = torch.full((scores, queries, k), -torch.inf, dtype=torch.float64, device=device)
        return Nearest(value, *(torch.full_like(value, -1, dtype=torch.int64) for _ in range(2)))

    @property
    def k(self) -> int:
        """How many are kept."""
        return self.value.shape[2]

    def offer(self, score: Tensor, query: Tensor, value: Tensor, index: Tensor, transform: Tensor) -> None:
        """Take in candidates: int64 (M,), and float64 (M,) `value`; a reference once for a score and query."""
        state = [tensor.view(-1, self.k) for tensor in (self.value, self.index, self.transform)]  # (S * Q, k)
        if not len(score):
            return
        row, order = (score * self.value.shape[1] + query).sort(stable=True)
        rows, place, counts = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
        if int(counts.max()) > MANY * self.k:  # the lines below make rows of equal length
            best = _k_best_of_each(self.k, row, value[order], index[order])
            self.offer(*(tensor[order[best]] for tensor in (score, query, value, index, transform)))
            return
        column = self.k + torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[place]
        shape = len(rows), self.k + int(counts.max())
        both = []  # what is kept and behind it what is offered: (A, k + most candidates of a query)
        for kept, offered, nothing in zip(state, (value, index, transform), NOTHING, strict=True):
            joined = kept.new_full(shape, nothing)
            joined[:, : self.k] = kept[rows]
            joined[place, column] = offered[order]
            both.append(joined)
        _drop_worse_twins(self.k, *both)
        order = both[1].argsort(dim=1, stable=True)
        order = order.gather(1, both[0].gather(1, order).argsort(dim=1, descending=True, stable=True))[:, : self.k]
        for kept, joined in zip(state, both, strict=True):
            kept[rows] = joined.gather(1, order)

    def merge(self, other: Nearest) -> None:
        """Take in what another search found for the same queries and scores among other references or transforms."""
        found = score, query, _ = (other.index >= 0).nonzero(as_tuple=True)
        self.offer(score, query, other.value[found], other.index[found], other.transform[found])


def _drop_worse_twins(k: int, value: Tensor, index: Tensor, transform: Tensor) -> None:
    """Empty the worse of two entries for one reference, of which one is in the first k columns and one behind them."""
    twins = (index[:, :k, None] == index[:, None, k:]) & (index[:, :k, None] >= 0)  # (A, k, M)
    old, new = value[:, :k, None], value[:, None, k:]
    earlier = transform[:, :k, None] > transform[:, None, k:]
    new_is_better = (new > old) | ((new == old) & earlier)
    worse = torch.cat([(twins & new_is_better).any(dim=2), (twins & ~new_is_better).any(dim=1)], dim=1)
    for tensor, nothing in zip((value, index, transform), NOTHING, strict=True):
        tensor.masked_fill_(worse, nothing)


def _k_best_of_each(k: int, row: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """Give the positions of the k largest values of each row, of which the lowest index; rows are sorted."""
    order = torch.arange(len(row), device=row.device)
    for key in (index, -value, row):
        order = order[key[order].argsort(stable=True)]
    _, place, counts = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[place]
    return order[rank < k]
