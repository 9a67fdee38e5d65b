"""Checkpoints of guided and improved diffusion: what the shapes of a state dict tell of its U-Net.

Dhariwal, Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (NeurIPS, arXiv 2105.05233), and Nichol, Dhariwal
2021, "Improved Denoising Diffusion Probabilistic Models" (ICML, arXiv 2102.09672), publish bare state dicts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_modules.official_checkpoints import OfficialCheckpoint, OfficialNetwork
from lightning_modules.pickled_tensors import TensorRecord


def diffusion_checkpoint(content: Any) -> OfficialCheckpoint:
    """Read a state dict of a U-Net.

    The arguments of the network are img_channels, model_channels, learn_sigma (the variance is predicted too) and
    num_classes (0 without labels).

    Raises:
        ValueError: if anything but tensors is in the file, or they are not those of such a U-Net.
    """
    if not isinstance(content, dict) or any(type(value) is not TensorRecord for value in content.values()):
        raise ValueError("the file of torch.save is not a state dict, tensors by name")
    weights: dict[str, Tensor] = {name: record.read() for name, record in content.items()}
    shapes = [
        _shape(weights, name, dimensions)
        for name, dimensions in (("input_blocks.0.0.weight", 4), ("out.2.weight", 4), ("time_embed.0.weight", 2))
    ]
    (_, img_channels, *_), (out_channels, *_), (_, model_channels) = shapes
    if out_channels not in (img_channels, 2 * img_channels):
        raise ValueError(
            f"the U-Net makes {out_channels} channels from {img_channels}, but the same number or twice as many "
            "(with the variance) are expected; networks that enlarge images are not supported"
        )
    arguments = {
        "img_channels": img_channels,
        "model_channels": model_channels,
        "learn_sigma": out_channels == 2 * img_channels,
        "num_classes": weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else 0,
    }
    network = OfficialNetwork(
        None, arguments, weights, to_image=r"^out\.2\.(weight|bias)$", from_image=r"^input_blocks\.0\.0\.weight$"
    )
    return OfficialCheckpoint("state dict of guided or improved diffusion", None, {"network": network})


def _shape(weights: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in weights or weights[name].ndim != dimensions:
        raise ValueError(f"the state dict is not one of guided or improved diffusion: {name} is missing or misshapen")
    return tuple(weights[name].shape)
