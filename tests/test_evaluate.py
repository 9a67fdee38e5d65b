"""`standin evaluate`: numbers by hand, every kind of bad input in one message, and no case left out in silence."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from fakes import (
    SHAPE,
    fake_images,
    fake_labels,
    lps_affine,
    write_msd,
    write_nifti,
    write_patient,
    write_patients,
)

from cli import main
from datamodules.prepare import prepare
from evaluation.cases import Case, LabelFile, find_cases
from evaluation.evaluate import evaluate, judge_cases
from evaluation.examples import best_median_worst
from metrics.volumes import judge_volume

REPOSITORY = Path(__file__).resolve().parents[1]
PLAIN = {0: 0, 1: 1, 2: 2, 3: 3}


def block(*corners, value=1):
    """A label map with a box of one class."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[tuple(slice(low, high) for low, high in corners)] = value
    return labels


@pytest.fixture(autouse=True)
def figures_only_where_they_are_tested(request, monkeypatch):
    if "figure" not in request.node.name:
        monkeypatch.setattr("evaluation.evaluate._draw", lambda *args: None)


def write_maps(folder, maps, affine=None):
    for name, labels in maps.items():
        write_nifti(folder / f"{name}.nii.gz", labels, affine)
    return folder


def reference_of(root, name, end="_seg"):
    return np.asarray(nibabel.load(root / name / f"{name}{end}.nii.gz").dataobj)


