"""StyleGAN 3: the two ways to compute a layer, geometry of the layers, Fourier input, moving means, half precision."""

import math

import pytest
import torch
from torch import Tensor

from lightning_modules.losses import path_lengths
from lightning_modules.networks import filtered_lrelu
from lightning_modules.networks.stylegan3 import StyleGAN3Generator, signals
from lightning_modules.networks.stylegan3_layers import Signal, SynthesisInput, SynthesisLayer

SMALL = {"z_dim": 8, "w_dim": 8, "img_resolution": 16, "img_channels": 2, "channel_base": 96, "channel_max": 8}
CONFIGURATIONS = {"T": {}, "R": {"conv_kernel": 1, "use_radial_filters": True}}


def build(**kwargs) -> StyleGAN3Generator:
    torch.manual_seed(0)
    generator = StyleGAN3Generator(**SMALL | kwargs)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("bias") and "affine" not in name:
                parameter.normal_()
        generator.synthesis.input.affine.weight.normal_(std=0.3)
    return generator


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_images_and_gradients_do_not_depend_on_the_way_of_computing(configuration, monkeypatch):
    generator = build(num_layers=5, **configuration)  # with layers that upsample and that crop
    z, g = torch.randn(3, 8), torch.randn(3, 2, 16, 16)
    first, *_, last, _ = (generator.synthesis.get_submodule(name) for name in generator.synthesis.layer_names)
    assert last.padding[1] < -last.up
    results, numbers = [], []
    for by_sample, part_bytes in ((False, 2**30), (True, 2**30), (True, 500_000), (True, 1)):
        monkeypatch.setattr(SynthesisLayer, "_by_sample", lambda self, x, chosen=by_sample: chosen)
        monkeypatch.setattr(filtered_lrelu, "_CHUNK_BYTES", part_bytes)
        hook = first.register_forward_hook(lambda _m, _i, parts: numbers.append([len(part) for part in parts]))
        image = generator(z)
        hook.remove()
        results.append([image.detach(), *torch.autograd.grad((image * g).sum(), list(generator.parameters()))])
    assert numbers == [[3], [3], [2, 1], [1, 1, 1]]
    for result in results[1:]:
        for ours, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_weights_are_modulated_where_there_are_fewer_of_them_than_features():
    wide = Signal(40, 12, 8, 2.0, 2.0)
    layer = SynthesisLayer(8, wide, wide)
    assert 40 * 40 * 9 > 40 * 12 * 12
    assert not layer._by_sample(torch.zeros(1, 40, 12, 12))
    assert layer._by_sample(torch.zeros(1, 40, 20, 20))


def test_second_derivatives_are_the_same_in_both_ways(monkeypatch):
    generator = build(num_layers=4)
    ws = generator.mapping(torch.randn(2, 8)).detach().requires_grad_()
    y = torch.randn(2, 2, 16, 16)
    results = []
    for by_sample in (True, False):
        monkeypatch.setattr(SynthesisLayer, "_by_sample", lambda self, x, chosen=by_sample: chosen)
        penalty = path_lengths(generator.synthesis(ws), ws, y).square().sum()
        results.append(torch.autograd.grad(penalty, list(generator.synthesis.parameters()), allow_unused=True))
    assert sum(gradient is not None for gradient in results[0]) >= 4 * 3
    for ours, expected in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_layers_have_the_names_of_the_published_networks_for_256_px():
    found = signals(256, 3, 32768, 512, 14, 2, 2, 2**2.1, 2**0.3, 10)
    names = " ".join(f"L{i}_{signal.size_px}_{signal.channels}" for i, signal in enumerate(found))
    assert names == (
        "L0_36_512 L1_36_512 L2_36_512 L3_52_512 L4_52_512 L5_84_512 L6_84_512 L7_148_512 L8_148_512 L9_148_362 "
        "L10_276_256 L11_276_181 L12_276_128 L13_256_128 L14_256_3"
    )
    assert list(build().synthesis._modules) == ["input", *build().synthesis.layer_names]


def test_impossible_geometries_are_refused():
    with pytest.raises(ValueError, match="power of two from 8; got 24"):
        build(img_resolution=24)
    with pytest.raises(ValueError, match=r"num_layers must be larger than num_critical \(2\); got 2"):
        build(num_layers=2)


# Fourier input


@pytest.fixture
def fourier() -> SynthesisInput:
    torch.manual_seed(1)
    return SynthesisInput(8, Signal(6, 36, 16, 2.0, 6.0))


def moved(cos: float, sin: float, x: float, y: float) -> Tensor:
    return torch.tensor([[cos, -sin, x], [sin, cos, y], [0.0, 0, 1]])


def test_a_translation_of_the_canvas_moves_the_features_by_that_many_samples(fourier):
    w = torch.randn(2, 8)
    before = fourier(w)
    fourier.transform.copy_(moved(1, 0, 3 / 16, -2 / 16))  # coordinates: 3 samples to the right, 2 up
    torch.testing.assert_close(fourier(w)[:, :, 2:, :-3], before[:, :, :-2, 3:], rtol=1e-4, atol=1e-5)


def test_a_quarter_turn_of_the_canvas_turns_the_features(fourier):
    w = torch.randn(2, 8)
    before = fourier(w)
    fourier.transform.copy_(moved(0, 1, 0, 0))
    torch.testing.assert_close(fourier(w), before.rot90(1, (2, 3)), rtol=1e-4, atol=1e-5)


