"""What fewer evaluations of the network cost: images per second, Fréchet distance and Dice for every sampler.

    python benchmarks/diffusion_sampling.py RUN CONFIGURATION SLICES OUT [--images 1000]

RUN is a finished run of a diffusion model and CONFIGURATION the YAML that it was trained with; SLICES its real set.
Every sampler emits a synthetic set of the same size from the same weights, as a user would (`train.py --task predict`),
ancestral sampling and DDIM along the paper's chain of 4000 steps, which any model can follow;
a U-Net is trained on each, and on the real slices, and tested on the real test patients (Dice, means over classes and
patients). The Fréchet distance is that of the deepest features of the U-Net that was trained on real slices, of the
synthetic against the real training slices; beside it is the floor, that of the real test slices. What is there already
is not done again. Times are of whole emissions, less that of one with a single step, which is the start of the program.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parent.parent))

from datamodules.slice_set import SliceSet
from lightning_modules.segmentation import SegmentationModule, normalize
from metrics.fidelity import frechet_distance

ROOT = Path(__file__).parent.parent
CHAIN = {"class_path": "lightning_modules.diffusion_chain.DiffusionChain", "init_args": {"steps": 4000}}
KARRAS = {"class_path": "lightning_modules.noise_levels.Karras"}
SAMPLERS = {
    "start of the program": ("DDIM", {"steps": 1, "spacing": KARRAS}, 1),
    "ancestral 4000": ("Ancestral", {"steps": 4000, "variance": "large", "spacing": CHAIN}, 4000),
    "ancestral 250": ("Ancestral", {"steps": 250, "spacing": CHAIN}, 250),
    "DDIM 50": ("DDIM", {"steps": 50, "spacing": CHAIN}, 50),
    "DPM-Solver++ 20": ("DPMSolverPP2M", {"steps": 20, "spacing": KARRAS}, 20),
    "Heun 18": ("Heun", {"steps": 18, "spacing": KARRAS}, 35),
}


def train(*words: str) -> float:
    """Run train.py; give its seconds."""
    clock = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - clock


def emit(name: str, config: Path, checkpoint: Path, slices: Path, out: Path, images: int) -> float:
    """Make a synthetic set; give the seconds that it took, kept beside it."""
    sampler, options, _ = SAMPLERS[name]
    record = out / "seconds.json"
    if not record.exists():
        words = [f"--model.sampler=lightning_modules.sampling.{sampler}"]
        words += [
            f"--model.sampler.init_args.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in options.items()
        ]
        common = [f"--config={config}", f"--run_dir={out}", f"--data.root={slices}", f"--synthetic_slices={images}"]
        seconds = train(*common, *words, f"--model.init_from={checkpoint}", "--task=predict")
        record.write_text(json.dumps(seconds))
    return float(json.loads(record.read_text()))


def segment(out: Path, slices: Path, train_on: Path | None, words: list[str]) -> float:
    """Train a U-Net on a set, None for the real one, and give its mean Dice on the real test patients."""
    if not (out / "metrics.json").exists() or "dice/test" not in json.loads((out / "metrics.json").read_text()):
        part = [] if train_on is None else [f"--data.train=[{{path: {train_on}}}]"]
        train(
            f"--config={ROOT / 'configs/laptop/unet.yaml'}", f"--run_dir={out}", f"--data.root={slices}", *part, *words
        )
    return float(json.loads((out / "metrics.json").read_text())["dice/test"])


@torch.no_grad()
def features(segmenter: SegmentationModule, slices: SliceSet, count: int, seed: int = 0) -> torch.Tensor:
    """Means over the pixels of the deepest features, of slices drawn at random: (count, D)."""
    found: list[torch.Tensor] = []
    network = segmenter.network
    hook = network.bottleneck.register_forward_hook(lambda module, x, y: found.append(y.mean(dim=(2, 3))))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(slices))[:count])
    for part in np.array_split(chosen, -(-len(chosen) // 64)):
        network(normalize(torch.from_numpy(slices.read(part))[:, :4]))
    hook.remove()
    return torch.cat(found)


def main(
    run: Path,
    configuration: Path,
    slices: Path,
    out: Path,
    images: int = 1000,
    samplers: list[str] | None = None,
    segmenter_epochs: int = 10,
) -> None:
    """Measure.

    Args:
        run: folder of a trained diffusion model.
        configuration: YAML that it was trained with.
        slices: real slice set.
        out: folder for everything that is made.
        images: of every synthetic set.
        samplers: which of `SAMPLERS`; all by default.
        segmenter_epochs: epochs of 800 slices of each U-Net.
    """
    words = [f"--trainer.max_epochs={segmenter_epochs}"]
    real_dice = segment(out / "unet-real", slices, None, words)
    best = sorted((out / "unet-real" / "checkpoints").glob("best*.ckpt"))[-1]
    segmenter = SegmentationModule.load_from_checkpoint(best, map_location="cpu", weights_only=False).eval()
    training, test = SliceSet(slices, "train"), SliceSet(slices, "test")
    count = min(images, len(test))
    reference = features(segmenter, training, len(training))
    floor = float(frechet_distance(reference, features(segmenter, test, count)))
    sys.stdout.write(f"{images} images; Fréchet distance of {count} slices to the training slices\n")
    sys.stdout.write(f"{'':22}{'evaluations':>12}{'images/s':>10}{'Fréchet':>9}{'Dice':>7}{'to real':>9}\n")
    sys.stdout.write(f"{'real':22}{'':>12}{'':>10}{floor:9.4f}{real_dice:7.3f}{1:9.3f}\n")
    begin = emit("start of the program", configuration, run / "checkpoints/last.ckpt", slices, out / "start", images)
    for name in samplers or list(SAMPLERS)[1:]:
        folder = out / name.replace(" ", "-")
        seconds = emit(name, configuration, run / "checkpoints/last.ckpt", slices, folder, images)
        distance = float(frechet_distance(reference, features(segmenter, SliceSet(folder / "synthetic"), count)))
        dice = segment(out / f"unet-{folder.name}", slices, folder / "synthetic", words)
        rate = images / max(seconds - begin, 1e-9)
        evaluations = SAMPLERS[name][2]
        sys.stdout.write(f"{name:22}{evaluations:12}{rate:10.3f}{distance:9.4f}{dice:7.3f}{dice / real_dice:9.3f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
