"""Network pickles of progressive GAN and StyleGAN 1 (TensorFlow) as our networks.

The originals save a tuple of generator, discriminator and averaged generator.
"""

from __future__ import annotations

import re
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from lightning_modules.networks import tensorflow_weights
from lightning_modules.official_checkpoints import OfficialCheckpoint, OfficialNetwork, expected_weights, plain
from lightning_modules.pickled_networks import NetworkRecord

MAPPING_LAYER = re.compile(r"G_mapping/Dense\d+/weight")
KINDS = {
    ("G_paper", "D_paper"): ("progressive GAN", "lightning_modules.progressive_gan.ProgressiveGAN"),
    ("G_style", "D_basic"): ("StyleGAN 1", "lightning_modules.stylegan1.StyleGAN1"),
}


def tensorflow_checkpoint(
    generator: NetworkRecord, discriminator: NetworkRecord, average: NetworkRecord
) -> OfficialCheckpoint:
    """Convert the networks of a pickle.

    Raises:
        ValueError: if they are of another model, or do not fit ours.
    """
    functions = (generator.function, discriminator.function)
    if functions not in KINDS or average.function != generator.function:
        raise ValueError(
            f"the networks are built by {functions[0]!a:.40}, {functions[1]!a:.40} and {average.function!a:.40}, but "
            "only those of progressive GAN (G_paper, D_paper) and StyleGAN 1 (G_style, D_basic) are supported"
        )
    kind, model = KINDS[functions]
    networks = {"generator": generator, "discriminator": discriminator, "ema_network": average}
    return OfficialCheckpoint(
        f"network pickle of {kind} (TensorFlow)",
        model,
        {name: convert(record) for name, record in networks.items()},
        lod=float(average.variables.get("lod", np.zeros(()))),
    )


def convert(record: NetworkRecord) -> OfficialNetwork:
    """Convert one network; that of StyleGAN 1 has a mapping and a synthesis network as components.

    Raises:
        ValueError: if arguments or variables do not fit our network.
    """
    function = cast(tensorflow_weights.Function, record.function)
    arguments: dict[str, Any] = {}
    variables: dict[str, npt.NDArray[Any]] = dict(record.variables)
    for name in ("mapping", "synthesis") if function == "G_style" else ():
        component = record.components.get(name)
        if type(component) is not NetworkRecord:
            raise ValueError(f"the network of {function} has no component {name}")
        arguments |= component.arguments
        variables |= {f"G_{name}/{variable}": value for variable, value in component.variables.items()}
    arguments = {name: plain(value, name) for name, value in (arguments | record.arguments).items()}
    if function == "G_style":
        arguments["mapping_layers"] = sum(bool(MAPPING_LAYER.fullmatch(name)) for name in variables)
    if function == "G_paper":  # None there stands for the width of the first layer
        first = variables.get("4x4/Dense/weight", np.empty(0))
        arguments["latent_size"] = len(first) - arguments.get("label_size", 0)
    class_path, ours = our_arguments(function, arguments)
    # Built as shapes first: a small file must not be able to ask for a large network.
    needed = sum(weight.numel() for weight in expected_weights(class_path, ours).values())
    if needed > 2 * sum(value.size for value in variables.values()):
        raise ValueError(f"the variables of {function} are far fewer than a {class_path} with {ours} has")
    network = tensorflow_weights.build(function, arguments)
    tensorflow_weights.load(network, variables, arguments.get("fused_scale", "auto"))
    return OfficialNetwork(class_path, ours, network.state_dict())


def our_arguments(function: tensorflow_weights.Function, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Give the path and the constructor arguments of our class for a build function with these arguments."""
    signature = tensorflow_weights._SIGNATURES[function]
    given = {**signature.defaults, **arguments}
    ours = {signature.renamed[name]: value for name, value in given.items() if name in signature.renamed}
    return f"{signature.network.__module__}.{signature.network.__name__}", ours
