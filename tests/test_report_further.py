"""What a report shows besides Dice and largest correlations: distances, curves, quality, search, costs, many arms."""

import html
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from fake_study import ENTITIES, write_generator, write_real, write_segmenter

from callbacks.curves import CurvesCSV
from datamodules.slice_set import read_manifest
from metrics.segmentation import COUNTS
from metrics.volumes import METRICS
from study.report import summary_table, write_report

DIAGONAL = 100.0
PATIENTS = ("P007", "P008", "P009", "P010")
HD95 = {"real": (2.0, 4.0, np.inf, 6.0), "synthetic": (3.0, 5.0, 7.0, 9.0)}
DICE = {"real": 0.8, "synthetic": 0.6}


def write_distances(folder, hd95):
    """The files of a judgement in which every entity of a patient has the same HD95."""
    names = ("case", "patient", "slices", "prediction_file", "reference_file", "prediction_sha256", "reference_sha256")
    rows = [
        dict.fromkeys(names, patient)
        | dict.fromkeys([*COUNTS, *METRICS], 0.5)
        | {"hd95_mm": value, "entity": entity, "tp": int(value < np.inf), "fp": 0, "fn": 1, "diagonal_mm": DIAGONAL}
        | ({"fn": 0, "tp": 0} if np.isnan(value) else {})
        for patient, value in zip(PATIENTS, hd95, strict=True)
        for entity in ENTITIES
    ]
    (folder / "evaluation").mkdir()
    pd.DataFrame(rows).to_csv(folder / "evaluation" / "per_patient.csv", index=False)
    conventions = {"conventions": {"empty": "nan", "hausdorff": "maxdir"}}
    (folder / "evaluation" / "summary.json").write_text(json.dumps(conventions))


def write_curve(folder, values):
    logger = CurvesCSV(str(folder))
    for epoch, value in enumerate(values):
        logger.log_metrics({"dice/val": value, "epoch": epoch}, 100 * (epoch + 1))
    logger.log_metrics({"dice/test/WT": 0.5, "epoch": 9}, 7)


def write_quality(generator, **changes):
    row = {"score": "Fréchet distance", "value": 12.5, "real": 4.25, "better": "lower", "blind_to": "memorization"}
    row["fingerprint"] = read_manifest(generator / "synthetic").fingerprint
    row["real_fingerprint"] = read_manifest(generator.parent / "real").fingerprint
    (generator / "quality").mkdir(exist_ok=True)
    table = pd.DataFrame([row | {"features": "imagenet"} | changes])
    table.to_csv(generator / "quality" / "quality.csv", index=False)


def write_search(generator):
    folder = generator / "nearest"
    folder.mkdir()
    roots = {"synthetic": generator / "synthetic", "training": generator.parent / "real"}
    search = {"sets": {name: {"fingerprint": read_manifest(root).fingerprint} for name, root in roots.items()}}
    search |= {"false_alarm_rate": 0.01, "mirror": True, "max_shift_px": 2, "planted": 8}
    (folder / "search.json").write_text(json.dumps(search))
    numbers = {"slices": 30, "median": 1.5, "median_held_out": 0.5, "max": 9.0, "max_held_out": 3.0}
    numbers |= {"share": 0.2, "ci_low": 0.1, "ci_high": 0.3}
    scores = ("T1", "all", "joint")
    pd.DataFrame([{"score": score, **numbers} for score in scores]).to_csv(folder / "judgement.csv", index=False)
    found = {"kind": ["exact", "label_removed"], "false_alarm_rate": 0.01, "rate": [1.0, 0.25], "slices": 8}
    pd.DataFrame(found | {"ci_low": 0.2, "ci_high": 1.0}).to_csv(folder / "sensitivity.csv", index=False)
    patients = {"patient": ["P000", "P001", "P002", "P003"], "suspicious": [5, 1, 0, 0]}
    pd.DataFrame(patients).to_csv(folder / "patients.csv", index=False)


@pytest.fixture
def study(tmp_path):
    real, generator = tmp_path / "real", tmp_path / "gan"
    write_real(real)
    write_generator(generator, real, np.linspace(0.7, 0.9, 30), np.linspace(0.8, 0.9, 18), images_seen=3600)
    write_quality(generator)
    write_search(generator)
    cost = {"images": 20, "seconds": 5.0, "evaluations_per_image": 35, "processes": 2}
    (generator / "emission.json").write_text(json.dumps(cost))
    parts = {"real": [real], "synthetic": [generator / "synthetic"]}
    for name, dice in DICE.items():
        write_segmenter(tmp_path / f"unet-{name}", parts[name], dict.fromkeys(PATIENTS, (dice,) * 6))
        write_distances(tmp_path / f"unet-{name}", HD95[name])
        write_curve(tmp_path / f"unet-{name}", [0.1, dice])
    return tmp_path


