"""Exports of slice sets, read back by the libraries that they are for; nnU-Net's own commands are run by hand."""

import json

import nibabel
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from fake_sets import real_set, resplit, synthetic_set
from fake_slices import write_slice_set
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImaged
from PIL import Image

from datamodules import exports
from datamodules.export_decathlon import export_decathlon
from datamodules.export_huggingface import export_huggingface
from datamodules.export_images import export_images
from datamodules.export_nnunet import export_nnunet
from datamodules.slice_set import CHANNELS, SliceSet, find_shards

EXPORTS = {
    "nnunet": export_nnunet,
    "decathlon": export_decathlon,
    "images": export_images,
    "huggingface": export_huggingface,
}


def grey(path):
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def change(root, row, channel, value):
    """Overwrite a channel of a slice, behind the back of the index."""
    shard = find_shards(root)[0]
    slices = np.load(shard)
    slices[row, channel] = value
    np.save(shard, slices)


@pytest.fixture
def split_set(tmp_path):
    """A real set with training patients A, B, C, D, validation patient V and test patient T, 6 slices each."""
    sides = {name: {"V": "val", "T": "test"}.get(name, "train") for name in "ABCDVT"}
    return real_set(tmp_path / "slices", sides)


@pytest.fixture
def train_set(tmp_path):
    return real_set(tmp_path / "training", dict.fromkeys("ABCDEFG", "train") | {"T": "test"})


def test_nnunet_holds_the_same_pixels_under_its_own_names(slice_set, tmp_path):
    out = export_nnunet(slice_set, tmp_path / "Dataset501_Fake", workers=1)
    slices = SliceSet(slice_set)
    for row, one in enumerate(slices.read(range(len(slices)))):
        index = slices.index.loc[row]
        side, name = "Ts" if index["split"] == "test" else "Tr", f"{index['patient']}_z{index['z']:03d}"
        for channel in range(4):
            np.testing.assert_array_equal(grey(out / f"images{side}/{name}_{channel:04d}.png"), one[channel])
        np.testing.assert_array_equal(grey(out / f"labels{side}/{name}.png"), one[4])
    assert len(list(out.rglob("*.png"))) == 5 * len(slices)
    learned = (slices.index["split"] != "test").sum()
    assert json.loads((out / "dataset.json").read_text()) == {
        "name": "Dataset501_Fake",
        "description": f"real slices, from the StandIn slice set {slices.manifest.fingerprint}",
        "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"},
        "labels": {"background": 0, "core": 1, "oedema": 2, "enhancing": 3},
        "numTraining": learned,
        "file_ending": ".png",
    }


def patients(names):
    return {name.split("_z")[0] for name in names}


def test_fold_of_nnunet_is_that_of_the_validation_patients_unless_others_are_asked_for(split_set, tmp_path):
    out = export_nnunet(split_set, tmp_path / "Dataset501_Own", workers=1)
    (only,) = json.loads((out / "splits_final.json").read_text())
    assert (patients(only["train"]), patients(only["val"])) == (set("ABCD"), {"V"})

    again = export_nnunet(split_set, tmp_path / "Dataset502_Folds", folds=3, workers=1)
    assert len(json.loads((again / "splits_final.json").read_text())) == 3


def test_folds_of_nnunet_validate_every_slice_once_and_part_no_patient(train_set, tmp_path):
    out = export_nnunet(train_set, tmp_path / "Dataset501_Folds", seed=1, workers=1)
    folds = json.loads((out / "splits_final.json").read_text())
    everything = {path.stem for path in (out / "labelsTr").iterdir()}
    assert len(everything) == 7 * 6
    assert [len(patients(fold["val"])) for fold in folds] == [2, 2, 1, 1, 1]
    for fold in folds:
        assert set(fold["train"]) | set(fold["val"]) == everything
        assert not patients(fold["train"]) & patients(fold["val"])
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(everything)
    other = export_nnunet(train_set, tmp_path / "Dataset502_Folds", seed=2, workers=1)
    assert json.loads((other / "splits_final.json").read_text()) != folds


def test_synthetic_slices_are_patients_of_their_own(tmp_path):
    root = synthetic_set(tmp_path / "made", count=10)
    out = export_nnunet(root, tmp_path / "Dataset501_Made", workers=1)
    folds = json.loads((out / "splits_final.json").read_text())
    assert [len(fold["val"]) for fold in folds] == [2] * 5
    assert {name for fold in folds for name in fold["val"]} == {f"made-{i}" for i in range(10)}


