"""UPerNet with a Swin transformer: the second segmenter of Usman Akbar et al. 2024 (Scientific Data 11:259).

Liu et al. 2021, "Swin Transformer" (ICCV, arXiv 2103.14030); Xiao et al. 2018, "Unified Perceptual Parsing" (ECCV,
arXiv 1807.10221). The layers are those of `transformers`, started at random; dropout before the classifiers and an
auxiliary head on the third stage as in the recipe of mmsegmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation


class SwinUPerNet(nn.Module):
    """Swin transformer, UPerNet head and, in training, an auxiliary fully convolutional head. The defaults are Swin-B.

    Slices of any size are taken: patches and windows that do not fill the slice are padded.

    Args:
        in_channels: modalities.
        out_channels: logits per pixel.
        embed_dim: features of the first stage; every other has twice as many as the one before it.
        depths: blocks of the four stages.
        num_heads: attention heads of the four stages.
        window_size: side of the windows of attention, in patches.
        patch_size: side of a patch, in pixels.
        drop_path_rate: chance of the last block to be skipped in training; rises linearly from 0 at the first.
        head_channels: features of the UPerNet head.
        auxiliary_channels: features of the auxiliary head.
        head_dropout: share of the features before the classifiers that are dropped in training.

    Raises:
        ValueError: if the numbers of stages differ, or attention heads do not divide the features.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 7,
        patch_size: int = 4,
        drop_path_rate: float = 0.3,
        head_channels: int = 512,
        auxiliary_channels: int = 256,
        head_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        features = [embed_dim * 2**stage for stage in range(len(depths))]
        if len(depths) != 4 or len(num_heads) != 4 or any(f % n for f, n in zip(features, num_heads, strict=True)):
            raise ValueError(
                "SwinUPerNet: expected depths and num_heads of four stages, with heads that divide the features, but "
                f"got depths {list(depths)} and num_heads {list(num_heads)} for the features {features}."
            )
        swin: dict[str, Any] = {
            "num_channels": in_channels,
            "embed_dim": embed_dim,
            "depths": list(depths),
            "num_heads": list(num_heads),
            "window_size": window_size,
            "patch_size": patch_size,
            "drop_path_rate": drop_path_rate,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        }
        heads: dict[str, Any] = {
            "num_labels": out_channels,
            "hidden_size": head_channels,
            "auxiliary_channels": auxiliary_channels,
        }
        model: Any = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=SwinConfig(**swin), **heads))
        self.backbone, self.head, self.auxiliary_head = model.backbone, model.decode_head, model.auxiliary_head
        # Every stage has a normalization of its own, and no gradient ever comes to the one of the classifier of Swin.
        self.backbone.swin.layernorm = nn.Identity()
        for head in (self.head, self.auxiliary_head):
            head.classifier = nn.Sequential(nn.Dropout2d(head_dropout), head.classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Give logits for every pixel.

        Args:
            images: (N, in_channels, H, W).

        Returns:
            (N, out_channels, H, W); in training (N, 2, out_channels, H, W), the second of the auxiliary head.
        """
        features = self.backbone(images).feature_maps  # (N, embed_dim · 2^k, H / (4 · 2^k), W / (4 · 2^k)), k = 0..3
        heads = [self.head, self.auxiliary_head] if self.training else [self.head]
        size = images.shape[2:]
        logits = [F.interpolate(head(features), size, mode="bilinear", align_corners=False) for head in heads]
        return torch.stack(logits, dim=1) if self.training else logits[0]
