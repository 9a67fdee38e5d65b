"""Targets and terms of the loss of segmenters against MONAI, PyTorch and rules written out."""

import itertools

import pytest
import torch
from monai.losses.dice import DiceCELoss, DiceLoss
from monai.losses.focal_loss import FocalLoss
from monai.losses.tversky import TverskyLoss

from lightning_modules.segmentation_losses import CrossEntropy, Dice, Focal, Tversky
from lightning_modules.segmentation_targets import Classes, Regions

CLASSES, REGIONS = Classes(), Regions()
TERMS = [
    Dice(),
    Dice(include_background=False, squared=True),
    Tversky(),
    CrossEntropy(),
    Focal(),
]


def fake(channels: int = 4, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, channels, 8, 8, generator=generator, dtype=dtype, requires_grad=True)
    label = torch.randint(0, 4, (6, 1, 8, 8), generator=generator)
    label[:3][label[:3] == 3] = 0  # a class that half of the slices lack
    return logits, label


def alone(sums: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return sums


def assert_same(ours, theirs, logits):
    """Values and gradients agree."""
    torch.testing.assert_close(ours, theirs)
    (our_gradient,), (their_gradient,) = (torch.autograd.grad(loss, logits) for loss in (ours, theirs))
    torch.testing.assert_close(our_gradient, their_gradient)


def test_dice_plus_cross_entropy_equals_monai():
    logits, label = fake()
    oracle = DiceCELoss(softmax=True, to_onehot_y=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)
    ours = sum(term(logits, label, CLASSES, alone) for term in (Dice(), CrossEntropy()))
    assert_same(ours, oracle(logits, label), logits)


def test_dice_of_the_foreground_with_squares_equals_monai():
    logits, label = fake()
    oracle = DiceLoss(
        include_background=False, softmax=True, to_onehot_y=True, squared_pred=True, batch=True, smooth_nr=1e-5,
        smooth_dr=1e-5,
    )  # fmt: skip
    ours = Dice(include_background=False, squared=True)(logits, label, CLASSES, alone)
    assert_same(ours, oracle(logits, label), logits)


@pytest.mark.parametrize("include_background", [True, False])
def test_tversky_equals_monai(include_background):
    logits, label = fake()
    oracle = TverskyLoss(
        include_background, to_onehot_y=True, softmax=True, alpha=0.2, beta=0.9, batch=True, smooth_nr=1e-5,
        smooth_dr=1e-5,
    )  # fmt: skip
    term = Tversky(false_positives=0.2, false_negatives=0.9, include_background=include_background)
    assert_same(term(logits, label, CLASSES, alone), oracle(logits, label), logits)


def test_tversky_with_halves_is_dice():
    logits, label = fake()
    half = Tversky(false_positives=0.5, false_negatives=0.5, smooth=5e-6)
    assert_same(half(logits, label, CLASSES, alone), Dice()(logits, label, CLASSES, alone), logits)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_focal_loss_of_classes_equals_monai(gamma):
    logits, label = fake(dtype=torch.float32)  # as MONAI computes it
    oracle = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=gamma)
    ours = Focal(gamma=gamma)(logits, label, CLASSES, alone)
    assert_same(ours, oracle(logits, label) * 4, logits)  # MONAI's mean runs over the zeros of the other classes too


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_of_regions_equals_monai(gamma):
    logits, label = fake(channels=3, dtype=torch.float32)
    oracle = FocalLoss(gamma=gamma)(logits, REGIONS.encode(label))
    assert_same(Focal(gamma=gamma)(logits, label, REGIONS, alone), oracle, logits)


def test_regions_are_trained_by_binary_cross_entropy_and_dice_of_sigmoids():
    logits, label = fake(channels=3)
    truth = torch.cat([label > 0, (label == 1) | (label == 3), label == 3], dim=1).double()
    oracle = DiceLoss(sigmoid=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)(logits, truth)
    oracle = oracle + torch.nn.BCEWithLogitsLoss()(logits, truth)
    ours = sum(term(logits, label, REGIONS, alone) for term in (Dice(), CrossEntropy()))
    assert_same(ours, oracle, logits)


def test_no_region_is_background():
    logits, label = fake(channels=3)
    both = [Dice(include_background=flag)(logits, label, REGIONS, alone) for flag in (True, False)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
@pytest.mark.parametrize("target", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_two_processes_equal_one(term, target):
    logits, label = fake(target.channels)
    halves = [slice(rank, None, 2) for rank in (0, 1)]
    local: list[torch.Tensor] = []
    for half in halves:  # what each process contributes to the sum
        term(logits[half], label[half], target, lambda sums: local.append(sums) or sums)
    # The mean over the processes, as that of the gradients under DDP.
    losses = [term(logits[half], label[half], target, lambda _: sum(local)) for half in halves]
    assert_same(sum(losses) / 2, term(logits, label, target, alone), logits)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_perfect_predictions_cost_nothing_and_their_gradient_is_finite(term):
    _, label = fake()
    logits = (CLASSES.encode(label) * 80 - 40).requires_grad_()
    loss = term(logits, label, CLASSES, alone)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_terms_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="Dice: expected weight to be positive, but got 0"):
        Dice(weight=0)
    with pytest.raises(ValueError, match=r"Focal: expected gamma to be 0, or 1 or more, but got 0\.5"):
        Focal(gamma=0.5)


@pytest.mark.parametrize("target", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_what_is_encoded_is_decoded(target):
    label = torch.arange(4).reshape(1, 1, 2, 2)
    classes = target.decode(target.encode(label))
    assert classes.dtype == torch.uint8
    assert torch.equal(classes, label[:, 0].byte())


def test_regions_that_contradict_each_other_are_painted_as_nnunet_does():
    for inside in itertools.product([False, True], repeat=3):
        expected = 0
        for is_in, label in zip(inside, (2, 1, 3), strict=True):  # regions_class_order
            expected = label if is_in else expected
        probabilities = torch.tensor([0.51 if is_in else 0.5 for is_in in inside]).reshape(1, 3, 1, 1)
        assert int(REGIONS.decode(probabilities)) == expected
