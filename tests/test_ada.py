import math

import jsonargparse
import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from datamodules.slice_set import CHANNELS, LEFT_RIGHT_AXIS
from lightning_modules.ada import TRANSFORMATIONS, AdaptiveAugmentation, adjusted_probability
from lightning_modules.ada_transforms import GEOMETRIC, amplify_bands, filter_bank, inverse_affine

OFF = dict.fromkeys(TRANSFORMATIONS, 0.0)
SIZE = (16, 16)
INSIDE = (..., slice(4, -4), slice(4, -4))


def only(*names, **options):
    """Fixed p = 1 with these transformations alone."""
    return AdaptiveAugmentation(**({"target": None, "p": 1.0} | OFF | dict.fromkeys(names, 1.0) | options))


def all_of_them(**options):
    everything = dict.fromkeys(set(TRANSFORMATIONS) - {"hue", "saturation"}, 1.0)
    return AdaptiveAugmentation(**({"p": 0.7} | everything | options))


def noise_images(n, size=SIZE, channels=5):
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_default_channels_are_those_of_slice_sets():
    assert AdaptiveAugmentation().channels == CHANNELS
    assert AdaptiveAugmentation().xflip_axis == LEFT_RIGHT_AXIS


# Geometry


def smooth_images(n, size=SIZE):
    """Slopes below 0.3 per pixel: sym6 is off its middle, which moves mirrored images by a tenth of a pixel."""
    waves = torch.rand(n, 5, 3, generator=torch.Generator().manual_seed(2)) * 0.5
    y, x = torch.arange(size[0])[:, None] / size[0], torch.arange(size[1]) / size[1]
    a, b, c = (wave[..., None, None] for wave in waves.unbind(-1))
    return (2 * math.pi * (a * x + b * y + c)).sin()


@pytest.mark.parametrize("axis", [-2, -1])
def test_xflip_mirrors_the_chosen_axis_of_half_of_the_images(axis):
    images, ada = smooth_images(40), only("xflip", xflip_axis=axis)
    parameters = ada.draw(torch.arange(40), SIZE, seed=3)
    flipped = parameters["xflip"].bool()[:, 0]
    assert 10 < int(flipped.sum()) < 30
    expected = torch.where(flipped[:, None, None, None], images.flip(axis), images)
    torch.testing.assert_close(ada.transform(images, parameters)[INSIDE], expected[INSIDE], rtol=0, atol=0.04)


def test_rotate90_turns_by_quarters():
    images, ada = smooth_images(12), only("rotate90")
    parameters = ada.draw(torch.arange(12), SIZE, seed=0)
    turns = parameters["rotate90"][:, 0].int().tolist()
    assert set(turns) == {0, 1, 2, 3}
    expected = torch.stack([torch.rot90(image, turn, (1, 2)) for image, turn in zip(images, turns, strict=True)])
    torch.testing.assert_close(ada.transform(images, parameters)[INSIDE], expected[INSIDE], rtol=0, atol=0.04)


def test_xint_shifts_by_whole_pixels_with_reflection():
    images = noise_images(12, (12, 16))
    ada = only("xint", xint_max=0.5)
    parameters = ada.draw(torch.arange(12), (12, 16), seed=0)
    shifted = ada.transform(images, parameters)
    for image, result, (x, y) in zip(images, shifted, parameters["xint"].tolist(), strict=True):
        dx, dy = round(x * 16), round(y * 12)
        wide = np.pad(image.numpy(), ((0, 0), (11, 11), (15, 15)), mode="reflect")
        np.testing.assert_allclose(result, wide[:, 11 - dy : 23 - dy, 15 - dx : 31 - dx], rtol=0, atol=5e-6)


def test_geometry_moves_the_label_with_the_image_to_the_place_that_the_map_says():
    size, n = 32, 24
    centre = torch.tensor([4.0, -3.0])  # x and y of a blob in pixels from the middle
    axis = torch.arange(size) - (size - 1) / 2
    distance2 = (axis - centre[0]).square() + (axis[:, None] - centre[1]).square()
    blob = torch.exp(-distance2 / (2 * 2.5**2)) * 2 - 1
    label = torch.where(distance2 < 3.5**2, 1.0, -1.0)
    images = torch.stack([blob] * 4 + [label])[None].repeat(n, 1, 1, 1)
    ada = only(*GEOMETRIC, p=0.8)
    parameters = ada.draw(torch.arange(n), (size, size), seed=5)
    moved = ada.transform(images, parameters)

    inverse = inverse_affine(parameters, (size, size), ada.xflip_axis)
    where = torch.linalg.solve(inverse[..., :2], centre.double()[:, None] - inverse[..., 2:])[..., 0]  # (N, 2)
    seen = [k for k in range(n) if where[k].abs().max() < 8]
    assert len(seen) > 10
    changed = 0
    for k in seen:
        near = (axis - where[k, 0]).square() + (axis[:, None] - where[k, 1]).square() < 7**2
        bright, marked = (moved[k, 0] > 0) & near, (moved[k, 4] > 0) & near
        for mask in (bright, marked):
            weight = mask.double()
            found = torch.stack([(weight * axis).sum(), (weight * axis[:, None]).sum()]) / weight.sum()
            assert float((found - where[k]).abs().max()) < 0.5
        assert bool((marked & (moved[k, 0] > -0.6)).sum() == marked.sum())
        changed += int((where[k] - centre).abs().max() > 1)
    assert changed > 5


