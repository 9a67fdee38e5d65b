"""Nearest neighbours of features against scikit-learn and brute force, where distances are hard to tell apart too."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from metrics import feature_neighbours
from metrics.feature_neighbours import nearest_neighbours, nearest_others, squared_distances


@pytest.fixture(params=[5, 4096], autouse=True)
def _rows(request, monkeypatch):
    """The result must not depend on how many features are compared at a time."""
    monkeypatch.setattr(feature_neighbours, "ROWS", request.param)


def features(n, width=16, seed=0, mean=0.0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_neighbours_equal_scikit_learn(mean):
    queries, references = features(23, seed=1, mean=mean), features(41, seed=2, mean=mean)
    found = nearest_neighbours(queries, references, k=5)
    assert found.distance.dtype == torch.float64
    model = NearestNeighbors(n_neighbors=5, algorithm="kd_tree").fit(references.double())
    distance, index = model.kneighbors(queries.double())
    np.testing.assert_allclose(found.distance, distance, rtol=1e-12)
    np.testing.assert_array_equal(found.index, index)


def test_near_copies_keep_their_distance_where_float32_loses_it():
    references = features(30, width=64, mean=100.0)
    shifts = torch.logspace(-3, 0, 30)[:, None]
    queries = references + shifts * features(30, width=64, seed=5)
    found = nearest_neighbours(queries, references)
    expected = (queries.double() - references.double()).norm(dim=1)
    assert found.index[:, 0].tolist() == list(range(30))
    np.testing.assert_allclose(found.distance[:, 0], expected, rtol=1e-14)
    by_product = torch.cdist(queries, references, compute_mode="use_mm_for_euclid_dist").amin(1)
    assert (by_product - expected).abs().max() > 0.1


def test_exact_copies_are_at_distance_zero_and_the_lowest_position_wins():
    references = features(20, mean=50.0)
    references[[3, 9, 17]] = references[12].clone()
    found = nearest_neighbours(references[12:13].clone(), references, k=5)
    assert found.index[0, :4].tolist() == [3, 9, 12, 17]
    assert found.distance[0, :4].tolist() == [0, 0, 0, 0]
    assert found.distance[0, 4] > 0


def test_more_ties_than_spare_candidates_leave_the_distances_right():
    references = features(1).repeat(40, 1)
    references[:3] += 1
    found = nearest_neighbours(references[5:6], references, k=4)
    assert found.distance.tolist() == [[0, 0, 0, 0]]
    assert (found.index >= 3).all()


def test_others_of_a_set_and_other_patients():
    x, patient = features(30), torch.arange(30) % 4
    distances = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    others = distances.masked_fill(torch.eye(30, dtype=torch.bool), torch.inf).sort(1)
    found = nearest_others(x, k=3)
    np.testing.assert_array_equal(found.index, others.indices[:, :3])
    np.testing.assert_allclose(found.distance, others.values[:, :3], rtol=1e-13)
    apart = distances.masked_fill(patient[:, None] == patient, torch.inf).sort(1)
    found = nearest_neighbours(x, x, 3, query_groups=patient, reference_groups=patient)
    np.testing.assert_array_equal(found.index, apart.indices[:, :3])
    np.testing.assert_allclose(found.distance, apart.values[:, :3], rtol=1e-13)


def test_queries_with_too_few_references_left_say_so():
    x = features(4)
    found = nearest_neighbours(
        x, x, 3, query_groups=torch.tensor([0, 0, 0, 1]), reference_groups=torch.tensor([0, 0, 0, 1])
    )
    assert found.index[0].tolist() == [3, -1, -1]
    assert found.distance[0, 1:].tolist() == [torch.inf, torch.inf]
    assert (found.index[3] >= 0).all()
    assert (
        nearest_neighbours(x[:1], x[:1], query_groups=torch.tensor([7]), reference_groups=torch.tensor([7])).index == -1
    )


def test_lowered_distances_are_never_above_the_true_ones_and_close():
    x, y = features(50, 100, mean=10.0), features(60, 100, seed=3, mean=10.0)
    y[:50] = x + 1e-7 * features(50, 100, seed=4)
    true = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    lowered = squared_distances(x, y, y.mean(0, dtype=torch.float64), at_least=True)
    assert (lowered <= true).all()
    assert (true - lowered).max() < 1e-10
    assert (squared_distances(x, y, y.mean(0, dtype=torch.float64)) > true).any()


def test_unfit_features_and_groups_are_refused():
    x = features(6)
    with pytest.raises(ValueError, match=r"from one network; got \(6, 16\) query and \(6, 5\) reference"):
        nearest_neighbours(x, x[:, :5])
    with pytest.raises(ValueError, match="at least 7 references to find 7 neighbours, but got 6"):
        nearest_neighbours(x, x, 7)
    with pytest.raises(ValueError, match="of both"):
        nearest_neighbours(x, x, query_groups=torch.arange(6))
    with pytest.raises(ValueError, match=r"one group per image, 6 and 6, but got \(6,\) and \(5,\)"):
        nearest_neighbours(x, x, query_groups=torch.arange(6), reference_groups=torch.arange(5))
    broken = x.clone()
    broken[4, 2] = torch.nan
    with pytest.raises(ValueError, match="those of reference image 4 are not"):
        nearest_neighbours(x, broken)
