"""Judgement of volumes: closed forms on boxes, the functions it is made of, conventions by name, summary by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from metrics.lesions import find_lesions, lesionwise_brats2023, match_lesions
from metrics.segmentation import ENTITIES, entity_counts
from metrics.surface_distance import assd, hausdorff, nsd, surface_distances
from metrics.volumes import METRICS, apply_convention, judge_volume, summarize

MM = (1.0, 1.0, 1.0)
SPACING = (0.5, 0.8, 2.0)
EMPTY = np.zeros((12, 10, 8), np.uint8)


def tumour(seed, shape=(16, 14, 12)):
    """A nested tumour and a prediction of it with errors."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, *shape)), (0, 2, 2, 2))
    fields = smooth[0], 0.8 * smooth[0] + 0.4 * smooth[1]
    classes = np.array([0, 2, 3, 1], np.uint8)  # oedema around enhancing around core
    levels = np.quantile(smooth[0], [0.7, 0.85, 0.95])
    reference, prediction = (classes[np.digitize(field, levels)] for field in fields)
    return prediction, reference


def boxes(*class_and_box):
    labels = EMPTY.copy()
    for index, (x, y, z) in class_and_box:
        labels[slice(*x), slice(*y), slice(*z)] = index
    return labels


REFERENCE = boxes((2, [(2, 8), (2, 8), (2, 6)]), (3, [(3, 6), (3, 6), (3, 5)]))
MISSED = boxes((2, [(2, 8), (2, 8), (2, 6)]))


def row(table, entity):
    return table.set_index("entity").loc[entity]


@pytest.mark.parametrize("kind", ["maxdir", "pooled"])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_made_of_the_functions_on_the_whole_volume(seed, kind):
    prediction, reference = tumour(seed)
    table = judge_volume(prediction, reference, SPACING, hausdorff=kind)
    assert list(table.columns) == ["entity", "tp", "fp", "fn", *METRICS, "diagonal_mm"]
    assert list(table["entity"]) == list(ENTITIES)
    counts = entity_counts(torch.from_numpy(prediction)[None], torch.from_numpy(reference)[None])[0]
    np.testing.assert_array_equal(table[["tp", "fp", "fn"]], counts)
    for entity, classes in ENTITIES.items():
        p, r = np.isin(prediction, classes), np.isin(reference, classes)
        found, tp = row(table, entity), (p & r).sum()
        distances, lesions = surface_distances(p, r, SPACING), match_lesions(find_lesions(p), find_lesions(r))
        challenge = lesionwise_brats2023(find_lesions(p), find_lesions(r), SPACING)
        expected = {
            "dice": 2 * tp / (p.sum() + r.sum()),
            "sensitivity": tp / r.sum(),
            "precision": tp / p.sum(),
            "hd95_mm": hausdorff(distances, 95, kind),
            "hd100_mm": hausdorff(distances, 100, kind),
            "assd_mm": assd(distances),
            "nsd_1mm": nsd(distances, 1.0),
            "volume_reference_ml": r.sum() * 0.8e-3,
            "volume_prediction_ml": p.sum() * 0.8e-3,
            "volume_error_ml": (int(p.sum()) - int(r.sum())) * 0.8e-3,
            "lesions_reference": lesions.reference,
            "lesions_prediction": lesions.prediction,
            "lesions_tp": lesions.tp,
            "lesions_fp": lesions.fp,
            "lesions_fn": lesions.fn,
            "lesion_f1": lesions.f1,
            "lesion_dice": lesions.dice,
            "lesion_dice_brats2023": challenge.dice,
            "hd95_brats2023_mm": challenge.hd95_mm,
        }
        assert set(expected) == set(METRICS)
        assert found[list(expected)].to_dict() == pytest.approx(expected, abs=1e-12)
    assert table["diagonal_mm"].to_numpy() == pytest.approx(np.sqrt(8.0**2 + 11.2**2 + 24.0**2))


def test_a_shifted_box_by_hand():
    prediction = np.roll(REFERENCE, 1, axis=0)
    found = row(judge_volume(prediction, REFERENCE, (1.0, 1.0, 3.0)), "WT")
    assert (found["tp"], found["fp"], found["fn"]) == (120, 24, 24)
    assert found["dice"] == found["sensitivity"] == found["precision"] == pytest.approx(5 / 6)
    assert (found["hd95_mm"], found["hd100_mm"], found["nsd_1mm"]) == (1, 1, 1)
    assert (found["volume_reference_ml"], found["volume_error_ml"]) == (pytest.approx(144 * 3 / 1000), 0)
    assert (found["lesions_tp"], found["lesion_f1"]) == (1, 1)
    assert found["lesion_dice"] == found["lesion_dice_brats2023"] == pytest.approx(5 / 6)


