"""Progressive growing: schedule, real images, the networks of progressive GAN and StyleGAN 1 between their levels."""

import re

import jsonargparse
import pytest
import torch
import torch.nn.functional as F

from lightning_modules.growing import GrowingSchedule, fade_real
from lightning_modules.losses import auxiliary_classifier_loss, gradient_penalty
from lightning_modules.networks import tensorflow_weights
from lightning_modules.networks.growing import downsample, resampled_conv2d, upsample
from lightning_modules.networks.progressive_gan import ProgressiveDiscriminator, ProgressiveGenerator
from lightning_modules.networks.stylegan1 import StyleGAN1Discriminator, StyleGAN1Generator

SMALL = {"img_resolution": 32, "fmap_base": 64, "fmap_max": 8}
LODS = [0.0, 0.5, 1.0, 1.25, 2.0, 2.75, 3.0]


def randomized(net):
    """Weights that are not trivial anywhere: no bias, noise strength or mean is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            scale = 100 if "mapping.Dense" in name else 1  # the inverse of the learning-rate multiplier
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return net


def generators():
    yield ProgressiveGenerator(8, **SMALL)
    yield StyleGAN1Generator(8, w_dim=8, mapping_width=8, **SMALL)


def discriminators():
    yield ProgressiveDiscriminator(**SMALL)
    yield ProgressiveDiscriminator(**SMALL, fused_scale=False, mbstd_group_size=0)
    yield StyleGAN1Discriminator(**SMALL)


def image(lod, n=4):
    return fade_real(torch.randn(n, 5, 32, 32, generator=torch.Generator().manual_seed(1)), lod)


def latent(n=4):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(2))


NETWORKS = [(randomized(net), latent()) for net in generators()]
NETWORKS += [(randomized(net), image(0)) for net in discriminators()]


def at(net, lod, x):
    net.lod = lod
    return net(x).detach()


@pytest.mark.parametrize(("net", "x"), NETWORKS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_nothing_jumps_when_a_level_is_blended_in(net, x, level):
    for near, exact in ((level + 1e-6, level), (level + 1 - 1e-6, level + 1)):
        torch.testing.assert_close(at(net, near, x), at(net, exact, x), rtol=1e-4, atol=1e-4)
    assert (at(net, level + 0.5, x) - at(net, level, x)).abs().max() > 1e-2


@pytest.mark.parametrize("net", list(map(randomized, generators())))
@pytest.mark.parametrize("lod", LODS)
def test_generated_images_have_the_detail_of_their_level(net, lod):
    images = at(net, lod, latent())
    assert images.shape == (4, 5, 32, 32)
    size = 2 ** int(lod)
    torch.testing.assert_close(upsample(downsample(images, size), size), images)
    assert (upsample(downsample(images, 2 * size), 2 * size) - images).abs().max() > 1e-2 or lod == 3


@pytest.mark.parametrize("net", list(map(randomized, discriminators())))
@pytest.mark.parametrize("lod", LODS)
def test_the_discriminator_looks_at_no_finer_detail(net, lod):
    size = 2 ** int(lod)
    x = image(0)
    torch.testing.assert_close(at(net, lod, upsample(downsample(x, size), size)), at(net, lod, x))
    assert (at(net, lod, upsample(downsample(x, 2 * size), 2 * size)) - at(net, lod, x)).abs().max() > 1e-3 or lod == 3


@pytest.mark.parametrize(("net", "x"), NETWORKS)
@pytest.mark.parametrize("lod", LODS)
def test_exactly_the_parameters_of_the_levels_in_use_have_a_gradient(net, x, lod):
    net.lod = lod
    net.zero_grad()
    net(x).square().sum().backward()
    rgb = {int(lod), int(lod) + (lod % 1 > 0)}
    finest = 32 >> int(lod)
    for name, parameter in net.named_parameters():
        block, level = re.search(r"(\d+)x\d+\.", name), re.search(r"RGB_lod(\d)", name)
        expected = int(block[1]) <= finest if block else int(level[1]) in rgb if level else True
        found = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert found == expected, name
        assert expected or parameter.grad is None, name


@pytest.mark.parametrize(("net", "x"), NETWORKS)
@pytest.mark.parametrize("lod", [-0.1, 3.1])
def test_levels_that_do_not_exist_are_refused(net, x, lod):
    with pytest.raises(ValueError, match=rf"from 0 to 3 \(4 px\); got lod {lod}"):
        at(net, lod, x)


@pytest.mark.parametrize("net", list(discriminators()))
def test_images_of_another_size_are_refused(net):
    with pytest.raises(ValueError, match=r"images \(N, 5, 32, 32\); got \(4, 5, 16, 16\)"):
        net(torch.zeros(4, 5, 16, 16))


@pytest.mark.parametrize("cls", [ProgressiveGenerator, StyleGAN1Generator, ProgressiveDiscriminator])
def test_resolutions_are_powers_of_two(cls):
    with pytest.raises(ValueError, match="power of two from 8; got 48"):
        cls(img_resolution=48)


def test_fused_resampling_equals_the_two_steps():
    x, weight, bias = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    up = F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)
    torch.testing.assert_close(resampled_conv2d(x, weight, bias, "up"), up, rtol=1e-4, atol=1e-5)
    down = F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)
    torch.testing.assert_close(resampled_conv2d(x, weight, bias, "down"), down, rtol=1e-4, atol=1e-5)


def test_labels_enter_the_progressive_networks():
    g = randomized(ProgressiveGenerator(8, label_size=3, **SMALL))
    d = randomized(ProgressiveDiscriminator(label_size=3, **SMALL))
    labels = torch.eye(3)[[0, 1, 2, 0]]
    images = g(latent(), labels)
    # Latent code and label are normalized together, so their common scale does not matter.
    torch.testing.assert_close(g(3 * latent(), 3 * labels), images, rtol=1e-4, atol=1e-4)
    assert (g(latent(), labels.roll(1, 1)) - images).abs().amax((1, 2, 3)).min() > 1e-2
    scores, logits = d.scores_and_labels(images)
    assert (scores.shape, logits.shape) == ((4, 1), (4, 3))
    torch.testing.assert_close(d(images), scores)
    with pytest.raises(ValueError, match=r"Labels must be one-hot \(N, 3\), or None.*got None"):
        g(latent())
    with pytest.raises(ValueError, match=r"z must be \(N, 8\); got \(4, 7\)"):
        g(latent()[:, :7], labels)


def test_labels_enter_stylegan1():
    g = randomized(StyleGAN1Generator(8, c_dim=3, w_dim=8, mapping_width=6, **SMALL))
    d = randomized(StyleGAN1Discriminator(c_dim=3, **SMALL))
    labels = torch.eye(3)[[0, 1, 2, 0]]
    assert (g.mapping(latent(), labels.roll(1, 1)) - g.mapping(latent(), labels)).abs().amax((1, 2)).min() > 1e-2
    logits = [d(image(0), torch.eye(3)[[i] * 4]) for i in range(3)]
    expected = torch.cat(logits, 1).gather(1, labels.argmax(1, keepdim=True))
    torch.testing.assert_close(d(image(0), labels), expected)
    with pytest.raises(ValueError, match=r"Labels must be one-hot \(N, 3\)"):
        d(image(0))
    with pytest.raises(ValueError, match=r"or None for a network without classes; got \(4, 3\)"):
        StyleGAN1Discriminator(**SMALL)(image(0), labels)


def test_truncation_moves_the_leading_layers_towards_the_mean():
    g = randomized(StyleGAN1Generator(8, w_dim=8, mapping_width=8, **SMALL))
    ws = g.mapping(latent())
    truncated = g.mapping(latent(), truncation_psi=0.25, truncation_cutoff=3)
    torch.testing.assert_close(truncated[:, :3], g.mapping.w_avg + 0.25 * (ws - g.mapping.w_avg)[:, :3])
    torch.testing.assert_close(truncated[:, 3:], ws[:, 3:])
    g.update_w_avg(torch.ones(8), decay=1.0)
    torch.testing.assert_close(g.mapping(latent(), truncation_psi=0.25, truncation_cutoff=3), truncated)
    g.update_w_avg(torch.ones(8), decay=0.0)
    torch.testing.assert_close(g.mapping.w_avg, torch.ones(8))


def test_noise_is_that_of_the_layers_in_use():
    g = randomized(StyleGAN1Generator(8, w_dim=8, mapping_width=8, **SMALL))
    ws = g.mapping(latent())
    assert g.noise_shapes == [(r, r) for r in (4, 4, 8, 8, 16, 16, 32, 32)]
    stored = [g.synthesis.get_buffer(f"noise{i}").expand(4, -1, -1, -1) for i in range(8)]
    torch.testing.assert_close(g.synthesis(ws, noise=stored), g.synthesis(ws))
    g.lod = 1.0
    unseen = [*stored[:6], *(torch.full((4, 1, 32, 32), torch.nan) for _ in range(2))]
    torch.testing.assert_close(g.synthesis(ws, noise=unseen), g.synthesis(ws))
    assert (g.synthesis(ws, noise="none") - g.synthesis(ws)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="noise must hold 8 tensors, one per layer; got 7"):
        g.synthesis(ws, noise=stored[:7])
    with pytest.raises(ValueError, match=r"Noise of the layer at 4 px must be \(N, 1, 4, 4\); got \(4, 1, 8, 8\)"):
        g.synthesis(ws, noise=stored[2:] + stored[:2])
    with pytest.raises(ValueError, match=r"ws must be \(N, 8, 8\); got \(4, 7, 8\)"):
        g.synthesis(ws[:, 1:])


def test_real_images_are_averaged_and_blended():
    x = torch.rand(2, 5, 16, 16) * 2 - 1
    halves = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    quarters = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))
    expected = 0.4 * halves.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected += 0.6 * quarters.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(fade_real(x, 1.6), expected)
    torch.testing.assert_close(fade_real(x, 0.0), x)
    torch.testing.assert_close(fade_real(x, 2.0), quarters.repeat_interleave(4, 2).repeat_interleave(4, 3))
    torch.testing.assert_close(fade_real(x, 2 - 1e-6), fade_real(x, 2.0), rtol=1e-4, atol=1e-5)


SCHEDULE = GrowingSchedule(
    16, training_kimg=1, transition_kimg=0.5, minibatch_base=4, minibatch={4: 16, 8: 8, 512: 1}, lr={16: 0.002}
)


def test_schedule_trains_then_blends_each_resolution():
    images = [0, 1000, 1001, 1250, 1499, 1500, 2500, 2750, 3000, 10**7]
    assert [SCHEDULE.lod(n) for n in images] == pytest.approx([2, 2, 1.998, 1.5, 1.002, 1, 1, 0.5, 0, 0])
    assert [SCHEDULE.resolution(n) for n in images] == [4, 4, 8, 8, 8, 8, 8, 16, 16, 16]
    assert [SCHEDULE.minibatch_size(n) for n in images] == [16, 16, 8, 8, 8, 8, 8, 4, 4, 4]
    assert [SCHEDULE.learning_rate(n) for n in images] == [0.001] * 7 + [0.002] * 3
    assert SCHEDULE.minibatches() == [16, 8, 4]


def test_schedule_may_switch_without_blending_or_not_grow():
    switched = GrowingSchedule(16, training_kimg=1, transition_kimg=0)
    assert [switched.lod(n) for n in (0, 999, 1000, 1999, 2000)] == [2, 2, 1, 1, 0]
    fixed = GrowingSchedule(16, lod_initial_resolution=16, training_kimg=0, transition_kimg=0)
    assert [fixed.lod(n) for n in (0, 10**6)] == [0, 0]


def test_layers_enter_and_leave_between_levels():
    changed = SCHEDULE.level_changed
    assert changed(2.0, 1.9)
    assert changed(1.1, 1.0)
    assert changed(1.1, 0.9)
    assert not changed(1.9, 1.1)
    assert not changed(1.0, 1.0)


def test_minibatches_must_divide_each_other():
    with pytest.raises(ValueError, match=r"at 8 px \(6 images\) must divide that at 4 px \(16\)"):
        GrowingSchedule(8, minibatch={4: 16, 8: 6}).minibatches()


def test_schedule_says_everything_that_is_wrong():
    words = [
        "img_resolution must hold resolutions .* but holds 24",
        "minibatch must hold resolutions .* but holds 6",
        r"lod_initial_resolution \(32\) must not be above img_resolution \(24\)",
        "training_kimg and transition_kimg must not be negative, but are -1 and 600",
        "Minibatches must be positive: 16, {6: 0}",
        "Learning rates must be positive: 0, {}",
    ]
    with pytest.raises(ValueError, match=r"(?s)" + ".*".join(words)):
        GrowingSchedule(24, 32, training_kimg=-1, minibatch={6: 0}, lr_base=0)
    with pytest.raises(ValueError, match=r"nothing would grow: set lod_initial_resolution to img_resolution \(16\)"):
        GrowingSchedule(16, training_kimg=0, transition_kimg=0)


def test_schedule_comes_from_a_config():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GrowingSchedule, "growing")
    options = "{img_resolution: 16, training_kimg: 1, minibatch_base: 4, minibatch: {4: 16, 8: 8}}"
    built = parser.instantiate(parser.parse_args([f"--growing={options}"])).growing
    assert built == GrowingSchedule(16, training_kimg=1, minibatch_base=4, minibatch={4: 16, 8: 8})
    with pytest.raises(jsonargparse.ArgumentError, match="training_kmg"):
        parser.parse_args(["--growing={img_resolution: 16, training_kmg: 3}"])


def test_gradient_penalty_of_a_linear_critic():
    direction = torch.randn(5, 4, 4)
    x = torch.randn(3, 5, 4, 4, requires_grad=True)
    penalty = gradient_penalty(x, (x * direction).sum((1, 2, 3)), target=2.0)
    expected = (direction.norm() - 2) ** 2 / 4
    torch.testing.assert_close(penalty, expected.expand(3))


def test_gradient_penalty_of_a_flat_critic_can_be_differentiated():
    weight = torch.zeros((), requires_grad=True)
    x = torch.randn(3, 5, 4, 4, requires_grad=True)
    penalty = gradient_penalty(x, (x * weight).sum((1, 2, 3)))
    torch.testing.assert_close(penalty, torch.ones(3))
    penalty.mean().backward()
    assert weight.grad == 0


def test_auxiliary_classifier_loss_is_the_surprise_at_the_label():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    expected = -(torch.softmax(logits, 1)[[0, 1], [2, 1]].log().mean())
    torch.testing.assert_close(auxiliary_classifier_loss(logits, torch.eye(3)[[2, 1]]), expected)


def variables(net):
    """The state of a network under the names and in the layouts of the unfused originals."""
    found = {}
    for key, tensor in net.state_dict().items():
        name = key.replace(".", "/")
        if isinstance(net, StyleGAN1Generator):
            name = name.replace("mapping/w_avg", "dlatent_avg")
            name = name.replace("mapping/", "G_mapping/").replace("synthesis/", "G_synthesis/")
        if name.endswith("/weight"):
            tensor = tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.t()
        found[name] = tensor.numpy().copy()
    return found | {"lod": 0.0}


def fused_upsampling(x, weight):
    """What TensorFlow's conv2d_transpose does with [kh, kw, out, in]: the adjoint of a convolution of stride 2."""
    kernel = torch.zeros(4, 4, *weight.shape[2:])
    for dy in (0, 1):
        for dx in (0, 1):
            kernel[dy : dy + 3, dx : dx + 3] += weight
    large = torch.zeros(len(x), weight.shape[2], 2 * x.shape[2], 2 * x.shape[3], requires_grad=True)
    small = F.conv2d(large, kernel.permute(3, 2, 0, 1), stride=2, padding=1)
    return torch.autograd.grad(small, large, x)[0]


