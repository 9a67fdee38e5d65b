"""The embedded default data set: BraTS-like patients made on the machine, without a download.

`write_phantom` writes folders with the names, grid, orientation and data types of BraTS 2021 (Baid et al., arXiv
2107.02314). The brains come from `phantom_anatomy`, whose docstring states the notice of the template used: ICBM 2009a
nonlinear symmetric (Fonov et al. 2009, 2011), copyright McConnell Brain Imaging Centre, Montreal Neurological
Institute, McGill University. This file grows the tumours and turns tissue into the intensities of T1, contrast-enhanced
T1, T2 and FLAIR of a scanner of its own for every patient. Oedema follows the reaction-diffusion equation of Fisher and
KPP, faster in white matter than in grey (Swanson, Alvord, Murray, Cell Proliferation 33:317, 2000; Clatz et al., IEEE
TMI 24:1334, 2005).

The phantom is for learning the program and for testing it; no result on it says anything about patients.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from datamodules.parallel import available_cores, run_in_processes
from datamodules.phantom_anatomy import (
    KNOT_MM,
    Anatomy,
    Grid,
    Individual,
    Lesion,
    Point,
    Volume,
    cerebrum,
    evaluate,
    individual,
    knot_positions_mm,
    knots,
    smooth_noise,
    voxelized,
)

NECROSIS, OEDEMA, ENHANCING = 1, 2, 4  # BraTS' labels
STEPS, NEVER = 140, 160  # of the growth; the time given to what it does not reach
VERSION = 1  # of the patients' content: another number, other patients
Modality = Literal["t1", "t1ce", "t2", "flair"]
MODALITIES: tuple[Modality, ...] = ("t1", "t1ce", "t2", "flair")

# Mean and spread among patients of the signal relative to white matter: fluid, grey matter, what lies outside the
# brain, oedema, necrotic core, enhancing tumour, core of a tumour that does not enhance.
SIGNALS: dict[Modality, tuple[tuple[float, float], ...]] = {
    "t1": ((0.38, 0.05), (0.81, 0.03), (0.5, 0.1), (0.80, 0.04), (0.62, 0.08), (0.82, 0.06), (0.66, 0.06)),
    "t1ce": ((0.40, 0.05), (0.84, 0.04), (0.6, 0.1), (0.84, 0.04), (0.62, 0.09), (2.00, 0.30), (0.68, 0.06)),
    "t2": ((3.50, 0.60), (1.38, 0.08), (0.7, 0.15), (2.05, 0.20), (2.50, 0.40), (1.80, 0.20), (2.40, 0.25)),
    "flair": ((0.30, 0.07), (1.25, 0.06), (0.5, 0.1), (1.95, 0.18), (1.45, 0.25), (1.65, 0.15), (1.75, 0.15)),
}
HAEMORRHAGE = {"t1": 0.6, "t1ce": 0.4, "t2": -0.5, "flair": -0.3}  # relative change in the middle of a bleeding
WHITE_MATTER = {"t1": 850.0, "t1ce": 1100.0, "t2": 480.0, "flair": 750.0}  # stored value, median over patients


@dataclass(frozen=True)
class Plan:
    """What is drawn about a patient before any voxel.

    Attributes:
        lesions: One or two tumours.
        sulcal_width_mm: Half the width of the sulci.
    """

    lesions: tuple[Lesion, ...]
    sulcal_width_mm: float

    @property
    def enhances(self) -> bool:
        """Whether the label 4 occurs."""
        return any(lesion.rim_mm > 0 for lesion in self.lesions)


@dataclass(frozen=True)
class Growth:
    """Tumours at the voxels of the brain box.

    Attributes:
        label: BraTS' 0, 1, 2, 4.
        infiltration: 1 next to the core, falling to 0 at the front of the oedema.
    """

    label: npt.NDArray[np.uint8]
    infiltration: Volume


def draw_plan(rng: np.random.Generator) -> Plan:
    """Draw number, kind and size of the tumours: about 1 in 8 without enhancement, 1 in 6 with two lesions."""
    enhances = rng.random() >= 1 / 8
    count = 2 if rng.random() < 1 / 6 else 1
    lesions = []
    for k in range(count):
        core_ml = float(np.clip(30 * np.exp(rng.normal(0, 0.9)), 3, 120)) * (1.0 if k == 0 else rng.uniform(0.15, 0.4))
        radius = (core_ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3)
        oedema_ml = float(np.clip(48 * np.exp(rng.normal(0, 0.75)), 6, 150)) * (1.0 if k == 0 else 0.3)
        solid = rng.random() < 0.2  # hardly any necrosis
        rim = (
            radius * rng.uniform(0.45, 0.7) if solid else float(np.clip(rng.normal(4.0, 1.3), 2.0, 0.5 * radius + 1.5))
        )
        push = rng.uniform(0.15, 0.4) * radius
        if not enhances:
            rim, oedema_ml, push = 0.0, 0.5 * oedema_ml, 0.7 * push
        lesions.append(Lesion(radius, rim, oedema_ml, push, rng.uniform(0.6, 1.4) if enhances else 0.8))
    return Plan(tuple(lesions), rng.uniform(0.3, 1.0))


def cores(rng: np.random.Generator, lesions: Sequence[Lesion], centres: list[Point]) -> tuple[Volume, Volume]:
    """Tumour cores at the control points: depth in mm below the core's edge (negative outside), and rim's thickness."""
    inner = np.full(knots(), -100, np.float32)
    rim = np.zeros(knots(), np.float32)
    for lesion, centre in zip(lesions, centres, strict=True):
        offset = [x - np.float32(c) for x, c in zip(knot_positions_mm(), centre, strict=True)]
        turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        stretch = np.exp(rng.normal(0, 0.16, 3))
        stretch /= np.prod(stretch) ** (1 / 3)
        axes = [sum(np.float32(turn[i, j] / stretch[i]) * offset[j] for j in range(3)) for i in range(3)]
        radius = np.sqrt(sum(a**2 for a in axes))
        edge = lesion.core_radius_mm
        lobes = smooth_noise(rng, knots(), max(0.4 * edge / KNOT_MM, 1.5))
        bumps = smooth_noise(rng, knots(), 1.3)
        depth = edge - radius + lesion.roughness * (0.22 * edge * lobes + 1.3 * bumps)
        depth = np.where(radius < 2 * edge, depth, np.float32(-100))  # no islands far away
        thickness = lesion.rim_mm * np.exp(0.45 * smooth_noise(rng, knots(), 2.2))
        rim = np.where(depth > inner, thickness, rim).astype(np.float32)
        inner = np.maximum(inner, depth).astype(np.float32)
    return np.maximum(inner, -30), rim


def arrival(core: npt.NDArray[np.bool_], grey: Volume, white: Volume, rough: Volume) -> Volume:
    """Step of the integration at which the front of the Fisher-KPP equation arrives at each control point.

    u_t = div(D grad u) + rho u (1 - u), D = 1 in white matter, 0.08 in grey, 0 in fluid. The step is 0.15 knot^2 / D
    and rho gives a front 1.2 knots wide, so in white matter it moves by a quarter of a knot a step. It starts from the
    part of the tumour core where `rough` is large: oedema lies more on one side than on the other.
    """
    if not core.any():  # smaller than the knots
        return np.full(core.shape, NEVER, np.float32)
    diffusion = np.clip(
        (white**1.5 + 0.08 * grey) * (0.7 + 0.35 * rough), 0.02, 1.05
    )  # above 1.1 the scheme is unstable
    diffusion[(white + grey) < 0.35] = 0
    seeds = core & (rough >= np.quantile(rough[core], 0.6))
    diffusion[core & ~seeds] = 0.12
    faces = [np.minimum(diffusion, np.roll(diffusion, -1, axis)) * np.float32(0.15) for axis in range(3)]
    u = seeds.astype(np.float32)
    time = np.full(u.shape, np.inf, np.float32)
    for step in range(STEPS):
        time[(u > 0.15) & np.isinf(time)] = step
        change = np.float32(0.104) * u * (1 - u) * (diffusion > 0)
        for axis, face in enumerate(faces):
            flux = face * (np.roll(u, -1, axis) - u)
            change += flux - np.roll(flux, 1, axis)
        u = u + change
    # A smooth continuation behind the last arrival, so that the spline has no cliff.
    return np.minimum(time, NEVER)


def labelled(plan: Plan, person: Individual, a: Anatomy, grid: Grid, rng: np.random.Generator) -> Growth:
    """Grow the tumours of a plan and label the voxels."""
    core, rim = cores(rng, plan.lesions, person.centres_mm)
    rough = smooth_noise(rng, knots(), 3.0)
    start = (core > 0) & (person.depth_mm > 0)
    above = cerebrum(person.mni_mm)
    front = evaluate(arrival(start, person.grey, person.white * above, rough), grid)
    depth = evaluate(core, grid) + 0.35 * a.fine
    # A core may fill sulci, but neither the ventricles nor what lies below the tentorium.
    room = a.mask & ((a.csf < 0.6) | (a.depth_mm < 12)) & (evaluate(above, grid) > 0.4)
    inside = room & (depth > 0)
    label = np.zeros(depth.shape, np.uint8)
    tissue = room & ~inside & (front < STEPS)
    times = np.sort(front[tissue])
    voxels = int(sum(lesion.oedema_ml for lesion in plan.lesions) * 1000 / grid.spacing_mm**3)
    last = float(times[min(voxels, len(times) - 1)]) if len(times) else 0.0
    label[tissue & (front < last)] = OEDEMA
    label[inside] = np.where(depth[inside] > evaluate(rim, grid)[inside], NECROSIS, ENHANCING)
    return Growth(label, np.clip(1 - front / max(last, 1.0), 0, 1))


def soft(region: npt.NDArray[np.bool_], spacing_mm: float, sigma_mm: float = 0.8) -> Volume:
    """Partial volume of a region: its edge as a scanner shows it."""
    return np.asarray(ndimage.gaussian_filter(region.astype(np.float32), sigma_mm / spacing_mm, truncate=3))


def gauss(distance2: Volume, sigma_mm: float) -> Volume:
    """exp(-d^2 / 2 sigma^2)."""
    return np.asarray(np.exp(distance2 * np.float32(-0.5 / sigma_mm**2)))


def enhancing_normal(rng: np.random.Generator, a: Anatomy, grid: Grid) -> Volume:
    """What takes up contrast agent in every brain, as a factor of white matter: vessels, plexus, sinuses, dura."""
    x, y, z = a.mni_mm
    # Where the fluid of the sulci meets a second family of sheets there are curves: vessels.
    wall = evaluate(smooth_noise(rng, knots(), 2.0), grid)
    vessels = a.csf * gauss((6 * wall) ** 2, 0.7) * (a.depth_mm < 22)
    perforating = gauss((8 * wall) ** 2, 0.8) * np.clip(a.fine - 1.8, 0, 1.5) * (a.depth_mm > 8)
    sinus = gauss(x**2 + np.clip(a.depth_mm - 1.5, 0, None) ** 2, 2.2) * (z > 0) * (a.depth_mm < 7)
    straight = gauss(x**2 + (z - 2 + 0.35 * (y + 45)) ** 2, 1.6) * (y < -36) * (a.depth_mm > 3)
    internal = gauss(x**2 + (z - 10 - 0.1 * (y + 25)) ** 2, 1.3) * (y < -8) * (y > -38)
    falx = gauss(x**2, 0.6) * np.clip(a.csf * 1.5, 0, 1) * (z > 10)
    plexus = gauss((np.abs(x) - 21) ** 2 / 4 + (y + 38) ** 2 / 9 + (z - 6) ** 2 / 4, 2.0) * a.csf
    dura = (a.depth_mm < 2.6) * np.clip(a.mid - 0.7, 0, 1.2)
    strength = rng.uniform(0.5, 1.6)
    return np.asarray(
        strength
        * (
            2.2 * vessels
            + 0.5 * perforating
            + 2.5 * sinus
            + 2 * straight
            + 1.5 * internal
            + 0.5 * falx
            + 1.8 * plexus
            + 1.6 * dura
        ),
        dtype=np.float32,
    )


def images(rng: np.random.Generator, a: Anatomy, growth: Growth, grid: Grid) -> dict[Modality, Volume]:
    """The four modalities of a patient over the brain box, background 0."""
    spacing = grid.spacing_mm
    weights = {label: soft(growth.label == label, spacing) for label in (NECROSIS, OEDEMA, ENHANCING)}
    enhances = bool((growth.label == ENHANCING).any())
    core = weights[NECROSIS] + weights[ENHANCING]
    agent = enhancing_normal(rng, a, grid)
    haemorrhage = rng.uniform(0.2, 0.9) * np.clip(a.mid - 0.8, 0, 1) if rng.random() < 0.25 else None
    x, y, z = a.mni_mm
    iron = gauss((np.abs(x) - 19) ** 2 + ((y + 4) / 1.6) ** 2 + (z + 1) ** 2, 4.5)
    outside = 1 - soft(a.mask, spacing, 1.2)
    texture = 1 + 0.012 * a.fine + 0.02 * a.mid
    thick = bool(rng.random() < 0.35)
    quality = rng.uniform(0.008, 0.028)
    out: dict[Modality, Volume] = {}
    for modality in MODALITIES:
        fluid, grey, air, oedema, necrosis, rim, solid = (rng.normal(*signal) for signal in SIGNALS[modality])
        signal = a.white + grey * a.grey + fluid * a.csf
        if modality in ("t2", "flair"):
            signal -= rng.uniform(0.1, 0.3) * iron * (1 - a.csf)
        # Oedema swells white matter and spares the cortex; it is strongest next to the core.
        strength = weights[OEDEMA] * (0.7 + 0.3 * growth.infiltration) * (1 - 0.35 * a.grey)
        signal += strength * (oedema * (1 + 0.06 * a.mid) - signal)
        inside = necrosis * (1 + 0.12 * a.mid + 0.05 * a.fine) if enhances else solid * (1 + 0.07 * a.mid)
        tumour = (
            weights[NECROSIS] * inside + weights[ENHANCING] * rim * (1 + 0.13 * a.mid + 0.08 * a.fine)
        ) / np.maximum(core, 1e-3)
        signal += np.minimum(core, 1) * (tumour - signal)
        if haemorrhage is not None:
            signal *= (
                1 + {"t1": 0.6, "t1ce": 0.4, "t2": -0.5, "flair": -0.3}[modality] * haemorrhage * weights[NECROSIS]
            )
        if modality == "t1ce":
            signal += agent * (1 - np.minimum(core, 1))
        signal = signal * texture
        signal += outside * (air - signal) * (0.85 if modality == "t1ce" else 1.0)
        if thick and modality != "t1ce":
            signal = ndimage.gaussian_filter1d(signal, rng.uniform(1.2, 2.0) / spacing, axis=2, truncate=3)
        bias = smooth_noise(rng, knots(), 45 / 3.0)
        signal *= np.exp(rng.uniform(0.03, 0.12) * evaluate(bias, grid))
        level = WHITE_MATTER[modality] * np.exp(rng.normal(0, 0.45))
        noise = rng.standard_normal(signal.shape, dtype=np.float32)
        noise = ndimage.gaussian_filter(noise, 0.6 / spacing, truncate=3) if spacing < 2 else noise
        signal += quality * (1.6 if modality == "t2" else 1.0) * noise / noise.std()
        out[modality] = np.where(a.mask, np.maximum(level * signal, 1), 0).astype(np.float32)
    if rng.random() < 0.4:
        hot_voxels(rng, out["t1ce"], a.mask & (a.depth_mm < 6) & (growth.label == 0))
    return out


def hot_voxels(rng: np.random.Generator, image: Volume, where: npt.NDArray[np.bool_]) -> None:
    """Make a few voxels at the surface, as of vessels with inflow, several times as bright as anything else."""
    chosen = rng.choice(np.flatnonzero(where), size=int(rng.integers(3, 20)), replace=False)
    image.flat[chosen] = image.max() * rng.uniform(1.1, 2.0, len(chosen))


def affine(spacing_mm: float) -> npt.NDArray[np.float64]:
    """BraTS' affine (left, posterior, superior) for a grid that covers the same field of view."""
    half = (spacing_mm - 1) / 2
    matrix = np.diag((-spacing_mm, -spacing_mm, spacing_mm, 1.0))
    matrix[:3, 3] = (-half, 239 - half, half)
    return matrix


