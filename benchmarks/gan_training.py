"""Training speed and memory of StyleGAN 2, 3-T and 3-R, against the straightforward formulation of their operators.

    python benchmarks/gan_training.py
    python benchmarks/gan_training.py --device cuda --size 256 --batch 32 --precision float16

Each measurement has a process of its own. An iteration is what the training rules do: every term of the objective with
its optimizer step, the lazy ones (R1, path length) at their share 1 / interval; no data loading, no logging. Every term
is timed by itself and the fastest of all repetitions counts, because others may use the machine too; its median is
printed beside it. The straightforward formulation is in zero_insertion.py.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

Model = Literal["stylegan2", "stylegan3-t", "stylegan3-r"]
Formulation = Literal["ours", "zero insertion"]
Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Job:
    """One measurement; the arguments of `main`."""

    model: Model
    formulation: Formulation
    size: int
    batch: int
    channel_base: int
    channel_max: int
    device: str
    precision: Precision
    threads: int
    repeats: int


@dataclass(frozen=True)
class Result:
    """Seconds of an iteration (fastest, median), peak memory in MiB, milliseconds of each term."""

    seconds: float
    median: float
    memory_mib: float
    terms: dict[str, float]


def build(job: Job) -> tuple[Any, Any]:
    """Generator and discriminator; the widths of 3-R are doubled in the generator, as published."""
    from lightning_modules.networks.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
    from lightning_modules.networks.stylegan3 import StyleGAN3Generator

    half: dict[str, Any] = {"conv_clamp": 256}  # the published default, in float32 too
    if job.precision != "float32":
        half |= {"num_half_res": 4, "half_dtype": job.precision}
    widths = {"channel_base": job.channel_base, "channel_max": job.channel_max}
    discriminator = StyleGAN2Discriminator(job.size, 5, **widths, **half)
    if job.model == "stylegan2":
        return StyleGAN2Generator(img_resolution=job.size, img_channels=5, **widths, **half), discriminator
    if job.model == "stylegan3-r":
        widths = {name: 2 * width for name, width in widths.items()}
        half |= {"conv_kernel": 1, "use_radial_filters": True}
    return StyleGAN3Generator(img_resolution=job.size, img_channels=5, **widths, **half), discriminator


def terms(job: Job) -> dict[str, tuple[Callable[[], None], int]]:
    """The terms of the objective with their optimizer steps and intervals."""
    import torch
    from torch import Tensor

    from lightning_modules.losses import (
        discriminator_logistic_loss,
        generator_nonsaturating_loss,
        path_lengths,
        r1_penalty,
    )

    generator, discriminator = (network.to(job.device).train() for network in build(job))
    optimizers = {n: torch.optim.Adam(n.parameters(), lr=0.002, betas=(0.0, 0.99)) for n in (generator, discriminator)}
    real = torch.randn(job.batch, 5, job.size, job.size, device=job.device)

    def styles(batch: int = job.batch) -> Tensor:
        ws: Tensor = generator.mapping(torch.randn(batch, generator.z_dim, device=job.device))
        return ws

    def generator_term() -> Tensor:
        return generator_nonsaturating_loss(discriminator(generator.synthesis(styles())))

    def path_length_term() -> Tensor:
        ws = styles(job.batch // 2)
        images = generator.synthesis(ws)
        return path_lengths(images, ws, torch.randn_like(images)).square().mean()

    def discriminator_term() -> Tensor:
        tracked = {} if job.model == "stylegan2" else {"update_emas": lambda mean: mean}
        with torch.no_grad():
            fake = generator.synthesis(styles(), **tracked)
        return discriminator_logistic_loss(discriminator(real), discriminator(fake))

    def r1_term() -> Tensor:
        images = real.clone().requires_grad_()
        return r1_penalty(images, discriminator(images)).mean()

    def step(trained: Any, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            generator.requires_grad_(trained is generator)
            discriminator.requires_grad_(trained is discriminator)
            optimizers[trained].zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
            optimizers[trained].step()
            if job.device == "cuda":
                torch.cuda.synchronize()

        return run

    found = {"generator": (step(generator, generator_term), 1)}
    if job.model == "stylegan2":
        found["path length"] = step(generator, path_length_term), 4
    found["discriminator"] = step(discriminator, discriminator_term), 1
    return found | {"R1": (step(discriminator, r1_term), 16)}


def measure(job: Job) -> Result:
    """Time the terms in turn, after one round of warming up."""
    import torch

    torch.set_num_threads(job.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    if job.formulation == "zero insertion":
        import zero_insertion

        zero_insertion.install()
    runs = terms(job)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(job.repeats + 1):
        for name, (run, _) in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if job.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    return Result(
        sum(min(seconds[name]) / interval for name, (_, interval) in runs.items()),
        sum(statistics.median(seconds[name]) / interval for name, (_, interval) in runs.items()),
        memory,
        {name: min(values) * 1000 for name, values in seconds.items()},
    )


def main(
    models: list[Model] = ["stylegan2", "stylegan3-t", "stylegan3-r"],  # noqa: B006 (only read)
    formulations: list[Formulation] = ["zero insertion", "ours"],  # noqa: B006
    size: int = 64,
    batch: int = 8,
    channel_base: int | None = None,
    channel_max: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    precision: Precision = "float32",
    threads: int = 2,
    repeats: int = 5,
) -> None:
    """Measure.

    Args:
        models: what is trained.
        formulations: of the operators.
        size: side of an image in pixels.
        batch: images of an iteration.
        channel_base: default: 4096 up to 64 px, else as published (16384 for StyleGAN 2, 32768 for 3).
        channel_max: default: 64 up to 64 px, else 512.
        device: where.
        precision: of the four highest resolutions; float32 everywhere else.
        threads: of PyTorch on the CPU.
        repeats: timed iterations.
    """
    unit, memory = ("s/kimg", "peak GPU MiB") if device == "cuda" else ("s/iteration", "peak MiB")
    sys.stdout.write(f"{size} px, 5 channels, batch {batch}, {precision}, {device}\n")
    sys.stdout.write(f"{'':30}{unit:>12}{'(median)':>12}{memory:>14}   ms per term\n")
    for model in models:
        found = []
        for formulation in formulations:
            published = 16384 if model == "stylegan2" else 32768
            base = channel_base or (4096 if size <= 64 else published)
            widest = channel_max or (64 if size <= 64 else 512)
            job = Job(model, formulation, size, batch, base, widest, device, precision, threads, repeats)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                result = pool.submit(measure, job).result()
            found.append(result)
            scale = 1000 / batch if device == "cuda" else 1.0
            parts = ", ".join(f"{name} {value:.0f}" for name, value in result.terms.items())
            sys.stdout.write(
                f"{model + ', ' + formulation:30}{result.seconds * scale:12.3f}{result.median * scale:12.3f}"
                f"{result.memory_mib:14.0f}   {parts}\n"
            )
            sys.stdout.flush()
        if len(found) == 2:
            faster, smaller = found[0].seconds / found[1].seconds, found[0].memory_mib / found[1].memory_mib
            sys.stdout.write(f"{model + ': ':30}{faster:11.2f} times as fast, memory / {smaller:.2f}\n")


if __name__ == "__main__":
    auto_cli(main)
