"""Patients are found by file names; volumes are read with the right modalities, labels and axes."""

import json
import shutil

import nibabel
import numpy as np
import pytest
from fakes import CODES, SHAPE, fake_images, fake_labels, lps_affine, write_msd, write_nifti, write_patient

from datamodules.layouts import find_volumes, read_volume

MODALITIES = ("T1", "T1ce", "T2", "FLAIR")


def only(root):
    volumes, faults = find_volumes(root)
    assert faults == []
    assert len(volumes) == 1
    return volumes[0]


@pytest.mark.parametrize(
    ("name", "style", "layout"),
    [
        ("Brats18_2013_0_1", "2021", "BraTS 2018"),
        ("BraTS19_TCIA01_147_1", "2021", "BraTS 2019"),
        ("BraTS20_Training_001", "2021", "BraTS 2020"),
        ("BraTS2021_00000", "2021", "BraTS 2021"),
        ("Phantom_00000", "2021", "BraTS 2018-2021"),
        ("BraTS-GLI-00005-000", "2023", "BraTS 2023"),
        ("BraTS-GLI-00005-100", "2023", "BraTS 2024"),
    ],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_each_brats_layout_is_recognised_and_read(tmp_path, name, style, layout, ending):
    paths = write_patient(tmp_path, name, style, ending)
    volume = only(tmp_path)
    assert (volume.volume, volume.layout) == (name, layout)
    assert volume.files == [paths[key] for key in (*MODALITIES, "seg")]
    images, labels, spacing = read_volume(volume)
    expected = fake_images(name)
    assert images.dtype == np.float32
    for index, modality in enumerate(MODALITIES):
        np.testing.assert_array_equal(images[index], expected[modality])
    stored = np.asarray(nibabel.load(paths["seg"]).dataobj)
    for code, index in zip(CODES[style], range(4), strict=True):
        assert ((stored == code) == (labels == index)).all()
    assert spacing == (1.0, 1.0, 1.0)


def test_decathlon_channels_and_labels_are_put_into_our_order(tmp_path):
    write_msd(tmp_path, ["BRATS_001"])
    volume = only(tmp_path)
    assert (volume.patient, volume.layout) == ("BRATS_001", "MSD Task01")
    images, labels, _ = read_volume(volume)
    expected = fake_images("BRATS_001")
    for index, modality in enumerate(MODALITIES):
        np.testing.assert_array_equal(images[index], expected[modality])
    assert labels[9, 12, 3] == 2  # written as 1, edema
    assert labels[11, 11, 3] == 1  # written as 2, non-enhancing
    assert labels[10, 10, 3] == 3


def test_decathlon_channel_order_comes_from_dataset_json(tmp_path):
    folder = write_msd(tmp_path, ["BRATS_001"])
    content = json.loads((folder / "dataset.json").read_text())
    content["modality"] = {"0": "T1w", "1": "FLAIR", "2": "t1gd", "3": "T2w"}
    (folder / "dataset.json").write_text(json.dumps(content))
    images, _, _ = read_volume(only(tmp_path))
    np.testing.assert_array_equal(images[0], fake_images("BRATS_001")["FLAIR"])


def test_another_decathlon_task_is_a_fault(tmp_path):
    folder = write_msd(tmp_path, ["BRATS_001"])
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": {"0": "background"}}))
    _, faults = find_volumes(tmp_path)
    assert "not Task01" in faults[0].fault
    assert faults[0].file == "Task01_BrainTumour/dataset.json"


def test_time_points_are_volumes_of_one_patient(tmp_path):
    for name in ("BraTS-GLI-00005-101", "BraTS-GLI-00005-100", "BraTS-GLI-00006-000"):
        write_patient(tmp_path, name, "2023")
    volumes, _ = find_volumes(tmp_path)
    assert [(v.patient, v.volume) for v in volumes] == [
        ("BraTS-GLI-00005", "BraTS-GLI-00005-100"),
        ("BraTS-GLI-00005", "BraTS-GLI-00005-101"),
        ("BraTS-GLI-00006", "BraTS-GLI-00006-000"),
    ]


def test_nested_flat_and_linked_folders_are_searched(tmp_path):
    root = tmp_path / "root"
    write_patient(root / "HGG", "Brats18_A_1")
    write_patient(root / "deep" / "er" / "LGG", "Brats18_B_1")
    for name in ("Brats18_C_1", "Brats18_D_1"):
        for path in write_patient(tmp_path / "elsewhere", name).values():
            path.rename(path.parent.parent / path.name)
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    volumes, faults = find_volumes(root)
    assert [v.patient for v in volumes] == ["Brats18_A_1", "Brats18_B_1", "Brats18_C_1", "Brats18_D_1"]
    assert faults == []


def test_stray_hidden_and_prediction_files_and_empty_folders_are_passed_over(tmp_path):
    paths = write_patient(tmp_path, "BraTS2021_00000")
    folder = paths["T1"].parent
    (tmp_path / "BraTS2021_00009").mkdir()
    (folder / "._BraTS2021_00000_t1.nii.gz").write_bytes(b"mac")
    (folder / "BraTS2021_00000.nii.gz").write_bytes(b"prediction")
    (folder / "notes.txt").write_text("x")
    (tmp_path / "name_mapping.csv").write_text("x")
    for hidden in (".cache", "__MACOSX"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "BraTS2021_00007_seg.nii.gz").write_bytes(b"")
    assert only(tmp_path).files == list(paths.values())


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_misnamed_segmentation_of_patient_355_is_found(tmp_path, ending):
    paths = write_patient(tmp_path, "BraTS20_Training_355", ending=ending)
    renamed = paths["seg"].rename(paths["seg"].with_name(f"W39_1998.09.19_Segm{ending}"))
    volume = only(tmp_path)
    assert volume.segmentation == renamed
    assert read_volume(volume)[1].max() == 3


def test_that_name_means_nothing_for_another_patient(tmp_path):
    paths = write_patient(tmp_path, "BraTS20_Training_001")
    paths["seg"].rename(paths["seg"].with_name("W39_1998.09.19_Segm.nii.gz"))
    _, faults = find_volumes(tmp_path)
    assert [(f.patient, f.fault) for f in faults] == [("BraTS20_Training_001", "missing segmentation")]


def test_resection_cavity_becomes_background_in_2024_and_is_refused_in_2023(tmp_path):
    codes = np.zeros(SHAPE, np.uint8)
    codes[5, 5, 4], codes[6, 6, 4] = 4, 3
    for name in ("BraTS-GLI-00005-100", "BraTS-GLI-00006-000"):
        write_nifti(write_patient(tmp_path, name, "2023")["seg"], codes)
    first, second = find_volumes(tmp_path)[0]
    labels = read_volume(first)[1]
    assert (labels[5, 5, 4], labels[6, 6, 4]) == (0, 3)
    with pytest.raises(ValueError, match=r"BraTS-GLI-00006: .*has the label 4, but BraTS 2023 has only 0, 1, 2, 3"):
        read_volume(second)


def test_label_3_is_refused_in_2021_and_a_fraction_anywhere(tmp_path):
    paths = write_patient(tmp_path, "BraTS2021_00000")
    for value in (3, 0.5):
        write_nifti(paths["seg"], np.full(SHAPE, value, np.float32))
        with pytest.raises(ValueError, match=rf"has the label {value}, but BraTS 2021 has only 0, 1, 2, 4"):
            read_volume(only(tmp_path))


@pytest.mark.parametrize("axes", ["RAS", "LAS", "PSL"])
def test_volumes_of_other_orientation_are_turned_to_that_of_brats(tmp_path, axes):
    paths = write_patient(tmp_path, "BraTS2021_00000")
    for path in paths.values():
        image = nibabel.load(path)
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(axes)
        )
        turned = image.as_reoriented(turn)
        assert "".join(nibabel.aff2axcodes(turned.affine)) == axes
        write_nifti(path, np.asarray(turned.dataobj).copy(), turned.affine)
    images, labels, spacing = read_volume(only(tmp_path))
    np.testing.assert_array_equal(images[0], fake_images("BraTS2021_00000")["T1"])
    assert (labels == 3).sum() == (fake_labels() == 3).sum()
    assert spacing == (1.0, 1.0, 1.0)


