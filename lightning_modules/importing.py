"""`standin import`: official checkpoints become checkpoints of ours, to sample from and to fine-tune.

Nothing in the file is executed or imported (`safe_pickle`). Image channels are sorted into the order of a slice set, by
the names that the user gives, so that everything downstream knows them by name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_modules.image_generator import LABEL_LEVELS, check_levels
from lightning_modules.official_checkpoints import OfficialCheckpoint, OfficialNetwork, torch_checkpoint
from lightning_modules.official_diffusion import DiffusionCheckpoint, Flags, diffusion_checkpoint
from lightning_modules.official_tensorflow import tensorflow_checkpoint
from lightning_modules.pickled_networks import NetworkRecord, read_network_pickle
from lightning_modules.pickled_tensors import (
    STORAGES,
    TENSORS,
    is_legacy_stream,
    read_legacy_stream,
    read_zip_archive,
)

CHANNELS = ("T1", "T1ce", "T2", "FLAIR", "label")
"""Names and order of the channels of a slice set."""


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    channels: str | None = None,
    label_levels: str | None = None,
    flags: Flags = Flags(),  # noqa: B008 (frozen)
) -> Path:
    """Turn an official checkpoint into one of ours, without executing anything that is in the file.

    Reads network pickles of StyleGAN 2 ADA and StyleGAN 3 (PyTorch), of progressive GAN and StyleGAN 1 (TensorFlow),
    and .pt files of guided and improved diffusion: for samples, that of the moving average (ema_*.pt). Writes
    OUT/imported.ckpt and OUT/model.yaml: `python train.py --config configs/stylegan2.yaml --config OUT/model.yaml
    --data.root SLICES` fine-tunes it, and with `--task predict` samples from it.

    Args:
        checkpoint: the official file; recognised by its content.
        out: folder for the result; new or empty.
        channels: names of the image channels in the order of the file, e.g. `t1,t2,flair,t1ce,label`. Needed if there
            are five; they are sorted into the order of a slice set (T1, T1ce, T2, FLAIR, label).
        label_levels: grey levels 0..255 of the four classes of the label in the images that the network was trained
            on, e.g. `0,51,102,204`, those of the paper. By default evenly spaced from 0 to 255.
        flags: of guided or improved diffusion: those of its training command that its weights do not tell.

    Returns:
        The folder.

    Raises:
        ValueError: if the file is not such a checkpoint or holds anything else, `channels` or `flags` do not fit, or
            `out` is not empty.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"Expected {out} to be a new or empty folder, but it is not. Choose another.")
    if not checkpoint.is_file():
        raise ValueError(f"Expected a checkpoint at {checkpoint}, but there is no such file.")
    data = checkpoint.read_bytes()
    try:
        official = read_official(data, flags)
        names = channel_names(channels, count_channels(official))
        levels = parse_levels(label_levels)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    source = {"file": checkpoint.name, "sha256": hashlib.sha256(data).hexdigest(), "kind": official.kind}
    write(official, names, levels, source, out)
    return out


def read_official(data: bytes, flags: Flags = Flags()) -> OfficialCheckpoint:  # noqa: B008 (frozen)
    """Recognise and convert the content of a file.

    Raises:
        ValueError: if it is no official checkpoint, cut off, or holds anything that such a one does not, or if there
            are flags, but it is not one of guided or improved diffusion.
    """
    if data[:4] == b"PK\x03\x04":
        return diffusion_checkpoint(read_zip_archive(data), flags)
    if is_legacy_stream(data):
        return diffusion_checkpoint(read_legacy_stream(data, STORAGES | TENSORS), flags)
    if flags != Flags():
        raise ValueError("--flags are those of guided or improved diffusion, but the file is not a .pt file of theirs")
    if data[:1] != b"\x80":
        raise ValueError("the file is neither a pickle (protocol 2 or later) nor what torch.save writes")
    content = read_network_pickle(data)
    if type(content) is tuple and len(content) == 3 and all(type(part) is NetworkRecord for part in content):
        return tensorflow_checkpoint(*content)
    if isinstance(content, dict) and "G_ema" in content:
        return torch_checkpoint(content)
    raise ValueError("the pickle is neither a dict with G_ema (PyTorch) nor a tuple of three networks (TensorFlow)")


def count_channels(official: OfficialCheckpoint) -> int:
    """Find out how many channels the images have.

    Raises:
        ValueError: if the networks disagree.
    """
    counts = {network.arguments["img_channels"] for network in official.networks.values()}
    if len(counts) != 1:
        raise ValueError(f"the networks have different numbers of image channels: {sorted(counts)}")
    count: int = counts.pop()
    return count


