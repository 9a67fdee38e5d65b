"""Fidelity metrics against scipy, torchmetrics, loops written out and cases with a known answer."""

import itertools

import numpy as np
import pytest
import torch
from scipy import linalg
from torchmetrics.image.kid import poly_mmd

from metrics import fidelity
from metrics.fidelity import frechet_distance, inception_score, kernel_distance, polynomial_mmd, precision_recall

torch.manual_seed(0)
REAL = torch.randn(60, 6) @ torch.randn(6, 6)
GENERATED = torch.randn(50, 6) + 0.3


@pytest.fixture(params=[7, 1000])
def _rows(request, monkeypatch):
    """The result must not depend on how many features are compared at a time."""
    monkeypatch.setattr(fidelity, "ROWS", request.param)


@pytest.mark.usefixtures("_rows")
def test_frechet_distance_equals_the_matrix_square_root():
    x, y = REAL.double().numpy(), GENERATED.double().numpy()
    a, b = np.cov(x, rowvar=False, bias=True), np.cov(y, rowvar=False, bias=True)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(REAL, GENERATED).item() == pytest.approx(expected, rel=1e-10)


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


def test_kernel_distance_is_the_mean_over_reproducible_subsets():
    assert kernel_distance(REAL, GENERATED, 10, 20, 1).item() == kernel_distance(REAL, GENERATED, 10, 20, 1).item()
    assert kernel_distance(REAL, GENERATED, 10, 20, 1).item() != kernel_distance(REAL, GENERATED, 10, 20, 2).item()
    # Subsets of everything are everything.
    whole = kernel_distance(REAL[:50], GENERATED, subsets=3).item()
    assert whole == pytest.approx(polynomial_mmd(REAL[:50], GENERATED).item(), rel=1e-10)
    # The estimate is unbiased: over many subsets its mean is that of the whole.
    many = kernel_distance(REAL, GENERATED, subsets=3000, subset_size=25).item()
    assert many == pytest.approx(polynomial_mmd(REAL, GENERATED).item(), rel=0.05)


@pytest.mark.usefixtures("_rows")
def test_precision_and_recall_equal_loops():
    def inside(probes, manifold, k):
        distances = [sorted(float((m - other).norm()) for other in manifold) for m in manifold]
        return np.mean(
            [any(float((p - m).norm()) <= d[k] for m, d in zip(manifold, distances, strict=True)) for p in probes]
        )

    x, y = REAL.double(), GENERATED.double() + 1
    precision, recall = precision_recall(x, y, k=2)
    assert precision.item() == pytest.approx(inside(y, x, 2), abs=1e-12)
    assert recall.item() == pytest.approx(inside(x, y, 2), abs=1e-12)
    assert 0 < precision.item() < 1
    assert 0 < recall.item() < 1
    assert precision.item() != recall.item()


def test_precision_and_recall_tell_plausible_from_varied():
    two_modes = torch.cat([torch.randn(40, 3), torch.randn(40, 3) + 20])
    precision, recall = precision_recall(two_modes, two_modes[:40] + 1e-3)
    assert precision.item() == 1
    assert recall.item() == 0.5
    assert [v.item() for v in precision_recall(two_modes, two_modes + 100)] == [0, 0]


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
    with pytest.raises(ValueError, match="At least 4 real and 4 generated images are needed; got 60 and 3"):
        precision_recall(REAL, GENERATED[:3])
    with pytest.raises(ValueError, match="fewer splits"):
        inception_score(torch.full((3, 2), 0.5), 4)
