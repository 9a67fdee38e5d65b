"""Largest correlations against numbers derived from the definitions in float64; planted copies included.

Reads every .npz of the kind below the folder of `--reference-dir`; README.md beside the data defines the arrays.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.correlation_search import Search
from metrics.exact_product import exact_product
from metrics.memorization import largest_correlation, summarize
from metrics.pixels import IDENTITY, Pixels, Score, Transform, flips_and_shifts
from metrics.similarity import Distance, Pearson

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


def search(queries, references, measure, k, transforms=(IDENTITY,)):
    """The nearest over all channels: value, index and transform, (Q, k) each."""
    channels = tuple(range(queries.shape[1]))
    run = Search(Pixels.of(queries), [Score("all", channels, measure)], k, transforms)
    for start in range(0, len(references), 17):
        run.compare(Pixels.of(references[start : start + 17]), start)
    return run.nearest.value[0], run.nearest.index[0], run.nearest.transform[0]


def test_products_and_sums_are_the_integers_of_the_file(pearson_file):
    z, real, synthetic = load(pearson_file)
    x, y = Pixels.of(synthetic), Pixels.of(real)
    n = real[0, 0].numel()
    for c in range(real.shape[1]):
        # The file sums raw values; with u = value - 128 and v likewise, x y = u v + 128 (u + v) + 128^2.
        product = exact_product(x.values[c].flatten(1), y.values[c].flatten(1)).long()
        product += 128 * (x.total[c][:, None] + y.total[c]) + n * 128**2
        np.testing.assert_array_equal(product.numpy(), z["integer_dot_per_channel"][..., c])
        for pixels, name in ((x, "synthetic"), (y, "real")):
            total = pixels.total[c] + 128 * n
            square = pixels.square[c] + 256 * pixels.total[c] + n * 128**2
            np.testing.assert_array_equal(total.numpy(), z[f"integer_sum_{name}"][:, c])
            np.testing.assert_array_equal(square.numpy(), z[f"integer_sumsq_{name}"][:, c])


def test_all_training_slices_in_the_order_of_their_correlation(pearson_file):
    z, real, synthetic = load(pearson_file)
    r, index, _ = search(synthetic, real, Pearson(), len(real))
    expected = z["r_all_channels"]
    for ours, order, theirs in zip(r.numpy(), index.numpy(), expected, strict=True):
        if np.isnan(theirs).all():
            assert (order == -1).all()
            continue
        np.testing.assert_allclose(ours, -np.sort(-theirs), rtol=0, atol=1e-12)
        np.testing.assert_allclose(theirs[order], ours, rtol=0, atol=1e-12)


def test_distances_and_the_adaptive_ratio(pearson_file):
    z, real, synthetic = load(pearson_file)
    k = int(z["adaptive_k"])
    value, index, _ = search(synthetic, real, Distance(), k)
    rms = (-value / real[0].numel()).sqrt().numpy() / 255
    ordered = np.sort(z["rms_l2"], axis=1)[:, :k]
    np.testing.assert_allclose(rms, ordered, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(index[:, 0].numpy(), z["nn_rms_l2"])
    ratio = rms[:, 0] / (z["adaptive_alpha"] * rms.mean(axis=1))
    np.testing.assert_allclose(ratio, z["adaptive_ratio"], rtol=0, atol=1e-14)


def test_planted_copies_are_found_under_flips_and_shifts(pearson_file):
    z, real, synthetic = load(pearson_file)
    transforms = flips_and_shifts(LEFT_RIGHT_AXIS_OF_THE_FILE, 3)
    r, index, transform = (t[:, 0] for t in search(synthetic, real, Pearson(), 1, transforms))
    plain = z["max_r_all_channels"]
    expected = {"exact_copy": IDENTITY, "left_right_flip": Transform(LEFT_RIGHT_AXIS_OF_THE_FILE)}
    for kind, change in {**expected, "shift_3px": None}.items():
        for i in np.flatnonzero(z["synthetic_kind"] == kind):
            assert index[i] == z["synthetic_source"][i]
            assert r[i] == pytest.approx(1.0, abs=1e-9)
            found = transforms[transform[i]]
            assert found == change or (change is None and max(map(abs, found.shift_px)) == 3)
            assert plain[i] < 1 - 1e-3 or kind == "exact_copy"
    defined = ~np.isnan(plain)
    assert (r.numpy()[defined] >= plain[defined] - 1e-12).all()
