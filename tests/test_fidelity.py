"""Fidelity metrics against scipy, torchmetrics, loops written out and cases with a known answer."""

import itertools

import numpy as np
import pytest
import torch
from scipy import linalg
from torchmetrics.image.kid import poly_mmd

from metrics import feature_neighbours
from metrics.fidelity import frechet_distance, inception_score, kernel_distance, polynomial_mmd

torch.manual_seed(0)
REAL = torch.randn(60, 6) @ torch.randn(6, 6)
GENERATED = torch.randn(50, 6) + 0.3


@pytest.fixture(params=[7, 1000])
def _rows(request, monkeypatch):
    """The result must not depend on how many features are compared at a time."""
    monkeypatch.setattr(feature_neighbours, "ROWS", request.param)


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("correction", [0, 1])
def test_frechet_distance_equals_the_matrix_square_root(correction):
    x, y = REAL.double().numpy(), GENERATED.double().numpy()
    a, b = (np.cov(z, rowvar=False, ddof=correction) for z in (x, y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(REAL, GENERATED, correction).item() == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_shifted_and_scaled_features():
    assert frechet_distance(REAL, REAL).item() == pytest.approx(0, abs=1e-12)
    shift = torch.arange(6.0)
    assert frechet_distance(REAL, REAL + shift).item() == pytest.approx(55, rel=1e-5)
    variance = REAL.double().var(0, correction=0).sum().item()
    centred = REAL - REAL.mean(0)
    assert frechet_distance(centred, 3 * centred).item() == pytest.approx(4 * variance, rel=1e-5)  # (3 - 1)^2


def test_frechet_distance_of_fewer_images_than_features_is_finite():
    few, others = torch.randn(4, 30), torch.randn(5, 30)
    value = frechet_distance(few, others).item()
    a, b = (x.double() - x.double().mean(0) for x in (few, others))
    root = torch.linalg.svdvals(a @ b.t()).sum() / 20**0.5  # of the 4 x 5 products of images
    gap = (few.double().mean(0) - others.double().mean(0)).square().sum()
    assert value == pytest.approx((gap + a.square().sum() / 4 + b.square().sum() / 5 - 2 * root).item(), rel=1e-7)


@pytest.mark.usefixtures("_rows")
def test_mmd_equals_loops_over_pairs():
    def kernel(a, b):
        return (float(a.double() @ b.double()) / 6 + 1) ** 3

    within = [np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)]) for x in (REAL, GENERATED)]
    cross = np.mean([kernel(a, b) for a in REAL for b in GENERATED])
    assert polynomial_mmd(REAL, GENERATED).item() == pytest.approx(sum(within) - 2 * cross, rel=1e-10)


def test_mmd_equals_torchmetrics():
    expected = poly_mmd(REAL[:50].double(), GENERATED.double()).item()
    assert polynomial_mmd(REAL[:50], GENERATED).item() == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_the_mean_and_deviation_over_reproducible_subsets():
    assert kernel_distance(REAL, GENERATED, 10, 20, 1) == kernel_distance(REAL, GENERATED, 10, 20, 1)
    assert kernel_distance(REAL, GENERATED, 10, 20, 1) != kernel_distance(REAL, GENERATED, 10, 20, 2)
    random = torch.Generator().manual_seed(1)
    rows = [[torch.randperm(n, generator=random)[:20] for n in (60, 50)] for _ in range(10)]
    values = [polynomial_mmd(REAL[r], GENERATED[g]).item() for r, g in rows]
    found = [value.item() for value in kernel_distance(REAL, GENERATED, 10, 20, 1)]
    assert found == pytest.approx([np.mean(values), np.std(values)], rel=1e-12)


def test_kernel_distance_of_subsets_is_that_of_the_whole_on_average():
    whole = polynomial_mmd(REAL[:50], GENERATED).item()
    mean, deviation = kernel_distance(REAL[:50], GENERATED, subsets=3)  # each holds everything
    assert mean.item() == pytest.approx(whole, rel=1e-10)
    assert deviation.item() == pytest.approx(0, abs=1e-10)
    mean, deviation = kernel_distance(REAL, GENERATED, subsets=3000, subset_size=25)
    assert mean.item() == pytest.approx(polynomial_mmd(REAL, GENERATED).item(), abs=4 * deviation.item() / 3000**0.5)


def test_inception_score_of_known_cases():
    certain = torch.eye(4).repeat(5, 1)
    assert [v.item() for v in inception_score(certain, splits=5)] == pytest.approx([4, 0], abs=1e-12)
    assert [v.item() for v in inception_score(torch.full((20, 4), 0.25), 5)] == pytest.approx([1, 0], abs=1e-12)
    # Two parts, one of a single class (1), one of two classes (2): mean 1.5, biased deviation 0.5.
    halves = torch.eye(4)[[0, 0, 1, 2]]
    assert [v.item() for v in inception_score(halves, 2)] == pytest.approx([1.5, 0.5], abs=1e-12)


def test_unfit_features_are_refused():
    with pytest.raises(ValueError, match=r"from one network; got \(60, 6\) real and \(50, 5\)"):
        frechet_distance(REAL, GENERATED[:, :5])
    with pytest.raises(ValueError, match="At least 2 real"):
        kernel_distance(REAL[:1], GENERATED)
    with pytest.raises(ValueError, match="fewer splits"):
        inception_score(torch.full((3, 2), 0.5), 4)