def write_patient(out: Path, seed: int, spacing_mm: float, index: int) -> Path:
    """Make patient `index` and write its folder; it has its final name only when it is complete."""
    rng = np.random.default_rng((seed, index))
    plan = draw_plan(rng)
    person = individual(rng, plan.lesions)
    grid = Grid.at(spacing_mm).around(person.depth_mm > -2)
    anatomy = voxelized(rng, person, plan.sulcal_width_mm, grid)
    growth = labelled(plan, person, anatomy, grid, rng)
    volumes: dict[str, npt.NDArray[np.generic]] = {"seg": growth.label}
    for modality, image in images(rng, anatomy, growth, grid).items():
        volumes[modality] = np.clip(image, 0, np.iinfo(np.int16).max).astype(np.int16)
    name = f"Phantom_{index:05d}"
    temporary = out / f".{name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for suffix, values in volumes.items():
        whole = np.zeros(grid.shape, values.dtype)
        whole[grid.box] = values
        stored = nib.nifti1.Nifti1Image(whole, affine(spacing_mm))  # type: ignore[no-untyped-call]
        stored.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
        stored.set_qform(stored.affine, code="scanner")  # type: ignore[no-untyped-call]
        stored.set_sform(stored.affine, code="scanner")  # type: ignore[no-untyped-call]
        nib.loadsave.save(stored, temporary / f"{name}_{suffix}.nii.gz")
    return temporary.rename(out / name)


