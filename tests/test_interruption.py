"""A run killed in the middle of an epoch and started again ends as one that was left alone, bit for bit."""

import json
import signal
from pathlib import Path

import torch
from fake_slices import stylegan2_args, train, unet_args


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


def killed_once(command: list[str], tmp_path: Path, epoch: int = 1) -> list[str]:
    """The same command, with a callback that kills the process in the middle of an epoch when it is run first."""
    return [
        *command,
        "--trainer.callbacks+=kill_once.KillOnce",
        f"--trainer.callbacks.marker={tmp_path / 'killed-once'}",
        f"--trainer.callbacks.epoch={epoch}",
    ]


def test_killed_and_restarted_stylegan2_equals_uninterrupted(slice_set: Path, tmp_path: Path) -> None:
    train(stylegan2_args(tmp_path / "whole", slice_set))
    command = killed_once(stylegan2_args(tmp_path / "killed", slice_set), tmp_path)
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
