"""C_T and authenticity against scipy and loops; what 5 % of copies do to them, and what exposes these."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu
from sklearn.cluster import KMeans

from metrics.data_copying import authentic, data_copying, k_means_cells
from metrics.feature_neighbours import nearest_neighbours
from metrics.statistics import conformal_p_values


def gaussian(n, seed, width=8):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def distances(x, y):
    return cdist(x.double().numpy(), y.double().numpy())


TRAINING, HELDOUT, GENERATED = gaussian(120, 0), gaussian(80, 1), 1.1 * gaussian(90, 2)


def z_by_scipy(generated, heldout, training):
    a, b = (distances(x, training).min(1) for x in (generated, heldout))
    u, product = mannwhitneyu(a, b).statistic, len(a) * len(b)
    return (u - product / 2 + 0.5) / np.sqrt(product * (len(a) + len(b) + 1) / 12)


def test_statistics_equal_scipy_in_every_cell_and_are_weighted_with_the_heldout_share():
    cells = tuple((x[:, 0] > 0).long() + (x[:, 0] > 1) for x in (TRAINING, HELDOUT, GENERATED))
    found = data_copying(TRAINING, HELDOUT, GENERATED, cells, tau=0.05)
    t, p, q = cells
    expected = [z_by_scipy(GENERATED[q == c], HELDOUT[p == c], TRAINING[t == c]) for c in range(3)]
    assert found.z == pytest.approx(z_by_scipy(GENERATED, HELDOUT, TRAINING), abs=1e-12)
    assert found.z_cells == pytest.approx(expected, abs=1e-12)
    weights = [int((p == c).sum()) for c in range(3)]
    assert found.c_t == pytest.approx(np.average(expected, weights=weights), abs=1e-12)
    share = float((q == 2).double().mean())
    without = data_copying(TRAINING, HELDOUT, GENERATED, cells, tau=share)  # must be exceeded
    assert without.c_t == pytest.approx(np.average(expected[:2], weights=weights[:2]), abs=1e-12)


def test_cells_without_training_or_heldout_images_are_refused_and_without_generated_ones_left_out():
    one = [torch.zeros(len(x), dtype=torch.int64) for x in (TRAINING, HELDOUT, GENERATED)]
    two = [cell.clone() for cell in one]
    two[0][:60] = two[1][:40] = 1
    found = data_copying(TRAINING, HELDOUT, GENERATED, tuple(two), tau=0.0)
    assert np.isnan(found.z_cells).tolist() == [False, True]
    assert found.c_t == found.z_cells[0]
    with pytest.raises(ValueError, match="Cell 1 of 2 has 60 training and 0 held-out images"):
        data_copying(TRAINING, HELDOUT, GENERATED, (two[0], one[1], one[2]), tau=0.0)
    with pytest.raises(ValueError, match=r"No cell has more than the share 1\.0"):
        data_copying(TRAINING, HELDOUT, GENERATED, tuple(one), tau=1.0)


def test_cells_are_those_of_k_means():
    centres = 30 * gaussian(4, 3)
    sets = [torch.cat([c + gaussian(n, seed) for seed, c in enumerate(centres)]) for n in (20, 10, 5)]
    cells = k_means_cells(*sets, count=4)
    model = KMeans(4, n_init=5, random_state=0).fit(sets[0])
    for x, cell in zip(sets, cells, strict=True):
        theirs = model.predict(x)
        pairs = set(zip(cell.tolist(), theirs.tolist(), strict=True))
        assert len(pairs) == 4  # the same cells by other numbers
    assert [cell.tolist() for cell in k_means_cells(*sets, count=4)] == [cell.tolist() for cell in cells]


def test_authentic_equals_loops_with_and_without_patients():
    within, patient = distances(TRAINING, TRAINING), np.arange(120) // 4
    to_training = distances(GENERATED, TRAINING)
    nearest = to_training.argmin(1)
    for groups in (np.arange(120), patient):
        own = np.where(groups[:, None] == groups, np.inf, within).min(1)
        found = authentic(TRAINING, GENERATED, torch.from_numpy(groups))
        np.testing.assert_array_equal(found, to_training.min(1) > own[nearest])
    assert torch.equal(authentic(TRAINING, GENERATED), authentic(TRAINING, GENERATED, torch.arange(120)))


def test_a_set_of_copies_is_found_by_both():
    copies = TRAINING[:90] + 0.01 * gaussian(90, 5)
    cells = k_means_cells(TRAINING, HELDOUT, copies, 2)
    assert data_copying(TRAINING, HELDOUT, copies, cells, tau=0.1).c_t < -5
    assert not authentic(TRAINING, copies).any()


def test_five_per_cent_of_copies_pass_both_and_are_found_one_by_one():
    """The known blindness, and what does see."""
    width, n = 32, 1000
    training, heldout, generated = (gaussian(n, seed, width) for seed in (10, 11, 12))
    generated = 1.02 * generated  # a little too far out, as generators are
    planted = generated.clone()
    planted[:50] = training[:50] + 0.01 * gaussian(50, 13, width)
    cells = k_means_cells(training, heldout, planted, 4)
    honest, found = (data_copying(training, heldout, x, cells, tau=0.02) for x in (generated, planted))
    assert abs(found.z) < 2  # within what chance gives
    assert abs(found.c_t) < 2
    assert 1 < honest.z - found.z < 3  # 1.2 * 0.05 * sqrt(1000) = 1.9
    assert (authentic(training, generated).double().mean() - authentic(training, planted).double().mean()) < 0.06

    near = [-nearest_neighbours(x, training).distance[:, 0].numpy() for x in (planted, heldout)]
    p = conformal_p_values(*near)
    assert (p[:50] == 1 / 1001).all()  # nearer than every held-out image
    assert (p[50:] == 1 / 1001).sum() <= 5
