"""Largest correlations against numbers derived from the definitions in float64; planted copies included.

Reads every .npz of the kind below the folder of `--reference-dir`; README.md beside the data defines the arrays.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.memorization import largest_correlation, summarize

LEFT_RIGHT_AXIS_OF_THE_FILE = -1
NEEDED = {"real", "synthetic", "r_all_channels", "r_per_channel", "max_r_all_channels", "nn_all_channels"}


def pytest_generate_tests(metafunc):
    if "pearson_file" in metafunc.fixturenames:
        root = Path(metafunc.config.getoption("reference_dir", None) or Path(__file__).parent)
        files = [path for path in sorted(root.rglob("*.npz")) if set(np.load(path).files) >= NEEDED]
        metafunc.parametrize("pearson_file", files, ids=str)


def load(path):
    z = np.load(path)
    return z, torch.from_numpy(z["real"]), torch.from_numpy(z["synthetic"])


def equal(ours, theirs):
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_nearest_training_slice_jointly_and_per_channel(pearson_file, block):
    z, real, synthetic = load(pearson_file)
    found = largest_correlation(synthetic, real.split(block))
    equal(found.r, z["max_r_all_channels"])
    np.testing.assert_array_equal(found.index.numpy(), z["nn_all_channels"])
    equal(found.r_channel, z["max_r_per_channel"])
    clear = runner_up_is_behind(z["r_per_channel"])
    np.testing.assert_array_equal(found.index_channel.numpy()[clear], z["nn_per_channel"][clear])


def runner_up_is_behind(r):
    """Where the nearest slice is nearer than the second by more than the rounding of the reference."""
    ordered = np.sort(np.nan_to_num(r, nan=-2.0), axis=1)
    return ordered[:, -1] - ordered[:, -2] > 1e-10


def test_every_single_correlation(pearson_file):
    z, real, synthetic = load(pearson_file)
    for position in range(len(real)):
        found = largest_correlation(synthetic, [real[position : position + 1]])
        equal(found.r, z["r_all_channels"][:, position])
        equal(found.r_channel, z["r_per_channel"][:, position])


def test_left_right_flips_are_found(pearson_file):
    z, real, synthetic = load(pearson_file)
    found = largest_correlation(synthetic, real.split(16), mirror_axis=LEFT_RIGHT_AXIS_OF_THE_FILE)
    equal(found.r, z["max_r_with_flip"])
    plain = np.nanmax(np.nan_to_num(z["r_all_channels"], nan=-2.0), axis=1)
    with_flip = np.nanmax(np.nan_to_num(z["r_all_channels_after_left_right_flip"], nan=-2.0), axis=1)
    np.testing.assert_array_equal(found.mirrored.numpy(), with_flip > plain + 1e-12)


def test_the_null_of_heldout_patients_and_of_other_training_patients(pearson_file):
    z, real, synthetic = load(pearson_file)
    heldout = largest_correlation(torch.from_numpy(z["heldout"]), real.split(13))
    equal(heldout.r, z["heldout_max_r"])
    np.testing.assert_array_equal(heldout.index.numpy(), z["heldout_nn"])
    patient = torch.from_numpy(z["real_patient"])
    others = largest_correlation(real, real.split(13), query_groups=patient, reference_groups=patient)
    equal(others.r, z["train_max_r_other_patients"])
    np.testing.assert_array_equal(others.index.numpy(), z["train_nn_other_patients"])
    itself = torch.arange(len(real))
    equal(
        largest_correlation(real, [real], query_groups=itself, reference_groups=itself).r,
        z["train_max_r_any_other_slice"],
    )
    found = largest_correlation(synthetic, [real])
    flags = found.r.numpy() > np.quantile(heldout.r.numpy(), 0.95)
    np.testing.assert_array_equal(flags, z["flag_above_heldout_q95"])
    summary = summarize(found.r.numpy(), heldout.r.numpy())
    defined = ~np.isnan(z["max_r_all_channels"])
    assert summary.n == defined.sum()
    assert summary.share_above_q95 == z["flag_above_heldout_q95"][defined].mean()
    level = list(z["quantile_levels"])
    assert summary.q95_null == pytest.approx(z["heldout_quantiles"][level.index(0.95)], abs=1e-10)
    assert summary.median_null == pytest.approx(z["heldout_quantiles"][level.index(0.5)], abs=1e-10)


def test_r_follows_from_the_exact_integer_sums_of_the_file(pearson_file):
    z, real, synthetic = load(pearson_file)
    n = real[0, 0].numel()
    sxy = z["integer_dot_per_channel"].astype(object)
    sx, sxx = (z[f"integer_{name}_synthetic"].astype(object)[:, None] for name in ("sum", "sumsq"))
    sy, syy = (z[f"integer_{name}_real"].astype(object)[None] for name in ("sum", "sumsq"))
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (n * sxy - sx * sy).astype(float) / np.sqrt((n * sxx - sx**2).astype(float))
        r = r / np.sqrt((n * syy - sy**2).astype(float))
    for position in range(len(real)):
        found = largest_correlation(synthetic, [real[position : position + 1]])
        np.testing.assert_allclose(found.r_channel.numpy(), r[:, position], rtol=0, atol=5e-16)
