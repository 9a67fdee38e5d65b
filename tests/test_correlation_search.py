"""The exact search against brute force: every score, flip and shift, any division into tiles and blocks."""

import numpy as np
import pytest
import torch

import metrics.correlation_search as correlation_search
from metrics.correlation_search import Search
from metrics.nearest import Nearest
from metrics.pixels import IDENTITY, Pixels, Score, Transform, flips_and_shifts
from metrics.similarity import ColumnTerms, Distance, Pearson, RowTerms, make_upper_bounds

CHANNELS, HEIGHT, WIDTH = 3, 8, 12
SCORES = [
    Score("first", (0,), Pearson()),
    Score("last", (2,), Pearson()),
    Score("two", (0, 2), Pearson()),
    Score("all", (0, 1, 2), Pearson()),
    Score("distance", (1,), Distance()),
    Score("distance all", (0, 1, 2), Distance()),
]


def images(n, seed=0, low=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, CHANNELS, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)


def hard_images():
    """Dark, nearly constant, constant, extreme, equal and nearly equal images: what bounds and ties can fail on."""
    x = images(12, seed=1)
    x[1] = x[0]
    x[2] = x[0]
    x[2, 1, 3, 4] ^= 1
    x[3] = 7
    x[4] = 0
    x[4, :, 0, 0] = 1
    x[5] = 255
    x[5, :, 2, 2] = 254
    x[6, 1] = 128
    x[7] = x[7] % 2
    x[8] = torch.where(x[8] > 127, 255, 0).to(torch.uint8)
    x[9] = 255 - x[8]
    return x


def value_of(score, x, y):
    a, b = (t[list(score.channels)].numpy().astype(np.int64).ravel() for t in (x, y))
    if isinstance(score.measure, Distance):
        return -float(((a - b) ** 2).sum())
    if a.min() == a.max() or b.min() == b.max():
        return -np.inf
    return np.corrcoef(a, b)[0, 1]


def transformed(image, transform):
    if transform.mirror_axis is not None:
        image = image.flip(transform.mirror_axis)
    return image.roll(transform.shift_px, dims=(-2, -1))


def brute_force(queries, references, transforms, allowed=lambda i, j: True):
    """(S, Q, B) best over the transforms."""
    value = np.full((len(SCORES), len(queries), len(references)), -np.inf)
    for i, query in enumerate(queries):
        for transform in transforms:
            changed = transformed(query, transform)
            for j, reference in enumerate(references):
                if allowed(i, j):
                    for s, score in enumerate(SCORES):
                        value[s, i, j] = max(value[s, i, j], value_of(score, changed, reference))
    return value


def run(queries, references, k, transforms=(IDENTITY,), block=1000, groups=(None, None), order=1):
    search = Search(Pixels.of(queries, groups[0]), SCORES, k, transforms)
    for start in list(range(0, len(references), block))[::order]:
        part = slice(start, start + block)
        search.compare(Pixels.of(references[part], None if groups[1] is None else groups[1][part]), start)
    return search.nearest


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("value", "index", "transform"))


@pytest.mark.parametrize(
    "transforms",
    [(IDENTITY,), (IDENTITY, Transform(-1)), flips_and_shifts(-2, 1)[::3]],
    ids=["as they are", "flipped", "flipped and shifted"],
)
def test_top_k_of_all_pairs(transforms):
    queries, references = torch.cat([hard_images()[[0, 2, 3, 4, 7]], images(2, seed=2)]), hard_images()
    expected = brute_force(queries, references, transforms)
    found = run(queries, references, 4, transforms)
    ranked = -np.sort(-expected, axis=2)[..., :4]
    np.testing.assert_allclose(found.value.numpy(), ranked, rtol=0, atol=1e-13)
    for s, score in enumerate(SCORES):
        for i, query in enumerate(queries):
            for value, j, t in zip(found.value[s, i], found.index[s, i], found.transform[s, i], strict=True):
                if j < 0:
                    assert value == -np.inf
                else:  # index and transform name a pair of that value
                    pair = value_of(score, transformed(query, transforms[t]), references[j])
                    assert value.item() == pytest.approx(pair, rel=0, abs=1e-13)


@pytest.mark.parametrize("k", [1, 3])
def test_no_bit_depends_on_tiles_blocks_or_their_order(monkeypatch, k):
    queries, references = torch.cat([hard_images(), images(5, seed=3)]), torch.cat([images(9, seed=4), hard_images()])
    groups = torch.arange(17) % 4, torch.arange(21) % 5
    transforms = (IDENTITY, Transform(-1), Transform(None, (1, -1)))
    whole = run(queries, references, k, transforms, groups=groups)
    for tile, stripe, block, order in (((9, 20), 1, 1, 1), ((6, 4), 200, 9, -1), ((17, 3), 10**6, 10, -1)):
        monkeypatch.setattr(correlation_search, "TILE", {"cpu": tile})
        monkeypatch.setattr(correlation_search, "STRIPE_BYTES", {"cpu": stripe})
        assert same(run(queries, references, k, transforms, block, groups, order), whole)


