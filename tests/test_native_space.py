"""Label maps come back to the voxels, axes, codes and affine of the patient's own segmentation file."""

import itertools
import json

import nibabel
import numpy as np
import pytest
from fakes import CODES, SHAPE, fake_labels, lps_affine, write_msd, write_nifti, write_patient, write_patients

import datamodules.prepare as module
from datamodules.layouts import CODES_2018, CODES_2024
from datamodules.native_space import describe_file, native_space, save_label_map, stored_volume, to_native
from datamodules.phantom import write_phantom
from datamodules.prepare import prepare
from datamodules.slice_set import SliceSet, read_manifest
from datamodules.slices import slice_volume

ALL_AXES = ["".join(a) for order in itertools.permutations(("LR", "PA", "SI")) for a in itertools.product(*order)]


def turned(image, axes):
    """Let nibabel turn an image and its affine."""
    start = nibabel.io_orientation(image.affine)
    return image.as_reoriented(nibabel.orientations.ornt_transform(start, nibabel.orientations.axcodes2ornt(axes)))


def write_space(folder, labels, affine=None):
    """Write a BraTS 2021 label map and describe the file."""
    return describe_file(write_nifti(folder / "own.nii.gz", labels, affine), CODES_2018)


def assert_same_on_kept_slices(written, own, kept, codes=(0, 1, 2, 4)):
    """Compare two files, the z of `kept` counted towards superior, with nibabel's turns only."""
    assert written.shape == own.shape
    np.testing.assert_array_equal(written.affine, own.affine)
    ours, theirs = (np.asarray(turned(image, "LPS").dataobj) for image in (written, own))
    theirs = np.where(np.isin(theirs, codes), theirs, 0)
    assert 0 < len(kept) < theirs.shape[2]
    np.testing.assert_array_equal(ours[:, :, kept], theirs[:, :, kept])
    assert not np.delete(ours, kept, axis=2).any()


@pytest.mark.parametrize("axes", ALL_AXES)
def test_slicing_and_back_gives_the_original_labels_in_any_orientation(tmp_path, axes):
    shape = (21, 26, 7)
    rng = np.random.default_rng(ALL_AXES.index(axes))
    classes = rng.integers(0, 4, shape, dtype=np.uint8)
    image = turned(nibabel.Nifti1Image(classes, lps_affine()), axes)
    own = np.asarray(image.dataobj).copy()
    space = write_space(tmp_path, np.array(CODES["2021"], np.uint8)[own], image.affine)
    assert (space.axes, space.shape) == (axes, list(own.shape))
    images = rng.uniform(1, 2, (4, *shape)).astype(np.float32)
    images[..., [0, 3]] = 0
    slices = slice_volume(images, classes)
    kept = [1, 2, 4, 5, 6]
    assert slices.z.tolist() == kept
    back = nibabel.Nifti1Image(to_native(slices.slices[:, 4], slices.z, space, 1), np.array(space.affine))
    assert_same_on_kept_slices(back, nibabel.Nifti1Image(own, image.affine), kept, codes=range(4))


@pytest.mark.parametrize("shape", [(16, 16, 3), (17, 12, 4), (12, 17, 2), (31, 24, 1), (33, 40, 5), (40, 33, 2)])
def test_padding_is_cut_off_at_any_size(tmp_path, shape):
    classes = np.random.default_rng(0).integers(0, 4, shape, dtype=np.uint8)
    slices = slice_volume(np.ones((4, *shape), np.float32), classes)
    back = to_native(slices.slices[:, 4], slices.z, write_space(tmp_path, classes * 0), 1)
    assert len(slices.z) == shape[2]
    np.testing.assert_array_equal(back, classes)


