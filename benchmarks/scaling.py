"""Training speed of a configuration on 1, 2, 4 processes, and what 64 GPUs would have to tell each other at every step.

    python benchmarks/scaling.py                                                                  gloo, on the CPU
    python benchmarks/scaling.py --config configs/stylegan2.yaml --size_px 256 --batch_size 8 --processes '[1, 2, 4, 8]'

Every number of processes is a run of train.py on the same random slices: nccl where there are GPUs, gloo elsewhere.
`batch_size` is that of each process, so all of them have the same to compute whatever their number, and twice as many
processes do twice as many images at best (weak scaling). The first epoch warms up and is not counted.

The bytes are counted where DistributedDataParallel hands its buckets to the network, one all-reduce each. In a ring of
n processes each sends and receives 2 (n - 1) / n times the bytes (Patarasuk and Yuan 2009). The time of the model is
that volume over the bandwidth, as if nothing of it were hidden behind the backward pass, so it is an upper bound of the
loss; latency is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from loader import write_random_set
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

ROOT = Path(__file__).parent.parent
CLUSTER = 64


class Meter(Callback):
    """Count seconds and all-reduced bytes of the epochs after the first, and write them to a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.bytes = self.steps = 0
        self.seconds = 0.0

    def _count(self, group: Any, bucket: Any) -> Any:
        self.bytes += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand between DistributedDataParallel and the network."""
        model: Any = trainer.strategy.model
        # A function without annotations, which torch would read as types.
        model.register_comm_hook(None, lambda group, bucket: self._count(group, bucket))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        if trainer.current_epoch == 1:
            self.bytes = 0
        self._start = _now(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Count a step; what comes after the last one is no training."""
        if trainer.current_epoch:
            self.steps += 1
            if trainer.is_last_batch:
                self.seconds += _now(pl_module) - self._start

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was counted."""
        if trainer.is_global_zero:
            parameters = sum(
                p.numel() for name, p in pl_module.named_parameters() if not name.startswith("ema_network")
            )
            values = {"seconds": self.seconds, "steps": self.steps, "bytes": self.bytes, "parameters": parameters}
            self.path.write_text(json.dumps(values))


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ring_bytes(count: int, processes: int) -> float:
    """Bytes that each process of a ring sends, and receives, to all-reduce `count` bytes."""
    return 2 * (processes - 1) / processes * count


def measure(folder: Path, config: str, options: list[str], processes: int, images: int) -> dict[str, float]:
    """Train on that many processes; `images` is the batch of all. Gives what `Meter` counts."""
    command = [sys.executable, str(ROOT / "train.py"), f"--config={config}", f"--run_dir={folder / str(processes)}"]
    command += [f"--data.root={folder / 'slices'}", f"--data.batch_size={images}", "--task=fit"]
    command += [f"--trainer.devices={processes}", "--trainer.callbacks+=scaling.Meter"]
    command += [f"--trainer.callbacks.path={folder / f'{processes}.json'}", *options]
    here = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": here}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    measured: dict[str, float] = json.loads((folder / f"{processes}.json").read_text())
    return measured


def main(
    config: str = str(ROOT / "configs/laptop/unet.yaml"),
    size_px: int = 64,
    batch_size: int = 16,
    steps: int = 20,
    epochs: int = 3,
    processes: tuple[int, ...] = (1, 2, 4),
    gbit_per_s: float = 200.0,
    options: str = "",
) -> None:
    """Measure, and print the model.

    Args:
        config: configuration of a training; its networks must fit `size_px`.
        size_px: side of the random slices.
        batch_size: images of a step of each process.
        steps: of an epoch.
        epochs: the first is not counted.
        processes: how many, one run after the other.
        gbit_per_s: bandwidth of the network for each GPU of the model.
        options: further ones of train.py.
    """
    runs = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slices").mkdir()
        write_random_set(folder / "slices", 512, size_px)
        for n in processes:
            images = n * batch_size
            more = [f"--data.epoch_images={images * steps}", f"--trainer.max_epochs={epochs}", *options.split()]
            runs[n] = measure(folder, config, more, n, images)
    rate = {n: n * batch_size * run["steps"] / run["seconds"] for n, run in runs.items()}
    first = processes[0]
    device = f"{torch.cuda.device_count()} GPUs, nccl" if torch.cuda.is_available() else f"{os.cpu_count()} cores, gloo"
    lines = [f"{config}: {size_px} px, {batch_size} images a step and process; {device}"]
    lines.append(f"{'processes':>10}{'images/s':>10}{'speed-up':>10}{'efficiency':>12}{'MiB a step':>12}")
    for n, run in runs.items():
        gain = rate[n] / rate[first]
        volume = run["bytes"] / run["steps"]
        lines.append(f"{n:10}{rate[n]:10.1f}{gain:10.2f}{gain * first / n:12.0%}{volume / 2**20:12.2f}")
    run = runs[processes[-1]]
    volume, parameters = run["bytes"] / run["steps"], run["parameters"]
    sent = ring_bytes(round(volume), CLUSTER)
    seconds, network = runs[first]["seconds"] / runs[first]["steps"], sent * 8 / (gbit_per_s * 1e9)
    lines += [
        f"{parameters:,} parameters of 4 bytes, {volume / parameters / 4:.2f} times a step: {volume / 1e6:.1f} MB",
        f"{CLUSTER} GPUs in a ring: each sends and receives {sent / 1e6:.1f} MB a step, {1000 * network:.1f} ms at "
        f"{gbit_per_s:g} Gbit/s,",
        f"beside {1000 * seconds:.0f} ms of computing as measured here: an efficiency of at least "
        f"{seconds / (seconds + network):.1%}, latency left out",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    auto_cli(main)
