"""Network pickles of progressive GAN and StyleGAN 1 (TensorFlow) as our networks.

The originals save a tuple of generator, discriminator and averaged generator.
"""

from __future__ import annotations

import re
from typing import Any, cast

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
        lod=_level_of_detail(average),
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
    try:
        network_class, ours = tensorflow_weights.constructor(function, arguments)
        class_path = f"{network_class.__module__}.{network_class.__name__}"
        # Shapes first: a small file must not be able to ask for a large network.
        needed = sum(weight.numel() for weight in expected_weights(class_path, ours).values())
        if needed > 2 * sum(value.size for value in variables.values()):
            raise ValueError(f"the variables of {function} are far fewer than a {class_path} with {ours} has")
        network = network_class(**ours)
        tensorflow_weights.load(network, variables, arguments.get("fused_scale", "auto"))
    except Exception as error:  # names, shapes and arguments of a file may be anything plain
        raise ValueError(f"the network of {function} does not fit: {error}") from error
    return OfficialNetwork(class_path, ours, network.state_dict())


def _level_of_detail(record: NetworkRecord) -> float:
    lod = record.variables.get("lod")
    if lod is None or lod.shape != ():
        raise ValueError(f"the network of {record.function} has no level of detail")
    return float(lod)