def test_the_learned_transform_translates_then_rotates_before_that_of_the_user(fourier):
    w = torch.zeros(1, 8)
    cos, sin, x, y, factor = math.cos(0.4), math.sin(0.4), 0.3, -0.2, 2.5  # the factor is divided out
    plain = fourier(w)
    with torch.no_grad():
        fourier.affine.bias.copy_(factor * torch.tensor([cos, sin, x, y]))
    learned = fourier(w)
    assert not torch.allclose(plain, learned, atol=0.1)
    # Undone by the user: features are a function of learned · user · coordinates.
    rotate_back, move_back = moved(cos, -sin, 0, 0), moved(1, 0, x, y)
    fourier.transform.copy_(move_back @ rotate_back)
    torch.testing.assert_close(fourier(w), plain, rtol=1e-3, atol=1e-4)


def test_frequencies_that_would_alias_fade_out(fourier):
    w = torch.zeros(1, 8)
    fourier.transform.copy_(torch.diag(torch.tensor([20.0, 20, 1])))  # 40 cycles for 16 samples
    with torch.no_grad():
        fourier.freqs.copy_(fourier.freqs / fourier.freqs.norm(dim=1, keepdim=True) * 2)
    assert float(fourier(w).detach().abs().max()) == 0


def test_frequencies_fill_the_disc_uniformly():
    torch.manual_seed(0)
    radius = SynthesisInput(1, Signal(4000, 8, 16, 2.0, 6.0)).freqs.norm(dim=1)
    assert float(radius.max()) <= 2
    assert float((radius < 1).float().mean()) == pytest.approx(0.25, abs=0.03)


# Magnitudes, noise, precision


def test_magnitudes_are_updated_with_what_the_processes_agree_on_and_used_at_once():
    generator = build(magnitude_ema_beta=0.75)
    z, layer = torch.randn(2, 8), generator.synthesis.get_submodule(generator.synthesis.layer_names[0])
    means: list[Tensor] = []
    with torch.no_grad():
        ws = generator.mapping(z)
        expected = generator.synthesis.input(ws[:, 0]).square().mean()

        def agree(mean: Tensor) -> Tensor:
            means.append(mean)
            return mean + 1

        image = generator(z, update_emas=agree)
        assert len(means) == len(generator.synthesis.layer_names)
        torch.testing.assert_close(means[0], expected)
        torch.testing.assert_close(layer.magnitude_ema, 0.75 * torch.ones([]) + 0.25 * (expected + 1))
        torch.testing.assert_close(generator(z), image)


def test_truncation_leads_to_the_mean():
    generator = build()
    with torch.no_grad():
        generator.update_w_avg(torch.randn(8), decay=0.0)
        images = generator(torch.randn(2, 8), truncation_psi=0.0)
    torch.testing.assert_close(images[0], images[1])


def test_labels_reach_the_image():
    generator = build(c_dim=3)
    z, c = torch.randn(1, 8).expand(3, -1), torch.eye(3)
    with torch.no_grad():
        images = generator(z, c)
    assert float((images[0] - images[1]).abs().max()) > 1e-3


def test_noise_and_styles_of_another_network_are_refused():
    generator = build()
    z = torch.randn(1, 8)
    assert generator.noise_shapes == []
    assert torch.equal(generator(z, noise=[]), generator(z, noise="const"))
    with pytest.raises(ValueError, match="no noise inputs; got 1"):
        generator(z, noise=[torch.zeros(1, 1, 16, 16)])
    with pytest.raises(ValueError, match=r"ws must be \(N, 16, 8\); got \(1, 3, 8\)"):
        generator.synthesis(torch.zeros(1, 3, 8))


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize(("dtype", "error"), [("float16", 0.01), ("bfloat16", 0.1)])
def test_half_precision_in_the_highest_resolutions_is_close(configuration, dtype, error):
    z = torch.randn(2, 8)
    full, half = build(**configuration), build(num_half_res=1, half_dtype=dtype, **configuration)
    dtypes: dict[str, torch.dtype] = {}
    for name in half.synthesis.layer_names:
        layer = half.synthesis.get_submodule(name)
        layer.register_forward_hook(lambda _m, _i, out, name=name: dtypes.__setitem__(name, out[0].dtype))
    expected, image = full(z), half(z)
    assert image.dtype == torch.float32
    assert float((image - expected).detach().norm() / expected.detach().norm()) < error
    gradients = [
        torch.autograd.grad(y.square().sum(), net.synthesis.input.weight)[0]
        for net, y in ((full, expected), (half, image))
    ]
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 3 * error
    between = signals(16, 2, 96, 8, 14, 2, 2, 2**2.1, 2**0.3, 10)
    rates = [getattr(torch, dtype) if signal.sampling_rate == 16 else torch.float32 for signal in between]
    assert list(dtypes.values()) == rates


def test_autocast_reaches_the_layers_but_not_the_input():
    generator = build()
    z = torch.randn(2, 8)
    expected = generator(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert generator.synthesis.input(torch.zeros(1, 8)).dtype == torch.float32
        image = generator(z)
    assert image.dtype == torch.float32
    assert 1e-4 < float((image - expected).detach().norm() / expected.detach().norm()) < 0.1
