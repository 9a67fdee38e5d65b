"""Folders of pictures as synthetic slice sets."""

import json
from pathlib import PurePosixPath

import numpy as np
import pytest
from fake_sets import ready, real_set, synthetic_set
from fake_slices import write_slice_set
from PIL import Image

from datamodules import import_images as module
from datamodules.export_images import export_images
from datamodules.import_images import import_images, recognise
from datamodules.leak_guard import Seen
from datamodules.recipe import TrainingPart
from datamodules.slice_set import SliceSet, find_shards, read_manifest
from datamodules.splits import paper_lists
from evaluation.memorization import training_and_held_out

ENDINGS = ("T1", "T1ce", "T2", "flair", "Seg")


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture_folder(root, count=4, size_px=16, seed=0):
    """Pictures as the authors' program for StyleGAN 2 and 3 names them; gives grey levels (count, 5, H, W)."""
    pixels = np.random.default_rng(seed).integers(1, 256, (count, 5, size_px, size_px)).astype(np.uint8)
    for number, one in enumerate(pixels):
        for ending, channel in zip(ENDINGS, one, strict=True):
            folder = {"flair": "FLAIR", "Seg": "SEG"}.get(ending, ending)
            save(root / folder / f"seed{number:04d}_{ending}.png", channel)
    return pixels


def paper_class(v):
    """The thresholds of the authors' `load_target`: rounded to the nearest of 0, 51, 102, 204."""
    r = 5 / 255 * v.astype(np.float64)
    return np.select([r > 3.0, r > 1.5, r > 0.5], [3, 2, 1])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("T1CE/Subject_0002_slice_78_T1ce.png", ("Subject_0002_slice_78", 1)),
        ("Seg/Subject_0002_slice_78_seg.png", ("Subject_0002_slice_78", 4)),
        ("flair/image_17_flair.png", ("image_17", 3)),
        ("SEG/seed0002_Seg.png", ("seed0002", 4)),
        ("fakes000010_T2.png", ("fakes000010", 2)),
        ("T2/000017.png", ("000017", 2)),
        ("17/t1.png", ("17", 0)),
        ("PGGAN/T1/000017.png", ("PGGAN-000017", 0)),
        ("StyleGAN 2/T1/a b.png", ("StyleGAN-2-a-b", 0)),
        ("T1/seed0002_T2.png", None),
        ("seed0002.png", None),
        ("T1/T1.png", None),
        ("seed0002_NOT1.png", None),
    ],
)
def test_slice_and_channel_are_told_from_the_path(path, expected):
    assert recognise(PurePosixPath(path)) == expected


def test_pictures_become_slices_with_the_classes_that_the_paper_reads(tmp_path):
    pixels = picture_folder(tmp_path / "fakes", count=5, size_px=32)
    assert {25, 26, 76, 77, 153, 154} <= set(np.unique(pixels[:, 4]))  # on both sides of every threshold
    out = import_images(tmp_path / "fakes", tmp_path / "out", workers=1)
    slices = SliceSet(out)
    read = slices.read(range(5))
    np.testing.assert_array_equal(read[:, :4], pixels[:, :4])
    np.testing.assert_array_equal(read[:, 4], paper_class(pixels[:, 4]))
    assert slices.index["patient"].to_list() == [f"seed{i:04d}" for i in range(5)]
    assert slices.index["enhancing_px"].to_list() == [int((one == 3).sum()) for one in read[:, 4]]
    assert (slices.manifest.kind, slices.manifest.spacing_mm) == ("synthetic", 1.0)
    assert slices.manifest.content["filtered"] == "nothing"


@pytest.mark.parametrize("file_type", ["png", "tiff"])
def test_exported_pictures_come_back_as_the_same_slices(tmp_path, file_type):
    made = synthetic_set(tmp_path / "made", count=10)
    pictures = export_images(made, tmp_path / "pictures", file_type, workers=1)
    with Image.open(pictures / f"T2/made-3_T2.{file_type}") as image:
        assert (image.format, image.mode) == (file_type.upper(), "L")
    back = SliceSet(import_images(pictures, tmp_path / "out", workers=1))
    np.testing.assert_array_equal(back.read(range(10)), SliceSet(made).read(range(10)))
    assert back.index["patient"].to_list() == [f"made-{i}" for i in range(10)]


