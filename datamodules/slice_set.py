"""The slice set: the one format in which real and synthetic data lie on disk.

A slice set is a folder:

| file | content |
|---|---|
| `slices-00000.npy`, ... | shards, uint8 (N, 5, H, W): T1, T1ce, T2, FLAIR as grey levels, label as class index |
| `index.parquet` | one row per slice, in the order of the shards: patient, volume, z, split, pixels of each class |
| `dataset.json` | kind, channels, classes, size, spacing, provenance and the fingerprint of the content |

The first image axis is the first axis of the volume (patient right to left), the second is the second (anterior to
posterior), as in the NIfTI files of BraTS; transpose a slice to look at it the radiological way (`to_display`).
`dataset.json` is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

FORMAT_VERSION = 1
MODALITIES = ("T1", "T1ce", "T2", "FLAIR")
CHANNELS = (*MODALITIES, "label")
CLASSES = ("background", "core", "oedema", "enhancing")
LEFT_RIGHT_AXIS = -2
"""The image axis along which a flip exchanges left and right."""
INDEX_COLUMNS = {
    "patient": "string",
    "volume": "string",
    "z": "int32",
    "split": "string",
    "core_px": "int32",
    "oedema_px": "int32",
    "enhancing_px": "int32",
}

Split = Literal["train", "val", "test"]
Slices = npt.NDArray[np.uint8]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that nobody ever sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_shard(path: Path, slices: Slices) -> None:
    """Write one shard atomically; `slices` is uint8 (N, 5, H, W)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(slices))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def class_pixels(labels: Slices) -> pd.DataFrame:
    """Count the pixels of each tumour class per slice; `labels` is (N, H, W), class index 0..3."""
    counts = {f"{name}_px": (labels == index).sum(axis=(1, 2)) for index, name in enumerate(CLASSES) if index > 0}
    return pd.DataFrame(counts, dtype="int32")