def test_more_folds_than_patients_and_a_foreign_folder_name_are_refused(train_set, tmp_path):
    with pytest.raises(ValueError, match=r"folds=8: expected 2 to 7, the number of patients to train on"):
        export_nnunet(train_set, tmp_path / "Dataset501_A", folds=8, workers=1)
    with pytest.raises(ValueError, match=r"Expected a folder as nnU-Net wants it.*Dataset501_Brain, but got .*/export"):
        export_nnunet(train_set, tmp_path / "export", workers=1)


def test_monai_reads_the_decathlon_list_and_the_same_voxels(split_set, tmp_path):
    out = export_decathlon(split_set, tmp_path / "out", workers=1)
    slices = SliceSet(split_set)
    pixels = slices.read(range(len(slices)))
    load = LoadImaged(["image", "label"], ensure_channel_first=True)
    rows = []
    for key, side in (("training", "train"), ("validation", "val"), ("test", "test")):
        entries = load_decathlon_datalist(out / "dataset.json", data_list_key=key)
        assert {entry["patient"] for entry in entries} == {p for p in "ABCDVT" if p in side_of(slices, side)}
        for entry in entries:
            patient, z = entry["image"].split("/")[-1].removesuffix(".nii.gz").split("_z")
            (row,) = slices.index.index[(slices.index["patient"] == patient) & (slices.index["z"] == int(z))]
            loaded = load(entry)
            np.testing.assert_array_equal(loaded["image"][..., 0].numpy(), pixels[row, :4])
            np.testing.assert_array_equal(loaded["label"][0, ..., 0].numpy(), pixels[row, 4])
            rows.append(row)
    assert sorted(rows) == list(range(len(slices)))


def side_of(slices, side):
    return set(slices.index.loc[slices.index["split"] == side, "patient"])


def test_decathlon_files_keep_size_and_place_of_the_slices(tmp_path):
    root = tmp_path / "slices"
    write_slice_set(root)
    manifest = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**manifest, "spacing_mm": 4.0, "native_spacing_mm": 2.0}))
    out = export_decathlon(root, tmp_path / "out", folds=3, workers=1)
    image = nibabel.load(out / "imagesTr" / "P0_z005.nii.gz")
    assert image.shape == (16, 16, 1, 4)
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(image.affine, [[-4, 0, 0, 0], [0, -4, 0, 0], [0, 0, 2, 10], [0, 0, 0, 1]])
    assert nibabel.load(out / "labelsTr" / "P0_z005.nii.gz").shape == (16, 16, 1)
    assert (out / "labelsTr" / "P0_z005.nii.gz").read_bytes()[4:8] == bytes(4)  # no time in the header of gzip


def test_decathlon_entries_name_folds_of_whole_patients_where_there_are_no_validation_patients(train_set, tmp_path):
    out = export_decathlon(train_set, tmp_path / "out", folds=3, workers=1)
    training = json.loads((out / "dataset.json").read_text())["training"]
    table = pd.DataFrame(training).groupby("patient")["fold"].agg(["nunique", "first"])
    assert (table["nunique"] == 1).all()
    assert sorted(table["first"]) == [0, 0, 0, 1, 1, 2, 2]


