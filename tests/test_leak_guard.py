"""Every way in which a patient by whom a model is judged can come into training, and that it stops the run."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_sets import ready, real_set, resplit, synthetic_set
from fake_slices import unet_args, write_slice_set
from fake_study import heads

from datamodules.leak_guard import Seen, find_leaks, read_aliases, same_name
from datamodules.prepare import prepare
from datamodules.recipe import TrainingPart
from datamodules.signatures import SAME_PATIENT, hash_direction, nearest, signature, volume_signatures
from datamodules.slice_set import SliceSet
from train import build

SIDES = {"P0": "train", "P1": "train", "P2": "val", "P3": "test"}


@pytest.fixture
def root(tmp_path):
    return real_set(tmp_path / "root", SIDES)


def trained_on(root: Path, *others: Path, **options):
    return ready(root, train=[TrainingPart(str(other)) for other in others], **options)


def images_of(root: Path, patient: str) -> np.ndarray:
    slices = SliceSet(root)
    return slices.read(np.flatnonzero(slices.index["patient"] == patient))


def checkpoint(path: Path, **data) -> str:
    torch.save({"state_dict": {}, **({"BraTSDataModule": data} if data else {})}, path)
    return str(path)


def model(**paths) -> SimpleNamespace:
    """What the DataModule sees of a Trainer whose model starts from checkpoints."""
    return SimpleNamespace(lightning_module=SimpleNamespace(**paths), global_rank=0, world_size=1)


def test_a_sound_division_passes(root, tmp_path):
    other = real_set(tmp_path / "other", {"Q0": "train", "Q1": "test"})
    synthetic = synthetic_set(tmp_path / "synthetic", patients_seen=["P0", "P1"])
    data = trained_on(root, root, other, synthetic)
    assert data.patients_seen == ["P0", "P1", "Q0"]
    assert data.guard.closest["test"] > SAME_PATIENT


def test_the_same_patient_in_another_real_set(root, tmp_path):
    other = real_set(tmp_path / "other", {"Q0": "train", "P3": "train"})
    with pytest.raises(ValueError, match=r"other contains 1 patients of the test split of .*root \(P3\)"):
        trained_on(root, other)


def test_a_validation_patient_in_another_real_set(root, tmp_path):
    other = real_set(tmp_path / "other", {"P2": "train"})
    with pytest.raises(ValueError, match=r"other contains 1 patients of the validation split of .*root \(P2\)"):
        trained_on(root, other)


@pytest.mark.parametrize(("patient", "split"), [("P3", "test"), ("P2", "validation")])
def test_a_generator_that_saw_the_patient(root, tmp_path, patient, split):
    leak = synthetic_set(tmp_path / "leak", patients_seen=["P0", patient])
    with pytest.raises(ValueError, match=rf"leak is of a generator that saw 1 patients of the {split} .*\({patient}\)"):
        trained_on(root, leak)


def test_a_generator_of_which_nobody_knows_whom_it_saw(root, tmp_path):
    silent = synthetic_set(tmp_path / "silent")
    content = json.loads((silent / "dataset.json").read_text())
    (silent / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if k != "patients_seen"}))
    with pytest.raises(ValueError, match=r"dataset.json does not say which patients its generator saw"):
        trained_on(root, silent)


def test_every_leak_is_named_at_once(root, tmp_path):
    first = synthetic_set(tmp_path / "first", patients_seen=["P3"])
    second = real_set(tmp_path / "second", {"P2": "train"})
    with pytest.raises(ValueError, match=r"first is of a generator .*\(P3\).*second contains .*\(P2\)"):
        trained_on(root, first, second)


def test_validation_patients_that_were_taken_from_the_training_patients(tmp_path):
    root = resplit(write_slice_set(tmp_path / "root"), split="train")
    data = ready(root, val_fraction=0.3)
    saw_all = synthetic_set(tmp_path / "all", patients_seen=data.train_patients + data.val_patients)
    with pytest.warns(UserWarning, match="the choice of the best checkpoint favours it"):
        trained_on(root, saw_all, val_fraction=0.3)
    again = real_set(tmp_path / "again", dict.fromkeys(data.val_patients, "train"))
    with pytest.raises(ValueError, match=r"again contains 2 patients of the validation split"):
        trained_on(root, again, val_fraction=0.3)


# Under other names: the tables of names that come with BraTS.

YEARS = [f"BraTS_{year}_subject_ID" for year in (2017, 2018, 2019, 2020)]
NAMES_2020 = f"""Grade,{YEARS[0]},{YEARS[1]},TCGA_TCIA_subject_ID,{YEARS[2]},{YEARS[3]}
HGG,Brats17_TCIA_1_1,Brats18_TCIA01_1_1,TCGA-02-0001,BraTS19_TCIA01_1_1,BraTS20_Training_007
HGG,NA,NA,NA,NA,BraTS20_Training_008
"""
NAMES_2021 = """Data Collection (as on TCIA+additional),PatientID on TCIA Radiology Portal,BraTS2021 ID,Site No
TCGA-GBM,TCGA-02-0001,BraTS2021_00100,1
Collection1,new-not-previously-in-TCIA,BraTS2021_00200,2
Collection1,new-not-previously-in-TCIA,BraTS2021_00300,2
"""
NAMES_2023 = """BraTS2023,BraTS2021,Site No (represents the originating institution)
BraTS-GLI-00777-000,BraTS2021_00100,18
BraTS-GLI-00778-000,BraTS2021_00200,18
"""


def test_tables_of_names_are_joined_and_other_columns_passed_over(tmp_path):
    for name, text in (
        ("name_mapping", NAMES_2020), ("BraTS2021_MappingToTCIA", NAMES_2021), ("GLI_Mapping", NAMES_2023),
        ("survival_info", "BraTS20ID,Age\nBraTS20_Training_007,BraTS20_Training_008\n"),
    ):  # fmt: skip
        (tmp_path / f"{name}.csv").write_text(text)
    aliases = read_aliases([tmp_path])
    everything = {"brats17_tcia_1_1", "brats18_tcia01_1_1", "tcga-02-0001", "brats19_tcia01_1_1"}
    everything |= {"brats20_training_007", "brats2021_00100", "brats-gli-00777"}
    assert aliases["brats2021_00100"] == aliases["brats17_tcia_1_1"] == everything
    assert aliases["brats2021_00200"] == {"brats2021_00200", "brats-gli-00778"}
    assert aliases["brats2021_00300"] == {"brats2021_00300"}
    assert aliases["brats20_training_008"] == {"brats20_training_008"}
    assert not {"collection1", "18", "na", "new-not-previously-in-tcia"} & set(aliases)


def test_a_time_point_is_no_other_patient():
    assert same_name("BraTS-GLI-00777-000 ") == same_name("BraTS-GLI-00777") == "brats-gli-00777"
    assert same_name("BraTS2021_00100") == "brats2021_00100"


@pytest.mark.parametrize("where", ["root", "other"])
def test_a_patient_of_another_year_by_a_table_of_names(tmp_path, where):
    root = real_set(tmp_path / "root", {"BraTS2021_00001": "train", "BraTS2021_00100": "test"})
    other = real_set(tmp_path / "other", {"BraTS-GLI-00777": "train"})
    (tmp_path / where / "BraTS2023_2017_GLI_Mapping.csv").write_text(NAMES_2023)
    with pytest.raises(ValueError, match=r"BraTS2021_00100, who is BraTS-GLI-00777 by a table of names"):
        trained_on(root, other)


def test_two_tables_in_two_folders_are_joined(tmp_path):
    root = real_set(tmp_path / "root", {"BraTS2021_00001": "train", "BraTS2021_00100": "test"})
    (root / "BraTS2021_MappingToTCIA.csv").write_text(NAMES_2021)
    leak = synthetic_set(tmp_path / "leak", patients_seen=["BraTS20_Training_007"])
    trained_on(root, leak)  # nobody can know yet
    (leak / "name_mapping.csv").write_text(NAMES_2020)
    with pytest.raises(ValueError, match=r"BraTS2021_00100, who is BraTS20_Training_007 by a table of names"):
        trained_on(root, leak)


def test_a_synthetic_set_carries_the_other_names_of_those_its_generator_saw(tmp_path):
    first = real_set(tmp_path / "first", {"BraTS20_Training_007": "train", "BraTS20_Training_008": "test"})
    (first / "name_mapping.csv").write_text(NAMES_2020)
    seen = json.loads(json.dumps(ready(first).seen.as_json()))
    leak = synthetic_set(tmp_path / "leak", **seen)
    root = real_set(tmp_path / "root", {"BraTS2021_00001": "train", "BraTS2021_00100": "test"})
    (root / "BraTS2021_MappingToTCIA.csv").write_text(NAMES_2021)
    with pytest.raises(ValueError, match=r"BraTS2021_00100, who is BraTS20_Training_007 by a table of names"):
        trained_on(root, leak)


def test_a_table_that_cannot_be_read_is_named(root):
    (root / "name_mapping.csv").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ValueError, match=r"name_mapping.csv cannot be read as a table of names"):
        ready(root)


# Under other names that no table knows: the images.


def test_the_same_images_under_another_name(root, tmp_path):
    copy = real_set(tmp_path / "copy", {"X": "train"}, {"X": images_of(root, "P3")})
    with pytest.raises(ValueError, match=r"copy contains 1 patients of the test .*\(P3, whose images are those of X\)"):
        trained_on(root, copy)


def test_the_same_images_prepared_differently(tmp_path):
    tall = np.repeat(heads(3, 16, seed=[1]), 20, axis=0)  # slices that change slowly with the height
    other = tall[3:-1].copy()
    other[:, :4] = other[:, :4] * 0.6
    root = real_set(tmp_path / "root", {"P0": "train", "P3": "test"}, {"P3": tall})
    copy = real_set(tmp_path / "copy", {"X": "train"}, {"X": other})
    with pytest.raises(ValueError, match=r"copy contains 1 patients of the test .*\(P3, whose images are those of X\)"):
        trained_on(root, copy)


def test_the_same_images_twice_in_one_set(tmp_path):
    twin = heads(6, 16, seed=[1])
    root = real_set(tmp_path / "root", {"A": "train", "B": "train", "C": "test"}, {"A": twin, "C": twin})
    with pytest.raises(ValueError, match=r"root contains 1 patients of the test .*\(C, whose images are those of A\)"):
        ready(root)


def test_alike_images_of_people_who_are_known_to_be_different(root, tmp_path):
    alike = real_set(tmp_path / "alike", {"X": "train"}, {"X": images_of(root, "P3")})
    with pytest.raises(ValueError, match=r"different_patients '\[\[ONE, OTHER\]\]'"):
        trained_on(root, alike)
    trained_on(root, alike, different_patients=[("X", "P3")])
    twice = real_set(tmp_path / "twice", {"X": "train", "Y": "train"}, dict.fromkeys("XY", images_of(root, "P3")))
    with pytest.raises(ValueError, match="P3, whose images are those of Y"):  # another one
        trained_on(root, twice, different_patients=[("X", "P3")])
    by_name = real_set(tmp_path / "by_name", {"P3": "train"})
    with pytest.raises(ValueError, match=r"by_name contains 1 patients of the test .*\(P3\)"):
        trained_on(root, by_name, different_patients=[("P3", "P3")])


def test_a_generator_that_saw_the_same_images_at_another_size(root, tmp_path):
    large = {"X": np.repeat(np.repeat(images_of(root, "P3"), 2, axis=2), 2, axis=3)}
    seen = ready(real_set(tmp_path / "large", {"X": "train", "Y": "test"}, large | {"Y": heads(6, 32, seed=[9])})).seen
    leak = synthetic_set(tmp_path / "leak", **seen.as_json())
    with pytest.raises(ValueError, match=r"leak is of a generator that saw .*\(P3, whose images are those of X\)"):
        trained_on(root, leak)


# By way of checkpoints.


@pytest.mark.parametrize("name", ["init_from", "autoencoder_path"])
def test_a_checkpoint_that_saw_the_patient(root, tmp_path, name):
    data = ready(root)
    data.trainer = model(**{name: checkpoint(tmp_path / "old.ckpt", patients_seen=["P0", "P3"])})
    with pytest.raises(ValueError, match=r"old.ckpt was trained on 1 patients of the test split of .*root \(P3\)"):
        data.setup("fit")


def test_a_checkpoint_that_saw_the_same_images(root, tmp_path):
    other = ready(real_set(tmp_path / "other", {"X": "train", "Y": "test"}, {"X": images_of(root, "P3")}))
    data = ready(root)
    data.trainer = model(init_from=checkpoint(tmp_path / "old.ckpt", **other.state_dict()))
    with pytest.raises(ValueError, match="P3, whose images are those of X"):
        data.setup("fit")


def test_what_a_checkpoint_saw_is_handed_on(root, tmp_path):
    data = ready(root)
    data.trainer = model(init_from=checkpoint(tmp_path / "old.ckpt", patients_seen=["Z", "P0"]))
    data.setup("fit")
    assert data.patients_seen == ["P0", "P1", "Z"]
    assert Seen.of_checkpoint(checkpoint(tmp_path / "new.ckpt", **data.state_dict())) == data.seen


def test_a_checkpoint_that_does_not_say_whom_it_saw_is_pointed_out(root, tmp_path):
    path = checkpoint(tmp_path / "imported.ckpt")
    data = ready(root)
    data.trainer = model(init_from=path)
    with pytest.warns(UserWarning, match=r"imported.ckpt does not say which patients it was trained on"):
        data.setup("fit")
    synthetic = synthetic_set(tmp_path / "synthetic", **data.seen.as_json())
    with pytest.warns(UserWarning, match=r"imported.ckpt does not say which patients it was trained on"):
        trained_on(root, synthetic)


def test_the_run_stops_before_training(root, tmp_path):
    leak = synthetic_set(tmp_path / "leak", patients_seen=["P3"])
    with pytest.raises(ValueError, match="of the test split"):
        build([*unet_args(tmp_path / "run", root), f"--data.train=[{{path: {leak}}}]"])
    assert not (tmp_path / "run").exists()


# Signatures.


def volume(patient: int, size: int, amount: int = 12) -> np.ndarray:
    """Images of a patient at a size, from the same 64 px: uint8 (12, 4, H, W)."""
    images = heads(amount, 64, seed=patient)[:, :4].astype(float)
    factor = 64 // size
    return images.reshape(amount, 4, size, factor, size, factor).mean(axis=(3, 5)).astype(np.uint8)


def test_signatures_of_one_patient_are_alike_and_those_of_others_are_not():
    plain = [signature(volume(patient, 64)) for patient in range(20)]
    for changed in (
        [signature(volume(patient, 16)) for patient in range(20)],
        [signature((0.5 * volume(patient, 32)).astype(np.uint8)) for patient in range(20)],
    ):
        for patient, one in enumerate(changed):
            assert nearest([one], [plain[patient]])[0][1] < 0.05
            other, share = nearest([one], [s for number, s in enumerate(plain) if number != patient])[0]
            assert share > 2 * SAME_PATIENT, (patient, other)


@pytest.mark.parametrize("angle", [0.2, 1.0, 2.5])
def test_a_hash_differs_in_as_many_bits_as_the_angle_says(angle):
    rng = np.random.default_rng(0)
    first, second = np.linalg.qr(rng.normal(size=(3072, 2)))[0].T
    turned = np.cos(angle) * first + np.sin(angle) * second
    (_, share), *_ = nearest([hash_direction(first)], [hash_direction(turned)])
    expected = angle / np.pi
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 512) ** 0.5)


def test_the_nearest_of_several_is_found():
    hashes = ["00" * 64, "ff" * 64, "0f" * 64]
    assert nearest(["01" * 64, "0e" * 64], hashes) == [(0, 1 / 8), (2, 1 / 8)]


def test_images_that_are_the_same_left_and_right_have_no_signature():
    assert signature(np.full((12, 4, 16, 16), 9, np.uint8)) is None


def test_signatures_are_kept_beside_the_set_and_made_again_for_other_data(root):
    slices = SliceSet(root, "test")
    made = volume_signatures(slices)
    kept = json.loads((root / "signatures.json").read_text())
    assert set(kept["volumes"]) == set(SIDES)
    assert made == {"P3": kept["volumes"]["P3"]}
    resplit(root, patient=SliceSet(root).index["patient"] + "x", volume=SliceSet(root).index["volume"] + "x")
    assert volume_signatures(SliceSet(root, "test")) == {"P3x": kept["volumes"]["P3"]}


def test_a_set_that_cannot_be_written_to_has_signatures_all_the_same(root, monkeypatch):
    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr("datamodules.signatures.write_atomically", refuse)
    assert set(volume_signatures(SliceSet(root))) == set(SIDES)
    assert not (root / "signatures.json").exists()


def test_signatures_of_another_method_are_left_out(root):
    content = ready(root).seen.as_json()
    assert Seen.from_json(content).signatures
    content["signatures_seen"]["method"] = "an older one"
    assert not Seen.from_json(content).signatures


def test_nothing_to_compare_is_no_leak_and_no_distance():
    leaks = find_leaks(Seen(["A"]), Seen(["B"]))
    assert (leaks.found, leaks.closest) == ({}, None)


@pytest.mark.skipif("BRATS_DIR" not in os.environ, reason="BRATS_DIR names no folder with real patients")
def test_real_patients_are_known_again_in_every_preparation_and_told_apart(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for folder in sorted(path for path in Path(os.environ["BRATS_DIR"]).iterdir() if path.is_dir())[:5]:
        (source / folder.name).symlink_to(folder)
    sets = [
        SliceSet(prepare(source, tmp_path / f"{preset}{size}", preset=preset, size_px=size))
        for preset, size in (("default", 128), ("paper", 64), ("default", 32))
    ]
    signatures = [volume_signatures(slices) for slices in sets]
    for one in signatures:
        for other in signatures:
            for patient, hashed in one.items():
                assert nearest([hashed], [other[patient]])[0][1] < 0.1
                assert nearest([hashed], [s for name, s in other.items() if name != patient])[0][1] > 0.25
