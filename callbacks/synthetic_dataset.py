"""Emission of a synthetic slice set from a generator."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from datamodules.shards import ShardWriter
from datamodules.slice_set import class_pixels, finish_slice_set, read_manifest, save_shard, write_atomically
from lightning_modules.image_generator import ImageGenerator, ImagePlan

BATCH_ON_CPU = 64
TRIAL = 8
SHARE_OF_MEMORY = 0.7


class SyntheticDataset(Callback):
    """Write the images that `predict` makes as a slice set, `<run_dir>/synthetic`.

    Batch k holds the images k * batch_size, ... and is made as a whole by one rank, so the set is the same byte for
    byte for any number of processes. A finished batch is a file of its own until all are there: an interrupted emission
    goes on where it stopped. A set of other weights is replaced when the new one is complete. What it cost is in
    `<run_dir>/emission.json`, apart from the set.

    Args:
        slices: how many images.
        seed: image i depends on the weights, this seed and i.
        batch_size: images made at once; "auto" takes the power of two that fits into 70 % of the free memory of the
            GPU, up to 1024 (64 on a CPU). An emission that goes on keeps the number that it began with.
        shard_mib: largest size of a file of the finished set.
        compiled: use `torch.compile`, which needs a C++ compiler on the CPU. On a CPU it made StyleGAN 2 a third faster
            after 12 s of compilation, and StyleGAN 3 slower. The images differ by rounding.
    """

    def __init__(
        self,
        slices: int = 10_000,
        seed: int = 0,
        batch_size: int | Literal["auto"] = 64,
        shard_mib: int = 1024,
        compiled: bool = False,
    ) -> None:
        for name, value in (("slices", slices), ("batch_size", batch_size), ("shard_mib", shard_mib)):
            if value != "auto" and value < 1:
                raise ValueError(f"SyntheticDataset: expected {name} to be at least 1, but got {value}.")
        self.slices = slices
        self.seed = seed
        self.wanted_batch_size = batch_size
        self.shard_mib = shard_mib
        self.compiled = compiled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the generator which images to make."""
        if not isinstance(pl_module, ImageGenerator):
            raise ValueError(f"SyntheticDataset writes what image generators make, not {type(pl_module).__name__}.")
        self.final = Path(trainer.default_root_dir) / "synthetic"
        self.partial = self.final.with_name("synthetic.partial")
        if stage == "predict":
            pl_module.image_plan = ImagePlan(self.seed, lambda: self._share(trainer, pl_module))

    def _share(self, trainer: Trainer, generator: ImageGenerator) -> Sequence[range]:
        """List this rank's part of the batches that are not on disk yet; clear away what other weights have left.

        A rank without work repeats the last batch, because Lightning calls no hooks (where the ranks wait for each
        other) for an empty loader.
        """
        self.batch_size = trainer.strategy.broadcast(self._batch_size(generator))
        self.weights = weights_hash(_sampled(generator))
        self.hyperparameters = {name: _plain(value) for name, value in generator.hparams.items()}
        settings = (
            *(self.weights, self.seed, self.batch_size, self.hyperparameters, str(trainer.precision)),
            *(["compiled"] if self.compiled else []),
        )
        self.plan = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        batches = [range(start, start + self.batch_size) for start in range(0, self.slices, self.batch_size)]
        missing = []
        if trainer.is_global_zero and not self._is_complete():
            plan = {"plan_sha256": self.plan, "batch_size": self.batch_size}
            written = self.partial / "plan.json"
            if written.exists() and json.loads(written.read_text()) != plan:
                shutil.rmtree(self.partial)
            if not written.exists():
                (self.final.parent / "emission.json").unlink(missing_ok=True)  # that of other weights
            self.partial.mkdir(parents=True, exist_ok=True)
            write_atomically(written, json.dumps(plan))
            missing = [b for b in batches if not self._part(b.start).exists()]
        # One list for all: a file system may show the ranks different things.
        missing = trainer.strategy.broadcast(missing)
        self.to_make = sum(len(batch) for batch in missing)
        return missing[trainer.global_rank :: trainer.world_size] or batches[-1:]

    def _batch_size(self, generator: ImageGenerator) -> int:
        if self.wanted_batch_size != "auto":
            return self.wanted_batch_size
        if (self.partial / "plan.json").exists():
            return int(json.loads((self.partial / "plan.json").read_text())["batch_size"])
        if (self.final / "dataset.json").exists():
            return int(read_manifest(self.final).content["batch_size"])
        return fitting_batch_size(generator)

    def _is_complete(self) -> bool:
        if not (self.final / "dataset.json").exists():
            return False
        content = read_manifest(self.final).content
        return (content["plan_sha256"], content["slices"]) == (self.plan, self.slices)

    def _part(self, start: int) -> Path:
        return self.partial / f"part-{start:09d}.npy"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; compile the network if that is wanted."""
        assert isinstance(pl_module, ImageGenerator)
        if self.compiled:
            _sampled(pl_module).compile()
        self.began = time.monotonic()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Write a batch; outputs is uint8 (N, 5, H, W)."""
        slices: Tensor = outputs
        start = int(batch[0])
        if not self._is_complete() and not self._part(start).exists():
            save_shard(self._part(start), slices.cpu().numpy())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the batches together when all ranks are done."""
        trainer.strategy.barrier("synthetic set: batches")
        if trainer.is_global_zero and self.to_make:
            assert isinstance(pl_module, ImageGenerator)
            cost = {
                "images": self.to_make,
                "seconds": round(time.monotonic() - self.began, 3),
                "evaluations_per_image": pl_module.evaluations_per_image,
                "processes": trainer.world_size,
            }
            write_atomically(Path(trainer.default_root_dir) / "emission.json", json.dumps(cost, indent=1) + "\n")
        if trainer.is_global_zero and not self._is_complete():
            self._assemble(trainer, pl_module)
        trainer.strategy.barrier("synthetic set: complete")

    def _assemble(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for leftover in self.partial.glob("slices-*.npy"):
            leftover.unlink()
        labels = []
        writer: ShardWriter | None = None
        for start in range(0, self.slices, self.batch_size):
            part = np.load(self._part(start), mmap_mode="r")[: self.slices - start]
            labels.append(class_pixels(part[:, -1]))
            writer = writer or ShardWriter(self.partial, part.shape[1:], self.slices, self.shard_mib)
            writer.write(part)
        name = [f"synthetic-{self.weights[:8]}-{self.seed}-{i:07d}" for i in range(self.slices)]
        index = pd.concat(labels, ignore_index=True).assign(patient=name, volume=name, z=0, split="train")
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        description = {
            "kind": "synthetic",
            "spacing_mm": datamodule.real.manifest.spacing_mm,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "weights_sha256": self.weights,
            "plan_sha256": self.plan,
            "precision": str(trainer.precision),
            "compiled": self.compiled,
            "generator": f"{type(pl_module).__module__}.{type(pl_module).__name__}",
            "hyperparameters": self.hyperparameters,
            "images_seen": getattr(pl_module, "images_seen", 0),
            **datamodule.seen.as_json(),
            "trained_on": [part.manifest.fingerprint for part in datamodule.training_sets],
            "filtered": "nothing",
            "standin_version": version("standin"),
        }
        finish_slice_set(self.partial, index, description)
        for path in [*self.partial.glob("part-*.npy"), self.partial / "plan.json"]:
            path.unlink()
        if self.final.exists():
            shutil.rmtree(self.final)
        self.partial.rename(self.final)


def _sampled(generator: ImageGenerator) -> nn.Module:
    return generator.sampled_network if generator.ema_network is None else generator.ema_network


@torch.no_grad()
def fitting_batch_size(generator: ImageGenerator) -> int:
    """Find how many images a GPU can make at once, from the memory that a trial of 8 takes."""
    if generator.device.type != "cuda":
        return BATCH_ON_CPU
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(generator.device)
    before = torch.cuda.memory_allocated(generator.device)
    generator.try_out(torch.arange(TRIAL, device=generator.device))
    per_image = (torch.cuda.max_memory_allocated(generator.device) - before) / TRIAL
    free, _ = torch.cuda.mem_get_info(generator.device)
    return power_of_two_below(SHARE_OF_MEMORY * free / per_image)


def power_of_two_below(images: float) -> int:
    """Give the largest power of two that is not above, from 1 to 1024."""
    return int(2 ** min(max(math.floor(math.log2(max(images, 1))), 0), 10))


def weights_hash(network: nn.Module) -> str:
    """Hash names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Keep what JSON can hold; objects become their class names, infinity its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return type(value).__name__
