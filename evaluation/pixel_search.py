"""The exact search of slices in a training set: in bounded memory, divided over processes, resumable.

Queries are searched a share at a time, as many as fit into the memory, each share in all training slices, which stream
through in blocks. The state of a share is a file, written every minute and when it is done: the same command goes on
where a killed one stopped, and several processes may work in one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from datamodules.slice_set import LEFT_RIGHT_AXIS, MODALITIES, Slices, SliceSet, write_atomically
from evaluation.remembered import remembered
from metrics.correlation_search import STRIPE_BYTES, TILE, Search
from metrics.memorization import memorization_scores, memorization_view
from metrics.nearest import Nearest
from metrics.pixel_loader import PixelLoader
from metrics.pixels import CHUNK_BYTES, Pixels, Score, Transform, flips_and_shifts
from metrics.similarity import Distance

Floats = npt.NDArray[np.float64]

SEARCH_VERSION = 2
"""Raised when a number of the search changes, so that states of before are not gone on from."""
SECONDS_BETWEEN_SAVES = 60.0
CPU_GIB = 2.0
GPU_SHARE = 0.5
BYTES_PER_NEIGHBOUR = 24
SPEED_PERIOD_SECONDS = 1800.0


def chosen_device(name: str) -> torch.device:
    """The device of that name; auto: a GPU if there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@dataclass(frozen=True)
class PixelSearch:
    """How to search.

    Args:
        k: nearest training slices of every slice, by every score.
        mirror: left-right flips are tried too: twice the work.
        max_shift_px: all shifts of up to that many pixels along each axis are tried: 9, 25, 49, ... times the work.
        memory_gib: for queries, blocks and products; None is 2 GiB on a CPU and half of what is free on a GPU. With
            more of it the training set is read fewer times.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is a GPU if there is one.
        shard: number of this process among `shards`, from 0.
        shards: processes that work in the same folder at the same time.

    Raises:
        ValueError: if a number is out of its range.
    """

    k: int = 5
    mirror: bool = True
    max_shift_px: int = 3
    memory_gib: float | None = None
    device: str = "auto"
    shard: int = 0
    shards: int = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: expected 1 or more.")
        if not 0 <= self.shard < self.shards:
            raise ValueError(f"shard={self.shard}: expected 0 to {self.shards - 1}, as there are {self.shards} shards.")
        if self.max_shift_px < 0:
            raise ValueError(f"max_shift_px={self.max_shift_px}: expected 0 or more.")
        if self.where.type not in TILE:
            raise ValueError(f"device={self.device}: expected auto, {', '.join(TILE)}, or one of several as cuda:1.")

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """What is done to the queries."""
        return flips_and_shifts(LEFT_RIGHT_AXIS if self.mirror else None, self.max_shift_px)

    @property
    def where(self) -> torch.device:
        """The device."""
        return chosen_device(self.device)

    @property
    def memory_bytes(self) -> int:
        """The memory in bytes."""
        if self.memory_gib is not None:
            return int(self.memory_gib * 2**30)
        if self.where.type == "cpu":
            return int(CPU_GIB * 2**30)
        free, _ = torch.cuda.mem_get_info(self.where)
        return int(GPU_SHARE * free)