def to_display(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Turn (..., H, W) in the order of the files into rows and columns as a radiologist sees them (anterior up)."""
    return np.swapaxes(image, -1, -2)


def find_shards(root: Path) -> list[Path]:
    """List the shards of a folder in order."""
    return sorted(root.glob("slices-[0-9]*.npy"))


def fingerprint(shards: Iterable[Path], index: pd.DataFrame) -> str:
    """Hash the pixels and the index rows of a set: equal fingerprints mean equal data.

    The bytes of the slices enter in their order, whatever the division into shards.
    """
    digest = hashlib.sha256()
    for path in shards:
        array = np.load(path, mmap_mode="r")
        step = max(1, (64 << 20) // max(1, array[:1].nbytes))
        for start in range(0, len(array), step):
            digest.update(array[start : start + step].tobytes())
    digest.update(index[list(INDEX_COLUMNS)].to_csv(index=False).encode())
    return digest.hexdigest()


def finish_slice_set(root: Path, index: pd.DataFrame, description: Mapping[str, Any]) -> None:
    """Write index and manifest next to the shards that lie in `root` already; the manifest comes last.

    Args:
        root: folder with the shards.
        index: one row per slice with at least the columns of `INDEX_COLUMNS`, in the order of the shards.
        description: what else the manifest shall say; must contain `kind` ("real" or "synthetic") and `spacing_mm`.

    Raises:
        ValueError: if the index does not fit the shards.
    """
    shards = find_shards(root)
    shapes = [np.load(path, mmap_mode="r").shape for path in shards]
    n_slices = sum(shape[0] for shape in shapes)
    if len(index) != n_slices or not shards:
        raise ValueError(f"{root}: expected one index row per slice, but got {len(index)} rows for {n_slices} slices.")
    index = index.astype(INDEX_COLUMNS).reset_index(drop=True)
    write_atomically(root / "index.parquet", index.to_parquet())
    manifest = {
        "format": "StandIn slice set",
        "format_version": FORMAT_VERSION,
        "channels": list(CHANNELS),
        "classes": list(CLASSES),
        "size_px": list(shapes[0][2:]),
        "slices": n_slices,
        "slices_per_split": {str(k): int(v) for k, v in index["split"].value_counts().sort_index().items()},
        "fingerprint": fingerprint(shards, index),
        **description,
    }
    write_atomically(root / "dataset.json", json.dumps(manifest, indent=1) + "\n")


@dataclass(frozen=True)
class Manifest:
    """What `dataset.json` says, checked."""

    root: Path
    kind: Literal["real", "synthetic"]
    size_px: tuple[int, int]
    spacing_mm: float
    slices: int
    fingerprint: str
    content: Mapping[str, Any]


def read_manifest(root: Path | str) -> Manifest:
    """Read and check `dataset.json`.

    Raises:
        ValueError: if the folder holds no complete slice set, or one with other channels or classes than ours.
    """
    root = Path(root)
    path = root / "dataset.json"
    if not path.is_file():
        state = "is unfinished: run the command that makes it again" if find_shards(root) else "has no dataset.json"
        raise ValueError(
            f"Expected a slice set at {root}, but it {state}. `standin prepare` makes one from a BraTS folder."
        )
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Make the slice set again.") from error
    for key, expected in (("channels", list(CHANNELS)), ("classes", list(CLASSES)), ("format_version", FORMAT_VERSION)):
        if content.get(key) != expected:
            raise ValueError(f"{path}: expected {key} to be {expected}, but got {content.get(key)}.")
    height, width = content["size_px"]
    return Manifest(
        root=root,
        kind=content["kind"],
        size_px=(height, width),
        spacing_mm=float(content["spacing_mm"]),
        slices=int(content["slices"]),
        fingerprint=content["fingerprint"],
        content=content,
    )


class SliceSet:
    """Read access to (a part of) a slice set: memory stays flat however large the set is.

    Slices are read from the files at once when they are asked for. A memory map would count every page ever touched as
    memory of the process, and several workers would be killed for memory that nobody needs.

    Args:
        root: folder of the set.
        split: keep only the slices of this split; None keeps all.

    Raises:
        ValueError: if the folder is not a complete slice set, or its files contradict each other.
    """

    def __init__(self, root: Path | str, split: Split | None = None) -> None:
        self.manifest = read_manifest(root)
        self.root = Path(root)
        index = pd.read_parquet(self.root / "index.parquet")
        self._shards = find_shards(self.root)
        arrays = [_open_shard(path) for path in self._shards]
        lengths = [len(array) for array in arrays]
        self._starts = [array.offset for array in arrays]
        self._files: dict[int, BinaryIO] = {}
        if len(index) != sum(lengths):
            raise ValueError(
                f"{self.root}: index.parquet has {len(index)} rows, but the {len(lengths)} shards hold {sum(lengths)} "
                "slices. A file is missing or foreign: make the slice set again."
            )
        index["shard"] = np.repeat(np.arange(len(lengths)), lengths)
        index["row"] = np.concatenate([np.arange(length) for length in lengths])
        if split is not None:
            index = index[index["split"] == split]
        self._bind(index)

    def _bind(self, index: pd.DataFrame) -> None:
        self.index = index.reset_index(drop=True)
        self._shard_of = self.index["shard"].to_numpy()
        self._row_of = self.index["row"].to_numpy()

    def subset(self, rows: Sequence[int] | npt.NDArray[Any]) -> SliceSet:
        """Give the same set restricted to these positions (an index array or a boolean mask)."""
        chosen = object.__new__(SliceSet)
        chosen.manifest, chosen.root, chosen._shards = self.manifest, self.root, self._shards
        chosen._starts, chosen._files = self._starts, self._files
        rows = np.asarray(rows)
        chosen._bind(self.index.iloc[np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)])
        return chosen

    def __len__(self) -> int:
        return len(self.index)

    @property
    def patients(self) -> list[str]:
        """The patients of these slices, sorted."""
        return sorted(self.index["patient"].unique())

    def read(self, positions: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Slices:
        """Read slices by position: uint8 (n, 5, H, W), channels as in `CHANNELS`."""
        positions = np.asarray(positions, dtype=np.int64)
        out = np.empty((len(positions), len(CHANNELS), *self.manifest.size_px), np.uint8)
        shards, rows = self._shard_of[positions], self._row_of[positions]
        follows = (np.diff(shards) == 0) & (np.diff(rows) == 1)
        for run in np.split(np.arange(len(positions)), np.flatnonzero(~follows) + 1):
            if len(run):
                self._read_run(int(shards[run[0]]), int(rows[run[0]]), out[run[0] : run[-1] + 1])
        return out

    def _read_run(self, shard: int, row: int, out: Slices) -> None:
        """Read slices that follow each other in a shard."""
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = self._shards[shard].open("rb", buffering=0)
        place, left = self._starts[shard] + row * out[0].nbytes, out.data.cast("B")
        while left:
            count = os.preadv(file.fileno(), [left], place)  # threads and forks share the file: no seek
            if not count:
                raise ValueError(f"{self._shards[shard]} ends too early. Make the slice set again.")
            place, left = place + count, left[count:]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind: every worker process opens its own."""
        return {**self.__dict__, "_files": {}}


def _open_shard(path: Path) -> np.memmap[Any, Any]:
    try:
        array: Any = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Make the slice set again.") from error
    if array.ndim != 4 or array.shape[1] != len(CHANNELS) or array.dtype != np.uint8 or not array.flags.c_contiguous:
        raise ValueError(f"{path}: expected uint8 (N, {len(CHANNELS)}, H, W), but got {array.dtype} {array.shape}.")
    mapped: np.memmap[Any, Any] = array
    return mapped
