"""The leak guard: no patient by whom a model is judged may have been seen in training, under whatever name.

A patient is known again by name, by the tables that BraTS ships with its data (`name_mapping.csv` of 2020,
`BraTS2021_MappingToTCIA.csv` and the like: any `*mapping*.csv` that lies in the folder of a slice set), and by the
images themselves (`datamodules.signatures`). Whom a generator has seen is in the manifest of its synthetic sets; whom a
run has seen is in its checkpoints, for runs that start from them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from datamodules.signatures import METHOD, SAME_PATIENT, nearest, volume_signatures
from datamodules.slice_set import Manifest, SliceSet

_NAME_COLUMN = re.compile(r"brats|patient|subject|(?:^|[^a-z])id(?:$|[^a-z])", re.IGNORECASE)
_NAME = re.compile(r"(?=.*[A-Za-z])(?=.*\d).{5,}")
_TIME_POINT = re.compile(r"(?i)(brats-[a-z]+-\d{5})-\d{3}")

OVERRIDE = "If you know that alike images are of different people: --data.different_patients '[[ONE, OTHER]]'."

Aliases = Mapping[str, frozenset[str]]
"""Name -> all names of that patient, itself included, each as `same_name` writes it."""


def same_name(name: str) -> str:
    """Write a name as it is compared: in small letters, without the time point of BraTS 2023 and later."""
    name = name.strip()
    match = _TIME_POINT.fullmatch(name)
    return (match[1] if match else name).lower()


def read_aliases(folders: Iterable[Path]) -> Aliases:
    """Read every `*mapping*.csv` of these folders; a row has the names of one patient, and tables are joined.

    Names are the cells with letters and digits in columns about BraTS, patients, subjects or ids.

    Raises:
        ValueError: if a table cannot be read.
    """
    groups: dict[str, frozenset[str]] = {}
    for path in sorted({path for folder in folders for path in folder.glob("*.csv") if "mapping" in path.name.lower()}):
        try:
            table = pd.read_csv(path, dtype=str)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a table of names ({error}). Mend it, or remove it.") from error
        columns = [column for column in table.columns if _NAME_COLUMN.search(str(column))]
        for row in table[columns].itertuples(index=False):
            cells = [str(cell).strip() for cell in row if isinstance(cell, str)]
            names = {same_name(cell) for cell in cells if _NAME.fullmatch(cell)}
            joined = frozenset(names.union(*(groups.get(name, ()) for name in names)))
            groups |= dict.fromkeys(joined, joined)
    return groups


@dataclass(frozen=True)
class Seen:
    """Whom something has seen.

    Attributes:
        patients: their names, sorted.
        also_known_as: patient -> other names, where tables have any.
        signatures: patient -> signatures of the images of its volumes, as far as they are known.
        unknown: what has seen others without saying whom.
    """

    patients: list[str] = field(default_factory=list)
    also_known_as: dict[str, list[str]] = field(default_factory=dict)
    signatures: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def __or__(self, other: Seen) -> Seen:
        return Seen(
            sorted({*self.patients, *other.patients}),
            {**self.also_known_as, **other.also_known_as},
            {
                patient: sorted({*self.signatures.get(patient, []), *other.signatures.get(patient, [])})
                for patient in sorted({*self.signatures, *other.signatures})
            },
            sorted({*self.unknown, *other.unknown}),
        )

    def as_json(self) -> dict[str, Any]:
        """Give what a manifest or a checkpoint says of it."""
        return {
            "patients_seen": self.patients,
            "patients_also_known_as": self.also_known_as,
            "signatures_seen": {"method": METHOD, "patients": self.signatures},
            "training_unknown_of": self.unknown,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Seen:
        """Read what `as_json` gave; signatures of another method are left out."""
        signatures = content.get("signatures_seen", {})
        return cls(
            sorted(content["patients_seen"]),
            dict(content.get("patients_also_known_as", {})),
            dict(signatures["patients"]) if signatures.get("method") == METHOD else {},
            list(content.get("training_unknown_of", [])),
        )

    @classmethod
    def of_slices(cls, slices: SliceSet, aliases: Aliases) -> Seen:
        """The patients of (a part of) a real set."""
        known = {patient: aliases.get(same_name(patient), frozenset()) for patient in slices.patients}
        others = {patient: sorted(names - {same_name(patient)}) for patient, names in known.items()}
        signatures: dict[str, list[str]] = {}
        of_volume = volume_signatures(slices)
        for volume, patient in dict(zip(slices.index["volume"], slices.index["patient"], strict=True)).items():
            if volume in of_volume:
                signatures.setdefault(patient, []).append(of_volume[volume])
        return cls(slices.patients, {p: names for p, names in others.items() if names}, signatures)

    @classmethod
    def of_synthetic(cls, manifest: Manifest) -> Seen:
        """The patients whom the generator of a synthetic set saw.

        Raises:
            ValueError: if the manifest does not say.
        """
        if "patients_seen" not in manifest.content:
            raise ValueError(f"{manifest.root}/dataset.json does not say which patients its generator saw.")
        return cls.from_json(manifest.content)

    @classmethod
    def of_checkpoint(cls, path: str) -> Seen:
        """The patients that the run of a checkpoint saw; an imported one does not say."""
        try:
            content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except Exception:  # the model says what is wrong with it
            return cls(unknown=[path])
        data = content.get("BraTSDataModule", {})
        if "patients_seen" in data:
            return cls.from_json(data)
        return cls(sorted(data["training_patients"])) if "training_patients" in data else cls(unknown=[path])


@dataclass(frozen=True)
class Leaks:
    """What the comparison of held-out patients with seen ones found.

    Attributes:
        found: held-out patient -> in words, as whom it was seen.
        closest: smallest share of differing bits of two signatures; None if there were none to compare.
    """

    found: dict[str, str]
    closest: float | None


def find_leaks(held_out: Seen, seen: Seen, different: Iterable[tuple[str, str]] = ()) -> Leaks:
    """Find the held-out patients who were seen, by name, by a table of names, or by their images.

    Args:
        held_out: by whom a model is judged.
        seen: by whom it was trained.
        different: pairs of patients who are not the same although their images are alike.
    """
    known_different = {frozenset(map(same_name, pair)) for pair in different}
    owners = {same_name(name): patient for patient in seen.patients for name in _names(seen, patient)}
    found: dict[str, str] = {}
    for patient in held_out.patients:
        who = next((owners[name] for name in map(same_name, _names(held_out, patient)) if name in owners), None)
        if who is not None:
            found[patient] = patient if who == patient else f"{patient}, who is {who} by a table of names"
    closest = None
    everybody = [(one, patient) for patient, signatures in seen.signatures.items() for one in signatures]
    for patient, signatures in held_out.signatures.items():
        others = [
            (one, other)
            for one, other in everybody
            if frozenset((same_name(patient), same_name(other))) not in known_different
        ]
        for place, share in nearest(signatures, [one for one, _ in others]) if others else ():
            closest = share if closest is None else min(closest, share)
            if share <= SAME_PATIENT:
                found.setdefault(patient, f"{patient}, whose images are those of {others[place][1]}")
    return Leaks(found, closest)


def _names(seen: Seen, patient: str) -> list[str]:
    return [patient, *seen.also_known_as.get(patient, [])]


class LeakGuard:
    """Compares everybody whom training sees with the patients by whom a model is judged.

    Args:
        root: of the set that they are from, for messages.
        held_out: split -> its patients.
        carved: whether the validation patients were taken from the training patients of the set.
        different: pairs of patients who are not the same although their images are alike.

    Attributes:
        closest: split -> smallest share of differing bits of two signatures so far.
    """

    def __init__(
        self, root: str, held_out: Mapping[str, Seen], carved: bool, different: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.root, self.held_out, self.carved, self.different = root, held_out, carved, different
        self.closest: dict[str, float] = {}

    def problems_with(self, what: str, seen: Seen, is_real: bool = False) -> list[str]:
        """Say who leaks.

        A generator cannot have left out validation patients that were taken from the training patients only now: that
        is a warning.

        Args:
            what: the subject of the sentence, with its verb.
            seen: whom it has seen.
            is_real: whether that are slices themselves, and not something that was made from them.
        """
        problems = []
        for split, held_out in self.held_out.items():
            leaks = find_leaks(held_out, seen, self.different)
            if leaks.closest is not None:
                self.closest[split] = min(leaks.closest, self.closest.get(split, 1.0))
            if not leaks.found:
                continue
            names = "; ".join([*list(leaks.found.values())[:5], *(["..."] if len(leaks.found) > 5 else [])])
            if split == "validation" and self.carved and not is_real:
                warnings.warn(
                    f"{what} validation patients ({names}), which were taken from the training patients of "
                    f"{self.root}: the choice of the best checkpoint favours it. `standin prepare` can set validation "
                    "patients apart.",
                    stacklevel=2,
                )
            else:
                problems.append(
                    f"{what} {len(leaks.found)} patients of the {split} split of {self.root} ({names}). Train on other "
                    "patients, and generators on the same split."
                    f"{' ' + OVERRIDE if any('whose images' in found for found in leaks.found.values()) else ''}"
                )
        if seen.unknown:
            warnings.warn(
                f"{', '.join(seen.unknown)} does not say which patients it was trained on: nobody can tell whether "
                "test patients are among them.",
                stacklevel=2,
            )
        return problems