def search_slices(
    name: str,
    queries: SliceSet,
    training: SliceSet,
    folder: Path,
    search: PixelSearch,
    leave_patient_out: bool = False,
) -> pd.DataFrame | None:
    """Find the nearest training slices of every slice of a set.

    Args:
        name: of the queries, for the progress bar.
        queries: the slices that are looked up.
        training: the slices among which they are looked up; of the same size.
        folder: for the states; states of other sets and settings may lie there too.
        search: how.
        leave_patient_out: slices of one patient are not compared.

    Returns:
        A row for each slice, score and rank from 1 to k: position, score, rank, value (r, or the root mean square
        difference in grey levels for distances), nearest (position in `training`), nearest_patient, and by what the
        slice was changed: mirrored, rows_px, columns_px. Slices without any nearest one (constant ones) have a row of
        rank 1 with value NaN and nearest -1. None while other processes are still at work on their shares.

    Raises:
        ValueError: if the sizes of the slices differ, there are no training slices, or the memory is too small.
    """
    if queries.manifest.size_px != training.manifest.size_px:
        raise ValueError(
            f"Expected slices of one size, but {queries.root} has {queries.manifest.size_px} px and {training.root} "
            f"{training.manifest.size_px} px. Prepare the real set at the size of the other one."
        )
    if not len(training):
        raise ValueError(f"{training.root}: expected training slices to compare with, but there are none.")
    loaders = [
        PixelLoader(slices, memorization_view, search.where, _patients(slices, training) if leave_patient_out else None)
        for slices in (queries, training)
    ]
    settings = _settings(queries, training, search, leave_patient_out)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    states = folder / key[:16]
    states.mkdir(parents=True, exist_ok=True)
    plan = _plan(states / "plan.json", search, loaders[1], len(memorization_scores(MODALITIES)), len(queries))
    starts = range(0, len(queries), plan.share)
    files = [states / f"share-{start:09d}.npz" for start in starts]
    mine = list(zip(starts, files, strict=True))[search.shard :: search.shards]
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(
        *(*columns, TimeRemainingColumn()),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        speed_estimate_period=SPEED_PERIOD_SECONDS,
    ) as progress:
        task = progress.add_task(f"Searching {name}", total=len(mine) * len(training))
        for start, file in mine:
            positions = np.arange(start, min(start + plan.share, len(queries)))
            _search_share(file, positions, loaders, plan.block, search, partial(progress.advance, task))
    if not all(file.exists() and _read_state(file)[1] == len(training) for file in files):
        return None
    parts = [_table(_read_state(file)[0], start, training, search) for start, file in zip(starts, files, strict=True)]
    return pd.concat(parts, ignore_index=True)


def pixel_values(training: SliceSet, search: PixelSearch, folder: Path) -> Callable[[Slices], pd.DataFrame]:
    """Make a function that says how near slices, uint8 (N, 5, H, W), come to any training slice.

    Its tables have a row per slice and a column per score: r, or the root mean square difference; NaN without any.

    Args:
        training: the slices to compare with.
        search: how; its k does not matter.
        folder: for the numbers of slices that were looked up before.
    """
    scores = memorization_scores(MODALITIES)
    loader = PixelLoader(training, memorization_view, search.where)

    def values(slices: Slices) -> Floats:
        queries = Pixels.of(torch.from_numpy(slices).to(search.where), view=memorization_view)
        run = Search(queries, scores, 1, search.transforms)
        for first, block in loader.blocks(_divide(search, loader, len(scores), len(slices)).block):
            run.compare(block, first)
        value = np.where(run.nearest.index.cpu() < 0, np.nan, _in_units(run.nearest, scores, training))
        return value[..., 0].T

    settings = json.dumps([SEARCH_VERSION, _slices(training), *_transforms(search)])
    known = remembered(values, settings, folder)
    return lambda slices: pd.DataFrame(known(slices), columns=[score.name for score in scores])


@dataclass(frozen=True)
class _Plan:
    """Queries of a share, and training slices of a block."""

    share: int
    block: int


