"""A release: copies are removed, what is shared holds no patient, and what must not leave does not."""

import hashlib
import json
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from fake_sets import real_set
from fake_study import heads
from PIL import Image

from cli import main
from datamodules.leak_guard import Seen
from datamodules.slice_set import SliceSet, class_pixels, finish_slice_set, save_shard
from evaluation import release_tests
from evaluation.attack import equal_shares, membership_table
from evaluation.feature_scores import feature_scores
from evaluation.feature_spaces import feature_space
from evaluation.release import release
from evaluation.remembered import remembered
from evaluation.thresholds import Thresholds, at_least, at_most
from lightning_modules.copy_detection import CopyDetector

SPLITS = {f"PATIENT-{i:02d}": "train" if i < 6 else "test" for i in range(12)}
TRAINING = [name for name, split in SPLITS.items() if split == "train"]
RATE = 0.05
EASY = Thresholds(false_alarm_rate=RATE, max_removed=0.3, max_retest=1.0, max_membership_auc=1.0, min_copies_found=0.5)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return real_set(tmp_path_factory.mktemp("real") / "set", SPLITS)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A network that has learned nothing: it finds exact copies all the same."""
    torch.manual_seed(0)
    settings = {"widths": [8, 16], "blocks": 1, "embedding_width": 12, "norm_groups": 2}
    model = CopyDetector(**settings)
    path = tmp_path_factory.mktemp("detector") / "last.ckpt"
    data = Seen(TRAINING).as_json()
    content = {"state_dict": model.state_dict(), "hyper_parameters": settings, "BraTSDataModule": data}
    model.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def made_set(root, slices, **content):
    root.mkdir(parents=True)
    save_shard(root / "slices-00000.npy", slices)
    name = [f"s{i}" for i in range(len(slices))]
    index = class_pixels(slices[:, 4]).assign(patient=name, volume=name, z=0, split="train")
    description = {"kind": "synthetic", "spacing_mm": 2.0, "generator": "a.GAN", "images_seen": 5, "seed": 3}
    finish_slice_set(root, index, {**description, **Seen(TRAINING).as_json(), "trained_on": ["abc"], **content})
    return root


@pytest.fixture(scope="module")
def synthetic(real, tmp_path_factory):
    """16 new heads, of which numbers 3 and 11 are copies of training slices 5 and 20, the second one mirrored."""
    slices = heads(16, 16, 77)
    source = SliceSet(real)
    training = source.subset((source.index["split"] == "train").to_numpy()).read([5, 20])
    slices[3], slices[11] = training[0], training[1][:, ::-1]
    return made_set(tmp_path_factory.mktemp("made") / "set", slices)


@pytest.fixture(scope="module")
def released(synthetic, real, detector, tmp_path_factory):
    out = tmp_path_factory.mktemp("released") / "out"
    release(synthetic, real, detector, out, thresholds=EASY, max_shift_px=1, planted=8)
    return out


def card_of(folder):
    return json.loads((folder / "card.json").read_text())


def test_copies_are_removed_and_the_rest_is_shared(released, synthetic):
    kept, made = SliceSet(released / "slices"), SliceSet(synthetic)
    suspicious = pd.read_csv(released.with_name("out-evidence") / "suspicious.csv")
    assert {3, 11} <= set(suspicious["position"])
    assert set(suspicious["position"][:2]) == {3, 11}  # the nearest first
    assert dict(zip(suspicious["position"], suspicious["nearest_patient"], strict=True))[3] == "PATIENT-00"
    rest = [i for i in range(16) if i not in set(suspicious["position"])]
    np.testing.assert_array_equal(kept.read(range(len(kept))), made.read(rest))
    assert kept.index["volume"].tolist() == [f"s{i}" for i in rest]
    card = card_of(released)
    assert (card["slices_made"], card["slices_removed"]) == (16, len(suspicious))
    patients = pd.read_csv(released.with_name("out-evidence") / "patients.csv")
    assert patients["suspicious"].sum() == len(suspicious)


def test_nothing_that_is_shared_names_a_patient_or_shows_a_removed_slice(released, synthetic):
    for path in released.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"PATIENT-" not in content, path
            assert b"signatures" not in content, path
    manifest = json.loads((released / "slices" / "dataset.json").read_text())
    assert not {"patients_seen", "signatures_seen", "trained_on"} & set(manifest)
    assert "PATIENT-00" in (released.with_name("out-evidence") / "suspicious.csv").read_text()


def test_the_card_says_the_same_in_three_forms(released):
    card, page, text = card_of(released), (released / "card.html").read_text(), (released / "card.md").read_text()
    for criterion in card["criteria"]:
        assert criterion["holds"]
        assert criterion["text"] in text
    for words in (
        "Similarity alone proves nothing",
        "Trained on 36 slices of 6 patients",
        "a.GAN",
        "modality replaced",
        "was this person in the training?",
        "not measured",
    ):
        assert words.lower() in page.lower(), words
        assert words.lower() in text.lower(), words
    assert 'src="http' not in page
    assert page.count("data:image/png;base64") == 2
    assert "](examples.png)" in text
    kinds = {row["kind"] for row in card["sensitivity"]}
    assert {"exact", "mirrored", "shifted", "rotated", "intensity", "blended_1_to_1", "label_removed"} <= kinds
    exact = [row["rate"] for row in card["sensitivity"] if row["kind"] == "exact" and row["detector"] == "pixels"]
    assert min(exact) == 1.0


def test_every_file_is_hashed(released):
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=released, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    listed = {line.split("  ")[1] for line in (released / "SHA256SUMS").read_text().splitlines()}
    there = {path.relative_to(released).as_posix() for path in released.rglob("*") if path.is_file()}
    assert there - listed == {"SHA256SUMS"}
    shard = (released / "slices" / "slices-00000.npy").read_bytes()
    assert card_of(released)["sha256"]["slices/slices-00000.npy"] == hashlib.sha256(shard).hexdigest()


def test_what_does_not_hold_is_not_written_and_the_status_says_so(synthetic, real, detector, tmp_path):
    out = tmp_path / "out"
    command = ["release", *map(str, (synthetic, real, detector, out)), "--planted=4", "--max_shift_px=0"]
    with pytest.raises(SystemExit, match=r"Not released: \d of \d+ thresholds do not hold"):
        main([*command, f"--thresholds.false_alarm_rate={RATE}", "--thresholds.max_removed=0.01"])
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    card = card_of(tmp_path / "out-evidence" / "card")
    failed = {criterion["name"] for criterion in card["criteria"] if not criterion["holds"]}
    assert "removed" in failed
    assert card["verdict"] == "thresholds do not hold"
    assert "not for release" in (tmp_path / "out-evidence" / "card" / "card.html").read_text()


def test_real_images_and_names_are_shared_only_on_request(synthetic, real, detector, released, tmp_path):
    out = tmp_path / "out"
    options = {"thresholds": EASY, "max_shift_px": 1, "planted": 8, "evidence": released.with_name("out-evidence")}
    release(synthetic, real, detector, out, with_real_images=True, name_patients=True, **options)
    assert json.loads((out / "slices" / "dataset.json").read_text())["patients_seen"] == TRAINING
    assert "each beside that real slice" in (out / "card.html").read_text()
    pictures = [(folder / "nearest.png").read_bytes() for folder in (out, released)]
    assert pictures[0] != pictures[1]
    assert SliceSet(out / "slices").manifest.fingerprint == SliceSet(released / "slices").manifest.fingerprint


def test_usefulness_losses_and_pictures_come_on_request(synthetic, real, detector, released, tmp_path):
    tables = tmp_path / "report" / "tables"
    tables.mkdir(parents=True)
    row = {
        "arm": "synthetic",
        "baseline": "real",
        "entity": "WT",
        "pairs": 9,
        "ratio": 0.87,
        "ci_low": 0.8,
        "ci_high": 0.9,
    }
    pd.DataFrame([row]).to_csv(tables / "ratio_to_real.csv", index=False)
    index = SliceSet(real).index
    losses = pd.DataFrame({"patient": index["patient"], "loss": np.where(index["split"] == "train", 0.1, 0.9)})
    losses.to_parquet(tmp_path / "losses.parquet")
    options = {"thresholds": EASY, "max_shift_px": 1, "planted": 8, "evidence": released.with_name("out-evidence")}
    out = tmp_path / "out"
    asked = {"study": tmp_path / "report", "losses": tmp_path / "losses.parquet", "also_as": "tiff"}
    release(synthetic, real, detector, out, **asked, **options)
    assert "87.00 (80.0–90.0) %" in (out / "card.md").read_text()
    attack = [row for row in card_of(out)["membership"] if row["score"] == "loss"]
    assert [row["auc"] for row in attack] == [1.0, 1.0]  # losses give everybody away
    kept, name = SliceSet(out / "slices"), SliceSet(out / "slices").index["volume"][2]
    assert np.array_equal(np.asarray(Image.open(out / f"images/FLAIR/{name}_flair.tiff")), kept.read([2])[0, 3])
    assert f"  images/Seg/{name}_seg.tiff\n" in (out / "SHA256SUMS").read_text()


def test_what_cannot_be_released_is_refused_at_once(synthetic, real, detector, released, tmp_path):
    with pytest.raises(ValueError, match=r"out exists already"):
        release(synthetic, real, detector, released, thresholds=EASY)
    with pytest.raises(ValueError, match=r"is inside .*out, which is shared"):
        release(synthetic, real, detector, tmp_path / "out", tmp_path / "out" / "evidence", thresholds=EASY)
    with pytest.raises(ValueError, match=r"needs 99 slices"):
        release(synthetic, real, detector, tmp_path / "out")
    with pytest.raises(ValueError, match=r"Expected a report in .*nowhere"):
        release(synthetic, real, detector, tmp_path / "out", thresholds=EASY, study=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"thresholds.max_removed=2"):
        Thresholds(max_removed=2)
    content = torch.load(detector, weights_only=True)
    content["BraTSDataModule"] = Seen([*TRAINING, "PATIENT-07"]).as_json()
    torch.save(content, tmp_path / "knows.ckpt")
    with pytest.raises(ValueError, match=r"trained on 1 held-out patients \(PATIENT-07\)"):
        release(synthetic, real, tmp_path / "knows.ckpt", tmp_path / "out", thresholds=EASY)
    assert list(tmp_path.iterdir()) == [tmp_path / "knows.ckpt"]


def test_a_set_of_copies_keeps_nothing_and_fails(real, detector, tmp_path):
    source = SliceSet(real)
    training = source.subset((source.index["split"] == "train").to_numpy())
    copies = made_set(tmp_path / "made", training.read(range(0, 36, 2)))
    with pytest.raises(SystemExit, match="Not released"):
        release(copies, real, detector, tmp_path / "out", thresholds=EASY, max_shift_px=0, planted=4)
    card = card_of(tmp_path / "out-evidence" / "card")
    assert card["slices_removed"] == 18
    failed = {criterion["name"] for criterion in card["criteria"] if not criterion["holds"]}
    assert {"removed", "retest by embedding"} <= failed  # what cannot be measured does not hold


def test_what_cannot_be_measured_does_not_hold():
    assert at_most("a", 0.1, 0.1, "").holds
    assert not at_most("a", 0.2, 0.1, "").holds
    assert at_least("a", 0.1, 0.1, "").holds
    assert not at_least("a", 0.05, 0.1, "").holds
    assert not at_most("a", float("nan"), 1.0, "").holds
    assert not at_least("a", float("nan"), 0.0, "").holds


def test_results_are_remembered_by_their_slices(tmp_path):
    calls = []

    def slow(slices):
        calls.append(len(slices))
        return slices.reshape(len(slices), -1).mean(axis=1)

    slices = heads(4, 16, 0)
    for settings, count in (("a", 1), ("a", 1), ("b", 2)):
        found = remembered(slow, settings, tmp_path)(slices)
        np.testing.assert_array_equal(found, slices.reshape(4, -1).mean(axis=1))
        assert len(calls) == count
    remembered(slow, "a", tmp_path)(slices[:3])
    assert calls == [4, 4, 3]


def test_attacks_take_as_many_slices_of_every_patient(real):
    source = SliceSet(real)
    chosen = equal_shares(source, 2)
    assert source.index["patient"].iloc[chosen].value_counts().eq(2).all()
    assert source.index["z"].iloc[chosen].tolist() == [0, 5] * 12
    with pytest.raises(ValueError, match="expected 9 slices of every patient, but PATIENT-00 has 6"):
        equal_shares(source, 9)


def test_attacks_are_those_of_the_patients_scores():
    rng = np.random.default_rng(0)
    members = pd.DataFrame({"patient": np.repeat(list("abcdef"), 5), "all": rng.normal(1, 1, 30)})
    strangers = pd.DataFrame({"patient": np.repeat(list("uvwxyz"), 5), "all": rng.normal(0, 1, 30)})
    table = membership_table(members, strangers).set_index("rule")
    for rule in ("max", "mean"):
        a, b = (getattr(part.groupby("patient")["all"], rule)().to_numpy() for part in (members, strangers))
        assert table.loc[rule, "auc"] == pytest.approx((a[:, None] > b).mean())
    assert (table["patients"] == 6).all()


def test_scores_of_training_copies_are_perfect_where_they_are_blind():
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(8, 12))
    training = (np.repeat(centre, 20, axis=0) + 0.3 * rng.normal(size=(160, 12))).astype(np.float32)
    held_out = (np.repeat(rng.normal(size=(4, 12)), 20, axis=0) + 0.3 * rng.normal(size=(80, 12))).astype(np.float32)
    patients = np.repeat(np.array([f"P{i}" for i in range(8)], dtype=object), 20)
    table = feature_scores(training, held_out, training, patients).set_index("score")
    assert table.loc["Fréchet distance", "value"] < table.loc["Fréchet distance", "real"]
    assert table.loc["precision", "value"] >= table.loc["precision", "real"]
    assert table.loc["authenticity", "value"] == 0.0
    assert table.loc["data-copying C_T", "value"] < -5
    assert table["blind_to"].str.len().gt(0).all()
    assert np.isfinite(table["value"].to_numpy()).all()


def test_a_killed_release_goes_on(synthetic, real, detector, tmp_path, monkeypatch):
    """What was searched, embedded and planted before is not done again."""
    whole = release_tests.scores_of_sets
    monkeypatch.setattr(release_tests, "scores_of_sets", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    options = {"thresholds": EASY, "max_shift_px": 0, "planted": 4}
    with pytest.raises(KeyboardInterrupt):
        release(synthetic, real, detector, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(release_tests, "scores_of_sets", whole)
    monkeypatch.setattr(CopyDetector, "embed_array", None)  # would fail
    files = sorted((tmp_path / "out-evidence" / ".search").rglob("share-*.npz"))
    times = [path.stat().st_mtime_ns for path in files]
    release(synthetic, real, detector, tmp_path / "out", **options)
    assert [path.stat().st_mtime_ns for path in files] == times
    assert (tmp_path / "out" / "card.html").exists()


class Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def test_feature_spaces_see_three_modalities(tmp_path):
    slices = heads(3, 16, 0)
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    found = feature_space(str(tmp_path / "means.pt"), torch.device("cpu"))(slices)
    np.testing.assert_allclose(found, slices[:, 1:4].mean(axis=(2, 3)) / 255, rtol=1e-5)  # T1ce, T2, FLAIR
    wide = feature_space("imagenet", torch.device("cpu"))(slices)
    assert wide.shape == (3, 1280)
    other = slices.copy()
    other[0, 0] = 0  # T1 is not shown
    other[1, 4] = 0
    other[2, 3] = 0
    same = np.isclose(feature_space("imagenet", torch.device("cpu"))(other), wide, atol=1e-5).all(axis=1)
    assert same.tolist() == [True, True, False]


def test_imagenet_features_know_a_photograph_from_a_mirror_image_less_than_from_noise():
    slices = heads(8, 64, 0)
    features = feature_space("imagenet", torch.device("cpu"))
    plain, mirrored = features(slices), features(slices[..., ::-1].copy())
    noise = features(np.random.default_rng(0).integers(0, 256, slices.shape, np.uint8))
    assert np.linalg.norm(plain - mirrored, axis=1).max() < np.linalg.norm(plain - noise, axis=1).min()


def test_what_is_no_feature_space_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match=r"text\.pt cannot be read as TorchScript"):
        feature_space(str(tmp_path / "text.pt"), torch.device("cpu"))
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "maps.pt"))
    with pytest.raises(ValueError, match=r"expected features \(N, D\), but got \(2, 3, 16, 16\)"):
        feature_space(str(tmp_path / "maps.pt"), torch.device("cpu"))(heads(2, 16, 0))
