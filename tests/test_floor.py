"""The floor between halves of the patients: fair, reproducible, and higher than that between slices."""

import numpy as np
import pytest
import torch

from metrics.fidelity import frechet_distance
from metrics.floor import beside_floor, halves_of_patients

PATIENTS = np.repeat([f"p{i}" for i in range(9)], 20)
RANDOM = torch.Generator().manual_seed(0)
REAL = (torch.randn(9, 1, 4, generator=RANDOM) + 0.2 * torch.randn(9, 20, 4, generator=RANDOM)).flatten(0, 1)
GENERATED = 2 + torch.randn(300, 4, generator=RANDOM)


def test_no_patient_is_in_both_halves_and_all_are_in_one():
    divisions = [halves_of_patients(PATIENTS, seed) for seed in range(4)]
    for first, second in divisions:
        assert set(PATIENTS[first]).isdisjoint(PATIENTS[second])
        assert sorted([*first, *second]) == list(range(180))
        assert (len(set(PATIENTS[first])), len(set(PATIENTS[second]))) == (4, 5)
    assert len({tuple(first) for first, _ in divisions}) == 4
    assert np.array_equal(halves_of_patients(PATIENTS, 2)[0], divisions[2][0])


def test_score_and_floor_are_of_equal_numbers_against_the_same_half():
    calls = []

    def score(reference, compared):
        calls.append((reference, compared))
        return float(compared.mean() - reference.mean())

    found = beside_floor(score, REAL, PATIENTS, GENERATED, seeds=[3, 5])
    assert found.n == 80
    assert {len(x) for call in calls for x in call} == {80}
    rows = {tuple(row.tolist()): patient for row, patient in zip(REAL, PATIENTS, strict=True)}
    for (a, generated), (same, b) in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(a, same)
        of_a, of_b = ({rows[tuple(row.tolist())] for row in x} for x in (a, b))
        assert of_a.isdisjoint(of_b)
        assert tuple(generated[0].tolist()) not in rows
        assert len(generated.unique(dim=0)) == 80
    assert found.score.tolist() == [float(g.mean() - a.mean()) for a, g in calls[::2]]
    assert found.floor.tolist() == [float(b.mean() - a.mean()) for a, b in calls[1::2]]
    again = beside_floor(score, REAL, PATIENTS, GENERATED, seeds=[3, 5])
    assert again.score.tolist() == found.score.tolist()


def test_the_floor_between_patients_is_far_above_that_between_slices():
    def distance(a, b):
        return frechet_distance(a, b).item()

    between_patients = beside_floor(distance, REAL, PATIENTS, GENERATED, n=60)
    between_slices = beside_floor(distance, REAL, np.arange(180), GENERATED, n=60)
    assert between_patients.floor.min() > 3 * between_slices.floor.max()
    assert (between_patients.score > 2 * between_patients.floor).all()


def test_too_few_patients_or_images_are_refused():
    with pytest.raises(ValueError, match="at least two patients to make halves, but got 1"):
        halves_of_patients(PATIENTS[:20], 0)
    with pytest.raises(ValueError, match="n of at most 50, the images of a half or the generated ones, but got 60"):
        beside_floor(lambda a, b: 0.0, REAL, PATIENTS, GENERATED[:50], n=60)
    with pytest.raises(ValueError, match=r"one patient per real image, but got \(20,\) for 180"):
        beside_floor(lambda a, b: 0.0, REAL, PATIENTS[:20], GENERATED)