def test_other_levels_smaller_slices_and_pictures_to_look_at(tmp_path):
    pixels = picture_folder(tmp_path / "fakes", size_px=32)
    options = {"label_levels": (0, 85, 170, 255), "size_px": 16, "spacing_mm": 1.5, "transpose": True, "workers": 1}
    out = import_images(tmp_path / "fakes", tmp_path / "out", **options)
    slices = SliceSet(out)
    turned = pixels.transpose(0, 1, 3, 2).astype(int)
    blocks = turned.reshape(4, 5, 16, 2, 16, 2)
    means = (blocks.sum(axis=(3, 5)) + 2) // 4
    np.testing.assert_array_equal(slices.read(range(4))[:, :4], means[:, :4])
    labels = np.abs(turned[:, 4, ..., None] - np.array([0, 85, 170, 255])).argmin(
        axis=-1
    )  # 42.5 and so on are no levels
    votes = (labels.reshape(4, 16, 2, 16, 2, 1) == np.arange(4)).sum(axis=(2, 4))
    clear = (votes == votes.max(axis=-1, keepdims=True)).sum(axis=-1) == 1
    np.testing.assert_array_equal(slices.read(range(4))[:, 4][clear], votes.argmax(axis=-1)[clear])
    assert slices.manifest.spacing_mm == 3.0
    with pytest.raises(ValueError, match=r"size_px=24 cannot be made from slices of 32 x 32 pixels"):
        import_images(tmp_path / "fakes", tmp_path / "bad", size_px=24, workers=1)
    with pytest.raises(ValueError, match=r"label_levels=\[0, 204, 102, 51\]: expected four increasing"):
        import_images(tmp_path / "fakes", tmp_path / "bad", label_levels=(0, 204, 102, 51), workers=1)


def test_training_and_memorization_accept_the_set_and_know_whom_it_has_seen(tmp_path):
    real = write_slice_set(tmp_path / "real")
    picture_folder(tmp_path / "fakes")
    out = import_images(tmp_path / "fakes", tmp_path / "out", trained_on=real, workers=1)
    made = SliceSet(out)
    training, held_out = training_and_held_out(made, SliceSet(real))
    assert (training.patients, held_out.patients) == (["P0", "P1", "P2", "P3", "P4"], ["P5", "P6", "P7"])
    assert Seen.of_synthetic(made.manifest) == Seen.of_slices(SliceSet(real, "train"), {})
    assert made.manifest.content["trained_on"] == [read_manifest(real).fingerprint]
    data = ready(real, train=[TrainingPart(str(out))])
    assert data.patients_seen == ["P0", "P1", "P2", "P3", "P4"]
    # Who is held out elsewhere was seen by this generator.
    other = real_set(tmp_path / "other", {"P0": "test", "P9": "train"})
    with pytest.raises(ValueError, match=r"is of a generator that saw 1 patients of the test split .*\(P0\)"):
        ready(other, train=[TrainingPart(str(out))])


def test_training_patients_of_the_paper_can_be_named(tmp_path):
    picture_folder(tmp_path / "fakes", count=1)
    out = import_images(tmp_path / "fakes", tmp_path / "out", trained_on="paper-2020", workers=1)
    seen = read_manifest(out).content["patients_seen"]
    assert len(seen) == 313
    assert not {name for name, side in paper_lists().items() if side == "test"} & set(seen)
    out = import_images(tmp_path / "fakes", tmp_path / "later", trained_on="paper-2021", workers=1)
    assert len(read_manifest(out).content["patients_seen"]) == 1195


def test_set_whose_training_nobody_knows_says_so(tmp_path):
    real = write_slice_set(tmp_path / "real")
    picture_folder(tmp_path / "fakes")
    out = import_images(tmp_path / "fakes", tmp_path / "out", workers=1)
    with pytest.warns(UserWarning, match=r"fakes does not say which patients it was trained on"):
        ready(real, train=[TrainingPart(str(out))])


def test_what_is_no_real_set_is_refused_as_the_training_data(tmp_path):
    picture_folder(tmp_path / "fakes")
    made = synthetic_set(tmp_path / "made")
    with pytest.raises(ValueError, match=r"--trained_on .*made: expected a real slice set with training patients"):
        import_images(tmp_path / "fakes", tmp_path / "out", trained_on=made, workers=1)


