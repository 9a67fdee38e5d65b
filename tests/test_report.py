"""The report of a small invented study: its numbers, its words, its files, and what it refuses."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from fake_study import SLICES_PER_PATIENT, SPLITS, shard, write_generator, write_real, write_segmenter

from study.report import summary_table, warnings, write_report
from study.results import dice_table, memorization_table, ratio_table, read_study

NAN = float("nan")
REAL = {
    "P007": (0.80, 0.70, 0.90, 0.85, 0.80, 0.90),
    "P008": (0.60, 0.50, NAN, 0.75, 0.60, NAN),
    "P009": (0.70, 0.90, 0.80, 0.95, 0.75, 0.80),
    "P010": (0.50, 0.60, 0.40, 0.65, 0.55, 0.40),
}
SYNTHETIC = {
    "P007": (0.60, 0.65, 0.70, 0.80, 0.70, 0.70),
    "P008": (0.40, 0.50, 0.00, 0.70, 0.50, 0.00),
    "P009": (0.65, 0.70, 0.75, 0.90, 0.70, 0.75),
    "P010": (0.30, 0.55, 0.35, 0.60, 0.45, 0.35),
}
N_HELD_OUT = SPLITS["val"] * SLICES_PER_PATIENT
R_HELD_OUT = np.linspace(0.80, 0.90, N_HELD_OUT)
R_SYNTHETIC = np.concatenate([np.linspace(0.70, 0.88, 27), [0.91, 0.95, 0.999]])


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_real(root / "real")
    write_generator(root / "gan", root / "real", R_SYNTHETIC, R_HELD_OUT)
    write_segmenter(root / "seg-real", [root / "real"], REAL)
    write_segmenter(root / "seg-synthetic", [root / "gan/synthetic"], SYNTHETIC)
    write_segmenter(root / "seg-both", [root / "real", root / "gan/synthetic"], REAL)
    return root


def arguments(root):
    return root / "real", [root / "gan"], [root / f"seg-{arm}" for arm in ("both", "synthetic", "real")]


@pytest.fixture(scope="module")
def report(study_folder):
    return write_report(study_folder / "report", *arguments(study_folder))


@pytest.fixture(scope="module")
def text(report):
    """What a reader sees: the page without styles and tags, white space folded."""
    page = re.sub(r"<style>.*?</style>|<[^>]*>", " ", report.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", page.replace("&nbsp;", " ").replace("’", "'"))


def class_mean(dice):
    return np.array([np.nanmean(values[:3]) for values in dice.values()])


def test_the_answer_states_the_ratio_of_mean_dice_and_its_patients(text):
    real, synthetic = class_mean(REAL), class_mean(SYNTHETIC)
    indices = np.random.default_rng(0).integers(0, 4, (2000, 4))
    low, high = np.percentile([synthetic[i].mean() / real[i].mean() for i in indices], [2.5, 97.5])
    assert (
        "Trained only on the synthetic slices of gan, the segmenter reaches "
        f"{100 * synthetic.mean() / real.mean():.1f} % (95 % interval {100 * low:.0f} to {100 * high:.0f} %) of the "
        f"Dice of training on real slices ({synthetic.mean():.3f} against {real.mean():.3f}; mean of the three "
        "classes, 4 unseen patients)."
    ) in text
    assert "Trained on real slices and those of gan together, the segmenter reaches 100.0 %" in text


def test_the_answer_compares_memorization_with_the_held_out_patients(text):
    threshold = np.quantile(R_HELD_OUT, 0.95)
    above = np.mean([r > threshold for r in R_SYNTHETIC])
    assert (
        "The synthetic slices of gan are not measurably nearer to the training slices than unseen patients are" in text
    )
    assert f"largest correlation {np.median(R_SYNTHETIC):.3f} (median) against 0.850 for held-out patients" in text
    assert f"{100 * above:.1f} % (95 % interval" in text
    assert "3 of 30 are nearer than every held-out slice: look at the nearest pairs below." in text


def test_a_generator_that_copies_is_called_nearer_than_unseen_patients(study_folder, tmp_path):
    write_generator(tmp_path / "copier", study_folder / "real", np.full(30, 0.99), R_HELD_OUT)
    page = write_report(tmp_path / "report", study_folder / "real", [tmp_path / "copier"], []).read_text()
    assert "The synthetic slices of copier are nearer to the training slices than unseen patients are" in page
    assert "No segmenter was given, so nothing is said about usefulness." in page


def test_few_patients_are_named(text):
    assert "Only 4 test patients (fewer than 20)" in text
    assert "The null of the memorization check comes from only 3 held-out patients." in text


def test_tables_hold_means_of_defined_values_and_the_other_convention(report):
    dice = pd.read_csv(report.parent / "tables/dice.csv").set_index(["arm", "entity"])
    enhancing = dice.loc[("real", "enhancing")]
    assert (enhancing["patients"], enhancing["valid"]) == (4, 3)
    assert enhancing["dice"] == pytest.approx((0.9 + 0.8 + 0.4) / 3)
    assert enhancing["dice_empty_one"] == pytest.approx((0.9 + 1.0 + 0.8 + 0.4) / 4)
    assert dice.loc[("synthetic", "enhancing"), "dice"] == pytest.approx((0.7 + 0.0 + 0.75 + 0.35) / 4)
    assert dice.loc[("synthetic", "WT"), "dice"] == pytest.approx(0.75)
    assert dice.loc[("real", "mean of classes"), "dice"] == pytest.approx(class_mean(REAL).mean())
    assert [arm for arm, entity in dice.index if entity == "WT"] == ["real", "synthetic", "real + synthetic"]

    ratio = pd.read_csv(report.parent / "tables/ratio_to_real.csv").set_index(["arm", "entity"])
    enhancing = ratio.loc[("synthetic", "enhancing")]
    assert (enhancing["pairs"], enhancing["dropped"]) == (3, 1)
    assert enhancing["ratio"] == pytest.approx((0.7 + 0.75 + 0.35) / (0.9 + 0.8 + 0.4))
    assert enhancing["ratio_empty_one"] == pytest.approx((0.7 + 0.0 + 0.75 + 0.35) / (0.9 + 1.0 + 0.8 + 0.4))
    assert ratio.loc[("synthetic", "WT"), "ratio"] == pytest.approx(3.0 / 3.2)
    assert ratio.loc[("real + synthetic", "WT"), "p_wilcoxon"] == 1.0

    counts = pd.read_csv(report.parent / "tables/dice_per_patient.csv").set_index(["arm", "patient", "entity"])
    assert counts.loc[("synthetic", "P008", "core"), ["tp", "fp", "fn"]].tolist() == [400, 600, 600]


def test_tables_hold_memorization_and_tumour_sizes(report, study_folder):
    row = (
        pd.read_csv(report.parent / "tables/memorization.csv")
        .set_index(["generator", "image"])
        .loc[("gan", "all four")]
    )
    assert (row["slices"], row["held_out_slices"], row["held_out_patients"]) == (30, N_HELD_OUT, 3)
    assert row["q95_held_out"] == pytest.approx(np.quantile(R_HELD_OUT, 0.95))
    assert row["max"] == pytest.approx(0.999)
    assert row["share_above_max"] == pytest.approx(0.1)
    assert row["smallest_p"] == pytest.approx(1 / (1 + N_HELD_OUT))

    labels = shard(study_folder / "real")[: SPLITS["train"] * SLICES_PER_PATIENT, 4]
    oedema = (labels == 2).sum(axis=(1, 2))
    classes = pd.read_csv(report.parent / "tables/classes.csv").set_index(["set", "class"])
    row = classes.loc[("real (training split)", "oedema")]
    assert row["share_with_class"] == pytest.approx((oedema > 0).mean())
    assert row["mean_area_cm2"] == pytest.approx(oedema[oedema > 0].mean() * 4.0**2 / 100)
    assert (
        classes.loc[("gan", "tumour"), "slices_with_class"]
        == (shard(study_folder / "gan/synthetic")[:, 4] > 0).any(axis=(1, 2)).sum()
    )


def test_the_page_shows_the_numbers_of_the_tables(text, report):
    dice = pd.read_csv(report.parent / "tables/dice.csv")
    for _, row in dice[dice["entity"] != "ET"].iterrows():
        assert f"{row['dice']:.3f} {row['ci_low']:.2f}–{row['ci_high']:.2f}" in text
    assert "no kept" not in text
    for words in ("Pearson correlation", "left out of the mean", "Only the slices that standin prepare kept enter"):
        assert words in text


def test_the_page_loads_nothing_from_elsewhere_and_holds_its_figures(report):
    page = report.read_text()
    sources = re.findall(r"""(?:src|srcset|href)\s*=\s*["']([^"']{0,30})""", page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import|<script", page)
    drawn = {path.stem for path in (report.parent / "figures").glob("*.png")}
    assert drawn == {"dice_per_patient", "ratio_to_real", "classes", "memorization-gan", "nearest-gan", "examples-gan"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (report.parent / "figures").glob("*.png"))
    charts = {path.stem for path in (report.parent / "figures").glob("*.svg")}
    assert charts == {"dice_per_patient", "ratio_to_real", "classes", "memorization-gan"}
    assert page.count("<figure") == len(drawn)
    assert not list(report.parent.rglob("*.tmp"))


def test_the_summary_for_the_terminal_has_every_arm_with_interval_and_the_null(report):
    summary = summary_table(report.parent).replace("\u00a0", " ")
    dice = pd.read_csv(report.parent / "tables/dice.csv").set_index(["arm", "entity"])
    row = dice.loc[("synthetic", "oedema")]
    assert f"{row['dice']:.3f} ({row['ci_low']:.2f}–{row['ci_high']:.2f})" in summary
    assert re.search(r"real +synthetic +real \+ synthetic\n", summary)
    assert re.search(
        r"synthetic +0\.\d{3} +0\.\d{3} +0\.999 +30\n +held-out real +0\.850 +0\.\d{3} +0\.900 +18\n", summary
    )
    assert f"{100 * 3.0 / 3.2:.1f} %" in summary
    assert max(map(len, summary.splitlines())) < 100


def test_runs_that_differ_in_the_seed_alone_are_one_arm(study_folder, tmp_path):
    real, root = study_folder / "real", study_folder
    write_generator(tmp_path / "diffusion", real, R_SYNTHETIC, R_HELD_OUT, slices=shard(root / "gan/synthetic")[::-1])

    def write(name, source, dice, seed, *words):
        command = [
            "train.py",
            "--config",
            "unet.yaml",
            "--run_dir",
            f"runs/{name}",
            f"--seed_everything={seed}",
            *words,
        ]
        write_segmenter(tmp_path / name, [source], dice, seed=seed, command=command)

    better = {patient: [min(1.0, v + 0.1) for v in values] for patient, values in REAL.items()}
    write("r-seed0", real, REAL, 0)
    write("r-seed1", real, better, 1)
    write("g-0", root / "gan/synthetic", SYNTHETIC, 0, "--data.train", f"[{{path: {root}/gan/synthetic, amount: 9}}]")
    write("g-1", root / "gan/synthetic", SYNTHETIC, 1, "--data.train", f"[{{path: {root}/other, amount: 9}}]")
    write("few-1", root / "gan/synthetic", SYNTHETIC, 1, "--data.train", f"[{{path: {root}/gan/synthetic, amount: 5}}]")
    write("d-0", tmp_path / "diffusion/synthetic", SYNTHETIC, 0)
    write("again-0", tmp_path / "diffusion/synthetic", SYNTHETIC, 0)
    folders = [tmp_path / name for name in ("d-0", "g-0", "few-1", "g-1", "r-seed1", "again-0", "r-seed0")]
    study = read_study(real, [root / "gan", tmp_path / "diffusion"], folders)
    assert {arm.name: [one.name for one in arm.segmenters] for arm in study.arms} == {
        "real": ["r-seed1", "r-seed0"],
        "synthetic (diffusion): d-0": ["d-0"],
        "synthetic (diffusion): again-0": ["again-0"],
        "synthetic (gan): g": ["g-0", "g-1"],
        "synthetic (gan): few-1": ["few-1"],
    }
    assert {arm.name: base.name for arm, base in study.compared()} == dict.fromkeys(
        [arm.name for arm in study.arms if arm.name != "real"], "real"
    )
    row = dice_table(study).set_index(["arm", "entity"]).loc[("real", "WT")]
    both = np.array([[REAL[patient][3], better[patient][3]] for patient in sorted(REAL)])
    assert row["seeds"] == 2
    assert row["dice"] == pytest.approx(np.nanmean(both), abs=1e-3)
    assert row["sd_seeds"] == pytest.approx(np.nanmean(both, axis=0).std(ddof=1), abs=1e-3)
    ratio = ratio_table(study).set_index(["arm", "entity"]).loc[("synthetic (gan): g", "WT"), "ratio"]
    synthetic = np.array([SYNTHETIC[patient][3] for patient in sorted(REAL)])
    assert ratio == pytest.approx(synthetic.mean() / both.mean(), abs=1e-3)


def test_runs_that_mix_commits_or_data_are_pointed_out(study_folder, tmp_path):
    root = study_folder
    write_segmenter(tmp_path / "seg", [root / "real"], REAL, git_commit="fedcba98", git_dirty=True)
    old = {"root": "old/synthetic", "kind": "synthetic", "slices": 3, "fingerprint": "0ld0ld0ld"}
    write_segmenter(tmp_path / "other", [], SYNTHETIC, training_sets=[old])
    said = warnings_of(root / "real", [root / "gan"], [tmp_path / "seg", tmp_path / "other"])
    assert "The runs come from different versions of the program (commits 01234567, fedcba98)." in said
    assert "Made with uncommitted changes of the program: seg." in said
    assert "other was trained on old/synthetic (fingerprint 0ld0ld0l), which is not the set of any generator" in said


def test_test_patients_from_the_training_split_are_pointed_out(study_folder, tmp_path):
    dice = dict(zip(("P000", "P008", "P009", "X"), REAL.values(), strict=True))
    write_segmenter(tmp_path / "seg", [study_folder / "real"], dice)
    said = warnings_of(study_folder / "real", [study_folder / "gan"], [tmp_path / "seg"])
    assert "1 test patients are in the training split" in said
    assert "1 test patients are not in" in said
    assert "Generators were trained on 1 of the test patients: P000." in said


def test_a_weak_segmenter_of_real_slices_is_pointed_out(study_folder, tmp_path):
    for name, value in (("seg", 0.5), ("weak", 0.25)):
        dice = dict.fromkeys(REAL, (value,) * 6)
        write_segmenter(tmp_path / name, [study_folder / "real"], dice, command=["train.py", f"--model.name={name}"])
    said = warnings_of(study_folder / "real", [], [tmp_path / "seg", tmp_path / "weak"])
    assert "The segmenter trained on real slices (real: weak) has learned little: its Dice is 0.250." in said
    assert said.count("has learned little") == 1


def warnings_of(*folders):
    study = read_study(*folders)
    return "\n".join(warnings(study, memorization_table(study)))


def test_every_missing_file_is_named_with_the_command_that_makes_it(study_folder, tmp_path):
    shutil.copytree(study_folder / "gan", tmp_path / "gan")
    (tmp_path / "gan/memorization.csv").unlink()
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="The report lacks files") as error:
        write_report(tmp_path / "report", study_folder / "real", [tmp_path / "gan"], [tmp_path / "new"])
    message = str(error.value)
    assert f"{tmp_path}/gan/memorization.csv, which `python train.py --config configs/gan.yaml` writes" in message
    assert f"{tmp_path}/new/dice_per_patient.csv, which `python train.py --config" in message
    assert not (tmp_path / "report").exists()
    with pytest.raises(ValueError, match="standin prepare"):
        write_report(tmp_path / "report", tmp_path / "nowhere", [], [])


