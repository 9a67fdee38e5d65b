"""Check every sampler against closed forms, for any number of steps on every path: `standin check-sampler`.

Widely used schedulers lose up to half of the spread of the samples at step counts like 250 or 600, which no picture
shows. Here the exact denoiser of a known law stands in for the network. For Gaussian images every sampler is affine in
its first state and its noises, so zeros and ones reveal it completely, and the mean and spread of its samples must be
what theory says for that very number of steps. For a mixture of two Gaussians they are measured on many samples. In
both cases the error must fall as the steps become more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_modules.diffusion_chain import DiffusionChain
from lightning_modules.exact_sampling import GaussianMixture, exact_share, gaussian_gain
from lightning_modules.noise_levels import Karras, Level, Spacing, Straight, check_levels
from lightning_modules.sampling import DDIM, Ancestral, Denoised, DPMSolverPP2M, Heun, Sampler, UniPC

SAMPLERS: dict[str, Sampler] = {
    "ancestral, small": Ancestral(variance="small"),
    "ancestral, large": Ancestral(variance="large"),
    "ancestral, exact": Ancestral(variance="learned"),
    "DDIM": DDIM(),
    "DDIM, eta 0.5": DDIM(eta=0.5),
    "Heun": Heun(),
    "Heun, churn 40": Heun(churn=40, churn_min=0.05, churn_max=50),
    "DPM-Solver++(2M)": DPMSolverPP2M(),
    "UniPC": UniPC(),
}
GAUSSIAN = GaussianMixture(torch.tensor([0.3]).double(), torch.tensor([0.0]).double(), 0.5)
MIXTURE = GaussianMixture(torch.tensor([-0.5, 0.4]).double(), torch.tensor([0.4, 0.6]).double().log(), 0.2)
ORDER_SHOWS = 20  # steps; fewer are too coarse for the order of a method to show
MIXTURE_STEPS = range(ORDER_SHOWS, 101)  # more would take long
MIXTURE_SAMPLES = 1 << 14
SAMPLING_ERROR = 4 / math.sqrt(2 * MIXTURE_SAMPLES)  # four standard errors of a spread
AGREEMENT = 1e-9  # of the measured with the expected mean and spread of Gaussian images


class Moments(NamedTuple):
    """Of samples, relative to the standard deviation of the images.

    Attributes:
        mean: of the samples minus that of the images.
        spread: standard deviation of the samples.
    """

    mean: float
    spread: float

    @property
    def error(self) -> float:
        """How far from 0 and 1."""
        return max(abs(self.mean), abs(self.spread - 1))


class Row(NamedTuple):
    """A sampler at one number of steps; `expected` is what theory says of Gaussian images, None for the mixture."""

    sampler: str
    steps: int
    evaluations: int
    measured: Moments
    expected: Moments | None
    verdict: str


def check_sampler(
    steps: list[int] | Literal["some", "all"] = "some", chain_steps: int = 1000, only_deviating: bool = False
) -> None:
    """Check mean and spread of the samples of every sampler with an exact denoiser, on every path.

    Args:
        steps: numbers of steps to check; "some" lie between 1 and `chain_steps`, awkward ones among them.
        chain_steps: length of the variance-preserving chains.
        only_deviating: leave out the rows that are as theory says.

    Raises:
        ValueError: if a sampler deviates from theory, or a chain has not that many steps.
    """
    paths: dict[str, Spacing] = {
        "linear chain": DiffusionChain(chain_steps, "linear"),
        "cosine chain": DiffusionChain(chain_steps, "cosine"),
        "EDM": Karras(),
        "rectified flow": Straight(),
    }
    counts = step_counts(steps, chain_steps)
    console = Console()
    results = deviations = 0
    with one_thread():
        for path, spacing in paths.items():
            tracked = track(SAMPLERS.items(), path, console=console, transient=True)
            rows = [row for name, sampler in tracked for row in check_path(name, sampler, spacing, counts)]
            wrong = [row for row in rows if row.verdict != "ok"]
            if shown := wrong if only_deviating else rows:
                console.print(_table(path, shown))
            results, deviations = results + len(rows), deviations + len(wrong)
    console.print(
        "Mean error and spread are relative to the standard deviation of the images: of one Gaussian where an expected "
        "spread is given, else of a mixture of two."
    )
    if deviations:
        raise ValueError(f"{deviations} of {results} results deviate from theory; the last column says how.")
    console.print(f"All {results} results are as theory says.")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: so small are the tensors that sharing them takes many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_path(name: str, sampler: Sampler, spacing: Spacing, counts: Sequence[int]) -> Iterator[Row]:
    """Check a sampler on the levels of a spacing.

    Args:
        name: of the sampler.
        sampler: any of those in `exact_sampling.gaussian_gain`.
        spacing: which levels to visit.
        counts: numbers of steps.
    """
    # The exact variance of a step differs from state to state for the mixture.
    learned = isinstance(sampler, Ancestral) and sampler.variance == "learned"
    for steps in counts:
        levels = spacing(steps)
        measured, expected = gaussian_moments(sampler, levels), expected_moments(sampler, levels)
        verdict = _verdict(spacing, levels, expected.error, lambda coarse: expected_moments(sampler, coarse).error)
        if math.dist(measured, expected) > AGREEMENT * max(1, expected.spread):
            verdict = "not as expected"
        yield Row(name, steps, sampler.evaluations(steps), measured, expected, verdict)
        if steps in MIXTURE_STEPS and not learned:
            measured = mixture_moments(sampler, levels)
            error = measured.error - SAMPLING_ERROR
            verdict = _verdict(spacing, levels, error, lambda coarse: mixture_moments(sampler, coarse).error)
            yield Row(name, steps, sampler.evaluations(steps), measured, None, verdict)


def _verdict(
    spacing: Spacing, levels: Sequence[Level], error: float, error_along: Callable[[Sequence[Level]], float]
) -> str:
    """Judge levels, and whether the error falls with the number of steps as that of a first-order method at least."""
    check_levels(levels)
    steps = len(levels) - 1
    if levels[0] != spacing(1)[0]:
        return "wrong start"
    if steps < ORDER_SHOWS:
        return "ok"
    alpha, sigma = levels[0]
    unnoticed = alpha / math.hypot(alpha * GAUSSIAN.std, sigma)  # what is left of the image where noise is taken for it
    if error - unnoticed > max(2 / steps, 0.9 * error_along(spacing(steps // 2))):
        return "no convergence"
    return "ok"


def _start(levels: Sequence[Level]) -> float:
    """Standard deviation of the noise that sampling begins with."""
    return max(1.0, levels[0].sigma)


def expected_moments(sampler: Sampler, levels: Sequence[Level]) -> Moments:
    """Give what theory says of Gaussian images."""
    std, mean = GAUSSIAN.std, float(GAUSSIAN.means)
    gain, noise_variance = gaussian_gain(sampler, levels, std)
    return Moments(-gain * levels[0].alpha * mean / std, math.hypot(gain * _start(levels), noise_variance**0.5) / std)


def gaussian_moments(sampler: Sampler, levels: Sequence[Level]) -> Moments:
    """Give what the sampler makes of Gaussian images, exactly: it is affine in its first state and its noises."""
    following = dict(pairwise(levels))

    def denoise(x: Tensor, level: Level) -> Denoised:
        image, _ = GAUSSIAN(x, level)
        if isinstance(sampler, Ancestral):
            return Denoised(image, torch.full_like(x, exact_share(GAUSSIAN.std, level, following[level])))
        return Denoised(image)

    def unit(index: int, scale: float = 1.0) -> Tensor:
        return scale * torch.nn.functional.one_hot(torch.tensor(index), len(levels) + 1).double()

    # One sample without any noise, one that only starts from noise, and one for the noise of every step.
    samples = sampler(denoise, levels, unit(1, _start(levels)), lambda k: unit(2 + k))
    responses = samples[1:] - samples[0]
    std, mean = GAUSSIAN.std, float(GAUSSIAN.means)
    return Moments((float(samples[0]) - mean) / std, float(responses.norm()) / std)


def mixture_moments(sampler: Sampler, levels: Sequence[Level]) -> Moments:
    """Give what the sampler makes of the mixture: quantiles of the first noise, random noise in the steps."""
    generator = torch.Generator().manual_seed(0)
    quantiles = (torch.arange(MIXTURE_SAMPLES, dtype=torch.float64) + 0.5) / MIXTURE_SAMPLES

    def noise(_step: int) -> Tensor:
        return torch.randn(MIXTURE_SAMPLES, generator=generator, dtype=torch.float64)

    samples = sampler(MIXTURE, levels, _start(levels) * torch.special.ndtri(quantiles), noise)
    weights = MIXTURE.log_weights.exp()
    mean = weights @ MIXTURE.means
    std = (MIXTURE.std**2 + weights @ (MIXTURE.means - mean).square()).sqrt()
    return Moments(float((samples.mean() - mean) / std), float(samples.std() / std))


def step_counts(steps: list[int] | Literal["some", "all"], longest: int) -> list[int]:
    """Give numbers of steps for chains of a length."""
    if steps == "all":
        return list(range(1, longest + 1))
    if steps == "some":
        parts = (longest // 4, longest // 2 + 1, longest * 3 // 5, longest * 3 // 4, longest * 9 // 10)
        return sorted({*(n for n in (1, 2, 5, 20, 100) if n < longest), *parts, longest - 1, longest})
    return steps


def _table(path: str, rows: Sequence[Row]) -> Table:
    table = Table("sampler", title=path, box=SIMPLE_HEAD)
    for heading in ("steps", "calls", "mean error", "spread", "expected"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for row in rows:
        expected = "" if row.expected is None else f"{row.expected.spread:.4f}"
        numbers = (f"{row.steps}", f"{row.evaluations}", f"{row.measured.mean:+.4f}", f"{row.measured.spread:.4f}")
        table.add_row(row.sampler, *numbers, expected, row.verdict, style=None if row.verdict == "ok" else "red")
    return table
