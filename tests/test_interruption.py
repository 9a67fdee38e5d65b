"""A run killed in the middle of an epoch and started again ends as one that was left alone, bit for bit."""

import json
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fake_slices import GENERATORS, generator_args, stylegan2_args, train, unet_args, write_slice_set

from datamodules.slice_set import SliceSet
from evaluation.curves import read_curves

AUGMENTATION = [
    "--model.augmentation=lightning_modules.ada.AdaptiveAugmentation",
    "--model.augmentation.init_args={p: 0.3, adjust_kimg: 0.1, adjust_interval: 2}",
]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_run(one: Path, other: Path, same_bytes: list[str]) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []
    assert json.loads((one / "metrics.json").read_text()) == json.loads((other / "metrics.json").read_text())
    pd.testing.assert_frame_equal(read_curves(one), read_curves(other))
    assert len(read_curves(one))
    for name in same_bytes:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def killed_once(command: list[str], tmp_path: Path, epoch: int = 1) -> list[str]:
    """The same command, with a callback that kills the process in the middle of an epoch when it is run first."""
    return [
        *command,
        "--trainer.callbacks+=kill_once.KillOnce",
        f"--trainer.callbacks.marker={tmp_path / 'killed-once'}",
        f"--trainer.callbacks.epoch={epoch}",
    ]


@pytest.mark.parametrize("model", GENERATORS)
def test_killed_and_restarted_generator_equals_uninterrupted(model: str, slice_set: Path, tmp_path: Path) -> None:
    options = AUGMENTATION if model == "stylegan2" else []
    train([*generator_args(model, tmp_path / "whole", slice_set), *options])
    # The growing models are resumed in the middle of a fade-in.
    command = killed_once([*generator_args(model, tmp_path / "killed", slice_set), *options], tmp_path, epoch=2)
    assert train(command, check=False).returncode == -signal.SIGKILL
    train(command)
    same = ["synthetic/slices-00000.npy", "synthetic/index.parquet", "memorization.csv"]
    assert_same_run(tmp_path / "whole", tmp_path / "killed", same)


def test_killed_and_restarted_unet_equals_uninterrupted_in_spite_of_a_torn_checkpoint(
    slice_set: Path, tmp_path: Path
) -> None:
    train(unet_args(tmp_path / "whole", slice_set))
    command = killed_once(unet_args(tmp_path / "killed", slice_set), tmp_path, epoch=2)
    assert train(command, check=False).returncode == -signal.SIGKILL
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-5000])
    assert "last.ckpt cannot be read" in train(command).stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed", ["dice_per_patient.csv"])


def test_killed_emission_goes_on_where_it_stopped(slice_set: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [
        *stylegan2_args(run_dir, slice_set),
        "--trainer.callbacks+=kill_once.KillEmissionOnce",
        f"--trainer.callbacks.marker={tmp_path / 'killed-once'}",
    ]
    assert train(command, check=False).returncode == -signal.SIGKILL
    assert not (run_dir / "synthetic").exists()
    first = run_dir / "synthetic.partial" / "part-000000000.npy"
    np.save(first, np.full_like(np.load(first), 2))  # a mark that only this file carries
    train(command)
    assert not (run_dir / "synthetic.partial").exists()
    slices = SliceSet(run_dir / "synthetic").read(range(100))
    assert (slices[:64] == 2).all()
    assert (slices[64:] != 2).any(axis=(1, 2, 3)).all()

    train([*command, "--synthetic_slices=70", "--model.truncation_psi=0.5", "--task=predict"])
    again = SliceSet(run_dir / "synthetic")
    assert len(again) == 70
    assert again.manifest.content["hyperparameters"]["truncation_psi"] == 0.5
    assert not (again.read(range(64)) == 2).all()


def test_run_is_not_resumed_on_other_data(slice_set: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train([*unet_args(run_dir, slice_set), "--task=fit", "--trainer.max_epochs=1"])
    other = write_slice_set(tmp_path / "other", seed=1)
    refused = train(unet_args(run_dir, other), check=False)
    assert refused.returncode != 0
    assert "was trained on other data than" in refused.stderr
