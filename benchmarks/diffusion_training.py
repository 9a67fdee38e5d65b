"""Training speed and memory of the diffusion U-Net, against MONAI's and diffusers' of the same width and depth.

    python benchmarks/diffusion_training.py
    python benchmarks/diffusion_training.py --device cuda --size 256 --batch 32 --precision bfloat16 --compiled true

A step is forward pass, squared error, backward pass and AdamW; no data loading. Each measurement has a process of its
own, in turns, and the fastest step of all counts, because others may use the machine too; the median is printed beside
it. "Kept" is what the forward pass keeps for the backward pass of an image, without weights: times the batch, about
what training takes. MONAI's network adds the time where ours and diffusers' scale and shift by it, and so has a few
parameters less.
Rivals that are not installed are left out: `pip install diffusers einops` (MONAI's attention needs einops).
"""

from __future__ import annotations

import importlib.util
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

sys.path.insert(0, str(Path(__file__).parent.parent))

Model = Literal["ours", "MONAI", "diffusers"]
Precision = Literal["float32", "bfloat16"]

NEEDED = {"ours": (), "MONAI": ("monai", "einops"), "diffusers": ("diffusers",)}
CHANNELS = 5
ATTENTION_PX = (16, 8)
RES_BLOCKS = 3
HEADS = 4


@dataclass(frozen=True)
class Job:
    """One measurement; the arguments of `main`."""

    model: Model
    size: int
    batch: int
    model_channels: int
    channel_mult: tuple[int, ...]
    device: str
    precision: Precision
    threads: int
    repeats: int
    checkpointing: bool
    compiled: bool
    channels_last: bool


@dataclass(frozen=True)
class Result:
    """Seconds of the steps, peak memory in MiB without the libraries, MiB kept per image, number of parameters."""

    seconds: list[float]
    memory_mib: float
    kept_mib: float
    parameters: int


def build(job: Job) -> tuple[Any, Callable[..., Any]]:
    """Give a network, and how it is called with images and times."""
    import torch

    widths = [job.model_channels * mult for mult in job.channel_mult]
    attended = [job.size >> level in ATTENTION_PX for level in range(len(widths))]
    if job.model == "ours":
        from lightning_modules.networks.diffusion_unet import DiffusionUNet

        network: Any = DiffusionUNet(
            job.size,
            CHANNELS,
            job.model_channels,
            job.channel_mult,
            RES_BLOCKS,
            ATTENTION_PX,
            HEADS,
            gradient_checkpointing=job.checkpointing,
        )
        return network, network
    if job.model == "MONAI":
        from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

        network = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_res_blocks=RES_BLOCKS,
            channels=widths,
            attention_levels=attended,
            num_head_channels=[width // HEADS for width in widths],
            use_flash_attention=True,
        )
        call = network
    else:
        from diffusers import UNet2DModel  # type: ignore[import-not-found]

        network = UNet2DModel(
            sample_size=job.size,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            layers_per_block=RES_BLOCKS,
            block_out_channels=widths,
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
            attention_head_dim=widths[-1] // HEADS,
            norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
        )
        if job.checkpointing:
            network.enable_gradient_checkpointing()

        def call(x: Any, t: Any) -> Any:
            return network(x, t).sample

    return network.to(memory_format=torch.channels_last) if job.channels_last else network, call


def measure(job: Job) -> Result:
    """Time training steps after one of warming up."""
    import torch

    for library in NEEDED[job.model]:
        importlib.import_module(library)
    torch.set_num_threads(job.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    build(job)  # imports the rest
    libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    network, call = build(job)
    network.to(job.device)
    if job.compiled:
        network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    noise = torch.randn(job.batch, CHANNELS, job.size, job.size, device=job.device)
    t = torch.rand(job.batch, device=job.device) * 1000
    x = noise.contiguous(memory_format=torch.channels_last) if job.channels_last else noise
    seconds = []
    kept: dict[int, int] = {}
    weights = {p.data_ptr() for p in network.parameters()}

    def count(tensor: Any) -> Any:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bfloat16"),
    ):
        call(x, t)  # one that is not timed, too
    for _ in range(job.repeats + 1):
        start = time.perf_counter()
        with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bfloat16"):
            prediction = call(x, t)
        loss = (prediction.float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if job.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - libraries) / 1024
    if job.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    kept_mib = sum(kept.values()) / 2**20 / job.batch
    return Result(seconds[1:], memory, kept_mib, sum(parameter.numel() for parameter in network.parameters()))


def run(job: Job) -> Result:
    """Measure in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, job).result()


def main(
    models: list[Model] = ["ours", "MONAI", "diffusers"],  # noqa: B006 (only read)
    size: int = 64,
    batch: int = 8,
    model_channels: int | None = None,
    channel_mult: list[int] | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    precision: Precision = "float32",
    threads: int = 2,
    repeats: int = 3,
    rounds: int = 2,
    checkpointing: bool = False,
    compiled: bool = False,
    channels_last: bool = False,
) -> None:
    """Measure.

    Args:
        models: what is trained; the first is compared with the others.
        size: side of an image in pixels.
        batch: images of a step.
        model_channels: default: 32 below 256 px, else those of the paper, 64.
        channel_mult: default: 1, 2, 3, 4 below 256 px, else those of the paper, 1, 1, 2, 2, 4, 4.
        device: where.
        precision: bfloat16 by autocast.
        threads: of PyTorch on the CPU.
        repeats: timed steps of a process.
        rounds: processes of each model, in turn.
        checkpointing: gradient checkpointing; MONAI's network has none.
        compiled: by `torch.compile`.
        channels_last: give images and weights to the rivals in that layout, which ours chooses itself.
    """
    chosen: list[Model] = []
    for model in models:
        missing = [name for name in NEEDED[model] if importlib.util.find_spec(name) is None]
        if missing:
            sys.stdout.write(f"{model} is left out: {' and '.join(missing)} not installed\n")
        else:
            chosen.append(model)
    sys.stdout.write(f"{size} px, {CHANNELS} channels, batch {batch}, {precision}, {device}\n")
    found: dict[Model, list[Result]] = {model: [] for model in chosen}
    for _ in range(rounds):
        for model in chosen:
            job = Job(
                model,
                size,
                batch,
                model_channels or (32 if size < 256 else 64),
                tuple(channel_mult or ((1, 2, 3, 4) if size < 256 else (1, 1, 2, 2, 4, 4))),
                device,
                precision,
                threads,
                repeats,
                checkpointing,
                compiled,
                channels_last and model != "ours",
            )
            found[model].append(run(job))
    sys.stdout.write(
        f"{'':12}{'M parameters':>14}{'images/s':>10}{'(median)':>10}{'peak MiB':>10}{'kept MiB':>10}"
        "   time, memory of it to\n"
    )
    first = found[chosen[0]]
    for model, results in found.items():
        seconds = [second for result in results for second in result.seconds]
        memory = statistics.median(result.memory_mib for result in results)
        slower = min(seconds) / min(second for result in first for second in result.seconds)
        larger = memory / statistics.median(result.memory_mib for result in first)
        sys.stdout.write(
            f"{model:12}{results[0].parameters / 1e6:14.2f}{batch / min(seconds):10.2f}"
            f"{batch / statistics.median(seconds):10.2f}{memory:10.0f}{results[0].kept_mib:10.1f}"
            f"   {slower:.2f}, {larger:.2f} {chosen[0]}\n"
        )


if __name__ == "__main__":
    auto_cli(main)
