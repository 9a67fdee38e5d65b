"""`prepare`: right sets, faults of all patients in one table before anything is converted, restart after SIGKILL."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import nibabel
import numpy as np
import pytest
from fakes import (
    SHAPE,
    fake_images,
    fake_labels,
    lps_affine,
    write_msd,
    write_nifti,
    write_patient,
    write_patients,
)

from datamodules.checks import FaultyInputError
from datamodules.prepare import prepare
from datamodules.slice_set import SliceSet, read_manifest
from datamodules.slices import slice_volume

REPOSITORY = Path(__file__).resolve().parents[1]


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def faults_of(root, out):
    """Run `prepare`, expect faults, give (patient, file, fault) of each; only records of checks are written."""
    with pytest.raises(FaultyInputError) as info:
        prepare(root, out, workers=1)
    assert [path.name for path in out.iterdir()] == [".work"]
    assert not any((out / ".work" / "volumes").iterdir())
    for fault in info.value.faults:
        for part in (fault.patient, fault.file, fault.fault, fault.remedy):
            assert part
            assert part in str(info.value)
    return [(fault.patient, fault.file, fault.fault) for fault in info.value.faults]


@pytest.fixture
def three(tmp_path):
    """A root with three sound patients, and the name of a folder for the set."""
    write_patients(tmp_path / "root", 3)
    return tmp_path / "root", tmp_path / "out"


def test_the_set_holds_the_slices_of_every_volume_in_order(three):
    root, out = three
    assert prepare(root, out, workers=1) == out
    slices = SliceSet(out)
    assert slices.manifest.kind == "real"
    assert len(slices) == 3 * 6
    assert slices.index["volume"].tolist() == [f"BraTS2021_{n:05d}" for n in range(3) for _ in range(6)]
    assert slices.index["z"].tolist() == [1, 2, 3, 4, 5, 6] * 3
    images = np.stack(list(fake_images("BraTS2021_00001").values())).astype(np.float32)
    expected = slice_volume(images, fake_labels())
    np.testing.assert_array_equal(slices.read(range(6, 12))[:, :4], expected.slices[:, :4])
    read = slices.read(range(18))[:, 4]
    for index, name in ((1, "core_px"), (2, "oedema_px"), (3, "enhancing_px")):
        assert slices.index[name].tolist() == (read == index).sum(axis=(1, 2)).tolist()
    assert slices.index.groupby("patient")["split"].nunique().max() == 1
    assert not (out / ".work").exists()


def test_the_manifest_says_where_the_set_comes_from(three):
    root, out = three
    prepare(root, out, size_px=16, seed=5, workers=1)
    manifest = read_manifest(out)
    content = manifest.content
    assert manifest.size_px == (16, 16)
    assert manifest.spacing_mm == 2.0
    assert (content["native_spacing_mm"], content["native_size_px"], content["downsampling"]) == (1.0, 32, 2)
    assert content["layouts"] == {"BraTS 2021": 3}
    assert (content["split"], content["seed"], content["preset"]) == ("random", 5, "default")
    assert "99.9" in content["preset_parameters"]["intensity"]
    assert "left" in content["axes"]
    assert sorted(name for side in content["patients"].values() for name in side) == [
        f"BraTS2021_{n:05d}" for n in range(3)
    ]
    entry = content["volumes"][0]
    assert (entry["slices_in_volume"], entry["slices_kept"]) == (8, 6)
    assert entry["tumour_voxels_kept"] == int((nibabel_labels(root, entry["volume"]) > 0).sum())
    assert entry["tumour_voxels_dropped"] == 0
    assert set(entry["white_level"]) == {"T1", "T1ce", "T2", "FLAIR"}
    assert content["skipped_patients"] == []


def nibabel_labels(root, name):
    return np.asarray(nibabel.load(root / name / f"{name}_seg.nii.gz").dataobj)


def test_paper_preset_and_split_name_the_absent_patients(three):
    root, out = three
    shutil.rmtree(root / "BraTS2021_00001")  # not one of the 1,251
    prepare(root, out, preset="paper", split="paper", workers=1)
    content = read_manifest(out).content
    assert content["patients"] == {"train": ["BraTS2021_00000"], "val": [], "test": ["BraTS2021_00002"]}
    assert len(content["patients_of_the_list_not_in_the_input"]) == 1249
    assert content["volumes"][0]["white_level"]["T1"] == fake_images("BraTS2021_00000")["T1"].max()


def test_layouts_can_be_mixed_and_agree_in_axes_and_classes(tmp_path):
    write_patient(tmp_path / "root", "BraTS2021_00000")
    write_patient(tmp_path / "root", "BraTS-GLI-00001-100", "2023", ".nii")
    write_msd(tmp_path / "root", ["BRATS_001"], np.diag([1.0, 1.0, 1.0, 1.0]))
    prepare(tmp_path / "root", tmp_path / "out", workers=1)
    content = read_manifest(tmp_path / "out").content
    assert content["layouts"] == {"BraTS 2021": 1, "BraTS 2024": 1, "MSD Task01": 1}
    assert content["notes"] == ["Label 4 of BraTS 2024 (resection cavity) became background."]
    slices = SliceSet(tmp_path / "out")
    decathlon = slices.subset(slices.index["patient"] == "BRATS_001")
    label = fake_labels()[::-1, ::-1, 4]  # written towards right and anterior, so both axes turn
    row = decathlon.index.index[decathlon.index["z"] == 4][0]
    assert decathlon.read([row])[0, 4, 4 + 24 - 1 - 10, 4 + 24 - 1 - 10] == label[24 - 1 - 10, 24 - 1 - 10] == 3


def test_time_points_of_a_patient_stay_on_one_side(tmp_path):
    for number in range(4):
        for point in (100, 101):
            write_patient(tmp_path / "root", f"BraTS-GLI-{number:05d}-{point}", "2023")
    prepare(tmp_path / "root", tmp_path / "out", fractions=(0.5, 0.25, 0.25), workers=1)
    index = SliceSet(tmp_path / "out").index
    assert index["patient"].nunique() == 4
    assert index["volume"].nunique() == 8
    assert index.groupby("patient")["split"].nunique().max() == 1


def test_shards_are_bounded_and_their_division_does_not_change_the_content(tmp_path):
    write_patients(tmp_path / "root", 2)
    for name in ("BraTS2021_00000", "BraTS2021_00001"):
        write_patient(tmp_path / "root", name, shape=(200, 200, 7))
    one = prepare(tmp_path / "root", tmp_path / "one", workers=1)
    many = prepare(tmp_path / "root", tmp_path / "many", shard_mib=1, workers=1)
    shards = sorted(many.glob("*.npy"))
    assert [len(np.load(path)) for path in shards] == [3, 3, 3, 1]  # 320 KiB a slice
    np.testing.assert_array_equal(np.concatenate([np.load(p) for p in shards]), np.load(one / "slices-00000.npy"))
    assert read_manifest(one).fingerprint == read_manifest(many).fingerprint


def test_several_processes_write_the_same_bytes_as_one(three):
    root, out = three
    prepare(root, out, workers=1)
    prepare(root, out.with_name("two"), workers=2)
    assert content_of(out) == content_of(out.with_name("two"))


def test_a_finished_set_is_returned_without_being_written_again(three):
    root, out = three
    prepare(root, out, workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".input.json"}
    os.utime(root / "BraTS2021_00000" / "BraTS2021_00000_t1.nii.gz")  # a copy of the input has other times
    assert prepare(root, out, workers=1) == out
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".input.json"}


def test_other_parameters_need_another_folder(three):
    root, out = three
    prepare(root, out, workers=1)
    message = r"out holds a finished slice set made with preset=default \(now paper\), seed=0 \(now 1\). Choose another"
    with pytest.raises(ValueError, match=message):
        prepare(root, out, preset="paper", seed=1, workers=1)


def test_other_input_needs_another_folder(three):
    root, out = three
    prepare(root, out, workers=1)
    write_patient(root, "BraTS2021_00009")
    with pytest.raises(ValueError, match="finished slice set of another input: BraTS2021_00009 changed, came or went"):
        prepare(root, out, workers=1)
    shutil.rmtree(root / "BraTS2021_00009")
    write_nifti(root / "BraTS2021_00001" / "BraTS2021_00001_t1.nii.gz", fake_images("new")["T1"])
    with pytest.raises(ValueError, match="another input: BraTS2021_00001 changed"):
        prepare(root, out, workers=1)


def test_a_folder_with_other_things_is_left_alone(three):
    root, out = three
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"out is not empty and holds no unfinished slice set. Choose another folder"):
        prepare(root, out, workers=1)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_two_processes_cannot_prepare_the_same_folder(three):
    import fcntl

    root, out = three
    (out / ".work").mkdir(parents=True)
    with (out / ".work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"Another process is preparing .*out now"):
            prepare(root, out, workers=1)


def test_all_options_without_sense_are_named_at_once(three):
    root, out = three
    with pytest.raises(ValueError, match="size_px=100") as info:
        prepare(root, out, "nice", size_px=100, fractions=(1.0, 1.0, 1.0), workers=0, shard_mib=0)
    for part in ("preset=nice: expected one of default, paper", "fractions=", "workers=0", "shard_mib=0"):
        assert part in str(info.value)
    with pytest.raises(
        ValueError, match=r"size_px=64 cannot be made from slices of 32 x 32 pixels. Choose one of 32, 16"
    ):
        prepare(root, out, size_px=64, workers=1)
    with pytest.raises(ValueError, match=r"split=gone.json: expected random, paper, or the path"):
        prepare(root, out, split="gone.json", workers=1)
    assert not out.exists()


def damaged(kind, root):
    """Damage patient BraTS2021_00001 of a root and give the expected (file, fault)."""
    name = "BraTS2021_00001"
    folder = root / name
    t2, seg = folder / f"{name}_t2.nii.gz", folder / f"{name}_seg.nii.gz"
    image = np.asarray(nibabel.load(t2).dataobj).astype(np.float32)
    labels = np.asarray(nibabel.load(seg).dataobj)
    moved = lps_affine()
    moved[0, 3] = 2.5
    if kind == "missing modality":
        t2.unlink()
        return t2, "missing modality T2"
    if kind == "missing segmentation":
        seg.unlink()
        return seg, "missing segmentation"
    if kind == "foreign segmentation":
        foreign = seg.rename(seg.with_name("BraTS2021_00777_seg.nii.gz"))
        return foreign, "the segmentation is of another patient than the images, BraTS2021_00001"
    if kind == "two files":
        write_nifti(folder / f"{name}_t2.nii", image)
        return folder / f"{name}_t2.nii and {t2.name}", "two files for T2"
    if kind == "truncated gzip":
        t2.write_bytes(t2.read_bytes()[:-2000])
        return t2, "cannot be read (Compressed file ended before the end-of-stream marker was reached)"
    if kind == "wrong checksum":
        data = bytearray(t2.read_bytes())
        data[-6] ^= 1
        t2.write_bytes(data)
        return t2, "cannot be read (CRC check failed"
    if kind == "not compressed":
        t2.write_bytes(gzip.decompress(t2.read_bytes()))
        return t2, "cannot be read (Not a gzipped file"
    if kind == "truncated volume":
        raw = gzip.decompress(t2.read_bytes())
        t2.unlink()
        t2 = t2.with_suffix("")
        t2.write_bytes(raw[:-100])
        return t2, "cannot be read (Expected 9216 bytes, got 9116 bytes"
    if kind == "no NIfTI file":
        t2.write_bytes(gzip.compress(b"hello" * 200))
        return t2, "is no NIfTI file (1000 bytes, and no NIfTI header)"
    if kind == "empty file":
        t2.write_bytes(b"")
        return t2, "is no NIfTI file (0 bytes, and no NIfTI header)"
    if kind == "damaged header":
        raw = bytearray(gzip.decompress(t2.read_bytes()))
        raw[70:72] = b"\x11\x11"  # the data type
        t2.write_bytes(gzip.compress(bytes(raw)))
        return t2, "cannot be read (data code 4369 not recognized)"
    if kind == "NaN":
        image[5, 5, 5], image[6, 6, 6] = np.nan, np.inf
        write_nifti(t2, image)
        return t2, "T2 has 2 voxels that are NaN or infinite"
    if kind == "all zero":
        write_nifti(t2, np.zeros(SHAPE, np.int16))
        return t2, "T2 is zero everywhere"
    if kind == "same modality twice":
        shutil.copy(folder / f"{name}_t1.nii.gz", t2)
        return t2, "T2 is the same image as T1"
    if kind == "shape of a modality":
        write_nifti(t2, image[:20])
        return t2, "shape (20, 24, 8), but (24, 24, 8) in BraTS2021_00001_t1.nii.gz"
    if kind == "affine of a modality":
        write_nifti(t2, image, moved)
        return t2, "affine differs from that of BraTS2021_00001_t1.nii.gz by up to 2.5 mm"
    if kind == "shape of the segmentation":
        write_nifti(seg, labels[:, :, :4])
        return seg, "shape (24, 24, 4), but (24, 24, 8) in BraTS2021_00001_t1.nii.gz"
    if kind == "affine of the segmentation":
        write_nifti(seg, labels, moved)
        return seg, "affine differs from that of BraTS2021_00001_t1.nii.gz by up to 2.5 mm"
    if kind == "4-D":
        write_nifti(t2, np.stack([image, image], axis=-1))
        return t2, "expected a 3-D volume, but got 4-D with shape (24, 24, 8, 2)"
    if kind == "2-D":
        write_nifti(t2, image[:, :, 4])
        return t2, "is no volume with a valid affine (shape (24, 24)"
    if kind == "unknown label":
        write_nifti(seg, np.where(labels == 4, 3, labels).astype(np.uint8))
        return seg, "has the label 3, but BraTS 2021 has only 0, 1, 2, 4"
    if kind == "label 0.5":
        write_nifti(seg, labels * np.float32(0.5))
        return seg, "labels that are no whole numbers, such as 0.5"
    if kind == "NaN label":
        write_nifti(seg, np.where(labels == 4, np.nan, labels).astype(np.float32))
        return seg, "segmentation has NaN or infinite voxels"
    if kind == "tumour outside the brain":
        write_nifti(seg, np.roll(labels, 10, axis=0))
        return seg, "of the tumour lie outside the brain: the segmentation of another patient?"
    if kind == "segmentation of another patient":
        shutil.copy(root / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz", seg)
        return folder, "the same segmentation as patient BraTS2021_00000"
    if kind == "cuboid voxels":
        for path in folder.iterdir():
            write_nifti(path, np.asarray(nibabel.load(path).dataobj), np.diag([-1.0, -1.0, 3.0, 1.0]))
        return folder / f"{name}_t1.nii.gz", "voxels of 1 x 1 x 3 mm are not cubes"
    if kind == "other spacing":
        write_patient(root, name, affine=lps_affine(2.0))
        return folder, "spacing 2 mm, but 1 mm in most patients"
    if kind == "other grid":
        write_patient(root, name, shape=(40, 24, 8))
        return folder, "slices need 64 x 64 pixels, but 32 in most patients"
    if kind == "two folders":
        shutil.copytree(folder, root / "again" / name)
        return folder, "the patient id BraTS2021_00001 is in two folders"
    if kind == "orphan segmentation":
        for path in folder.iterdir():
            if path != seg:
                path.unlink()
        return seg, "segmentation without images"
    raise AssertionError(kind)


KINDS = [
    "missing modality",
    "missing segmentation",
    "foreign segmentation",
    "two files",
    "truncated gzip",
    "wrong checksum",
    "not compressed",
    "truncated volume",
    "no NIfTI file",
    "empty file",
    "damaged header",
    "NaN",
    "all zero",
    "same modality twice",
    "shape of a modality",
    "affine of a modality",
    "shape of the segmentation",
    "affine of the segmentation",
    "4-D",
    "2-D",
    "unknown label",
    "label 0.5",
    "NaN label",
    "tumour outside the brain",
    "segmentation of another patient",
    "cuboid voxels",
    "other spacing",
    "other grid",
    "two folders",
    "orphan segmentation",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_named_with_patient_and_file_and_the_patient_can_be_skipped(three, kind):
    root, out = three
    file, fault = damaged(kind, root)
    rows = faults_of(root, out)
    mine = [row for row in rows if row[0] == "BraTS2021_00001"]
    assert len(mine) == 1
    assert mine[0][1].split(" and ")[0].endswith(file.relative_to(root).as_posix().split(" and ")[0])
    assert fault in mine[0][2]
    prepare(root, out, skip_faulty=True, workers=1)  # goes on from the records of the checks
    content = read_manifest(out).content
    assert SliceSet(out).patients == (
        ["BraTS2021_00002"] if "another" in kind and "same" in fault else ["BraTS2021_00000", "BraTS2021_00002"]
    )
    reasons = {entry["patient"]: entry["reasons"] for entry in content["skipped_patients"]}
    assert fault in reasons["BraTS2021_00001"][0]


def test_two_patients_with_the_same_images_are_both_named(three):
    root, out = three
    for path in (root / "BraTS2021_00000").iterdir():
        if "seg" not in path.name and "_t1." not in path.name:
            shutil.copy(path, root / "BraTS2021_00002" / path.name.replace("00000", "00002"))
    assert faults_of(root, out) == [
        ("BraTS2021_00000", "BraTS2021_00000", "the same images (T1ce, T2, FLAIR) as patient BraTS2021_00002"),
        ("BraTS2021_00002", "BraTS2021_00002", "the same images (T1ce, T2, FLAIR) as patient BraTS2021_00000"),
    ]


def test_faults_of_all_patients_come_in_one_table(three):
    root, out = three
    (root / "BraTS2021_00000" / "BraTS2021_00000_t1.nii.gz").unlink()
    write_nifti(root / "BraTS2021_00001" / "BraTS2021_00001_flair.nii.gz", np.zeros(SHAPE, np.int16))
    write_nifti(root / "BraTS2021_00001" / "BraTS2021_00001_seg.nii.gz", np.full(SHAPE, 7, np.uint8))
    (root / "BraTS2021_00002" / "BraTS2021_00002_t2.nii.gz").write_bytes(b"")
    with pytest.raises(FaultyInputError, match="3 faults of 3 patients") as info:
        prepare(root, out, workers=2)
    lines = str(info.value).splitlines()
    assert [line.split(" | ")[0].strip() for line in lines[1:]] == [
        "patient",
        *(f"BraTS2021_0000{n}" for n in range(3)),
    ]
    assert len({line.index(" | ") for line in lines[1:]}) == 1
    assert "pass --skip_faulty true to go on without these patients" in lines[0]


def test_all_volumes_of_a_faulty_patient_are_skipped(tmp_path):
    root = tmp_path / "root"
    for name in ("BraTS-GLI-00001-100", "BraTS-GLI-00001-101", "BraTS-GLI-00002-100"):
        paths = write_patient(root, name, "2023")
        if name.endswith("101"):
            write_nifti(paths["T1"], np.zeros(SHAPE, np.int16))
    prepare(root, tmp_path / "out", skip_faulty=True, workers=1)
    assert SliceSet(tmp_path / "out").index["volume"].unique().tolist() == ["BraTS-GLI-00002-100"]


def test_a_skipped_patient_that_is_mended_needs_another_folder(three):
    root, out = three
    damaged("all zero", root)
    prepare(root, out, skip_faulty=True, workers=1)
    assert prepare(root, out, skip_faulty=True, workers=1) == out
    write_patient(root, "BraTS2021_00001")
    with pytest.raises(ValueError, match="another input: BraTS2021_00001 changed"):
        prepare(root, out, skip_faulty=True, workers=1)


def test_decathlon_faults(tmp_path):
    folder = write_msd(tmp_path / "root", ["BRATS_001", "BRATS_002", "BRATS_003", "BRATS_004", "BRATS_005"])
    image = np.asarray(nibabel.load(folder / "imagesTr" / "BRATS_001.nii.gz").dataobj)
    write_nifti(folder / "imagesTr" / "BRATS_001.nii.gz", image[..., :3])
    (folder / "labelsTr" / "BRATS_002.nii.gz").unlink()
    (folder / "imagesTr" / "BRATS_003.nii.gz").unlink()
    write_nifti(folder / "labelsTr" / "BRATS_004.nii.gz", np.full(SHAPE, 4, np.uint8))
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind / "BRATS_005.nii.gz").unlink()
    faults = [(patient, fault) for patient, _, fault in faults_of(tmp_path / "root", tmp_path / "out")]
    assert faults == [
        ("BRATS_001", "expected 4-D with 4 channels, but got shape (24, 24, 8, 3)"),
        ("BRATS_002", "missing segmentation"),
        ("BRATS_003", "segmentation without images"),
        ("BRATS_004", "has the label 4, but MSD Task01 has only 0, 1, 2, 3"),
        ("BRATS_005", "dataset.json lists BRATS_005, but imagesTr has no such file"),
    ]


def test_what_is_odd_but_no_fault_is_noted(three):
    root, out = three
    write_nifti(root / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz", np.zeros(SHAPE, np.uint8))
    image = fake_images("BraTS2021_00001")["T1"]
    image[0, 0, 0] = -7
    write_nifti(root / "BraTS2021_00001" / "BraTS2021_00001_t1.nii.gz", image)
    prepare(root, out, workers=1)
    notes = read_manifest(out).content["notes"]
    assert "BraTS2021_00000: the segmentation has no tumour." in notes
    assert "BraTS2021_00001: T1 has negative voxels; they become 0." in notes


def test_small_rounding_differences_of_affines_are_no_fault(three):
    root, out = three
    path = root / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz"
    affine = lps_affine()
    affine[0, 3] = 5e-4
    write_nifti(path, np.asarray(nibabel.load(path).dataobj), affine)
    assert len(SliceSet(prepare(root, out, workers=1))) == 18


def test_a_root_where_nobody_is_left_is_an_error_even_when_skipping(three):
    root, out = three
    for path in root.rglob("*_t1.nii.gz"):
        path.unlink()
    with pytest.raises(FaultyInputError, match="3 faults of 3 patients"):
        prepare(root, out, skip_faulty=True, workers=1)


def test_a_passed_check_is_not_repeated_unless_a_file_changed(three, monkeypatch):
    import datamodules.prepare as module

    root, out = three
    damaged("all zero", root)
    faults_of(root, out)
    checked = []
    original = module.check_volume
    monkeypatch.setattr(module, "check_volume", lambda v, r: checked.append(v.volume) or original(v, r))
    os.utime(root / "BraTS2021_00002" / "BraTS2021_00002_t1.nii.gz")
    faults_of(root, out)
    assert checked == ["BraTS2021_00001", "BraTS2021_00002"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = [{repository!r}]
    import datamodules.prepare as module

    original, calls = module.{function}, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    module.{function} = dying
    module.prepare(Path({root!r}), Path({out!r}), workers=1, shard_mib=1)
"""


