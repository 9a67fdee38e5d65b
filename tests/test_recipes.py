"""What training sees: parts, amounts, shares, repeats, oversampling and the choice of the model."""

import json
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_sets import ready, synthetic_set
from fake_slices import unet_args
from lightning.pytorch import LightningModule, Trainer

from callbacks.run_record import RunRecord
from datamodules.brats import BraTSDataModule
from datamodules.recipe import Oversampling, TrainingPart, holds
from datamodules.slice_set import SliceSet
from train import build


@pytest.fixture
def synthetic(tmp_path):
    return synthetic_set(tmp_path / "synthetic", 20)


def rows_of(data: BraTSDataModule, images: int) -> np.ndarray:
    return data.train_dataloader().dataset.order(range(images))


def test_real_and_synthetic_slices_are_taken_by_number_or_share(slice_set, synthetic):
    parts = [TrainingPart(str(slice_set), 0.5), TrainingPart(str(synthetic), 4)]
    data = ready(slice_set, train=parts)
    real = round(0.5 * len(SliceSet(slice_set, "train")))
    assert [len(part) for part in data.training_sets] == [real, 4]
    images = data.train_dataloader().dataset.slices.read([0, real])
    assert (images[1, :4] == 3).all()
    assert images[0, :4].max() > 3
    assert data.patients_seen == ["P0", "P1", "P2", "P3", "P4"]


def test_synthetic_alone_shows_no_real_slice(slice_set, synthetic):
    data = ready(slice_set, train=[TrainingPart(str(synthetic))])
    assert all((batch["slices"][:, :4] == 3).all() for batch in data.train_dataloader())


@pytest.mark.parametrize("amount", [0, 10_000, 1.5, -1])
def test_impossible_amount_is_refused(slice_set, amount):
    with pytest.raises(ValueError, match="expected amount to choose 1 to"):
        ready(slice_set, train=[TrainingPart(str(slice_set), amount)])


def test_more_patients_include_those_that_fewer_are(slice_set):
    chosen = [ready(slice_set, train=[TrainingPart(str(slice_set), patients=n)]).patients_seen for n in range(1, 6)]
    assert [len(patients) for patients in chosen] == [1, 2, 3, 4, 5]
    assert all(set(fewer) < set(more) for fewer, more in pairwise(chosen))
    parts = [TrainingPart(str(slice_set), patients=2)]
    others = {tuple(ready(slice_set, train=parts, seed=seed).patients_seen) for seed in range(9)}
    assert len(others) > 3


def test_patients_that_are_not_there_are_refused(slice_set, synthetic):
    with pytest.raises(ValueError, match="has 5 training patients, but patients asks for 6"):
        ready(slice_set, train=[TrainingPart(str(slice_set), patients=6)])
    with pytest.raises(ValueError, match="has synthetic slices, but patients asks for 3"):
        ready(slice_set, train=[TrainingPart(str(synthetic), patients=3)])


def test_repeats_show_a_small_set_more_often(slice_set, synthetic):
    parts = [TrainingPart(str(slice_set), 5, repeat=4), TrainingPart(str(synthetic))]
    data = ready(slice_set, train=parts)
    seen = Counter(rows_of(data, 3 * 40).tolist())  # three passes over 4 x 5 + 20
    assert seen == {**dict.fromkeys(range(5), 12), **dict.fromkeys(range(5, 25), 3)}
    assert data.mixture.shares_of_parts() == [0.5, 0.5]


def test_a_share_of_every_batch_is_a_set_of_its_own(slice_set, synthetic, tmp_path):
    other = synthetic_set(tmp_path / "other", 6)
    parts = [
        TrainingPart(str(slice_set)),
        TrainingPart(str(synthetic), share=0.5),
        TrainingPart(str(other), share=0.25),
    ]
    data = ready(slice_set, train=parts)
    real = len(data.training_sets[0])
    part = np.digitize(rows_of(data, 400), [real, real + 20]).reshape(100, 4)
    assert [(part == which).sum(axis=1).tolist() for which in range(3)] == [[1] * 100, [2] * 100, [1] * 100]
    assert data.mixture.shares_of_parts() == pytest.approx([0.25, 0.5, 0.25])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"share": 0.5}, {"share": 0.4}], r"shares of train, 0.5, 0.4, must add up to 1"),
        ([{"share": 1.0}, {}], r"the shares of train, 1.0, must leave something for the parts without one"),
        ([{"share": 0.0}, {}], r"share of 0 must be above 0"),
        ([{"share": 0.5, "repeat": 2}, {}], r"0 has a share \(0.5\), which repeat \(2\) cannot change"),
        ([{"repeat": 0}, {}], r"repeat of 0 must be at least 1, but is 0"),
    ],
)
def test_impossible_shares_and_repeats_are_refused_before_a_set_is_opened(parts, message):
    with pytest.raises(ValueError, match=message):
        BraTSDataModule("nowhere", [TrainingPart(str(number), **part) for number, part in enumerate(parts)])


