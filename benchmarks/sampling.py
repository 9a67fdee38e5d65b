"""Emission of a synthetic set: images per second and memory, with the writing of the shards apart.

    python benchmarks/sampling.py [--config configs/stylegan2.yaml] [--images 64] [--batch 16] [--device cuda]

Makes images with an untrained generator of a shipped configuration, in batches as `callbacks.SyntheticDataset` does,
writes each batch, then puts the shards together. Neither time nor memory depends on the weights or, but for the index,
on the number of images, so what 100,000 images take is the rate times their number.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parent.parent))

from datamodules.shards import ShardWriter
from datamodules.slice_set import save_shard
from lightning_modules.image_generator import ImageGenerator


def build(config: Path, seed: int) -> ImageGenerator:
    """The model of a configuration, without its data."""
    from lightning import LightningModule
    from omegaconf import OmegaConf

    from train import Parser

    chosen = OmegaConf.to_container(OmegaConf.merge({"seed_everything": seed}, OmegaConf.load(config)), resolve=True)
    parser = Parser(allow_abbrev=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    model = parser.instantiate_classes(parser.parse_object({"model": chosen["model"]})).model  # type: ignore[index, call-overload]
    assert isinstance(model, ImageGenerator)
    return model


def peak_mib(device: str) -> float:
    """Largest memory so far: of the card, or of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(
    config: Path = Path("configs/stylegan2.yaml"),
    images: int = 64,
    batch: int = 16,
    device: str = "cpu",
    threads: int = 2,
    compiled: bool = False,
    seed: int = 0,
) -> None:
    """Measure.

    Args:
        config: YAML of a generator.
        images: how many to make; a first batch is not counted.
        batch: images made at once.
        device: cpu or cuda.
        threads: of the CPU.
        compiled: by `torch.compile`, as `callbacks.SyntheticDataset` does with `compiled: true`.
        seed: of weights and images.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = build(config, seed).to(device).eval()
    if compiled:
        model.sampled_network.compile()
    model.generate_slices(torch.arange(batch), seed)
    making, writing = 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        starts = range(0, images, batch)
        for start in starts:
            clock = time.perf_counter()
            slices = model.generate_slices(torch.arange(start, start + batch), seed).cpu().numpy()
            making += time.perf_counter() - clock
            clock = time.perf_counter()
            save_shard(Path(folder) / f"part-{start:09d}.npy", slices)
            writing += time.perf_counter() - clock
        clock = time.perf_counter()
        writer = ShardWriter(Path(folder), slices.shape[1:], len(starts) * batch, shard_mib=1024)
        for start in starts:
            writer.write(np.load(Path(folder) / f"part-{start:09d}.npy", mmap_mode="r"))
        writing += time.perf_counter() - clock
    made = len(starts) * batch
    print(f"{config}: {slices.shape[-1]} px, batch {batch}, {device}, peak memory {peak_mib(device):,.0f} MiB")
    for what, seconds in (("making", making), ("writing", writing)):
        hours = seconds / made * 100_000 / 3600
        print(f"  {what:<8} {made / seconds:9,.1f} images/s   100,000 images: {hours:7.2f} h")


if __name__ == "__main__":
    auto_cli(main)