@pytest.mark.parametrize("factor", [2, 4])
def test_reduced_slices_come_back_as_blocks(tmp_path, factor):
    shape, size = (60, 61, 5), 64 // factor
    classes = np.zeros((5, size, size), np.uint8)
    classes[:, 2:-2, 2:-2] = np.random.default_rng(0).integers(0, 4, (5, size - 4, size - 4))
    back = to_native(classes, range(5), write_space(tmp_path, np.zeros(shape, np.uint8)), factor)
    for x, y in ((8, 8), (20, 33), (47, 46)):
        assert back[x, y].tolist() == classes[:, (x + 2) // factor, (y + 1) // factor].tolist()
    again = slice_volume(np.ones((4, *shape), np.float32), back, size_px=size)
    np.testing.assert_array_equal(again.slices[:, 4], classes)


def prepared(root, out, axes):
    """Turn all files of a root, prepare it, and write the reference of its only volume: set, own file, written one."""
    for path in root.rglob("*.nii.gz"):
        image = turned(nibabel.load(path), axes)
        write_nifti(path, np.asarray(image.dataobj).copy(), image.affine)
    slices = SliceSet(prepare(root, out, workers=1))
    (volume,) = slices.index["volume"].unique()
    path = out.parent / "maps" / f"{volume}.nii.gz"
    save_label_map(path, stored_volume(slices, volume, "label"), native_space(slices.manifest, volume))
    return slices, nibabel.load(next(p for p in root.rglob("*.nii.gz") if "seg" in p.name or "labels" in str(p))), path


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PSL"])
@pytest.mark.parametrize("name", ["BraTS2021_00000", "BraTS-GLI-00005-000", "BraTS-GLI-00005-100", "BRATS_001"])
def test_every_layout_gets_its_own_codes_back(tmp_path, name, axes):
    root = tmp_path / "root"
    if name == "BRATS_001":
        write_msd(root, [name], lps_affine())
        shape, codes = SHAPE, CODES["msd"]
    else:
        shape, style = (25, 21, 9), "2021" if "2021" in name else "2023"
        seg = write_patient(root, name, style, shape=shape)["seg"]
        codes = CODES[style]
        labels = np.array(codes, np.uint8)[np.random.default_rng(0).integers(0, 4, shape)]
        if name.endswith("-100"):
            labels[8:12, 8:12] = 4  # the resection cavity, which no segmenter learns
        brain = np.zeros(shape, bool)
        brain[3:-3, 2:-2, 1:-1] = True
        write_nifti(seg, labels * brain)
    slices, own, path = prepared(root, tmp_path / "out", axes)
    written = nibabel.load(path)
    assert "".join(nibabel.aff2axcodes(written.affine)) == axes
    assert written.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(written.dataobj))) == set(codes)
    kept = slices.index["z"].tolist()
    assert kept == list(range(1, shape[2] - 1))
    assert_same_on_kept_slices(written, own, kept, codes)


def test_phantom_of_coarse_voxels(tmp_path):
    write_phantom(tmp_path / "root", patients=1, spacing_mm=4.0, workers=1)
    slices = SliceSet(prepare(tmp_path / "root", tmp_path / "out", workers=1))
    space = native_space(slices.manifest, "Phantom_00000")
    assert (space.shape, space.qform_code, space.sform_code) == ([60, 60, 39], 1, 1)
    save_label_map(tmp_path / "map.nii.gz", stored_volume(slices, "Phantom_00000", "label"), space)
    own = nibabel.load(tmp_path / "root" / "Phantom_00000" / "Phantom_00000_seg.nii.gz")
    written = nibabel.load(tmp_path / "map.nii.gz")
    assert_same_on_kept_slices(written, own, slices.index["z"].tolist())
    for field in ("qform_code", "sform_code", "quatern_d", "qoffset_y", "srow_y", "xyzt_units"):
        np.testing.assert_array_equal(written.header[field], own.header[field], err_msg=field)
    assert written.header.get_zooms() == own.header.get_zooms()
    image = nibabel.load(tmp_path / "root" / "Phantom_00000" / "Phantom_00000_flair.nii.gz").get_fdata()
    level = slices.manifest.content["volumes"][0]["white_level"]["FLAIR"]
    kept = slices.index["z"].tolist()
    grey = np.floor(np.clip(image[..., kept] / level * 255, 0, 255) + 0.5)
    np.testing.assert_array_equal(stored_volume(slices, "Phantom_00000", "FLAIR")[..., kept], grey)


