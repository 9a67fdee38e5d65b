"""A small slice set with round heads and round tumours, and the command lines that train tiny models on it."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from datamodules.slice_set import class_pixels, finish_slice_set, save_shard

ROOT = Path(__file__).parent.parent
SPLITS = {"train": 5, "val": 1, "test": 2}


def write_slice_set(root: Path, size_px: int = 16, slices_per_patient: int = 6, shards: int = 2, seed: int = 0) -> Path:
    """Write a real set of 8 patients; the numbers of slices differ among the patients."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:size_px, :size_px] - (size_px - 1) / 2
    brain = np.hypot(rows, cols) < 0.4 * size_px
    split = [name for name, count in SPLITS.items() for _ in range(count)]
    index, slices = [], []
    for patient, name in enumerate(split):
        for z in range(slices_per_patient + patient % 3):
            centre, radius = rng.uniform(-0.15, 0.15, 2) * size_px, rng.uniform(0.08, 0.2) * size_px
            distance = np.hypot(rows - centre[0], cols - centre[1])
            label = ((distance < 1.6 * radius) * 2).astype(np.uint8)
            label[distance < radius] = 3
            label[distance < 0.5 * radius] = 1
            label *= brain
            grey = [90 + 30 * patient % 40 + 60 * (label == k) + rng.normal(0, 8, brain.shape) for k in (1, 3, 2, 2)]
            slices.append(np.stack([*(np.clip(g, 1, 255) * brain for g in grey), label]).astype(np.uint8))
            index.append({"patient": f"P{patient}", "volume": f"P{patient}", "z": z, "split": name})
    everything = np.stack(slices)
    for number, part in enumerate(np.array_split(everything, shards)):
        save_shard(root / f"slices-{number:05d}.npy", part)
    table = pd.concat([pd.DataFrame(index), class_pixels(everything[:, 4])], axis=1)
    native = {
        "shape": [size_px, size_px, slices_per_patient + 2],
        "axes": "LPS",
        "affine": np.diag([-1.0, -1.0, 1.0, 1.0]).tolist(),
        "qform_code": 1,
        "sform_code": 1,
        "label_codes": [0, 1, 2, 4],
    }
    volumes = [{"volume": f"P{patient}", "layout": "BraTS 2021", "native": native} for patient in range(len(split))]
    finish_slice_set(root, table, {"kind": "real", "spacing_mm": 1.0, "downsampling": 1, "volumes": volumes})
    return root


def _networks(**arguments: int) -> list[str]:
    return [f"--model.{net}.init_args.{k}={v}" for net in ("generator", "discriminator") for k, v in arguments.items()]


_STYLE = _networks(img_resolution=16, channel_base=128, channel_max=12)
_GROWN = _networks(img_resolution=16, fmap_base=64, fmap_max=12)
_UNET = [
    f"--model.network.init_args.{word}"
    for word in (
        "img_resolution=16",
        "model_channels=64",  # with one channel per group, normalization would take the gradient of biases away
        "channel_mult=[1, 1]",
        "num_res_blocks=1",
        "attention_resolutions_px=[8]",
    )
]
_GROWING = [
    "--model.growing.img_resolution=16",
    "--model.growing.training_kimg=0.016",
    "--model.growing.transition_kimg=0.048",  # 48 images end in the middle of a fade-in
    "--model.growing.minibatch={4: 16, 8: 8, 16: 8}",
]
_TRANSFORMER = ("depths=[1, 1, 1, 1]", "num_heads=[1, 1, 2, 2]", "window_size=2")
SEGMENTERS = {
    "DynUNet": (
        *("kernel_size=[3, 3, 3]", "strides=[1, 2, 2]", "upsample_kernel_size=[2, 2]", "filters=[4, 6, 8]"),
        "deep_supr_num=1",
    ),
    "SwinUPerNet": (*_TRANSFORMER, "embed_dim=4", "patch_size=2", "head_channels=8", "auxiliary_channels=8"),
    "SwinUNETR": (*_TRANSFORMER, "feature_size=12"),
    "SegResNet": ("init_filters=8", "blocks_down=[1, 1]", "blocks_up=[1]"),
    "UNet": ("channels=[4, 6, 8]", "strides=[2, 2]", "num_res_units=1"),
}
COPY_DETECTOR = [f"--model.{word}" for word in ("widths=[8, 16]", "blocks=1", "embedding_width=12", "norm_groups=2")]
AUTOENCODER = [f"--model.{word}" for word in ("widths=[4, 8]", "res_blocks=1", "norm_groups=2")]
_STYLE3 = [*_STYLE, "--model.generator.init_args.num_layers=4", "--model.r1_interval=2"]
GENERATORS = {
    "stylegan2": [*_STYLE, "--model.path_length_weight=2", "--model.r1_interval=2"],
    "stylegan3_t": _STYLE3,
    "stylegan3_r": _STYLE3,
    "stylegan1": [
        # As published. With gamma 2 and 2 layers, two threads instead of one end 0.13 of the way apart, by rounding.
        *(*_GROWN, *_GROWING, "--model.r1_gamma=10", "--model.generator.init_args.mapping_num_layers=8"),
    ],
    "progressive_gan": [*_GROWN, *_GROWING],
    "diffusion": [*_UNET, "--model.sampler.init_args.steps=3", "--model.rampup_kimg=0.02"],
}