def test_a_set_that_is_named_twice_is_refused(slice_set):
    with pytest.raises(ValueError, match=r"train names .* twice"):
        BraTSDataModule("nowhere", [TrainingPart("a/b"), TrainingPart("a/../a/b")])


@pytest.mark.parametrize(
    ("what", "columns"), [("tumour", slice(4, 5)), ("enhancing", slice(4, 5)), ("core", slice(4, 5))]
)
def test_slices_that_hold_something_are_found(slice_set, what, columns):
    slices = SliceSet(slice_set)
    label = slices.read(range(len(slices)))[:, 4]
    value = {"tumour": label > 0, "enhancing": label == 3, "core": label == 1}[what]
    assert holds(slices, what).tolist() == value.any(axis=(1, 2)).tolist()


def test_oversampling_gives_every_batch_its_share(slice_set, synthetic):
    data = ready(slice_set, train=[TrainingPart(str(synthetic))], oversampling=Oversampling("enhancing", 0.5))
    held = holds(data.training_sets[0], "enhancing")
    assert held.sum() == 4
    seen = rows_of(data, 400)
    per_batch = held[seen].reshape(100, 4).sum(axis=1)
    assert per_batch.min() == 2  # two for certain; the other two are any slices, 4 of 20 of them with enhancing tumour
    assert per_batch.mean() == pytest.approx(2 + 2 * 4 / 20)
    assert set(seen.tolist()) == set(range(20))


def test_oversampling_keeps_the_shares_of_the_parts(slice_set, synthetic):
    parts = [TrainingPart(str(slice_set)), TrainingPart(str(synthetic), share=0.75)]
    data = ready(slice_set, train=parts, oversampling=Oversampling(share=0.4))
    seen = rows_of(data, 4000)
    assert (seen >= len(data.training_sets[0])).mean() == pytest.approx(0.75, abs=1e-3)
    assert data.mixture.shares_of_parts() == pytest.approx([0.25, 0.75])


def test_oversampling_of_what_no_slice_holds_is_refused(slice_set, synthetic):
    with pytest.raises(ValueError, match=r"synthetic has no slice with core"):
        ready(slice_set, train=[TrainingPart(str(synthetic))], oversampling=Oversampling("core"))
    with pytest.raises(ValueError, match=r"oversampling.share must be between 0 and 1, but is 1.5"):
        BraTSDataModule("nowhere", oversampling=Oversampling(share=1.5))


def test_loader_workers_and_ranks_do_not_change_a_mixture(slice_set, synthetic):
    parts = [TrainingPart(str(slice_set)), TrainingPart(str(synthetic), share=0.5)]

    def positions_and_slices(**options):
        loader = ready(slice_set, train=parts, oversampling=Oversampling(), **options).train_dataloader()
        loader.sampler.set_epoch(3)
        batches = list(loader)
        return torch.cat([b["position"] for b in batches]), torch.cat([b["slices"] for b in batches])

    position, slices = positions_and_slices()
    assert position.tolist() == list(range(24, 32))
    assert torch.equal(positions_and_slices(num_workers=2)[1], slices)
    halves = []
    for rank in (0, 1):
        data = ready(slice_set, train=parts, oversampling=Oversampling())
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
        loader = data.train_dataloader()
        loader.sampler.set_epoch(3)
        halves.append(torch.cat([batch["slices"] for batch in loader]))
    assert torch.equal(torch.stack(halves, dim=1).flatten(0, 1), slices)


def test_without_a_recipe_the_order_is_that_of_the_seed(slice_set):
    data = ready(slice_set, seed=5)
    n = len(data.training_sets[0])
    assert rows_of(data, n).tolist() == np.random.default_rng((5, 0)).permutation(n).tolist()