def test_what_does_not_fit_together_is_refused(study_folder, tmp_path):
    root = study_folder
    write_segmenter(tmp_path / "fewer", [root / "real"], {"P007": REAL["P007"]})
    with pytest.raises(ValueError, match=r"different patients \(P008, P009, P010 in one of them only\)"):
        read_study(root / "real", [], [root / "seg-real", tmp_path / "fewer"])
    shutil.copytree(root / "gan", tmp_path / "gan")
    shutil.copy(root / "seg-real/dice_per_patient.csv", tmp_path / "gan")
    with pytest.raises(ValueError, match="Expected a segmenter run at"):
        read_study(root / "real", [], [tmp_path / "gan"])
    with pytest.raises(ValueError, match="different names, but several are called seg-real"):
        read_study(root / "real", [], [root / "seg-real", root / "seg-real"])
    table = pd.read_csv(tmp_path / "gan/memorization.csv")
    table.assign(nearest_patient="P003").to_csv(tmp_path / "gan/memorization.csv", index=False)
    with pytest.raises(ValueError, match="nearest patients are not those of the training split"):
        read_study(root / "real", [tmp_path / "gan"], [])
    table.assign(position=table["position"] + 10).to_csv(tmp_path / "gan/memorization.csv", index=False)
    with pytest.raises(ValueError, match=r"positions 0\.\.29, but found 30 rows up to 39"):
        read_study(root / "real", [tmp_path / "gan"], [])


def test_a_generator_of_constant_images_still_gets_a_report(study_folder, tmp_path):
    black = np.zeros((4, 5, 16, 16), np.uint8)
    write_generator(tmp_path / "dead", study_folder / "real", [NAN] * 4, R_HELD_OUT, slices=black)
    table = pd.read_csv(tmp_path / "dead/memorization.csv")
    table.loc[table["set"] == "synthetic", ["nearest", "nearest_patient"]] = [-1, ""]
    table.to_csv(tmp_path / "dead/memorization.csv", index=False)
    index = write_report(tmp_path / "report", study_folder / "real", [tmp_path / "dead"], [])
    assert "memorization is undefined" in index.read_text()
    assert "Memorization of dead" in summary_table(index.parent)
