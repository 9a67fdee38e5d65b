"""The segmentation metrics and statistics against numbers agreed on by nnU-Net, MONAI, brats-evaluation and scipy.

Reads every .npz of the kind below the folder of `--reference-dir`; README.md beside the data defines the arrays. These
are not met, as quirks of tools or conventions that are not offered:

- `dice_ignore_empty_ref`, `monai_dice_ignore_empty_true`: a false positive costs nothing where the reference is empty.
- `monai_hd95`, `mr_hd95`, `mr_nsd_1mm`, `medpy_hd95` where one side is empty: NaN, so that a mean drops what was missed
  (`agg_mean_hd95_maxdir_finite`, `agg_monai_*`). They are met where both sides are filled.
- `be_global_bin_hd95`, `be_global_bin_nsd`: in voxels instead of mm, and inf where no lesion matched.
- `be_sq_hd95`, `be_sq_nsd`, `be_prec`, `be_rec`: distances of matched lesions are not offered, the others are counts.
- `b23_legacy_hd95`: `surfdist_hd95` with the penalty of 374 mm. `surfdist_nsd_1mm`: weighted by surface area.
- `b23_specificity`: depends on the size of the image.
- `slice_mean_*`: of slices, which are not patients. `s2d_hd95_maxdir_if_stored_as_XY1`: wrong, as its name says.
- `stat_ttest_*`, `stat_t_ci95_mean_a`: the bootstrap and Wilcoxon's test do without the normal distribution.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from metrics.lesions import find_lesions, lesionwise_brats2023
from metrics.segmentation import ENTITIES, dice_from_counts, entity_counts, mean_over_patients
from metrics.statistics import bootstrap_mean, effect_sizes, holm, paired_wilcoxon
from metrics.surface_distance import assd, hausdorff, nsd, surface_distances
from metrics.surfels import surface_weighted_hausdorff
from metrics.volumes import apply_convention, judge_volume, summarize

SMALL_VOXELS = 10**6
COLUMNS = {
    "tp": "tp",
    "dice_nan": "dice",
    "nnunet_dice": "dice",
    "hd95_maxdir": "hd95_mm",
    "hd100": "hd100_mm",
    "assd_pooled": "assd_mm",
    "nsd_1mm": "nsd_1mm",
    "lw_n_ref": "lesions_reference",
    "lw_n_pred": "lesions_prediction",
    "lw_tp": "lesions_tp",
    "lw_fp": "lesions_fp",
    "lw_fn": "lesions_fn",
    "lw_f1": "lesion_f1",
    "lw_sq_dsc": "lesion_dice",
    "be_n_ref_instances": "lesions_reference",
    "be_n_pred_instances": "lesions_prediction",
    "be_tp": "lesions_tp",
    "be_fp": "lesions_fp",
    "be_fn": "lesions_fn",
    "be_rq": "lesion_f1",
    "be_sq_dsc": "lesion_dice",
    "be_global_bin_dsc": "dice",
    "monai_hd100": "hd100_mm",
    "monai_nsd_1mm": "nsd_1mm",
}
WHERE_BOTH_FILLED = {"monai_hd95": "hd95_mm", "mr_hd95": "hd95_mm", "mr_nsd_1mm": "nsd_1mm"}
BY_CONVENTION = {
    "dice_one": ("one", "dice"),
    "mr_dsc": ("one", "dice"),
    "monai_dice_ignore_empty_false": ("one", "dice"),
    "b23_legacy_dice": ("brats2023", "dice"),
    "b23_sensitivity": ("brats2023", "sensitivity"),
    "b23_gli_dice": ("brats2023", "lesion_dice_brats2023"),
    "b23_gli_hd95": ("brats2023", "hd95_brats2023_mm"),
}


def files_with(config, *arrays):
    root = Path(config.getoption("reference_dir", None) or Path(__file__).parent)
    return [path for path in sorted(root.rglob("*.npz")) if set(arrays) <= set(np.load(path).files)]


def pytest_generate_tests(metafunc):
    if "volumes_file" in metafunc.fixturenames:
        metafunc.parametrize(
            "volumes_file", files_with(metafunc.config, "meta", "ref_00", "pred_00", "dice_nan"), ids=str
        )
    if "statistics_file" in metafunc.fixturenames:
        metafunc.parametrize("statistics_file", files_with(metafunc.config, "stat_a", "stat_b"), ids=str)


class Golden:
    """A file, its volumes and what ours says of them; entities are found by their labels."""

    def __init__(self, path):
        self.z = dict(np.load(path))
        self.meta = json.loads(str(self.z["meta"]))
        name_of = {classes: name for name, classes in reversed(ENTITIES.items())}
        self.labels = [tuple(self.meta["labels"][name]) for name in self.meta["entities"]]
        self.entities = [name_of[classes] for classes in self.labels]
        numbers = sorted(name[len("ref_") :] for name in self.z if name.startswith("ref_"))
        self.pairs = [(self.z[f"pred_{number}"], self.z[f"ref_{number}"]) for number in sorted(numbers, key=int)]
        self.spacing = self.z["spacing"]
        tables = [judge_volume(p, r, mm) for (p, r), mm in zip(self.pairs, self.spacing, strict=True)]
        self.table = pd.concat(tables, ignore_index=True)

    def __getitem__(self, name):
        if name not in self.z:
            pytest.skip(f"the file holds no {name}")
        return self.z[name]

    def column(self, name, table=None):
        """(cases, entities of the file)."""
        of_case = (self.table if table is None else table)[name].to_numpy(float).reshape(-1, len(ENTITIES))
        return of_case[:, [list(ENTITIES).index(entity) for entity in self.entities]]

    def counts(self, predictions, references):
        """(volumes or slices, entities of the file, 3)."""
        found = entity_counts(torch.from_numpy(predictions), torch.from_numpy(references))
        return found[:, [list(ENTITIES).index(entity) for entity in self.entities]]

    def masks(self):
        for row, ((prediction, reference), spacing_mm) in enumerate(zip(self.pairs, self.spacing, strict=True)):
            for column, classes in enumerate(self.labels):
                yield (row, column), np.isin(prediction, classes), np.isin(reference, classes), spacing_mm

    def each(self, score):
        found = np.empty((len(self.pairs), len(self.labels)))
        for place, prediction, reference, spacing_mm in self.masks():
            found[place] = score(prediction, reference, spacing_mm)
        return found

    def small_table(self):
        small = [reference.size < SMALL_VOXELS for _, reference in self.pairs]  # cohort rows are of these
        return self.table[np.repeat(small, len(ENTITIES))]

    def summary(self, empty, metric, value, table=None):
        found = summarize(self.small_table() if table is None else table, empty)
        found = found[found["metric"] == metric].set_index("entity")
        return found.loc[self.entities, value].to_numpy(float)


@cache
def golden(path):
    return Golden(path)


def equal(ours, theirs, atol=1e-6):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def tolerance(name):
    return 1e-4 if name.startswith("monai_") else 1e-6  # MONAI computes in float32


def test_there_is_a_row_for_every_case_and_entity_of_the_file(volumes_file):
    g = golden(volumes_file)
    assert g.column("dice").shape == (len(g.meta["cases"]), len(g.meta["entities"])) == g.z["dice_nan"].shape


@pytest.mark.parametrize("name", COLUMNS)
def test_raw_scores_equal_the_reference(volumes_file, name):
    g = golden(volumes_file)
    equal(g.column(COLUMNS[name]), g[name], tolerance(name))


def test_counts_and_union_equal_the_reference(volumes_file):
    g = golden(volumes_file)
    tp, fp, fn = (g.column(name) for name in ("tp", "fp", "fn"))
    equal(tp + fn, g["n_ref"])
    equal(tp + fp, g["n_pred"])
    voxel_ml = g.spacing.prod(axis=1, keepdims=True) / 1000
    equal(g.column("volume_reference_ml"), g["n_ref"] * voxel_ml)
    equal(g.column("volume_error_ml"), (g["n_pred"] - g["n_ref"]) * voxel_ml)
    dice = g.column("dice")
    equal(dice / (2 - dice), g["iou_nan"])


@pytest.mark.parametrize("name", WHERE_BOTH_FILLED)
def test_tools_agree_where_both_sides_are_filled(volumes_file, name):
    g = golden(volumes_file)
    filled = (g["n_ref"] > 0) & (g["n_pred"] > 0)
    equal(g.column(WHERE_BOTH_FILLED[name])[filled], g[name][filled], tolerance(name))


@pytest.mark.parametrize("name", BY_CONVENTION)
def test_scores_under_a_convention_equal_the_reference(volumes_file, name):
    g = golden(volumes_file)
    empty, column = BY_CONVENTION[name]
    given = ~np.isnan(g[name])  # BraTS 2023 scores the regions only
    equal(g.column(column, apply_convention(g.table, empty))[given], g[name][given], tolerance(name))


def test_pooled_distances_equal_the_reference(volumes_file):
    g = golden(volumes_file)
    pooled = g.each(lambda *pair: hausdorff(surface_distances(*pair), kind="pooled"))
    equal(pooled, g["hd95_pooled"])
    filled = ~np.isnan(g["medpy_hd95"])
    equal(pooled[filled], g["medpy_hd95"][filled])
    equal(g.each(lambda *pair: nsd(surface_distances(*pair), 2.0)), g["nsd_2mm"])


def test_surface_weighted_distance_equals_the_reference(volumes_file):
    g = golden(volumes_file)
    equal(g.each(surface_weighted_hausdorff), g["surfdist_hd95"])


@pytest.mark.parametrize(
    ("prefix", "options"), [("b23_gli", {}), ("b23_met", {"dilation_voxels": 1, "min_volume_mm3": 2})]
)
def test_lesions_of_brats_2023_equal_the_reference(volumes_file, prefix, options):
    g = golden(volumes_file)
    names = {"num_tp": "tp", "num_fp": "fp", "num_fn": "fn", "dice": "dice", "hd95": "hd95_mm"}
    for place, prediction, reference, spacing_mm in g.masks():
        if not np.isnan(g[f"{prefix}_dice"][place]):
            ours = lesionwise_brats2023(find_lesions(prediction), find_lesions(reference), spacing_mm, **options)
            equal([getattr(ours, name) for name in names.values()], [g[f"{prefix}_{name}"][place] for name in names])


@pytest.mark.parametrize(
    ("name", "empty", "value"),
    [
        ("agg_mean_dice_nan", "nan", "mean"),
        ("agg_n_valid", "nan", "n_valid"),
        ("agg_median_dice_nan", "nan", "median"),
        ("agg_std_dice_nan", "nan", "sd"),
        ("agg_mean_dice_one", "one", "mean"),
    ],
)
def test_summary_of_dice_over_the_cases_equals_the_reference(volumes_file, name, empty, value):
    g = golden(volumes_file)
    equal(g.summary(empty, "dice", value), g[name])


def test_mean_distances_with_penalties_equal_the_reference(volumes_file):
    g = golden(volumes_file)
    equal(g.column("diagonal_mm"), np.repeat(g["image_diagonal_mm"][:, None], len(g.entities), axis=1))
    equal(g.summary("nan", "hd95_mm", "mean"), g["agg_mean_hd95_maxdir_pendiag"])
    on_the_brats_grid = g.small_table().assign(diagonal_mm=g.meta["hd_penalty_brats"])
    equal(g.summary("nan", "hd95_mm", "mean", on_the_brats_grid), g["agg_mean_hd95_maxdir_pen373"])


def test_means_and_pooled_dice_of_the_counting_metric_equal_the_reference(volumes_file):
    g = golden(volumes_file)
    small = [pair for pair in g.pairs if pair[0].size < SMALL_VOXELS]
    counts = torch.cat([g.counts(*(labels[None] for labels in pair)) for pair in small])
    mean, n_valid = mean_over_patients(dice_from_counts(counts, "nan"))
    equal(mean, g["agg_mean_dice_nan"], 1e-12)
    equal(n_valid, g["agg_n_valid"], 0)
    equal(dice_from_counts(counts.sum(dim=0), "nan"), g["agg_pooled_dice"], 1e-12)


def test_dice_of_single_slices_equals_the_reference(volumes_file):
    g = golden(volumes_file)
    equal(dice_from_counts(g.counts(g["s2d_pred"], g["s2d_ref"]), "nan"), g["s2d_dice_nan"], 1e-12)


def test_slices_are_judged_in_two_dimensions(volumes_file):
    g = golden(volumes_file)
    found = {name: np.empty(g["s2d_dice_nan"].shape) for name in ("hd95_maxdir", "hd95_pooled", "nsd_1mm")}
    for row, (prediction, reference) in enumerate(zip(g["s2d_pred"], g["s2d_ref"], strict=True)):
        spacing_mm = g.spacing[g["s2d_case"][row]]
        for column, classes in enumerate(g.labels):
            pair = np.isin(prediction, classes), np.isin(reference, classes)
            distances = surface_distances(*pair, spacing_mm[:2])
            found["hd95_maxdir"][row, column] = hausdorff(distances)
            found["hd95_pooled"][row, column] = hausdorff(distances, kind="pooled")
            found["nsd_1mm"][row, column] = nsd(distances, 1.0)
            as_volume = surface_distances(*(mask[:, :, None] for mask in pair), spacing_mm)
            equal([hausdorff(as_volume), assd(as_volume)], [hausdorff(distances), assd(distances)], 0)
    for name, values in found.items():
        equal(values, g[f"s2d_{name}"])


def test_intervals_tests_effects_and_correction_equal_the_reference(statistics_file):
    z = np.load(statistics_file)
    a, b = z["stat_a"], z["stat_b"]
    paired = ~(np.isnan(a) | np.isnan(b))
    seed, n_resamples = int(z["stat_boot_idx_seed"]), int(z["stat_boot_B"])
    mean = bootstrap_mean(a[paired], seed=seed, n_resamples=n_resamples)
    difference = bootstrap_mean(a - b, seed=seed, n_resamples=n_resamples)
    equal([mean.low, mean.high], z["stat_boot_mean_ci95"], 1e-12)
    equal([difference.low, difference.high], z["stat_boot_diff_ci95"], 1e-12)
    assert difference.estimate == pytest.approx(float(z["stat_mean_diff"]), abs=1e-12)
    test = paired_wilcoxon(a, b)
    assert (test.n, test.dropped) == (int(z["stat_n_pairs"]), len(a) - int(z["stat_n_pairs"]))
    assert test.statistic == float(z["stat_wilcoxon_stat"])
    assert test.p == pytest.approx(float(z["stat_wilcoxon_p"]), abs=1e-12)
    effect = effect_sizes(b, a)  # the file subtracts b from a
    assert (effect.n, effect.dropped) == (test.n, test.dropped)
    assert effect.d_z == pytest.approx(float(z["stat_cohen_dz"]), abs=1e-12)
    n_ranked = np.count_nonzero((a - b)[paired])
    assert abs(effect.rank_biserial) == pytest.approx(1 - 4 * test.statistic / (n_ranked * (n_ranked + 1)), abs=1e-12)
    equal(holm(z["stat_holm_in"]), z["stat_holm_out"], 1e-12)
