"""The autoencoder: classes in and out, normalised latents, noise from the position, checkpoints, training as a user."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fake_slices import train
from test_distributed import assert_same_training, state
from test_interruption import assert_same_run, killed_once
from torch.distributions import Normal

from datamodules.slice_set import SliceSet
from lightning_modules.autoencoder import Autoencoder
from lightning_modules.base import load_frozen
from lightning_modules.counter_random import Stream, random_normal
from lightning_modules.image_generator import images_to_slices, slices_to_images
from lightning_modules.power_ema import exponent
from train import build

TINY = {"widths": [4, 8], "res_blocks": 1, "norm_groups": 2, "latent_channels": 3}


def autoencoder_args(run_dir: Path, slices: Path) -> list[str]:
    """An autoencoder of 16 px that sees 48 images."""
    return [
        "--config=configs/laptop/autoencoder.yaml",
        f"--run_dir={run_dir}",
        f"--data.root={slices}",
        *(f"--model.{name}={value}" for name, value in TINY.items()),
        "--data.batch_size=8",
        "--data.epoch_images=16",
        "--trainer.max_epochs=3",
    ]


@pytest.fixture(scope="module")
def run_dir(slice_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "autoencoder"
    train(autoencoder_args(folder, slice_set))
    return folder


def random_slices(count: int = 6, size_px: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(0, 256, (count, 4, size_px, size_px), generator=generator)
    label = torch.randint(0, 4, (count, 1, size_px, size_px), generator=generator)
    return torch.cat([grey, label], dim=1).to(torch.uint8)


def tiny(**arguments) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(**TINY | arguments)
    model._trainer = SimpleNamespace(world_size=1)
    return model


def batch_of(slices: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"slices": slices, "position": torch.arange(100, 100 + len(slices))}


def noise_of(batch: dict[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
    return random_normal(seed, Stream.AUTOENCODER, batch["position"], (3, 8, 8))


def test_label_enters_as_one_channel_per_class():
    model, slices = tiny(), random_slices()
    seen = []
    model.network.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.encode(slices_to_images(slices))
    modalities, classes = seen[0].split(4, dim=1)
    torch.testing.assert_close((modalities + 1) * 127.5, slices[:, :4].float())
    assert torch.equal(classes.sum(dim=1), torch.ones(6, 16, 16))
    assert torch.equal(classes.argmax(dim=1), slices[:, 4].long())


def test_label_leaves_as_the_most_likely_class_and_modalities_within_range():
    model = tiny()
    restored = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1)) * 3
    model.network.decode = lambda latents: restored
    images = model.decode(torch.zeros(2, 3, 8, 8))
    assert torch.equal(images[:, :4], restored[:, :4].clamp(-1, 1))
    assert torch.equal(images_to_slices(images)[:, 4], restored[:, 4:].argmax(dim=1).to(torch.uint8))


def test_loss_is_difference_cross_entropy_and_divergence():
    model = tiny(label_weight=0.7, kl_weight=0.03, seed=5)
    batch = batch_of(random_slices())
    images = slices_to_images(batch["slices"])
    mean, std = model.posterior(images)
    modalities, logits = model.restore(mean + std * noise_of(batch, seed=5))
    log_probability = logits.log_softmax(dim=1).gather(1, batch["slices"][:, 4:].long())
    divergence = torch.distributions.kl_divergence(Normal(mean, std), Normal(0.0, 1.0))
    expected = (modalities - images[:, :4]).abs().mean() - 0.7 * log_probability.mean() + 0.03 * divergence.mean()
    torch.testing.assert_close(model.training_step(batch, 0), expected)


def test_loss_of_a_batch_is_the_mean_over_its_parts():
    batch = batch_of(random_slices())
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 4), slice(4, 6))]
    whole, first, second = (tiny().training_step(part, 0) for part in (batch, *parts))
    torch.testing.assert_close(whole, (4 * first + 2 * second) / 6)


def test_latents_drawn_in_training_are_normalised_to_mean_0_and_variance_1():
    model, batch = tiny(), batch_of(random_slices())
    for _ in range(3):
        model.training_step(batch, 0)
    latents = model.encode(slices_to_images(batch["slices"]), noise_of(batch))
    assert latents.shape == (6, 3, 8, 8)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.square().mean(dim=(0, 2, 3)), torch.ones(3))


def test_statistics_of_the_latents_weigh_late_batches_by_the_profile():
    model = tiny()
    batches = [batch_of(random_slices()[:count]) for count in (2, 6, 4)]
    moments = []
    for batch in batches:
        mean, std = model.posterior(slices_to_images(batch["slices"]))
        latents = mean + std * noise_of(batch)
        moments.append(torch.stack([latents.mean(dim=(0, 2, 3)), latents.square().mean(dim=(0, 2, 3))]))
        model.training_step(batch, 0)
    edges = (torch.tensor([0, 2, 8, 12], dtype=torch.float64) / 12) ** (exponent(0.05) + 1)
    expected = (edges.diff()[:, None, None] * torch.stack(moments)).sum(dim=0).float()
    torch.testing.assert_close(model.latent_moments, expected)


def test_encoding_is_undone_in_scale_by_decoding():
    model, images = tiny(), slices_to_images(random_slices())
    model.latent_moments.copy_(torch.tensor([[0.5, -2.0, 3.0], [1.0, 5.0, 9.25]]))  # variances 0.75, 1, 0.25
    mean, std = model.posterior(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    expected = (mean + std * noise - torch.tensor([0.5, -2, 3])[:, None, None]) / torch.tensor([0.75, 1, 0.25]).sqrt()[
        :, None, None
    ]
    torch.testing.assert_close(model.encode(images, noise), expected)
    modalities, _ = model.restore(mean)
    torch.testing.assert_close(model.decode(model.encode(images))[:, :4], modalities.clamp(-1, 1))


def test_size_that_cannot_be_halved_is_refused():
    with pytest.raises(
        ValueError, match="sides are multiples of 2, as the autoencoder halves them 1 times, but got 16 x 15"
    ):
        tiny().encode(slices_to_images(random_slices())[..., :15])


def test_run_says_how_well_held_out_slices_are_restored(run_dir, slice_set):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    model = load_frozen(Autoencoder, run_dir / "checkpoints" / "last.ckpt")
    for stage in ("val", "test"):
        held_out = SliceSet(slice_set, stage)
        slices = torch.from_numpy(held_out.read(range(len(held_out))))
        restored = images_to_slices(model.decode(model.encode(slices_to_images(slices)))).numpy()
        for channel, name in enumerate(("T1", "T1ce", "T2", "FLAIR")):
            difference = slices[:, channel].numpy().astype(float) - restored[:, channel]
            expected = 20 * np.log10(255 / np.sqrt((difference**2).mean()))
            assert metrics[f"psnr/{stage}/{name}"] == pytest.approx(expected, abs=1e-3)
    table = pd.read_csv(run_dir / "dice_per_patient.csv")
    assert metrics["dice/test/WT"] == pytest.approx(table.loc[table["entity"] == "WT", "dice"].mean(), abs=1e-6)
    truth = (slices[:, 4] > 0).numpy()
    whole = table[table["entity"] == "WT"]
    assert int((whole["tp"] + whole["fn"]).sum()) == truth.sum()
    assert int(whole["tp"].sum()) == (truth & (restored[:, 4] > 0)).sum()
    assert {path.name.rsplit("-", 1)[0] for path in (run_dir / "pictures").iterdir()} == {
        "reconstruction-val",
        "reconstruction-test",
    }


def test_learning_rate_falls_to_zero_over_the_run():
    model = tiny(learning_rate=0.5)
    optimizer = model.configure_optimizers()
    datamodule = SimpleNamespace(epoch_images=16)
    model._trainer = SimpleNamespace(optimizers=[optimizer], max_epochs=3, datamodule=datamodule, world_size=1)
    rates = []
    for model.images_seen in (0, 12, 36, 48):
        model.on_train_batch_start({}, 0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.375, 0.125, 0.0]


def test_killed_and_restarted_run_equals_an_uninterrupted_one_bit_for_bit(run_dir, slice_set, tmp_path):
    command = killed_once(autoencoder_args(tmp_path / "killed", slice_set), tmp_path)
    assert train(command, check=False).returncode == -signal.SIGKILL
    train(command)
    assert_same_run(run_dir, tmp_path / "killed", ["dice_per_patient.csv"])


def test_two_processes_equal_one(run_dir, slice_set, tmp_path):
    train([*autoencoder_args(tmp_path, slice_set), "--trainer.devices=2"])
    assert_same_training(run_dir, tmp_path, build(autoencoder_args(run_dir, slice_set)).model.state_dict(), share=1e-3)
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, run_dir))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_loaded_autoencoder_is_frozen_and_of_the_same_settings(run_dir):
    model = load_frozen(Autoencoder, run_dir / "checkpoints" / "last.ckpt")
    assert model.images_seen == 48
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.latent_channels, model.downsampling) == (3, 2)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state(run_dir).items())


def test_what_is_no_fitting_autoencoder_is_refused(run_dir, tmp_path):
    path = run_dir / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"nowhere\.ckpt cannot be read as a checkpoint of a run of Autoencoder"):
        load_frozen(Autoencoder, "nowhere.ckpt")
    content = torch.load(path, weights_only=True)
    other = tmp_path / "other.ckpt"
    torch.save({"hyper_parameters": {"_class_path": "a.UNet"}, "state_dict": {}}, other)
    with pytest.raises(ValueError, match=r"to hold the weights of Autoencoder, but it is a checkpoint of a\.UNet"):
        load_frozen(Autoencoder, other)
    content["hyper_parameters"]["latent_channels"] = 2
    torch.save(content, other)
    with pytest.raises(ValueError, match="or its settings are not those of the weights"):
        load_frozen(Autoencoder, other)


def test_slices_of_other_channels_are_refused(run_dir):
    model = load_frozen(Autoencoder, run_dir / "checkpoints" / "last.ckpt")
    model.check_channels(["T1", "T1ce", "T2", "FLAIR", "label"])
    words = "was trained on the channels T1, T1ce, T2, FLAIR, label, but the data has T1ce, T1, T2, FLAIR, label"
    with pytest.raises(ValueError, match=words):
        model.check_channels(["T1ce", "T1", "T2", "FLAIR", "label"])