def test_pictures_have_the_names_and_grey_levels_of_the_paper(tmp_path):
    sides = {"BraTS2021_00002": "train", "BraTS20_Training_017": "test", "BraTS-GLI-00003-000": "train"}
    root = real_set(tmp_path / "slices", sides)
    out = export_images(root, tmp_path / "out", workers=1)
    slices = SliceSet(root)
    named = ["train/{}/Subject_0002_slice_{}_{}.png", "test/{}/Subject_017_slice_{}_{}.png"]
    named.append("train/{}/Subject_BraTS-GLI-00003-000_slice_{}_{}.png")
    channels = [("T1", "T1"), ("T1CE", "T1ce"), ("T2", "T2"), ("FLAIR", "flair"), ("Seg", "seg")]
    for row, one in enumerate(slices.read(range(len(slices)))):
        name, number = named[row // 6], row % 6 + 1  # slices are counted from 1
        for channel, (folder, ending) in enumerate(channels[:4]):
            np.testing.assert_array_equal(grey(out / name.format(folder, number, ending)), one[channel])
        written = grey(out / name.format("Seg", number, "seg"))
        np.testing.assert_array_equal(written, np.array([0, 51, 102, 204])[one[4]])
    assert len(list(out.rglob("*.png"))) == 5 * len(slices)


def test_pictures_of_synthetic_slices_have_no_folder_for_a_split(tmp_path):
    out = export_images(synthetic_set(tmp_path / "made", count=2), tmp_path / "out", workers=1)
    assert {path for path in files(out) if "T1CE" in path} == {"T1CE/made-0_T1ce.png", "T1CE/made-1_T1ce.png"}


def test_parquet_files_hold_pictures_and_index_as_the_datasets_library_wants_them(split_set, tmp_path):
    out = export_huggingface(split_set, tmp_path / "brain-slices", workers=1)
    slices = SliceSet(split_set)
    head, text = (out / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    card = yaml.safe_load(head)
    assert card["pretty_name"] == "brain-slices"
    names = {"train": "train", "val": "validation", "test": "test"}
    listed = {entry["split"]: entry["path"] for entry in card["configs"][0]["data_files"]}
    assert set(listed) == set(names.values())
    for split, name in names.items():
        (path,) = out.glob(listed[name])
        table = pq.read_table(path)
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert list(features) == table.column_names
        assert [features[channel] for channel in CHANNELS] == [{"_type": "Image"}] * 5
        rows = np.flatnonzero(slices.index["split"] == split)
        assert table["z"].to_pylist() == slices.index.loc[rows, "z"].to_list()
        assert table["oedema_px"].to_pylist() == slices.index.loc[rows, "oedema_px"].to_list()
        for row, entry in zip(rows, table.select(list(CHANNELS)).to_pylist(), strict=True):
            (tmp_path / "one.png").write_bytes(entry["T2"]["bytes"])
            np.testing.assert_array_equal(grey(tmp_path / "one.png"), slices.read([row])[0, 2])
            (tmp_path / "one.png").write_bytes(entry["label"]["bytes"])
            np.testing.assert_array_equal(grey(tmp_path / "one.png"), slices.read([row])[0, 4])
    assert "36 real slices" in text
    assert "images of 6 real patients" in text


def test_card_of_a_synthetic_set_names_no_patient_and_says_what_it_does_not_know(tmp_path):
    root = synthetic_set(tmp_path / "made", generator="lightning_modules.stylegan.StyleGAN2", images_seen=25_000_000)
    text = (export_huggingface(root, tmp_path / "out", workers=1) / "README.md").read_text()
    assert "trained on 2 real patients" in text
    assert "Generator: `lightning_modules.stylegan.StyleGAN2`; images seen in training: `25000000`" in text
    assert "Whether this one did must be measured" in text
    assert "P0" not in text


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_that_was_killed_goes_on_and_ends_the_same(kind, slice_set, tmp_path):
    whole = EXPORTS[kind](slice_set, tmp_path / "a" / "Dataset501_Fake", workers=1)
    broken = EXPORTS[kind](slice_set, tmp_path / "b" / "Dataset501_Fake", workers=1)
    content = files(whole)
    assert json.loads(content["export.json"])["finished"]
    written = sorted(path for path in content if path.endswith((".png", ".nii.gz", ".parquet")))
    (broken / written[-1]).unlink()
    kept = broken / written[0]
    (kept.parent / f".{kept.name}.17.tmp").write_bytes(b"half")
    record = json.loads((broken / "export.json").read_text())
    (broken / "export.json").write_text(json.dumps({**record, "finished": False}))
    before = kept.stat().st_mtime_ns
    EXPORTS[kind](slice_set, broken, workers=1)
    assert files(broken) == content
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", EXPORTS)
def test_faulty_slices_are_refused_by_name_or_left_out_and_listed(kind, train_set, tmp_path):
    change(train_set, 1, 2, 0)  # T2 of A, z 1
    change(train_set, 8, 4, 9)  # label of B, z 2
    change(train_set, 15, 4, np.roll(SliceSet(train_set).read([16])[0, 4], 3))  # the label of another slice
    out = tmp_path / "Dataset501_Faulty"
    with pytest.raises(ValueError, match=r"3 of 48 slices cannot be exported") as refused:
        EXPORTS[kind](train_set, out, workers=1)
    faults = {
        "A_z001": "T2 zero everywhere",
        "B_z002": "its label has the value 9, but classes are 0 to 3",
        "C_z003": "its label is not the one of index.parquet (other numbers of pixels)",
    }
    assert all(f"\n{name}: {fault}" in str(refused.value) for name, fault in faults.items())
    assert not out.exists()
    EXPORTS[kind](train_set, out, skip_faulty=True, workers=1)
    record = json.loads((out / "export.json").read_text())
    assert (record["slices"], record["left_out"]) == (45, faults)
    assert not any("A_z001" in path or "Subject_A_slice_2_" in path for path in files(out))


def test_patient_without_any_tumour_is_refused_by_name(tmp_path):
    healthy = np.full((6, 5, 16, 16), 7, np.uint8)
    healthy[:, 4] = 0
    root = real_set(tmp_path / "slices", dict.fromkeys("AB", "train"), {"B": healthy})
    with pytest.raises(ValueError, match=r"B_z000: no slice of B shows a tumour: are its labels missing\?"):
        export_images(root, tmp_path / "out", workers=1)
    export_images(root, tmp_path / "out", skip_faulty=True, workers=1)
    assert len(json.loads((tmp_path / "out" / "export.json").read_text())["left_out"]) == 6


def test_synthetic_set_without_any_tumour_is_refused_but_slices_without_are_fine(tmp_path):
    root = synthetic_set(tmp_path / "made", count=4)
    assert (SliceSet(root).index["oedema_px"] == 0).any()
    export_images(root, tmp_path / "fine", workers=1)
    with pytest.raises(ValueError, match=r"no slice that could be exported shows a tumour"):
        export_images(synthetic_set(tmp_path / "bare", count=1, size_px=4), tmp_path / "out", workers=1)


def test_patient_on_two_sides_and_slice_that_is_there_twice_are_refused(train_set, tmp_path):
    index = SliceSet(train_set).index
    resplit(train_set, split=["test", *index["split"][1:]])
    with pytest.raises(ValueError, match=r"1 patients are on two sides of the split.\nA in test and train"):
        export_images(train_set, tmp_path / "out", workers=1)
    resplit(train_set, split=index["split"], z=[1, *index["z"][1:]])
    with pytest.raises(ValueError, match=r"1 slices are there more than once.\nA_z001"):
        export_images(train_set, tmp_path / "out", workers=1)


def test_spacing_that_is_no_number_and_missing_names_are_refused(train_set, tmp_path):
    manifest = json.loads((train_set / "dataset.json").read_text())
    (train_set / "dataset.json").write_text(json.dumps({**manifest, "spacing_mm": float("nan")}))
    with pytest.raises(ValueError, match=r"expected spacing_mm above 0, but got nan"):
        export_decathlon(train_set, tmp_path / "out", workers=1)
    index = pd.read_parquet(train_set / "index.parquet")
    index.assign(patient=[None, *index["patient"][1:]]).to_parquet(train_set / "index.parquet")
    with pytest.raises(ValueError, match=r"index\.parquet lacks values"):
        export_decathlon(train_set, tmp_path / "out", workers=1)


def test_label_without_image_in_the_folder_is_refused_by_name(slice_set, tmp_path):
    out = export_nnunet(slice_set, tmp_path / "Dataset501_Fake", workers=1)
    (out / "labelsTr" / "orphan.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 1 files that belong to no slice of .*: labelsTr/orphan\.png\. Remove"):
        export_nnunet(slice_set, out, workers=1)


def test_folder_of_something_else_is_refused(slice_set, train_set, tmp_path):
    out = export_images(slice_set, tmp_path / "out", workers=1)
    with pytest.raises(ValueError, match=r"holds an export with another format than is asked for"):
        export_decathlon(slice_set, out, folds=2, workers=1)
    with pytest.raises(ValueError, match=r"holds an export with another fingerprint than"):
        export_images(train_set, out, workers=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"mine is not empty and holds no export"):
        export_images(slice_set, tmp_path / "mine", workers=1)


def test_processes_write_the_same(train_set, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "CASES_AT_ONCE", 20)
    one, two = (export_images(train_set, tmp_path / name, workers=n) for name, n in (("one", 1), ("two", 2)))
    assert files(one) == files(two)
    with pytest.raises(ValueError, match=r"workers=0: expected 1 or more"):
        export_images(train_set, tmp_path / "none", workers=0)
