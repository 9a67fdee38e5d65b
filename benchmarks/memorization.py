"""The search for memorized slices against what one would use instead, and against the bare rate of the machine.

    python benchmarks/memorization.py [--synthetic 16384] [--training 16384] [--size_px 128] [--threads 1]

Writes two slice sets of random heads into a temporary folder. In one run and on the same slices it measures

- ours: the largest Pearson correlation of every synthetic slice with all training slices in each of the five channels,
  over the modalities and over all channels, read from disk within 2 GiB; and all 18 scores of `standin memorization`
  with the five nearest of each, which need nine matrix products instead of five;
- the bare products: `torch._int_mm` (float32 where the machine has no exact int8) on tiles that lie in memory, of the
  shape that is fastest, nothing else;
- FAISS `IndexFlatIP` on float32 vectors of norm 1, all channels as one vector, index already built (if `faiss-cpu` is
  installed, which StandIn does not need);
- `numpy.corrcoef` of blocks, all channels as one vector;
- `scipy.stats.pearsonr` pair by pair, one channel, as published scripts do.

Everything but ours sees fewer pairs (`--others`), scaled up: their time per pair does not depend on the number. Rounds
are interleaved, and a ratio is the median of the rounds. Times are seconds of CPU, which neighbours on a shared machine
disturb less than the clock on the wall; with several threads they are divided by these.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import auto_cli
from scipy.stats import pearsonr

sys.path.insert(0, str(Path(__file__).parent.parent))

from datamodules.slice_set import MODALITIES, SliceSet, class_pixels, finish_slice_set, save_shard
from metrics import exact_product
from metrics.correlation_search import Search
from metrics.memorization import LABEL_STEP, memorization_scores, memorization_view
from metrics.pixel_loader import PixelLoader
from metrics.pixels import Score
from metrics.similarity import Pearson

MEMORY_BYTES = 2 << 30
BLOCK = 512
PATIENT = 64
SHAPES = ((1024, 512), (2048, 512), (2048, 1024), (4096, 512))
CHANNELS = 5


def heads(count: int, size_px: int, seed: int) -> npt.NDArray[np.uint8]:
    """Random heads: an outline, a smooth texture of each patient that changes along z, noise; about half background."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(-1, 1, size_px)
    slices = np.zeros((count, CHANNELS, size_px, size_px), np.uint8)
    coarse = torch.nn.functional.interpolate
    for first in range(0, count, PATIENT):
        n = min(PATIENT, count - first)
        field = torch.from_numpy(rng.normal(size=(1, CHANNELS, 8, 12, 12)).astype(np.float32))
        grey = coarse(field, (PATIENT, size_px, size_px), mode="trilinear")[0].numpy().swapaxes(0, 1)[:n]
        radius = 0.8 * (1 - np.linspace(-0.6, 0.6, PATIENT)[:n] ** 2)
        brain = np.hypot(axis[:, None] / rng.uniform(0.85, 1), axis) < radius[:, None, None]
        noisy = 110 + 45 * grey + rng.normal(0, 6, grey.shape).astype(np.float32)
        slices[first : first + n] = np.clip(noisy, 1, 255) * brain[:, None]
        slices[first : first + n, 4] = (grey[:, 4] > 1.2) * (1 + (grey[:, 3] > 0)) * brain
    return slices


def write_set(root: Path, count: int, size_px: int, seed: int) -> SliceSet:
    """Write a slice set of random heads."""
    root.mkdir()
    slices = heads(count, size_px, seed)
    save_shard(root / "slices-00000.npy", slices)
    patient = [f"P{i // PATIENT}" for i in range(count)]
    index = class_pixels(slices[:, 4]).assign(patient=patient, volume=patient, z=np.arange(count), split="train")
    finish_slice_set(root, index, {"kind": "real", "spacing_mm": 1.0})
    return SliceSet(root)


class PeakMemory:
    """Largest memory that a block takes beyond what there was, without pages of mapped files; NaN outside Linux."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self.now()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def gib(self) -> float:
        """The result."""
        return (self.peak - self.start) / 2**30

    def watch(self) -> None:
        """Note the largest value until the block ends."""
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.02)

    @staticmethod
    def now() -> float:
        """Anonymous resident memory in bytes."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return float("nan")
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def grey_label(slices: torch.Tensor) -> list[torch.Tensor]:
    """The five channels, with the label as grey levels."""
    return [*slices[:, :4].unbind(1), slices[:, 4] * LABEL_STEP]