def channel_names(given: str | None, count: int) -> list[str]:
    """Name the channels of the file in its order: five are those of a slice set, others are called as the user likes.

    Args:
        given: names, separated by commas; None numbers them, where there are not five.
        count: how many there are.

    Raises:
        ValueError: if the names are missing, too few, too many, repeated or unknown.
    """
    known = {name.lower(): name for name in CHANNELS}
    if given is None:
        if count == len(CHANNELS):
            raise ValueError(
                f"the images have {count} channels: say which is which, in the order of the file, e.g. "
                f"--channels {','.join(known)}"
            )
        return [f"channel{index}" for index in range(count)]
    names = [known.get(name.strip().lower(), name.strip()) for name in given.split(",")]
    problems = []
    if len(names) != count:
        problems.append(f"the images have {count} channels, but --channels names {len(names)}")
    if len(set(names)) != len(names):
        problems.append("--channels names a channel twice")
    unknown = [name for name in names if name not in CHANNELS]
    if count == len(CHANNELS) and unknown:
        problems.append(f"--channels names {', '.join(unknown)}, but knows {', '.join(known)}")
    if problems:
        raise ValueError(f"{'; '.join(problems)} (got {given})")
    return names


def parse_levels(given: str | None) -> list[float]:
    """Read the grey levels of the classes.

    Args:
        given: four increasing numbers from 0 to 255, separated by commas; None for those of `LABEL_LEVELS`.

    Raises:
        ValueError: if they are anything else.
    """
    if given is None:
        return list(LABEL_LEVELS)
    try:
        return check_levels([float(level) for level in given.split(",")])
    except ValueError as error:
        raise ValueError(f"--label_levels {given}: expected four increasing numbers from 0 to 255") from error


def sort_channels(network: OfficialNetwork, order: Sequence[int]) -> dict[str, Tensor]:
    """Put the image channels of the weights that face the image into another order; give all weights."""
    sorted_weights = {}
    for name, weight in network.weights.items():
        axis = 0 if re.search(network.to_image, name) else 1 if re.search(network.from_image, name) else None
        if axis is not None:
            # A diffusion network that learns the variance has the channels twice.
            starts = range(0, weight.shape[axis], len(order))
            weight = weight.index_select(axis, torch.tensor([start + index for start in starts for index in order]))
        sorted_weights[name] = weight
    return sorted_weights


def write(
    official: OfficialCheckpoint, names: Sequence[str], levels: Sequence[float], source: dict[str, str], out: Path
) -> None:
    """Write the folder, under a temporary name first, so that nobody ever sees half of it."""
    ours = sorted(names) == sorted(CHANNELS)
    order = [names.index(name) for name in CHANNELS] if ours else list(range(len(names)))
    content = {
        "state_dict": {
            f"{prefix}.{name}": weight
            for prefix, network in official.networks.items()
            for name, weight in sort_channels(network, order).items()
        },
        "images_seen": 0,
        "channels": [names[index] for index in order],
        "init_args": {prefix: network.init_args() for prefix, network in official.networks.items()},
        "imported_from": source,
        "augment_p": official.augment_p,
        "lod": official.lod,
    }
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        with (temporary / "imported.ckpt").open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        (temporary / "model.yaml").write_text(model_yaml(official, levels, source, out))
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_yaml(official: OfficialCheckpoint, levels: Sequence[float], source: dict[str, str], out: Path) -> str:
    """Configure our training rule to start from the imported weights."""
    arguments: dict[str, Any] = {
        name: {"class_path": network.class_path, "init_args": network.init_args()}
        for name, network in official.networks.items()
        if name != "ema_network"
    }
    if official.lod is not None:  # a network that was grown goes on at full resolution
        resolution = official.networks["generator"].arguments["img_resolution"]
        arguments["growing"] = {"img_resolution": resolution, "lod_initial_resolution": resolution}
    if isinstance(official, DiffusionCheckpoint):
        arguments |= official.settings
    arguments["label_levels"] = list(levels)
    arguments["init_from"] = str(out.absolute() / "imported.ckpt")
    model = {"model": {"class_path": official.model, "init_args": arguments}}
    return (
        f"# {source['kind']} {source['file']!a}, imported by `standin import`. Goes behind a config of that model:\n"
        "# python train.py --config configs/... --config .../model.yaml --data.root SLICES\n"
        f"{yaml.safe_dump(model, sort_keys=False)}"
    )