def test_spacing_is_read_from_the_affine(tmp_path):
    write_patient(tmp_path, "BraTS2021_00000", affine=lps_affine(2.0))
    assert read_volume(only(tmp_path))[2] == (2.0, 2.0, 2.0)


def test_scaled_and_second_version_nifti_files_are_read(tmp_path):
    paths = write_patient(tmp_path, "BraTS2021_00000")
    t1 = fake_images("BraTS2021_00000")["T1"]
    nibabel.save(nibabel.Nifti2Image(t1, lps_affine()), paths["T1"])
    scaled = nibabel.Nifti1Image(t1, lps_affine())
    scaled.header.set_slope_inter(2.0, 0.0)
    nibabel.save(scaled, paths["T2"])
    images = read_volume(only(tmp_path))[0]
    np.testing.assert_array_equal(images[0], t1)
    assert np.abs(images[2] - nibabel.load(paths["T2"]).get_fdata()).max() == 0


def test_two_namings_in_one_folder_are_a_fault(tmp_path):
    for path in write_patient(tmp_path, "BraTS-GLI-00000-000", "2023").values():
        path.rename(tmp_path / path.name)
    for path in write_patient(tmp_path, "BraTS2021_00000").values():
        path.rename(tmp_path / path.name)
    volumes, faults = find_volumes(tmp_path)
    assert volumes == []
    assert {f.patient for f in faults} == {"BraTS-GLI-00000", "BraTS2021_00000"}
    assert "one folder with two namings: BraTS2021_00000_flair.nii.gz (BraTS 2018-2021)" in faults[0].fault
    assert faults[0].remedy == "Move the files of each naming to a folder of their own"


def test_pediatric_set_with_other_labels_is_refused(tmp_path):
    write_patient(tmp_path, "BraTS-PED-00001-000", "2023")
    _, faults = find_volumes(tmp_path)
    assert [f.fault for f in faults] == ["unsupported layout"]
    assert "four labels" in faults[0].remedy


def test_a_root_without_patients_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a folder with patients at .*gone, but there is none"):
        find_volumes(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"No patient was found .*X_t1ce.*X-t2f.*dataset.json.*Found no file"):
        find_volumes(tmp_path)
    (tmp_path / "a.dcm").write_text("x")
    with pytest.raises(ValueError, match=r"Found 1 files, such as a.dcm"):
        find_volumes(tmp_path)


def test_several_layouts_may_lie_in_folders_of_their_own(tmp_path):
    write_patient(tmp_path / "a", "BraTS2021_00000")
    write_patient(tmp_path / "b", "BraTS-GLI-00001-000", "2023")
    write_msd(tmp_path / "c", ["BRATS_001"])
    volumes, faults = find_volumes(tmp_path)
    assert faults == []
    assert {v.layout for v in volumes} == {"BraTS 2021", "BraTS 2023", "MSD Task01"}
    shutil.rmtree(tmp_path / "c")
    assert len(find_volumes(tmp_path)[0]) == 2