def generator_args(model: str, run_dir: Path, slices: Path) -> list[str]:
    """A generator of 16 px that sees 48 images; every phase is due in the first iteration."""
    words = GENERATORS[model]
    return [
        f"--config=configs/laptop/{model}.yaml",
        f"--run_dir={run_dir}",
        f"--data.root={slices}",
        *words,
        "--data.batch_size=16" if _GROWING[0] in words else "--data.batch_size=8",
        "--data.epoch_images=16",
        "--trainer.max_epochs=3",
        "--synthetic_slices=100",
    ]


def stylegan2_args(run_dir: Path, slices: Path) -> list[str]:
    """The StyleGAN 2 of `generator_args`."""
    return generator_args("stylegan2", run_dir, slices)


def unet_args(run_dir: Path, slices: Path) -> list[str]:
    """A U-Net that sees 48 images."""
    return [
        "--config=configs/laptop/unet.yaml",
        f"--run_dir={run_dir}",
        f"--data.root={slices}",
        "--model.network.init_args.filters=[4, 6, 8, 8]",
        "--data.batch_size=8",
        "--data.epoch_images=16",
        "--trainer.max_epochs=3",
    ]


def shrunk(config: Path, run_dir: Path, slices: Path) -> list[str]:
    """A shipped configuration at 16 px, with narrow networks, for one iteration and 4 synthetic slices."""
    text = config.read_text()
    common = ["--data.batch_size=8", "--data.epoch_images=8", "--data.num_workers=0", "--trainer.max_epochs=1"]
    start = [f"--config={config}", f"--run_dir={run_dir}", f"--data.root={slices}"]
    if "SegmentationModule" in text:
        small = next(words for name, words in SEGMENTERS.items() if f".{name}" in text)
        return [*start, *(f"--model.network.init_args.{word}" for word in small), *common]
    if "autoencoder.Autoencoder" in text:
        return [*start, *AUTOENCODER, *common]
    if "CopyDetector" in text:
        return [*start, *COPY_DETECTOR, *common]
    words = _STYLE
    if "growing:" in text:
        words = [*_GROWN, "--model.growing.img_resolution=16", "--model.growing.minibatch={4: 8, 8: 8, 16: 4}"]
    elif "Diffusion" in text:
        words = [*_UNET, "--model.sampler.init_args.steps=2"]
        if "autoencoder:" in text:  # latents of 4 channels and 8 px
            words += [
                f"--model.network.init_args.{word}" for word in ("img_resolution=8", "attention_resolutions_px=[4]")
            ]
    return [*start, *words, *common, "--synthetic_slices=4"]


# A server that has imported everything forks the training processes, so that each begins at once.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "train",
        "callbacks",
        *(f"lightning_modules.{name}" for name in ("stylegan1", "progressive_gan", "diffusion", "copy_detection")),
    ]
)


def _run_train(args: list[str], folder: str) -> None:
    """Be `python train.py args` in a process of its own, with its output in two files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    os.environ.update(environment())
    sys.argv = [str(ROOT / "train.py"), *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def train(args: list[str], launcher: list[str] | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run train.py as a user does, on one thread, so that results repeat bit for bit."""
    command = [*(launcher or [sys.executable]), str(ROOT / "train.py"), *args]
    if launcher is not None:
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the server when it imports torch
        with tempfile.TemporaryDirectory() as folder:
            process = _SERVER.Process(target=_run_train, args=(args, folder))
            process.start()
            process.join(timeout=300)
            if process.exitcode is None:
                process.kill()
                raise AssertionError(f"{command} did not end within 300 s")
            out, err = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
            done = subprocess.CompletedProcess(command, process.exitcode, out, err)
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def environment() -> dict[str, str]:
    """The environment of a training process of the tests."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "160"}
