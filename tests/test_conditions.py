"""What a generator is told of a slice."""

import pytest
import torch

from lightning_modules.conditions import AREA_LIMITS, HEIGHT_BINS, Conditions


def slices_with(areas: list[tuple[int, int, int]]) -> torch.Tensor:
    """Slices of 100 × 100 px with that many pixels of core, oedema and enhancing tumour."""
    slices = torch.zeros(len(areas), 5, 100, 100, dtype=torch.uint8)
    for one, counts in zip(slices, areas, strict=True):
        one[-1].view(-1)[: sum(counts)] = torch.repeat_interleave(torch.tensor([1, 2, 3]), torch.tensor(counts))
    return slices


def test_slices_fall_into_the_bins_of_their_tumour_height_and_areas():
    conditions = Conditions(["tumour", "height", "areas"])
    slices = slices_with([(0, 0, 0), (1, 50, 51), (0, 200, 201), (0, 0, 9000)])
    height = torch.tensor([0.0, 0.49, 0.5, 1.0])
    bins = [[0, 0, 0, 0, 0], [1, 3, 1, 1, 2], [1, 4, 0, 2, 3], [1, 7, 0, 0, 3]]
    assert conditions.of(slices, height).tolist() == bins


def test_vectors_have_a_one_for_every_bin():
    conditions = Conditions(["tumour", "height"])
    assert conditions.width == 2 + HEIGHT_BINS
    vectors = conditions.vectors(torch.tensor([[1, 0], [0, 7]]))
    assert vectors.tolist() == [[0, 1, 1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]]
    assert Conditions().vectors(torch.zeros(3, 0, dtype=torch.int64)) is None
    assert Conditions(["areas"]).width == 3 * (len(AREA_LIMITS) + 1)


def test_conditions_are_drawn_together_in_the_proportions_that_were_counted():
    conditions = Conditions(["tumour", "height"])
    seen = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 6]])
    conditions.counts += conditions.shares(seen).sum(dim=0)
    drawn = conditions.draw(torch.arange(4000), seed=3)
    kinds, counts = drawn.unique(dim=0, return_counts=True)
    assert {tuple(kind.nonzero().flatten().tolist()) for kind in kinds} == {(0, 3), (1, 8)}
    assert counts.max() / 4000 == pytest.approx(0.75, abs=0.03)
    again = torch.cat([conditions.draw(torch.arange(first, first + 1000), seed=3) for first in range(0, 4000, 1000)])
    assert torch.equal(again, drawn)


def test_before_training_all_are_equally_likely():
    drawn = Conditions(["tumour"]).draw(torch.arange(2000), seed=0)
    assert drawn.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.04)
    unnamed = Conditions.unnamed(3).draw(torch.arange(3000), seed=0)
    assert unnamed.mean(dim=0).tolist() == pytest.approx([1 / 3] * 3, abs=0.04)


@pytest.mark.parametrize("names", [["age"], ["tumour", "tumour"]])
def test_unknown_or_repeated_conditions_are_refused(names):
    with pytest.raises(ValueError, match="Expected conditions of tumour, height, areas, each once"):
        Conditions(names)
