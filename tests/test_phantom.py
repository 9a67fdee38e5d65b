"""The phantom: files as BraTS 2021 has them, the contrasts of the four modalities, and reproducibility."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from datamodules import phantom
from datamodules.phantom_anatomy import Grid, evaluate, knot_positions_mm, load_template

SPACING_MM = 4.0
MODALITIES = ("t1", "t1ce", "t2", "flair")


def read(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(nib.load(folder / f"{folder.name}_{name}.nii.gz").dataobj) for name in (*MODALITIES, "seg")
    }


def digests(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*/*.nii.gz"))}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three patients of seed 0; number 2 does not enhance."""
    out = tmp_path_factory.mktemp("phantom") / "set"
    return phantom.write_phantom(out, patients=3, seed=0, spacing_mm=SPACING_MM, workers=1)


def test_names_grid_orientation_and_types_are_those_of_brats_2021(small):
    assert [folder.name for folder in small] == [f"Phantom_{i:05d}" for i in range(3)]
    for name in (*MODALITIES, "seg"):
        image = nib.load(small[0] / f"Phantom_00000_{name}.nii.gz")
        assert image.shape == (60, 60, 39)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.get_data_dtype() == (np.uint8 if name == "seg" else np.int16)
        assert image.header.get_zooms() == (4, 4, 4)
    assert sorted(p.name for p in small[0].parent.iterdir()) == [*(f.name for f in small), "phantom.json"]


