"""Divide patients, never slices, into train, val and test.

The lists of `paper_splits.json` are those of Usman Akbar, Larsson, Blystad, Eklund, Scientific Data 11:259 (2024),
arXiv 2306.02986, read from `Preparation/subjectPermutation_BRATS20{20,21}.mat` of their repository muhamadusman/Assist
(commit 43035d2, MIT). They have no validation patients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from datamodules.slice_set import Split

SPLITS: tuple[Split, ...] = get_args(Split)
_FIRST_SERVED: tuple[Split, ...] = ("train", "test", "val")


@dataclass(frozen=True)
class Division:
    """Who is on which side.

    Attributes:
        sides: patient -> split.
        source: in words where the division comes from.
        missing: patients of the list that are not in the input, sorted.
    """

    sides: Mapping[str, Split]
    source: str
    missing: Sequence[str] = ()

    def patients(self, side: Split) -> list[str]:
        """The patients of one side, sorted."""
        return sorted(patient for patient, own in self.sides.items() if own == side)


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise a ValueError unless these are three shares that add up to 1."""
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"fractions={list(fractions)}: expected the shares of train, val and test, none negative, that add up to "
            "1, for example [0.7, 0.1, 0.2]."
        )


def divide_at_random(
    patients: Collection[str], fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> Division:
    """Divide by a hash of seed and patient id, so the order of the files does not matter.

    Every side whose share is above 0 gets a patient where there are enough (train first, then test, then val). A
    patient that is added later moves few of the others.
    """
    check_fractions(fractions)
    shares = dict(zip(SPLITS, fractions, strict=True))
    ordered = sorted(set(patients), key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest())
    exact = {side: round(shares[side] * len(ordered), 9) for side in SPLITS}
    counts = {side: int(exact[side]) for side in SPLITS}
    by_remainder = sorted(_FIRST_SERVED, key=lambda side: counts[side] - exact[side])
    for side in by_remainder[: len(ordered) - sum(counts.values())]:
        counts[side] += 1
    wanted = [side for side in _FIRST_SERVED if shares[side] > 0][: len(ordered)]
    for side in wanted:
        if counts[side] == 0:
            counts[max(SPLITS, key=lambda other: counts[other])] -= 1
            counts[side] = 1
    sides: dict[str, Split] = {}
    for side in SPLITS:
        for patient in ordered[len(sides) : len(sides) + counts[side]]:
            sides[patient] = side
    return Division(sides, "random")


def paper_lists() -> dict[str, Split]:
    """Give the side of each of the 369 (BraTS 2020) and 1,251 (BraTS 2021) patients of the paper."""
    content = json.loads(Path(__file__).with_name("paper_splits.json").read_text())
    sides: dict[str, Split] = {}
    for data_set in content["data_sets"].values():
        for side in ("train", "test"):
            for number in data_set[side]:
                sides[f"{data_set['prefix']}{number:0{data_set['digits']}d}"] = side
    return sides


def divide_as_paper(patients: Collection[str]) -> Division:
    """Divide as the paper did: train and test, no validation patients.

    Patients of the lists that are absent are named in `missing`, for those data sets of which any patient is there.

    Raises:
        ValueError: if a patient is in neither list.
    """
    lists = paper_lists()
    unknown = sorted(set(patients) - set(lists))
    if unknown:
        raise ValueError(
            f"split=paper: {_some(unknown)} in none of the paper's lists, which have BraTS20_Training_001 to 369 and "
            "1,251 of BraTS2021_00000 to 01666. Use split=random or a file for other patients."
        )
    present = {patient.partition("_")[0] for patient in patients}
    missing = sorted(patient for patient in set(lists) - set(patients) if patient.partition("_")[0] in present)
    return Division({patient: lists[patient] for patient in patients}, "paper", missing)


def divide_by_file(patients: Collection[str], path: Path, absent: Collection[str] = ()) -> Division:
    """Divide as a JSON or YAML file says: {"train": [...], "val": [...], "test": [...]}.

    Args:
        patients: those of the input.
        path: the file; a side without patients may be left out.
        absent: patients that the file may name although they are not in the input (they were skipped as faulty).

    Raises:
        ValueError: that lists everything wrong at once: unknown patients, patients named twice or not at all.
    """
    content = _read_lists(path)
    named: dict[str, list[str]] = {}
    for side, ids in content.items():
        for patient in ids:
            named.setdefault(patient, []).append(side)
    problems = []
    for patient, where in sorted(named.items()):
        if len(set(where)) > 1:
            problems.append(f"{patient} is on {len(set(where))} sides ({', '.join(dict.fromkeys(where))})")
        elif len(where) > 1:
            problems.append(f"{patient} is named {len(where)} times in {where[0]}")
    unknown = sorted(set(named) - set(patients) - set(absent))
    if unknown:
        problems.append(f"{_some(unknown)} not among the patients found (name patients, not volumes or files)")
    unnamed = sorted(set(patients) - set(named))
    if unnamed:
        problems.append(f"{_some(unnamed)} in the input, but on no side")
    if problems:
        raise ValueError(f"The split file {path} does not fit: {'; '.join(problems)}. Correct the file.")
    sides = {patient: where[0] for patient, where in named.items() if patient in set(patients)}
    return Division({k: s for k, v in sides.items() for s in SPLITS if s == v}, f"file {path.name}")


def _read_lists(path: Path) -> dict[str, list[str]]:
    text = path.read_text()
    try:
        if path.suffix.lower() == ".json":
            content: Any = json.loads(text)
        else:
            import yaml

            content = yaml.safe_load(text)
    except ValueError as error:
        raise ValueError(f"The split file {path} is not valid JSON ({error}).") from error
    except Exception as error:  # yaml.YAMLError has no common base with ValueError
        raise ValueError(f"The split file {path} is not valid YAML ({error}).") from error
    form = 'expected {"train": [patient ids], "val": [...], "test": [...]}'
    if not isinstance(content, dict) or not set(content) <= set(SPLITS) or not content:
        got = list(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"The split file {path}: {form}, but got {got}.")
    for side, ids in content.items():
        if not isinstance(ids, list) or not all(isinstance(patient, str) for patient in ids):
            raise ValueError(f"The split file {path}: {form}, but {side} is {ids!r:.80}. Write ids in quotes.")
    return content


def divide(
    patients: Collection[str],
    split: str = "random",
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    absent: Collection[str] = (),
) -> Division:
    """Divide patients as `split` says: "random", "paper", or the path of a file.

    Raises:
        ValueError: if `split` is neither, or the patients do not fit it.
    """
    if split == "random":
        return divide_at_random(patients, fractions, seed)
    if split == "paper":
        return divide_as_paper(patients)
    if not Path(split).is_file():
        raise ValueError(
            f"split={split}: expected random, paper, or the path of a JSON or YAML file, but no such file."
        )
    return divide_by_file(patients, Path(split), absent)


def _some(patients: Sequence[str], shown: int = 10) -> str:
    more = f" and {len(patients) - shown} more" if len(patients) > shown else ""
    return f"{', '.join(patients[:shown])}{more} {'is' if len(patients) == 1 else 'are'}"