def test_synthetic_validation_keeps_slices_from_training(slice_set, synthetic, tmp_path):
    other = synthetic_set(tmp_path / "other", 10)
    parts = [TrainingPart(str(slice_set)), TrainingPart(str(synthetic), 10), TrainingPart(str(other))]
    data = ready(slice_set, train=parts, validation="synthetic", val_fraction=0.2)
    assert [len(part) for part in data.training_sets[1:]] == [8, 8]
    kept = data.validation_slices
    assert len(kept) == 4
    trained = {patient for part in data.training_sets for patient in part.patients}
    assert not trained & set(kept.patients)
    assert all(name.startswith(("synthetic-", "other-")) for name in kept.patients)
    batches = list(data.val_dataloader())
    assert sum(len(batch["slices"]) for batch in batches) == 4
    shown = torch.cat([batch["patient"] for batch in batches]).tolist()
    assert sorted(kept.patients[number] for number in shown) == kept.patients
    assert data.train_patients == ["P0", "P1", "P2", "P3", "P4"]  # none of them is taken for validation


def test_synthetic_validation_needs_synthetic_slices(slice_set, synthetic):
    with pytest.raises(ValueError, match="validation is synthetic, but train names no synthetic set"):
        ready(slice_set, validation="synthetic", val_fraction=0.2)
    with pytest.raises(ValueError, match=r"val_fraction 0.0 of the 20 slices of .* is 0"):
        ready(slice_set, train=[TrainingPart(str(synthetic))], validation="synthetic")


def test_a_checkpoint_of_another_recipe_is_refused(slice_set, synthetic):
    def state(amount, **options):
        return ready(slice_set, train=[TrainingPart(str(synthetic), amount)], **options)

    saved = state(10).state_dict()
    json.dumps(saved)
    state(10).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"different: drawn\)"):
        state(11).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"different: drawn, seed\)"):
        state(10, seed=1).load_state_dict(saved)
    before = {key: saved[key] for key in ("real", "training_sets", "training_patients", "test_patients")}
    state(10).load_state_dict(before)  # of a version that did not record the recipe


class Pixelwise(LightningModule):
    """As little of a segmenter as a Trainer takes."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Conv2d(4, 4, 1)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(
            self.network(batch["slices"][:, :4].float()), batch["slices"][:, 4].long()
        )

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch["slices"][:, 4]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def quiet_trainer(folder, **options):
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **silent, **options)


def test_the_run_record_says_what_was_drawn_and_how_the_model_was_chosen(slice_set, synthetic, tmp_path):
    parts = [TrainingPart(str(slice_set), patients=2, repeat=3), TrainingPart(str(synthetic), share=0.75)]
    data = ready(slice_set, train=parts, validation="synthetic", val_fraction=0.25)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[RunRecord()]).fit(Pixelwise(), datamodule=data)
    record = json.loads((tmp_path / "run.json").read_text())
    real, made = record["training_sets"]
    assert (real["patients"], real["drawn"]["repeat"], real["share_of_images"]) == (2, 3, 0.25)
    assert (made["slices"], made["drawn"]["share"], made["share_of_images"]) == (15, 0.75, 0.75)
    assert record["model_selection"] == {"validation": "synthetic", "slices": 5}
    assert record["patients_seen"] == sorted({*data.training_sets[0].patients, "P0", "P1"})
    assert record["leak_guard"]["closest_images"]["test"] > record["leak_guard"]["same_patient_up_to"]


def test_a_segmenter_predicts_every_test_slice_once(slice_set, tmp_path):
    data = ready(slice_set, eval_batch_size=3)
    predicted = quiet_trainer(tmp_path).predict(Pixelwise(), datamodule=data)
    expected = data.real_test.read(range(len(data.real_test)))[:, 4]
    assert torch.equal(torch.cat(predicted), torch.from_numpy(expected))


def test_recipes_are_options_of_the_command_line(slice_set, synthetic, tmp_path):
    parts = f"[{{path: {slice_set}, patients: 3, repeat: 2}}, {{path: {synthetic}, amount: 0.5, share: 0.25}}]"
    words = [f"--data.train={parts}", "--data.oversampling={what: oedema, share: 0.1}"]
    data = build([*unet_args(tmp_path / "run", slice_set), *words]).datamodule
    assert [len(part.patients) for part in data.training_sets] == [3, 10]
    assert data.mixture.shares_of_parts() == pytest.approx([0.75, 0.25])
    assert data.oversampling == Oversampling("oedema", 0.1)
