"""The diffusion U-Net: published sizes, formulas of its layers, conditions, precision, memory and compilation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.networks.diffusion_layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    Upsample,
    attend,
    normalize_silu,
    timestep_embedding,
)
from lightning_modules.networks.diffusion_unet import DiffusionUNet


def tiny(**arguments):
    """A network of which every part contributes."""
    torch.manual_seed(0)
    settings = {"img_resolution": 8, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    return randomized(DiffusionUNet(**(settings | {"attention_resolutions_px": (4,)} | arguments)))


def randomized(module):
    """Fill the weights that start from zero or one too."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    return module


def inputs(n=2, channels=5, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, size, size, generator=generator, dtype=dtype), torch.tensor([3.0, 250.5])[:n]


def gradients(network, x, t):
    network.zero_grad()
    network(x, t).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


# With the settings of Usman Akbar et al. 2024 and 64, 32, 128 and 256 channels the original program has 41.1, 10.3,
# 164.3 and 656.9 million parameters; Dhariwal, Nichol 2021, give 296, 554 and 559 for 64, 256 and 512 px (table 11).
ADM = {"img_channels": 3, "attention_resolutions_px": (32, 16, 8), "num_head_channels": 64, "learn_variance": True}
ADM |= {"resblock_updown": True, "condition_width": 1000}


@pytest.mark.parametrize(
    ("millions", "arguments"),
    [
        (41.1, {"img_resolution": 256}),
        (10.3, {"img_resolution": 256, "model_channels": 32}),
        (164.3, {"img_resolution": 256, "model_channels": 128}),
        (656.9, {"img_resolution": 256, "model_channels": 256}),
        (296, ADM | {"img_resolution": 64, "model_channels": 192, "channel_mult": (1, 2, 3, 4)}),
        (554, ADM | {"img_resolution": 256, "model_channels": 256, "num_res_blocks": 2}),
        (
            559,
            ADM
            | {"img_resolution": 512, "model_channels": 256, "num_res_blocks": 2}
            | {"channel_mult": (0.5, 1, 1, 2, 2, 4, 4)},
        ),
    ],
)
def test_published_networks_have_their_published_sizes(millions, arguments):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DiffusionUNet(**arguments).parameters())
    assert round(count / 1e6, 1 if millions % 1 else 0) == millions


def test_the_time_embedding_is_cosines_then_sines():
    t, dim = torch.tensor([0.0, 2.5]), 7
    omega = 10000.0 ** (-np.arange(3) / 3)
    expected = [[*np.cos(time * omega), *np.sin(time * omega), 0.0] for time in t.tolist()]
    np.testing.assert_allclose(timestep_embedding(t, dim), expected, atol=1e-6)


def test_an_untrained_network_predicts_zero_and_its_blocks_pass_images_on():
    network = DiffusionUNet(8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions_px=(4,))
    x, t = inputs()
    assert not network(x, t).any()
    h = torch.randn(2, 128, 4, 4)
    residual, attention, _ = network.middle_block
    assert torch.equal(residual(h, torch.randn(2, 256)), h)
    assert torch.equal(attention(h), h)


# Formulas of the layers.


@pytest.mark.parametrize("modulated", [False, True])
def test_normalization_and_its_gradients_are_those_of_the_formula(modulated):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, bias, modulation = draw(2, 6, 3, 4), draw(6), draw(6), draw(2, 12)
    norm = nn.GroupNorm(2, 6).double()

    def ours(x, weight, bias, modulation):
        with torch.no_grad():
            norm.weight.copy_(weight), norm.bias.copy_(bias)
        return normalize_silu(x, norm, modulation if modulated else None)

    groups = x.view(2, 2, -1)
    mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, correction=0)
    y = ((groups - mean) / (variance + norm.eps).sqrt()).view(x.shape) * weight[:, None, None] + bias[:, None, None]
    if modulated:
        y = y * (1 + modulation[:, :6, None, None]) + modulation[:, 6:, None, None]
    expected = y * y.sigmoid()
    result = ours(x, weight, bias, modulation)
    torch.testing.assert_close(result, expected)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * direction).sum(), [x, weight, bias, modulation], allow_unused=True)
    found = torch.autograd.grad((result * direction).sum(), [x, norm.weight, norm.bias, modulation], allow_unused=True)
    for theirs, own in zip(wanted, found, strict=True):
        torch.testing.assert_close(own, theirs)