def _plan(path: Path, search: PixelSearch, training: PixelLoader, scores: int, queries: int) -> _Plan:
    """Divide the memory; whoever comes first decides for all processes, and for those that go on later."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        content = _divide(search, training, scores, queries)
        write_atomically(temporary, json.dumps({"share": content.share, "block": content.block}))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()
    return _Plan(**json.loads(path.read_text()))


def _search_share(
    file: Path,
    positions: npt.NDArray[np.int64],
    loaders: Sequence[PixelLoader],
    block_size: int,
    search: PixelSearch,
    advance: Callable[[int], None],
) -> None:
    """Search some of the queries, going on from the state in the file. The memory of the share ends with the call."""
    nearest, searched = _read_state(file) if file.exists() else (None, 0)
    advance(searched)
    queries, training = loaders
    if searched == len(training.source):
        return
    scores = memorization_scores(MODALITIES)
    run = Search(queries.load(positions), scores, search.k, search.transforms, _to(nearest, search.where))
    saved = time.monotonic()
    for first, block in training.blocks(block_size, searched):
        run.compare(block, first)
        advance(len(block))
        searched = first + len(block)
        if searched == len(training.source) or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            _write_state(file, run.nearest, searched)
            saved = time.monotonic()


def _divide(search: PixelSearch, training: PixelLoader, scores: int, queries: int) -> _Plan:
    memory, device = search.memory_bytes, search.where.type
    prepared = math.prod(training.shape)
    rows, columns = TILE[device]
    block = max(1, min(columns, memory // 8 // prepared))
    of_block = block * prepared * min(2, len(search.transforms))  # as it is, and changed
    of_tile = 4 * training.shape[0] * rows * block + 2 * STRIPE_BYTES[device] + 4 * CHUNK_BYTES
    share = (memory - of_block - of_tile) // (prepared + scores * search.k * BYTES_PER_NEIGHBOUR)
    if share < 1:
        raise ValueError(
            f"memory_gib={memory / 2**30:.3g} is too little: slices of {training.shape[1]} x {training.shape[2]} px "
            f"need {(of_block + of_tile + 2 * prepared) / 2**30:.2g} or more."
        )
    shares = math.ceil(queries / share)
    return _Plan(math.ceil(queries / max(1, shares)) or 1, block)


def _settings(queries: SliceSet, training: SliceSet, search: PixelSearch, leave_patient_out: bool) -> list[object]:
    """Everything that the numbers depend on."""
    return [SEARCH_VERSION, *map(_slices, (queries, training)), search.k, *_transforms(search), leave_patient_out]


def _slices(slices: SliceSet) -> list[str]:
    rows = slices.index[["shard", "row"]].to_csv()
    return [slices.manifest.fingerprint, hashlib.sha256(rows.encode()).hexdigest()]


def _transforms(search: PixelSearch) -> list[object]:
    return [search.mirror, search.max_shift_px]


def _patients(slices: SliceSet, training: SliceSet) -> torch.Tensor:
    """Number the patients, of either set alike."""
    names = {patient: number for number, patient in enumerate(sorted({*slices.patients, *training.patients}))}
    return torch.tensor([names[patient] for patient in slices.index["patient"]])


def _to(nearest: Nearest | None, device: torch.device) -> Nearest | None:
    if nearest is None:
        return None
    return Nearest(*(tensor.to(device) for tensor in (nearest.value, nearest.index, nearest.transform)))


def _write_state(file: Path, nearest: Nearest, searched: int) -> None:
    buffer = io.BytesIO()
    arrays = {name: getattr(nearest, name).cpu().numpy() for name in ("value", "index", "transform")}
    np.savez(buffer, searched=searched, **arrays)
    write_atomically(file, buffer.getvalue())


def _read_state(file: Path) -> tuple[Nearest, int]:
    with np.load(file) as state:
        return Nearest(*(torch.from_numpy(state[name]) for name in ("value", "index", "transform"))), int(
            state["searched"]
        )


def _table(nearest: Nearest, first: int, training: SliceSet, search: PixelSearch) -> pd.DataFrame:
    scores = memorization_scores(MODALITIES)
    value = _in_units(nearest, scores, training)
    which, query, rank = (i.ravel() for i in np.indices(value.shape))
    index, transform = nearest.index.numpy().ravel(), nearest.transform.numpy().ravel()
    found = index >= 0
    names = training.patients
    patients = pd.Categorical(training.index["patient"], names).codes
    changes = search.transforms
    shift = np.array([change.shift_px for change in changes], np.int16)
    table: pd.DataFrame = pd.DataFrame(
        {
            "position": query + first,
            "score": pd.Categorical.from_codes(which, pd.Index([score.name for score in scores])),
            "rank": rank.astype(np.int16) + 1,
            "value": np.where(found, value.ravel(), np.nan),
            "nearest": index,
            "nearest_patient": pd.Categorical.from_codes(np.where(found, patients[index], -1), pd.Index(names)),
            "mirrored": np.array([change.mirror_axis is not None for change in changes])[transform] & found,
            "rows_px": np.where(found, shift[transform, 0], 0).astype(np.int16),
            "columns_px": np.where(found, shift[transform, 1], 0).astype(np.int16),
        }
    )
    table = table.loc[found | (rank == 0)]
    return table.sort_values(["position", "score", "rank"], ignore_index=True)


def _in_units(nearest: Nearest, scores: list[Score], training: SliceSet) -> Floats:
    """Turn squared distances into root mean square differences in grey levels: (S, Q, k)."""
    height, width = training.manifest.size_px
    value = nearest.value.cpu().numpy().copy()
    for number, score in enumerate(scores):
        if isinstance(score.measure, Distance):
            value[number] = np.sqrt(-value[number] / (len(score.channels) * height * width))
    return value
