"""Segmentation training: images per second and memory, fed by the DataModule and by MONAI's CacheDataset + DataLoader.

    python benchmarks/segmentation.py [--slices 2000] [--size_px 256] [--turns 20] [--filters '[16, 32, 64, 128]']

Both feed the same U-Net in the same run, in turns, with the augmentation of the paper: ours, and the same transforms as
a user of MONAI writes them. Each is a process of its own, so that its memory is its own. "Unique" is what no file
stands behind, before there is a network; mapped slices lie in memory besides while nobody else needs the room (MONAI's
cache was filled from them).
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from monai.data.dataloader import DataLoader
from monai.data.dataset import CacheDataset
from monai.networks.nets.dynunet import DynUNet
from monai.transforms.compose import Compose, OneOf
from monai.transforms.intensity.dictionary import (
    NormalizeIntensityd,
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
)
from monai.transforms.spatial.dictionary import RandAffined, RandSimulateLowResolutiond
from monai.transforms.utility.array import Lambda
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from datamodules.augmentation import PaperAugmentation
from datamodules.brats import BraTSDataModule
from datamodules.slice_set import SliceSet, class_pixels, finish_slice_set, save_shard
from lightning_modules.segmentation import normalize

Batches = Iterator[tuple[Tensor, Tensor]]
"""Normalized images, float32 (N, 4, H, W), and class indices (N, 1, H, W)."""


def write_set(root: Path, slices: int, size_px: int) -> None:
    """Write a real set of noisy discs with a tumour, 256 slices a shard, 64 a patient."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size_px, :size_px] - (size_px - 1) / 2
    brain = np.hypot(rows, columns) < 0.4 * size_px
    label = (np.hypot(rows - size_px / 8, columns) < 0.1 * size_px) * 2
    label[np.hypot(rows - size_px / 8, columns) < 0.05 * size_px] = 3
    tables = []
    for number, start in enumerate(range(0, slices, 256)):
        amount = min(256, slices - start)
        shard = np.empty((amount, 5, size_px, size_px), np.uint8)
        shard[:, :4] = rng.integers(60, 200, shard[:, :4].shape, np.uint8) * brain
        shard[:, 4] = label
        save_shard(root / f"slices-{number:05d}.npy", shard)
        tables.append(class_pixels(shard[:, 4]))
    index = pd.concat(tables, ignore_index=True)
    patient = [f"P{i // 64:05d}" for i in range(slices)]
    index = index.assign(patient=patient, volume=patient, z=[i % 64 for i in range(slices)], split="train")
    finish_slice_set(root, index, {"kind": "real", "spacing_mm": 1.0})


def ours(root: Path, batch_size: int, workers: int) -> Batches:
    """Feed from the DataModule."""
    data = BraTSDataModule(
        str(root), batch_size=batch_size, epoch_images=50 * batch_size, augmentation=PaperAugmentation(),
        num_workers=workers,
    )  # fmt: skip
    data.setup()
    loader: Any = data.train_dataloader()
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            yield normalize(batch["slices"][:, :4], batch["brain"]), batch["slices"][:, 4:]


def monai(root: Path, batch_size: int, workers: int) -> Batches:
    """Feed from MONAI's CacheDataset, which keeps what comes before the first random transform."""
    slices = SliceSet(root, "train")

    def load(row: int) -> dict[str, Tensor]:
        one = torch.from_numpy(slices.read([row])[0]).float()
        return {"image": one[:4], "label": one[4:]}

    image, both = ["image"], ["image", "label"]
    gamma: dict[str, Any] = {"gamma": (0.85, 1.2), "retain_stats": True}
    transform = Compose(
        [
            Lambda(load),
            NormalizeIntensityd(image, nonzero=True, channel_wise=True),
            RandAffined(
                both, prob=0.94, rotate_range=float(np.deg2rad(30)), scale_range=(0.1, 0.1),
                mode=("bilinear", "nearest"), padding_mode="zeros",
            ),
            RandGaussianNoised(image, prob=0.5, std=0.1),
            RandGaussianSmoothd(image, prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0)),
            RandSimulateLowResolutiond(image, prob=0.25, upsample_mode="bilinear", zoom_range=(0.75, 1.0)),
            OneOf([
                RandAdjustContrastd(image, prob=0.2, invert_image=True, **gamma),
                RandAdjustContrastd(image, prob=0.4, **gamma),
            ]),
        ]
    )  # fmt: skip
    cached = CacheDataset(list(range(len(slices))), transform, num_workers=1, progress=False)
    loader = DataLoader(cached, workers, batch_size=batch_size, shuffle=True, drop_last=True)
    while True:
        for batch in loader:
            yield batch["image"].as_tensor(), batch["label"].as_tensor()


