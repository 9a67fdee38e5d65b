"""Which step of a chain a training image is noised to.

Nichol, Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (ICML, arXiv 2102.09672), section 3.3: steps
are drawn in proportion to the root mean square of their last losses, and the losses weighted so that their expectation
stays what it is under uniform steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class TimeSampler(nn.Module, ABC):
    """Turns uniform numbers into steps 0 ... T-1 of a chain.

    Args:
        steps: T.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"Expected at least one step to draw from, but got {steps}.")
        self.steps = steps

    @abstractmethod
    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw steps.

        Args:
            uniform: (N,) in [0, 1).

        Returns:
            int64 (N,), the steps, and float32 (N,), the factors of their losses: the mean of the weighted losses is an
            unbiased estimate of the mean loss over all steps.
        """

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from losses.

        Args:
            t: int64 (N,), the steps that all processes trained on, in the same order in each.
            losses: (N,), what came out, without the factors.
        """


class UniformTimes(TimeSampler):
    """Every step is as likely, whatever its loss.

    Args:
        steps: T.
    """

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw steps with factors of 1."""
        t = (uniform * self.steps).long()
        return t, torch.ones_like(t, dtype=torch.float32)


class LossAwareTimes(TimeSampler):
    """Steps with larger losses are more likely: p(t) ~ sqrt(E[L_t²]) (equation 18).

    Meant for the variational bound, whose terms differ by orders of magnitude. Until every step has its full history,
    all are as likely. The history is in the checkpoint.

    Args:
        steps: T, that of the chain.
        history: that many last losses of every step are remembered.
        uniform_share: probability of drawing uniformly nevertheless.

    Raises:
        ValueError: if there is no history or the share is not in (0, 1].
    """

    losses: Tensor
    seen: Tensor

    def __init__(self, steps: int = 4000, history: int = 10, uniform_share: float = 0.001) -> None:
        super().__init__(steps)
        if history < 1:
            raise ValueError(f"Expected a history of at least one loss per step, but got {history}.")
        if not 0 < uniform_share <= 1:
            raise ValueError(
                f"Expected uniform_share above 0 (else a step whose losses were 0 never comes back) and at most 1, "
                f"but got {uniform_share}."
            )
        self.history = history
        self.uniform_share = uniform_share
        self.register_buffer("losses", torch.zeros(steps, history, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(steps, dtype=torch.int64))

    @property
    def probabilities(self) -> Tensor:
        """Probability of every step, float64 (T,)."""
        rms = self.losses.square().mean(dim=1).sqrt()
        aware = rms / rms.sum() * (1 - self.uniform_share) + self.uniform_share / self.steps
        complete = (self.seen >= self.history).all()
        return torch.where(complete, aware, torch.full_like(aware, 1 / self.steps))

    @property
    def factors(self) -> Tensor:
        """Factor of the loss of every step, 1 / (T p(t)), float64 (T,)."""
        return 1 / (self.steps * self.probabilities)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw steps by the inverse of the cumulative distribution, with factors 1 / (T p(t))."""
        cumulative = self.probabilities.cumsum(dim=0)
        # Rounding may leave the last of them below 1.
        t = torch.searchsorted(cumulative, uniform.double(), right=True).clamp(max=self.steps - 1)
        return t, self.factors[t].float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember losses; one that is not finite would make all probabilities so and is left out."""
        finite = losses.isfinite()
        t, losses = t[finite], losses[finite].double()
        same = t[:, None] == t  # (N, N)
        earlier, later = same.tril(-1).sum(dim=1), same.triu(1).sum(dim=1)
        # Of a step that comes up more often than the history is long, the last losses count.
        last = later < self.history
        slot = (self.seen[t] + earlier) % self.history
        self.losses[t[last], slot[last]] = losses[last]
        self.seen.index_add_(0, t, torch.ones_like(t))
