"""Checkpoints of guided and improved diffusion: the U-Net from the shapes of a state dict, and what it was made for.

Dhariwal, Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (NeurIPS, arXiv 2105.05233), and Nichol, Dhariwal
2021, "Improved Denoising Diffusion Probabilistic Models" (ICML, arXiv 2102.09672), publish bare state dicts, one of the
trained weights (model*.pt) and one for each moving average of them (ema_*.pt). Neither says what the flags of the
training command were; the shapes tell most of them.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_modules.official_checkpoints import NETWORKS, OfficialCheckpoint, OfficialNetwork, checked
from lightning_modules.pickled_tensors import TensorRecord

FIRST_CONV = "in_layers.2.weight"  # of a residual block
SMALLEST_ATTENTION_PX = 8


@dataclass(frozen=True)
class Flags:
    """Flags of guided-diffusion's training command that the weights do not tell, with its names and defaults.

    Args:
        image_size: height and width of the images. By default attention is taken to end at 8 px, as it does in the
            original unless told otherwise.
        num_heads: attention heads.
        num_head_channels: channels of a head, instead of their number.
        num_heads_upsample: heads on the way up, if they are others.
        use_new_attention_order: how the channels of the attention are arranged.
        diffusion_steps: T, e.g. 4000 for the models of the paper.
        noise_schedule: of the T steps.
        predict_xstart: the network predicts the image, not the noise.
        sigma_small: sample with the small fixed variance, not the large one; without meaning if it is learned.
        rescale_timesteps: the network is told t · 1000 / T instead of t. In improved-diffusion that is the default.
    """

    image_size: int | None = None
    num_heads: int = 4
    num_head_channels: int | None = None
    num_heads_upsample: int | None = None
    use_new_attention_order: bool = False
    diffusion_steps: int = 1000
    noise_schedule: Literal["linear", "cosine"] = "linear"
    predict_xstart: bool = False
    sigma_small: bool = False
    rescale_timesteps: bool = False


@dataclass(frozen=True, kw_only=True)
class DiffusionCheckpoint(OfficialCheckpoint):
    """The network of a checkpoint and what it was trained for.

    Attributes:
        settings: the other arguments of our training rule: objective and sampler, as the original has them.
    """

    settings: dict[str, Any]


def diffusion_checkpoint(content: Any, flags: Flags) -> DiffusionCheckpoint:
    """Convert a state dict.

    Raises:
        ValueError: if anything but tensors is in the file, or they are not those of such a U-Net.
    """
    if not isinstance(content, dict) or any(type(value) is not TensorRecord for value in content.values()):
        raise ValueError("the file of torch.save is not a state dict, tensors by name")
    weights: dict[str, Tensor] = {name: record.read() for name, record in content.items()}
    network = OfficialNetwork(
        f"{NETWORKS}.diffusion_unet.DiffusionUNet",
        unet_arguments(weights, flags),
        weights,
        to_image=r"^out\.2\.(weight|bias)$",
        from_image=r"^input_blocks\.0\.0\.weight$",
    )
    return DiffusionCheckpoint(
        "state dict of guided or improved diffusion",
        "lightning_modules.diffusion.Diffusion",
        {"network": checked(network)},
        settings=_settings(flags, network.arguments["learn_variance"]),
    )


def unet_arguments(weights: dict[str, Tensor], flags: Flags) -> dict[str, Any]:
    """Find the constructor arguments of the U-Net.

    Raises:
        ValueError: if weights that would tell them are missing.
    """
    _, img_channels, *_ = _shape(weights, "input_blocks.0.0.weight", 4)
    out_channels, *_ = _shape(weights, "out.2.weight", 4)
    _, model_channels = _shape(weights, "time_embed.0.weight", 2)
    if out_channels not in (img_channels, 2 * img_channels):
        raise ValueError(
            f"the U-Net makes {out_channels} channels from {img_channels}, but the same number or twice as many "
            "(with the variance) are expected; networks that enlarge images are not supported"
        )
    stages = 0
    while f"output_blocks.{stages}.0.{FIRST_CONV}" in weights:
        stages += 1
    num_res_blocks, resampling = _depth(weights, stages)
    levels = range(1, stages + 1, num_res_blocks + 1)  # the first input block of each
    widths = [_shape(weights, f"input_blocks.{first}.0.{FIRST_CONV}", 4)[0] for first in levels]
    attention = [level for level, first in enumerate(levels) if f"input_blocks.{first}.1.qkv.weight" in weights]
    image_size = flags.image_size
    if image_size is None:
        if not attention:
            raise ValueError(
                "the U-Net has no attention that would tell the size of the images: say --flags.image_size"
            )
        image_size = SMALLEST_ATTENTION_PX << attention[-1]
    embedded, *_ = _shape(weights, "middle_block.0.emb_layers.1.weight", 2)
    return {
        "img_resolution": image_size,
        "img_channels": img_channels,
        "model_channels": model_channels,
        "channel_mult": [_ratio(width, model_channels) for width in widths],
        "num_res_blocks": num_res_blocks,
        "attention_resolutions_px": [image_size >> level for level in attention],
        "num_heads": flags.num_heads,
        "num_head_channels": flags.num_head_channels,
        "num_heads_upsample": flags.num_heads_upsample,
        "use_scale_shift_norm": embedded == 2 * widths[-1],
        "resblock_updown": resampling == "blocks",
        "use_new_attention_order": flags.use_new_attention_order,
        "conv_resample": resampling != "plain",
        "learn_variance": out_channels == 2 * img_channels,
        "condition_width": _shape(weights, "label_emb.weight", 2)[0] if "label_emb.weight" in weights else 0,
    }


def _depth(weights: Container[str], stages: int) -> tuple[int, Literal["convolutions", "blocks", "plain"]]:
    """Count the residual blocks of a level, and say what changes the size between levels."""
    for stage in range(stages):  # a level ends, on the way up, where there is more than a residual block and attention
        for layer in (1, 2):
            if f"output_blocks.{stage}.{layer}.conv.weight" in weights:
                return stage, "convolutions"
            if f"output_blocks.{stage}.{layer}.{FIRST_CONV}" in weights:
                return stage, "blocks"
    for stage in range(1, stages):  # and, on the way down, at a stage without weights
        if f"input_blocks.{stage}.0.{FIRST_CONV}" not in weights:
            return stage - 1, "plain"
    return stages - 1, "convolutions"


def _settings(flags: Flags, learn_variance: bool) -> dict[str, Any]:
    chain = {"steps": flags.diffusion_steps, "schedule": flags.noise_schedule}
    fixed = "small" if flags.sigma_small else "large"
    return {
        "objective": {
            "class_path": "lightning_modules.denoising.ChainObjective",
            "init_args": {
                "chain": {"class_path": "lightning_modules.diffusion_chain.DiffusionChain", "init_args": chain},
                "predict": "x0" if flags.predict_xstart else "eps",
                "learn_variance": learn_variance,
                "rescale_timesteps": flags.rescale_timesteps,
            },
        },
        "sampler": {
            "class_path": "lightning_modules.sampling.Ancestral",
            "init_args": {"steps": flags.diffusion_steps, "variance": "learned" if learn_variance else fixed},
        },
        "clip": True,
    }


def _ratio(width: int, unit: int) -> float:
    return width // unit if width % unit == 0 else width / unit


def _shape(weights: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in weights or weights[name].ndim != dimensions or not weights[name].numel():
        raise ValueError(f"the state dict is not one of guided or improved diffusion: {name} is missing or misshapen")
    return tuple(weights[name].shape)