def unet(filters: list[int]) -> DynUNet:
    """Make the U-Net of the configurations, with these filters."""
    n = len(filters)
    return DynUNet(2, 4, 4, [3] * n, [1] + [2] * (n - 1), [2] * (n - 1), filters)


def memory_mib() -> dict[str, float]:
    """Memory of this process: of its own, and pages of files that are mapped."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(status[name].split()[0]) / 1024 for key, name in (("unique", "RssAnon"), ("mapped", "RssFile"))}


def serve(pipe: Connection, feed: str, root: Path, batch_size: int, workers: int, filters: list[int]) -> None:
    """Be one of the two processes: take as many batches as asked for, train on them if asked to, and give the time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = memory_mib()
    start = time.perf_counter()
    batches = {"ours": ours, "monai": monai}[feed](root, batch_size, workers)
    next(batches)
    pipe.send(time.perf_counter() - start)
    network: Any = None
    while (request := pipe.recv()) != "end":
        if request == "memory":
            pipe.send({key: value - before[key] for key, value in memory_mib().items()})
            continue
        amount, train = request
        if train and network is None:
            network = unet(filters)
            optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.99, nesterov=True)
        start = time.perf_counter()
        for images, label in islice(batches, amount):
            if train:
                loss: Any = F.cross_entropy(network(images), label[:, 0].long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        pipe.send((time.perf_counter() - start) / (amount * batch_size))


def main(
    slices: int = 2000,
    size_px: int = 256,
    batch_size: int = 8,
    workers: int = 0,
    turns: int = 20,
    filters: list[int] | None = None,
) -> None:
    """Measure.

    Args:
        slices: size of the set.
        size_px: side of a slice.
        batch_size: slices of a batch.
        workers: loader processes of each way of feeding; their memory is not counted.
        turns: measurements of each kind, of one batch in training and of four without; medians are shown.
        filters: of the U-Net; by default those of configs/laptop/unet.yaml.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    processes, ready = [], {}
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), slices, size_px)
        for feed in ("ours", "monai"):
            pipes[feed], theirs = context.Pipe()
            args = (theirs, feed, Path(folder), batch_size, workers, filters or [16, 32, 64, 128])
            processes.append(context.Process(target=serve, args=args))
            processes[-1].start()
            theirs.close()  # so that its end is noticed here
            ready[feed] = pipes[feed].recv()

        def ask(request: Any) -> list[Any]:
            answers = []
            for pipe in pipes.values():
                pipe.send(request)
                answers.append(pipe.recv())
            return answers

        def rates(request: tuple[int, bool]) -> list[float]:
            ask(request)  # warms up
            return [
                1 / float(np.median(seconds)) for seconds in zip(*(ask(request) for _ in range(turns)), strict=True)
            ]

        alone = rates((4, False))
        ask((slices // batch_size, False))  # every slice once
        memory = ask("memory")
        table = {
            "loader alone, images/s": alone,
            "training, images/s": rates((1, True)),
            "until the first batch, s": list(ready.values()),
            "unique memory, MiB": [one["unique"] for one in memory],
            "mapped files besides, MiB": [one["mapped"] for one in memory],
        }
        for pipe in pipes.values():
            pipe.send("end")
        for process in processes:
            process.join()
    lines = [f"{slices} slices of 5 x {size_px} x {size_px}, batches of {batch_size}, one thread, {workers} workers"]
    lines.append(f"{'':26}{'ours':>12}{'MONAI':>12}{'ratio':>8}")
    lines += [f"{name:26}{a:12.1f}{b:12.1f}{a / b:8.2f}" for name, (a, b) in table.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    auto_cli(main)
