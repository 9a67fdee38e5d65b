"""StyleGAN 2 in all architectures, with and without labels, against a plain formulation; half precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.losses import path_lengths, r1_penalty
from lightning_modules.networks.operators import modulated_conv2d
from lightning_modules.networks.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

CLAMP = 0.8  # small enough to matter
ARCHITECTURES = ("orig", "skip", "resnet")
SIZE = {"img_resolution": 16, "img_channels": 2, "channel_base": 64, "channel_max": 6}


class Weights(dict[str, Tensor]):
    """Weights by name, which remember what was read."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net.state_dict())
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


# The plain formulation: zero insertion, one filter, one convolution per sample, every gain where the paper has it.


def fir(x: Tensor, gain: float, margins: tuple[int, int]) -> Tensor:
    f = torch.tensor([1.0, 3, 3, 1])
    f = torch.outer(f, f) / 64 * gain
    x = F.pad(x, [*margins, *margins])
    return F.conv2d(x, f.expand(x.shape[1], 1, 4, 4), groups=x.shape[1])


def with_zeros(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = x.new_zeros(n, c, 2 * h, 2 * w)
    y[:, :, ::2, ::2] = x
    return y


def dense(weights: Weights, name: str, x: Tensor, lr: float = 1.0) -> Tensor:
    weight = weights[f"{name}.weight"]
    return x @ weight.t() * lr / math.sqrt(weight.shape[1]) + weights[f"{name}.bias"] * lr


def lrelu(x: Tensor, clamp: float, gain: float = 1.0) -> Tensor:
    return (F.leaky_relu(x, 0.2) * math.sqrt(2) * gain).clamp(-clamp * gain, clamp * gain)


def normalized(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def mapped(weights: Weights, z: Tensor | None, c: Tensor | None, layers: int) -> Tensor:
    inputs = [] if z is None else [normalized(z)]
    if c is not None:
        inputs.append(normalized(dense(weights, "mapping.embed", c)))
    w = torch.cat(inputs, 1)
    for i in range(layers):
        w = lrelu(dense(weights, f"mapping.fc{i}", w, 0.01), math.inf)
    return w


def modulated(weights: Weights, name: str, x: Tensor, w: Tensor, up: bool, gain: float = 1.0) -> Tensor:
    kernel = weights[f"{name}.weight"][None] * dense(weights, f"{name}.affine", w)[:, None, :, None, None]
    kernel = kernel / (kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    if up:
        x, kernel = fir(with_zeros(x), 4, (3, 2)), kernel.flip((3, 4))
    y = torch.cat([F.conv2d(a[None], k, padding=0 if up else 1) for a, k in zip(x, kernel, strict=True)])
    y = y + weights[f"{name}.noise_const"] * weights[f"{name}.noise_strength"]
    return lrelu(y + weights[f"{name}.bias"][:, None, None], CLAMP, gain)


def plain_generator(weights: Weights, z: Tensor, c: Tensor | None, architecture: str) -> Tensor:
    ws = mapped(weights, z, c, 3)
    x, img = weights["synthesis.b4.const"].expand(len(z), -1, -1, -1), None
    for r in (4, 8, 16):
        block = f"synthesis.b{r}"
        shortcut = None
        if r > 4 and architecture == "resnet":
            weight = weights[f"{block}.skip.weight"]
            shortcut = fir(with_zeros(F.conv2d(x, weight / math.sqrt(weight.shape[1]))), 4, (2, 1)) * math.sqrt(0.5)
        if r > 4:
            x = modulated(weights, f"{block}.conv0", x, ws, up=True)
        x = modulated(weights, f"{block}.conv1", x, ws, False, 1.0 if shortcut is None else math.sqrt(0.5))
        x = x if shortcut is None else x + shortcut
        img = None if img is None else fir(with_zeros(img), 4, (2, 1))
        if architecture == "skip" or r == 16:
            weight = weights[f"{block}.torgb.weight"]
            styles = dense(weights, f"{block}.torgb.affine", ws) / math.sqrt(weight.shape[1])
            y = torch.einsum("nihw,oi,ni->nohw", x, weight[:, :, 0, 0], styles)
            y = (y + weights[f"{block}.torgb.bias"][:, None, None]).clamp(-CLAMP, CLAMP)
            img = y if img is None else img + y
    assert img is not None
    return img


def convolved(weights: Weights, name: str, x: Tensor, clamp: float, down: bool = False, gain: float = 1.0) -> Tensor:
    weight = weights[f"{name}.weight"]
    weight = weight / math.sqrt(weight[0].numel())
    y = F.conv2d(fir(x, 1, (2, 2)), weight, stride=2) if down else F.conv2d(x, weight, padding=weight.shape[2] // 2)
    return lrelu(y + weights[f"{name}.bias"][:, None, None], clamp, gain)


def plain_discriminator(weights: Weights, img: Tensor, c: Tensor | None, architecture: str) -> Tensor:
    x: Tensor | None = None
    for r in (16, 8):
        if architecture == "skip" or r == 16:
            y = convolved(weights, f"b{r}.fromrgb", img, CLAMP)
            x = y if x is None else x + y
        img = fir(img, 1, (1, 1))[:, :, ::2, ::2]
        gain = math.sqrt(0.5) if architecture == "resnet" else 1.0
        y = convolved(weights, f"b{r}.conv1", convolved(weights, f"b{r}.conv0", x, CLAMP), CLAMP, True, gain)
        if architecture == "resnet":
            weight = weights[f"b{r}.skip.weight"]
            low = fir(x, 1, (1, 1))[:, :, ::2, ::2]
            y = y + F.conv2d(low, weight / math.sqrt(weight.shape[1])) * gain
        x = y
    assert x is not None
    if architecture == "skip":
        x = x + convolved(weights, "b4.fromrgb", img, math.inf)
    groups = x.reshape(2, -1, *x.shape[1:])  # of two: sample n is in group n mod (N / 2)
    spread = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    x = torch.cat([x, spread.repeat(2)[:, None, None, None].expand(-1, 1, 4, 4)], 1)
    x = convolved(weights, "b4.conv", x, CLAMP).flatten(1)
    x = dense(weights, "b4.out", lrelu(dense(weights, "b4.fc", x), math.inf))
    return x if c is None else (x * mapped(weights, None, c, 5)).sum(1, keepdim=True) / math.sqrt(7)


def randomize(net: nn.Module) -> None:
    """No zero bias, noise strength or mean may hide a term."""
    for tensor in [*net.parameters(), *(b for name, b in net.named_buffers() if name.endswith("w_avg"))]:
        tensor.data += 0.3 * torch.randn_like(tensor)


def labels(count: int, c_dim: int) -> Tensor | None:
    return torch.eye(c_dim)[torch.arange(count) % c_dim] if c_dim else None


def generator(**kwargs: object) -> StyleGAN2Generator:
    torch.manual_seed(1)
    net = StyleGAN2Generator(z_dim=5, w_dim=8, **SIZE, mapping_num_layers=3, **{"conv_clamp": CLAMP} | kwargs)
    randomize(net)
    return net


def discriminator(**kwargs: object) -> StyleGAN2Discriminator:
    torch.manual_seed(2)
    net = StyleGAN2Discriminator(**SIZE, **{"conv_clamp": CLAMP, "mbstd_group_size": 2} | kwargs)
    randomize(net)
    return net


def filters(weights: Weights, blocks: list[str]) -> set[str]:
    """The names of the resampling filters: one in each block and in each layer with a convolution, but for ToRGB."""
    layers = {k.removesuffix(".weight") for k, v in weights.items() if k.endswith(".weight") and v.ndim == 4}
    return {f"{name}.resample_filter" for name in [*layers, *blocks] if not name.endswith("torgb")}


@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generator_equals_the_plain_formulation(architecture, c_dim):
    net = generator(architecture=architecture, c_dim=c_dim)
    weights, z, c = Weights(net), torch.randn(4, 5), labels(4, c_dim)
    with torch.no_grad():
        torch.testing.assert_close(net(z, c), plain_generator(weights, z, c, architecture), rtol=1e-4, atol=1e-5)
    blocks = filters(weights, [f"synthesis.b{r}" for r in (4, 8, 16)])
    assert weights.keys() - weights.read == blocks | {"mapping.w_avg"}  # the names of the original, and no more


@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_discriminator_equals_the_plain_formulation(architecture, c_dim):
    net = discriminator(architecture=architecture, c_dim=c_dim, cmap_dim=7, mapping_num_layers=5)
    weights, images, c = Weights(net), torch.randn(4, 2, 16, 16), labels(4, c_dim)
    with torch.no_grad():
        expected = plain_discriminator(weights, images, c, architecture)
        torch.testing.assert_close(net(images, c), expected, rtol=1e-4, atol=1e-5)
    assert weights.keys() - weights.read == filters(weights, ["b16", "b8"])


def test_width_of_a_mapped_label_is_that_of_the_features():
    assert discriminator(c_dim=3).get_parameter("mapping.embed.weight").shape == (6, 3)
    assert discriminator(c_dim=3).get_parameter("b4.out.weight").shape == (6, 6)


def test_truncation_goes_to_the_mean_for_every_label():
    net = generator(c_dim=3)
    z, c = torch.randn(3, 5), labels(3, 3)
    ws, cut = net.mapping(z, c), net.mapping(z, c, 0.25, 2)
    mean = net.mapping.w_avg
    torch.testing.assert_close(cut[:, :2] - mean, (ws[:, :2] - mean) / 4)
    torch.testing.assert_close(cut[:, 2:], ws[:, 2:])
    assert not torch.equal(ws[0], net.mapping(z, c[[1, 2, 0]])[0])


def test_labels_of_the_wrong_width_are_refused():
    z, images = torch.randn(2, 5), torch.randn(2, 2, 16, 16)
    with pytest.raises(ValueError, match=r"c must be \(N, 3\).*got nothing"):
        generator(c_dim=3)(z)
    with pytest.raises(ValueError, match=r"c must be \(N, 3\).*got \(2, 4\)"):
        discriminator(c_dim=3)(images, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"c must be \(N, 0\).*got \(2, 3\)"):
        generator()(z, labels(2, 3))
    with pytest.raises(ValueError, match="without labels"):
        discriminator()(images, labels(2, 3))
    with pytest.raises(ValueError, match=r"z must be \(N, 5\).*got \(2, 6\)"):
        generator()(torch.randn(2, 6))


def test_other_filters_go_where_the_original_has_them():
    net, critic = generator(resample_filter=[1, 2, 1]), discriminator(resample_filter=[1, 2, 1])
    short = {name for name, f in [*net.named_buffers(), *critic.named_buffers()] if f.shape == (3, 3)}
    blocks = {f"synthesis.b{r}.resample_filter" for r in (4, 8, 16)} | {f"b{r}.resample_filter" for r in (8, 16)}
    ups = {f"synthesis.b{r}.conv0.resample_filter" for r in (8, 16)}
    assert short == blocks | ups | {f"b{r}.{name}.resample_filter" for r in (8, 16) for name in ("conv1", "skip")}


def test_frozen_layers_are_the_first_and_keep_their_names():
    free, frozen = discriminator(), discriminator(freeze_layers=5)
    assert frozen.state_dict().keys() == free.state_dict().keys()
    gone = {name for name, _ in free.named_parameters()} - {name for name, _ in frozen.named_parameters()}
    first = [f"b16.{layer}.{kind}" for layer in ("fromrgb", "conv0", "conv1") for kind in ("weight", "bias")]
    assert gone == {*first, "b16.skip.weight", "b8.conv0.weight", "b8.conv0.bias"}
    images = torch.randn(4, 2, 16, 16, requires_grad=True)
    frozen.load_state_dict(free.state_dict())
    torch.testing.assert_close(frozen(images), free(images))
    frozen(images).sum().backward()
    assert images.grad is not None
    assert all(p.grad is not None for p in frozen.parameters())


def dtypes_of_blocks(net: nn.Module, run) -> dict[str, torch.dtype]:
    found = {}
    for name, module in net.named_modules():
        if name.rpartition(".")[2] in ("b4", "b8", "b16"):
            module.register_forward_hook(lambda _m, _i, out, name=name: found.update({name: (out[0]).dtype}))
    run()
    return found


@pytest.mark.parametrize("half_dtype", ["float16", "bfloat16"])
def test_only_the_top_resolutions_are_half(half_dtype):
    half = getattr(torch, half_dtype)
    for top, expected in ((0, []), (1, ["b16"]), (2, ["b16", "b8"]), (4, ["b16", "b8"])):
        net = generator(num_half_res=top, half_dtype=half_dtype)
        found = dtypes_of_blocks(net.synthesis, lambda net=net: net(torch.randn(2, 5)))
        assert {name for name, dtype in found.items() if dtype == half} == set(expected)
        assert net(torch.randn(2, 5)).dtype == torch.float32
        critic = discriminator(num_half_res=top, half_dtype=half_dtype)
        found = dtypes_of_blocks(critic, lambda critic=critic: critic(torch.randn(2, 2, 16, 16)))
        assert {name for name, dtype in found.items() if dtype == half} == set(expected)
        assert found["b4"] == torch.float32


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("half_dtype", "rounding"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_is_close_to_float32_in_values_and_both_derivatives(half_dtype, rounding, architecture):
    torch.manual_seed(0)
    z, c, images = torch.randn(4, 5), labels(4, 3), torch.randn(4, 2, 16, 16, requires_grad=True)
    values, derivatives = [], []
    for top in (0, 2):
        kwargs = {"architecture": architecture, "c_dim": 3, "conv_clamp": 256}
        kwargs |= {"num_half_res": top, "half_dtype": half_dtype}
        # Over two samples the standard deviation is |a - b| / 2, whose curvature no rounding leaves alone.
        net, critic = generator(**kwargs), discriminator(**kwargs, mbstd_group_size=4)
        ws = net.mapping(z, c)
        img, logits = net.synthesis(ws), critic(images, c)
        lengths, penalty = path_lengths(img, ws, torch.ones_like(img)), r1_penalty(images, logits)
        (first,) = torch.autograd.grad(lengths.sum(), net.get_parameter("synthesis.b16.conv1.weight"))
        (second,) = torch.autograd.grad(penalty.sum(), critic.get_parameter("b16.conv0.weight"))
        values.append((img, logits))
        derivatives.append((lengths, penalty, first, second))
    for full, half in zip(*values, strict=True):
        assert 0 < relative(half, full) < 10 * rounding
    # Values near zero that round to the other side of the leaky ReLU change its slope.
    for full, half in zip(*derivatives, strict=True):
        assert 0 < relative(half, full) < 3 * rounding**0.5


def test_modulation_does_not_overflow_float16():
    torch.manual_seed(0)
    x, weight, styles = torch.randn(2, 64, 8, 8) * 50, torch.randn(4, 64, 3, 3) * 30, torch.rand(2, 64) * 2000
    expected = modulated_conv2d(x, weight, styles, padding=1)
    half = modulated_conv2d(x.half(), weight, styles, padding=1)
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=0.5)