def test_a_sample_does_not_depend_on_its_batch():
    images, position = noise_images(8), torch.arange(8) + 100
    ada = all_of_them()
    whole = ada(images, position, seed=1)
    halves = torch.cat([ada(images[k::2], position[k::2], seed=1) for k in (0, 1)])
    torch.testing.assert_close(torch.cat([whole[0::2], whole[1::2]]), halves, rtol=0, atol=1e-6)


def test_gradients_and_their_gradients():
    ada = all_of_them()
    parameters = ada.draw(torch.arange(3), (8, 10), seed=2)
    images = noise_images(3, (8, 10)).double().requires_grad_()
    assert ada.transform(images, parameters).dtype == torch.float64
    check = {"fast_mode": True, "atol": 1e-4}
    assert torch.autograd.gradcheck(lambda x: ada.transform(x, parameters), images, **check)
    assert torch.autograd.gradgradcheck(lambda x: ada.transform(x, parameters).square(), images, **check)


# Intensities


@pytest.mark.parametrize("name", ["brightness", "contrast", "lumaflip", "imgfilter", "noise"])
def test_intensities_change_every_modality_on_its_own_and_never_the_label(name):
    images = noise_images(20)
    modality = images[:, :1].repeat(1, 4, 1, 1)
    images = torch.cat([images[:, 4:], modality], 1)  # the label need not be last
    ada = only(name, channels=("label", "T1", "T1ce", "T2", "FLAIR"))
    result = ada(images, torch.arange(20), seed=0)
    assert torch.equal(result[:, 0], images[:, 0])
    assert float((result[:, 1:] - images[:, 1:]).abs().mean()) > 0.01
    assert float((result[:, 1] - result[:, 2]).abs().mean()) > 0.01


def test_colours_are_those_of_the_named_group_whatever_its_order():
    images = noise_images(20)
    groups = [["T2"], ["FLAIR", "T1", "T1ce"]]
    ada = only("hue", "saturation", intensity_groups=groups)
    result = ada(images, torch.arange(20), seed=0)
    assert torch.equal(result[:, [2, 4]], images[:, [2, 4]])
    colours = [3, 0, 1]
    torch.testing.assert_close(result[:, colours].mean(1), images[:, colours].mean(1), rtol=0, atol=1e-6)
    chroma = [x[:, colours] - x[:, colours].mean(1, keepdim=True) for x in (images, result)]
    ratio = (chroma[1].square().sum(1) / chroma[0].square().sum(1)).sqrt()  # rotated and stretched: one per sample
    stretch = torch.exp2(ada.draw(torch.arange(20), SIZE, seed=0)["saturation"][:, 1])
    torch.testing.assert_close(ratio, stretch[:, None, None].expand_as(ratio), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [(16, 16), (9, 40)])
def test_small_images_are_reflected_as_often_as_the_filter_needs(size):
    images, bank = noise_images(3, size, channels=2), filter_bank()
    amplification = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    t = 2.0 ** amplification.double().numpy()
    gain = t / np.sqrt(np.prod(1 + np.array([10, 1, 1, 1]) / 13 * (t**2 - 1), -1, keepdims=True))
    expected = np.empty(images.shape)
    for n, c in np.ndindex(3, 2):
        taps = gain[n, c] @ bank.double().numpy()
        rows = ndimage.correlate1d(images[n, c].double().numpy(), taps, axis=0, mode="mirror")
        expected[n, c] = ndimage.correlate1d(rows, taps, axis=1, mode="mirror")
    np.testing.assert_allclose(amplify_bands(images, amplification, bank), expected, rtol=0, atol=1e-5)


def test_bands_sum_to_the_identity():
    identity = torch.zeros(43)
    identity[21] = 1
    torch.testing.assert_close(filter_bank().sum(0), identity, rtol=0, atol=1e-6)


