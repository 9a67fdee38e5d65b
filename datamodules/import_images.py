"""`standin import-images`: a folder of pictures, one 8-bit grey PNG or TIFF per channel, as a synthetic slice set.

The published synthetic sets of Usman Akbar, Larsson, Blystad, Eklund (Scientific Data 11:259, 2024; BRGANDI on the AIDA
Data Hub, 10.23698/aida/synthetic/brgandi) are of this kind. A file says which channel it is by the end of its name or,
where that says nothing, by its folder, in small or capital letters: T1, T1ce, T2, flair, seg. What is left of the path
names the slice, so all forms of the authors' programs (repository muhamadusman/Assist, commit 43035d2, MIT) are read:
`T1CE/Subject_0002_slice_78_T1ce.png`, `flair/image_17_flair.png`, `SEG/seed0002_Seg.png`, or all in one folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image

from datamodules.export_images import ENDINGS, PAPER_LEVELS
from datamodules.exports import as_json, shown
from datamodules.leak_guard import Seen, read_aliases
from datamodules.parallel import available_cores, run_in_processes
from datamodules.shards import ShardWriter
from datamodules.slice_set import (
    CHANNELS,
    MODALITIES,
    Slices,
    SliceSet,
    class_pixels,
    finish_slice_set,
    save_shard,
    write_atomically,
)
from datamodules.slices import reduction_factor, shrink_images, shrink_labels
from datamodules.splits import paper_lists

SLICES_AT_ONCE = 256
ENDINGS_OF_PICTURES = (".png", ".tif", ".tiff")
_CHANNEL_OF = {ending.lower(): number for number, ending in enumerate(ENDINGS)}
_STEM = re.compile(rf"(?:(?P<name>.*)[_-])?(?P<channel>{'|'.join(_CHANNEL_OF)})", re.IGNORECASE)
_PREFIXES = {"paper-2020": "BraTS20_", "paper-2021": "BraTS2021_"}


def import_images(
    folder: Path,
    out: Path,
    trained_on: Literal["paper-2020", "paper-2021"] | Path | None = None,
    label_levels: tuple[float, float, float, float] = PAPER_LEVELS,
    size_px: int | None = None,
    spacing_mm: float = 1.0,
    transpose: bool = False,
    skip_faulty: bool = False,
    workers: int | None = None,
    shard_mib: int = 1024,
) -> Path:
    """Turn a folder of synthetic pictures into a slice set, to train segmenters on and to search for memorized slices.

    The channel is the end of a file's name (T1, T1ce, T2, flair, seg) or its folder; the rest names the slice. The same
    command again goes on after an interruption.

    Args:
        folder: PNG or TIFF files, 8-bit grey, of one size, at any depth; other files are passed over.
        out: folder for the slice set; new.
        trained_on: whom the generator has seen: a real slice set, of which its training patients count, or the training
            lists of the paper. Null says that nobody knows: then no leak can be found, and no search for memorized
            slices is possible.
        label_levels: grey levels that the classes background, core, oedema and enhancing have in the label; a pixel
            becomes the nearest class. The default is the paper's.
        size_px: side of the slices: that of the pictures divided by a power of two; null keeps it.
        spacing_mm: of the pixels of the pictures.
        transpose: the rows of the pictures are the second axis of the volume, as one looks at them; those of the paper
            are the first.
        skip_faulty: go on without the slices that have a fault; the manifest lists them.
        workers: processes; null takes one per core.
        shard_mib: largest size of one file of the set.

    Returns:
        The folder of the slice set.

    Raises:
        ValueError: with the names of all slices that lack a channel or have a file that cannot be used, or if an
            option does not fit or `out` holds something else.
    """
    folder, out = Path(folder), Path(out)
    boundaries = _boundaries(label_levels)
    seen, training_sets = _seen(trained_on, folder)
    found, faults = find_pictures(folder)
    listing = as_json({name: [_status(path) for path in paths] for name, paths in found.items()})
    request = {
        "pictures": hashlib.sha256(listing.encode()).hexdigest(),
        "trained_on": training_sets or (None if trained_on is None else str(trained_on)),
        "label_levels": list(label_levels),
        "size_px": size_px,
        "spacing_mm": spacing_mm,
        "transpose": transpose,
        "skip_faulty": skip_faulty,
    }
    if out.exists():
        return _finished(out, request)
    if not found or (faults and not skip_faulty):
        raise _refusal(folder, faults)
    form = _form(next(iter(found.values()))[0], size_px, transpose, boundaries)
    work = out.with_name(f"{out.name}.partial")
    if (work / "request.json").is_file() and json.loads((work / "request.json").read_text()) != request:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / "request.json", as_json(request))
    names = list(found)
    jobs = [
        _Job(work / f"part-{start:09d}.npy", {name: found[name] for name in names[start : start + SLICES_AT_ONCE]})
        for start in range(0, len(names), SLICES_AT_ONCE)
    ]
    parts = run_in_processes(partial(_read_part, form), jobs, workers or available_cores(), "Reading")
    faults |= {name: fault for part in parts for name, fault in part["faults"].items()}
    names = [name for part in parts for name in part["names"]]
    if not names or (faults and not skip_faulty):
        raise _refusal(folder, faults)
    index = _join(work, [job.path for job in jobs], names, shard_mib)
    description = {
        "kind": "synthetic",
        "spacing_mm": spacing_mm * form.factor,
        "generator": "unknown: pictures were imported",
        "source": folder.resolve().name,
        "label_levels": list(label_levels),
        **seen.as_json(),
        "trained_on": training_sets,
        "filtered": f"{len(faults)} slices with faults" if faults else "nothing",
        "faulty": faults,
        "standin_version": version("standin"),
        "request": request,
    }
    finish_slice_set(work, index, description)
    for path in [*work.glob("part-*"), work / "request.json"]:
        path.unlink()
    work.rename(out)
    return out


def recognise(path: PurePosixPath) -> tuple[str, int] | None:
    """Tell slice and channel from the path of a picture, relative to the folder of all.

    Returns:
        Name of the slice and place of the channel in `CHANNELS`; None if name and folder say none, or different ones.
    """
    match = _STEM.fullmatch(path.stem)
    folders = [part for part in path.parent.parts if part.lower() not in _CHANNEL_OF]
    of_folders = {_CHANNEL_OF[part.lower()] for part in path.parent.parts if part.lower() in _CHANNEL_OF}
    channels = of_folders | ({_CHANNEL_OF[match["channel"].lower()]} if match else set())
    if len(channels) != 1:
        return None
    own = (match["name"] or "") if match else path.stem
    name = re.sub(r"[^A-Za-z0-9._-]", "-", "-".join([*folders, own]).strip("-"))
    return (name, channels.pop()) if name else None


def find_pictures(folder: Path) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Sort the pictures of a folder by slice.

    Returns:
        Name of a slice -> its files in the order of `CHANNELS`, for the slices that have all; and the faults of the
        others, by slice or file.

    Raises:
        ValueError: if there is no picture.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS_OF_PICTURES)
    if not paths:
        raise ValueError(f"Expected pictures ({', '.join(ENDINGS_OF_PICTURES)}) in {folder}, but there are none.")
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    faults = {}
    for path in paths:
        relative = PurePosixPath(path.relative_to(folder).as_posix())
        known = recognise(relative)
        if known is None:
            faults[str(relative)] = f"neither name nor folder says alone which of {', '.join(ENDINGS)} it is"
            continue
        name, channel = known
        if channel in found[name]:
            faults[name] = f"both {found[name][channel].relative_to(folder)} and {relative} are its {CHANNELS[channel]}"
        found[name][channel] = path
    for name, files in found.items():
        if lacking := [CHANNELS[number] for number in range(len(CHANNELS)) if number not in files]:
            faults.setdefault(name, f"no {', '.join(lacking)}")
    whole = {name: [files[k] for k in sorted(files)] for name, files in sorted(found.items()) if name not in faults}
    return whole, faults


@dataclass(frozen=True)
class _Form:
    """What every picture must be, and what becomes of it."""

    picture_px: int
    factor: int
    transpose: bool
    boundaries: tuple[float, ...]

    def slice_of(self, paths: Sequence[Path]) -> Slices:
        """Read the channels of a slice: uint8 (5, H, W).

        Raises:
            ValueError: naming the file that cannot be used.
        """
        channels = [_grey(path) for path in paths]
        for path, channel in zip(paths, channels, strict=True):
            if channel.shape != (self.picture_px, self.picture_px):
                sizes = f"{channel.shape[0]} x {channel.shape[1]} pixels, but the first picture {self.picture_px}"
                raise ValueError(f"{path.name} has {sizes}")
        if black := [name for name, image in zip(MODALITIES, channels, strict=False) if not image.any()]:
            raise ValueError(f"{', '.join(black)} zero everywhere")
        # Half-way goes to the lower class, as when generators emit slices.
        channels[-1] = np.searchsorted(self.boundaries, channels[-1], side="left").astype(np.uint8)
        slices = np.stack(channels).swapaxes(1, 2) if self.transpose else np.stack(channels)
        return np.concatenate([shrink_images(slices[:-1], self.factor), shrink_labels(slices[-1:], self.factor)])


def _grey(path: Path) -> Slices:
    """Read an 8-bit grey picture, (H, W).

    Raises:
        ValueError: naming the file, if it is anything else.
    """
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    if mode != "L":
        raise ValueError(f"{path.name} is of mode {mode}, expected 8-bit grey (L)")
    return pixels


def _form(first: Path, size_px: int | None, transpose: bool, boundaries: tuple[float, ...]) -> _Form:
    """Take the size of the first picture as that of all."""
    height, width = _grey(first).shape
    if height != width:
        raise ValueError(f"{first}: expected a square, as slices are, but got {height} x {width} pixels. Pad it.")
    return _Form(height, reduction_factor(height, size_px), transpose, boundaries)


@dataclass(frozen=True)
class _Job:
    path: Path
    pictures: Mapping[str, Sequence[Path]]


def _read_part(form: _Form, job: _Job) -> dict[str, Any]:
    """Write some slices, unless they are there; give the names of those that are fine, and the faults of the others."""
    record = job.path.with_suffix(".json")
    if record.is_file():
        done: dict[str, Any] = json.loads(record.read_text())
        return done
    slices, faults = {}, {}
    for name, paths in job.pictures.items():
        try:
            slices[name] = form.slice_of(paths)
        except ValueError as error:
            faults[name] = str(error)
    if slices:
        save_shard(job.path, np.stack(list(slices.values())))
    result = {"names": list(slices), "faults": faults}
    write_atomically(record, as_json(result))
    return result


def _join(out: Path, paths: Sequence[Path], names: Sequence[str], shard_mib: int) -> pd.DataFrame:
    """Join the parts to shards, and give the index: every slice is a patient of its own."""
    for leftover in out.glob("*slices-*.npy*"):
        leftover.unlink()
    parts = [np.load(path, mmap_mode="r") for path in paths if path.is_file()]
    writer = ShardWriter(out, parts[0].shape[1:], len(names), shard_mib)
    tables = []
    for part in parts:
        writer.write(part)
        tables.append(class_pixels(part[:, -1]))
    return pd.concat(tables, ignore_index=True).assign(patient=names, volume=names, z=0, split="train")


def _seen(trained_on: str | Path | None, folder: Path) -> tuple[Seen, list[str]]:
    """Say whom the generator has seen, and the fingerprints of the sets that it was trained on, if they are known."""
    if trained_on is None:
        return Seen(unknown=[folder.resolve().name]), []
    if str(trained_on) in _PREFIXES:
        prefix = _PREFIXES[str(trained_on)]
        return Seen(sorted(p for p, side in paper_lists().items() if p.startswith(prefix) and side == "train")), []
    training = SliceSet(trained_on, "train")
    if training.manifest.kind != "real" or not len(training):
        raise ValueError(f"--trained_on {trained_on}: expected a real slice set with training patients.")
    return Seen.of_slices(training, read_aliases([training.root])), [training.manifest.fingerprint]


def _boundaries(levels: Sequence[float]) -> tuple[float, ...]:
    """Give the grey levels half-way between those of the classes."""
    if sorted(set(levels)) != list(levels) or not 0 <= levels[0] <= levels[-1] <= 255:
        raise ValueError(f"label_levels={list(levels)}: expected four increasing grey levels from 0 to 255.")
    return tuple((low + high) / 2 for low, high in pairwise(levels))


def _status(path: Path) -> list[Any]:
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def _finished(out: Path, request: Mapping[str, Any]) -> Path:
    """Give `out` if it is what is asked for already.

    Raises:
        ValueError: if it is anything else.
    """
    manifest = out / "dataset.json"
    before = json.loads(manifest.read_text()).get("request") if manifest.is_file() else None
    if before != request:
        raise ValueError(f"{out} exists and is not what this command makes. Choose another folder, or delete it.")
    return out


def _refusal(folder: Path, faults: Mapping[str, str]) -> ValueError:
    lines = shown([f"{name}: {fault}" for name, fault in faults.items()])
    return ValueError(
        f"{folder}: {len(faults)} slices or files cannot be used. Mend them, or pass --skip_faulty true to go on "
        f"without them; the manifest then lists them.\n{lines}"
    )
