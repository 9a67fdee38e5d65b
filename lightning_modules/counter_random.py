"""Random numbers as a pure function of `(seed, stream, index)`: Philox 4x32-10.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC11). A counter-based generator has no state: the
noise of training sample j, or of synthetic image i, is the same for every batch size, rank, device and resumption.
The integers are the same everywhere; the floats made from them agree to the rounding of log, cos and sin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """What the numbers are for: different streams of the same `(seed, index)` are independent."""

    LATENT = 1
    NOISE = 2
    STYLE_MIXING = 3
    PATH_LENGTH = 4
    AUGMENTATION = 5
    MIRROR = 6
    EMISSION_LATENT = 7
    EMISSION_NOISE = 8
    ADA = 9
    GRADIENT_PENALTY = 10
    EMISSION_CLASS = 11
    AUTOENCODER = 12
    DIFFUSION_TIME = 13
    DIFFUSION_NOISE = 14
    CONDITION_DROPOUT = 15
    MEMBERSHIP = 16


def philox(counter: Sequence[Tensor], key: Sequence[int]) -> list[Tensor]:
    """Philox 4x32 with ten rounds.

    Args:
        counter: four int64 tensors of one shape, each with values 0..2^32-1.
        key: two integers 0..2^32-1.

    Returns:
        Four int64 tensors of uniformly distributed 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps modulo 2^64, which keeps the right high and low words.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _words(seed: int, stream: int, index: Tensor, count: int) -> Tensor:
    """Give `count` 32-bit words per index: int64 (N, count), count a multiple of 4."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"Expected a seed from 0 to 2^63 - 1, but got {seed}.")
    index = index.to(torch.int64)
    block = torch.arange(count // 4, device=index.device)
    low, high = (index & _MASK)[:, None], (index >> 32)[:, None]
    zero = torch.zeros_like(low + block)
    words = philox((zero + block, zero + low, zero + high, zero + stream), (seed & _MASK, seed >> 32))
    return torch.stack(words, dim=-1).flatten(1)  # (N, count)


def random_words(seed: int, stream: Stream, index: Tensor, count: int) -> Tensor:
    """Draw `count` integers 0..2^32-1 for every index.

    Args:
        seed: 0 to 2^63 - 1.
        stream: what they are for.
        index: int64 (N,), position of the sample.
        count: numbers per sample.

    Returns:
        int64 (N, count).
    """
    return _words(seed, stream, index, -(-count // 4) * 4)[:, :count]


def random_uniform(seed: int, stream: Stream, index: Tensor, count: int) -> Tensor:
    """Draw `count` numbers in [0, 1) for every index, as multiples of 2^-24: float32 (N, count)."""
    return (random_words(seed, stream, index, count) >> 8).float() * 2.0**-24


def random_normal(seed: int, stream: Stream, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw standard normal numbers for every index by the Box-Muller transform.

    Args:
        seed: 0 to 2^63 - 1.
        stream: what they are for.
        index: int64 (N,), position of the sample.
        shape: shape of one sample.

    Returns:
        float32 (N, *shape) on the device of `index`.
    """
    count = math.prod(shape)
    words = _words(seed, stream, index, -(-count // 4) * 4)
    # (w + 1) / 2^32 lies in (0, 1]: the logarithm is finite.
    radius = torch.sqrt(-2.0 * torch.log((words[:, 0::2] + 1).double() * 2.0**-32))
    angle = words[:, 1::2].double() * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :count].float().reshape(len(index), *shape)