def written(study):
    segmenters = sorted(study.glob("unet-*"))
    return write_report(study / "report", study / "real", [study / "gan"], segmenters)


def text_of(index):
    page = re.sub(r"<style>.*?</style>|<[^>]*>", " ", index.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(page).replace("\u00a0", " "))


def table(index, name):
    return pd.read_csv(index.parent / "tables" / f"{name}.csv")


def test_the_headline_says_that_a_set_does_not_stand_in_and_its_risk(study):
    text = text_of(written(study))
    assert (
        "The synthetic set does not stand in for the real one: trained on these slices alone, unet-synthetic reaches a "
        "Dice of 0.600 against 0.800, a price of 0.200 and 75.0 % (95 % interval 75 to 75 %) of the real Dice, where "
        "the paper's least is 80 %. The risk: 20.0 % (95 % interval 10 to 30 %) of the slices of gan are suspiciously "
        "near to training slices, where chance puts 1.0 %: more than chance."
    ) in text
    assert (
        "They come near to 2 of 4 training patients. Copies that it finds in less than half of the cases: label" in text
    )


@pytest.mark.parametrize(
    ("dice", "words"),
    [
        ((0.7, 0.7, 0.7, 0.7), "The slices of gan stand in for the real ones: trained"),
        ((0.9, 0.7, 0.9, 0.9), "The slices of gan stand in for the real ones: trained"),
        ((0.9, 0.2, 0.9, 0.7), "Whether the slices of gan stand in for the real ones cannot be said with 4 patients"),
        ((0.9, 0.9, 0.9, 0.9), "a gain of 0.100"),
    ],
)
def test_the_headline_is_decided_by_the_whole_interval(study, dice, words):
    shutil.rmtree(study / "unet-synthetic")
    of_patients = {patient: (value,) * 6 for patient, value in zip(PATIENTS, dice, strict=True)}
    write_segmenter(study / "unet-synthetic", [study / "gan" / "synthetic"], of_patients)
    assert words in text_of(written(study))


def test_a_search_that_finds_nothing_does_not_hide_what_the_other_finds(study):
    shutil.rmtree(study / "gan")
    write_generator(study / "gan", study / "real", np.full(30, 0.99), np.linspace(0.8, 0.9, 18))
    text = text_of(written(study))
    assert (
        "The risk is unknown: `standin memorization` has not searched these slices. As they are, 100.0 % (95 %" in text
    )


def test_an_arm_is_compared_with_the_real_one_of_the_same_settings(tmp_path):
    """Recipes differ between arms anyway; what else differs must not be booked to the synthetic slices."""
    write_real(tmp_path / "real")
    write_generator(tmp_path / "gan", tmp_path / "real", np.linspace(0.7, 0.9, 30), np.linspace(0.8, 0.9, 18))
    recipes = {"real": "[{path: R}]", "synthetic": "[{path: S}]", "both": "[{path: R}, {path: S}]"}
    sets = {"real": [tmp_path / "real"], "synthetic": [tmp_path / "gan/synthetic"]}
    sets["both"] = sets["real"] + sets["synthetic"]
    more = {"synthetic": ["--data.validation", "synthetic", "--data.val_fraction", "0.1"]}
    for augmentation in ("null", "PaperAugmentation"):
        for kind, recipe in recipes.items():
            name = f"unet-{kind}-{augmentation}"
            words = ["--data.augmentation", augmentation, "--data.train", recipe, *more.get(kind, [])]
            dice = dict.fromkeys(PATIENTS, (0.8 if augmentation == "null" else 0.9,) * 6)
            write_segmenter(tmp_path / name, sets[kind], dice, command=["train.py", *words])
    ratios = table(written(tmp_path), "ratio_to_real")
    assert len(set(ratios["arm"])) == 4
    for arm, baseline in zip(ratios["arm"], ratios["baseline"], strict=True):
        assert baseline == f"real: {arm.rpartition(': ')[2]}"
    assert ratios["ratio"].tolist() == pytest.approx([1.0] * len(ratios))


