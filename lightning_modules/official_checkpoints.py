"""Official checkpoints of StyleGAN 2 and 3 as our networks: constructor arguments, parameters and buffers.

StyleGAN 2 ADA and StyleGAN 3 (PyTorch) write dicts with G, D, G_ema and augment_pipe. Their modules carry the settings
as attributes; these are read before the recorded constructor calls, whose defaults differ between the two programs. The
names of parameters and buffers are ours already.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.pickled_networks import ModuleRecord, dict_of

NETWORKS = "lightning_modules.networks"
LARGEST_NUMBER = 2**20
LONGEST_LIST = 64
SHOWN = 3
FREE = ("num_half_res", "half_dtype", "freeze_layers", "dropout", "gradient_checkpointing")
"""Arguments that say how a network is computed and trained, not what it is: left to the configuration."""
PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class OfficialNetwork:
    """A network of a checkpoint.

    Attributes:
        class_path: our class; None where we have none yet.
        arguments: its constructor arguments, plain values, `img_channels` among them.
        weights: parameters and buffers by our names.
        to_image: matches the names of weights whose first axis is the channels of the image.
        from_image: matches the names of weights whose second axis is the channels of the image.
    """

    class_path: str | None
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    to_image: str = r"(^|\.)(torgb|ToRGB_lod\d+)\.(weight|bias)"
    from_image: str = r"(^|\.)(fromrgb|FromRGB_lod\d+)\.weight"

    def init_args(self) -> dict[str, Any]:
        """All arguments that make the network what it is, so that no other configuration can shine through."""
        if self.class_path is None:
            return self.arguments
        parameters = inspect.signature(our_class(self.class_path)).parameters.values()
        values = {p.name: self.arguments.get(p.name, p.default) for p in parameters if p.name not in FREE}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The networks of a checkpoint.

    Attributes:
        kind: what the file is, in words.
        model: class path of our training rule; None where we have none yet.
        networks: "generator", "discriminator" and "ema_network", the moving average of the generator.
        augment_p: strength that adaptive augmentation had reached; None without it.
        lod: level of detail that growing had reached; None for a model that does not grow.
    """

    kind: str
    model: str | None
    networks: dict[str, OfficialNetwork]
    augment_p: float | None = None
    lod: float | None = None


def torch_checkpoint(content: dict[str, Any]) -> OfficialCheckpoint:
    """Convert a network pickle of StyleGAN 2 ADA or StyleGAN 3.

    Raises:
        ValueError: if networks are missing or do not fit ours.
    """
    ema = _module(content, "G_ema")
    number = 2 if ema.child("synthesis", "input") is None else 3
    convert = stylegan2_generator if number == 2 else stylegan3_generator
    networks = {
        "generator": convert(_module(content, "G")),
        "discriminator": stylegan2_discriminator(_module(content, "D")),
        "ema_network": convert(ema),
    }
    return OfficialCheckpoint(
        f"network pickle of StyleGAN {number} (PyTorch)",
        f"lightning_modules.stylegan.StyleGAN{number}",
        {name: checked(network) for name, network in networks.items()},
        None if content.get("augment_pipe") is None else _augment_p(_module(content, "augment_pipe")),
    )


def stylegan2_generator(module: ModuleRecord) -> OfficialNetwork:
    """Convert a generator of StyleGAN 2."""
    synthesis = _child(module, "synthesis")
    block = _child(synthesis, f"b{_setting(synthesis, 'img_resolution')}")
    layer = _child(block, "conv1")
    arguments = {
        **_latent_arguments(module),
        **_image_arguments(synthesis),
        "use_noise": _setting(layer, "use_noise"),
        "conv_clamp": _setting(layer, "conv_clamp"),
        "resample_filter": _recorded(block, "resample_filter", [1, 3, 3, 1]),
        "architecture": _setting(block, "architecture"),
    }
    _expect_leaky_relu(layer)
    return OfficialNetwork(f"{NETWORKS}.stylegan2.StyleGAN2Generator", arguments, module.tensors())


def stylegan3_generator(module: ModuleRecord) -> OfficialNetwork:
    """Convert a generator of StyleGAN 3, T or R."""
    synthesis = _child(module, "synthesis")
    arguments = {
        **_latent_arguments(module),
        **_image_arguments(synthesis),
        "num_layers": len(_children(synthesis, "L")) - 1,
    }
    for name in ("num_critical", "margin_size", "output_scale"):
        arguments[name] = _setting(synthesis, name)
    first = next(iter(_children(synthesis, "L").values()), synthesis)
    for name in ("conv_kernel", "conv_clamp", "magnitude_ema_beta"):
        arguments[name] = _setting(first, name)
    for name, default in (
        ("first_cutoff", 2),
        ("first_stopband", 2**2.1),
        ("last_stopband_rel", 2**0.3),
        ("filter_size", 6),
        ("lrelu_upsampling", 2),
        ("use_radial_filters", False),
    ):
        arguments[name] = _recorded(synthesis, name, default)
    to_image = rf"synthesis\.L{arguments['num_layers']}_[^.]*\.(weight|bias)"  # the last layer
    return OfficialNetwork(f"{NETWORKS}.stylegan3.StyleGAN3Generator", arguments, module.tensors(), to_image)


