"""How the learning rate falls with the progress of a training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod


class Decay(ABC):
    """Factor of the learning rate over the training."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Give the factor, 0 to 1, for the share of the training that is done, 0 to 1."""


class Polynomial(Decay):
    """(1 - progress)^power, as DeepLab and nnU-Net do.

    Args:
        power: 1 is a straight line, 0 a constant.
    """

    def __init__(self, power: float = 0.9) -> None:
        if power < 0:
            raise ValueError(f"Polynomial: expected power to be at least 0, but got {power}.")
        self.power = power

    def __call__(self, progress: float) -> float:
        """Give the factor."""
        return float((1.0 - progress) ** self.power)


class Cosine(Decay):
    """Half a period of a cosine, from 1 to `last` (Loshchilov, Hutter 2017, "SGDR", arXiv 1608.03983, equation 5).

    Args:
        last: factor at the end.
    """

    def __init__(self, last: float = 0.0) -> None:
        if not 0 <= last <= 1:
            raise ValueError(f"Cosine: expected last to be from 0 to 1, but got {last}.")
        self.last = last

    def __call__(self, progress: float) -> float:
        """Give the factor."""
        return self.last + (1.0 - self.last) * (1.0 + math.cos(math.pi * progress)) / 2.0
