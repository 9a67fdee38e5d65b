"""Memorization: how near a slice comes to any training slice, in every modality, over all, and within the brain.

The first number is that of Usman Akbar, Wang, Eklund, "Beware of diffusion models for synthesizing medical images"
(arXiv 2305.07644): Pearson over the whole image with every training image, and the largest of these. It means nothing
by itself (unrelated heads correlate at 0.9: shared outline and background), so it is always put beside its null: the
same number for held-out real patients against the same training slices (`summarize`).

Within the brain (`paint_background`) outline and background count for nothing: whatever lies outside a slice's own
brain takes the mean grey of that brain, in each modality. Then Pearson over the whole image is the correlation of the
two brains, each measured from its own mean, where they overlap; what only one of them covers adds to its own variance
and so can only lower r. The definition is symmetric, needs no mask that both must share, and is a sum of products of
8-bit integers like the first one, so it is just as exact and fast. A synthetic slice needs no clean background for it.

All numbers are exact (`correlation_search`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from metrics.correlation_search import Search
from metrics.exact_product import sums
from metrics.pixels import IDENTITY, OFFSET, Pixels, Score, Transform
from metrics.similarity import Distance, Pearson
from metrics.statistics import NullComparison, conformal_p_values, summarize

__all__ = [
    "LargestCorrelation",
    "NullComparison",
    "conformal_p_values",
    "largest_correlation",
    "memorization_scores",
    "memorization_view",
    "paint_background",
    "summarize",
]

BACKGROUND = 20
"""Grey level up to which a pixel of all modalities is background.

It is 0 in real slices, but generators leave some grain: with a limit of 5, all of a grainy slice would be brain, and
the brain of a copy unlike its own. The outermost rim of real brains, where they fill a pixel only in part, goes too."""
LABEL_STEP = 85
"""Between the grey levels of the label's classes 0..3, as generators are shown them."""


def paint_background(images: torch.Tensor) -> torch.Tensor:
    """Give what is outside the brain the mean of the brain, rounded half up, in every modality.

    Args:
        images: uint8 (N, C, H, W), the modalities. The brain is where any of them is above `BACKGROUND`.

    Returns:
        uint8 (N, C, H, W); all 0 without brain.
    """
    inside = (images.amax(dim=1, keepdim=True) > BACKGROUND).view(torch.uint8)
    mask = inside.neg()  # 255 in the brain
    brain = images & mask
    n_channels, n_pixels = images.shape[1], images[0, 0].numel()
    total = sums((brain ^ OFFSET).view(torch.int8).flatten(2).flatten(0, 1)) + OFFSET * n_pixels
    count = sums(inside.view(torch.int8).flatten(1)).clamp(min=1)[:, None]
    mean = (2 * total.view(-1, n_channels) + count) // (2 * count)
    return brain.bitwise_or_(mean.to(torch.uint8)[..., None, None] & ~mask)


def memorization_view(slices: torch.Tensor) -> list[torch.Tensor]:
    """Make of uint8 slices (N, 5, H, W) what `memorization_scores` compare: 9 channels, uint8 (N, H, W).

    The four modalities, the label as grey levels, the modalities within the brain.
    """
    modalities, label = slices[:, :4], slices[:, 4]
    return [*modalities.unbind(1), label * LABEL_STEP, *paint_background(modalities).unbind(1)]


def memorization_scores(modalities: Sequence[str]) -> list[Score]:
    """All that is compared: Pearson and distance in each modality and over all four, without and with the label.

    "T1" is Pearson over the whole image, "brain T1" within the brain, "distance T1" the Euclidean distance.
    """
    pearson, distance = Pearson(), Distance()
    single = list(enumerate(modalities))
    return [
        *(Score(name, (channel,), pearson) for channel, name in single),
        Score("label", (4,), pearson),
        Score("all", (0, 1, 2, 3), pearson),
        Score("all + label", (0, 1, 2, 3, 4), pearson),
        *(Score(f"brain {name}", (channel + 5,), pearson) for channel, name in single),
        Score("brain all", (5, 6, 7, 8), pearson),
        *(Score(f"distance {name}", (channel,), distance) for channel, name in single),
        Score("distance all", (0, 1, 2, 3), distance),
        Score("distance all + label", (0, 1, 2, 3, 4), distance),
    ]


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
) -> LargestCorrelation:
    """Find the reference slice with the largest Pearson correlation for every query slice, exactly.

    Args:
        queries: uint8 (Q, C, H, W).
        reference_blocks: uint8 blocks (B, C, H, W), B may vary; they are read once, one at a time, so a memory-mapped
            set streams through. Positions count on over the blocks.
        query_groups: int (Q,), for instance the patient of each query.
        reference_groups: int (total of the B,). Slices of equal group are not compared (leave one patient out).
        mirror_axis: image axis (-1 or -2) along which queries are flipped too; None compares them as they are.

    Returns:
        The nearest neighbours. Among equal correlations the lowest position wins, and then the image as it is over its
        mirror image.

    Raises:
        ValueError: if types or shapes do not fit, or groups are given for one side only.
    """
    transforms = [IDENTITY] if mirror_axis is None else [IDENTITY, Transform(mirror_axis)]
    query = Pixels.of(queries, query_groups)
    channels = range(queries.shape[1])
    scores = [Score(f"channel {c}", (c,), Pearson()) for c in channels] + [Score("all", tuple(channels), Pearson())]
    blocks = _with_groups((block.to(queries.device) for block in reference_blocks), reference_groups)
    search, first = Search(query, scores, transforms=transforms), 0
    for block in blocks:
        search.compare(block, first)
        first += len(block)
    found = search.nearest
    index, mirrored = found.index[..., 0], found.transform[..., 0] == 1
    r = found.value[..., 0].masked_fill(index < 0, torch.nan)
    return LargestCorrelation(r[-1], index[-1], mirrored[-1], r[:-1].T, index[:-1].T, mirrored[:-1].T)


def _with_groups(blocks: Iterable[torch.Tensor], groups: torch.Tensor | None) -> Iterator[Pixels]:
    first = 0
    for block in blocks:
        if groups is not None and len(groups) < first + len(block):
            raise ValueError(f"Expected one group per reference slice, but got only {len(groups)} groups.")
        yield Pixels.of(block, None if groups is None else groups[first : first + len(block)])
        first += len(block)
    if groups is not None and len(groups) != first:
        raise ValueError(f"Expected one group per reference slice, but got {len(groups)} for {first} slices.")