def test_cutout_blanks_the_same_rectangle_in_all_channels():
    result = only("cutout", cutout_size=0.5)(noise_images(30), torch.arange(30), seed=0)
    blank = result == 0
    assert torch.equal(blank, blank[:, :1].expand_as(blank))
    area = blank[:, 0].sum((1, 2))
    assert int(area.max()) == 64
    assert int(area.min()) >= 16


# Draws


def test_draws_depend_on_seed_position_and_draw_alone():
    ada, position = all_of_them(), torch.arange(50)
    base = ada.draw(position, SIZE, seed=1)
    some = ada.draw(torch.tensor([41, 3]), SIZE, seed=1)
    rarely = all_of_them(**{name: 0.0 for name in TRANSFORMATIONS if name != "contrast"}).draw(position, SIZE, seed=1)
    assert set(base) == set(TRANSFORMATIONS) - {"hue", "saturation"}
    assert all(torch.equal(some[name], base[name][[41, 3]]) for name in base)
    assert set(rarely) == {"contrast"}
    assert torch.equal(rarely["contrast"], base["contrast"])
    for other in (ada.draw(position, SIZE, seed=2), ada.draw(position, SIZE, seed=1, draw=1)):
        assert all(not torch.equal(other[name], base[name]) for name in base)


def test_transformations_are_as_frequent_as_multiplier_times_p():
    n, p, multiplier = 4000, 0.6, 0.8
    bands = (1.0, 0.5, 0.25, 0.0)
    options = dict.fromkeys(TRANSFORMATIONS, multiplier) | {"imgfilter_bands": bands}
    ada = AdaptiveAugmentation(["R", "G", "B", "A"], None, [["R", "G", "B"], ["A"]], p=p, **options)
    drawn = ada.draw(torch.arange(n), (2, 2), seed=0)
    share = dict.fromkeys(TRANSFORMATIONS, 1.0) | {"xflip": 0.5, "rotate90": 0.75, "lumaflip": 0.5}
    for name, values in drawn.items():
        applied = (values != 0).any(1) if name in GEOMETRIC or name == "cutout" else values != 0
        if name == "noise":  # one standard deviation for the three colours, one for the grey channel
            assert torch.equal(applied[:, 0], applied[:, 2])
            assert not torch.equal(applied[:, 2], applied[:, 3])
            applied = applied[:, 2:, 0, 0]
        expected = torch.tensor(multiplier * p * share[name])
        expected = expected * torch.tensor(bands) if name == "imgfilter" else expected
        deviation = (applied.double().mean(0) - expected).abs()
        assert bool((deviation <= 4 * (expected * (1 - expected) / n).sqrt()).all()), name
    pairs = torch.cat([drawn[name] != 0 for name in ("xint", "scale", "brightness", "contrast", "hue")], 1).double()
    correlation = torch.corrcoef(pairs.T)
    assert float(correlation[0, 1]) == pytest.approx(1)  # x and y of a translation come together
    assert float(correlation[1:, 1:].fill_diagonal_(0).abs().max()) < 0.08


def test_strengths_have_the_distributions_of_the_options():
    options = dict.fromkeys(TRANSFORMATIONS, 1.0) | {"scale_std": 0.3, "hue_max": 0.5, "xint_max": 0.25, "noise": 0.0}
    ada = AdaptiveAugmentation(["R", "G", "B"], None, [["R", "G", "B"]], p=1.0, **options)
    drawn = ada.draw(torch.arange(1000), SIZE, seed=0)
    normal = {"scale": 0.3, "aniso": 0.2, "xfrac": 0.125, "brightness": 0.2, "contrast": 0.5, "saturation": 1.0}
    uniform = {"xint": 0.25, "rotate": math.pi, "hue": 0.5 * math.pi}
    for name, std in (normal | {"imgfilter": 1.0}).items():
        assert stats.kstest(drawn[name].flatten().double() / std, "norm").pvalue > 1e-3, name
    for name, limit in uniform.items():
        assert stats.kstest((drawn[name].flatten().double() / limit + 1) / 2, "uniform").pvalue > 1e-3, name
    assert drawn["cutout"][:, 0].unique().tolist() == [0.5]
    assert stats.kstest(drawn["cutout"][:, 1:].flatten().double(), "uniform").pvalue > 1e-3
    sigma = only("noise").draw(torch.arange(400), (32, 32), seed=0)["noise"].double().std((2, 3))
    assert stats.kstest(sigma.flatten() / 0.1, "halfnorm").pvalue > 1e-3