def test_all_faulty_pictures_are_named_or_left_out_and_listed(tmp_path):
    root = tmp_path / "fakes"
    pixels = picture_folder(root, count=8)
    (root / "T2" / "seed0000_T2.png").unlink()
    save(root / "again" / "T1" / "x.png", pixels[0, 0])
    save(root / "seed0001_T1.png", pixels[0, 0])
    save(root / "logo.png", pixels[0, 0])
    with pytest.raises(ValueError, match=r"fakes: 4 slices or files cannot be used") as refused:
        import_images(root, tmp_path / "out", workers=1)
    lines = set(str(refused.value).splitlines()[1:])
    names = {
        "seed0000: no T2",
        "again-x: no T1ce, T2, FLAIR, label",
        "seed0001: both T1/seed0001_T1.png and seed0001_T1.png are its T1",
        "logo.png: neither name nor folder says alone which of T1, T1ce, T2, flair, seg it is",
    }
    assert lines == names
    save(root / "T1" / "seed0003_T1.png", np.zeros((16, 16), np.uint8))
    save(root / "T2" / "seed0004_T2.png", pixels[4, 2, :8])
    save(root / "SEG" / "seed0005_Seg.png", pixels[5, 4].astype(np.uint16))
    (root / "FLAIR" / "seed0006_flair.png").write_bytes((root / "FLAIR" / "seed0006_flair.png").read_bytes()[:99])
    out = import_images(root, tmp_path / "out", skip_faulty=True, workers=1)
    slices = SliceSet(out)
    assert slices.index["patient"].to_list() == ["seed0002", "seed0007"]
    np.testing.assert_array_equal(slices.read([0, 1])[:, :4], pixels[[2, 7], :4])
    faulty = slices.manifest.content["faulty"]
    assert {f"{name}: {fault}" for name, fault in faulty.items()} > names
    assert faulty["seed0003"] == "T1 zero everywhere"
    assert faulty["seed0004"] == "seed0004_T2.png has 8 x 16 pixels, but the first picture 16"
    assert faulty["seed0005"] == "seed0005_Seg.png is of mode I;16, expected 8-bit grey (L)"
    assert faulty["seed0006"].startswith("seed0006_flair.png cannot be read (")
    assert slices.manifest.content["filtered"] == "8 slices with faults"


def test_import_that_was_killed_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    picture_folder(tmp_path / "fakes", count=7)
    monkeypatch.setattr(module, "SLICES_AT_ONCE", 2)
    whole = import_images(tmp_path / "fakes", tmp_path / "whole", workers=1)

    read = module._Form.slice_of
    calls = []

    def dying(form, paths):
        calls.append(paths)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(form, paths)

    monkeypatch.setattr(module._Form, "slice_of", dying)
    with pytest.raises(KeyboardInterrupt):
        import_images(tmp_path / "fakes", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    out = import_images(tmp_path / "fakes", tmp_path / "out", workers=1)
    assert len(calls) == 4 + 5  # the first part was kept
    assert json.loads((out / "dataset.json").read_text()) == json.loads((whole / "dataset.json").read_text())
    np.testing.assert_array_equal(np.load(find_shards(out)[0]), np.load(find_shards(whole)[0]))
    assert sorted(p.name for p in out.iterdir()) == ["dataset.json", "index.parquet", "slices-00000.npy"]


def test_finished_set_is_left_alone_and_another_one_refused(tmp_path):
    picture_folder(tmp_path / "fakes")
    out = import_images(tmp_path / "fakes", tmp_path / "out", workers=1)
    written = (out / "dataset.json").stat().st_mtime_ns
    import_images(tmp_path / "fakes", tmp_path / "out", workers=1)
    assert (out / "dataset.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"out exists and is not what this command makes"):
        import_images(tmp_path / "fakes", tmp_path / "out", spacing_mm=2.0, workers=1)


def test_folder_without_pictures_or_with_oblong_ones_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected pictures \(\.png, \.tif, \.tiff\) in .*nowhere"):
        import_images(tmp_path / "nowhere", tmp_path / "out", workers=1)
    for ending in ENDINGS:
        save(tmp_path / "oblong" / f"a_{ending}.png", np.ones((16, 8), np.uint8))
    with pytest.raises(ValueError, match=r"expected a square, as slices are, but got 16 x 8 pixels"):
        import_images(tmp_path / "oblong", tmp_path / "out", workers=1)