@pytest.fixture
def three(tmp_path):
    """A BraTS folder with three patients, perfect predictions of them, and the name of a folder for the results."""
    names = write_patients(tmp_path / "brats", 3)
    maps = {name: reference_of(tmp_path / "brats", name) for name in names}
    return write_maps(tmp_path / "predictions", maps), tmp_path / "brats", tmp_path / "out"


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Five cases of one class, of 2 mm voxels, judged by the command line; its folder and what it printed."""
    root = tmp_path_factory.mktemp("by-hand")
    cube, shifted = block((4, 8), (4, 8), (2, 6)), block((5, 9), (4, 8), (2, 6))
    nothing = np.zeros(SHAPE, np.uint8)
    pairs = {
        "equal": (cube, cube),
        "false": (cube, nothing),
        "missed": (nothing, cube),
        "neither": (nothing, nothing),
        "shifted": (shifted, cube),
    }
    write_maps(root / "predictions", {name: pair[0] for name, pair in pairs.items()}, lps_affine(2.0))
    write_maps(root / "references", {name: pair[1] for name, pair in pairs.items()}, lps_affine(2.0))
    out = root / "out"
    evaluate(root / "predictions", root / "references", out, labels="brats2023", workers=1)
    return out


def read_table(out):
    return pd.read_csv(out / "per_patient.csv").set_index(["case", "entity"])


def read_summary(out):
    return pd.read_csv(out / "summary.csv").set_index(["convention", "entity", "metric"])


def test_values_per_patient_are_those_computed_by_hand(by_hand):
    core = read_table(by_hand).xs("core", level="entity")
    diagonal = 2 * np.linalg.norm(SHAPE)
    assert core.loc["equal", ["tp", "fp", "fn", "dice", "hd95_mm"]].tolist() == [64, 0, 0, 1, 0]
    shifted = core.loc["shifted"]
    assert shifted[["tp", "fp", "fn"]].tolist() == [48, 16, 16]
    assert (shifted["dice"], shifted["hd95_mm"], shifted["volume_reference_ml"]) == (0.75, 2.0, 64 * 8 / 1000)
    assert (core.loc["missed", "hd95_mm"], core.loc["false", "dice"]) == (np.inf, 0.0)
    assert core.loc["neither", ["dice", "hd95_mm"]].isna().all()
    assert core["diagonal_mm"].tolist() == pytest.approx([diagonal] * 5)


def test_every_row_names_both_files_by_their_hashes(by_hand):
    table = read_table(by_hand)
    assert len(table) == 5 * 6
    for (case, _), row in table.iterrows():
        for side in ("prediction", "reference"):
            path = by_hand.parent / f"{side}s" / row[f"{side}_file"]
            assert path.name == f"{case}.nii.gz"
            assert row[f"{side}_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    pd.testing.assert_frame_equal(
        pd.read_parquet(by_hand / "per_patient.parquet"), pd.read_csv(by_hand / "per_patient.csv")
    )


def test_the_summary_holds_dice_under_both_conventions_and_the_counts(by_hand):
    summary = read_summary(by_hand)
    dice = summary.loc[("empty=nan", "core", "dice")]
    assert dice["mean"] == pytest.approx((1 + 0 + 0 + 0.75) / 4)
    counts = ["n", "n_valid", "n_both_empty", "n_missed", "n_false_positive"]
    assert dice[counts].tolist() == [5, 4, 1, 1, 1]
    assert summary.loc[("empty=one", "core", "dice"), "mean"] == pytest.approx((1 + 0 + 0 + 1 + 0.75) / 5)
    diagonal = 2 * np.linalg.norm(SHAPE)
    assert summary.loc[("empty=nan", "core", "hd95_mm"), "mean"] == pytest.approx((0 + 2 * diagonal + 2) / 4)
    content = json.loads((by_hand / "summary.json").read_text())
    assert content["conventions"]["empty"] == "nan"
    assert content["conventions"]["hausdorff"] == "maxdir"
    assert "left out" in content["conventions"]["empty_means"]
    assert content["conventions"]["slices"] == "all"
    assert content["conventions"]["labels_of_predictions"] == ["brats2023"]
    assert (content["cases"], content["patients"]) == (5, 5)
    row = next(r for r in content["summary"] if r["entity"] == "oedema" and r["metric"] == "dice")
    assert (row["mean"], row["n_valid"]) == (None, 0)


def test_another_convention_needs_no_new_judgement(by_hand, tmp_path, capsys):
    out = shutil.copytree(by_hand, tmp_path / "out")
    records = {path: path.stat().st_mtime_ns for path in (out / ".judged").iterdir()}
    root = by_hand.parent
    words = [
        f"{root}/predictions",
        f"{root}/references",
        str(out),
        "--labels=brats2023",
        "--empty=brats2023",
        "--workers=1",
    ]
    main(["evaluate", *words])
    assert records == {path: path.stat().st_mtime_ns for path in (out / ".judged").iterdir()}
    assert read_summary(out).loc[("empty=brats2023", "core", "hd95_mm"), "mean"] == (0 + 374 + 374 + 0 + 2) / 5
    shown = capsys.readouterr().out
    assert "5 cases of 5 patients; slices: all." in shown
    assert "brats2023 (absent from both: Dice 1, distances 0; absent from one: Dice 0, distances 374 mm)" in shown
    core = next(line for line in shown.splitlines() if line.startswith("core")).split()
    assert core[1] == "0.550"
    assert core[-5:] == ["0.438", "5", "1", "1", "1"]


def test_pooled_hausdorff_is_judged_anew(by_hand, tmp_path):
    root = by_hand.parent
    out = shutil.copytree(by_hand, tmp_path / "out")
    prediction, reference = block((4, 8), (4, 8), (2, 6)), block((4, 8), (4, 8), (2, 6))
    prediction[20, 20, 2:6] = 1  # a false lesion, far away from the reference in one direction only
    write_maps(root / "other/predictions", {"one": prediction})
    write_maps(root / "other/references", {"one": reference})
    for kind in ("maxdir", "pooled"):
        evaluate(root / "other/predictions", root / "other/references", out, "brats2023", hausdorff=kind, workers=1)
        expected = judge_volume(prediction, reference, (1, 1, 1), kind).set_index("entity").loc["core", "hd95_mm"]
        assert read_table(out).loc[("one", "core"), "hd95_mm"] == expected
        assert json.loads((out / "summary.json").read_text())["conventions"]["hausdorff"] == kind


def test_predictions_of_nnunet_are_judged_by_the_codes_that_the_user_states(tmp_path):
    names = write_patients(tmp_path / "brats", 2)
    order = np.array([0, 2, 1, 0, 3], np.uint8)  # nnU-Net's BraTS data sets: 1 oedema, 2 core, 3 enhancing
    folder = write_maps(tmp_path / "fold_0", {name: order[reference_of(tmp_path / "brats", name)] for name in names})
    for other in ("dataset.json", "plans.json", "predict_from_raw_data_args.json", f"{names[0]}.npz"):
        (folder / other).write_text("{}")
    (folder / "._BraTS2021_00000.nii.gz").write_text("left by macOS")
    words = [str(tmp_path / name) for name in ("fold_0", "brats", "out")]
    main(["evaluate", *words, "--labels={core: 2, oedema: 1, enhancing: 3}", "--workers=1"])
    assert (read_table(tmp_path / "out")["dice"] == 1).all()
    evaluate(folder, tmp_path / "brats", tmp_path / "swapped", labels="brats2023", workers=1)
    table = read_table(tmp_path / "swapped")
    assert table.loc[(names[0], "core"), "dice"] == 0
    assert table.loc[(names[0], "WT"), "dice"] == 1
    with pytest.raises(ValueError, match=r"cannot be told from the files. State the codes with --labels"):
        evaluate(folder, tmp_path / "brats", tmp_path / "unstated", workers=1)
    with pytest.raises(ValueError, match=r"has the label 3, but brats2021 has only 0, 1, 2, 4") as error:
        evaluate(folder, tmp_path / "brats", tmp_path / "wrong", labels="brats2021", workers=1)
    assert "fold_0/BraTS2021_00000.nii.gz" in str(error.value)
    assert not (tmp_path / "unstated").exists()


@pytest.mark.parametrize(
    ("layout", "name", "end"), [("2021", "BraTS2021_00007", "_seg"), ("2023", "BraTS-GLI-00007-000", "-seg")]
)
def test_references_may_lie_in_any_layout(tmp_path, layout, name, end):
    write_patient(tmp_path / "brats", name, layout)
    write_maps(tmp_path / "predictions", {name: reference_of(tmp_path / "brats", name, end)})
    for labels in ("reference", "brats" + layout):
        evaluate(tmp_path / "predictions", tmp_path / "brats", tmp_path / labels, labels=labels, workers=1)
        assert read_table(tmp_path / labels)["dice"].dropna().tolist() == [1] * 6


def test_references_of_the_decathlon_have_their_own_codes(tmp_path):
    write_msd(tmp_path / "msd", ["BRATS_001"])
    labels = np.asarray(nibabel.load(tmp_path / "msd/Task01_BrainTumour/labelsTr/BRATS_001.nii.gz").dataobj)
    write_maps(tmp_path / "predictions", {"BRATS_001": np.array([0, 2, 1, 4], np.uint8)[labels]})
    evaluate(tmp_path / "predictions", tmp_path / "msd", tmp_path / "out", workers=1)  # a 4 and no 3: BraTS 2021
    assert (read_table(tmp_path / "out")["dice"] == 1).all()


def test_time_points_of_a_patient_are_cases_of_one_patient(tmp_path):
    names = ["BraTS-GLI-00001-100", "BraTS-GLI-00001-101", "BraTS-GLI-00002-100"]
    maps = {name: fake_labels() for name in names}
    write_maps(tmp_path / "predictions", {**maps, names[0]: fake_labels() * 0})
    write_maps(tmp_path / "references", {f"{name}-seg": labels for name, labels in maps.items()})
    evaluate(tmp_path / "predictions", tmp_path / "references", tmp_path / "out", labels="brats2024", workers=1)
    table = read_table(tmp_path / "out")
    assert table.loc[(names[1], "WT"), "patient"] == "BraTS-GLI-00001"
    content = json.loads((tmp_path / "out/summary.json").read_text())
    assert (content["cases"], content["patients"]) == (3, 2)
    dice = read_summary(tmp_path / "out").loc[("empty=nan", "core", "dice")]
    assert dice[["mean", "n", "n_valid", "n_missed"]].tolist() == [((0 + 1) / 2 + 1) / 2, 3, 2, 1]


def damaged(kind, predictions, root):
    """Damage what belongs to BraTS2021_00001 and give the expected (file, fault)."""
    name = "BraTS2021_00001"
    path = predictions / f"{name}.nii.gz"
    labels = np.asarray(nibabel.load(path).dataobj)
    reference = root / name / f"{name}_seg.nii.gz"
    moved = lps_affine()
    moved[1, 3] = 0.5
    if kind == "missing prediction":
        path.unlink()
        return path, "missing prediction"
    if kind == "prediction without reference":
        shutil.rmtree(root / name)
        return path, "prediction without reference"
    if kind == "incomplete reference":
        (root / name / f"{name}_t2.nii.gz").unlink()
        return path, "prediction without reference"
    if kind == "shape":
        write_nifti(path, labels[:, :, :4])
        return path, "shape (24, 24, 4), but (24, 24, 8) in BraTS2021_00001_seg.nii.gz"
    if kind == "affine":
        write_nifti(path, labels, moved)
        return path, "affine differs from that of BraTS2021_00001_seg.nii.gz by up to 0.5 mm"
    if kind == "spacing":
        write_nifti(path, labels, lps_affine(2.0))
        return path, "affine differs from that of BraTS2021_00001_seg.nii.gz by up to 1 mm"
    if kind == "unknown label":
        write_nifti(path, np.where(labels == 4, 3, labels).astype(np.uint8))
        return path, "has the label 3, but brats2021 has only 0, 1, 2, 4"
    if kind == "fraction":
        write_nifti(path, labels * np.float32(0.5))
        return path, "has the label 0.5, but brats2021 has only 0, 1, 2, 4"
    if kind == "negative and NaN":
        write_nifti(path, np.where(labels == 4, np.nan, labels) - (labels == 1) * np.float32(2))
        return path, "has the label -1, nan, but brats2021 has only 0, 1, 2, 4"
    if kind == "unknown label of the reference":
        write_nifti(reference, np.full(SHAPE, 3, np.uint8))
        return reference, "has the label 3, but BraTS 2021 has only 0, 1, 2, 4"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
        return path, "cannot be read (Compressed file ended before the end-of-stream marker was reached)"
    if kind == "dangling link":
        path.unlink()
        path.symlink_to(predictions / "gone")
        return path, "missing prediction"
    if kind == "4-D":
        write_nifti(path, np.stack([labels, labels], axis=-1))
        return path, "is no 3-D label map, but of shape (24, 24, 8, 2)"
    if kind == "two files":
        write_nifti(predictions / f"{name}.nii", labels)
        return f"{predictions / name}.nii and {name}.nii.gz", "two files of one case"
    raise AssertionError(kind)


KINDS = [
    "missing prediction",
    "prediction without reference",
    "incomplete reference",
    "shape",
    "affine",
    "spacing",
    "unknown label",
    "fraction",
    "negative and NaN",
    "unknown label of the reference",
    "truncated",
    "dangling link",
    "4-D",
    "two files",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_input_is_named_with_case_and_file_and_nothing_is_judged(three, kind):
    predictions, root, out = three
    file, fault = damaged(kind, predictions, root)
    with pytest.raises(ValueError, match=r"Nothing was judged.") as error:
        evaluate(predictions, root, out, labels="brats2021", workers=1)
    rows = [line.split(" | ") for line in str(error.value).splitlines()[2:]]
    assert [str(file), fault] in [[cell.strip() for cell in row[1:3]] for row in rows]
    assert {row[0].strip() for row in rows} == {"BraTS2021_00001"}
    assert not out.exists()


def test_bad_inputs_of_all_cases_come_in_one_message(three):
    predictions, _, out = three
    (predictions / "BraTS2021_00000.nii.gz").unlink()
    write_nifti(predictions / "BraTS2021_00001.nii.gz", np.full(SHAPE, 7, np.uint8))
    write_nifti(predictions / "BraTS2021_00002.nii.gz", np.zeros((4, 4, 4), np.uint8))
    write_nifti(predictions / "BraTS2021_99999.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(SystemExit) as error:
        main(["evaluate", *map(str, three), "--labels=brats2021", "--workers=1"])
    lines = str(error.value).splitlines()
    assert lines[0] == "standin evaluate: 4 faults, 2 pairs of label maps. Nothing was judged."
    assert [line.split(" | ")[0].strip() for line in lines[2:]] == [f"BraTS2021_{n:05d}" for n in (0, 1, 2, 99999)]
    assert not out.exists()


def test_predictions_of_other_cases_are_passed_over_only_when_the_user_says_so(three):
    predictions, root, out = three
    write_nifti(predictions / "another.nii.gz", fake_labels())
    evaluate(predictions, root, out, labels="brats2021", ignore_extra=True, workers=1)
    assert read_table(out).index.unique("case").tolist() == [f"BraTS2021_0000{n}" for n in range(3)]


def test_only_a_list_of_cases_may_leave_references_without_prediction(three, tmp_path):
    predictions, root, out = three
    (predictions / "BraTS2021_00000.nii.gz").unlink()
    (tmp_path / "test.txt").write_text("BraTS2021_00001\nBraTS2021_00002\n\n")
    evaluate(predictions, root, out, labels="brats2021", cases=tmp_path / "test.txt", workers=1)
    assert read_table(out).index.unique("case").tolist() == ["BraTS2021_00001", "BraTS2021_00002"]
    (tmp_path / "test.txt").write_text("BraTS2021_00001\nBraTS2021_00004\n")
    cases, faults = find_cases(predictions, root, "brats2021", listed=tmp_path / "test.txt")
    assert [case.name for case in cases] == ["BraTS2021_00001"]
    assert [(fault.patient, fault.fault) for fault in faults] == [
        ("BraTS2021_00002", f"prediction of a case that is not in {tmp_path / 'test.txt'}"),
        ("BraTS2021_00004", "no reference of this name"),
    ]
    with pytest.raises(ValueError, match=r"a text file with a case per line, or a slice set, at .*gone: there is none"):
        find_cases(predictions, root, "brats2021", listed=tmp_path / "gone")


def test_a_slice_set_says_which_patients_are_tested_and_which_slices_are_judged(tmp_path):
    names = write_patients(tmp_path / "brats", 4)
    slices = prepare(tmp_path / "brats", tmp_path / "slices", fractions=(0.5, 0.25, 0.25), workers=1)
    tested = json.loads((slices / "dataset.json").read_text())["patients"]["test"]
    labels = {name: reference_of(tmp_path / "brats", name) for name in names}
    for wrong in labels.values():
        wrong[2, 2, 0] = 4  # slices 0 and 7 hold no brain, so the slice set has them not
    predictions = write_maps(tmp_path / "predictions", labels)
    arguments = predictions, tmp_path / "brats"
    evaluate(*arguments, tmp_path / "all", labels="reference", cases=slices, ignore_extra=True, workers=1)
    evaluate(*arguments, tmp_path / "kept", labels="reference", slices=slices, workers=1)
    whole, kept = read_table(tmp_path / "all"), read_table(tmp_path / "kept")
    assert whole.index.unique("case").tolist() == tested
    assert kept.index.unique("case").tolist() == names
    assert whole.loc[(tested[0], "WT"), ["fp", "slices"]].tolist() == [1, "all"]
    assert kept.loc[(tested[0], "WT"), ["fp", "slices"]].tolist() == [0, "1-6"]
    assert kept.loc[(tested[0], "WT"), "tp"] == whole.loc[(tested[0], "WT"), "tp"] > 0
    assert json.loads((tmp_path / "kept/summary.json").read_text())["conventions"]["slices"] != "all"
    write_patient(tmp_path / "brats", "BraTS2021_00009")
    _, faults = find_cases(*arguments, "reference", slices=slices)
    assert [fault.fault for fault in faults] == ["missing prediction"]
    write_maps(predictions, {"BraTS2021_00009": fake_labels() * 0})
    _, faults = find_cases(*arguments, "reference", slices=slices)
    assert [(fault.patient, fault.fault) for fault in faults] == [
        ("BraTS2021_00009", "the slice set has no slice of it")
    ]


def test_codes_that_cannot_be_told_must_be_stated(three, tmp_path):
    predictions, root, _ = three
    for labels, message in (
        ({"core": 1, "oedema": 2}, "different codes from 1 to 255 for each of core, oedema, enhancing"),
        ({"core": 1, "oedema": 2, "enhancing": 2}, "different codes"),
        ({"core": 0, "oedema": 2, "enhancing": 3}, "different codes"),
    ):
        with pytest.raises(ValueError, match=message):
            find_cases(predictions, root, labels)
    with pytest.raises(ValueError, match="whose layout says the codes"):
        find_cases(predictions, root, "brats2021", "brats2021")
    with pytest.raises(ValueError, match=r"whose codes nobody knows. State --reference_labels"):
        find_cases(predictions, predictions, "reference")
    cases, _ = find_cases(predictions, predictions)
    assert cases[0].reference.codes == {0: 0, 1: 1, 2: 2, 4: 3}
    only_two = write_maps(tmp_path / "two", {"BraTS2021_00000": fake_labels() % 3})
    with pytest.raises(ValueError, match="cannot be told from the files"):
        find_cases(only_two, root)
    both = write_maps(tmp_path / "both", {"BraTS2021_00000": np.array([0, 1, 4, 3], np.uint8)[fake_labels()]})
    with pytest.raises(ValueError, match="cannot be told from the files"):
        find_cases(both, root)
    write_patient(tmp_path / "2024", "BraTS-GLI-00001-101", "2023")
    with pytest.raises(ValueError, match="cannot be told from the files"):  # 4 may be the resection cavity
        find_cases(predictions, tmp_path / "2024")


def test_folders_without_label_maps_are_refused(three, tmp_path):
    predictions, root, out = three
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "gone"):
        with pytest.raises(ValueError, match=rf"label maps CASE.nii.gz or CASE.nii directly in the folder .*{folder}"):
            find_cases(tmp_path / folder, root)
        with pytest.raises(ValueError, match=rf"directly in the folder .*{folder}"):
            find_cases(predictions, tmp_path / folder)
    with pytest.raises(ValueError, match="workers=0: expected 1 or more"):
        evaluate(predictions, root, out, workers=0)
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="out is not empty and holds no judgement"):
        evaluate(predictions, root, out, workers=1)
    with pytest.raises(ValueError, match="0 pairs of label maps"):
        judge_cases([], tmp_path / "new")


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_judgement_continues_and_ends_with_the_same_figures_and_tables(three):
    out = three[2]
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = [{str(REPOSITORY)!r}]
        import evaluation.judgement as module
        from evaluation.evaluate import evaluate

        original, calls = module.judge_volume, []

        def dying(*args):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        module.judge_volume = dying
        evaluate(*map(Path, {[str(path) for path in three]!r}), workers=1)
    """)
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    records = {path: path.stat().st_mtime_ns for path in (out / ".judged").iterdir()}
    assert [path.name for path in sorted(records)] == ["BraTS2021_00000.json", "BraTS2021_00001.json"]
    evaluate(*three, workers=1)
    assert records == {path: path.stat().st_mtime_ns for path in records}
    evaluate(*three[:2], out.with_name("whole"), workers=1)
    assert content_of(out) == content_of(out.with_name("whole"))