def test_enhancing_class_and_region_are_the_same():
    table = judge_volume(*tumour(5), SPACING).set_index("entity")
    pd.testing.assert_series_equal(table.loc["ET"], table.loc["enhancing"], check_names=False)


def test_scores_depend_neither_on_the_place_in_the_volume_nor_on_its_order_in_memory():
    prediction, reference = tumour(1)
    table = judge_volume(prediction, reference, SPACING).drop(columns="diagonal_mm")
    padded = [np.pad(labels, ((3, 1), (0, 20), (7, 0))) for labels in (prediction, reference)]
    for pair in (padded, (np.asfortranarray(padded[0]), padded[1].astype(np.int64))):
        moved = judge_volume(pair[0], pair[1], SPACING).drop(columns="diagonal_mm")
        pd.testing.assert_frame_equal(moved, table)


def test_a_volume_of_one_slice_is_judged_as_an_image_but_a_flat_tumour_is_not():
    prediction, reference = (labels[:, :, 5] for labels in tumour(2))
    spacing_mm = (0.5, 0.8, 5.0)
    table = judge_volume(prediction[:, :, None], reference[:, :, None], spacing_mm).set_index("entity")
    for entity, classes in ENTITIES.items():
        p, r = np.isin(prediction, classes), np.isin(reference, classes)
        distances = surface_distances(p, r, spacing_mm[:2])
        assert table.loc[entity, "hd95_mm"] == hausdorff(distances)
        assert table.loc[entity, "lesion_f1"] == match_lesions(find_lesions(p), find_lesions(r)).f1
    assert table[["lesion_dice_brats2023", "hd95_brats2023_mm"]].isna().all(axis=None)
    assert table.loc["WT", "volume_reference_ml"] == pytest.approx((reference > 0).sum() * 2e-3)
    in_space = [np.zeros((16, 14, 9), np.uint8) for _ in range(2)]
    for volume, labels in zip(in_space, (prediction, reference), strict=True):
        volume[:, :, 4] = labels
    masks = [volume > 0 for volume in in_space]
    flat = row(judge_volume(*in_space, spacing_mm), "WT")
    assert flat["assd_mm"] == assd(surface_distances(*masks, spacing_mm)) != table.loc["WT", "assd_mm"]
    assert flat["lesion_dice_brats2023"] > 0


