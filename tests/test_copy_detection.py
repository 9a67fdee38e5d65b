"""The copy detector: views, the terms of the loss against loops, embeddings, runs as a user starts them."""

import json
import math
import signal
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fake_slices import AUTOENCODER, train
from test_distributed import assert_same_training, state
from test_interruption import assert_same_run, killed_once
from torch.nn.functional import cross_entropy, normalize

from datamodules.slice_set import SliceSet
from lightning_modules.base import load_frozen
from lightning_modules.copy_detection import (
    CopyDetector,
    blend_with_next,
    copy_affinity,
    differential_entropy,
    info_nce,
    negative_weights,
)
from lightning_modules.copy_views import change, copy_views, draw
from lightning_modules.networks.embedding import EmbeddingNetwork, generalized_mean
from train import build

TINY = {"widths": [8, 16], "blocks": 1, "embedding_width": 12, "norm_groups": 2}


def detector_args(run_dir: Path, slices: Path) -> list[str]:
    """A detector of 16 px that sees 48 images."""
    return [
        "--config=configs/laptop/copy_detector.yaml",
        f"--run_dir={run_dir}",
        f"--data.root={slices}",
        *(f"--model.{name}={value}" for name, value in TINY.items()),
        "--data.batch_size=8",
        "--data.epoch_images=16",
        "--trainer.max_epochs=3",
        "--trainer.callbacks.planted=10",
    ]


