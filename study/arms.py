"""The arms of a study: segmenters that were trained alike on the same sets, one for every seed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from datamodules.slice_set import CLASSES

ENTITIES = ("core", "oedema", "enhancing", "WT", "TC", "ET")
CLASS_MEAN = "mean of classes"
OF_ONE_RUN = ("--run_dir", "--seed_everything", "--task")
"""Words of a command line in which the runs of an arm differ."""
_PATH = re.compile(r"path: *[^,}]+")

ArmKind = Literal["real", "synthetic", "real + synthetic"]
ARM_KINDS: tuple[ArmKind, ...] = ("real", "synthetic", "real + synthetic")
KIND_WORDS = ("real", "synthetic", "real+synthetic", "both")
"""What names of runs say of the kind."""


Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Segmenter:
    """A segmenter run: its record, its counts, and Dice (patients x entities) under both conventions."""

    name: str
    folder: Path
    run: Mapping[str, Any]
    counts: pd.DataFrame
    dice: pd.DataFrame
    dice_empty_one: pd.DataFrame


@dataclass(frozen=True)
class Arm:
    """Segmenters that differ in nothing but the seed.

    Attributes:
        name: unique in the study.
        kind: on what they were trained.
        source: the generators of their synthetic slices; empty for real ones.
        settings: the words of their command line, without folder, seed and the paths of training sets.
        segmenters: one for every seed.
    """

    name: str
    kind: ArmKind
    source: str
    settings: tuple[str, ...]
    segmenters: Sequence[Segmenter]

    @property
    def stem(self) -> str:
        """What the names of its runs begin with, all of them."""
        first, *others = [one.name for one in self.segmenters]
        if not others:
            return first
        shared = takewhile(lambda letters: len(set(letters)) == 1, zip(first, *others, strict=False))
        return "".join(letters[0] for letters in shared).rstrip("-_ ").removesuffix("seed").rstrip("-_ ") or first

    def difference(self, shared: Set[str]) -> str:
        """Its stem, less the words that all arms share and those that say on what it was trained."""
        told = {*shared, *KIND_WORDS, *self.source.split(" + ")}
        return "-".join(word for word in self.stem.split("-") if word not in told) or self.stem

    @property
    def model(self) -> str:
        """The class of the model."""
        return str(self.segmenters[0].run["model"])

    @property
    def seeds(self) -> list[int]:
        """The seed of every segmenter."""
        return [one.run["seed"] for one in self.segmenters]

    @property
    def patients(self) -> list[str]:
        """The patients they were tested on."""
        return list(self.segmenters[0].dice.index)

    @property
    def mean_dice(self) -> pd.DataFrame:
        """Means over seeds: (patients, entities)."""
        names = [*ENTITIES, CLASS_MEAN]
        return pd.DataFrame({name: self.dice(name).mean(axis=1) for name in names}, index=self.patients)

    def dice(self, entity: str) -> Floats:
        """Dice of an entity: (patients, seeds), NaN where neither prediction nor reference holds it."""
        return np.stack([one.dice[entity].to_numpy(np.float64) for one in self.segmenters], axis=1)

    def dice_empty_one(self, entity: str) -> Floats:
        """The same with 1 instead of NaN."""
        return np.stack([one.dice_empty_one[entity].to_numpy(np.float64) for one in self.segmenters], axis=1)


def command_of(folder: Path) -> str:
    """Give the command that makes a run, as far as it is known."""
    record = folder / "run.json"
    if record.is_file():
        command = json.loads(record.read_text()).get("command")
        if command:
            return "python " + " ".join(command)
    return f"python train.py --config configs/NAME.yaml --run_dir {folder}"


def read_run(folder: Path, kind: str) -> dict[str, Any]:
    """Read run.json, and check the kind of the run."""
    run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    if run["kind"] != kind:
        raise ValueError(f"Expected a {kind} run at {folder}, but run.json says it is a {run['kind']}.")
    return run


def read_arms(folders: Sequence[Path], emitted: Mapping[str, str]) -> list[Arm]:
    """Read segmenter runs and put those that differ in the seed alone together.

    Args:
        folders: of the runs.
        emitted: fingerprint of a synthetic set -> name of its generator.

    Returns:
        The arms: real first, then synthetic, then both.

    Raises:
        ValueError: if a table is incomplete, or the runs were tested on different patients.
    """
    groups: dict[tuple[object, ...], list[Segmenter]] = {}
    first: Segmenter | None = None
    for folder in folders:
        segmenter = _read_segmenter(folder)
        first = first or segmenter
        if set(segmenter.dice.index) != set(first.dice.index):
            differing = sorted(set(segmenter.dice.index) ^ set(first.dice.index))
            raise ValueError(
                f"{folder} and {folders[0]} were tested on different patients ({', '.join(differing[:5])}"
                f"{', ...' if len(differing) > 5 else ''} in one of them only). Arms are compared on the same "
                "patients: use one real set and split for all segmenters."
            )
        run = segmenter.run
        key = (_arm_kind(run), _sources(run, emitted), run["model"], _settings(run))
        twice = any(run["seed"] == other.run["seed"] for other in groups.get(key, []))
        groups.setdefault((*key, segmenter.name) if twice else key, []).append(segmenter)
    arms = [
        Arm("", cast(ArmKind, kind), str(source), cast("tuple[str, ...]", settings), members)
        for (kind, source, _, settings, *_), members in groups.items()
    ]
    arms = [replace(arm, name=name) for arm, name in zip(arms, _names(arms), strict=True)]
    return sorted(arms, key=lambda arm: ARM_KINDS.index(arm.kind))


def _names(arms: Sequence[Arm]) -> list[str]:
    """Name arms by what they were trained on and, where several share that, by what their runs are called."""
    several_sources = len({arm.source for arm in arms if arm.source}) > 1
    names = [f"{arm.kind} ({arm.source})" if arm.source and several_sources else arm.kind for arm in arms]
    shared = set.intersection(*(set(arm.stem.split("-")) for arm in arms)) if arms else set()
    for longer in (
        lambda arm: arm.difference(shared),
        lambda arm: arm.stem,
        lambda arm: ", ".join(one.name for one in arm.segmenters),
    ):
        twice = {name for name in names if names.count(name) > 1}
        kinds = [name.partition(": ")[0] for name in names]
        names = [
            f"{kind}: {longer(arm)}" if name in twice else name
            for arm, kind, name in zip(arms, kinds, names, strict=True)
        ]
    return names


def _settings(run: Mapping[str, Any]) -> tuple[str, ...]:
    words, kept = list(run["command"][1:]), []
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name in OF_ONE_RUN:
            if not equals and words:
                words.pop(0)
            continue
        kept.append(_PATH.sub("", word))
    return tuple(kept)


def _read_segmenter(folder: Path) -> Segmenter:
    run = read_run(folder, "segmenter")
    counts = pd.read_csv(folder / "dice_per_patient.csv", dtype={"patient": str})
    if counts.duplicated(["patient", "entity"]).any() or set(counts["entity"]) != set(ENTITIES):
        raise ValueError(
            f"{folder / 'dice_per_patient.csv'}: expected one row for each patient and entity of "
            f"{', '.join(ENTITIES)}, but got {len(counts)} rows. Run again: `{command_of(folder)}`."
        )
    total = 2 * counts["tp"] + counts["fp"] + counts["fn"]
    scored = counts.assign(score=2 * counts["tp"] / total.where(total > 0))
    wide = scored.pivot(index="patient", columns="entity", values="score").sort_index()[list(ENTITIES)]
    return Segmenter(run["name"], folder, run, counts, _with_class_mean(wide), _with_class_mean(wide.fillna(1.0)))


def _arm_kind(run: Mapping[str, Any]) -> ArmKind:
    kinds = {part["kind"] for part in run["training_sets"]}
    return cast(ArmKind, " + ".join(sorted(kinds)))


def _sources(run: Mapping[str, Any], emitted: Mapping[str, str]) -> str:
    """The generators whose slices a run was trained on; a set from elsewhere is named by its folder."""
    synthetic = [part for part in run["training_sets"] if part["kind"] == "synthetic"]
    return " + ".join(emitted.get(part["fingerprint"], Path(part["root"]).parent.name) for part in synthetic)


def _with_class_mean(dice: pd.DataFrame) -> pd.DataFrame:
    return dice.assign(**{CLASS_MEAN: dice[list(CLASSES[1:])].mean(axis=1, skipna=True)})
