"""From the records of official PyTorch pickles to our networks: settings are found, what does not fit is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_modules.networks.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from lightning_modules.networks.stylegan3 import StyleGAN3Generator
from lightning_modules.official_checkpoints import (
    checked,
    stylegan2_discriminator,
    stylegan2_generator,
    stylegan3_generator,
    torch_checkpoint,
)
from lightning_modules.pickled_networks import ModuleRecord, read_network_pickle
from lightning_modules.pickled_tensors import Storage, TensorRecord

OFFICIAL = Path(__file__).parent / "reference" / "official_pickles"


def tensor_record(tensor):
    storage = Storage(tensor.dtype, tensor.numel())
    storage.fill(tensor.detach().contiguous().numpy().tobytes())
    return TensorRecord(storage, 0, tuple(tensor.shape), tuple(tensor.stride()))


def module_record(module, settings, path=""):
    """What the official programs would store of our module; `settings` are attributes by the path of the module."""
    tensors = {
        group: {name: tensor_record(value) for name, value in getattr(module, group).items() if value is not None}
        for group in ("_parameters", "_buffers")
    }
    children = {
        name: module_record(child, settings, f"{path}.{name}".strip("."))
        for name, child in module.named_children()
        if not isinstance(child, nn.Identity)
    }
    leaf = path.rsplit(".", 1)[-1]
    own = {"_init_kwargs": {}, "activation": "lrelu", "bias_gain": 0.01, "conv_clamp": 256, "use_noise": True}
    own |= settings.get(leaf, {}) | settings.get(path, {})
    return ModuleRecord(type(module).__name__, {**tensors, "_modules": children, **own})


def image_settings(**recorded):
    return {
        "img_resolution": 16,
        "img_channels": 5,
        "_init_kwargs": {"channel_base": 128, "channel_max": 8, **recorded},
    }


def built(official, expected):
    """Build our network from what was found, and see that it is the one that was stored."""
    network = {"StyleGAN2Generator": StyleGAN2Generator, "StyleGAN2Discriminator": StyleGAN2Discriminator}.get(
        official.class_path.rpartition(".")[2], StyleGAN3Generator
    )(**official.arguments)
    network.load_state_dict(checked(official).weights)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    return network.eval()


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("conv_clamp", [None, 256])
@torch.no_grad()
def test_generators_of_all_architectures_with_and_without_classes(architecture, c_dim, conv_clamp):
    ours = StyleGAN2Generator(
        24, 20, 16, 5, 128, 8, 3, 0.01, c_dim=c_dim, architecture=architecture, conv_clamp=conv_clamp
    ).eval()
    settings = {
        "": {"z_dim": 24, "w_dim": 20, "c_dim": c_dim},
        "synthesis": image_settings(),
        "synthesis.b16": {"architecture": architecture},
        "synthesis.b16.conv1": {"conv_clamp": conv_clamp},
    }
    network = built(stylegan2_generator(module_record(ours, settings)), ours)
    z, c = torch.randn(4, 24), torch.eye(4)[:, :c_dim] if c_dim else None
    assert torch.equal(network(z, c), ours(z, c))


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("mbstd", [(4, 1), (None, 2), None])
@torch.no_grad()
def test_discriminators_of_all_architectures_with_and_without_classes(architecture, c_dim, mbstd):
    group, channels = mbstd or (4, 0)
    ours = StyleGAN2Discriminator(
        16,
        5,
        128,
        8,
        256,
        group,
        channels,
        (1, 2, 1),
        c_dim,
        architecture,
        cmap_dim=6 if c_dim else None,
        mapping_num_layers=2,
    ).eval()
    settings = {
        "": {"c_dim": c_dim, **image_settings()},
        "b16": {"architecture": architecture, "_init_kwargs": {"resample_filter": [1, 2, 1]}},
        "b4": {"cmap_dim": 6 if c_dim else 0},
    }
    record = module_record(ours, settings)
    if mbstd:
        deviation = ModuleRecord("MinibatchStdLayer", {"group_size": group, "num_channels": channels})
        deviation.attributes.update(_parameters={}, _buffers={}, _modules={})
        record.child("b4").attributes["_modules"]["mbstd"] = deviation
    network = built(stylegan2_discriminator(record), ours)
    images, c = torch.randn(4, 5, 16, 16), torch.eye(4)[:, :c_dim] if c_dim else None
    assert torch.equal(network(images, c), ours(images, c))


@pytest.mark.parametrize("radial", [False, True], ids=["T", "R"])
@torch.no_grad()
def test_generators_of_stylegan3_t_and_r(radial):
    kernel = 1 if radial else 3
    ours = StyleGAN3Generator(
        z_dim=24,
        w_dim=20,
        img_resolution=16,
        img_channels=5,
        c_dim=3,
        mapping_num_layers=2,
        channel_base=128,
        channel_max=8,
        num_layers=6,
        margin_size=4,
        conv_kernel=kernel,
        use_radial_filters=radial,
        magnitude_ema_beta=0.99,
    ).eval()
    layers = {name: {"conv_kernel": kernel, "magnitude_ema_beta": 0.99} for name in ours.synthesis.layer_names}
    settings = {
        "": {"z_dim": 24, "w_dim": 20, "c_dim": 3},
        "synthesis": {
            **image_settings(use_radial_filters=radial),
            "num_critical": 2,
            "margin_size": 4,
            "output_scale": 0.25,
        },
        **layers,
    }
    official = stylegan3_generator(module_record(ours, settings))
    network = built(official, ours)
    z, c = torch.randn(2, 24), torch.eye(3)[:2]
    assert torch.equal(network(z, c), ours(z, c))
    assert official.to_image.startswith(r"synthesis\.L6_")


@pytest.mark.parametrize(
    ("module", "name", "value", "reason"),
    [
        (["synthesis", "b32"], "architecture", "resnet", r"synthesis\.b8\.skip\.weight is missing"),
        (["synthesis"], "img_channels", 3, r"torgb\.weight is \(5, 12, 1, 1\) instead of \(3, 12, 1, 1\)"),
        (["synthesis", "b32", "conv1"], "activation", "swish", "activation 'swish' is not supported"),
        (["synthesis"], "img_resolution", 2**40, "'img_resolution' is out of range"),
        (["synthesis"], "img_resolution", 64, "no 'b64'"),
        (["synthesis"], "_init_kwargs", {"channel_base": -1}, "no .*StyleGAN2Generator can be built|instead of"),
        ([], "z_dim", float("nan"), "'z_dim' is out of range"),
        (["synthesis", "b32"], "architecture", "${oc.env:HOME}", "'architecture' is not a single word"),
        ([], "w_dim", {"a": 1}, "'w_dim' is neither a number"),
        ([], "_modules", {}, "no 'synthesis'"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(module, name, value, reason):
    content = read_network_pickle((OFFICIAL / "sg2ada_5ch_32.nosrc.pkl").read_bytes())
    content["G_ema"].child(*module).attributes[name] = value
    with pytest.raises(ValueError, match=reason):
        torch_checkpoint(content)


def test_weights_that_are_missing_are_named():
    content = read_network_pickle((OFFICIAL / "sg2ada_5ch_32.nosrc.pkl").read_bytes())
    del content["D"].child("b4", "out").attributes["_parameters"]["bias"]
    with pytest.raises(ValueError, match=r"do not fit a .*StyleGAN2Discriminator .*: b4\.out\.bias is missing$"):
        torch_checkpoint(content)


def test_augmentation_of_impossible_strength_is_refused():
    content = read_network_pickle((OFFICIAL / "sg2ada_5ch_32.nosrc.pkl").read_bytes())
    content["augment_pipe"].attributes["_buffers"]["p"] = tensor_record(torch.tensor(1.5))
    with pytest.raises(ValueError, match="augment_pipe has no p between 0 and 1"):
        torch_checkpoint(content)


def test_a_checkpoint_without_augmentation_has_no_strength_of_it():
    content = read_network_pickle((OFFICIAL / "sg2ada_5ch_32.nosrc.pkl").read_bytes())
    content["augment_pipe"] = None
    assert torch_checkpoint(content).augment_p is None


def test_modules_that_contain_themselves_are_refused():
    module = ModuleRecord("Generator", {"_parameters": {}, "_buffers": {}})
    module.attributes["_modules"] = {"again": module}
    with pytest.raises(ValueError, match=r"'again\.' is not a module, occurs twice, or lies too deep"):
        module.tensors()


def test_a_chain_of_modules_is_followed_to_a_bounded_depth():
    module = ModuleRecord("Block", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    for _ in range(10_000):
        module = ModuleRecord("Block", {"_parameters": {}, "_buffers": {}, "_modules": {"inner": module}})
    with pytest.raises(ValueError, match="lies too deep"):
        module.tensors()