def check(out: Path, patients: int, seed: int, spacing_mm: float, workers: int | None) -> None:
    """Raise a ValueError about every argument that cannot be used, and about a folder with another phantom."""
    faults = []
    if not 1 <= patients <= 99999:
        faults.append(f"patients: expected 1 to 99999, got {patients}")
    if seed < 0:
        faults.append(f"seed: expected 0 or more, got {seed}")
    if not 1 <= spacing_mm <= 8:
        faults.append(f"spacing_mm: expected 1 to 8 mm, got {spacing_mm}")
    if workers is not None and workers < 1:
        faults.append(f"workers: expected 1 or more (or none, for one a core), got {workers}")
    if out.exists() and not out.is_dir():
        faults.append(f"out: expected a folder, got the file {out}")
    if faults:
        raise ValueError("phantom: " + "; ".join(faults))
    made_with = {"version": VERSION, "seed": seed, "spacing_mm": float(spacing_mm)}
    record = out / "phantom.json"
    if record.exists():
        try:
            found = json.loads(record.read_text())
        except ValueError:
            found = "unreadable text"
        if found != made_with:
            raise ValueError(
                f"{record}: this folder holds a phantom made with {found}, asked for is {made_with}; choose "
                "another folder or the same parameters"
            )
    elif any(out.glob("Phantom_*")):
        raise ValueError(
            f"{out}: holds Phantom_* folders but no phantom.json that says how they were made; choose another folder"
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        unfinished = record.with_suffix(".partial")
        unfinished.write_text(json.dumps(made_with, indent=2) + "\n")
        unfinished.replace(record)


def write_phantom(
    out: Path, patients: int = 24, seed: int = 0, spacing_mm: float = 1.0, workers: int | None = None
) -> list[Path]:
    """Write a BraTS-2021-like data set of synthetic patients, `out/Phantom_00000/Phantom_00000_t1.nii.gz` and so on.

    Patient i depends on `(seed, i)` and the spacing alone, so the number of workers does not matter, and asking for
    more patients later adds to the set. Patients that are there already are kept.

    Args:
        out: Folder of the data set; made if it does not exist.
        patients: Number of patients.
        seed: Of the whole set.
        spacing_mm: Edge of a voxel; 1 gives BraTS' grid of 240 x 240 x 155, 2 gives 120 x 120 x 78.
        workers: Processes; by default one for each core that this process may use.

    Returns:
        The patients' folders in order.

    Raises:
        ValueError: An argument is out of its range, or `out` holds a phantom made with other parameters.
    """
    out = Path(out)
    check(out, patients, seed, spacing_mm, workers)
    folders = [out / f"Phantom_{index:05d}" for index in range(patients)]
    missing = [index for index, folder in enumerate(folders) if not folder.exists()]
    run_in_processes(
        partial(write_patient, out, seed, spacing_mm), missing, workers or available_cores(), "writing phantom patients"
    )
    return folders
