"""`python train.py --config X`: shipped configurations, what a run leaves behind, errors before anything slow."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fake_slices import ROOT, generator_args, shrunk, stylegan2_args, train, unet_args, write_slice_set
from scipy.stats import pearsonr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.synthetic_dataset import power_of_two_below
from datamodules.slice_set import SliceSet, read_manifest
from evaluation.curves import read_curves
from train import is_refusal, main

CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.name != "base.yaml" and p.parent.name != "cluster")


@pytest.fixture(scope="module")
def generator_run(slice_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "generator"
    train(stylegan2_args(run_dir, slice_set))
    return run_dir


@pytest.fixture(scope="module")
def segmenter_run(slice_set: Path, generator_run: Path) -> Path:
    run_dir = generator_run.parent / "segmenter"
    parts = f"[{{path: {slice_set}}}, {{path: {generator_run / 'synthetic'}, amount: 20}}]"
    train([*unet_args(run_dir, slice_set), f"--data.train={parts}"])
    return run_dir


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_shipped_configurations_are_valid(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(config), "--print_config"])
    assert stopped.value.code == 0
    assert "class_path" in capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_shipped_configurations_train_and_do_what_follows(config, slice_set, tmp_path):
    is_segmenter = "SegmentationModule" in config.read_text()
    if config.name == "swin_unetr.yaml":  # halves the slice five times
        slice_set = write_slice_set(tmp_path / "slices", size_px=64)
    args = shrunk(config, tmp_path, slice_set)
    if config.name == "latent_diffusion.yaml":
        train(shrunk(config.with_name("autoencoder.yaml"), tmp_path / "autoencoder", slice_set))
        args.append(f"--model.autoencoder={_last(tmp_path / 'autoencoder')}")
    train(args)
    outcome = "dice_per_patient.csv" if is_segmenter else "synthetic/dataset.json"
    others = {"autoencoder.yaml": "checkpoints/last.ckpt", "copy_detector.yaml": "sensitivity.csv"}
    assert (tmp_path / others.get(config.name, outcome)).exists()
    assert json.loads((tmp_path / "run.json").read_text())["images_seen"] == 8


def test_generator_run_leaves_a_synthetic_set(generator_run, slice_set):
    manifest = read_manifest(generator_run / "synthetic")
    assert manifest.kind == "synthetic"
    assert manifest.slices == 100
    assert manifest.content["patients_seen"] == ["P0", "P1", "P2", "P3", "P4"]
    assert manifest.content["trained_on"] == [read_manifest(slice_set).fingerprint]
    assert manifest.content["images_seen"] == 48
    slices = SliceSet(generator_run / "synthetic").read(range(100))
    assert int(slices[:, 4].max()) <= 3
    assert len(np.unique(slices.reshape(100, -1), axis=0)) == 100


def test_memorization_table_holds_the_largest_correlation_of_every_slice(generator_run, slice_set):
    table = pd.read_csv(generator_run / "memorization.csv")
    training = SliceSet(slice_set, "train").read(range(len(SliceSet(slice_set, "train"))))[:, :4]
    synthetic = SliceSet(generator_run / "synthetic").read(range(100))[:, :4]
    held_out = SliceSet(slice_set, "val").read(range(len(SliceSet(slice_set, "val"))))[:, :4]
    for name, slices in (("synthetic", synthetic), ("held-out", held_out)):
        rows = table[table["set"] == name].reset_index(drop=True)
        assert rows["position"].tolist() == list(range(len(slices)))
        for i in (0, len(slices) - 1):
            r = [pearsonr(slices[i].ravel().astype(float), other.ravel().astype(float))[0] for other in training]
            assert rows["r"][i] == pytest.approx(max(r), abs=1e-12)
            assert rows["nearest"][i] == int(np.argmax(r))
            channel = [pearsonr(slices[i, 3].ravel().astype(float), o[3].ravel().astype(float))[0] for o in training]
            assert rows["r_FLAIR"][i] == pytest.approx(max(channel), abs=1e-12)


def test_tensorboard_shows_curves_over_images_and_pictures(generator_run, segmenter_run):
    events = EventAccumulator(str(generator_run), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Scalars("loss/generator")] == [16, 32, 48]
    assert {"loss/discriminator", "loss/r1", "loss/path_length", "memorization/synthetic_max_r"} <= set(
        events.Tags()["scalars"]
    )
    assert {"samples/generated", "samples/real", "memorization/nearest_pairs"} <= set(events.Tags()["images"])
    events = EventAccumulator(str(segmenter_run)).Reload()
    assert [e.step for e in events.Scalars("dice/val/WT")] == [16, 32, 48]
    assert "segmentation/val" in events.Tags()["images"]
    curves = read_curves(segmenter_run)
    of_one = curves[curves["metric"] == "dice/val/WT"]
    assert of_one["step"].tolist() == [16, 32, 48]
    assert of_one["value"].tolist() == pytest.approx([e.value for e in events.Scalars("dice/val/WT")])


def test_another_logger_takes_the_place_of_both(slice_set, tmp_path):
    folder = tmp_path / "run"
    logger = "--trainer.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: LOGS}}"
    train([*unet_args(folder, slice_set), logger.replace("LOGS", str(tmp_path / "logs"))])
    (table,) = (tmp_path / "logs").rglob("metrics.csv")
    assert "dice/val/WT" in pd.read_csv(table).columns
    assert not list(folder.glob("events.*"))
    assert not (folder / "curves.csv").exists()


def test_segmenter_run_leaves_dice_of_every_test_patient(segmenter_run):
    table = pd.read_csv(segmenter_run / "dice_per_patient.csv")
    assert table["patient"].unique().tolist() == ["P6", "P7"]
    dice = 2 * table["tp"] / (2 * table["tp"] + table["fp"] + table["fn"])
    assert np.allclose(table["dice"], dice, equal_nan=True)
    metrics = json.loads((segmenter_run / "metrics.json").read_text())
    assert metrics["dice/test/WT"] == pytest.approx(table.loc[table["entity"] == "WT", "dice"].mean(), abs=1e-6)
    classes = table[table["entity"].isin(["core", "oedema", "enhancing"])]
    assert metrics["dice/test"] == pytest.approx(classes.groupby("patient")["dice"].mean().mean(), abs=1e-6)


def test_run_record_says_what_the_run_was(segmenter_run, generator_run):
    record = json.loads((segmenter_run / "run.json").read_text())
    assert [part["kind"] for part in record["training_sets"]] == ["real", "synthetic"]
    assert record["training_sets"][1]["slices"] == 20
    assert record["training_sets"][1]["fingerprint"] == read_manifest(generator_run / "synthetic").fingerprint
    assert record["kind"] == "segmenter"
    assert record["images_seen"] == 48
    assert record["test_patients"] == ["P6", "P7"]
    assert (segmenter_run / "config.yaml").exists()


def test_finished_run_is_left_as_it_is(generator_run, slice_set):
    before = (generator_run / "synthetic" / "slices-00000.npy").stat().st_mtime_ns
    train(stylegan2_args(generator_run, slice_set))
    assert (generator_run / "synthetic" / "slices-00000.npy").stat().st_mtime_ns == before
    assert not (generator_run / "synthetic.partial").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.r1_gama=1", "r1_gama"),
        ("--model.r1_gamma=ten", "r1_gamma"),
        ("--trainer.max_epoch=3", "max_epoch"),
        ("--task=trane", "task"),
        ("--trainer.devices=two", "`devices`"),
        ("--run_dir=${nothing}", "nothing"),
        ("--data.batch_size=7", "multiple of batch_size (7)"),
        ("--data.root=nowhere", "Expected a slice set at nowhere"),
    ],
)
def test_bad_options_are_refused_with_the_reason(option, words, slice_set, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*stylegan2_args(tmp_path / "run", slice_set), option])
    reason = str(stopped.value)
    assert words in reason
    assert len(reason.splitlines()) < 12
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_only_what_is_raised_on_purpose_is_a_refusal(tmp_path):
    for call, expected in (
        (lambda: SliceSet(tmp_path), True),
        (lambda: power_of_two_below("x"), False),
        (lambda: int("x"), False),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        assert is_refusal(caught.value) is expected


def test_predict_without_a_checkpoint_says_to_train_first(slice_set, tmp_path):
    with pytest.raises(SystemExit, match=r"there is none\. Train first"):
        main([*stylegan2_args(tmp_path / "run", slice_set), "--task=predict"])


def test_training_starts_from_the_networks_of_another_run(generator_run, slice_set, tmp_path):
    source = generator_run / "checkpoints" / "last.ckpt"
    common = [*stylegan2_args(tmp_path / "run", slice_set), f"--model.init_from={source}", "--model.generator_lr=0"]
    train([*common, "--task=predict"])
    ours, theirs = (read_manifest(run / "synthetic").content for run in (tmp_path / "run", generator_run))
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    assert ours["images_seen"] == 0

    train([*common, "--trainer.max_epochs=1", "--task=fit"])
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (source, _last(tmp_path / "run")))
    weights = [name for name in before if name.startswith("generator.") and name.endswith("weight")]
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert not torch.equal(before["discriminator.b4.out.weight"], after["discriminator.b4.out.weight"])


def test_networks_in_the_middle_of_a_fade_in_make_the_images_of_that_level(slice_set, tmp_path):
    source, other = (generator_args("progressive_gan", tmp_path / name, slice_set) for name in ("source", "other"))
    train(source)
    train([*other, f"--model.init_from={_last(tmp_path / 'source')}", "--task=predict"])
    ours, theirs = (SliceSet(tmp_path / name / "synthetic").read(range(100)) for name in ("other", "source"))
    assert np.array_equal(ours, theirs)


def test_a_compiled_network_makes_the_same_images_up_to_rounding(generator_run, slice_set, tmp_path):
    text = (ROOT / "configs" / "laptop" / "stylegan2.yaml").read_text()
    config = tmp_path / "compiled.yaml"
    config.write_text(text.replace('{slices: "${synthetic_slices}"}', "{slices: 100, compiled: true}"))
    _, *args = stylegan2_args(tmp_path / "run", slice_set)
    train([f"--config={config}", *args, f"--model.init_from={_last(generator_run)}", "--task=predict"])
    assert read_manifest(tmp_path / "run" / "synthetic").content["compiled"] is True
    ours, theirs = (SliceSet(run / "synthetic").read(range(100)) for run in (tmp_path / "run", generator_run))
    assert np.abs(ours[:, :4].astype(int) - theirs[:, :4]).max() <= 1
    assert (ours[:, 4] != theirs[:, 4]).mean() < 0.001


@pytest.mark.parametrize(("images", "size"), [(0.3, 1), (1.9, 1), (63.9, 32), (64.0, 64), (5e6, 1024)])
def test_batches_of_an_emission_are_powers_of_two(images, size):
    assert power_of_two_below(images) == size


def test_networks_that_do_not_fit_are_refused_with_their_shapes(generator_run, slice_set, tmp_path):
    source = generator_run / "checkpoints" / "last.ckpt"
    args = [*stylegan2_args(tmp_path / "run", slice_set), f"--model.init_from={source}"]
    refused = train([*args, "--model.generator.init_args.w_dim=32"], check=False)
    assert refused.returncode != 0
    assert "does not fit the configured one" in refused.stderr
    assert "instead of (" in refused.stderr


def _last(run_dir):
    return run_dir / "checkpoints" / "last.ckpt"


def test_conditional_generator_emits_tumours_in_the_proportion_of_the_training(slice_set, tmp_path):
    classes = ["--model.generator.init_args.c_dim=2", "--model.discriminator.init_args.c_dim=2"]
    train([*stylegan2_args(tmp_path, slice_set), *classes, "--trainer.max_epochs=1", "--task=fit"])
    counts = torch.load(_last(tmp_path), weights_only=True)["state_dict"]["conditions.counts"]
    training = SliceSet(slice_set, "train")
    assert counts.sum() == 16
    assert counts[1] >= counts[0]  # most fake slices show a tumour
    assert (training.read(range(len(training)))[:, 4].reshape(len(training), -1).max(axis=1) > 0).mean() > 0.5


def test_equivariance_of_stylegan3_is_logged(slice_set, tmp_path):
    every_epoch = "--trainer.callbacks.every_n_epochs=1"  # of the last callback
    train([*generator_args("stylegan3_r", tmp_path, slice_set), every_epoch, "--trainer.max_epochs=1", "--task=fit"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"equivariance/eqt_int_db", "equivariance/eqt_frac_db", "equivariance/eqr_db"} <= set(metrics)
    other = [*stylegan2_args(tmp_path / "other", slice_set), "--trainer.callbacks+=callbacks.Equivariance"]
    assert "measures StyleGAN 3" in train(other, check=False).stderr


def test_adam_starts_anew_when_a_resolution_enters(slice_set, tmp_path):
    train([*generator_args("progressive_gan", tmp_path, slice_set), "--task=fit"])
    optimizers = torch.load(_last(tmp_path), weights_only=True)["optimizer_states"]
    # 48 images: 16 and 16 at 4 px, then, as 8 px begins to enter, twice 8.
    assert [int(max(state["step"] for state in o["state"].values())) for o in optimizers] == [2, 2]


def test_number_of_classes_that_the_data_does_not_have_is_refused(slice_set, tmp_path):
    refused = train([*stylegan2_args(tmp_path, slice_set), "--model.generator.init_args.c_dim=3"], check=False)
    assert "2 for slices without and with tumour, but are 3 and 0" in refused.stderr