def test_normalization_keeps_its_input_alone_for_the_backward_pass():
    x = torch.randn(2, 32, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        normalize_silu(x, nn.GroupNorm(32, 32), torch.randn(2, 64, requires_grad=True))
    images = [tensor for tensor in kept if tensor.shape == x.shape]
    assert [tensor.data_ptr() for tensor in images] == [x.data_ptr()]


def test_normalization_of_half_precision_is_computed_in_float32():
    """A mean far from zero: in bfloat16 arithmetic little of the deviations would be left."""
    x = (100 + torch.randn(2, 32, 8, 8)).to(torch.bfloat16)
    norm = nn.GroupNorm(32, 32)
    expected = F.silu(norm(x.float()))
    result = normalize_silu(x, norm)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_is_that_of_the_formula_in_both_arrangements(new_order):
    torch.manual_seed(0)
    block = randomized(AttentionBlock(64, 4, new_order))
    x = torch.randn(2, 64, 3, 5)
    qkv = block.qkv(block.norm(x).flatten(2)).detach()  # (N, 3C, HW)
    if new_order:  # all queries, all keys, all values
        q, k, v = (part.reshape(2, 4, 16, 15) for part in qkv.chunk(3, dim=1))
    else:  # head by head
        q, k, v = qkv.reshape(2, 4, 48, 15).split(16, dim=2)
    shares = (torch.einsum("nhct,nhcs->nhts", q, k) / 16**0.5).softmax(-1)
    mixed = torch.einsum("nhts,nhcs->nhct", shares, v).reshape(2, 64, 15)
    expected = x + block.proj_out(mixed).view(x.shape)
    torch.testing.assert_close(block(x), expected)


def test_attention_of_half_precision_keeps_its_precision():
    q, k, v = torch.randn(3, 2, 4, 16, 8).to(torch.bfloat16)
    result = attend(q, k, v)
    assert result.dtype == torch.bfloat16
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=2**-9)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_a_residual_block_is_that_of_the_formula(resample, scale_shift):
    torch.manual_seed(0)
    block = randomized(ResBlock(32, 64, 16, use_scale_shift_norm=scale_shift, resample=resample))
    x, embedding = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    resized = {
        None: lambda image: image,
        "up": lambda image: image.repeat_interleave(2, 2).repeat_interleave(2, 3),
        "down": lambda image: F.avg_pool2d(image, 2),
    }[resample]
    norm, _, conv = block.in_layers
    h = conv(resized(F.silu(norm(x))))
    e = block.emb_layers[1](F.silu(embedding))[:, :, None, None]
    norm, _, _, conv = block.out_layers
    h = norm(h) * (1 + e[:, :64]) + e[:, 64:] if scale_shift else norm(h + e)
    expected = block.skip_connection(resized(x)) + conv(F.silu(h))
    torch.testing.assert_close(block(x, embedding), expected)


def test_sizes_change_with_and_without_convolutions():
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(Upsample(32, with_conv=False)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(Downsample(32, with_conv=False)(x), F.avg_pool2d(x, 2))
    assert Upsample(32, with_conv=True)(x).shape == (1, 32, 8, 8)
    assert Downsample(32, with_conv=True)(x).shape == (1, 32, 2, 2)
    assert not list(Upsample(32, with_conv=False).parameters())


# The network.


def test_the_condition_adds_the_rows_of_its_classes_to_the_embedding():
    network = tiny(condition_width=4)
    x, t = inputs()
    with torch.no_grad():
        unconditional = network(x, t)
        assert torch.equal(network(x, t, torch.zeros(2, 4)), unconditional)
        result = network(x, t, torch.tensor([[0.0, 1, 0, 0], [0.0, 1, 0, 1]]))
        for i, classes in enumerate(([1], [1, 3])):
            moved = tiny(condition_width=4)
            moved.time_embed[2].bias += network.label_emb.weight[classes].sum(0)
            torch.testing.assert_close(result[i], moved(x, t)[i])
            assert not torch.allclose(result[i], unconditional[i])


def test_what_is_predicted_has_twice_the_channels_if_the_variance_is_learned():
    x, t = inputs()
    assert tiny()(x, t).shape == (2, 5, 8, 8)
    assert tiny(learn_variance=True)(x, t).shape == (2, 10, 8, 8)


def test_heads_on_the_way_up_may_be_others():
    x, t = inputs()
    plain, other = tiny(num_heads=2), tiny(num_heads=2, num_heads_upsample=4)
    assert {block.num_heads for block in plain.modules() if isinstance(block, AttentionBlock)} == {2}
    heads = [block.num_heads for block in other.modules() if isinstance(block, AttentionBlock)]
    assert heads == [2, 2, 4, 4]  # one on the way down, the middle, two on the way up
    by_width = tiny(num_head_channels=16).middle_block[1]
    assert by_width.num_heads == 4
    assert not torch.allclose(plain(x, t), other(x, t))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_number(dropout):
    x, t = inputs()
    results = []
    for checkpointing in (False, True):
        network = tiny(dropout=dropout, gradient_checkpointing=checkpointing)
        torch.manual_seed(7)
        results.append(gradients(network, x, t))
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


def test_gradient_checkpointing_keeps_less():
    def kept(network):
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: numbers.append(v.numel()) or v, lambda v: v):
            network(*inputs(size=16))
        return sum(numbers)

    assert kept(tiny(img_resolution=16, gradient_checkpointing=True, attention_resolutions_px=())) < 0.3 * kept(
        tiny(img_resolution=16, attention_resolutions_px=())
    )


