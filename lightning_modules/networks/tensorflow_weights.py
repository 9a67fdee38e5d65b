"""Progressive GANs and StyleGAN 1 that were trained with TensorFlow, as our networks.

What the originals save is enough: the name of the function that builds a network, its keyword arguments, and the
variables by name. Convolutions are [kh, kw, in, out] and dense layers [in, out] there, (out, in, kh, kw) and (out, in)
here; their names have slashes for our dots.

Two things are stored in two ways there and in one here. The upsampling convolution of the progressive generator is
called "Conv0_up" and is [kh, kw, out, in] if it is fused, else "Conv0"; ours is the latter. And fused upsampling
convolutions, of progressive GAN and StyleGAN 1, apply their kernels mirrored, because they are transposed convolutions;
ours do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lightning_modules.networks.progressive_gan import ProgressiveDiscriminator, ProgressiveGenerator
from lightning_modules.networks.stylegan1 import StyleGAN1Discriminator, StyleGAN1Generator

Function = Literal["G_paper", "D_paper", "G_style", "D_basic"]
Network = ProgressiveGenerator | ProgressiveDiscriminator | StyleGAN1Generator | StyleGAN1Discriminator


@dataclass(frozen=True)
class _Signature:
    """Of a function of the originals.

    Attributes:
        network: What it builds.
        renamed: Its arguments as ours; it ignores those that it does not know, and so do we.
        defaults: Where they are not ours.
        allowed: Values that we have too, of the other arguments that matter.
    """

    network: type[Network]
    renamed: Mapping[str, str]
    defaults: Mapping[str, Any]
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def _renamed(same: str, **renamed: str) -> dict[str, str]:
    return {name: name for name in same.split()} | renamed


_IMAGE = {"num_channels": "img_channels", "resolution": "img_resolution"}
_FMAPS = "fmap_base fmap_max fmap_decay"
_STYLE = {"nonlinearity": ("lrelu",), "use_wscale": (True,), "structure": ("auto", "linear", "recursive")}
_SIGNATURES: dict[Function, _Signature] = {
    "G_paper": _Signature(
        ProgressiveGenerator,
        _renamed(
            f"{_FMAPS} latent_size label_size normalize_latents use_pixelnorm pixelnorm_epsilon use_leakyrelu"
            " use_wscale",
            **_IMAGE,
        ),
        {"num_channels": 1, "resolution": 32},
    ),
    "D_paper": _Signature(
        ProgressiveDiscriminator,
        _renamed(f"{_FMAPS} label_size mbstd_group_size fused_scale use_wscale", **_IMAGE),
        {"num_channels": 1, "resolution": 32},
    ),
    "G_style": _Signature(
        StyleGAN1Generator,
        _renamed(
            f"{_FMAPS} normalize_latents use_noise blur_filter",
            latent_size="z_dim",
            label_size="c_dim",
            dlatent_size="w_dim",
            mapping_layers="mapping_num_layers",
            mapping_fmaps="mapping_width",
            mapping_lrmul="mapping_lr_multiplier",
            **_IMAGE,
        ),
        {"num_channels": 3, "resolution": 1024},
        _STYLE
        | {
            "mapping_nonlinearity": ("lrelu",),
            "use_styles": (True,),
            "const_input_layer": (True,),
            "use_pixel_norm": (False,),
            "use_instance_norm": (True,),
        },
    ),
    "D_basic": _Signature(
        StyleGAN1Discriminator,
        _renamed(f"{_FMAPS} mbstd_group_size mbstd_num_features blur_filter", label_size="c_dim", **_IMAGE),
        {"num_channels": 1, "resolution": 32},
        _STYLE,
    ),
}


def constructor(function: Function, arguments: Mapping[str, Any]) -> tuple[type[Network], dict[str, Any]]:
    """Our class, and its arguments, for a function of the originals and its keyword arguments.

    Args:
        function: 'G_paper' and 'D_paper' of progressive GAN, 'G_style' and 'D_basic' of StyleGAN 1.
        arguments: Keyword arguments of it; for G_style those of its mapping and synthesis networks. Those that the
            original ignores are ignored.

    Raises:
        ValueError: If there is no such function, or an argument has a value that our network does not have.
    """
    if function not in _SIGNATURES:
        raise ValueError(f"A TensorFlow network must be one of {', '.join(_SIGNATURES)}; got {function}.")
    signature = _SIGNATURES[function]
    wrong = {k: arguments[k] for k, values in signature.allowed.items() if arguments.get(k, values[0]) not in values}
    if wrong:
        known = {k: signature.allowed[k] for k in wrong}
        raise ValueError(f"{function} with {wrong} is not supported; supported is {known}.")
    given = {**signature.defaults, **arguments}
    if function == "G_paper" and given.get("latent_size") is None:
        given["latent_size"] = min(given.get("fmap_base", 8192), given.get("fmap_max", 512))
    return signature.network, {signature.renamed[name]: given[name] for name in given if name in signature.renamed}


def build(function: Function, arguments: Mapping[str, Any]) -> Network:
    """Our network for a function of the originals and its keyword arguments; see :func:`constructor`."""
    network, ours = constructor(function, arguments)
    return network(**ours)


def load(network: Network, variables: Mapping[str, Any], fused_scale: bool | Literal["auto"] = "auto") -> None:
    """Copy variables of the originals into a network that was built for them.

    Args:
        network: See :func:`build`.
        variables: Arrays by name, e.g. '8x8/Conv1/weight'; of G_style also those of its sub-networks, as
            'G_mapping/Dense0/weight' and 'G_synthesis/4x4/Const/const'.
        fused_scale: The argument of G_style's synthesis network; 'auto' is its default.

    Raises:
        ValueError: If the variables are not those of the network.
    """
    state = {}
    for name, value in variables.items():
        if name.split("/")[-1] == "lod":  # an attribute here
            continue
        tensor = torch.asarray(value, dtype=torch.float32, copy=True)
        is_weight, is_up = name.endswith("/weight"), name.endswith("Conv0_up/weight")
        if is_up and isinstance(network, ProgressiveGenerator):
            tensor = tensor.permute(2, 3, 0, 1).flip((2, 3))
        elif is_weight and tensor.ndim == 4:
            tensor = tensor.permute(3, 2, 0, 1)
            if is_up and (_is_fused(name) if fused_scale == "auto" else fused_scale):
                tensor = tensor.flip((2, 3))
        elif is_weight and tensor.ndim == 2:
            tensor = tensor.t()
        state[parameter_name(network, name)] = tensor
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"The variables are not those of this {type(network).__name__}: {error}") from error


def parameter_name(network: Network, name: str) -> str:
    """Our name of a variable."""
    if isinstance(network, ProgressiveGenerator):
        name = name.replace("Conv0_up", "Conv0")
    if isinstance(network, StyleGAN1Generator):
        name = name.replace("G_mapping", "mapping").replace("G_synthesis", "synthesis")
        name = name.replace("dlatent_avg", "mapping/w_avg")
    return name.replace("/", ".")


def _is_fused(name: str) -> bool:
    """Whether 'auto' fuses the upsampling layer of that name, '.../RxR/Conv0_up/weight': from 128 px on."""
    return int(name.split("/")[-3].split("x")[0]) >= 128