def ours(synthetic: SliceSet, training: SliceSet, everything: bool) -> None:
    """Search all synthetic slices, as many at a time as fit."""
    pearson = Pearson()
    scores = [Score(name, (c,), pearson) for c, name in enumerate((*MODALITIES, "label"))]
    scores += [Score("all", (0, 1, 2, 3), pearson), Score("all + label", (0, 1, 2, 3, 4), pearson)]
    if everything:
        scores = memorization_scores(MODALITIES)
    view = memorization_view if everything else grey_label
    loaders = [PixelLoader(slices, view) for slices in (synthetic, training)]
    slice_bytes = int(np.prod(loaders[0].shape))
    share = min(len(synthetic), (MEMORY_BYTES - 3 * BLOCK * slice_bytes) // slice_bytes)
    for start in range(0, len(synthetic), share):
        search_share(loaders, np.arange(start, min(start + share, len(synthetic))), scores, 5 if everything else 1)


def search_share(
    loaders: Sequence[PixelLoader], positions: npt.NDArray[np.int64], scores: Sequence[Score], k: int
) -> None:
    """Search some synthetic slices; their memory ends with the call."""
    search = Search(loaders[0].load(positions), scores, k)
    for first, block in loaders[1].blocks(BLOCK):
        search.compare(block, first)


def bare(pixels: int) -> tuple[Callable[[], object], float, str]:
    """The bare product on its fastest tile: a function, its multiplications and additions, what it is."""
    has_int8 = exact_product._fastest(torch.device("cpu")) is exact_product._int8
    generator = torch.Generator().manual_seed(0)
    candidates = []
    for rows, columns in SHAPES:
        x, y = (torch.randint(-128, 128, (n, pixels), dtype=torch.int8, generator=generator) for n in (rows, columns))
        if has_int8:
            run = partial(torch._int_mm, x, y.T, out=torch.empty(rows, columns, dtype=torch.int32))
        else:
            run = partial(torch.mm, x.float(), y.float().T, out=torch.empty(rows, columns))
        operations = 2.0 * rows * columns * pixels
        seconds = min(cpu_seconds(run) for _ in range(4))
        candidates.append((seconds / operations, run, operations, f"{rows} x {columns}"))
    _, run, operations, tile = min(candidates, key=lambda candidate: candidate[0])
    return run, operations, f"{'int8' if has_int8 else 'float32'} {tile}"


def cpu_seconds(run: Callable[[], object]) -> float:
    """Seconds of CPU per thread."""
    start = time.process_time()
    run()
    return (time.process_time() - start) / torch.get_num_threads()


def main(
    synthetic: int = 16384,
    training: int = 16384,
    size_px: int = 128,
    others: int = 1024,
    rounds: int = 3,
    threads: int = 1,
) -> None:
    """Measure and print.

    Args:
        synthetic: number of synthetic slices.
        training: number of training slices.
        size_px: side of the slices.
        others: synthetic and training slices that FAISS and numpy see.
        rounds: interleaved rounds.
        threads: of everything.
    """
    torch.set_num_threads(threads)
    pixels = size_px**2
    with tempfile.TemporaryDirectory() as folder:
        made = write_set(Path(folder) / "synthetic", synthetic, size_px, seed=1)
        real = write_set(Path(folder) / "real", training, size_px, seed=2)
        memory = {}
        for everything in (False, True):
            with PeakMemory() as peak:
                ours(made, real, everything)
            memory[everything] = peak.gib
        product, operations, tile = bare(pixels)
        runs: dict[str, tuple[Callable[[], object], float]] = {}  # and the pairs of channels that it is given
        pairs = float(synthetic) * training
        runs["bare product"] = product, operations / (2 * pixels)
        runs["ours, 7 scores"] = lambda: ours(made, real, False), pairs * CHANNELS
        runs["ours, 18 scores, k = 5"] = lambda: ours(made, real, True), pairs * 9
        x, y = (
            s.read(range(min(others, len(s)))).reshape(-1, CHANNELS * pixels).astype(np.float32) for s in (made, real)
        )
        for vectors in (x, y):
            vectors -= vectors.mean(axis=1, keepdims=True)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        try:
            import faiss
        except ImportError:
            print("faiss-cpu is not installed: FAISS is left out")
        else:
            faiss.omp_set_num_threads(threads)
            index = faiss.IndexFlatIP(x.shape[1])
            index.add(y)
            runs["FAISS IndexFlatIP"] = lambda: index.search(x, 1), float(len(x) * len(y) * CHANNELS)
        few = min(256, len(x), len(y))
        runs["numpy.corrcoef"] = (
            lambda: np.corrcoef(x[:few], y[:few])[:few, few:].argmax(axis=1),
            float(few * few * CHANNELS),
        )
        one = y[0, :pixels].astype(np.float64)
        runs["scipy.stats.pearsonr"] = lambda: [pearsonr(row[:pixels], one) for row in x[:100]], float(min(100, len(x)))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, (run, count) in runs.items():
                repeats = 5 if name == "bare product" else 1
                taken = sum(cpu_seconds(run) for _ in range(repeats)) / repeats
                seconds[name].append(taken / count)
    print(f"{synthetic} synthetic x {training} training slices of 5 x {size_px} x {size_px}; {threads} thread(s)")
    print(f"bare product: {tile} x {pixels}; memory of ours: {memory[False]:.2f} and {memory[True]:.2f} GiB")
    print(f"{'':24} {'10^9 op/s':>10} {'of bare':>8} {'x FAISS':>8} {'hours for 100,000 x 91,271':>28}")
    for name, of_pair in seconds.items():
        rate = 2 * pixels / statistics.median(of_pair) / 1e9
        share = statistics.median(b / t for b, t in zip(seconds["bare product"], of_pair, strict=True))
        faster = [f / t for f, t in zip(seconds.get("FAISS IndexFlatIP", []), of_pair, strict=False)]
        channels = 9 if "18" in name else 1 if "pearsonr" in name else CHANNELS
        hours = statistics.median(of_pair) * 100_000 * 91_271 * channels / 3600
        text = f"{statistics.median(faster):8.1f}" if faster else " " * 8
        print(f"{name:24} {rate:10.1f} {share:8.2f} {text} {hours:28.1f}")


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    auto_cli(main, as_positional=False)