def test_under_autocast_convolutions_run_in_half_precision_and_channels_last():
    network = tiny(learn_variance=True)
    x, t = inputs()
    seen = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, y, name=name: seen.append((name, y)))
    with torch.no_grad():
        expected = network(x, t)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            result = network(x, t)
    assert result.dtype == torch.float32
    assert {y.dtype for name, y in seen if name != "out.2"} == {torch.bfloat16}
    assert all(y.is_contiguous(memory_format=torch.channels_last) for _, y in seen)
    assert float((result - expected).square().mean()) < 1e-4 * float(expected.square().mean())


def test_compilation_finds_one_graph_with_the_same_numbers():
    network = tiny(condition_width=2, learn_variance=True)
    x, t = inputs()
    condition = torch.eye(2)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    results = []
    for run in (network, compiled):
        network.zero_grad()
        y = run(x, t, condition)
        y.square().sum().backward()
        results.append((y.detach(), {name: p.grad.clone() for name, p in network.named_parameters()}))
    (expected, wanted), (result, found) = results
    torch.testing.assert_close(result, expected)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"img_resolution": 240}, r"img_resolution must be a multiple of 32, .* got 240\. Next to it are 224 and 256"),
        ({"img_resolution": 20}, r"got 20\. Next to it is 32\."),
        ({"img_resolution": -64}, r"got -64\. Next to it is 32\."),
        ({"num_heads": -1}, r"^-1 must divide"),
        ({"model_channels": 48}, r"must be multiples of 32; got \[48, 48, 96, 96, 192, 192\]"),
        ({"attention_resolutions_px": (16, 12)}, r"sizes that there are, \[256, 128, 64, 32, 16, 8\]; got \[16, 12\]"),
        ({"num_heads": 3}, r"^3 must divide the channels with attention, \[256\]"),
        ({"num_heads": 4, "num_heads_upsample": 3}, r"^3 and 4 must divide"),
        ({"num_head_channels": 96, "attention_resolutions_px": (64,)}, r"96 must divide .*, \[128, 256\]"),
        ({"model_channels": 48, "num_heads": 5}, r"multiples of 32.*; 5 must divide"),
    ],
)
def test_networks_that_cannot_be_are_refused(arguments, reason):
    with torch.device("meta"), pytest.raises(ValueError, match=reason):
        DiffusionUNet(**({"img_resolution": 256} | arguments))


@pytest.mark.parametrize(
    ("shape", "condition", "reason"),
    [
        ((2, 5, 16, 16), None, r"Images must be \(N, 5, 8, 8\), as configured; got \(2, 5, 16, 16\)"),
        ((2, 3, 8, 8), None, r"got \(2, 3, 8, 8\)"),
        ((2, 5, 8, 8), (2, 3), r"condition must be \(2, 4\), as condition_width says; got \(2, 3\)"),
        ((2, 5, 8, 8), (1, 4), r"got \(1, 4\)"),
    ],
)
def test_inputs_of_another_shape_are_refused(shape, condition, reason):
    network = tiny(condition_width=4)
    with pytest.raises(ValueError, match=reason):
        network(torch.zeros(shape), torch.zeros(2), None if condition is None else torch.zeros(condition))


def test_a_condition_for_a_network_without_conditions_is_refused():
    with pytest.raises(ValueError, match=r"condition must be \(2, 0\)"):
        tiny()(*inputs(), torch.zeros(2, 3))
