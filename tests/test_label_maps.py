"""Segmenters write the volumes that they predict, and these are judged, on any number of processes."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from fake_slices import train, unet_args, write_slice_set
from fakes import write_msd, write_patient
from lightning.pytorch import LightningModule, Trainer

from callbacks.evaluation import Evaluation
from callbacks.label_maps import LabelMaps
from datamodules.brats import BraTSDataModule
from datamodules.prepare import prepare
from evaluation.evaluate import evaluate
from evaluation.results import read_results

TESTED = ("BRATS_001", "BraTS-GLI-00007-000", "BraTS2021_00006")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Eight patients of three layouts; one of them turned."""
    root = tmp_path_factory.mktemp("patients")
    for number in range(6):
        write_patient(root, f"BraTS2021_{number:05d}")
    write_patient(root, TESTED[2])
    write_patient(root, TESTED[1], "2023", shape=(25, 23, 9))
    write_msd(root, [TESTED[0]], np.diag([1.0, 1.0, 1.0, 1.0]))
    return root


@pytest.fixture(scope="module")
def split(root: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("split") / "split.json"
    names = [f"BraTS2021_{number:05d}" for number in range(6)]
    test = [TESTED[0], "BraTS-GLI-00007", TESTED[2]]
    path.write_text(json.dumps({"train": names[:5], "val": names[5:], "test": test}))
    return path


@pytest.fixture(scope="module")
def slices(root: Path, split: Path) -> Path:
    return prepare(root, split.parent / "native", split=str(split), workers=1)


class Copying(LightningModule):
    """A segmenter that gives the reference, shifted by some pixels."""

    def __init__(self, shift_px: int = 0) -> None:
        super().__init__()
        self.shift_px = shift_px

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return batch["slices"][:, 4].roll(self.shift_px, dims=-1)

    predict_step = test_step


def trainer(run_dir: Path, *callbacks, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=run_dir, accelerator="cpu", callbacks=list(callbacks), **quiet, **options)


def own_file(root: Path, volume: str):
    path = next(p for p in root.rglob(f"{volume}*") if "seg" in p.name or p.parent.name == "labelsTr")
    return nibabel.load(path)


@pytest.mark.parametrize("task", ["test", "predict"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_what_is_predicted_lies_over_the_patients_own_file(root, slices, tmp_path, task, batch_size):
    maps = LabelMaps()
    data = BraTSDataModule(str(slices), batch_size=1, epoch_images=1, eval_batch_size=batch_size)
    getattr(trainer(tmp_path, maps), task)(Copying(), datamodule=data)
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [f"{v}.nii.gz" for v in TESTED]
    assert maps.files == {volume: tmp_path / "predictions" / f"{volume}.nii.gz" for volume in TESTED}
    for volume, path in maps.files.items():
        written, own = nibabel.load(path), own_file(root, volume)
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(written.affine, own.affine)
        labels = np.asarray(own.dataobj)
        assert set(np.unique(labels)) == ({0, 1, 2, 4} if "2021" in volume else {0, 1, 2, 3})
        np.testing.assert_array_equal(np.asarray(written.dataobj), labels)


def test_a_set_of_an_earlier_version_is_refused_before_anything_slow(tmp_path):
    manifest = write_slice_set(tmp_path / "slices") / "dataset.json"
    content = json.loads(manifest.read_text())
    for volume in content["volumes"]:
        del volume["native"]
    manifest.write_text(json.dumps(content))
    data = BraTSDataModule(str(manifest.parent), batch_size=1, epoch_images=1)
    with pytest.raises(
        ValueError, match=r"in which space the files of P6 are; .* Run the same `standin prepare` again"
    ):
        trainer(tmp_path, LabelMaps()).test(Copying(), datamodule=data)


def test_parts_of_volumes_are_no_predictions(slices, tmp_path):
    data = BraTSDataModule(str(slices), batch_size=1, epoch_images=1, eval_batch_size=4)
    with pytest.raises(ValueError, match=r"all slices of a volume, but got 6 of 7 of BraTS-GLI-00007-000\. Leave"):
        trainer(tmp_path, LabelMaps(), limit_test_batches=3).test(Copying(), datamodule=data)


def test_volumes_without_a_prediction_are_an_error(slices, tmp_path):
    data = BraTSDataModule(str(slices), batch_size=1, epoch_images=1, eval_batch_size=6)
    with pytest.raises(
        ValueError, match="of 3 test volumes, but those of BraTS-GLI-00007-000, BraTS2021_00006 are mis"
    ):
        trainer(tmp_path, LabelMaps(), Evaluation(), limit_test_batches=1).test(Copying(), datamodule=data)


def test_judging_needs_label_maps(slices, tmp_path):
    data = BraTSDataModule(str(slices), batch_size=1, epoch_images=1)
    with pytest.raises(ValueError, match=r"add it to trainer\.callbacks"):
        trainer(tmp_path, Evaluation()).test(Copying(), datamodule=data)


def test_the_judgement_of_a_test_is_that_of_the_command_line(root, slices, tmp_path):
    data = BraTSDataModule(str(slices), batch_size=1, epoch_images=1)
    judge = trainer(tmp_path / "run", LabelMaps(), Evaluation(workers=1))
    logged = judge.test(Copying(shift_px=2), datamodule=data)[0]
    options = {"labels": "reference", "cases": slices, "slices": slices, "workers": 1}
    evaluate(tmp_path / "run" / "predictions", root, tmp_path / "command", **options)
    ours, theirs = (read_results(folder) for folder in (tmp_path / "run", tmp_path / "command"))
    assert ours.folder == tmp_path / "run" / "evaluation"
    named = ["reference_file", "reference_sha256"]
    pd.testing.assert_frame_equal(ours.table.drop(columns=named), theirs.table.drop(columns=named))
    assert sorted(ours.table["case"].unique()) == list(TESTED)
    assert sorted(ours.table["patient"].unique()) == [TESTED[0], "BraTS-GLI-00007", TESTED[2]]
    wt = ours.table[ours.table["entity"] == "WT"]
    assert 0.5 < wt["dice"].min() <= wt["dice"].max() < 0.9
    assert logged["hd95/test/WT"] == pytest.approx(wt["hd95_mm"].mean(), rel=1e-6)
    assert logged["nsd/test/WT"] == pytest.approx(wt["nsd_1mm"].mean(), rel=1e-6)
    assert {path.name for path in (ours.folder / "figures").iterdir()} >= {"metrics.png", "patients.png"}
    assert not list(ours.folder.rglob("*.nii.gz"))


def test_processes_of_which_one_is_without_a_patient_equal_one(slices, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.evaluate._draw", lambda *args: None)  # slow, and the same in any case
    logged = {}
    for devices in (1, 4):
        data = BraTSDataModule(str(slices), batch_size=4, epoch_images=4, eval_batch_size=4)
        options = {"devices": devices, "strategy": "ddp_fork", "use_distributed_sampler": False}
        judge = trainer(tmp_path / str(devices), LabelMaps(), Evaluation(), **options)
        logged[devices] = judge.test(Copying(shift_px=1), datamodule=data)[0]
    assert logged[1] == logged[4]
    names = [*(f"predictions/{volume}.nii.gz" for volume in TESTED), "evaluation/per_patient.csv"]
    for name in (*names, "evaluation/summary.csv", "evaluation/summary.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes(), name


def test_a_segmenter_predicts_what_its_test_has_judged(slices, tmp_path):
    args = [*unet_args(tmp_path, slices), "--trainer.max_epochs=1"]
    train(args)
    assert {"hd95/test/WT", "nsd/test/WT"} <= json.loads((tmp_path / "metrics.json").read_text()).keys()
    of_test = tmp_path / "of_test"
    (tmp_path / "predictions").rename(of_test)
    train([*args, "--task=predict"])
    for volume in TESTED:
        name = f"{volume}.nii.gz"
        assert (of_test / name).read_bytes() == (tmp_path / "predictions" / name).read_bytes()
