"""Precision, recall, density and coverage against loops, and cases with a known answer."""

import numpy as np
import pytest
import torch

from metrics import feature_neighbours
from metrics.manifolds import manifold_scores


@pytest.fixture(params=[7, 4096], autouse=True)
def _rows(request, monkeypatch):
    monkeypatch.setattr(feature_neighbours, "ROWS", request.param)


def gaussian(n, width, seed):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_scores_equal_loops(k):
    x, y = gaussian(30, 4, 0).double(), 1.3 * gaussian(25, 4, 1).double() + 0.7

    def radii(points):
        return [sorted(float((p - q).norm()) for q in points)[k] for p in points]  # the 0th is the point itself

    real = [[float((p - q).norm()) <= r for p in y] for q, r in zip(x, radii(x), strict=True)]
    generated = [[float((p - q).norm()) <= r for p in x] for q, r in zip(y, radii(y), strict=True)]
    scores = manifold_scores(x, y, k)
    assert scores.precision == pytest.approx(np.any(real, 0).mean(), abs=1e-12)
    assert scores.recall == pytest.approx(np.any(generated, 0).mean(), abs=1e-12)
    assert scores.density == pytest.approx(np.sum(real, 0).mean() / k, abs=1e-12)
    assert scores.coverage == pytest.approx(np.any(real, 1).mean(), abs=1e-12)
    assert len({scores.precision, scores.recall, scores.density, scores.coverage}) == 4


def test_scores_tell_plausible_from_varied():
    two_modes = torch.cat([gaussian(40, 3, 0), gaussian(40, 3, 1) + 20])
    one = manifold_scores(two_modes, two_modes[:40] + 1e-3)
    assert (one.precision, one.recall, one.coverage) == (1, 0.5, 0.5)
    none = manifold_scores(two_modes, two_modes + 100)
    assert (none.precision, none.recall, none.density, none.coverage) == (0, 0, 0, 0)


def test_density_is_not_fooled_by_the_ball_of_an_outlier_as_precision_is():
    real = gaussian(100, 2, 2)
    real[0] = torch.tensor([60.0, 0.0])
    generated = gaussian(100, 2, 3) + torch.tensor([30.0, 0.0])  # within the ball of the outlier, far from all others
    scores = manifold_scores(real, generated)
    assert scores.precision > 0.5
    assert scores.density < 0.25


def test_copies_lie_on_the_surface_of_balls_and_count_as_inside():
    """The k-th neighbour of a feature is at its radius exactly, and so is a copy of it: rounding must not decide."""
    real = gaussian(200, 50, 4) + 100
    scores = manifold_scores(real, real.clone(), k=3)
    assert (scores.precision, scores.recall, scores.coverage) == (1, 1, 1)
    # Each of the balls holds its own centre and exactly k others.
    assert scores.density == pytest.approx(4 / 3, abs=1e-12)


def test_too_few_features_are_refused():
    with pytest.raises(ValueError, match="At least 4 real and 4 generated images are needed; got 60 and 3"):
        manifold_scores(gaussian(60, 6, 0), gaussian(3, 6, 0), k=3)
