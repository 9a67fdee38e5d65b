"""The nearest training slice of every synthetic slice by embeddings, beside its null: held-out real slices.

Embeddings are float32 vectors of length 1; near is what has a large cosine. In float32, cosines of near copies differ
by rounding alone, and by another rounding in every block size. So components are rounded to multiples of 2^-25, about
as float32 has them. Products are then multiples of 2^-50 and all partial sums are below 2, which float64 holds exactly
in whatever order they are formed: no bit of a search depends on blocks, threads or processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from rich.progress import track
from torch import Tensor

from datamodules.slice_set import Slices, SliceSet

Embed = Callable[[Slices], npt.NDArray[np.float32]]
"""uint8 (N, 5, H, W) -> (N, D) of length 1."""

GRID = 2.0**25
QUERY_ROWS, REFERENCE_ROWS = 1024, 8192
"""Of one product: 64 MB of float64."""
READ_ROWS = 256
LENGTH_TOLERANCE = 1e-4

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NearestEmbedding:
    """The cosine of every query with its nearest reference, float64 (Q,), and the position of that, int64 (Q,)."""

    cosine: Floats
    index: npt.NDArray[np.int64]


class EmbeddingIndex:
    """The embeddings of a training set, in which nearest slices are looked up.

    Args:
        training: the slices to compare with.
        embed: turns slices into vectors of length 1.
    """

    def __init__(self, training: SliceSet, embed: Embed) -> None:
        self.embed = embed
        self.embeddings = embed_set(training, embed)

    def nearest(self, slices: Slices) -> NearestEmbedding:
        """Look slices up: uint8 (Q, 5, H, W)."""
        return nearest_embedding(self.embed(slices), self.embeddings)

    def nearest_of(self, slices: SliceSet) -> NearestEmbedding:
        """Look all slices of a set up."""
        return nearest_embedding(embed_set(slices, self.embed), self.embeddings)


def embedding_search(synthetic: SliceSet, training: SliceSet, held_out: SliceSet, embed: Embed) -> pd.DataFrame:
    """Look up synthetic and held-out slices among the training slices.

    Args:
        synthetic: the set that is judged.
        training: real slices that its generator may have seen.
        held_out: real slices of other patients, which neither the generator nor the detector may have seen.
        embed: turns slices into vectors of length 1.

    Returns:
        A row per slice: set ("synthetic" or "held-out"), position in it, cosine, nearest (position in the training
        set), nearest_patient.

    Raises:
        ValueError: if a held-out patient is in the training set, or an embedding is not of length 1.
    """
    shared = sorted(set(held_out.patients) & set(training.patients))
    if shared:
        raise ValueError(
            f"Expected held-out slices of patients outside the training set, but it has {len(shared)} of them "
            f"({', '.join(shared[:5])}, ...): they cannot say how near a slice comes that owes nothing to it."
        )
    index = EmbeddingIndex(training, embed)
    patients = training.index["patient"].to_numpy(dtype=object)
    tables = []
    for name, queries in (("synthetic", synthetic), ("held-out", held_out)):
        found = index.nearest_of(queries)
        columns = {"set": name, "position": np.arange(len(queries)), "cosine": found.cosine, "nearest": found.index}
        tables.append(pd.DataFrame(columns).assign(nearest_patient=patients[found.index]))
    return pd.concat(tables, ignore_index=True)


def embed_set(slices: SliceSet, embed: Embed) -> npt.NDArray[np.float32]:
    """Embed all slices of a set: (n, D)."""
    starts = range(0, len(slices), READ_ROWS)
    shown = track(starts, description="embedding", transient=True) if len(starts) > 20 else starts
    parts = [embed(slices.read(range(start, min(start + READ_ROWS, len(slices))))) for start in shown]
    return np.concatenate(parts)


def nearest_embedding(queries: npt.NDArray[np.float32], references: npt.NDArray[np.float32]) -> NearestEmbedding:
    """Find the reference with the largest cosine for every query, exactly for components rounded to 2^-25.

    The rounding changes a cosine by at most sqrt(D) 2^-25.

    Args:
        queries: (Q, D) of length 1.
        references: (R, D) of length 1, R > 0.

    Returns:
        The nearest ones; among equal cosines the lowest position.

    Raises:
        ValueError: if a vector is not of length 1 to within 1e-4, or there are no references.
    """
    if not len(references):
        raise ValueError("Expected embeddings of training slices to compare with, but got none.")
    query, reference = (_on_grid(vectors) for vectors in (queries, references))
    best = torch.full((len(query),), -torch.inf, dtype=torch.float64)
    index = torch.zeros(len(query), dtype=torch.int64)
    for first in range(0, len(query), QUERY_ROWS):
        rows = slice(first, first + QUERY_ROWS)
        for start in range(0, len(reference), REFERENCE_ROWS):
            cosine, place = (query[rows] @ reference[start : start + REFERENCE_ROWS].T).max(dim=1)  # the first of equal
            nearer = cosine > best[rows]
            best[rows] = torch.where(nearer, cosine, best[rows])
            index[rows] = torch.where(nearer, place + start, index[rows])
    return NearestEmbedding(best.numpy(), index.numpy())


def _on_grid(vectors: npt.NDArray[np.float32]) -> Tensor:
    rounded = torch.from_numpy(vectors).double().mul_(GRID).round_().div_(GRID)
    wrong = ((rounded.norm(dim=1) - 1.0).abs() <= LENGTH_TOLERANCE).logical_not_()  # NaN is wrong too
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"Expected embeddings of length 1, but number {row} has length {float(rounded[row].norm()):.6g}. "
            "Divide each by its length."
        )
    return rounded
