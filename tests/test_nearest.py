"""The top-k state: a sort of everything that was offered, in whatever order and pieces it came."""

import numpy as np
import torch

from metrics.nearest import Nearest

SCORES, QUERIES, REFERENCES, TRANSFORMS = 2, 5, 12, 3


def candidates(seed=0):
    """All pairs under all transforms; few different values, so that many are equal."""
    rng = np.random.default_rng(seed)
    shape = SCORES, QUERIES, REFERENCES, TRANSFORMS
    return np.stack([*(i.ravel() for i in np.indices(shape)), rng.integers(0, 6, np.prod(shape))], axis=1)


def offered(parts, k):
    nearest = Nearest.empty(SCORES, QUERIES, k)
    for part in parts:
        s, q, index, transform, value = torch.from_numpy(part).T
        nearest.offer(s, q, value.double(), index, transform)
    return nearest


def sorted_by_hand(everything, k):
    value, index, transform = (np.full((SCORES, QUERIES, k), nothing) for nothing in (-np.inf, -1, -1))
    for s in range(SCORES):
        for q in range(QUERIES):
            mine = everything[(everything[:, 0] == s) & (everything[:, 1] == q)]
            best = {}
            for row in sorted(mine.tolist(), key=lambda row: (-row[4], row[3])):
                best.setdefault(row[2], row)
            for rank, row in enumerate(sorted(best.values(), key=lambda row: (-row[4], row[2]))[:k]):
                value[s, q, rank], index[s, q, rank], transform[s, q, rank] = row[4], row[2], row[3]
    return value, index, transform


def equal(nearest, expected):
    for ours, theirs in zip((nearest.value, nearest.index, nearest.transform), expected, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def parts_of(everything, count, rng):
    """Pieces in which a reference occurs once for a score and query: one transform at a time."""
    shuffled = rng.permutation(everything)
    pieces = np.array_split(shuffled, count)
    return [piece[piece[:, 3] == t] for piece in pieces for t in rng.permutation(TRANSFORMS)]


def test_every_order_and_division_gives_the_sorted_list():
    everything, rng = candidates(), np.random.default_rng(1)
    for k in (1, 3, REFERENCES, REFERENCES + 2):
        expected = sorted_by_hand(everything, k)
        for count in (1, 2, 7):
            equal(offered([part for part in parts_of(everything, count, rng) if len(part)], k), expected)


def test_merged_searches_are_one_search():
    everything, rng = candidates(seed=2), np.random.default_rng(3)
    expected = sorted_by_hand(everything, 4)
    for split in (everything[:, 2] < 5, everything[:, 3] < 1, rng.random(len(everything)) < 0.5):
        one, other = (
            offered([p for p in parts_of(half, 1, rng) if len(p)], 4)
            for half in (everything[split], everything[~split])
        )
        one.merge(other)
        equal(one, expected)


def test_an_empty_state_changes_nothing():
    everything = candidates(seed=4)
    nearest = offered([everything[everything[:, 3] == 1]], 2)
    before = nearest.value.clone()
    nearest.merge(Nearest.empty(SCORES, QUERIES, 2))
    assert torch.equal(nearest.value, before)
    empty = Nearest.empty(SCORES, QUERIES, 2)
    empty.merge(nearest)
    assert torch.equal(empty.index, nearest.index)
