"""Largest Pearson correlation: scipy as oracle, exactness where float32 fails, independence of the blocks."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

import metrics.memorization as memorization
from metrics.memorization import largest_correlation


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


def test_the_result_does_not_depend_on_the_blocks_bit_for_bit():
    queries, references = images(13, seed=3), images(40, seed=4)
    groups = torch.arange(13) % 5, torch.arange(40) % 5
    kwargs = {"query_groups": groups[0], "reference_groups": groups[1], "mirror_axis": -2}
    whole = largest_correlation(queries, [references], **kwargs)
    for block, rows in ((1, 1), (7, 4), (39, 13)):
        assert same(largest_correlation(queries, references.split(block), query_rows=rows, **kwargs), whole)


def test_float64_and_int8_products_give_the_same_bits(monkeypatch):
    queries, references = images(5, seed=5), images(9, seed=6)
    queries[0], references[0] = 0, 255
    queries[0, :, 0, 0], references[0, :, 0, 0] = 255, 0  # the extremes of int8
    fast = largest_correlation(queries, [references])
    monkeypatch.setattr(memorization, "_int8_is_exact", lambda device: False)
    assert same(largest_correlation(queries, [references]), fast)


def test_products_longer_than_int32_can_hold_are_split(monkeypatch):
    monkeypatch.setattr(memorization, "INT32_SAFE_LENGTH", 10)
    queries, references = images(3, seed=7), images(4, seed=8)
    split = largest_correlation(queries, [references])
    monkeypatch.undo()
    assert same(split, largest_correlation(queries, [references]))


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
    with pytest.raises(ValueError, match=r"queries uint8 \(Q, C, H, W\).*float32"):
        largest_correlation(slices.float(), [slices])
    with pytest.raises(ValueError, match=r"reference blocks uint8 \(B, 4, 9, 16\)"):
        largest_correlation(slices, [slices[:, :, :8]])
    with pytest.raises(ValueError, match=r"of both"):
        largest_correlation(slices, [slices], query_groups=torch.arange(3))
    for n in (2, 4):
        with pytest.raises(ValueError, match=r"one group per reference slice"):
            largest_correlation(slices, [slices], query_groups=torch.arange(3), reference_groups=torch.arange(n))
    with pytest.raises(ValueError, match=r"mirror_axis"):
        largest_correlation(slices, [slices], mirror_axis=1)