def test_arms_have_names_of_their_own(tmp_path):
    write_real(tmp_path / "real")
    for name, rate, seed in (("unet", "1", 0), ("unet-1", "2", 0), ("unet-2", "2", 1)):
        words = ["train.py", "--model.lr", rate]
        dice = dict.fromkeys(PATIENTS, (0.5,) * 6)
        write_segmenter(tmp_path / name, [tmp_path / "real"], dice, command=words, seed=seed)
    index = write_report(tmp_path / "report", tmp_path / "real", [], sorted(tmp_path.glob("unet*")))
    assert set(table(index, "dice")["arm"]) == {"real: unet", "real: unet-1, unet-2"}


def test_distances_are_means_in_which_a_missed_structure_counts_as_the_diagonal(study):
    index = written(study)
    rows = table(index, "distances").set_index(["arm", "entity", "metric"])
    real, synthetic = (rows.loc[(arm, "WT", "hd95_mm")] for arm in ("real", "synthetic"))
    assert (real["patients"], real["valid"], real["mean"]) == (4, 4, (2 + 4 + DIAGONAL + 6) / 4)
    assert (synthetic["valid"], synthetic["mean"]) == (4, 6.0)
    assert "0 of 4 missed, 0 false" in text_of(index)


def test_seeds_of_a_patient_are_one_observation_and_missed_structures_are_counted(study):
    real, none = study / "real", float("nan")
    write_segmenter(study / "unet-real1", [real], dict.fromkeys(PATIENTS, (0.5,) * 6), seed=1)
    folder = study / "unet-real1"
    counts = pd.read_csv(folder / "dice_per_patient.csv")
    missed = (counts["patient"] == "P008") & (counts["entity"] == "core")
    counts.loc[missed, ["tp", "fp", "fn", "dice"]] = [0, 0, 9, 0.0]
    counts.to_csv(folder / "dice_per_patient.csv", index=False)
    write_distances(folder, (4.0, 6.0, none, 8.0))
    shutil.rmtree(study / "unet-real" / "evaluation")
    write_distances(study / "unet-real", (2.0, 4.0, none, 6.0))
    run = json.loads((folder / "run.json").read_text())
    first = json.loads((study / "unet-real" / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"command": first["command"]}))
    rows = table(written(study), "distances").set_index(["arm", "entity", "metric"])
    core = rows.loc[("real", "core", "hd95_mm")]
    assert (core["valid"], core["mean"], core["held"], core["missed"], core["false_positive"]) == (3, 5.0, 8, 1, 0)


def test_curves_quality_search_and_cost_are_tables(study):
    index = written(study)
    curves = table(index, "curves")
    assert set(curves["metric"]) == {"dice/val"}
    one = curves[curves["run"] == "unet-real"]
    assert (one["images_seen"].tolist(), one["value"].tolist()) == ([100, 200], [0.1, 0.8])
    assert table(index, "quality")[["generator", "value", "real"]].values.tolist() == [["gan", 12.5, 4.25]]
    assert table(index, "search")["score"].tolist() == ["all", "joint"]
    cost = table(index, "cost").set_index("run").loc["gan"]
    assert cost["train_images_per_second"] == 3600 / 90
    assert cost["emitted_per_second"] == 4.0
    assert cost["emission_hours"] == pytest.approx(30 / 4 * 2 / 3600)
    assert cost["evaluations_per_image"] == 35
    text = text_of(index)
    assert "Fréchet distance 12.5 4.25 lower memorization" in text
    assert "label removed 25.0 % (20–100)" in text
    assert {p.stem for p in (index.parent / "figures").glob("*.svg")} >= {"hd95_per_patient", "learning_curves"}


def test_scores_of_another_synthetic_set_are_refused(study):
    write_quality(study / "gan", fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"quality\.csv is of another set than .*synthetic"):
        written(study)


def test_runs_without_these_files_have_a_report_without_these_parts(tmp_path):
    write_real(tmp_path / "real")
    write_generator(tmp_path / "gan", tmp_path / "real", np.linspace(0.7, 0.9, 30), np.linspace(0.8, 0.9, 18))
    write_segmenter(tmp_path / "unet-real", [tmp_path / "real"], dict.fromkeys(PATIENTS, (0.8,) * 6))
    text = text_of(written(tmp_path))
    for words in ("Learning curves", "Distances", "Quality in feature spaces", "does not stand in"):
        assert words not in text
    assert "What it cost" in text


def test_many_arms_are_rows(study):
    for number in range(7):
        folder = study / f"unet-more{number}"
        dice = 0.5 + 0.01 * number
        write_segmenter(folder, [study / "gan/synthetic"], dict.fromkeys(PATIENTS, (dice,) * 6))
    index = written(study)
    assert "synthetic: more6 0.560" in text_of(index)
    assert re.search(r"synthetic: more6 +0.560", summary_table(index.parent))