def test_the_grid_at_1_mm_is_brats_own():
    assert Grid.at(1.0).shape == (240, 240, 155)
    assert Grid.at(2.0).shape == (120, 120, 78)
    brats = [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(phantom.affine(1.0), brats)
    # The outer faces of the first voxels of both grids coincide.
    corner = np.array([-0.5, -0.5, -0.5, 1])
    np.testing.assert_allclose(phantom.affine(2.0) @ corner, phantom.affine(1.0) @ corner)


def test_background_is_zero_and_the_brain_positive_in_all_modalities(small):
    for folder in small:
        volumes = read(folder)
        brain = volumes["t1"] > 0
        brain_ml = brain.sum() * SPACING_MM**3 / 1000
        assert 1000 < brain_ml < 1900
        for name in MODALITIES:
            assert volumes[name].min() == 0
            np.testing.assert_array_equal(volumes[name] > 0, brain)
        assert not volumes["seg"][~brain].any()
        assert not brain[0].any()
        assert not brain[:, 0].any()


def test_labels_are_those_of_brats_and_volumes_those_of_gliomas(small):
    whole_ml = []
    for folder in small:
        label = read(folder)["seg"]
        assert set(np.unique(label)) <= {0, 1, 2, 4}
        assert (label == 2).any()
        whole_ml.append((label > 0).sum() * SPACING_MM**3 / 1000)
    assert min(whole_ml) > 5
    assert max(whole_ml) < 350
    assert max(whole_ml) > 1.5 * min(whole_ml)


def test_contrasts_are_those_of_the_modalities(small):
    for folder in small:
        v = read(folder)
        label, brain = v["seg"], v["t1"] > 0
        normal = brain & (label == 0)
        typical = {name: np.median(v[name][normal]) for name in MODALITIES}
        assert v["flair"][label == 2].mean() > 1.15 * typical["flair"]
        assert v["t2"][label == 2].mean() > 1.05 * typical["t2"]
        if (label == 4).any():
            assert v["t1ce"][label == 4].mean() > 1.3 * typical["t1ce"]
            assert v["t1ce"][label == 4].mean() > 1.2 * v["t1ce"][label == 2].mean()
        if (label == 1).sum() > 50:
            assert v["t1"][label == 1].mean() < typical["t1"]
            assert v["t2"][label == 1].mean() > 1.2 * typical["t2"]
        # Fluid is the brightest of the normal brain in T2, and there it is dark in T1 and FLAIR.
        fluid = normal & (v["t2"] > np.percentile(v["t2"][normal], 97))
        assert v["t1"][fluid].mean() < typical["t1"]
        assert v["flair"][fluid].mean() < typical["flair"]


def test_absolute_scale_differs_among_patients(small):
    volumes = [read(folder) for folder in small]
    medians = {name: [np.median(v[name][v[name] > 0]) for v in volumes] for name in MODALITIES}
    ratios = [max(m) / min(m) for m in medians.values()]
    assert min(ratios) > 1.1
    assert max(ratios) > 1.5


def test_patients_differ_in_anatomy(small):
    volumes = [read(folder)["t1"].astype(float) for folder in small]
    for i, a in enumerate(volumes):
        for b in volumes[:i]:
            both = (a > 0) & (b > 0)
            assert abs(np.corrcoef(a[both], b[both])[0, 1]) < 0.7


def test_a_tumour_without_enhancement_has_no_label_4(small):
    plans = [phantom.draw_plan(np.random.default_rng((0, i))) for i in range(3)]
    assert [plan.enhances for plan in plans] == [True, True, False]
    for plan, folder in zip(plans, small, strict=True):
        assert (read(folder)["seg"] == 4).any() == plan.enhances


def test_one_in_eight_does_not_enhance_and_one_in_six_has_two_lesions():
    plans = [phantom.draw_plan(np.random.default_rng((3, i))) for i in range(2000)]
    assert np.mean([not plan.enhances for plan in plans]) == pytest.approx(1 / 8, abs=0.025)
    assert np.mean([len(plan.lesions) == 2 for plan in plans]) == pytest.approx(1 / 6, abs=0.025)
    default_set = [phantom.draw_plan(np.random.default_rng((0, i))) for i in range(24)]
    assert any(len(plan.lesions) == 2 for plan in default_set)


def test_two_lesions_lie_apart():
    rng = np.random.default_rng(5)
    first = phantom.Lesion(core_radius_mm=14, rim_mm=4, oedema_ml=0, push_mm=2, roughness=0.5)
    second = phantom.Lesion(core_radius_mm=8, rim_mm=3, oedema_ml=0, push_mm=1, roughness=0.5)
    plan, grid = phantom.Plan((first, second), 0.6), Grid.at(SPACING_MM)
    person = phantom.individual(rng, plan.lesions)
    anatomy = phantom.voxelized(rng, person, plan.sulcal_width_mm, grid)
    label = phantom.labelled(plan, person, anatomy, grid, rng).label
    a, b = person.centres_mm
    assert np.linalg.norm(a - b) > 45
    for centre in (a, b):
        voxel = [int(np.argmin(np.abs(grid.centres_mm(axis) - centre[axis]))) for axis in range(3)]
        around = tuple(slice(max(v - 1, 0), v + 2) for v in voxel)
        assert np.isin(label[around], (1, 4)).mean() > 0.5
    core_ml = np.isin(label, (1, 4)).sum() * SPACING_MM**3 / 1000
    assert core_ml == pytest.approx(4 / 3 * np.pi * (14**3 + 8**3) / 1000, rel=0.5)


def test_a_patient_depends_on_seed_and_index_alone(small, tmp_path, monkeypatch):
    # Neither on the number of processes nor on that of threads.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")
    phantom.write_phantom(tmp_path / "again", patients=2, seed=0, spacing_mm=SPACING_MM, workers=2)
    again, first = digests(tmp_path / "again"), digests(small[0].parent)
    assert len(again) == 10
    assert again == {name: first[name] for name in again}


def test_another_seed_gives_other_patients(small, tmp_path):
    phantom.write_phantom(tmp_path, patients=1, seed=1, spacing_mm=SPACING_MM, workers=1)
    assert set(digests(tmp_path).values()).isdisjoint(digests(small[0].parent).values())


def test_a_restart_keeps_what_is_finished_and_makes_the_rest(small, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(small[0].parent, out)
    shutil.rmtree(out / "Phantom_00001")
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*")}
    torn = out / ".Phantom_00001.partial"
    torn.mkdir()
    (torn / "Phantom_00001_t1.nii.gz").write_bytes(b"half of it")
    folders = phantom.write_phantom(out, patients=3, seed=0, spacing_mm=SPACING_MM, workers=1)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert not torn.exists()
    assert digests(out) == digests(small[0].parent)
    assert folders == [out / folder.name for folder in small]


def test_a_folder_with_another_phantom_is_refused(tmp_path):
    record = tmp_path / "phantom.json"
    record.write_text(json.dumps({"version": phantom.VERSION, "seed": 7, "spacing_mm": 4.0}))
    with pytest.raises(ValueError, match=r"phantom\.json.*'seed': 7.*asked for.*'seed': 0"):
        phantom.write_phantom(tmp_path, patients=1, seed=0, spacing_mm=4.0)
    record.write_text("{")
    with pytest.raises(ValueError, match="unreadable"):
        phantom.write_phantom(tmp_path, patients=1, seed=0, spacing_mm=4.0)
    record.unlink()
    (tmp_path / "Phantom_00000").mkdir()
    with pytest.raises(ValueError, match=r"no phantom\.json"):
        phantom.write_phantom(tmp_path, patients=1)


def test_all_wrong_arguments_are_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"patients: .* got 0; seed: .* got -1; spacing_mm: .* got 0\.1; workers"):
        phantom.write_phantom(tmp_path / "x", patients=0, seed=-1, spacing_mm=0.1, workers=0)
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"expected a folder, got the file"):
        phantom.write_phantom(tmp_path / "file")


def test_the_spline_reproduces_linear_functions():
    grid = Grid.at(SPACING_MM)
    x, y, z = knot_positions_mm()
    expected = 2 * grid.centres_mm(0)[:, None, None] - grid.centres_mm(1)[None, :, None] + 0.5 * grid.centres_mm(2) - 3
    np.testing.assert_allclose(evaluate(2 * x - y + 0.5 * z - 3, grid), expected, atol=2e-3)


def test_the_template_is_read_without_importing_nilearn():
    code = (
        "import sys; from datamodules.phantom_anatomy import load_template; load_template(); "
        "sys.exit('nilearn' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(phantom.__file__).parents[1])
    template = load_template()
    assert template.grey.shape == template.white.shape == (197, 233, 189)
    assert template.white.max() == 1
    assert template.depth_mm.max() > 40
