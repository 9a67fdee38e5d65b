"""The diffusion U-Net and its time embedding."""

import json
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from lightning_modules.networks.diffusion_layers import timestep_embedding
from lightning_modules.networks.diffusion_unet import DiffusionUNet

Arrays = dict[str, npt.NDArray[Any]]

SAME = (
    *("model_channels", "channel_mult", "num_res_blocks", "num_heads", "use_scale_shift_norm", "resblock_updown"),
    *("use_new_attention_order", "conv_resample", "dropout"),
)
UNSET = ("num_head_channels", "num_heads_upsample")  # if -1


def build(config: dict[str, Any], image_size: int) -> DiffusionUNet:
    """Our network of the original's arguments."""
    arguments = {name: config[name] for name in SAME if name in config}
    arguments |= {name: config[name] for name in UNSET if config.get(name, -1) != -1}
    known = {*SAME, *UNSET, "image_size", "in_channels", "out_channels", "attention_resolutions", "num_classes"}
    assert set(config) <= known, set(config) - known
    return DiffusionUNet(
        img_resolution=image_size,
        img_channels=config["in_channels"],
        attention_resolutions_px=[image_size // factor for factor in config["attention_resolutions"]],
        learn_variance=config["out_channels"] == 2 * config["in_channels"],
        condition_width=config.get("num_classes") or 0,
        **arguments,
    ).eval()


def weights_of(ref: Arrays) -> dict[str, Tensor]:
    return {k.removeprefix("param/"): torch.tensor(v).float() for k, v in ref.items() if k.startswith("param/")}


def unet(stem: str, ref: Arrays) -> dict[str, Any]:
    x, t = torch.tensor(ref["x"]), torch.tensor(ref["t"])
    network = build(json.loads(str(ref["config"])), x.shape[-1])
    network.load_state_dict(weights_of(ref))
    with torch.no_grad():
        return {"y": network(x, t)}


def embedding(stem: str, ref: Arrays) -> dict[str, Any]:
    t = torch.tensor(ref["timesteps"])
    return {key: timestep_embedding(t, int(key.removeprefix("dim"))) for key in ref if key.startswith("dim")}


FAMILIES = {"unet_tiny_": unet, "timestep_embedding": embedding}
TOLERANCES = {"unet_tiny_": (0.0, 1e-4), "timestep_embedding": (0.0, 1e-4)}  # float32 angles of up to 1000
INPUTS = {"unet_tiny_": ("config", "x", "t", "param/"), "timestep_embedding": ("timesteps",)}
