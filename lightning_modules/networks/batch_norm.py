"""Batch normalization over the batch of all processes, so that two of them compute what one does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """Sum over the processes; the gradient of the sum of their losses is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization over all processes, each of which has as many samples as the others.

    PyTorch has one for GPUs (`torch.nn.SyncBatchNorm`) and none for CPUs.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Take any (N, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, ...)."""
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        values, ranks = x.float(), dist.get_world_size()
        mean = _mean_over_ranks(values.mean(axes), ranks)
        centred = values - _as_channels(mean, x)
        variance = _mean_over_ranks(centred.square().mean(axes), ranks)
        self._follow(mean.detach(), variance.detach(), ranks * x.numel() // x.shape[1])
        normalized = centred * _as_channels((variance + self.eps).rsqrt(), x)
        if self.affine:
            normalized = normalized * _as_channels(self.weight, x) + _as_channels(self.bias, x)
        return normalized.to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * count / (count - 1), share)


def _mean_over_ranks(values: Tensor, ranks: int) -> Tensor:
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total / ranks


def _as_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))


def normalize_over_ranks(network: nn.Module, device: str) -> nn.Module:
    """Make all batch normalizations of a network run over the batch of all processes; parameters keep their names.

    Args:
        network: changed in place where it is not a batch normalization itself.
        device: type of the device that it will run on.
    """
    if device == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return converted
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = GlobalBatchNorm
    return network
