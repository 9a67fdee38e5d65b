"""Dice per patient: brute force on rebuilt volumes as oracle, empty classes by name, two processes equal one."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from metrics.segmentation import (
    ENTITIES,
    PatientDice,
    dice_from_counts,
    entity_counts,
    mean_over_patients,
)

CORE, OEDEMA, ENHANCING, WT, TC, ET = range(6)


def random_slices(n_slices=24, n_patients=5, size=16, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.choice(4, p=[0.7, 0.1, 0.1, 0.1], size=(n_slices, size, size))
    prediction = np.where(rng.random(target.shape) < 0.7, target, rng.integers(0, 4, target.shape))
    patient = rng.permutation(np.arange(n_slices) % n_patients)
    target[patient == 1] *= target[patient == 1] != 3  # patient 1 has no enhancing tumour
    return tuple(torch.from_numpy(x.astype(np.int64)) for x in (prediction, target, patient))


def brute_force_dice(prediction, target, patient, empty):
    """Rebuild every volume with numpy and count sets of voxels."""
    rows = []
    for row in range(int(patient.max()) + 1):
        p, t = (x.numpy()[patient.numpy() == row] for x in (prediction, target))
        dice = []
        for classes in ENTITIES.values():
            a, b = np.isin(p, classes), np.isin(t, classes)
            both = a.sum() + b.sum()
            dice.append(2 * (a & b).sum() / both if both else {"nan": np.nan, "one": 1.0}[empty])
        rows.append(dice)
    return np.array(rows)


def test_the_order_of_the_entities_is_classes_then_regions():
    assert list(ENTITIES) == ["core", "oedema", "enhancing", "WT", "TC", "ET"]


@pytest.mark.parametrize("empty", ["nan", "one"])
@pytest.mark.parametrize("batch", [1, 5, 24])
def test_dice_summed_over_slices_is_the_dice_of_the_rebuilt_volume(empty, batch):
    prediction, target, patient = random_slices()
    metric = PatientDice(5, empty=empty)
    for rows in torch.arange(24).split(batch):
        metric.update(prediction[rows], target[rows], patient[rows])
    dice = metric.compute()
    assert dice.dtype == torch.float64
    np.testing.assert_allclose(dice.numpy(), brute_force_dice(prediction, target, patient, empty), rtol=1e-15, atol=0)


def test_counts_of_a_volume_given_at_once_equal_the_sum_over_its_slices():
    prediction, target, _ = random_slices()
    whole = entity_counts(prediction[None], target[None])
    assert whole.shape == (1, 6, 3)
    assert whole.dtype == torch.int64
    assert torch.equal(whole[0], entity_counts(prediction, target).sum(dim=0))


def test_class_absent_from_both_is_nan_or_one_by_name():
    nothing = torch.zeros(1, 4, 4, dtype=torch.uint8)
    counts = entity_counts(nothing, nothing)
    assert dice_from_counts(counts, "nan").isnan().all()
    assert (dice_from_counts(counts, "one") == 1).all()


@pytest.mark.parametrize("empty", ["nan", "one"])
def test_class_absent_from_the_reference_only_is_zero(empty):
    prediction, target = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    prediction[0, 0, 0] = 3
    dice = dice_from_counts(entity_counts(prediction, target), empty)[0]
    assert dice[[ENHANCING, WT, TC, ET]].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("empty", ["nan", "one"])
def test_class_absent_from_the_prediction_only_is_zero(empty):
    prediction, target = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    target[0, 0, 0] = 2
    dice = dice_from_counts(entity_counts(prediction, target), empty)[0]
    assert dice[[OEDEMA, WT]].tolist() == [0, 0]


def test_confusing_core_with_enhancing_costs_the_classes_but_not_the_regions():
    prediction, target = torch.full((1, 4, 4), 1), torch.full((1, 4, 4), 3)
    dice = dice_from_counts(entity_counts(prediction, target), "nan")[0]
    assert dice[[CORE, ENHANCING, WT, TC, ET]].tolist() == [0, 0, 1, 1, 0]
    assert dice[OEDEMA].isnan()


def test_mean_skips_nan_counts_what_is_left_and_never_turns_nothing_into_zero():
    nan = float("nan")
    mean, n_valid = mean_over_patients(torch.tensor([[0.5, nan, nan], [1.0, 0.25, nan]], dtype=torch.float64))
    assert mean[:2].tolist() == [0.75, 0.25]
    assert mean[2].isnan()
    assert n_valid.tolist() == [2, 1, 0]


def test_a_patient_without_slices_is_nan_even_where_empty_counts_one():
    metric = PatientDice(2, empty="one")
    nothing = torch.zeros(1, 4, 4, dtype=torch.int64)
    metric.update(nothing, nothing, torch.tensor([0]))
    assert metric.compute()[0].tolist() == [1.0] * 6
    assert metric.compute()[1].isnan().all()


def test_foreign_labels_shapes_types_and_rows_are_refused():
    ok = torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Expected class indices 0\.\.3.*BraTS label 4 is class 3"):
        entity_counts(ok, ok + 4)
    with pytest.raises(ValueError, match=r"Expected class indices 0\.\.3"):
        entity_counts(ok - 1, ok)
    with pytest.raises(ValueError, match=r"of one shape"):
        entity_counts(ok, ok[:1])
    with pytest.raises(ValueError, match=r"integer type"):
        entity_counts(ok.float(), ok)
    with pytest.raises(ValueError, match=r"patient row in 0\.\.2"):
        PatientDice(3).update(ok, ok, torch.tensor([0, 3]))


def _dice_of_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    prediction, target, patient = random_slices()
    metric = PatientDice(5)
    rows = torch.arange(24)[: 24 * 2 // 3] if rank == 0 else torch.arange(24)[24 * 2 // 3 :]  # patients on both ranks
    metric.update(prediction[rows], target[rows], patient[rows])
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_bit_for_bit(tmp_path):
    mp.spawn(_dice_of_rank, args=(str(tmp_path),), nprocs=2)
    metric = PatientDice(5)
    metric.update(*random_slices())
    expected = metric.compute().nan_to_num(nan=-1)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt").nan_to_num(nan=-1), expected)
