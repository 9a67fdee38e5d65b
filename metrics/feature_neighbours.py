"""Exact nearest neighbours of feature vectors, in blocks and in float64.

Distances by expansion, |x - y|² = |x|² + |y|² - 2 x·y, are one matrix product and the only fast way, but they are off
by the rounding of the large terms: in float32 by as much as the distance of a near copy itself. So the product is made
in float64 on centred features, it only names candidates, and the distances of these are taken from the differences.

The distances of the matrix product are right to within

    (D + 8) eps (|x|² + |y|²),    eps = 2.2e-16,                                                                     (1)

for D features: the standard bound of a dot product (Higham, "Accuracy and Stability of Numerical Algorithms", 2002,
section 3.1) for three of them, and the rounding of the centring.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 4096
"""Rows and columns of the matrices that are held at a time: 134 MB each in float64."""
SPARE = 8
"""Candidates beyond the k nearest."""


@dataclass(frozen=True)
class Neighbours:
    """Distances (Q, k), float64 and ascending, and positions (Q, k), int64, of the nearest references of Q queries.

    Where groups leave fewer than k references to a query, the rest is inf and -1.
    """

    distance: Tensor
    index: Tensor


def nearest_neighbours(
    queries: Tensor,
    references: Tensor,
    k: int = 1,
    *,
    query_groups: Tensor | None = None,
    reference_groups: Tensor | None = None,
) -> Neighbours:
    """Find the k nearest references (Euclidean) of every query.

    The distances have the rounding of one sum of D squares in float64. A neighbour is missed only where more than 8
    references beyond the k-th are as far as it to within (1), and then the distance reported is right to within (1).
    Of equal distances the lowest position wins.

    Args:
        queries: features (Q, D) of any floating type.
        references: features (N, D), on the same device.
        k: neighbours.
        query_groups: int (Q,), for instance the patient of each query.
        reference_groups: int (N,). Features of equal group are not compared (leave one patient out).

    Returns:
        The neighbours.

    Raises:
        ValueError: If features or groups do not fit together, or there are fewer than k references.
    """
    check_features(queries, references, "query", "reference", 1)
    if len(references) < k:
        raise ValueError(f"Expected at least {k} references to find {k} neighbours, but got {len(references)}.")
    if (query_groups is None) != (reference_groups is None):
        raise ValueError("Expected groups of both the queries and the references, or of neither.")
    if query_groups is not None and reference_groups is not None:
        if query_groups.shape != queries.shape[:1] or reference_groups.shape != references.shape[:1]:
            raise ValueError(
                f"Expected one group per image, {len(queries)} and {len(references)}, "
                f"but got {tuple(query_groups.shape)} and {tuple(reference_groups.shape)}."
            )
        query_groups, reference_groups = query_groups.to(queries.device), reference_groups.to(queries.device)

    centre = references.mean(0, dtype=torch.float64)
    found = []
    for rows, x in blocks(queries):
        best = torch.empty(len(x), 0, dtype=torch.float64, device=x.device)
        index = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        for columns, y in blocks(references):
            square = squared_distances(x, y, centre)
            if query_groups is not None and reference_groups is not None:
                square.masked_fill_(query_groups[rows, None] == reference_groups[columns], torch.inf)
            near, where = square.topk(min(k + SPARE, len(y)), largest=False)
            best, index = torch.cat([best, near], 1), torch.cat([index, where + columns.start], 1)
            best, where = best.topk(min(k + SPARE, best.shape[1]), largest=False)
            index = index.gather(1, where)
        found.append(_rescored(x, references, index.masked_fill(best.isinf(), -1), k))
    return Neighbours(*(torch.cat(part) for part in zip(*found, strict=True)))


def nearest_others(features: Tensor, k: int = 1) -> Neighbours:
    """Find the k nearest of the other features of a set (N, D) as :func:`nearest_neighbours`."""
    itself = torch.arange(len(features))
    return nearest_neighbours(features, features, k, query_groups=itself, reference_groups=itself)


def _rescored(x: Tensor, references: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of the candidates (Q, m), -1 where there is none, by the differences themselves."""
    candidates = candidates.sort(1).values  # so that the stable sort below prefers the lowest position
    distances = []
    for candidate in candidates.t():
        difference = x.double() - references[candidate.clamp(min=0)].double()
        distances.append(difference.square().sum(1).sqrt().masked_fill(candidate < 0, torch.inf))
    distance, order = torch.stack(distances, 1).sort(dim=1, stable=True)
    return distance[:, :k], candidates.gather(1, order)[:, :k]


def squared_distances(x: Tensor, y: Tensor, centre: Tensor, *, at_least: bool = False) -> Tensor:
    """Squared Euclidean distances (n, m) of (n, D) and (m, D) by expansion about a centre (D,), in float64.

    With `at_least` they are lowered by their rounding (1), and so never more than the true ones: a feature that lies
    exactly on the surface of a ball, as copies do, then counts as inside on every machine.
    """
    x, y = x.double() - centre, y.double() - centre
    slack = (x.shape[1] + 8) * torch.finfo(torch.float64).eps if at_least else 0.0
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm(norms, x, y.t(), beta=1 - slack, alpha=-2)


def blocks(features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Split features (N, D) into parts of at most `ROWS`, each with its positions."""
    for start in range(0, len(features), ROWS):
        rows = slice(start, min(start + ROWS, len(features)))
        yield rows, features[rows]


def check_features(a: Tensor, b: Tensor, name_a: str = "real", name_b: str = "generated", least: int = 2) -> None:
    """Refuse features unless both are finite, (N, D) and (M, D), with at least so many rows.

    Raises:
        ValueError: If they are not.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            "Features must be (N, D) and (M, D), from one network; got "
            f"{tuple(a.shape)} {name_a} and {tuple(b.shape)} {name_b} ones."
        )
    if min(len(a), len(b)) < least:
        raise ValueError(
            f"At least {least} {name_a} and {least} {name_b} images are needed; got {len(a)} and {len(b)}."
        )
    for name, features in ((name_a, a), (name_b, b)):
        if not bool(features.isfinite().all()):
            row = int((~features.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"Features must be finite; those of {name} image {row} are not.")
