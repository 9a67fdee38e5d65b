"""Which of two implementations of an operator runs: plain PyTorch, or a Triton kernel where that has been seen to win.

The environment variable STANDIN_KERNELS says how that is decided:

- `auto`, the default: on CUDA both are timed at first use, with the gradient if there will be one, per operator,
  geometry, sizes, dtype and device, and the faster one is kept as long as the process lives, as
  `torch.backends.cudnn.benchmark` does. Elsewhere: plain.
- `plain` or `triton`: always that one, where a kernel exists. Both give the same up to rounding. Two processes that
  choose differently therefore differ by rounding: fix the choice where results must repeat bit for bit.

On which cards the kernels win is not known yet: they were compiled for Ampere and Hopper, but never timed.
"""

import math
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["auto", "plain", "triton"]
Implementation = Callable[[Tensor], Tensor]

_WARM_UP, _RUNS = 2, 5


def milliseconds(run: Implementation, x: Tensor) -> float:
    """Time of run(x) on the CUDA device, with its gradient if x wants one, after runs that compile and fill caches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for i in range(_WARM_UP + _RUNS):
        if i == _WARM_UP:
            start.record()
        y = run(x)
        if x.requires_grad and y.requires_grad:
            torch.autograd.grad(y, x, y)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / _RUNS


class KernelChoice:
    """Run the faster one of two implementations, and remember which it was.

    Args:
        mode: See the module.
        measure: Time of an implementation.
    """

    def __init__(self, mode: str = "auto", measure: Callable[[Implementation, Tensor], float] = milliseconds) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"STANDIN_KERNELS is one of {', '.join(get_args(Mode))}; got {mode!r}.")
        self.mode = mode
        self._measure = measure
        self._kernel_wins: dict[Hashable, bool] = {}

    def __call__(self, key: Hashable, plain: Implementation, kernel: Implementation, x: Tensor) -> Tensor:
        """Run one of them on x.

        Args:
            key: What the speed depends on, besides the need of a gradient.
            plain: In PyTorch. It must not change x.
            kernel: The same, up to rounding.
            x: The input.
        """
        key = key, x.requires_grad and torch.is_grad_enabled()
        if self.mode == "auto" and key not in self._kernel_wins:
            self._kernel_wins[key] = self._time(kernel, x) < self._time(plain, x)
        use_kernel = self._kernel_wins[key] if self.mode == "auto" else self.mode == "triton"
        return kernel(x) if use_kernel else plain(x)

    def _time(self, run: Implementation, x: Tensor) -> float:
        """Infinite for what fails: too little memory, a card that the kernel does not fit."""
        try:
            return self._measure(run, x)
        except Exception as error:
            warnings.warn(f"An implementation of an operator fails here and is not used: {error}", stacklevel=2)
            return math.inf

    @contextmanager
    def forced(self, mode: Mode) -> Iterator[None]:
        """Inside, decide as `mode` says."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before


choose = KernelChoice(os.environ.get("STANDIN_KERNELS", "auto"))
