"""The feature metrics against prdc, torch-fidelity, MONAI, torchmetrics, dgm-eval, m3-score and Meehan's test.

Reads every .npz of the kind below the folder of `--reference-dir`; README.md beside the data defines the arrays.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.data_copying import authentic, data_copying
from metrics.duplicates import vendi_score
from metrics.feature_neighbours import nearest_neighbours, nearest_others
from metrics.fidelity import frechet_distance, polynomial_mmd
from metrics.manifolds import manifold_scores
from metrics.statistics import conformal_p_values

NEEDED = {"train", "test", "gen", "planted_copy_index", "nn_distance_gen_to_train"}
FLOAT32 = 2e-5


def pytest_generate_tests(metafunc):
    root = Path(metafunc.config.getoption("reference_dir", None) or Path(__file__).parent)
    files = [path for path in sorted(root.rglob("*.npz")) if set(np.load(path).files) >= NEEDED]
    metafunc.parametrize("feature_file", files, ids=str)


@pytest.fixture
def z(feature_file):
    return np.load(feature_file)


def cloud(z, name):
    return torch.from_numpy(z[name])


def matching(z, pattern):
    """Names in the file with the groups of the pattern."""
    found = [(name, match.groups()) for name in z.files if (match := re.fullmatch(pattern, name))]
    assert found, f"the file holds nothing like {pattern}"
    return found


def test_precision_recall_density_coverage(z):
    for name, (real, k, score) in matching(z, r"prdc_(\w+)_k(\d+)_(\w+)"):
        found = manifold_scores(cloud(z, real), cloud(z, "gen"), int(k))
        assert getattr(found, score) == pytest.approx(float(z[name]), abs=1e-12), name
    for name, (k,) in matching(z, r"m3_coverage_k(\d+)"):
        found = manifold_scores(cloud(z, "train"), cloud(z, "gen"), int(k))
        assert found.coverage == pytest.approx(float(z[name]), rel=1e-7)
    for name, (k, score) in matching(z, r"torchfidelity_k(\d+)_(\w+)"):
        found = manifold_scores(cloud(z, "train"), cloud(z, "gen"), int(k))
        harmonic = 2 * found.precision * found.recall / (found.precision + found.recall)
        ours = {"precision": found.precision, "recall": found.recall, "f_score": harmonic}[score]
        assert ours == pytest.approx(float(z[name]), rel=1e-7), name


def test_frechet_distance(z):
    for name, (a, b) in matching(z, r"(?:fd|monai_fid|torchmetrics_fid)_(\w+)_(\w+)"):
        found = frechet_distance(cloud(z, b), cloud(z, a), correction=1)
        assert found.item() == pytest.approx(float(z[name]), rel=1e-10), name


def test_kernel_distance_of_everything_and_of_the_subsets_of_torch_fidelity(z):
    for name, (a, b) in matching(z, r"kid_unbiased_all_(\w+)_(\w+)"):
        assert polynomial_mmd(cloud(z, b), cloud(z, a)).item() == pytest.approx(float(z[name]), abs=1e-11), name
    random, size = np.random.RandomState(int(z["kid_rng_seed"])), int(z["kid_subset_size"])
    values = []
    for _ in range(int(z["kid_subsets"])):
        gen, train = (x[random.choice(len(x), size, replace=False)] for x in (cloud(z, "gen"), cloud(z, "train")))
        values.append(polynomial_mmd(train, gen).item())
    assert np.mean(values) == pytest.approx(float(z["torchfidelity_kernel_inception_distance_mean"]), abs=1e-11)
    assert np.std(values) == pytest.approx(float(z["torchfidelity_kernel_inception_distance_std"]), abs=1e-11)


def test_data_copying(z):
    cells = tuple(torch.from_numpy(z[f"cell_{name}"]).long() for name in ("train", "test", "gen"))
    found = data_copying(cloud(z, "train"), cloud(z, "test"), cloud(z, "gen"), cells, float(z["tau"]))
    assert found.z == pytest.approx(float(z["zu_global"]), abs=1e-12)
    assert found.z_cells == pytest.approx(z["zu_cells"], abs=1e-12)
    assert found.c_t == pytest.approx(float(z["ct"]), abs=1e-12)


def test_nearest_neighbours(z):
    train, gen = cloud(z, "train"), cloud(z, "gen")
    found, others = nearest_neighbours(gen, train), nearest_others(train).distance[:, 0]
    np.testing.assert_array_equal(found.index[:, 0], z["nn_index_gen_to_train"])
    np.testing.assert_allclose(found.distance[:, 0], z["nn_distance_gen_to_train"], rtol=1e-12)
    np.testing.assert_allclose(others, z["nn_distance_train_to_train"], rtol=1e-12)
    rate = (found.distance[:, 0] < others.quantile(0.5)).double().mean()
    assert rate.item() == pytest.approx(float(z["m3_memorization_rate"]), rel=1e-7)
    assert found.distance.mean().item() == pytest.approx(float(z["m3_mean_nearest"]), rel=FLOAT32)
    x, y = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (gen, train))
    both_signs = nearest_neighbours(x, torch.cat([y, -y])).distance  # |x - y|² / 2 = 1 - cosine
    found_cosine = both_signs.square().mean().item() / 2
    assert found_cosine == pytest.approx(float(z["mifid_cosine_distance_gen_train"]), abs=1e-12)


def test_authenticity(z):
    found = authentic(cloud(z, "train"), cloud(z, "gen"))
    np.testing.assert_array_equal(found, z["authentic"])
    assert 100 * found.double().mean().item() == pytest.approx(float(z["authpct"]), abs=1e-12)
    assert 100 * found.double().mean().item() == pytest.approx(float(z["authpct_official_fp32"]), rel=1e-7)


def test_vendi_score(z):
    for name, (which,) in matching(z, r"vendi_linear_(\w+)"):
        assert vendi_score(cloud(z, which)) == pytest.approx(float(z[name]), rel=1e-12), name


def test_the_planted_copies_pass_the_tests_of_sets_and_are_found_one_by_one(z):
    """The known blindness, and what does see: copies are nearer than all held-out features, and little else is."""
    planted = np.zeros(len(z["gen"]), bool)
    planted[z["planted_copy_index"]] = True
    train, test, gen = (cloud(z, name) for name in ("train", "test", "gen"))
    cells = tuple(torch.from_numpy(z[f"cell_{name}"]).long() for name in ("train", "test", "gen"))
    assert abs(data_copying(train, test, gen, cells, float(z["tau"])).c_t) < 2
    near = [-nearest_neighbours(x, train).distance[:, 0].numpy() for x in (gen, test)]
    p = conformal_p_values(*near)
    nearest = p == 1 / (1 + len(test))
    assert nearest[planted].all()
    assert nearest[~planted].mean() <= 5 / len(test)  # 1 / (1 + len(test)) is expected by chance