@pytest.fixture(scope="module")
def run_dir(slice_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "detector"
    train(detector_args(folder, slice_set))
    return folder


def random_slices(count: int = 6, size_px: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(1, 256, (count, 4, size_px, size_px), generator=generator)
    label = torch.randint(0, 4, (count, 1, size_px, size_px), generator=generator)
    return torch.cat([grey, label], dim=1).to(torch.uint8)


def random_embeddings(count: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def unchanged(count: int) -> dict[str, torch.Tensor]:
    """Parameters of a view that is the slice itself."""
    nothing = {"xflip": (1,), "xfrac": (2,), "rotate": (2,), "scale": (1,), "bias": (4, 2), "blur": (1,), "noise": (1,)}
    parameters = {name: torch.zeros(count, *shape) for name, shape in nothing.items()}
    return parameters | {"gain": torch.ones(count, 4), "gamma": torch.ones(count, 4), "keep": torch.ones(count, 5)}


def view(slices: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(len(slices), 4, *slices.shape[2:], generator=torch.Generator().manual_seed(1))
    return change(slices, unchanged(len(slices)) | parameters, noise)


def near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.float(), expected.float(), rtol=1e-4, atol=1e-2)


def test_view_depends_on_seed_and_index_alone():
    slices = random_slices()
    index = torch.tensor([3, 9, 1 << 40, 4, 5, 9])
    views = copy_views(slices, 7, index)
    for i in range(6):
        assert torch.equal(copy_views(slices[i : i + 1], 7, index[i : i + 1])[0], views[i])
    assert not torch.equal(copy_views(slices[:1], 8, index[:1]), views[:1])
    assert not torch.equal(copy_views(slices[:1], 7, index[1:2]), views[:1])


def test_views_are_drawn_within_their_ranges():
    drawn = draw(0, torch.arange(4000))
    for name, low, high in (("xfrac", -0.1, 0.1), ("gain", 2**-0.5, 2**0.5), ("noise", 0.0, 25.0), ("blur", 0.0, 1.0)):
        assert low <= drawn[name].min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < drawn[name].max() <= high
    assert drawn["rotate"][:, 0].abs().max().item() == pytest.approx(math.radians(10), rel=0.01)
    assert drawn["scale"].exp2().max().item() == pytest.approx(1.1, rel=0.01)
    assert drawn["xflip"].mean().item() == pytest.approx(0.5, abs=0.03)
    assert (drawn["noise"] == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    missing = 1 - drawn["keep"]
    assert missing[:, 4].mean().item() == pytest.approx(0.3, abs=0.03)
    assert missing[:, :4].mean(dim=0).tolist() == pytest.approx([0.3 / 4] * 4, abs=0.02)
    assert missing[:, :4].sum(dim=1).max() == 1


def test_geometry_moves_modalities_and_label_together():
    slices = random_slices()
    near(view(slices), slices)
    near(view(slices, xflip=torch.ones(6, 1)), slices.flip(-2))
    shifted = view(slices, xfrac=torch.tensor([[2 / 16, -3 / 16]]).repeat(6, 1))  # 2 columns and -3 rows
    near(shifted[:, :, :-3, 2:], slices[:, :, 3:, :-2])
    assert (shifted[:, :, -3:] == 0).all()
    turned = view(slices, rotate=torch.tensor([[math.pi, 0.0]]).repeat(6, 1))
    near(turned, slices.flip(-1, -2))
    parameters = {name: value for name, value in draw(0, torch.arange(6)).items() if name != "keep"}
    assert set(view(slices, **parameters)[:, 4].unique().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_intensity_changes_modalities_alone():
    slices = random_slices()
    grey, label = slices[:, :4].double(), slices[:, 4:]
    gain, gamma = torch.tensor([[0.5, 1.0, 2.0, 1.0]]).repeat(6, 1), torch.tensor([[1.0, 2.0, 0.5, 1.0]]).repeat(6, 1)
    expected = (255 * gain[..., None, None] * (grey / 255) ** gamma[..., None, None]).clamp(max=255)
    near(view(slices, gain=gain, gamma=gamma), torch.cat([expected, label], dim=1))
    bias = torch.zeros(6, 4, 2)
    bias[:, 1] = torch.tensor([0.3, -0.2])
    brighter = view(slices // 2, bias=bias)[:, 1] / (grey[:, 1] // 2)
    near(brighter[:, 0, 0], torch.full((6,), 2**-0.1))
    near(brighter[:, 15, 0], torch.full((6,), 2**0.5))
    noisy = view(slices, noise=torch.full((6, 1), 3.0)) - slices.float()
    inside = (grey > 20) & (grey < 235)
    assert noisy[:, :4][inside].std().item() == pytest.approx(3.0, rel=0.03)
    assert (noisy[:, 4] == 0).all()


def test_noise_stays_in_the_brain_and_blur_keeps_what_is_uniform():
    slices = random_slices()
    slices[:, :, :4] = 0
    assert view(slices, noise=torch.full((6, 1), 30.0))[:, :, :4].abs().max() < 1e-2
    slices[:, :4] = 77
    near(view(slices, blur=torch.ones(6, 1)), slices)
    blocks = random_slices(size_px=4)[:, :4].repeat_interleave(4, -1).repeat_interleave(4, -2)
    coarse = torch.nn.functional.interpolate(random_slices(size_px=4)[:, :4].float(), size=16, mode="bilinear")
    slices[:, :4] = blocks
    near(view(slices, blur=torch.full((6, 1), 0.25))[:, :4], 0.75 * blocks + 0.25 * coarse)


def test_what_is_missing_is_zero():
    keep = torch.ones(6, 5)
    keep[0, 2] = keep[1, 4] = 0
    slices = random_slices()
    near(view(slices, keep=keep), slices * keep[..., None, None])


def test_blend_with_the_next_slice():
    slices, weight = random_slices(3).float(), torch.tensor([1.0, 0.5, 0.75])
    blended = blend_with_next(slices, weight)
    near(blended[0], slices[0])
    near(blended[1, :4], 0.5 * (slices[1, :4] + slices[2, :4]))
    near(blended[2, :4], 0.75 * slices[2, :4] + 0.25 * slices[0, :4])
    assert torch.equal(blended[:, 4], slices[:, 4])


def test_affinity_says_how_much_of_a_slice_is_in_a_view():
    expected = torch.tensor(
        [
            [0, 0, 0, 0.8, 0, 0.5],
            [0, 0, 0, 0.2, 1, 0],
            [0, 0, 0, 0, 0, 0.5],
            [0.8, 0.2, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0.5, 0, 0.5, 0, 0, 0],
        ]
    )
    torch.testing.assert_close(copy_affinity(torch.tensor([0.8, 1.0, 0.5])), expected)


def test_slices_of_a_patient_count_the_less_the_nearer_they_are():
    weights = negative_weights(torch.tensor([0, 0, 0, 1]), torch.tensor([0.5, 0.5, 0.6, 0.5]), 0.05)
    far = 1 - math.exp(-2)
    expected = torch.tensor([[0, 0, far, 1], [0, 0, far, 1], [far, far, 0, 1], [1, 1, 1, 0]])
    torch.testing.assert_close(weights, expected)


def test_info_nce_equals_its_definition():
    z, weight = random_embeddings(8), torch.tensor([0.6, 1.0, 0.9, 0.5], dtype=torch.float64)
    affinity = copy_affinity(weight)
    height = torch.rand(4, generator=torch.Generator().manual_seed(3)).repeat(2)
    negatives = negative_weights(torch.tensor([0, 1, 0, 0] * 2), height, 0.3)
    losses = []
    for i in range(8):
        terms = [
            0.0
            if k == i
            else (1.0 if affinity[i, k] > 0 else float(negatives[i, k])) * math.exp(float(z[i] @ z[k]) / 0.2)
            for k in range(8)
        ]
        logs = [float(affinity[i, j]) * math.log(terms[j] / sum(terms)) for j in range(8) if affinity[i, j] > 0]
        losses.append(-sum(logs) / float(affinity[i].sum()))
    assert info_nce(z, affinity, negatives, 0.2).item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_info_nce_without_blends_is_that_of_simclr():
    z = random_embeddings(10).requires_grad_()
    loss = info_nce(z, copy_affinity(torch.ones(5, dtype=torch.float64)), torch.ones(10, 10, dtype=torch.float64), 0.1)
    others = (z @ z.T / 0.1).masked_fill(torch.eye(10, dtype=torch.bool), -torch.inf)
    expected = cross_entropy(others, torch.arange(10).roll(5))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, z, retain_graph=True)[0] for value in (loss, expected)))


def test_entropy_is_the_mean_log_distance_of_the_nearest_stranger():
    z, patient = random_embeddings(7), [0, 0, 1, 1, 2, 2, 2]
    strangers = torch.tensor([[a != b for b in patient] for a in patient])
    distance = [[(z[i] - z[j]).norm().item() if strangers[i, j] else math.inf for j in range(7)] for i in range(7)]
    expected = np.log(np.min(distance, axis=1)).mean()
    assert differential_entropy(z, strangers).item() == pytest.approx(expected, rel=1e-9)
    nobody = torch.zeros(7, 7, dtype=torch.bool)
    assert differential_entropy(z, nobody).item() == pytest.approx(math.log(2))


def test_loss_has_gradients_where_embeddings_are_equal():
    z = random_embeddings(1).repeat(4, 1).requires_grad_()
    strangers = ~torch.eye(4, dtype=torch.bool)
    strangers[0] = False
    loss = info_nce(z, copy_affinity(torch.tensor([1.0, 0.7])), torch.ones(4, 4), 0.05)
    (loss - differential_entropy(z, strangers)).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_pooling_is_the_generalized_mean_of_each_quarter():
    x = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)) - 0.1
    pooled = generalized_mean(x)
    for i, j in product(range(2), range(2)):
        part = x[:, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].clamp(min=1e-6)
        torch.testing.assert_close(pooled[:, :, i, j], (part**3).mean(dim=(2, 3)) ** (1 / 3))


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (64, 64)])
def test_embeddings_of_any_size_have_length_1_and_do_not_depend_on_the_batch(size):
    torch.manual_seed(0)
    network = EmbeddingNetwork(7, [4, 8, 8, 8, 8], blocks=2, embedding_width=12, norm_groups=2)
    images = torch.randn(5, 7, *size, generator=torch.Generator().manual_seed(1))
    embeddings = network(images)
    assert embeddings.shape == (5, 12)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(network(images[3:4]), embeddings[3:4])
    assert (embeddings @ embeddings.T).fill_diagonal_(0).max() < 0.9999


