"""`standin compare`: its numbers by hand and against scipy, seeds of an arm, and what it refuses to compare."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cli import main
from evaluation.cases import Case, LabelFile
from evaluation.compare import compare, read_arms
from evaluation.results import save_tables
from metrics.segmentation import ENTITIES
from metrics.volumes import DISTANCES, METRICS

NAN = float("nan")
PATIENTS = [f"P{n}" for n in range(8)]
CLASSES = ("core", "oedema", "enhancing", "WT", "TC")
FILE = LabelFile(Path("x.nii.gz"), {0: 0, 1: 1, 2: 2, 3: 3}, "plain")
REAL = {
    "core": [0.90, 0.80, 0.70, 0.60, 0.85, 0.75, 0.65, 0.95],
    "oedema": [0.80, 0.70, 0.75, 0.65, 0.60, 0.85, 0.90, 0.55],
    "enhancing": [0.88, NAN, 0.70, 0.60, 0.85, 0.75, 0.65, 0.95],
    "WT": [0.95, 0.90, 0.85, 0.92, 0.88, 0.91, 0.86, 0.93],
    "TC": [0.90, 0.80, 0.70, 0.60, 0.85, 0.75, 0.65, 0.95],
}
SYNTHETIC = {
    "core": [0.80, 0.78, 0.60, 0.30, 0.81, 0.69, 0.66, 0.88],
    "oedema": [0.60, 0.45, 0.52, 0.41, 0.38, 0.59, 0.61, 0.27],
    "enhancing": [0.80, 0.00, 0.60, NAN, 0.81, 0.69, 0.66, 0.88],
    "WT": [0.95, 0.90, 0.85, 0.92, 0.88, 0.91, 0.86, 0.93],
    "TC": [0.91, 0.82, 0.73, 0.64, 0.90, 0.81, 0.72, 0.99],
}


def write_results(folder, dice, empty="nan", hausdorff="maxdir", cases=PATIENTS, **columns):
    """Results with a chosen Dice (NaN: absent from both); every other metric is 5 times as large."""
    rows = []
    for place, case in enumerate(cases):
        for entity in ENTITIES:
            value = dice["enhancing" if entity == "ET" else entity][place]
            counts = (0, 0, 0) if np.isnan(value) else (round(1000 * value), 1000 - round(1000 * value), 1000)
            rows.append(
                {
                    "case": case,
                    "patient": case.split("-")[0],
                    "entity": entity,
                    **dict(zip(("tp", "fp", "fn"), counts, strict=True)),
                    **dict.fromkeys(METRICS, 5 * value),
                    "dice": value,
                    "volume_error_ml": -2 * value,
                    "diagonal_mm": 100.0,
                    "slices": "all",
                    "prediction_file": f"{case}.nii.gz",
                    "reference_file": f"{case}_seg.nii.gz",
                    "prediction_sha256": f"{folder.name} {case}",
                    "reference_sha256": f"hash of {case}",
                }
            )
    table = pd.DataFrame(rows).assign(**columns)
    folder.mkdir(parents=True)
    listed = [Case(case, case.split("-")[0], FILE, FILE) for case in cases]
    save_tables(folder, table, listed, empty, hausdorff)
    return folder


@pytest.fixture(autouse=True)
def figures_only_where_they_are_tested(request, monkeypatch):
    if "figure" not in request.node.name:
        monkeypatch.setattr("evaluation.compare._draw", lambda *args: None)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    return write_results(root / "real", REAL), write_results(root / "synthetic/evaluation", SYNTHETIC).parent


def compared(arms, out):
    compare(arms, out)
    return pd.read_csv(out / "compare.csv").set_index(["convention", "metric", "arm", "entity"]).sort_index()


@pytest.fixture(scope="module")
def table(two, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.compare._draw", lambda *args: None)
        return compared(list(two), tmp_path_factory.mktemp("comparison"))


@pytest.mark.parametrize("entity", ["core", "oedema", "TC"])
def test_means_differences_and_ratios_with_intervals_equal_loops_over_resamples_of_patients(table, entity):
    a, b = np.array(REAL[entity]), np.array(SYNTHETIC[entity])
    base = table.loc[("empty=nan", "dice", "real", entity)]
    row = table.loc[("empty=nan", "dice", "synthetic", entity)]
    draws = np.random.default_rng(0).integers(0, 8, (2000, 8))
    for name, here, value in (
        ("mean", base, lambda i: a[i].mean()),
        ("mean", row, lambda i: b[i].mean()),
        ("difference", row, lambda i: b[i].mean() - a[i].mean()),
        ("ratio", row, lambda i: b[i].mean() / a[i].mean()),
    ):
        ends = np.percentile([value(i) for i in draws], [2.5, 97.5])
        assert here[[name, f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(
            [value(range(8)), *ends], abs=1e-12
        )
    assert row[["patients", "valid", "pairs", "dropped", "seeds"]].tolist() == [8, 8, 8, 0, 1]
    assert base[["difference", "ratio", "p_wilcoxon", "p_holm", "d_z"]].isna().all()


def test_tests_and_effects_equal_those_of_scipy_and_by_hand(table):
    rows = table.loc[("empty=nan", "dice", "synthetic")]
    p = {}
    for entity in ("core", "oedema", "TC"):
        a, b = np.array(REAL[entity]), np.array(SYNTHETIC[entity])
        p[entity] = stats.wilcoxon(a, b).pvalue
        assert rows.loc[entity, "p_wilcoxon"] == pytest.approx(p[entity], abs=1e-12)
        assert rows.loc[entity, "d_z"] == pytest.approx((b - a).mean() / (b - a).std(ddof=1))
    # core: the differences -10, -2, -10, -30, -4, -6, 1, -7 hundredths; the ranks against sum up to 35, for to 1
    assert rows.loc["core", "rank_biserial"] == pytest.approx((1 - 35) / 36)
    assert rows.loc["oedema", "rank_biserial"] == -1
    assert rows.loc["TC", "rank_biserial"] == 1
    assert rows.loc["WT", ["difference", "ratio", "p_wilcoxon", "d_z", "rank_biserial"]].tolist() == [0, 1, 1, 0, 0]
    # Holm over five entities: oedema and TC have the smallest p, then core, enhancing, WT
    assert p["oedema"] == p["TC"] == 2 / 2**8
    assert rows.loc["oedema", "p_holm"] == rows.loc["TC", "p_holm"] == pytest.approx(5 * p["oedema"])
    assert rows.loc["core", "p_holm"] == pytest.approx(max(3 * p["core"], 5 * p["oedema"]))
    assert rows.loc["WT", "p_holm"] == 1


def test_patients_without_a_value_in_one_arm_are_dropped_and_counted_and_kept_by_the_other_convention(table):
    row = table.loc[("empty=nan", "dice", "synthetic", "enhancing")]
    assert row[["valid", "pairs", "dropped"]].tolist() == [7, 6, 2]
    assert table.loc[("empty=nan", "dice", "real", "enhancing"), "valid"] == 7
    kept = [0, 2, 4, 5, 6, 7]
    a, b = np.array(REAL["enhancing"])[kept], np.array(SYNTHETIC["enhancing"])[kept]
    assert row["ratio"] == pytest.approx(b.mean() / a.mean())
    assert row["p_wilcoxon"] == pytest.approx(stats.wilcoxon(a, b).pvalue)
    one = table.loc[("empty=one", "dice", "synthetic", "enhancing")]
    assert one[["valid", "pairs", "dropped"]].tolist() == [8, 8, 0]
    filled = [np.nan_to_num(arm["enhancing"], nan=1.0) for arm in (REAL, SYNTHETIC)]
    assert one["difference"] == pytest.approx(filled[1].mean() - filled[0].mean())
    pd.testing.assert_series_equal(table.loc[("empty=nan", "dice", "synthetic", "ET")], row, check_names=False)


def test_other_metrics_are_compared_under_the_convention_of_the_results(table):
    assert table.loc[("empty=nan", "hd95_mm", "synthetic", "core"), "mean"] == pytest.approx(
        5 * np.mean(SYNTHETIC["core"])
    )
    assert table.loc[("empty=nan", "volume_error_abs_ml", "real", "core"), "mean"] == pytest.approx(
        2 * np.mean(REAL["core"])
    )
    assert {metric for convention, metric, *_ in table.index if convention == "empty=one"} == {"dice"}
    assert {*DISTANCES, "nsd_1mm", "lesion_f1"} <= {metric for _, metric, *_ in table.index}


def test_holm_corrects_over_all_arms(two, table, tmp_path):
    third = write_results(tmp_path / "third", SYNTHETIC)
    three = compared([*two, third], tmp_path / "out").loc[("empty=nan", "dice")]
    for arm in ("synthetic", "third"):  # four equal p instead of two, among ten tests instead of five
        assert three.loc[(arm, "oedema"), "p_holm"] == pytest.approx(10 * 2 / 2**8)
    assert table.loc[("empty=nan", "dice", "synthetic", "oedema"), "p_holm"] == pytest.approx(5 * 2 / 2**8)


def shifted(dice, amounts):
    return {entity: list(np.clip(np.array(values) + amounts, 0, 1)) for entity, values in dice.items()}


def test_seeds_are_averaged_for_tests_and_resampled_for_intervals(tmp_path):
    lucky = {"r0": shifted(REAL, 0.04), "r1": shifted(REAL, -0.04)}
    real = [write_results(tmp_path / name, dice) for name, dice in lucky.items()]
    synthetic = [
        write_results(tmp_path / name, shifted(SYNTHETIC, x)) for name, x in (("s0", 0), ("s1", -0.1), ("s2", 0.1))
    ]
    both = compared({"real": real, "synthetic": synthetic}, tmp_path / "both").loc[("empty=nan", "dice")]
    row = both.loc[("synthetic", "oedema")]
    a = np.array([lucky[name]["oedema"] for name in lucky]).T
    b = np.array([shifted(SYNTHETIC, x)["oedema"] for x in (0, -0.1, 0.1)]).T
    assert both.loc[("real", "oedema"), "seeds"] == 2
    assert row[["seeds", "patients", "pairs"]].tolist() == [3, 8, 8]
    assert row["mean"] == pytest.approx(b.mean())
    assert row["p_wilcoxon"] == pytest.approx(stats.wilcoxon(a.mean(axis=1), b.mean(axis=1)).pvalue)
    difference = b.mean(axis=1) - a.mean(axis=1)
    assert row["d_z"] == pytest.approx(difference.mean() / difference.std(ddof=1))
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 8, (2000, 8))
    of_a, of_b = rng.integers(0, 2, (2000, 2)), rng.integers(0, 3, (2000, 3))
    draws = [b[p][:, y].mean() - a[p][:, x].mean() for p, x, y in zip(patients, of_a, of_b, strict=True)]
    low, high = np.percentile(draws, [2.5, 97.5])
    assert row[["difference_low", "difference_high"]].tolist() == pytest.approx([low, high], abs=1e-12)
    averaged = np.array([difference[p].mean() for p in patients])
    assert high - low > 1.5 * np.ptp(np.percentile(averaged, [2.5, 97.5]))


def test_time_points_of_a_patient_are_one_value(tmp_path):
    cases = ["A-0", "A-1", "B-0", "C-0"]
    arms = []
    for name, values in (("a", [0.9, 0.7, 0.6, 0.5]), ("b", [0.5, 0.7, 0.5, 0.3])):
        arms.append(write_results(tmp_path / name, dict.fromkeys(CLASSES, values), cases=cases))
    row = compared(arms, tmp_path / "out").loc[("empty=nan", "dice", "b", "core")]
    assert row[["patients", "pairs"]].tolist() == [3, 3]
    assert row["difference"] == pytest.approx(((0.6 - 0.8) + (0.5 - 0.6) + (0.3 - 0.5)) / 3)


def test_the_command_line_prints_pairs_dropped_and_conventions(two, tmp_path, capsys):
    main(["compare", *map(str, two), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "Baseline: real. 8 patients. Seeds: real 1, synthetic 1." in shown
    assert "nan (absent from both: left out of the mean; absent from one: Dice 0" in shown
    blocks = shown.split("\n\n")
    nan = next(block for block in blocks if block.startswith("Dice (nan): synthetic against real"))
    one = next(block for block in blocks if block.startswith("Dice (one): synthetic against real"))
    enhancing = [next(line for line in block.splitlines() if line.startswith("enhancing")) for block in (nan, one)]
    assert [line.split()[-2:] for line in enhancing] == [["6", "2"], ["8", "0"]]
    row = (
        pd.read_csv(tmp_path / "out/compare.csv")
        .set_index(["metric", "arm", "entity"])
        .loc[("dice", "synthetic", "oedema")]
        .iloc[0]
    )
    interval = f"{row['difference']:.3f} ({row['difference_low']:.2f} to {row['difference_high']:.2f})"
    assert interval in next(line for line in nan.splitlines() if line.startswith("oedema"))
    content = json.loads((tmp_path / "out/compare.json").read_text())
    assert content["arms"]["synthetic"] == [str(two[1] / "evaluation")]
    assert content["patients"] == 8
    assert next(row for row in content["comparison"] if row["arm"] == "real")["ratio"] is None
    main(["compare", f"{{a: [{two[0]}], b: [{two[1]}]}}", f"--out={tmp_path / 'named'}"])
    assert "Baseline: a. 8 patients. Seeds: a 1, b 1." in capsys.readouterr().out


def test_figures_are_drawn_for_any_number_of_arms_and_structures_nobody_has(two, tmp_path):
    nothing = write_results(tmp_path / "nothing", {**SYNTHETIC, "enhancing": [NAN] * 8})
    compare([*two, nothing], tmp_path / "out")
    drawn = sorted(path.name for path in (tmp_path / "out/figures").iterdir())
    assert drawn == ["dice.png", "hd95_mm.png", "lesion_f1.png", "nsd_1mm.png"]


def test_all_that_cannot_be_compared_is_named_at_once(two, tmp_path):
    real, synthetic = two
    fewer = write_results(tmp_path / "fewer", {name: values[:6] for name, values in REAL.items()}, cases=PATIENTS[:6])
    other = write_results(tmp_path / "other", REAL, reference_sha256="another")
    conventions = write_results(tmp_path / "conventions", REAL, "one", "pooled")
    slices = write_results(tmp_path / "slices", REAL, slices="23-98")
    with pytest.raises(ValueError, match="These results cannot be compared") as error:
        read_arms([real, fewer, other, synthetic, conventions, slices])
    assert str(error.value).splitlines()[1:] == [
        f"{fewer} and {real}: judged on different cases; only one of them has P6, P7.",
        f"{other} and {real}: judged against other references of P0, P1, P2, P3, P4 and 3 more.",
        f"{conventions} and {real}: convention empty is one and nan. Run `standin evaluate` again with --empty.",
        f"{conventions} and {real}: convention hausdorff is pooled and maxdir. Run `standin evaluate` again with "
        "--hausdorff.",
        f"{slices} and {real}: judged against other slices of P0, P1, P2, P3, P4 and 3 more.",
    ]
    with pytest.raises(ValueError, match=r"there is no summary.json") as error:
        read_arms({"real": [real], "gone": [tmp_path / "gone-0", tmp_path / "gone-1"]})
    assert "standin evaluate" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("kind", ["one arm", "a folder twice", "no folder", "two arms of one name"])
def test_arms_must_be_several(two, tmp_path, kind):
    real = two[0]
    arms = {
        "one arm": [real],
        "a folder twice": {"a": [real], "b": [real]},
        "no folder": {"a": [real], "b": []},
        "two arms of one name": [real, tmp_path / "real"],
    }[kind]
    with pytest.raises(ValueError, match="Expected two or more arms of different names"):
        read_arms(arms)


def test_a_damaged_table_is_refused(two, tmp_path):
    folder = write_results(tmp_path / "damaged", REAL)
    table = pd.read_csv(folder / "per_patient.csv")
    pd.concat([table, table[:1]]).to_csv(folder / "per_patient.csv", index=False)
    with pytest.raises(ValueError, match=r"damaged/per_patient.csv: expected the columns .* each case and entity once"):
        read_arms([two[0], folder])
