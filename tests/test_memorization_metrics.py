"""Largest Pearson correlation: scipy as oracle, exactness where float32 fails, independence of the blocks."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from metrics import correlation_search, exact_product
from metrics.correlation_search import Search
from metrics.memorization import largest_correlation, memorization_scores, memorization_view, paint_background
from metrics.pixels import Pixels


def images(n, channels=4, height=9, width=16, seed=0, low=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def same(a, b):
    fields = ("r", "index", "mirrored", "r_channel", "index_channel", "mirrored_channel")
    return all(torch.equal(getattr(a, f).nan_to_num(nan=-9), getattr(b, f).nan_to_num(nan=-9)) for f in fields)


def test_largest_of_all_pearson_correlations_as_scipy_computes_them():
    queries, references = images(6, seed=1), images(11, seed=2)
    found = largest_correlation(queries, references.split(4))
    q, x = queries.double().numpy(), references.double().numpy()
    for i in range(6):
        joint = [pearsonr(q[i].ravel(), x[j].ravel()).statistic for j in range(11)]
        assert found.r[i].item() == pytest.approx(max(joint), abs=1e-14)
        assert found.index[i].item() == np.argmax(joint)
        for c in range(4):
            single = [pearsonr(q[i, c].ravel(), x[j, c].ravel()).statistic for j in range(11)]
            assert found.r_channel[i, c].item() == pytest.approx(max(single), abs=1e-14)
            assert found.index_channel[i, c].item() == np.argmax(single)
    assert found.r.dtype == torch.float64


def test_the_result_does_not_depend_on_the_blocks_bit_for_bit(monkeypatch):
    queries, references = images(13, seed=3), images(40, seed=4)
    groups = torch.arange(13) % 5, torch.arange(40) % 5
    kwargs = {"query_groups": groups[0], "reference_groups": groups[1], "mirror_axis": -2}
    whole = largest_correlation(queries, [references], **kwargs)
    for block, rows in ((1, 3), (7, 4), (39, 13)):
        monkeypatch.setattr(correlation_search, "TILE", {"cpu": (rows, 5)})
        assert same(largest_correlation(queries, references.split(block), **kwargs), whole)


@pytest.mark.parametrize("product", ["_float32", "_float64"])
def test_other_products_than_int8_give_the_same_bits(monkeypatch, product):
    queries, references = images(5, seed=5), images(9, seed=6)
    queries[0], references[0] = 0, 255
    queries[0, :, 0, 0], references[0, :, 0, 0] = 255, 0  # the extremes of int8
    fast = largest_correlation(queries, [references])
    monkeypatch.setattr(exact_product, "_fastest", lambda device: getattr(exact_product, product))
    assert same(largest_correlation(queries, [references]), fast)


def test_products_longer_than_int32_can_hold_are_split(monkeypatch):
    queries, references = images(3, seed=7), images(4, seed=8)
    whole = largest_correlation(queries, [references])
    monkeypatch.setattr(exact_product, "INT32_SAFE_LENGTH", 10)
    assert same(largest_correlation(queries, [references]), whole)


def test_an_exact_copy_is_told_from_a_copy_with_one_pixel_changed_by_one():
    original = images(1, height=256, width=256, seed=9)
    near = original.clone()
    near[0, 2, 100, 100] += 1
    found = largest_correlation(original, [torch.cat([near, original])])
    assert (found.r.item(), found.index.item()) == (pytest.approx(1.0, abs=5e-16), 1)
    alone = largest_correlation(original, [near])
    x, y = (t.double().flatten() for t in (original, near))
    assert 0 < 1 - alone.r.item() < 1e-9
    assert alone.r_channel[0, 2].item() < 1 - 1e-11
    assert alone.r_channel[0, [0, 1, 3]].tolist() == pytest.approx([1.0] * 3, abs=5e-16)
    in_float32 = torch.corrcoef(torch.stack([x, y]).float())[0, 1].item()
    assert abs(in_float32 - alone.r.item()) > abs(1 - alone.r.item())  # float32 errs by more than the difference sought


def test_correlation_is_free_of_brightness_and_contrast():
    reference = images(1, seed=10, high=100)
    found = largest_correlation(reference * 2 + 50, [reference])
    assert found.r.item() == pytest.approx(1.0, abs=1e-15)


def test_equal_correlations_give_the_lowest_position():
    queries = images(2, seed=11)
    references = torch.cat([images(3, seed=12), queries, images(1, seed=13), queries])
    for block in (1, 4, 100):
        found = largest_correlation(queries, references.split(block))
        assert found.index.tolist() == [3, 4]
        assert found.index_channel.tolist() == [[3] * 4, [4] * 4]


def test_a_constant_channel_is_nan_and_never_chosen():
    queries, references = images(3, seed=14), images(5, seed=15)
    queries[0, 1] = 7
    queries[1] = 0
    references[2, 3] = 128
    found = largest_correlation(queries, references.split(2))
    assert found.r_channel[0, 1].isnan()
    assert found.index_channel[0, 1] == -1
    assert not found.r[0].isnan()
    assert found.r_channel[1].isnan().all()
    assert (found.r[1].isnan().item(), found.index[1].item()) == (True, -1)
    assert 2 not in found.index_channel[:, 3].tolist()
    blank = largest_correlation(queries, [torch.zeros_like(references)])
    assert blank.r.isnan().all()
    assert blank.index.tolist() == [-1, -1, -1]
    assert largest_correlation(queries, []).index.tolist() == [-1, -1, -1]


def test_slices_of_one_group_are_not_compared():
    slices = images(6, seed=16)
    patient = torch.tensor([0, 0, 1, 1, 2, 2])
    found = largest_correlation(slices, slices.split(4), query_groups=patient, reference_groups=patient)
    for i in range(6):
        others = (patient != patient[i]).nonzero()[:, 0]
        alone = largest_correlation(slices[i : i + 1], [slices[others]])
        assert found.r[i] == alone.r[0]
        assert found.index[i] == others[alone.index[0]]
    one = torch.zeros(6, dtype=torch.int64)
    assert largest_correlation(slices, [slices], query_groups=one, reference_groups=one).index.tolist() == [-1] * 6


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_mirrored_copy_is_found_and_named(axis):
    references = images(5, seed=17)
    queries = torch.stack([references[3].flip(axis), references[1]])
    found = largest_correlation(queries, references.split(2), mirror_axis=axis)
    assert found.r.tolist() == pytest.approx([1.0, 1.0], abs=5e-16)
    assert found.index.tolist() == [3, 1]
    assert found.mirrored.tolist() == [True, False]
    assert found.mirrored_channel.tolist() == [[True] * 4, [False] * 4]
    assert largest_correlation(queries, [references]).r[0] < 0.5


def test_types_shapes_and_groups_that_do_not_fit_are_refused():
    slices = images(3)
    with pytest.raises(ValueError, match=r"images uint8 \(N, C, H, W\).*float32"):
        largest_correlation(slices.float(), [slices])
    with pytest.raises(ValueError, match=r"references \(B, 4, 9, 16\)"):
        largest_correlation(slices, [slices[:, :, :8]])
    with pytest.raises(ValueError, match=r"of both"):
        largest_correlation(slices, [slices], query_groups=torch.arange(3))
    for n in (2, 4):
        with pytest.raises(ValueError, match=r"one group per reference slice"):
            largest_correlation(slices, [slices], query_groups=torch.arange(3), reference_groups=torch.arange(n))
    with pytest.raises(ValueError, match=r"mirror_axis"):
        largest_correlation(slices, [slices], mirror_axis=1)


def heads(n, seed):
    """Slices with a dark noisy background: modalities 0..255, label 0..3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(20, 256, (n, 5, 12, 14), dtype=torch.uint8, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(14), indexing="ij")
    for k in range(n):
        outside = (rows - 5.5 - k % 3).square() + (columns - 6.5).square() > 25
        x[k] = torch.where(outside, x[k] % 6, x[k])
    x[:, 4] %= 4
    return x


