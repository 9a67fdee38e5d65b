"""A run killed in the middle of an epoch and started again ends as one that was left alone, bit for bit."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_slices import stylegan2_args, train, unet_args

Arguments = Callable[[Path, Path], list[str]]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_run(one: Path, other: Path, same_bytes: list[str]) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []
    assert json.loads((one / "metrics.json").read_text()) == json.loads((other / "metrics.json").read_text())
    for name in same_bytes:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    ("arguments", "same_bytes"),
    [
        (stylegan2_args, ["synthetic/slices-00000.npy", "synthetic/index.parquet", "memorization.csv"]),
        (unet_args, ["dice_per_patient.csv"]),
    ],
    ids=["stylegan2", "unet"],
)
def test_killed_and_restarted_equals_uninterrupted(
    arguments: Arguments, same_bytes: list[str], slice_set: Path, tmp_path: Path
) -> None:
    train(arguments(tmp_path / "whole", slice_set))
    command = [
        *arguments(tmp_path / "killed", slice_set),
        "--trainer.callbacks+=kill_once.KillOnce",
        f"--trainer.callbacks.marker={tmp_path / 'killed-once'}",
    ]
    assert train(command, check=False).returncode == -signal.SIGKILL
    train(command)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", same_bytes)


def test_killed_emission_goes_on_where_it_stopped(slice_set: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train([*stylegan2_args(run_dir, slice_set), "--task=fit"])
    command = [
        *stylegan2_args(run_dir, slice_set),
        "--task=predict",
        "--trainer.callbacks+=kill_once.KillEmissionOnce",
        f"--trainer.callbacks.marker={tmp_path / 'killed-once'}",
    ]
    assert train(command, check=False).returncode == -signal.SIGKILL
    first = run_dir / "synthetic.partial" / "part-000000000.npy"
    written = first.stat().st_mtime_ns
    assert not (run_dir / "synthetic").exists()
    killed = first.read_bytes()
    train([*command, f"--run_dir={run_dir}"])
    assert not (run_dir / "synthetic.partial").exists()
    assert json.loads((run_dir / "synthetic" / "dataset.json").read_text())["slices"] == 100
    assert written
    assert killed[-1000:] in (run_dir / "synthetic" / "slices-00000.npy").read_bytes()


def test_torn_checkpoint_is_passed_over_for_the_one_before_it(slice_set: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train([*unet_args(run_dir, slice_set), "--task=fit", "--trainer.max_epochs=2"])
    last = run_dir / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-5000])
    again = train([*unet_args(run_dir, slice_set), "--task=fit"])
    assert "last.ckpt cannot be read" in again.stderr
    assert torch.load(last, weights_only=True)["images_seen"] == 48
    whole = tmp_path / "whole"
    train([*unet_args(whole, slice_set), "--task=fit"])
    assert_same_run(whole, run_dir, [])