def test_nothing_happens_at_p_0():
    images, position = noise_images(4), torch.arange(4)
    assert torch.equal(all_of_them(p=0.0, imgfilter=0.0)(images, position, seed=0), images)
    torch.testing.assert_close(all_of_them(p=0.0)(images, position, seed=0), images, rtol=0, atol=1e-6)
    assert all_of_them(p=0.0, target=None)(images, position, seed=0) is images


def test_autocast_does_not_coarsen_the_images():
    images, ada = noise_images(4), all_of_them()
    with torch.autocast("cpu", torch.bfloat16):
        result = ada(images, torch.arange(4), seed=0)
    assert torch.equal(result, ada(images, torch.arange(4), seed=0))


# The probability


def test_p_moves_with_the_speed_wanted_towards_the_target():
    ada = AdaptiveAugmentation(adjust_kimg=0.1)  # 1 within 100 images
    for mean_sign, p in ((0.8, 0.2), (1.0, 0.4), (0.5, 0.2), (-1.0, 0.0), (0.0, 0.0)):
        ada.accumulate(torch.tensor(mean_sign + 0.1), 10)
        ada.accumulate(torch.tensor(mean_sign - 0.1), 10)
        ada.adjust(20)
        assert float(ada.p) == pytest.approx(p, abs=1e-6)


def test_p_stays_a_probability():
    images, p = 400, torch.tensor(0.9)
    assert float(adjusted_probability(p, torch.tensor(1.0), 0.6, images, adjust_kimg=1.0)) == 1
    assert float(adjusted_probability(p, torch.tensor(0.2), 0.6, images * 3, adjust_kimg=1.0)) == 0
    assert float(adjusted_probability(p, torch.tensor(0.6), 0.6, images, adjust_kimg=1.0)) == pytest.approx(0.9)


def test_p_without_target_and_without_images_stays():
    fixed, idle = AdaptiveAugmentation(target=None, p=0.3), AdaptiveAugmentation(p=0.3)
    fixed.accumulate(torch.tensor(1.0), 500)
    for ada in (fixed, idle):
        ada.adjust(0)
        assert float(ada.p) == pytest.approx(0.3)


def test_a_resumed_interval_ends_with_the_same_p():
    straight = AdaptiveAugmentation(p=0.5, adjust_kimg=1.0)
    straight.accumulate(torch.tensor(0.9), 8)
    resumed = AdaptiveAugmentation(adjust_kimg=1.0)
    resumed.load_state_dict(straight.state_dict())
    for ada in (straight, resumed):
        ada.accumulate(torch.tensor(0.4), 8)
        ada.adjust(16)
    assert float(straight.p) == pytest.approx(0.5 + 16 / 1000)
    assert torch.equal(straight.p, resumed.p)
    assert set(straight.state_dict()) == {"p", "Hz_geom", "Hz_fbank", "sign_sum", "sign_count"}


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "seg"}, "label seg is none of the channels T1, T1ce, T2, FLAIR, label"),
        ({"intensity_groups": [["T1"], ["T1ce"], ["T2"], ["PD"]]}, r"every modality \(T1, .*FLAIR\) once.*PD"),
        ({"intensity_groups": [["T1"], ["T1ce"], ["T2"], ["label"]]}, "every modality"),
        ({"intensity_groups": [["T1", "T1ce"], ["T2"], ["FLAIR"]]}, "1 or 3 channels"),
        ({"channels": ["T1", "T1", "label"]}, "named twice"),
        ({"hue": 1.0}, "hue and saturation need an intensity group of three"),
        ({"scale": -0.5}, "scale is a multiplier and at least 0, not -0.5"),
        ({"imgfilter_bands": [1.0, 1.0]}, "one multiplier for each of 4 bands"),
        ({"p": 1.5}, "p is a probability, not 1.5"),
        ({"adjust_interval": 0}, "adjust_interval are positive"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveAugmentation(**options)


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"p is a probability.*positive"):
        AdaptiveAugmentation(p=-1.0, adjust_kimg=0.0)


def test_images_with_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"expects the 5 channels T1, .*label, but got images of 3 channels"):
        AdaptiveAugmentation()(torch.zeros(1, 3, 16, 16), torch.arange(1), seed=0)


def test_it_is_built_from_yaml():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--augmentation", type=AdaptiveAugmentation | None)
    config = """
class_path: lightning_modules.ada.AdaptiveAugmentation
init_args:
  {channels: [a, b, c, d], label: null, intensity_groups: [[d], [a, b, c]], hue: 1, xflip_axis: -1, target: null}
"""
    ada = parser.instantiate_classes(parser.parse_args([f"--augmentation={config}"])).augmentation
    assert ada.group_sizes == [1, 3]
    assert (ada.multipliers["hue"], ada.xflip_axis, ada.target) == (1.0, -1, None)
