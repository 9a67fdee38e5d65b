"""Judgement of the label maps of a test, in the form of `standin evaluate`."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.label_maps import LabelMaps
from datamodules.native_space import native_space, save_label_map, save_volume, stored_volume
from datamodules.parallel import available_cores, run_in_processes
from datamodules.slice_set import SliceSet
from evaluation.cases import Case, LabelFile
from evaluation.evaluate import judge_cases
from evaluation.judgement import check_case, judge_case
from lightning_modules.base import log_epoch
from metrics.surface_distance import HausdorffKind
from metrics.volumes import Empty

Item = TypeVar("Item")
LOGGED = {"hd95_mm": "hd95", "nsd_1mm": "nsd"}
VOLUMES_PER_WORKER = 4
"""Judging fewer takes no longer than the start of a process."""


class Evaluation(Callback):
    """Judge the files that `LabelMaps` writes in a test, in 3-D and in mm, and leave `<run_dir>/evaluation`.

    References are the labels of the slice set, brought to the same voxels; only slices that the set holds are judged.
    (`standin evaluate` judges the same files against the original segmentations.) The means over patients go to the
    log as `hd95/test/<entity>`, in mm, and `nsd/test/<entity>`, at 1 mm. Every process judges its own volumes.

    Args:
        empty: convention of the means for structures that are absent from one side or both.
        hausdorff: 95th percentile of each direction, the larger one (maxdir), or of both together (pooled).
        workers: processes that judge for each training process; null takes its share of the cores, or fewer where there
            are few volumes.
    """

    def __init__(self, empty: Empty = "nan", hausdorff: HausdorffKind = "maxdir", workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"Evaluation: expected workers to be at least 1, or null, but got {workers}.")
        self.empty: Empty = empty
        self.hausdorff: HausdorffKind = hausdorff
        self.workers = workers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the callback that writes the label maps."""
        writers = [callback for callback in trainer.callbacks if isinstance(callback, LabelMaps)]  # type: ignore[attr-defined]
        if not writers:
            raise ValueError("Evaluation judges what callbacks.LabelMaps writes: add it to trainer.callbacks.")
        self.maps = writers[0]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge, and log the means."""
        out = Path(trainer.default_root_dir) / "evaluation"
        records = out / ".judged"
        records.mkdir(parents=True, exist_ok=True)
        mine = [self._case(volume, path, out / ".references") for volume, path in self.maps.files.items()]
        share = min(available_cores() // trainer.num_devices, len(mine) // VOLUMES_PER_WORKER)
        workers = self.workers or max(1, share)
        judge = partial(_judge, slices=self.maps.set, records=records, hausdorff=self.hausdorff)
        run_in_processes(judge, mine, workers, "Judging")
        cases = sorted(gathered(trainer, mine), key=lambda case: case.name)
        missing = sorted(set(self.maps.spaces) - {case.name for case in cases})
        if missing:
            raise ValueError(
                f"Evaluation: expected predictions of {len(self.maps.spaces)} test volumes, but those of "
                f"{', '.join(missing[:5])} are missing. Leave out trainer.limit_test_batches."
            )
        means: dict[str, float] = {}
        if trainer.is_global_zero:
            judge_cases(cases, out, self.empty, self.hausdorff)
            shutil.rmtree(out / ".references")
            summary = pd.read_csv(out / "summary.csv")
            for metric, entity, mean in summary[["metric", "entity", "mean"]].itertuples(index=False):
                if metric in LOGGED:
                    means[f"{LOGGED[metric]}/test/{entity}"] = mean
        log_epoch(pl_module, trainer.strategy.broadcast(means))

    def _case(self, volume: str, path: Path, references: Path) -> Case:
        slices = self.maps.set
        rows = slices.index[slices.index["volume"] == volume]
        layouts = {entry["volume"]: entry["layout"] for entry in slices.manifest.content["volumes"]}
        codes = {code: index for index, code in enumerate(self.maps.spaces[volume].label_codes)}
        return Case(
            name=volume,
            patient=rows["patient"].iloc[0],
            prediction=LabelFile(path, codes, layouts[volume]),
            reference=LabelFile(references / path.name, codes, layouts[volume]),
            flair=(references / f"{volume}_flair.nii.gz", None),
            slices=tuple(sorted(rows["z"].tolist())),
        )


def _judge(case: Case, slices: SliceSet, records: Path, hausdorff: HausdorffKind) -> None:
    """Judge a case and leave the record, where `judge_cases` looks it up; that reports faults as well.

    Reference and FLAIR are written for the time of the judgement.
    """
    assert case.flair is not None
    space = native_space(slices.manifest, case.name)
    save_label_map(case.reference.path, stored_volume(slices, case.name, "label"), space)
    save_volume(case.flair[0], stored_volume(slices, case.name, "FLAIR"), space)
    check = check_case(case, records, hausdorff)
    if not check.faults:
        judge_case(check)


def gathered(trainer: Trainer, items: list[Item]) -> list[Item]:
    """Collect the items of all processes, in the order of the processes."""
    if trainer.world_size == 1:
        return items
    everything: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everything, items)
    return [item for part in everything for item in part]
