"""Memorization while a generator trains, and the losses that an attacker would look at."""

import numpy as np
import pandas as pd
import pytest
import torch
from fake_sets import ready, real_set
from fake_slices import generator_args, train
from fake_study import heads
from lightning.pytorch import Trainer
from torch import nn

from callbacks import MembershipLosses, Memorization
from datamodules.slice_set import SliceSet
from lightning_modules.counter_random import Stream, random_normal
from lightning_modules.denoising import EDMObjective
from lightning_modules.diffusion import Diffusion
from lightning_modules.image_generator import ImageGenerator, slices_to_images
from lightning_modules.sampling import Heun

SPLITS = {f"P{i}": "train" if i < 6 else "val" for i in range(12)}


class Recital(ImageGenerator):
    """A generator that knows some slices by heart, and makes nothing else."""

    def __init__(self, slices: np.ndarray) -> None:
        super().__init__(None, (0.0, 85.0, 170.0, 255.0))
        self.slices = torch.from_numpy(slices)
        self.weight = nn.Linear(1, 1)

    @property
    def sampled_network(self) -> nn.Module:
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)

    def training_step(self, batch, batch_idx):
        self.advance(len(batch["slices"]))
        return self.weight.weight.sum()

    def generate(self, index, seed):
        return slices_to_images(self.slices[index % len(self.slices)], self.label_levels)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return real_set(tmp_path_factory.mktemp("real") / "set", SPLITS)


def trained(real, slices, folder, **options) -> tuple[Trainer, Memorization]:
    memorization = Memorization(slices=24, pictures=2, false_alarm_rate=0.1, **options)
    trainer = Trainer(
        max_epochs=3, callbacks=[memorization], default_root_dir=folder, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(Recital(slices), datamodule=ready(real))
    return trainer, memorization


def test_training_ends_where_more_is_suspicious_than_chance_allows(real, tmp_path):
    training = SliceSet(real, "train")
    copies, strangers = training.read(range(24)), heads(24, 16, 99)
    trainer, _ = trained(real, copies, tmp_path, stop_when_memorizing=True)
    assert trainer.current_epoch == 1
    assert trainer.logged_metrics["memorization/share_suspicious"] == 1.0
    assert trainer.logged_metrics["memorization/share_suspicious_low"] > 0.8
    trainer, memorization = trained(real, strangers, tmp_path, stop_when_memorizing=True)
    assert trainer.current_epoch == 3
    assert trainer.logged_metrics["memorization/share_suspicious"] <= 0.25
    assert memorization.null is not None
    assert sorted(set(memorization.null["patient"])) == ["P10", "P11", "P6", "P7", "P8", "P9"]
    trainer, _ = trained(real, copies, tmp_path)
    assert trainer.current_epoch == 3  # only on request


def test_too_few_held_out_patients_to_stop_by_are_refused(tmp_path):
    real = real_set(tmp_path / "set", {"A": "train", "B": "train", "C": "val", "D": "val"})
    with pytest.raises(ValueError, match=r"stop_when_memorizing needs 3 held-out patients or more, but .* has 2"):
        trained(real, heads(4, 16, 0), tmp_path, stop_when_memorizing=True)


class Half(nn.Module):
    """Says that half of what it sees is noise."""

    condition_width = 0
    img_channels, img_resolution = 5, 16

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, time, condition):
        return self.weight * x


def test_losses_are_means_over_evenly_spaced_times():
    model = Diffusion(Half(), EDMObjective(), Heun(3))
    slices, index = torch.from_numpy(heads(5, 16, 0)), torch.tensor([3, 8, 1, 0, 9])
    found = model.losses_of(slices, index, torch.full((5,), 0.5), draws=4, seed=7)
    images = slices_to_images(slices)
    expected = torch.zeros(5)
    for draw, time in enumerate((0.125, 0.375, 0.625, 0.875)):
        noise = random_normal(7, Stream.MEMBERSHIP, index * 4 + draw, (5, 16, 16))
        expected += model.objective.losses(model.network, images, None, torch.full((5,), time), noise).loss.detach() / 4
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    one = model.losses_of(slices[2:3], index[2:3], torch.tensor([0.5]), draws=4, seed=7)
    torch.testing.assert_close(one, found[2:3], rtol=1e-6, atol=0)  # not a matter of the batch


def test_a_prediction_leaves_the_losses_of_all_patients(slice_set, tmp_path):
    words = ["--trainer.callbacks+=callbacks.MembershipLosses", "--trainer.callbacks.init_args.slices_per_patient=3"]
    train([*generator_args("diffusion", tmp_path, slice_set), *words])
    table, index = pd.read_parquet(tmp_path / "membership_losses.parquet"), SliceSet(slice_set).index
    assert table["patient"].value_counts().to_dict() == {f"P{i}": 3 for i in range(8)}
    assert (index["patient"].to_numpy()[table["position"]] == table["patient"]).all()
    assert np.isfinite(table["loss"]).all()
    assert (table["loss"] > 0).all()


def test_losses_are_those_of_diffusion_models_alone():
    with pytest.raises(ValueError, match="needs a diffusion model, but the model is a Recital"):
        MembershipLosses().setup(Trainer(logger=False), Recital(heads(1, 16, 0)), "predict")