@pytest.mark.parametrize(
    ("function", "call"),
    [("check_volume", 2), ("read_volume", 2), ("save_shard", 3), ("class_pixels", 2), ("finish_slice_set", 1)],
)
def test_a_killed_run_continues_and_ends_with_the_same_bytes(three, function, call):
    root, out = three
    values = {"repository": str(REPOSITORY), "function": function, "call": call, "root": str(root), "out": str(out)}
    script = textwrap.dedent(KILLED.format(**values))
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (out / "dataset.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (out / ".work" / "volumes").glob("*.npy")}
    assert len(done) == {"read_volume": 1, "save_shard": 2, "class_pixels": 3, "finish_slice_set": 3}.get(function, 0)
    if done:
        with pytest.raises(ValueError, match=r"out holds an unfinished preparation made with seed=0 \(now 1\)"):
            prepare(root, out, seed=1, workers=1, shard_mib=1)
    prepare(root, out, workers=2 if function == "read_volume" else 1, shard_mib=1)
    prepare(root, out.with_name("whole"), workers=1, shard_mib=1)
    assert content_of(out) == content_of(out.with_name("whole"))
    assert not (out / ".work").exists()


def test_workers_of_a_killed_run_end_too(three):
    root, out = three
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = [{str(REPOSITORY)!r}]
        import datamodules.parallel
        from datamodules.prepare import prepare

        datamodules.parallel.wait = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        prepare(Path({str(root)!r}), Path({str(out)!r}), workers=2)
    """)
    # The pipes close only when the workers, who hold them as well, are gone.
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(SliceSet(prepare(root, out, workers=1))) == 18


def test_nothing_is_printed_where_stderr_is_no_terminal(three, capfd):
    prepare(*three, workers=1)
    assert capfd.readouterr() == ("", "")


def test_importing_needs_neither_torch_nor_nibabel():
    code = "import sys, datamodules.prepare; print([m for m in ('torch', 'lightning', 'nibabel') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    json.loads((REPOSITORY / "datamodules" / "paper_splits.json").read_text())