def stylegan2_discriminator(module: ModuleRecord) -> OfficialNetwork:
    """Convert a discriminator of StyleGAN 2, which StyleGAN 3 has too."""
    block, epilogue = _child(module, f"b{_setting(module, 'img_resolution')}"), _child(module, "b4")
    layer = _child(block, "conv0")
    arguments = {
        **_image_arguments(module),
        "c_dim": _setting(module, "c_dim"),
        "conv_clamp": _setting(layer, "conv_clamp"),
        "resample_filter": _recorded(block, "resample_filter", [1, 3, 3, 1]),
        "architecture": _setting(block, "architecture"),
    }
    _expect_leaky_relu(layer)
    deviation, mapping = epilogue.child("mbstd"), module.child("mapping")
    if deviation is None:
        arguments["mbstd_num_channels"] = 0
    else:
        arguments["mbstd_group_size"] = _setting(deviation, "group_size")
        arguments["mbstd_num_channels"] = _setting(deviation, "num_channels")
    if mapping is not None:
        arguments |= {"cmap_dim": _setting(epilogue, "cmap_dim"), **_mapping_arguments(mapping)}
    return OfficialNetwork(f"{NETWORKS}.stylegan2.StyleGAN2Discriminator", arguments, module.tensors())


def _augment_p(module: ModuleRecord) -> float:
    p = module.tensors().get("p")
    if p is None or p.shape != () or not 0 <= p <= 1:
        raise ValueError("augment_pipe has no p between 0 and 1")
    return float(p)


def _latent_arguments(module: ModuleRecord) -> dict[str, Any]:
    settings = {name: _setting(module, name) for name in ("z_dim", "c_dim", "w_dim")}
    return settings | _mapping_arguments(_child(module, "mapping"))


def _mapping_arguments(mapping: ModuleRecord) -> dict[str, Any]:
    layers = _children(mapping, "fc")
    arguments: dict[str, Any] = {"mapping_num_layers": len(layers)}
    for layer in layers.values():
        _expect_leaky_relu(layer)
        arguments["mapping_lr_multiplier"] = _setting(layer, "bias_gain")
    return arguments


def _image_arguments(module: ModuleRecord) -> dict[str, Any]:
    return {
        "img_resolution": _setting(module, "img_resolution"),
        "img_channels": _setting(module, "img_channels"),
        "channel_base": _recorded(module, "channel_base", 32768),
        "channel_max": _recorded(module, "channel_max", 512),
    }


def _module(content: dict[str, Any], name: str) -> ModuleRecord:
    module = content.get(name)
    if type(module) is not ModuleRecord:
        raise ValueError(f"{name} is not a network of StyleGAN 2 ADA or StyleGAN 3")
    return module


def _child(module: ModuleRecord, name: str) -> ModuleRecord:
    child = module.child(name)
    if child is None:
        raise ValueError(f"a {module.class_name!a:.40} has no {name!a:.40}")
    return child


def _children(module: ModuleRecord, prefix: str) -> dict[str, ModuleRecord]:
    names = [name for name in dict_of(module.attributes.get("_modules"), "_modules") if name.startswith(prefix)]
    return {name: _child(module, name) for name in names}


def _setting(module: ModuleRecord, name: str) -> Any:
    """Read an attribute."""
    if name not in module.attributes:
        raise ValueError(f"a {module.class_name!a:.40} has no setting {name}")
    return plain(module.attributes[name], name)


def _recorded(module: ModuleRecord, name: str, default: Any) -> Any:
    """Read an argument of the recorded constructor call."""
    return plain(dict_of(module.attributes.get("_init_kwargs"), "_init_kwargs").get(name, default), name)


def plain(value: Any, name: str) -> Any:
    """Let numbers, words and short lists of them pass, if they are not so large that a network would never be built."""
    items = value if type(value) is list else [value]
    if len(items) > LONGEST_LIST or any(type(item) not in PLAIN for item in items):
        raise ValueError(f"the setting {name!a:.40} is neither a number, a word, nor a short list of them")
    if any(type(item) is str and not item.isidentifier() for item in items):  # configurations would resolve "${...}"
        raise ValueError(f"the setting {name!a:.40} is not a single word")
    if any(type(item) in (int, float) and not abs(item) <= LARGEST_NUMBER for item in items):
        raise ValueError(f"the setting {name!a:.40} is out of range")
    return value


def _expect_leaky_relu(layer: ModuleRecord) -> None:
    if _setting(layer, "activation") != "lrelu":
        raise ValueError(f"the activation {layer.attributes['activation']!a:.40} is not supported, only lrelu is")


def checked(network: OfficialNetwork) -> OfficialNetwork:
    """Compare the weights with what our network of these arguments expects, without allocating it.

    Returns:
        The same network, weights in the precision of ours.

    Raises:
        ValueError: if arguments are not possible, or weights are missing, unknown or of another shape.
    """
    expected, weights = expected_weights(network.class_path or "", network.arguments), network.weights
    wrong = [f"{key} is missing" for key in expected if key not in weights]
    wrong += [f"{key!a:.80} is unknown" for key in weights if key not in expected]
    wrong += [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(weight.shape)}"
        for key, weight in expected.items()
        if key in weights and weights[key].shape != weight.shape
    ]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"the weights do not fit a {network.class_path} with {network.arguments}: {'; '.join(wrong[:SHOWN])}{more}"
        )
    return replace(network, weights={key: weight.to(expected[key].dtype) for key, weight in weights.items()})


def expected_weights(class_path: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Give the parameters and buffers that our network with these arguments has: shapes alone, nothing is allocated.

    Raises:
        ValueError: if an argument is impossible.
    """
    try:
        with torch.device("meta"):
            state: dict[str, Tensor] = our_class(class_path)(**arguments).state_dict()
    except Exception as error:  # constructors trust their arguments; those of a file may be anything plain
        raise ValueError(f"no {class_path} can be built with {arguments}: {error}") from error
    return state


def our_class(class_path: str) -> type[nn.Module]:
    """Find one of our networks."""
    module, _, name = class_path.rpartition(".")
    network: type[nn.Module] = getattr(importlib.import_module(module), name)
    return network
