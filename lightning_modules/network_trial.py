"""Find out before a training what a network takes and gives, without computing anything.

A copy of the network without weights, on PyTorch's meta device, runs through the shapes alone: weights, statistics and
random state stay as they are, and 512 px cost no more than 16.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

SIZES_PX = range(16, 513, 16)


def heads_of(network: nn.Module, batch: tuple[int, int, int, int], channels: int) -> int:
    """Check that a network can be trained on slices of a size, and count its heads.

    Args:
        network: (N, C, H, W) to logits (N, channels, H, W) or, deeply supervised, (N, heads, channels, H, W). It is
            left as it is.
        batch: (N, C, H, W), N slices of all processes.
        channels: logits per pixel that the target needs.

    Returns:
        Number of heads in training.

    Raises:
        ValueError: if it cannot, with the reason and the sizes of slices that it takes.
    """
    name = f"model.network: {type(network).__name__}"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            shape = _logits(without_weights(network), batch, "meta")
        except Exception:  # because of the size, or because the network looks at numbers: computing tells
            try:
                shape = _logits(copy.deepcopy(network).cpu(), (min(batch[0], 2), *batch[1:]), "cpu")
            except Exception as error:
                possible = [str(size) for size in SIZES_PX if _takes(network, (*batch[:2], size, size))]
                raise ValueError(
                    f"{name} cannot be trained on {batch[0]} slices of {batch[1]} modalities and "
                    f"{batch[2]} x {batch[3]} px ({type(error).__name__}: {str(error).strip()}). Of the multiples of "
                    f"{SIZES_PX.step} px up to {SIZES_PX[-1]}, it takes {', '.join(possible) or 'none'}. Choose "
                    "another network, or slices of another size (`standin prepare --size_px`)."
                ) from error
    if shape[-3] != channels:
        raise ValueError(f"{name} gives {shape[-3]} logits per pixel, but model.target needs {channels}.")
    return shape[1] if len(shape) == 5 else 1


def without_weights(network: nn.Module) -> nn.Module:
    """Copy a network with all parameters and buffers on the meta device; its weights are not copied first."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(network, memo)


def _takes(network: nn.Module, batch: tuple[int, int, int, int]) -> bool:
    """Try shapes on a new copy: some networks fit themselves to the first input that they see."""
    try:
        return bool(_logits(without_weights(network), batch, "meta"))
    except Exception:
        return False


def _logits(network: nn.Module, batch: tuple[int, ...], device: str) -> tuple[int, ...]:
    """Run a network in training mode and give the shape of its logits.

    Raises:
        Exception: whatever the network raises at what it cannot take.
        ValueError: if its output is something else than logits of every pixel.
    """
    output = network.train()(torch.zeros(batch, device=device))
    shape = tuple(output.shape) if isinstance(output, Tensor) else ()
    if len(shape) not in (4, 5) or (shape[0], *shape[-2:]) != (batch[0], *batch[-2:]):
        raise ValueError(f"its output is {shape or type(output).__name__} instead of logits for every pixel")
    return shape
