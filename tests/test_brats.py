import json
import pickle

import numpy as np
import pytest
import torch
from fake_sets import ready, resplit, synthetic_set
from fake_slices import write_slice_set

from datamodules.brats import BraTSDataModule
from datamodules.recipe import TrainingPart
from datamodules.slice_set import SliceSet, read_manifest


def test_slices_come_back_as_they_were_written(slice_set):
    stored = np.concatenate([np.load(path) for path in sorted(slice_set.glob("slices-*.npy"))])
    everything = SliceSet(slice_set)
    positions = [len(stored) - 1, 0, 7, 7]
    assert np.array_equal(everything.read(positions), stored[positions])
    test = SliceSet(slice_set, "test")
    assert test.patients == ["P6", "P7"]
    assert np.array_equal(test.read(range(len(test))), stored[-len(test) :])
    assert np.array_equal(pickle.loads(pickle.dumps(test)).read([0]), test.read([0]))


def test_training_batch_holds_training_patients_with_their_positions(slice_set):
    data = ready(slice_set)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    batch = next(iter(loader))
    assert batch["slices"].shape == (4, 5, 16, 16)
    assert batch["slices"].dtype == torch.uint8
    assert batch["position"].tolist() == [16, 17, 18, 19]
    assert data.train_patients == ["P0", "P1", "P2", "P3", "P4"]
    assert int(batch["patient"].max()) < 5


def test_loader_workers_do_not_change_the_data(slice_set):
    batches = []
    for workers in (0, 2):
        loader = ready(slice_set, num_workers=workers).train_dataloader()
        batches.append(torch.cat([batch["slices"] for batch in loader]))
    assert torch.equal(*batches)


def test_evaluation_shows_every_slice_of_the_split_once(slice_set):
    data = ready(slice_set, eval_batch_size=3)
    seen = torch.cat([batch["slices"] for batch in data.test_dataloader()])
    assert torch.equal(seen, torch.from_numpy(data.real_test.read(range(len(data.real_test)))))


def test_validation_patients_are_kept_from_training_where_the_set_has_none(tmp_path):
    root = write_slice_set(tmp_path / "slices")
    resplit(root, split=SliceSet(root).index["split"].replace("val", "train"))
    data = ready(root, val_fraction=0.3)
    assert len(data.val_patients) == 2
    assert not set(data.val_patients) & set(data.train_patients)
    assert set(data.real_train.patients) == set(data.train_patients)
    assert set(data.training_sets[0].patients) == set(data.train_patients)


def test_sizes_that_differ_are_refused(slice_set, tmp_path):
    small = synthetic_set(tmp_path / "small", size_px=8)
    with pytest.raises(ValueError, match=r"slices of \(8, 8\) px, but .* of \(16, 16\) px"):
        ready(slice_set, train=[TrainingPart(str(small))])


def test_synthetic_root_is_refused(tmp_path):
    root = synthetic_set(tmp_path / "synthetic")
    with pytest.raises(ValueError, match="root must be a real one"):
        ready(root)


def test_problems_of_the_options_come_all_at_once(slice_set):
    with pytest.raises(ValueError, match=r"multiple of batch_size \(3\).* val_fraction must be"):
        BraTSDataModule(str(slice_set), batch_size=3, epoch_images=8, val_fraction=1.0)


def test_folder_without_a_slice_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no dataset\.json.*standin prepare"):
        SliceSet(tmp_path)


def test_unfinished_and_foreign_sets_are_refused(slice_set, tmp_path):
    broken = write_slice_set(tmp_path / "broken")
    (broken / "slices-00001.npy").unlink()
    with pytest.raises(ValueError, match="A file is missing or foreign"):
        SliceSet(broken)
    content = json.loads((broken / "dataset.json").read_text())
    content["channels"] = ["T1ce", "T1", "T2", "FLAIR", "label"]
    (broken / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected channels to be"):
        SliceSet(broken)
    (broken / "dataset.json").unlink()
    with pytest.raises(ValueError, match="is unfinished: run the command that makes it again"):
        SliceSet(broken)


def test_fingerprint_tells_content_and_not_shards(tmp_path):
    one = write_slice_set(tmp_path / "one", shards=1)
    three = write_slice_set(tmp_path / "three", shards=3)
    other = write_slice_set(tmp_path / "other", seed=1)
    assert read_manifest(one).fingerprint == read_manifest(three).fingerprint != read_manifest(other).fingerprint