def test_only_a_changed_file_is_judged_again(three):
    predictions, _, out = three
    evaluate(*three, workers=1)
    before = {path.stem: path.stat().st_mtime_ns for path in (out / ".judged").iterdir()}
    os.utime(predictions / "BraTS2021_00000.nii.gz")
    write_nifti(predictions / "BraTS2021_00002.nii.gz", np.zeros(SHAPE, np.uint8))
    evaluate(*three, workers=1)
    after = {path.stem: path.stat().st_mtime_ns for path in (out / ".judged").iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["BraTS2021_00002"]
    assert read_table(out).loc[("BraTS2021_00002", "WT"), "dice"] == 0


def test_several_processes_write_the_same_results_as_one(three):
    predictions, root, out = three
    evaluate(*three, workers=1)
    evaluate(predictions, root, out.with_name("two"), workers=2)
    assert content_of(out) == content_of(out.with_name("two"))


def cases_with_dice(root, names, missing):
    """Judge predictions that lack the first planes of the tumour, more of them from case to case."""
    cases = []
    for name, planes in zip(names, missing, strict=True):
        labels = fake_labels()
        write_nifti(root / f"{name}-reference.nii", labels)
        labels[: 8 + planes] = 0
        write_nifti(root / f"{name}.nii", labels)
        write_nifti(root / f"{name}-flair.nii", fake_images(name)["FLAIR"])
        files = [LabelFile(root / f"{name}{end}.nii", PLAIN, "plain") for end in ("", "-reference")]
        cases.append(Case(name, name, *files, flair=(root / f"{name}-flair.nii", None)))
    return cases


def test_figures_show_the_best_the_median_and_the_worst_case_on_the_slice_with_most_tumour(tmp_path):
    cases = cases_with_dice(tmp_path, ["a", "b", "c", "d", "e"], [3, 0, 4, 1, 2])
    table = judge_cases(cases, tmp_path / "out")
    shown = best_median_worst(cases, table)
    assert [one.text.splitlines()[:2] for one in shown] == [["best", "b"], ["median", "e"], ["worst", "c"]]
    mean = table[table["case"] == "e"].set_index("entity")["dice"][["core", "oedema", "enhancing"]].mean()
    assert shown[1].text.splitlines()[2] == f"mean Dice {mean:.3f}"
    np.testing.assert_array_equal(shown[0].prediction, shown[0].reference)
    reference = shown[2].reference  # rows: posterior, columns: left
    assert np.ptp(np.argwhere(reference > 0), axis=0).tolist() == [5, 7]
    assert [int((shown[2].prediction > 0).sum()), int((reference > 0).sum())] == [4 * 6, 8 * 6]
    pictures = sorted(path.name for path in (tmp_path / "out/figures").iterdir())
    assert pictures == ["metrics.png", "patients.png", "volumes.png"]
    assert [one.text.split()[0] for one in best_median_worst(cases[:2], table)] == ["best", "worst"]
    assert [one.text.split()[0] for one in best_median_worst(cases[:1], table)] == ["best"]
    plain = [Case(case.name, case.patient, case.prediction, case.reference) for case in cases]
    judge_cases(plain, tmp_path / "out")
    assert not (tmp_path / "out/figures/patients.png").exists()


def test_figures_show_flair_of_files_with_four_images(tmp_path):
    write_msd(tmp_path / "msd", ["BRATS_001"])
    labels = np.asarray(nibabel.load(tmp_path / "msd/Task01_BrainTumour/labelsTr/BRATS_001.nii.gz").dataobj)
    write_maps(tmp_path / "predictions", {"BRATS_001": labels})
    cases, _ = find_cases(tmp_path / "predictions", tmp_path / "msd", "msd")
    shown = best_median_worst(cases, judge_cases(cases, tmp_path / "out"))[0]
    flair = fake_images("BRATS_001")["FLAIR"][:, :, 2].astype(float)  # the first of the slices with most tumour
    expected = np.clip(flair / np.percentile(flair[flair > 0], 99.8) * 255, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(shown.flair, expected.T)
