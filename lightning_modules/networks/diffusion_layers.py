"""Layers of the diffusion U-Net: time embedding, residual blocks, self-attention and resampling.

Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models" (NeurIPS, arXiv 2006.11239), appendix B; Nichol,
Dhariwal 2021 (arXiv 2102.09672), appendix A; Dhariwal, Nichol 2021 (arXiv 2105.05233), section 3. Parameters have the
names of the published checkpoints and start as published.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

GROUPS = 32
MAX_PERIOD = 10_000


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of the time: [cos(t ω), sin(t ω)], ω_i = 10000^(-i / (dim // 2)).

    Args:
        t: (N,), any number.
        dim: width; an odd one ends with a zero.

    Returns:
        float32 (N, dim). Vaswani et al. 2017 (arXiv 1706.03762), section 3.5.
    """
    half = dim // 2
    omega = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * omega  # (N, dim // 2)
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, dim % 2))


def zeroed(layer: nn.Conv1d | nn.Conv2d) -> nn.Conv1d | nn.Conv2d:
    """Start from zero, so that what comes before contributes nothing at first."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class _NormalizeSiLU(torch.autograd.Function):
    """SiLU(α x + β), where α and β (N, C) combine the normalization of the groups with an affine map.

    Of all images it keeps x alone for the backward pass, and it goes over memory less often than separate operators.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """(N, C, H, W) -> the same; weight and bias (N, C)."""
        n, c, h, w = x.shape
        x32 = x.to(weight.dtype)
        _, *moments = torch.native_group_norm(x32, None, None, n, c, h * w, groups, eps)
        mean, rstd = (moment.repeat_interleave(c // groups, 1) for moment in moments)  # (N, C)
        alpha = weight * rstd
        beta = torch.addcmul(bias, mean, alpha, value=-1)
        ctx.save_for_backward(x, weight, mean, rstd, alpha, beta)
        ctx.groups = groups
        return F.silu(torch.addcmul(_image(beta), x32, _image(alpha)), inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias; in place, for fresh memory costs as much as a pass over it."""
        x, weight, mean, rstd, alpha, beta = ctx.saved_tensors
        x32 = x.to(weight.dtype)
        dy = torch.addcmul(_image(beta), x32, _image(alpha))
        torch.ops.aten.silu_backward.grad_input(grad.to(weight.dtype), dy, grad_input=dy)
        d_bias = dy.sum((2, 3))  # (N, C)
        d_weight = torch.addcmul((dy * x32).sum((2, 3)), mean, d_bias, value=-1) * rstd
        # dx is α dy without its mean and its part along x in each group: Wu, He 2018 (arXiv 1803.08494).
        n, c, h, w = x.shape
        shares = torch.stack([d_bias, d_weight]) * weight
        means = shares.view(2, n, ctx.groups, -1).sum(3) / (c // ctx.groups * h * w)
        mean_bias, mean_weight = means.repeat_interleave(c // ctx.groups, 2)
        slope = rstd * rstd * mean_weight
        offset = torch.addcmul(rstd * mean_bias, mean, slope, value=-1)
        dx = dy.mul_(_image(alpha)).addcmul_(x32, _image(slope), value=-1).sub_(_image(offset))
        return dx.to(x.dtype), d_weight, d_bias, None, None


def _image(v: Tensor) -> Tensor:
    return v[:, :, None, None]


def normalize_silu(x: Tensor, norm: nn.Module, modulation: Tensor | None = None) -> Tensor:
    """SiLU(norm(x) · (1 + scale) + shift), in float32, given back in the precision of x.

    Args:
        x: (N, C, H, W).
        norm: a GroupNorm.
        modulation: scale and shift of each channel, (N, 2C); None for neither.
    """
    norm = cast(nn.GroupNorm, norm)
    weight, bias = norm.weight.expand(x.shape[0], -1), norm.bias.expand(x.shape[0], -1)
    if modulation is not None:
        scale, shift = modulation.to(weight.dtype).chunk(2, dim=1)
        weight, bias = torch.addcmul(weight, weight, scale), torch.addcmul(bias + shift, bias, scale)
    y: Tensor = _NormalizeSiLU.apply(x, weight, bias, norm.num_groups, norm.eps)  # type: ignore[no-untyped-call]
    return y


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve with a kernel of one pixel, as a matrix product where the layout lets it be one."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, conv.weight, conv.bias)
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Fused softmax(query key^T / sqrt(width)) value; all (N, heads, L, width)."""
    if query.device.type != "cpu" or query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", enabled=False):  # its backward pass is several times slower in half precision there
        mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    return mixed.to(query.dtype)


class Downsample(nn.Module):
    """Half the size: convolution with stride 2, or the mean of 2 x 2 pixels."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if with_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H / 2, W / 2)."""
        y: Tensor = self.op(x)
        return y


class Upsample(nn.Module):
    """Twice the size: pixels are repeated, then perhaps convolved."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2H, 2W)."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResBlock(nn.Module):
    """Two convolutions around which the input is added; the embedding of time and condition enters between them.

    Args:
        in_channels: of the input; a multiple of 32, as are `out_channels`.
        out_channels: of the output.
        embedding_width: of the embedding.
        dropout: share of the numbers before the second convolution that are dropped in training.
        use_scale_shift_norm: the embedding scales and shifts after the second normalization, else it is added before.
        resample: change the size too, by the mean of 2 x 2 pixels or by repetition.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_width: int,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = True,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        first = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, in_channels), nn.SiLU(), first)
        width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_width, width))
        second = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out_channels), nn.SiLU(), nn.Dropout(dropout), second)
        self.skip_connection = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.resample: nn.Module | None = None
        if resample is not None:
            self.resample = (Upsample if resample == "up" else Downsample)(in_channels, with_conv=False)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(N, C_in, H, W), embedding (N, embedding_width) -> (N, C_out, H, W), or another size with `resample`."""
        norm, _, conv = self.in_layers
        h = normalize_silu(x, norm)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h, e = conv(h), self.emb_layers(embedding)
        norm, _, dropout, conv = self.out_layers
        h = normalize_silu(h, norm, e) if self.use_scale_shift_norm else normalize_silu(h + e[:, :, None, None], norm)
        h = conv(dropout(h))
        y: Tensor = h + (x if self.skip_connection is None else pointwise(x, self.skip_connection))
        return y


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, added to the input.

    Args:
        channels: of input and output.
        num_heads: number of heads, which divides `channels`.
        use_new_attention_order: how the channels of `qkv` are arranged: (3, heads, channels of a head), as later
            checkpoints have it, instead of (heads, 3, channels of a head).
    """

    def __init__(self, channels: int, num_heads: int, use_new_attention_order: bool = False) -> None:
        super().__init__()
        self.num_heads, self.use_new_attention_order = num_heads, use_new_attention_order
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        n, c, h, w = x.shape
        normed = F.group_norm(x.float(), GROUPS, self.norm.weight, self.norm.bias, self.norm.eps).to(x.dtype)
        tokens = normed.permute(0, 2, 3, 1).reshape(n, h * w, c)
        qkv = F.linear(tokens, self.qkv.weight.squeeze(2), self.qkv.bias)  # (N, HW, 3C)
        if self.use_new_attention_order:
            parts = qkv.view(n, h * w, 3, self.num_heads, -1).unbind(2)
        else:
            parts = qkv.view(n, h * w, self.num_heads, 3, -1).unbind(3)
        query, key, value = (part.transpose(1, 2) for part in parts)  # (N, heads, HW, C / heads)
        mixed = attend(query, key, value).transpose(1, 2).reshape(n, h * w, c)
        y = F.linear(mixed, self.proj_out.weight.squeeze(2), self.proj_out.bias)
        return x + y.view(n, h, w, c).permute(0, 3, 1, 2)
