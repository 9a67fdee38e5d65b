"""The training rule of segmenters against independent oracles."""

import numpy as np
import pytest
import torch
from monai.losses.dice import DiceLoss

from datamodules.augmentation import PaperAugmentation
from datamodules.brats import SliceDataset, brain_mask
from datamodules.samplers import StreamOrder
from datamodules.slice_set import SliceSet
from lightning_modules.segmentation import SegmentationModule, batch_dice_loss, normalize


def test_dice_loss_equals_monai_over_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 8, 8, generator=generator)
    target = torch.randint(0, 3, (6, 1, 8, 8), generator=generator)  # class 3 is absent
    oracle = DiceLoss(softmax=True, to_onehot_y=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)
    torch.testing.assert_close(batch_dice_loss(logits, target, lambda sums: sums), oracle(logits, target))


def test_dice_loss_of_two_halves_is_that_of_the_whole_when_sums_are_shared():
    generator = torch.Generator().manual_seed(1)
    logits, target = (
        torch.randn(4, 4, 8, 8, generator=generator),
        torch.randint(0, 4, (4, 1, 8, 8), generator=generator),
    )
    sums = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        batch_dice_loss(logits[half], target[half], lambda s: sums.append(s) or s)
    whole = batch_dice_loss(logits, target, lambda s: s)
    shared = batch_dice_loss(logits[::2], target[::2], lambda s: sums[0] + sums[1])
    torch.testing.assert_close(shared, whole)


def test_deep_supervision_weighs_the_heads_by_halves():
    module = SegmentationModule(torch.nn.Identity())
    values = {1.0: 4.0, 2.0: 2.0, 3.0: 1.0}
    module.loss = lambda head, target: torch.tensor(values[float(head.mean())])
    heads = torch.stack([torch.full((2, 4, 4, 4), value) for value in values], dim=1)
    loss = module.deep_supervision_loss(heads, torch.zeros(2, 1, 4, 4))
    assert float(loss) == pytest.approx((4 * 4.0 + 2 * 2.0 + 1 * 1.0) / 7)


def test_normalization_is_a_z_score_inside_the_brain_and_zero_outside():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(20, 200, (2, 4, 16, 16)).astype(np.uint8))
    images[:, :, :4] = 3  # background that is nearly black
    out = normalize(images)
    assert (out[:, :, :4] == 0).all()
    inside = images[1, 2, 4:].numpy().astype(float)
    np.testing.assert_allclose(out[1, 2, 4:], (inside - inside.mean()) / inside.std(), rtol=1e-4, atol=1e-5)


def test_augmentation_moves_the_brain_mask_and_leaves_the_background_out(slice_set):
    slices = SliceSet(slice_set, "train")
    dataset = SliceDataset([slices], StreamOrder(len(slices), 0), PaperAugmentation(noise=0.2), seed=0)
    batch = dataset.__getitems__(list(range(24)))
    plain = SliceDataset([slices], StreamOrder(len(slices), 0)).__getitems__(list(range(24)))
    before = brain_mask(plain["slices"][:, :4]).float().mean()
    assert batch["brain"].float().mean() == pytest.approx(float(before), rel=0.1)
    assert set(batch["slices"][:, 4].unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert not torch.equal(batch["slices"], plain["slices"].float())
    normalized = normalize(batch["slices"][:, :4], batch["brain"])
    assert (normalized[~batch["brain"].expand_as(normalized)] == 0).all()


def test_augmentation_follows_from_the_position_alone(slice_set):
    slices = SliceSet(slice_set, "train")
    dataset = SliceDataset([slices], StreamOrder(len(slices), 0), PaperAugmentation(), seed=3)
    whole = dataset.__getitems__([4, 5, 6])
    part = dataset.__getitems__([6])
    assert torch.equal(whole["slices"][2], part["slices"][0])