def test_brightness_and_contrast_do_not_matter_and_the_label_does_only_if_it_is_embedded():
    slices = random_slices().float()
    other = slices.clone()
    other[:, :4] = other[:, :4] * torch.tensor([0.5, 2.0, 1.0, 1.5])[:, None, None] + 10
    unlabelled = slices.clone()
    unlabelled[:, 4] = 0
    for with_label in (True, False):
        torch.manual_seed(0)
        detector = CopyDetector(**TINY, with_label=with_label)
        embeddings = detector.embed(slices)
        torch.testing.assert_close(detector.embed(other), embeddings, rtol=0, atol=1e-4)
        assert torch.equal(detector.embed(unlabelled), embeddings) is not with_label
        assert np.array_equal(detector.embed_array(random_slices().numpy()), embeddings.detach().numpy())


def test_training_tells_copies_from_other_slices(slice_set):
    training = SliceSet(slice_set, "train")
    rows = torch.arange(0, len(training), 4)
    batch = {
        "slices": torch.from_numpy(training.read(rows.numpy())),
        "position": rows,
        "patient": torch.from_numpy(training.index["patient"].astype("category").cat.codes.to_numpy(np.int64))[rows],
        "height": torch.linspace(0, 1, len(rows)),
    }
    torch.manual_seed(0)
    detector = CopyDetector(**TINY)
    detector._trainer = SimpleNamespace(world_size=1, global_rank=0)
    logged: list[float] = []
    detector.log_mean = lambda name, value: logged.append(value.item())
    optimizer = torch.optim.Adam(detector.parameters(), 5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        detector.training_step(batch, 0).backward()
        optimizer.step()
    contrast = logged[::2]
    affinity = copy_affinity(detector._blend_weights(3 * rows))
    floor = torch.distributions.Categorical(affinity).entropy().mean().item()  # of the soft targets
    assert contrast[0] > 4
    assert floor < contrast[-1] < floor + 0.3


def test_run_leaves_the_sensitivity_of_the_detector(run_dir, slice_set):
    table = pd.read_csv(run_dir / "sensitivity.csv")
    assert table.groupby("false_alarm_rate").size().to_dict() == {0.01: 13, 0.05: 13}
    assert (table["slices"] == 10).all()
    assert (table["null_patients"] == 3).all()  # of validation and test
    assert (table["null_slices"] == len(SliceSet(slice_set, "val")) + len(SliceSet(slice_set, "test"))).all()
    metrics = json.loads((run_dir / "metrics.json").read_text())
    first = table[table["false_alarm_rate"] == 0.01].set_index("kind")["rate"]
    assert {name: metrics[f"sensitivity/{name}"] for name in first.index} == pytest.approx(first.to_dict())
    exact = table[(table["kind"] == "exact") & (table["false_alarm_rate"] == 0.05)]
    assert exact["rate"].item() == 1.0


def test_killed_and_restarted_run_equals_an_uninterrupted_one_bit_for_bit(run_dir, slice_set, tmp_path):
    args = detector_args(tmp_path / "killed", slice_set)
    killing = killed_once([word for word in args if not word.startswith("--trainer.callbacks")], tmp_path)
    assert train(killing, check=False).returncode == -signal.SIGKILL
    train(args)
    assert_same_run(run_dir, tmp_path / "killed", ["sensitivity.csv"])


def test_two_processes_equal_one(run_dir, slice_set, tmp_path):
    args = detector_args(tmp_path, slice_set)
    train([*args, "--trainer.devices=2"])
    assert_same_training(run_dir, tmp_path, build(args).model.state_dict(), share=5e-3)
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, run_dir))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_loaded_detector_is_frozen_and_of_the_same_settings(run_dir):
    detector = load_frozen(CopyDetector, run_dir / "checkpoints" / "last.ckpt")
    assert detector.images_seen == 48
    assert not detector.training
    assert not any(parameter.requires_grad for parameter in detector.parameters())
    assert all(torch.equal(value, detector.state_dict()[name]) for name, value in state(run_dir).items())


def test_what_is_no_copy_detector_is_refused(run_dir, slice_set, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.ckpt cannot be read as a checkpoint of a run of CopyDetector"):
        load_frozen(CopyDetector, "nowhere.ckpt")
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"] = {"_class_path": "a.UNet"}
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"to hold the weights of CopyDetector, but it is a checkpoint of a\.UNet"):
        load_frozen(CopyDetector, tmp_path / "other.ckpt")
    other = [
        "--config=configs/laptop/autoencoder.yaml",
        f"--data.root={slice_set}",
        f"--run_dir={tmp_path}",
        *AUTOENCODER,
    ]
    done = train([*other, "--trainer.callbacks+=callbacks.sensitivity.Sensitivity"], check=False)
    assert "Sensitivity measures copy detectors, but the model is a Autoencoder" in done.stderr
