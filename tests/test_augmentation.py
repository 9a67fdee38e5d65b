"""Augmentation against MONAI's deterministic transforms, and its distributions against what the paper's code says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_sets import ready
from fake_slices import unet_args
from fake_study import heads
from monai.transforms.intensity.array import AdjustContrast, GaussianSmooth
from monai.transforms.spatial.array import Affine, RandSimulateLowResolution

from datamodules.augmentation import (
    Draw,
    MonaiAugmentation,
    PaperAugmentation,
    augment,
    blur,
    brain_mask,
    change_gamma,
    lower_resolution,
)
from datamodules.samplers import StreamOrder
from datamodules.slice_dataset import SliceDataset
from datamodules.slice_set import SliceSet
from train import build

SIDE = 48
STILL = Draw(np.eye(2), np.zeros(4), np.zeros(4), np.ones(4), (1.0, 1.0), 0)


def draw(**changes) -> Draw:
    return Draw(**{**STILL.__dict__, **changes})


@pytest.fixture(scope="module")
def one():
    """A slice whose height and width differ."""
    return torch.from_numpy(heads(1, SIDE, seed=0, tumour=1.0))[0, :, :, 4:-4]


def generators(seed, positions):
    return [np.random.default_rng((seed, position)) for position in positions]


def test_nothing_drawn_changes_nothing(one):
    image, masks = augment(one, STILL)
    torch.testing.assert_close(image, one[:4].float(), atol=1e-3, rtol=0)
    assert torch.equal(masks[0], one[4].float())
    assert torch.equal(masks[1:] > 0, brain_mask(one[None, :4])[0])


def test_geometry_is_that_of_monai_for_image_label_and_brain(one):
    angle, scale = 0.4, (1.08, 0.93)
    cos, sin = np.cos(angle), np.sin(angle)
    image, masks = augment(one, draw(matrix=np.array([[cos, -sin], [sin, cos]]) * scale))
    common = {"rotate_params": angle, "scale_params": scale, "padding_mode": "zeros", "image_only": True}
    oracle = Affine(mode="bilinear", **common)(one[:4].float())
    torch.testing.assert_close(image, oracle.as_tensor(), atol=2e-2, rtol=0)
    both = torch.cat([one[4:], brain_mask(one[None, :4])[0]]).float()
    differ = masks != Affine(mode="nearest", **common)(both).as_tensor()
    assert differ.float().mean() < 2e-3  # a tie between two pixels
    assert masks[0].max() == 3


def test_a_flip_exchanges_left_and_right(one):
    image, masks = augment(one, draw(matrix=np.diag([-1.0, 1.0])))
    torch.testing.assert_close(image, one[:4].float().flip(-2), atol=1e-3, rtol=0)
    assert torch.equal(masks[0], one[4].float().flip(-2))


@pytest.mark.parametrize("sigma", [0.5, 0.77, 1.0])
def test_blur_is_that_of_monai(one, sigma):
    plane = one[1].float()
    oracle = GaussianSmooth(sigma)(plane[None])[0]
    torch.testing.assert_close(blur(plane, sigma), torch.as_tensor(oracle), atol=2e-2, rtol=0)


@pytest.mark.parametrize("zoom", [0.75, 0.83, 0.99])
def test_low_resolution_is_that_of_monai(one, zoom):
    plane = one[2].float()
    oracle = RandSimulateLowResolution(1.0, "nearest-exact", "bilinear", (zoom, zoom))(plane[None])[0]
    torch.testing.assert_close(lower_resolution(plane, zoom), torch.as_tensor(oracle), atol=1e-3, rtol=0)


@pytest.mark.parametrize("gamma", [0.85, 1.2])
@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_is_that_of_monai_for_each_modality(one, gamma, inverted):
    exponents = (gamma, 1.0) if inverted else (1.0, gamma)
    image, _ = augment(one, draw(gamma=exponents))
    oracle = AdjustContrast(gamma, invert_image=inverted, retain_stats=True)
    for plane, before in zip(image, one[:4].float(), strict=True):
        torch.testing.assert_close(plane, torch.as_tensor(oracle(before[None])[0]), atol=2e-2, rtol=0)


def test_gamma_keeps_mean_and_deviation(one):
    before = one[:4].float()
    after = change_gamma(before, 1.2)
    assert (after - before).abs().max() > 1
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(after, (1, 2)), statistic(before, (1, 2)), rtol=1e-4, atol=1e-3)


def test_a_modality_of_one_grey_level_survives_gamma():
    assert torch.equal(change_gamma(torch.full((1, 8, 8), 7.0), 1.1), torch.full((1, 8, 8), 7.0))


def test_noise_has_the_deviation_that_was_drawn_and_only_where_it_was():
    black = torch.zeros(5, 256, 256, dtype=torch.uint8)
    image, _ = augment(black, draw(noise=np.array([0.0, 9.0, 9.0, 0.0]), noise_seed=3))
    assert not image[[0, 3]].any()
    assert image[1:3].std(dim=(1, 2)).tolist() == pytest.approx([9.0, 9.0], rel=0.02)
    assert abs(float(torch.corrcoef(image[1:3].flatten(1))[0, 1])) < 0.02
    again, _ = augment(black, draw(noise=np.array([0.0, 9.0, 9.0, 0.0]), noise_seed=3))
    assert torch.equal(image, again)


def test_blur_and_noise_leave_the_label_alone(one):
    _, masks = augment(one, draw(noise=np.full(4, 9.0), blur=np.ones(4), zoom=np.full(4, 0.75), gamma=(1.2, 1.2)))
    assert torch.equal(masks[0], one[4].float())


@pytest.fixture(scope="module")
def draws():
    augmentation = PaperAugmentation()
    return [augmentation.draw(np.random.default_rng((0, number))) for number in range(4000)]


def share(happened, expected):
    """Compare with a probability, to 4 standard deviations."""
    happened = np.asarray(happened)
    assert happened.mean() == pytest.approx(expected, abs=4 * (expected * (1 - expected) / happened.size) ** 0.5)


def test_probabilities_are_those_of_the_paper(draws):
    noise, blurred, zoom = (np.stack([getattr(one, name) for one in draws]) for name in ("noise", "blur", "zoom"))
    share((noise > 0).any(axis=1), 0.5 * 15 / 16)
    share((blurred > 0).any(axis=1), 0.2 * 15 / 16)
    share((zoom < 1).any(axis=1), 0.25 * 15 / 16)
    for chosen in (noise > 0, blurred > 0, zoom < 1):
        share(chosen[chosen.any(axis=1)].mean(axis=1) > 0.5, 5 / 15)  # three or four of the modalities
    share([one.gamma[0] != 1 for one in draws], 0.1)
    share([one.gamma[1] != 1 for one in draws], 0.2)
    share([np.allclose(one.matrix, np.eye(2)) for one in draws], 1 / 16)


def test_ranges_are_those_of_the_paper(draws):
    matrices = np.stack([one.matrix for one in draws])
    scale = np.linalg.norm(matrices, axis=1)
    angle = np.rad2deg(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    noise = np.concatenate([one.noise[one.noise > 0][:1] for one in draws])
    sigma = np.concatenate([one.blur[one.blur > 0] for one in draws])
    zoom = np.concatenate([one.zoom[one.zoom < 1] for one in draws])
    gamma = np.array([value for one in draws for value in one.gamma if value != 1])
    for values, low, high in (
        (angle[angle != 0], -30, 30),
        (scale[scale[:, 0] != 1, 0], 0.9, 1.1),
        (noise, 0, 0.05 * 255),
        (sigma, 0.5, 1),
        (zoom, 0.75, 1),
        (gamma, 0.85, 1.2),
    ):
        assert low <= values.min() < low + 0.03 * (high - low)
        assert high - 0.03 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=4 * (high - low) / (12 * len(values)) ** 0.5)
    assert (np.linalg.det(matrices) > 0).all()  # no flips


def test_flips_come_as_often_as_asked_for():
    augmentation = PaperAugmentation(flip=0.3)
    share([np.linalg.det(augmentation.draw(g).matrix) < 0 for g in generators(1, range(2000))], 0.3)


def test_a_slice_is_augmented_the_same_in_any_batch():
    slices = torch.from_numpy(heads(6, 32, seed=1))
    augmentation = PaperAugmentation()
    images, brains = augmentation(slices, generators(0, range(6)))
    for row in (0, 5):
        alone, brain = augmentation(slices[row : row + 1], generators(0, [row]))
        assert torch.equal(alone[0], images[row])
        assert torch.equal(brain[0], brains[row])
    other, _ = augmentation(slices, generators(1, range(6)))
    assert not torch.equal(other, images)


def test_batches_of_the_loader_carry_the_brain_mask_moved_along(slice_set):
    slices = SliceSet(slice_set, "train")
    order = StreamOrder(len(slices), 0)
    batch = SliceDataset([slices], order, PaperAugmentation(noise=0.2), seed=0).__getitems__(list(range(24)))
    plain = SliceDataset([slices], order).__getitems__(list(range(24)))
    before = brain_mask(plain["slices"][:, :4]).float().mean()
    assert batch["brain"].float().mean() == pytest.approx(float(before), rel=0.1)
    assert batch["brain"].dtype == torch.bool
    assert set(batch["slices"][:, 4].unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert not torch.equal(batch["slices"], plain["slices"].float())
    again = SliceDataset([slices], order, PaperAugmentation(noise=0.2), seed=0).__getitems__([7])
    assert torch.equal(again["slices"][0], batch["slices"][7])


def test_where_there_is_a_gpu_it_gives_what_the_loader_would(slice_set):
    augmentation = PaperAugmentation()
    on_cpu = ready(slice_set, augmentation=augmentation).train_dataloader()
    data = ready(slice_set, augmentation=augmentation)
    strategy = SimpleNamespace(root_device=torch.device("cuda", 0))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy, training=True)
    for ours, expected in zip(data.train_dataloader(), on_cpu, strict=True):
        assert ours["slices"].dtype == torch.uint8
        done = data.on_after_batch_transfer(data.on_before_batch_transfer(ours, 0), 0)
        assert all(torch.equal(done[key], value) for key, value in expected.items())
    data.trainer.training = False
    assert data.on_after_batch_transfer(data.on_before_batch_transfer(ours, 0), 0) is ours


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_gives_the_numbers_of_the_cpu():
    slices = torch.from_numpy(heads(8, 64, seed=2))
    augmentation = PaperAugmentation(noise=0.0)
    expected, brain = augmentation(slices, generators(0, range(8)))
    images, moved = augmentation(slices.cuda(), generators(0, range(8)))
    torch.testing.assert_close(images[:, :4].cpu(), expected[:, :4], atol=0.05, rtol=0)
    assert (images[:, 4].cpu() != expected[:, 4]).float().mean() < 1e-3
    assert (moved.cpu() != brain).float().mean() < 1e-3


def test_transforms_of_monai_follow_from_the_position_and_move_the_label():
    keys = ["image", "label", "brain"]
    flip = {"_target_": "RandFlipd", "keys": keys, "prob": 0.5, "spatial_axis": 0}
    brighten = {"_target_": "RandScaleIntensityd", "keys": ["image"], "factors": 0.2, "prob": 1.0}
    augmentation = MonaiAugmentation([flip, brighten])
    slices = torch.from_numpy(heads(12, 16, seed=3))
    images, brains = augmentation(slices, generators(0, range(12)))
    flipped = [not torch.equal(images[row, 4], slices[row, 4].float()) for row in range(12)]
    assert 0 < sum(flipped) < 12
    for row in np.flatnonzero(flipped):
        assert torch.equal(images[row, 4], slices[row, 4].float().flip(0))
        assert torch.equal(brains[row, 0], brain_mask(slices[row : row + 1, :4])[0, 0].flip(0))
    factor = images[0, :4].sum() / slices[0, :4].sum()
    assert 0.8 <= factor <= 1.2
    alone, _ = augmentation(slices[4:5], generators(0, [4]))
    assert torch.equal(alone[0], images[4])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"_target_": "RandFlippd", "keys": ["image"]}, "RandFlippd"),
        ({"_target_": "RandFlipd", "keyz": ["image"]}, "keyz"),
        ({"_target_": "RandFlip", "prob": 0.5}, r"expected `_target_` to name a dictionary transform"),
        ({"keys": ["image"]}, r"expected `_target_` to name a dictionary transform"),
    ],
)
def test_what_is_no_dictionary_transform_of_monai_is_refused(transform, message):
    with pytest.raises(ValueError, match=message):
        MonaiAugmentation([transform])


def test_augmentations_are_options_of_the_command_line(slice_set, tmp_path):
    config = tmp_path / "monai.yaml"
    config.write_text(
        """
data:
  init_args:
    augmentation:
      class_path: datamodules.augmentation.MonaiAugmentation
      init_args:
        transforms:
          - {_target_: RandFlipd, keys: [image, label, brain], prob: 1.0, spatial_axis: 0}
"""
    )
    args = unet_args(tmp_path / "run", slice_set)
    data = build([*args, f"--config={config}"]).datamodule
    batch = next(iter(data.train_dataloader()))
    rows = data.mixture.order(8, 0)(range(8))
    expected = torch.from_numpy(data.training_sets[0].read(rows)).float().flip(-2)
    assert torch.equal(batch["slices"], expected)
    flip = build([*args, "--data.augmentation.init_args.flip=0.5"]).datamodule.augmentation.flip
    assert flip == 0.5