def painted(image):
    """As the definition says it, in float64: (4, H, W)."""
    image = image.double()
    brain = image.amax(dim=0) > 5
    mean = torch.floor(image[:, brain].mean(dim=1) + 0.5)
    return torch.where(brain, image, mean[:, None, None])


def test_outside_the_brain_every_modality_takes_the_mean_of_the_brain():
    slices = heads(6, seed=18)
    slices[5] = 5  # no brain
    found = paint_background(slices[:, :4])
    for image, ours in zip(slices[:5, :4], found, strict=False):
        assert torch.equal(ours.double(), painted(image))
    assert not found[5].any()


def test_every_score_is_what_its_name_says():
    queries, references = heads(3, seed=19), heads(7, seed=20)
    scores = memorization_scores(["T1", "T1ce", "T2", "FLAIR"])
    search = Search(Pixels.of(queries, view=memorization_view), scores)
    search.compare(Pixels.of(references, view=memorization_view), 0)
    found = dict(zip((score.name for score in scores), search.nearest.value[..., 0].numpy(), strict=True))
    assert len(found) == 18
    for i, query in enumerate(queries):
        expected = {name: [] for name in found}
        for reference in references:
            pair = [t.double() * torch.tensor([1, 1, 1, 1, 85])[:, None, None] for t in (query, reference)]
            images_of = {"": pair, "brain ": [painted(query[:4]), painted(reference[:4])], "distance ": pair}
            for kind, (x, y) in images_of.items():
                parts = {name: [c] for c, name in enumerate(("T1", "T1ce", "T2", "FLAIR"))}
                parts |= {"all": [0, 1, 2, 3], "label": [4], "all + label": [0, 1, 2, 3, 4]}
                for name, channels in parts.items():
                    if kind + name in expected:
                        a, b = x[channels].flatten(), y[channels].flatten()
                        r = pearsonr(a, b).statistic
                        expected[kind + name].append(-((a - b) ** 2).sum().item() if kind == "distance " else r)
        for name, values in expected.items():
            assert found[name][i] == pytest.approx(max(values), rel=0, abs=1e-13), name


def test_within_the_brain_the_outline_counts_for_nothing():
    """Two unrelated heads of one outline: near over the whole image, far within the brain."""
    x, y = heads(1, seed=21), heads(1, seed=22)
    scores = [
        score for score in memorization_scores(["T1", "T1ce", "T2", "FLAIR"]) if score.name in ("all", "brain all")
    ]
    search = Search(Pixels.of(x, view=memorization_view), scores)
    search.compare(Pixels.of(y, view=memorization_view), 0)
    whole, brain = search.nearest.value[:, 0, 0].tolist()
    assert whole > 0.6
    assert abs(brain) < 0.1