@pytest.mark.parametrize(("qform_code", "sform_code"), [(1, 1), (1, 0), (0, 2), (0, 0), (4, 1)])
def test_the_header_keeps_the_codes_and_the_affine(tmp_path, qform_code, sform_code):
    turn = nibabel.eulerangles.euler2mat(0.1, -0.2, 0.3)
    affine = nibabel.affines.from_matvec(turn @ np.diag([-2.0, -2.0, 2.0]), [90.5, 80.25, -7.0])
    image = nibabel.Nifti1Image(np.zeros((10, 11, 12), np.uint8), affine)
    image.set_qform(affine, qform_code)
    image.set_sform(affine, sform_code)
    nibabel.save(image, tmp_path / "own.nii.gz")
    own = nibabel.load(tmp_path / "own.nii.gz")
    space = describe_file(tmp_path / "own.nii.gz", CODES_2018)
    save_label_map(tmp_path / "map.nii.gz", np.zeros((10, 11, 12), np.uint8), space)
    written = nibabel.load(tmp_path / "map.nii.gz")
    assert (written.header["qform_code"], written.header["sform_code"]) == (qform_code, sform_code)
    np.testing.assert_allclose(written.affine, own.affine, rtol=0, atol=1e-4)
    np.testing.assert_allclose(written.header.get_zooms(), 2.0, rtol=1e-6)


def test_a_label_map_has_the_same_bytes_every_time_and_no_half_file_is_left(tmp_path):
    space = write_space(tmp_path / "own", fake_labels())
    path = tmp_path / "maps" / "P.nii.gz"
    save_label_map(path, fake_labels(), space)
    first = path.read_bytes()
    assert first[4:8] == bytes(4)  # the time of compression
    save_label_map(path, fake_labels(), space)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["P.nii.gz"]


def test_the_resection_cavity_is_no_code_of_the_background(tmp_path):
    path = write_nifti(tmp_path / "own.nii.gz", np.zeros(SHAPE, np.uint8))
    assert describe_file(path, CODES_2024).label_codes == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("shape", "z", "message"),
    [
        (
            (2, 16, 16),
            [0, 1],
            r"of 32 x 32 pixels for a volume of \(24, 24, 8\) voxels and downsampling 1, but",
        ),
        ((2, 32, 32), [0], r"Expected 1 slices of .*, but got \(2, 32, 32\)"),
        ((2, 32, 32), [3, 3], r"Expected each z once and from 0 to 7, but got \[3, 3\]"),
        ((2, 32, 32), [3, 8], r"Expected each z once and from 0 to 7, but got \[3, 8\]"),
        ((2, 32, 32), [-1, 3], r"Expected each z once and from 0 to 7, but got \[-1, 3\]"),
    ],
)
def test_slices_that_do_not_fit_are_refused(tmp_path, shape, z, message):
    with pytest.raises(ValueError, match=message):
        to_native(np.zeros(shape, np.uint8), z, write_space(tmp_path, fake_labels()), 1)


def test_a_set_of_an_earlier_version_is_readable_and_completed_by_the_same_command(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    write_patients(root, 2)
    prepare(root, out, workers=1)
    complete = read_manifest(out).content
    old = {**complete, "volumes": [{k: v for k, v in e.items() if k != "native"} for e in complete["volumes"]]}
    (out / "dataset.json").write_text(json.dumps(old))
    before = (out / "slices-00000.npy").stat().st_mtime_ns
    slices = SliceSet(out)
    assert slices.read([0]).shape == (1, 5, 32, 32)
    with pytest.raises(ValueError, match=r"in which space the files of BraTS2021_00001 .*`standin prepare`"):
        stored_volume(slices, "BraTS2021_00001", "label")
    prepare(root, out, workers=1)
    assert read_manifest(out).content == complete
    assert (out / "slices-00000.npy").stat().st_mtime_ns == before


def test_conversions_left_by_an_earlier_version_are_made_again(tmp_path, monkeypatch):
    root, out = tmp_path / "root", tmp_path / "out"
    write_patients(root, 2)
    with monkeypatch.context() as patch:
        patch.delattr(module, "finish_slice_set")
        with pytest.raises(NameError):
            prepare(root, out, workers=1)
    for path in (out / ".work" / "volumes").glob("*.json"):
        entry = json.loads(path.read_text())["entry"]
        del entry["native"]
        path.write_text(json.dumps(entry))
    prepare(root, out, workers=1)
    prepare(root, tmp_path / "whole", workers=1)
    assert (out / "dataset.json").read_bytes() == (tmp_path / "whole" / "dataset.json").read_bytes()
