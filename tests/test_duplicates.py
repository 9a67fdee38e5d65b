"""Duplicates within a set beside real images of different patients, and the effective number of images."""

import numpy as np
import pytest
import torch
from scipy import stats

from metrics.duplicates import duplicates, vendi_score


def patients_and_features(count=20, each=10, seed=0, width=12):
    """Slices of one patient lie close to each other, as real ones do."""
    random = torch.Generator().manual_seed(seed)
    level = torch.randn(count, 1, width, generator=random)
    features = level + 0.1 * torch.randn(count, each, width, generator=random)
    return np.repeat([f"p{i:03d}" for i in range(count)], each), features.flatten(0, 1)


def nearest_other(x):
    square = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return square.fill_diagonal_(torch.inf).amin(1).numpy()


def test_share_and_pairs_equal_brute_force():
    """One image per patient and as many synthetic ones as there are: every draw is everything."""
    names, real = patients_and_features(count=50, each=1)
    generated = patients_and_features(count=50, each=1, seed=9)[1]
    generated[30:40] = generated[:10] + 1e-3
    found = duplicates(generated, real, names, false_alarm_rate=0.05, draws=3, seed=4)
    null, near = nearest_other(real), nearest_other(generated)
    assert (found.n, len(found.pairs)) == (50, 150)
    assert found.threshold == pytest.approx(np.quantile(np.repeat(null, 3), 0.05), abs=1e-12)
    np.testing.assert_allclose(found.distance, near[found.pairs[:, 0]], rtol=1e-12)
    assert found.share.estimate == (near < found.threshold).mean() >= 0.4
    assert found.share.n == 50
    twins = dict(found.pairs.tolist())
    assert [twins[row] for row in (*range(10), *range(30, 40))] == [*range(30, 40), *range(10)]
    assert duplicates(generated, real, names, false_alarm_rate=0.05, draws=3, seed=4).share == found.share


def test_interval_is_that_of_leaving_out_one_patient_and_one_image_at_a_time():
    """With 8 patients there are 8 parts of one."""
    names, real = patients_and_features(count=8, each=1, width=2)
    generated = 0.8 * patients_and_features(count=8, each=1, seed=4, width=2)[1]
    found = duplicates(generated, real, names, false_alarm_rate=0.5, draws=1, seed=3, confidence=0.9)
    random = np.random.default_rng(3)
    patient, _, image = (random.permutation(8) for _ in range(3))  # the second orders the images of a patient
    shares = []
    for part in range(8):
        null, near = (nearest_other(x[np.delete(rows, part)]) for x, rows in ((real, patient), (generated, image)))
        shares.append((near < np.quantile(null, 0.5)).mean())
    error = np.sqrt(7 / 8 * ((shares - np.mean(shares)) ** 2).sum()) * stats.t.ppf(0.95, 7)
    assert error > 0
    assert found.share.low == pytest.approx(max(0, found.share.estimate - error), abs=1e-12)
    assert found.share.high == pytest.approx(min(1, found.share.estimate + error), abs=1e-12)


def shares_of_equal_laws(seeds, draws):
    """Of 40 real patients with 4 slices each, and more independent synthetic images than that."""
    for seed in range(seeds):
        names, real = patients_and_features(count=40, each=4, seed=100 + seed)
        generated = patients_and_features(count=500, each=1, seed=500 + seed)[1]
        yield duplicates(generated, real, names, false_alarm_rate=0.1, draws=draws).share


def test_a_generator_that_follows_the_law_of_the_patients_has_the_false_alarm_rate_on_average(monkeypatch):
    monkeypatch.setattr("metrics.duplicates.PARTS", 2)  # the interval costs time and is not looked at
    mean = np.mean([share.estimate for share in shares_of_equal_laws(150, draws=2)])
    assert mean == pytest.approx(0.12, abs=0.025)  # (1 + 39 * 0.1) / 41: the quantile of 40 values, interpolated


def test_the_interval_covers_the_false_alarm_rate():
    covers = [share.low <= 0.1 <= share.high for share in shares_of_equal_laws(20, draws=2)]
    assert sum(covers) >= 17


def test_the_nearest_of_more_images_is_nearer_and_would_look_like_mode_collapse():
    names, real = patients_and_features(count=150, each=4)
    generated = patients_and_features(count=3000, each=1, seed=2)[1]
    others = torch.cdist(real, real).masked_fill(torch.from_numpy(names[:, None] == names), torch.inf).amin(1)
    assert (nearest_other(generated) < np.quantile(others, 0.1)).mean() > 0.2
    assert duplicates(generated, real, names, false_alarm_rate=0.1, draws=3).share.low < 0.1


def test_a_generator_with_few_images_is_found():
    names, real = patients_and_features(count=150, each=3)
    few = patients_and_features(count=400, each=1, seed=5)[1]
    generated = few.repeat(10, 1) + 1e-3 * torch.randn(4000, 12, generator=torch.Generator().manual_seed(6))
    share = duplicates(generated, real, names, draws=4).share
    # One of the 149 others is one of the 9 twins among 3999: 1 - (1 - 9 / 3999)^149 = 0.285.
    assert share.estimate == pytest.approx(0.285, abs=0.04)
    assert share.low > 0.1


def test_repetitions_too_rare_to_be_drawn_together_pass():
    """The known blindness."""
    names, real = patients_and_features(count=50, each=3)
    generated = patients_and_features(count=4000, each=1, seed=7)[1]
    generated[:100] = generated[100:200]
    assert duplicates(generated, real, names, false_alarm_rate=0.05).share.low < 0.05


def test_fewer_images_than_patients_are_compared_with_as_many_patients():
    names, real = patients_and_features(count=30, each=2)
    found = duplicates(patients_and_features(count=3, each=1, seed=8)[1], real, names, draws=4)
    assert (found.n, len(found.distance)) == (3, 12)
    assert set(found.pairs.flatten()) == {0, 1, 2}


def test_real_images_of_one_patient_are_refused():
    names, real = patients_and_features()
    with pytest.raises(ValueError, match="at least 3 patients, but got p000"):
        duplicates(real[:10], real[:10], names[:10])
    with pytest.raises(ValueError, match="one patient per real image, but got 5 for 10"):
        duplicates(real[:10], real[:10], names[:5])


def test_vendi_score_is_the_number_of_different_images():
    corners = torch.eye(6)[:4]
    assert vendi_score(corners.repeat(3, 1)) == pytest.approx(4, abs=1e-12)
    assert vendi_score(5 * corners[:1].repeat(7, 1)) == pytest.approx(1, abs=1e-12)
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double()
    normalized = x / x.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(normalized @ normalized.t() / 30)[-5:]  # the (N, N) matrix of the definition
    assert vendi_score(x) == pytest.approx(float((-(values * values.log()).sum()).exp()), rel=1e-12)
    with pytest.raises(ValueError, match=r"must not be zero; those of an image in 0\.\.3 are"):
        vendi_score(torch.tensor([[1.0, 0], [0, 1], [0, 0], [1, 1]]))