RAW = {
    "both": (np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, 1.0, 0.0),
    "missed": (0.0, np.inf, np.inf, 0.0, 0.0, np.nan, 0.0, 0.0, 374.0),
    "false": (0.0, np.inf, np.inf, 0.0, np.nan, 0.0, 0.0, 0.0, 374.0),
}
DIAGONAL = float(np.sqrt(12**2 + 10**2 + 8**2))
FILLED = {
    "nan": {
        "both": RAW["both"],
        "missed": (0.0, DIAGONAL, DIAGONAL, 0.0, 0.0, np.nan, 0.0, 0.0, 374.0),
        "false": (0.0, DIAGONAL, DIAGONAL, 0.0, np.nan, 0.0, 0.0, 0.0, 374.0),
    },
    "one": {
        "both": (1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
        "missed": (0.0, DIAGONAL, DIAGONAL, 0.0, 0.0, 0.0, 0.0, 0.0, 374.0),
        "false": (0.0, DIAGONAL, DIAGONAL, 0.0, 0.0, 0.0, 0.0, 0.0, 374.0),
    },
    "brats2023": {
        "both": (1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
        "missed": (0.0, 374.0, 374.0, 0.0, 0.0, 0.0, 0.0, 0.0, 374.0),
        "false": (0.0, 374.0, 374.0, 0.0, 0.0, 0.0, 0.0, 0.0, 374.0),
    },
}
SHOWN = ["dice", "hd95_mm", "assd_mm", "nsd_1mm", "sensitivity", "precision", "lesion_f1"]
SHOWN += ["lesion_dice_brats2023", "hd95_brats2023_mm"]
PAIRS = {"both": (EMPTY, EMPTY), "missed": (EMPTY, MISSED), "false": (MISSED, EMPTY)}


@pytest.mark.parametrize("case", PAIRS)
def test_raw_scores_of_empty_entities_follow_no_convention(case):
    found = row(judge_volume(*PAIRS[case], MM), "oedema")
    np.testing.assert_array_equal(found[SHOWN].to_numpy(float), RAW[case])


@pytest.mark.parametrize("empty", FILLED)
@pytest.mark.parametrize("case", PAIRS)
def test_conventions_fill_what_is_not_defined(case, empty):
    raw = judge_volume(*PAIRS[case], MM)
    before = raw.copy()
    filled = apply_convention(raw, empty)
    np.testing.assert_array_equal(row(filled, "oedema")[SHOWN].to_numpy(float), FILLED[empty][case])
    pd.testing.assert_frame_equal(raw, before)
    assert not np.isinf(filled.drop(columns="entity").to_numpy(float)).any()


@pytest.mark.parametrize("empty", FILLED)
def test_conventions_leave_defined_scores_alone_even_the_worst(empty):
    disjoint = judge_volume(np.roll(MISSED, 3, axis=0), boxes((2, [(0, 2), (2, 8), (2, 6)])), MM)
    worst = row(disjoint, "oedema")
    assert worst["dice"] == 0
    assert 0 < worst["hd95_mm"] < DIAGONAL
    pd.testing.assert_series_equal(row(apply_convention(disjoint, empty), "oedema"), worst)


def patients():
    """Oedema: hit, half hit, missed, false, absent from both; one missed patient must not look like a perfect one."""
    half = boxes((2, [(2, 5), (2, 8), (2, 6)]))
    pairs = [(MISSED, MISSED), (half, MISSED), (EMPTY, MISSED), (MISSED, EMPTY), (EMPTY, EMPTY)]
    return pd.concat([judge_volume(*pair, MM) for pair in pairs], ignore_index=True)


def summary_of(empty, entity, metric):
    found = summarize(patients(), empty)
    return found[(found["entity"] == entity) & (found["metric"] == metric)].iloc[0]


@pytest.mark.parametrize(
    ("empty", "metric", "values"),
    [
        ("nan", "dice", [1, 2 / 3, 0, 0]),
        ("one", "dice", [1, 2 / 3, 0, 0, 1]),
        ("brats2023", "hd100_mm", [0, 3, 374, 374, 0]),
        ("nan", "hd100_mm", [0, 3, DIAGONAL, DIAGONAL]),
        ("nan", "sensitivity", [1, 0.5, 0]),
        ("nan", "precision", [1, 1, 0]),
        ("nan", "lesions_fp", [0, 0, 0, 1, 0]),
        ("nan", "volume_error_ml", [0, -0.072, -0.144, 0.144, 0]),
    ],
)
def test_summary_is_that_of_the_defined_values_and_says_what_was_empty(empty, metric, values):
    found = summary_of(empty, "oedema", metric)
    assert (found["n"], found["n_valid"]) == (5, len(values))
    assert (found["n_both_empty"], found["n_missed"], found["n_false_positive"]) == (1, 1, 1)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["sd"] == pytest.approx(np.std(values, ddof=1))
    assert found[["q25", "median", "q75"]].tolist() == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]).tolist())
    n = len(values)
    means = np.array(values)[np.random.default_rng(0).integers(0, n, (2000, n))].mean(axis=1)
    assert found[["ci_low", "ci_high"]].tolist() == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())


def test_an_entity_that_nobody_has_is_nan_and_not_zero():
    found = summary_of("nan", "core", "dice")
    assert (found["n"], found["n_valid"], found["n_both_empty"]) == (5, 0, 5)
    assert found[["mean", "sd", "median", "q25", "q75", "ci_low", "ci_high"]].isna().all()
    assert summary_of("one", "core", "dice")["mean"] == 1


def test_summary_has_every_entity_and_metric_in_order():
    found = summarize(patients(), "one")
    assert list(zip(found["entity"], found["metric"], strict=True)) == [(e, m) for e in ENTITIES for m in METRICS]


def test_what_is_no_segmentation_is_refused():
    with pytest.raises(ValueError, match=r"one shape with 3 axes"):
        judge_volume(EMPTY, EMPTY[1:], MM)
    with pytest.raises(ValueError, match=r"along each of 3 axes, but got \(1\.0, 1\.0\)"):
        judge_volume(EMPTY, EMPTY, (1.0, 1.0))
    with pytest.raises(ValueError, match=r"prediction .* holds 0\.\.4 of uint8\. .*BraTS label 4 is class 3"):
        judge_volume(np.where(MISSED > 0, 4, 0).astype(np.uint8), EMPTY, MM)
    with pytest.raises(ValueError, match=r"reference .* holds -1\.\.0 of int16"):
        judge_volume(EMPTY, -(MISSED > 0).astype(np.int16), MM)
    with pytest.raises(ValueError, match=r"prediction .* float64"):
        judge_volume(EMPTY.astype(float), EMPTY, MM)
