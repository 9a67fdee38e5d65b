"""`standin prepare`: from a BraTS-like folder to a slice set, in two passes that can be interrupted at any time.

The first pass reads every voxel and collects the faults of all patients; the second converts. What is done is kept in
`OUT/.work` under names that appear only when their content is complete, so the same command goes on where a killed one
stopped, and ends with the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from datamodules.checks import Check, FaultyInputError, check_across, check_volume, input_sha256
from datamodules.layouts import Fault, Volume, find_volumes, read_nifti, read_volume
from datamodules.native_space import describe_file
from datamodules.parallel import available_cores, run_in_processes
from datamodules.shards import ShardWriter
from datamodules.slice_set import (
    CHANNELS,
    class_pixels,
    find_shards,
    finish_slice_set,
    save_shard,
    write_atomically,
)
from datamodules.slices import PRESET_PARAMETERS, Preset, native_size_px, reduction_factor, slice_volume
from datamodules.splits import SPLITS, Division, check_fractions, divide

CHECKS_VERSION = 1
"""Raised when a check is added, so that records of passed checks are made again."""
CONVERSION_VERSION = 2
"""Raised when a conversion gives something else than before, so that unfinished ones of before are made again."""
_AXES = (
    "Slices are axial; z counts from 0 along the third axis (towards superior). The first image axis points to the "
    "left of the patient, the second to posterior, as in the files of BraTS; other volumes were turned by their affine."
)
_logger = logging.getLogger(__name__)


def prepare(
    root: Path,
    out: Path,
    preset: Literal["default", "paper"] = "default",
    size_px: int | None = None,
    split: str = "random",
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    skip_faulty: bool = False,
    workers: int | None = None,
    shard_mib: int = 1024,
) -> Path:
    """Turn a folder of BraTS patients into a slice set.

    The layout (BraTS 2018 to 2024, Medical Segmentation Decathlon Task01) is recognised by the file names. Everything
    is checked before anything is converted. The same command again continues after an interruption.

    Args:
        root: folder with the patients, at any depth.
        out: folder for the slice set; new, empty, or left by the same command.
        preset: `paper` scales by the maximum and chooses slices by T1, as the paper did; `default` scales by the 99.9th
            percentile inside the brain and chooses slices by the brain.
        size_px: side of the slices, 256 (native for BraTS) divided by a power of two; null keeps the native one.
        split: `random` (by patient), `paper` (its own lists), or a JSON or YAML file with lists train, val, test.
        fractions: shares of train, val and test patients of a random split.
        seed: of the random split.
        skip_faulty: go on without the patients that have a fault; the manifest lists them.
        workers: processes, each with up to 1 GiB of memory; null takes one per core.
        shard_mib: largest size of one file of the set.

    Returns:
        The folder of the slice set.

    Raises:
        FaultyInputError: a table of all faults of all patients, unless `skip_faulty`.
        ValueError: if nothing is found, an option does not fit, or `out` holds something else.
    """
    root, out = Path(root), Path(out)
    request = _request(preset, size_px, split, fractions, seed, skip_faulty, shard_mib, workers)
    workers = workers or available_cores()
    volumes, faults = find_volumes(root)
    if _is_finished(out, request, volumes, faults, root):
        return out
    _check_options(volumes, {fault.patient for fault in faults}, request, split)
    with _workplace(out) as work:
        _compare_requests(_read_json(work / "request.json"), request, f"{out} holds an unfinished preparation")
        checks, faults, notes = _check_all(volumes, faults, root, work, workers)
        if faults and not skip_faulty:
            raise FaultyInputError(faults, root, len(volumes))
        skipped = {fault.patient for fault in faults}
        checks = [check for check in checks if check.patient not in skipped]
        if not checks:
            raise FaultyInputError(faults, root, len(volumes))
        patients = {check.patient for check in checks}
        division = divide(patients, split, fractions, seed, absent=skipped)
        factor = reduction_factor(checks[0].native_px, size_px)
        _write_json(work / "request.json", request)
        found = {volume.volume: volume for volume in volumes}
        jobs = [_Job(found[check.volume], check.input_sha256, preset, size_px) for check in checks]
        converted = run_in_processes(partial(_convert, work=work), jobs, workers, "Converting")
        index = _assemble(out, work, converted, division, shard_mib)
        notes += [f"{entry['volume']}: no slice was kept." for entry in converted if not entry["slices_kept"]]
        _write_json(out / ".input.json", _listing(volumes, root))
        spacing = round(checks[0].spacing_mm[0], 6)
        description = {
            "kind": "real",
            "spacing_mm": spacing * factor,
            "native_spacing_mm": spacing,
            "native_size_px": checks[0].native_px,
            "downsampling": factor,
            "preset": preset,
            "preset_parameters": PRESET_PARAMETERS[preset],
            "axes": _AXES,
            "layouts": dict(sorted(Counter(job.volume.layout for job in jobs).items())),
            "source": root.resolve().name,
            "split": division.source,
            "seed": seed,
            "patients": {side: division.patients(side) for side in SPLITS},
            "patients_of_the_list_not_in_the_input": list(division.missing),
            "volumes": [{**entry, "split": division.sides[entry["patient"]]} for entry in converted],
            "skipped_patients": _by_patient(faults, volumes),
            "notes": _layout_notes(jobs) + notes,
            "software": f"standin {_version()}",
            "request": request,
        }
        for table in sorted(path for path in root.rglob("*.csv") if "mapping" in path.name.lower()):
            write_atomically(out / table.name, table.read_bytes())  # other names of the patients, for the leak guard
        finish_slice_set(out, index, description)
    shutil.rmtree(out / ".work")
    _logger.info("%s: %d slices of %d patients.", out, len(index), len(patients))
    return out


@dataclass(frozen=True)
class _Job:
    """What one conversion needs."""

    volume: Volume
    input_sha256: str
    preset: Preset
    size_px: int | None


def _request(
    preset: Preset,
    size_px: int | None,
    split: str,
    fractions: Sequence[float],
    seed: int,
    skip_faulty: bool,
    shard_mib: int,
    workers: int | None,
) -> dict[str, Any]:
    """Give what decides the content of the set, as JSON; all options that make no sense are named at once."""
    problems = []
    if preset not in get_args(Preset):
        problems.append(f"preset={preset}: expected one of {', '.join(get_args(Preset))}.")
    if size_px is not None and (size_px < 1 or size_px & (size_px - 1)):
        problems.append(f"size_px={size_px}: expected a power of two, for example 64, 128 or 256.")
    if shard_mib < 1:
        problems.append(f"shard_mib={shard_mib}: expected 1 or more.")
    if workers is not None and workers < 1:
        problems.append(f"workers={workers}: expected 1 or more, or null for one per core.")
    try:
        check_fractions(fractions)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    is_file = split not in ("random", "paper") and Path(split).is_file()
    return {
        "preset": preset,
        "size_px": size_px,
        "split": f"sha256 {hashlib.sha256(Path(split).read_bytes()).hexdigest()[:16]}" if is_file else split,
        "fractions": list(fractions),
        "seed": seed,
        "skip_faulty": skip_faulty,
        "shard_mib": shard_mib,
    }


def _check_options(volumes: Sequence[Volume], faulty: set[str], request: Mapping[str, Any], split: str) -> None:
    """Find out, before the long check, whether the split fits the patients and the size the first volume."""
    divide({volume.patient for volume in volumes} - faulty, split, request["fractions"], request["seed"], absent=faulty)
    for volume in volumes:
        path = volume.images["T1"]
        try:
            shape = read_nifti(path.read_bytes(), path.name).array.shape
        except (OSError, ValueError):
            continue
        reduction_factor(native_size_px(shape), request["size_px"])
        return


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """Open `OUT/.work`, for one process at a time."""
    work = out / ".work"
    if out.exists() and not work.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no unfinished slice set. Choose another folder.")
    for name in ("checks", "volumes"):
        (work / name).mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is preparing {out} now. Wait for it, or choose another folder."
            ) from error
        yield work


def _is_finished(
    out: Path, request: Mapping[str, Any], volumes: Sequence[Volume], faults: Sequence[Fault], root: Path
) -> bool:
    """Tell whether `out` is already what is asked for.

    Raises:
        ValueError: if it is a finished set of other parameters or another input.
    """
    content = _read_json(out / "dataset.json")
    if content is None:
        return False
    _compare_requests(content.get("request", {}), request, f"{out} holds a finished slice set")
    listing = _listing(volumes, root)
    skipped = {entry["patient"]: entry for entry in content["skipped_patients"]}
    differing = sorted({fault.patient for fault in faults} - set(skipped))
    if listing != _read_json(out / ".input.json"):
        before = {entry["volume"]: entry["input_sha256"] for entry in content["volumes"]}
        before |= {name: known for entry in skipped.values() for name, known in entry["input_sha256"].items()}
        now = {volume.volume: volume for volume in volumes}
        differing += sorted(set(before) ^ set(now))
        differing += [name for name, known in before.items() if name in now and input_sha256(now[name]) != known]
    if differing:
        raise ValueError(
            f"{out} holds a finished slice set of another input: {', '.join(differing[:5])} "
            f"{'(and more) ' if len(differing) > 5 else ''}changed, came or went since. Choose another folder."
        )
    _write_json(out / ".input.json", listing)
    if not all("native" in entry for entry in content["volumes"]):  # finished by a version that did not record it
        found = {volume.volume: volume for volume in volumes}
        entries = [{**entry, "native": _native(found[entry["volume"]])} for entry in content["volumes"]]
        _write_json(out / "dataset.json", {**content, "volumes": entries})
    if (out / ".work").is_dir():
        shutil.rmtree(out / ".work")
    return True


def _compare_requests(before: Mapping[str, Any] | None, now: Mapping[str, Any], what: str) -> None:
    if before is None:
        return
    differing = [f"{key}={before.get(key)} (now {value})" for key, value in now.items() if before.get(key) != value]
    if differing:
        raise ValueError(f"{what} made with {', '.join(differing)}. Choose another folder, or delete this one.")


def _listing(volumes: Sequence[Volume], root: Path) -> dict[str, list[int]]:
    """Size and time of change of every input file, by its name below `root`."""
    return {name: status for volume in volumes for name, status in _status(volume, root).items()}


def _status(volume: Volume, root: Path) -> dict[str, list[int]]:
    stats = {path: path.stat() for path in volume.files}
    return {path.relative_to(root).as_posix(): [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def _check_all(
    volumes: Sequence[Volume], faults: Sequence[Fault], root: Path, work: Path, workers: int
) -> tuple[list[Check], list[Fault], list[str]]:
    """Run the first pass; faults come sorted by patient."""
    found = {volume.volume: volume for volume in reversed(volumes)}
    unique = [found[name] for name in sorted(found)]
    checks = run_in_processes(partial(_check_once, root=root, work=work), unique, workers, "Checking")
    faults = [*faults, *(fault for check in checks for fault in check.faults)]
    sound = [check for check in checks if not check.faults]
    across, notes = check_across(sound, found, root)
    faults = sorted([*faults, *across], key=lambda fault: (fault.patient, fault.file))
    return sound, faults, [note for check in sound for note in check.notes] + notes


def _check_once(volume: Volume, root: Path, work: Path) -> Check:
    """Check a volume unless the record of a passed check of the same files lies there."""
    path = work / "checks" / f"{volume.volume}.json"
    key = {"version": CHECKS_VERSION, "layout": volume.layout, "files": _status(volume, root)}
    record = _read_json(path)
    if record is not None and record["key"] == key:
        return Check(**record["check"])
    check = check_volume(volume, root)
    if not check.faults:
        _write_json(path, {"key": key, "check": asdict(check)})
    return check


def _convert(job: _Job, work: Path) -> dict[str, Any]:
    """Write the slices of one volume and give its row of the manifest."""
    volume = job.volume
    path = work / "volumes" / f"{volume.volume}.npy"
    key = {"version": CONVERSION_VERSION, "input_sha256": job.input_sha256}
    record = _read_json(path.with_suffix(".json"))
    if record is not None and record.get("key") == key and path.is_file():
        entry: dict[str, Any] = record["entry"]
        return entry
    images, labels, _ = read_volume(volume)
    result = slice_volume(images, labels, job.preset, job.size_px)
    save_shard(path, result.slices)
    entry = {
        "volume": volume.volume,
        "patient": volume.patient,
        "layout": volume.layout,
        "slices_in_volume": result.slices_in_volume,
        "slices_kept": len(result.z),
        "tumour_voxels_kept": result.tumour_voxels_kept,
        "tumour_voxels_dropped": result.tumour_voxels_dropped,
        "white_level": dict(result.white_level),
        "native": _native(volume),
        "input_sha256": job.input_sha256,
        "z": result.z.tolist(),
    }
    _write_json(path.with_suffix(".json"), {"key": key, "entry": entry})
    return entry


def _native(volume: Volume) -> dict[str, Any]:
    return asdict(describe_file(volume.segmentation, volume.label_codes))


def _assemble(
    out: Path, work: Path, converted: Sequence[dict[str, Any]], division: Division, shard_mib: int
) -> pd.DataFrame:
    """Join the slices of all volumes to shards, in order, and give the index; `z` moves there from `converted`."""
    for leftover in [*find_shards(out), *out.glob(".*.tmp")]:
        leftover.unlink()
    tables = []
    writer: ShardWriter | None = None
    total = sum(entry["slices_kept"] for entry in converted)
    if total == 0:
        raise ValueError("No slice of any volume passes the rule of the preset. Is the input a whole brain?")
    for entry in converted:
        slices = np.load(work / "volumes" / f"{entry['volume']}.npy", mmap_mode="r")
        writer = writer or ShardWriter(out, slices.shape[1:], total, shard_mib)
        writer.write(slices)
        table = class_pixels(slices[:, CHANNELS.index("label")])
        table.insert(0, "patient", entry["patient"])
        table.insert(1, "volume", entry["volume"])
        table.insert(2, "z", entry.pop("z"))
        table.insert(3, "split", division.sides[entry["patient"]])
        tables.append(table)
    return pd.concat([table for table in tables if len(table)], ignore_index=True)


def _layout_notes(jobs: Sequence[_Job]) -> list[str]:
    if any(job.volume.layout == "BraTS 2024" for job in jobs):
        return ["Label 4 of BraTS 2024 (resection cavity) became background."]
    return []


def _by_patient(faults: Sequence[Fault], volumes: Sequence[Volume]) -> list[dict[str, Any]]:
    skipped: dict[str, dict[str, Any]] = {}
    for fault in faults:
        entry = skipped.setdefault(fault.patient, {"patient": fault.patient, "reasons": [], "input_sha256": {}})
        entry["reasons"].append(f"{fault.file}: {fault.fault}")
    for volume in volumes:
        if volume.patient in skipped:
            skipped[volume.patient]["input_sha256"].setdefault(volume.volume, input_sha256(volume))
    return list(skipped.values())


def _version() -> str:
    try:
        return importlib.metadata.version("standin")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
