"""The U-Net of improved and guided diffusion.

Nichol, Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (ICML, arXiv 2102.09672), and Dhariwal,
Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (NeurIPS, arXiv 2105.05233). Parameters have the names of
the published checkpoints and start as published. Nothing but dropout is random in a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.networks.diffusion_layers import (
    GROUPS,
    AttentionBlock,
    Downsample,
    ResBlock,
    Upsample,
    normalize_silu,
    timestep_embedding,
    zeroed,
)
from lightning_modules.networks.layers import fast_layout


class Stage(nn.ModuleList):
    """Layers, one after the other."""

    def forward(self, embedding: Tensor, *inputs: Tensor) -> Tensor:
        """Run the layers on (N, C_i, H, W), concatenated if there are several; embedding (N, embedding_width)."""
        h = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
        for layer in self:
            h = layer(h, embedding) if isinstance(layer, ResBlock) else layer(h)
        return h


class DiffusionUNet(nn.Module):
    """Noisy images, a time and perhaps a condition -> what the objective has it predict, for every pixel.

    The defaults are the network of Usman Akbar et al. 2024 (Scientific Data 11:259): 41.1 M parameters.

    Args:
        img_resolution: height and width of the images; the entries of `channel_mult` but one halve it.
        img_channels: channels of the images.
        model_channels: unit of the channels, and width of the time embedding.
        channel_mult: channels at each size, in `model_channels`; the first is full size, each next half of it. All
            channels are multiples of 32.
        num_res_blocks: residual blocks at each size on the way down; there is one more on the way up.
        attention_resolutions_px: image sizes at which there is self-attention after each of them. Between the two ways
            there always is.
        num_heads: attention heads.
        num_head_channels: channels of a head, instead of their number.
        num_heads_upsample: heads on the way up; None for `num_heads`.
        use_scale_shift_norm: see `ResBlock`.
        resblock_updown: residual blocks change the size, in place of convolutions.
        use_new_attention_order: see `AttentionBlock`.
        conv_resample: where residual blocks do not, convolutions change the size, not means and repetition alone.
        dropout: see `ResBlock`.
        learn_variance: predict a second number for every number of the image.
        condition_width: length of the condition; 0 for none.
        gradient_checkpointing: compute every stage once more in the backward pass instead of keeping what is in it:
            less memory, more time.

    Raises:
        ValueError: if sizes, channels and heads do not fit together.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int = 5,
        model_channels: int = 64,
        channel_mult: Sequence[float] = (1, 1, 2, 2, 4, 4),
        num_res_blocks: int = 3,
        attention_resolutions_px: Sequence[int] = (16, 8),
        num_heads: int = 4,
        num_head_channels: int | None = None,
        num_heads_upsample: int | None = None,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        conv_resample: bool = True,
        dropout: float = 0.0,
        learn_variance: bool = False,
        condition_width: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.model_channels = img_resolution, img_channels, model_channels
        self.condition_width, self.dropout = condition_width, dropout
        self.gradient_checkpointing = gradient_checkpointing
        widths = [round(mult * model_channels) for mult in channel_mult]
        heads_down, heads_up = num_heads, num_heads_upsample or num_heads
        sizes = _check(
            img_resolution,
            widths,
            attention_resolutions_px,
            {num_head_channels} if num_head_channels else {heads_down, heads_up},
        )
        embedding_width = 4 * model_channels
        levels = list(zip(widths, sizes, strict=True))

        def residual(n_in: int, n_out: int, resample: Literal["up", "down"] | None = None) -> ResBlock:
            return ResBlock(n_in, n_out, embedding_width, dropout, use_scale_shift_norm, resample)

        def attention(channels: int, heads: int) -> AttentionBlock:
            heads = channels // num_head_channels if num_head_channels else heads
            return AttentionBlock(channels, heads, use_new_attention_order)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding_width), nn.SiLU(), nn.Linear(embedding_width, embedding_width)
        )
        if condition_width:
            self.label_emb = nn.Embedding(condition_width, embedding_width)

        channels = widths[0]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(img_channels, channels, 3, padding=1)])])
        kept = [channels]  # of the stages, which the way up takes in reverse
        for level, (width, size) in enumerate(levels):
            if level:
                down = residual(channels, channels, "down") if resblock_updown else Downsample(channels, conv_resample)
                self.input_blocks.append(Stage([down]))
                kept.append(channels)
            for _ in range(num_res_blocks):
                stage = Stage([residual(channels, width)])
                channels = width
                if size in attention_resolutions_px:
                    stage.append(attention(channels, heads_down))
                self.input_blocks.append(stage)
                kept.append(channels)
        self.middle_block = Stage(
            [residual(channels, channels), attention(channels, heads_down), residual(channels, channels)]
        )
        self.output_blocks = nn.ModuleList()
        for level, (width, size) in reversed(list(enumerate(levels))):
            for _ in range(num_res_blocks + 1):
                stage = Stage([residual(channels + kept.pop(), width)])
                channels = width
                if size in attention_resolutions_px:
                    stage.append(attention(channels, heads_up))
                self.output_blocks.append(stage)
            if level:
                up = residual(channels, channels, "up") if resblock_updown else Upsample(channels, conv_resample)
                stage.append(up)
        predicted = 2 * img_channels if learn_variance else img_channels
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), zeroed(nn.Conv2d(channels, predicted, 3, padding=1))
        )
        # As the features are, else every convolution copies its weight and the gradient of it.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            x: noisy images (N, C, H, W).
            t: times (N,), in the numbers that the network is trained with.
            condition: (N, condition_width), a one for each class that holds; zeros, or None, for unconditional.

        Returns:
            float32 (N, C, H, W); (N, 2C, H, W) with `learn_variance`, what belongs to the variance last. Times and the
            last convolution are computed in float32 under autocast too.

        Raises:
            ValueError: if images or condition have another shape.
        """
        self._check_inputs(x, condition)
        device = x.device.type
        with torch.autocast(device, enabled=False):
            embedding = self.time_embed(timestep_embedding(t, self.model_channels))
            if condition is not None:
                embedding = embedding + condition.float() @ self.label_emb.weight
        half = torch.is_autocast_enabled(device)
        h = fast_layout(x, torch.get_autocast_dtype(device) if half else torch.float32)
        kept = []
        for stage in self.input_blocks:
            h = self._run(stage, embedding, h)
            kept.append(h)
        h = self._run(self.middle_block, embedding, h)
        for stage in self.output_blocks:
            h = self._run(stage, embedding, h, kept.pop())
        norm, _, conv = self.out
        with torch.autocast(device, enabled=False):
            y: Tensor = conv(normalize_silu(h.float(), norm))
        return y

    def _run(self, stage: nn.Module, *inputs: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            h = checkpoint(stage, *inputs, use_reentrant=False, preserve_rng_state=self.dropout > 0)
        else:
            h = stage(*inputs)
        result: Tensor = h
        return result

    def _check_inputs(self, x: Tensor, condition: Tensor | None) -> None:
        size, channels, width = self.img_resolution, self.img_channels, self.condition_width
        if x.shape[1:] != (channels, size, size):
            raise ValueError(f"Images must be (N, {channels}, {size}, {size}), as configured; got {tuple(x.shape)}.")
        if condition is not None and (not width or condition.shape != (x.shape[0], width)):
            raise ValueError(
                f"A condition must be ({len(x)}, {width}), as condition_width says; got {tuple(condition.shape)}."
            )


def _check(img_resolution: int, widths: list[int], attended_px: Sequence[int], heads: set[int]) -> list[int]:
    """Give the height and width at each level.

    Args:
        img_resolution: of the images.
        widths: channels at each level.
        attended_px: sizes with attention.
        heads: what must divide the channels there.

    Raises:
        ValueError: for all that does not fit.
    """
    step = 2 ** (len(widths) - 1)
    if img_resolution < step or img_resolution % step:
        below = max(img_resolution // step * step, 0)
        raise ValueError(
            f"img_resolution must be a multiple of {step}, for channel_mult has {len(widths)} entries; got "
            f"{img_resolution}. Next to it {f'are {below} and' if below else 'is'} {below + step}."
        )
    sizes = [img_resolution >> level for level in range(len(widths))]
    problems = []
    if any(width < GROUPS or width % GROUPS for width in widths):
        problems.append(f"channel_mult times model_channels must be multiples of {GROUPS}; got {widths}")
    if not set(attended_px) <= set(sizes):
        problems.append(f"attention_resolutions_px must be sizes that there are, {sizes}; got {list(attended_px)}")
    attended = {width for width, size in zip(widths, sizes, strict=True) if size in attended_px} | {widths[-1]}
    if any(number < 1 or width % number for width in attended for number in heads):
        problems.append(
            f"{' and '.join(map(str, sorted(heads)))} must divide the channels with attention, {sorted(attended)}"
        )
    if problems:
        raise ValueError(f"{'; '.join(problems)}.")
    return sizes
