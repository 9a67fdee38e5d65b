"""The segmentation metrics and statistics against numbers agreed on by nnU-Net, MONAI, brats-evaluation and scipy.

Reads every .npz of the kind below the folder of `--reference-dir`; README.md beside the data defines the arrays.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.segmentation import ENTITIES, dice_from_counts, entity_counts, mean_over_patients
from metrics.statistics import bootstrap_mean, holm, paired_wilcoxon

OURS = {"NCR": "core", "ED": "oedema", "ET": "enhancing", "TC": "TC", "WT": "WT"}


def files_with(config, *arrays):
    root = Path(config.getoption("reference_dir", None) or Path(__file__).parent)
    return [path for path in sorted(root.rglob("*.npz")) if set(arrays) <= set(np.load(path).files)]


def pytest_generate_tests(metafunc):
    if "volumes_file" in metafunc.fixturenames:
        metafunc.parametrize(
            "volumes_file", files_with(metafunc.config, "meta", "ref_00", "pred_00", "dice_nan"), ids=str
        )
    if "statistics_file" in metafunc.fixturenames:
        metafunc.parametrize("statistics_file", files_with(metafunc.config, "stat_a", "stat_b"), ids=str)


def columns(entities):
    return [list(ENTITIES).index(OURS[name]) for name in entities]


def case_counts(z):
    refs = sorted(name for name in z.files if name.startswith("ref_"))
    rows = []
    for ref in refs:
        pair = (torch.from_numpy(z[name])[None] for name in (ref.replace("ref_", "pred_"), ref))
        rows.append(entity_counts(*pair))
    return torch.cat(rows)


def test_counts_and_dice_of_every_case_equal_the_reference(volumes_file):
    z = np.load(volumes_file)
    meta = json.loads(str(z["meta"]))
    counts = case_counts(z)[:, columns(meta["entities"])]
    tp, fp, fn = counts.numpy().transpose(2, 0, 1)
    assert len(counts) == len(meta["cases"])
    np.testing.assert_array_equal(tp, z["tp"])
    np.testing.assert_array_equal(tp + fp, z["n_pred"])
    np.testing.assert_array_equal(tp + fn, z["n_ref"])
    np.testing.assert_allclose(dice_from_counts(counts, "nan").numpy(), z["dice_nan"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(dice_from_counts(counts, "one").numpy(), z["dice_one"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(
        counts[:, meta["entities"].index("ET")], case_counts(z)[:, list(ENTITIES).index("ET")]
    )


def test_means_and_pooled_dice_over_the_cases_equal_the_reference(volumes_file):
    z = np.load(volumes_file)
    if "agg_mean_dice_nan" not in z.files:
        pytest.skip("the file holds no means over its cases")
    counts = case_counts(z)[:, columns(json.loads(str(z["meta"]))["entities"])]
    mean, n_valid = mean_over_patients(dice_from_counts(counts, "nan"))
    np.testing.assert_allclose(mean.numpy(), z["agg_mean_dice_nan"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(n_valid.numpy(), z["agg_n_valid"])
    mean_one, _ = mean_over_patients(dice_from_counts(counts, "one"))
    np.testing.assert_allclose(mean_one.numpy(), z["agg_mean_dice_one"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        dice_from_counts(counts.sum(dim=0), "nan").numpy(), z["agg_pooled_dice"], rtol=0, atol=1e-12
    )


def test_dice_of_single_slices_equals_the_reference(volumes_file):
    z = np.load(volumes_file)
    if "s2d_ref" not in z.files:
        pytest.skip("the file holds no slices")
    counts = entity_counts(torch.from_numpy(z["s2d_pred"]), torch.from_numpy(z["s2d_ref"]))
    dice = dice_from_counts(counts[:, columns(json.loads(str(z["meta"]))["entities"])], "nan")
    np.testing.assert_allclose(dice.numpy(), z["s2d_dice_nan"], rtol=0, atol=1e-12)


def test_intervals_tests_and_correction_equal_the_reference(statistics_file):
    z = np.load(statistics_file)
    a, b = z["stat_a"], z["stat_b"]
    paired = ~(np.isnan(a) | np.isnan(b))
    seed, n_resamples = int(z["stat_boot_idx_seed"]), int(z["stat_boot_B"])
    mean = bootstrap_mean(a[paired], seed=seed, n_resamples=n_resamples)
    difference = bootstrap_mean(a - b, seed=seed, n_resamples=n_resamples)
    np.testing.assert_allclose([mean.low, mean.high], z["stat_boot_mean_ci95"], rtol=0, atol=1e-12)
    np.testing.assert_allclose([difference.low, difference.high], z["stat_boot_diff_ci95"], rtol=0, atol=1e-12)
    assert difference.estimate == pytest.approx(float(z["stat_mean_diff"]), abs=1e-12)
    test = paired_wilcoxon(a, b)
    assert (test.n, test.dropped) == (int(z["stat_n_pairs"]), len(a) - int(z["stat_n_pairs"]))
    assert test.statistic == float(z["stat_wilcoxon_stat"])
    assert test.p == pytest.approx(float(z["stat_wilcoxon_p"]), abs=1e-12)
    np.testing.assert_allclose(holm(z["stat_holm_in"]), z["stat_holm_out"], rtol=0, atol=1e-12)
