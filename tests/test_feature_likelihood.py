"""Feature likelihood divergence against scikit-learn's densities and a general optimizer, and its blindness."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from metrics.feature_likelihood import MIN_VARIANCE, feature_likelihood, fit_variances, mean_log_likelihood


def gaussian(n, seed, width=6):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_likelihood(centres, variance, points):
    """The definition, with scipy's normal law."""
    parts = [multivariate_normal(c, s * np.eye(len(c))).logpdf(points) for c, s in zip(centres, variance, strict=True)]
    return (logsumexp(parts, axis=0) - np.log(len(centres))).mean()


def test_likelihood_equals_scipy():
    centres, points, variance = gaussian(7, 0), gaussian(20, 1), torch.linspace(0.1, 2, 7, dtype=torch.float64)
    expected = log_likelihood(centres.numpy(), variance.numpy(), points.numpy())
    assert mean_log_likelihood(centres, variance, points) == pytest.approx(expected, rel=1e-12)


def test_fitted_variances_are_a_maximum_that_a_general_optimizer_does_not_improve():
    centres, points = gaussian(8, 2, 3), 1.5 * gaussian(60, 3, 3)
    fitted = fit_variances(centres, points, steps=3000).numpy()

    def loss(logs):
        return -log_likelihood(centres.numpy(), np.exp(logs), points.numpy())

    better = minimize(loss, np.log(fitted), method="L-BFGS-B")
    assert better.fun == pytest.approx(loss(np.log(fitted)), abs=1e-6)
    assert loss(np.log(fitted)) < loss(np.log(fitted) + 0.05)
    assert loss(np.log(fitted)) < loss(np.log(fitted) - 0.05)


def test_divergence_is_put_together_as_defined():
    training, heldout, generated = 2 * gaussian(40, 4) + 3, 2 * gaussian(30, 5) + 3, 2.2 * gaussian(50, 6) + 3
    for x in (training, heldout, generated):
        x[:, 2] = 7.0  # constant: left out
    found = feature_likelihood(training, heldout, generated, steps=20, seed=3)
    kept = [0, 1, 3, 4, 5]
    mean, deviation = heldout.numpy()[:, kept].mean(0), heldout.numpy()[:, kept].std(0, ddof=1)
    t, h, g = ((x.numpy()[:, kept] - mean) / deviation for x in (training, heldout, generated))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).numpy()

    def nll(centres, fit, points):
        variance = fit_variances(torch.from_numpy(centres), torch.from_numpy(fit), 20).numpy()
        return -log_likelihood(centres, variance, points) / len(kept) * 100

    assert found.fld == pytest.approx(nll(g, t, h) - nll(t[order[:20]], t[order[20:]], h), rel=1e-9)
    assert found.gap == pytest.approx(nll(g, t, t) - nll(g, t, h), rel=1e-9)


def test_copies_of_everything_are_found_by_both_and_5_per_cent_by_the_gap_only():
    """The known detections and the known blindness."""
    training, heldout, generated = (gaussian(400, seed, 16) for seed in (7, 8, 9))
    honest = feature_likelihood(training, heldout, generated)
    copied = feature_likelihood(training, heldout, training.clone())
    assert copied.gap < -500
    assert copied.fld > 500
    assert (fit_variances(training, training, 5) == MIN_VARIANCE).all()
    moved = {}
    for noise in (0.01, 0.5):
        planted = generated.clone()
        planted[:20] = training[:20] + noise * gaussian(20, 10, 16)
        found = feature_likelihood(training, heldout, planted)
        moved[noise] = found.fld - honest.fld, found.gap - honest.gap
    other = feature_likelihood(training, heldout, gaussian(400, 11, 16))
    chance = abs(other.fld - honest.fld), abs(other.gap - honest.gap)
    assert abs(moved[0.01][0]) < chance[0]
    assert moved[0.01][1] < -10 * chance[1]
    # Nats per feature times 100: 5 % of the originals are explained by a deviation of about 0.01 instead of 1.
    assert moved[0.01][1] == pytest.approx(0.05 * 100 * np.log(0.01), abs=3)
    assert abs(moved[0.5][1]) < 0.15 * abs(moved[0.01][1])


def test_constant_features_are_refused():
    same = torch.ones(5, 3)
    with pytest.raises(ValueError, match="all of them are constant"):
        feature_likelihood(gaussian(5, 0, 3), same, gaussian(5, 1, 3))
