"""Loader speed: slices per second of the DataModule from page cache, and whether memory stays flat.

    python benchmarks/loader.py [--slices 4096] [--size_px 256] [--seconds 5]

Writes a random slice set into a temporary folder, reads it once, then loads shuffled training batches on one core with
no worker process and with one. The bare copy of the same bytes is measured in the same run as the yardstick.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parent.parent))

from datamodules.brats import BraTSDataModule
from datamodules.slice_set import class_pixels, finish_slice_set, save_shard


def write_random_set(root: Path, slices: int, size_px: int) -> None:
    """Write a real set of random pixels, 1024 slices a shard."""
    rng = np.random.default_rng(0)
    labels = []
    for number, start in enumerate(range(0, slices, 1024)):
        count = min(1024, slices - start)
        shard = rng.integers(0, 256, (count, 5, size_px, size_px), np.uint8)
        shard[:, 4] &= 3
        save_shard(root / f"slices-{number:05d}.npy", shard)
        labels.append(class_pixels(shard[:, 4]))
    index = pd.concat(labels, ignore_index=True)
    patient = [f"P{i // 64:05d}" for i in range(slices)]
    index = index.assign(patient=patient, volume=patient, z=[i % 64 for i in range(slices)], split="train")
    finish_slice_set(root, index, {"kind": "real", "spacing_mm": 1.0})


def endless(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of one epoch after the other."""
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def rate(loader: Any, seconds: float) -> float:
    """Slices per second after a warm-up of ten batches."""
    batches = endless(loader)
    for _ in range(10):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += len(next(batches)["slices"])
    return count / (time.perf_counter() - start)


def anonymous_mib() -> float:
    """Memory of this process without the pages of mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def main(slices: int = 4096, size_px: int = 256, batch_size: int = 32, seconds: float = 5.0) -> None:
    """Measure.

    Args:
        slices: size of the set.
        size_px: side of a slice.
        batch_size: slices of a batch.
        seconds: duration of each measurement.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_random_set(root, slices, size_px)
        data = [
            BraTSDataModule(
                str(root), batch_size=batch_size, epoch_images=slices // batch_size * batch_size, num_workers=workers
            )
            for workers in (0, 1)
        ]
        for module in data:
            module.setup()
        data[0].real.read(range(slices))  # into the page cache
        source = np.ones((batch_size, 5, size_px, size_px), np.uint8)
        target = np.empty_like(source)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            np.copyto(target, source)
            count += batch_size
        copy = count / (time.perf_counter() - start)
        before = anonymous_mib()
        rates = [rate(module.train_dataloader(), seconds) for module in data]
        after = anonymous_mib()
    lines = [
        f"{slices} slices of 5 x {size_px} x {size_px}, batches of {batch_size}, one core",
        f"  bare copy in cache   {copy:9.0f} slices/s",
        f"  no worker process    {rates[0]:9.0f} slices/s   {rates[0] / copy:5.0%} of the copy",
        f"  one worker process   {rates[1]:9.0f} slices/s   {rates[1] / copy:5.0%} of the copy",
        f"  anonymous memory     {before:.0f} MiB before, {after:.0f} MiB after",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    auto_cli(main)