def test_progressive_generators_come_from_tensorflow_fused_and_not():
    net = randomized(ProgressiveGenerator(8, **SMALL))
    arguments = {"latent_size": None, "num_channels": 5, "resolution": 32, "fmap_base": 64, "fmap_max": 8, "tanh": 1}
    unfused = variables(net)
    fused = {}
    for name, value in unfused.items():
        up = name.endswith("Conv0/weight")
        fused[name.replace("Conv0", "Conv0_up")] = value.transpose(0, 1, 3, 2)[::-1, ::-1].copy() if up else value
    for stored in (unfused, fused):
        loaded = tensorflow_weights.build("G_paper", arguments)
        tensorflow_weights.load(loaded, stored)
        torch.testing.assert_close(loaded(latent()), net(latent()))
    layer = net.get_submodule("8x8.Conv0")
    x = torch.randn(2, 8, 4, 4)
    expected = fused_upsampling(x, torch.tensor(fused["8x8/Conv0_up/weight"]) * layer.weight_gain)
    torch.testing.assert_close(layer(x) - layer.bias[:, None, None], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fused_scale", "mirrored"), [(True, {8, 16, 32, 64, 128}), (False, set()), ("auto", {128})], ids=str
)
def test_stylegan1_generators_come_from_tensorflow_fused_and_not(fused_scale, mirrored):
    small = {"fmap_base": 128, "fmap_max": 4}
    arguments = {"num_channels": 5, "resolution": 128, "latent_size": 8, "dlatent_size": 8, "mapping_fmaps": 8} | small
    net = randomized(tensorflow_weights.build("G_style", arguments))
    loaded = tensorflow_weights.build("G_style", arguments)
    tensorflow_weights.load(loaded, variables(net), fused_scale)
    for name, parameter in net.named_parameters():
        up = re.search(r"(\d+)x\d+\.Conv0_up\.weight", name)
        expected = parameter.flip((2, 3)) if up and int(up[1]) in mirrored else parameter
        torch.testing.assert_close(loaded.get_parameter(name), expected)
    torch.testing.assert_close(loaded.mapping.w_avg, net.mapping.w_avg)


def test_the_discriminators_come_from_tensorflow():
    arguments = {"num_channels": 5, "resolution": 32, "fmap_base": 64, "fmap_max": 8}
    for function, options in (("D_paper", {}), ("D_paper", {"fused_scale": False}), ("D_basic", {})):
        net = randomized(tensorflow_weights.build(function, arguments | options))
        loaded = tensorflow_weights.build(function, arguments | options)
        tensorflow_weights.load(loaded, variables(net))
        torch.testing.assert_close(loaded(image(0)), net(image(0)))


def test_what_we_do_not_have_is_refused():
    with pytest.raises(ValueError, match="must be one of G_paper, D_paper, G_style, D_basic; got G_main"):
        tensorflow_weights.build("G_main", {})
    with pytest.raises(ValueError, match=r"G_style with {'use_styles': False} is not supported; supported is .*True"):
        tensorflow_weights.build("G_style", {"use_styles": False})
    net = ProgressiveDiscriminator(**SMALL)
    stored = variables(net)
    del stored["8x8/Conv0/bias"]
    with pytest.raises(ValueError, match=r"(?s)not those of this ProgressiveDiscriminator.*8x8\.Conv0\.bias"):
        tensorflow_weights.load(net, stored)