def test_searches_of_parts_merge_and_resume_to_the_whole():
    queries, references = images(4, seed=5), torch.cat([hard_images(), images(6, seed=6)])
    whole = run(queries, references, 3)
    first = run(queries, references[:7], 3)
    rest = Search(Pixels.of(queries), SCORES, 3)
    rest.compare(Pixels.of(references[7:]), 7)
    resumed = Search(Pixels.of(queries), SCORES, 3, nearest=first)
    rest.nearest.merge(Nearest(*(t.clone() for t in (first.value, first.index, first.transform))))
    resumed.compare(Pixels.of(references[7:]), 7)
    assert same(rest.nearest, whole)
    assert same(resumed.nearest, whole)


def test_equal_groups_are_not_compared():
    queries, references = images(5, seed=7), images(9, seed=8)
    ours, theirs = torch.tensor([0, 1, 1, 2, 9]), torch.arange(9) // 3
    found = run(queries, references, 2, groups=(ours, theirs))
    expected = brute_force(queries, references, (IDENTITY,), lambda i, j: ours[i] != theirs[j])
    np.testing.assert_allclose(found.value.numpy(), -np.sort(-expected, axis=2)[..., :2], rtol=0, atol=1e-13)
    one = run(references, references, 2, groups=(torch.zeros(9), torch.zeros(9)))
    assert one.index.eq(-1).all()


@pytest.mark.parametrize("measure", [Pearson(), Distance()])
@pytest.mark.parametrize("channels", [(0,), (0, 1, 2)])
def test_bounds_lie_above_every_exact_value_and_close_to_it(measure, channels):
    pixels = Pixels.of(torch.cat([hard_images(), images(20, seed=9), images(20, seed=10, high=3)]))
    moments = pixels.moments(channels)
    rows = RowTerms.stack([measure.row_terms(moments)])
    columns = ColumnTerms.stack([measure.column_terms(moments)])
    u = pixels.values[list(channels)].flatten(2).double()
    sxy = (u @ u.transpose(1, 2)).sum(dim=0)
    bounds = (u @ u.transpose(1, 2)).float().sum(dim=0)[None]
    make_upper_bounds(bounds, rows, columns)
    n = len(pixels)
    i, j = (t.flatten() for t in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    exact = measure.value(sxy.long().flatten(), moments[i], moments[j]).view(n, n)
    needed = (exact - rows.summand[0, :, None]) * rows.factor[0, :, None]
    defined = exact.isfinite()
    assert (bounds[0].double() >= needed)[defined].all()
    assert (bounds[0] == -torch.inf)[~defined & (rows.factor[0, :, None] > 0)].all()
    if isinstance(measure, Pearson):
        ordinary = slice(12, 32)  # images with contrast
        room = (bounds[0].double() - needed)[ordinary, ordinary] / rows.factor[0, ordinary, None]
        assert room.max() < 1e-5


def test_almost_all_pairs_are_dismissed_by_their_bound(monkeypatch):
    computed = []
    original = Pearson.value
    monkeypatch.setattr(
        Pearson, "value", lambda self, sxy, x, y: computed.append(len(sxy)) or original(self, sxy, x, y)
    )
    score = [Score("all", (0, 1, 2), Pearson())]
    search = Search(Pixels.of(images(50, seed=11)), score, k=1)
    for start in range(0, 2000, 100):
        search.compare(Pixels.of(images(100, seed=100 + start)), start)
    records = 50 * sum(1 / n for n in range(1, 21))  # expected number of queries whose best a block raises
    assert sum(computed) < 4 * records < 0.02 * 50 * 2000


def test_a_score_is_added_up_from_earlier_scores():
    assert correlation_search._parts(SCORES[:3], SCORES[3]) == ([2], [1])
    assert correlation_search._parts([], SCORES[3]) == ([], [0, 1, 2])
    assert correlation_search._parts(SCORES[:5], SCORES[5]) == ([3], [])


def test_distances_are_exact_integers_where_float32_sees_none():
    x = images(1, seed=12)
    near = x.clone()
    near[0, 1, 0, 0] ^= 1
    found = run(x, torch.cat([near, x]), 2)
    assert found.value[5, 0].tolist() == [0.0, -1.0]
    assert found.index[5, 0].tolist() == [1, 0]


def test_shifts_and_flips_are_listed_from_the_nearest():
    transforms = flips_and_shifts(-2, 2)
    assert len(transforms) == 50
    assert transforms[:4] == (IDENTITY, Transform(-2), Transform(None, (-1, 0)), Transform(-2, (-1, 0)))
    assert len(set(transforms)) == 50
    assert flips_and_shifts(None, 0) == (IDENTITY,)
    with pytest.raises(ValueError, match=r"mirror_axis.*1"):
        flips_and_shifts(1, 0)
    with pytest.raises(ValueError, match=r"max_shift_px.*-3"):
        flips_and_shifts(None, -3)


def test_what_does_not_fit_is_refused():
    pixels = Pixels.of(images(3))
    with pytest.raises(ValueError, match=r"Score far.*\(3,\)"):
        Search(pixels, [Score("far", (3,), Pearson())])
    with pytest.raises(ValueError, match=r"references \(B, 3, 8, 12\)"):
        Search(pixels, SCORES).compare(Pixels.of(images(3)[:, :2]), 0)
    with pytest.raises(ValueError, match=r"groups of both"):
        Search(pixels, SCORES).compare(Pixels.of(images(3), torch.arange(3)), 0)
    with pytest.raises(ValueError, match=r"one group per image.*2 for 3"):
        Pixels.of(images(3), torch.arange(2))
    with pytest.raises(ValueError, match=r"uint8 \(N, C, H, W\).*float32"):
        Pixels.of(images(3).float())
