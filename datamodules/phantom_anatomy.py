"""Individual brains for the phantom: geometry and tissue, neither tumour labels nor intensities.

The anatomy comes from the ICBM 2009a nonlinear symmetric template (Fonov, Evans, McKinstry, Almli, Collins, NeuroImage
47:S102, 2009; Fonov, Evans, Botteron, Almli, McKinstry, Collins, NeuroImage 54:313, 2011), of which nilearn's wheel
ships T1, grey and white matter, licence "unknown" as it says. Atlases of the centre go round with this notice:

    Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
    University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
    without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
    University make no representations about the suitability of this software for any purpose. It is provided "as is"
    without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property
    loss, or injury to subjects or patients resulting from the use or misuse of this software package.

The template is an average of 152 people, so its cortex is blurred and the same in all. Every patient therefore gets an
affine map, a smooth random deformation, ventricles of another size, and sulci of its own; tumours push all this aside.
Smooth fields live on a grid of control points (cubic B-splines) over the brain box and are evaluated on the voxels
without BLAS, so that the bytes of a patient do not depend on the number of threads.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

Volume = npt.NDArray[np.floating[Any]]
Point = npt.NDArray[np.float64]

FIELD_OF_VIEW_MM = (240, 240, 155)  # of BraTS, whose first voxel at 1 mm has its centre at 0
BOX_MM = ((36.0, 204.0), (24.0, 228.0), (0.0, 155.0))  # the part of it that brains reach
CENTRE_MM = np.array((119.5, 126.0, 72.0))  # where the middle of the template comes to lie
KNOT_MM = 3.0


@dataclass(frozen=True)
class Template:
    """The parts of the template that are deformed; arrays in template voxels of 1 mm.

    Attributes:
        grey: Fraction of grey matter.
        white: Fraction of white matter.
        depth_mm: Distance to the brain's surface, positive inside, every second voxel.
        origin: Template voxel of the point (0, 0, 0) of MNI space.
    """

    grey: Volume
    white: Volume
    depth_mm: Volume
    origin: Point


@dataclass(frozen=True)
class Grid:
    """Voxels of the brain box at one spacing, in the millimetres of BraTS' field of view.

    Attributes:
        spacing_mm: Edge of a voxel.
        shape: Of the whole field of view.
        box: Where the brain lies in it.
    """

    spacing_mm: float
    shape: tuple[int, int, int]
    box: tuple[slice, slice, slice]

    @classmethod
    def at(cls, spacing_mm: float) -> "Grid":
        """The grid with voxels of `spacing_mm` over the field of view of BraTS."""
        x, y, z = (int(np.ceil(n / spacing_mm - 1e-6)) for n in FIELD_OF_VIEW_MM)
        bx, by, bz = (
            slice(int(np.ceil(low / spacing_mm)), min(n, int(high / spacing_mm)))
            for (low, high), n in zip(BOX_MM, (x, y, z), strict=True)
        )
        return cls(spacing_mm, (x, y, z), (bx, by, bz))

    def around(self, region: npt.NDArray[np.bool_]) -> "Grid":
        """The same voxels with the box cut down to a region that is given at the control points."""
        box = []
        for axis in range(3):
            others = tuple(k for k in range(3) if k != axis)
            inside = np.flatnonzero(region.any(axis=others))
            low, high = (BOX_MM[axis][0] + (int(end) - 1) * KNOT_MM for end in (inside[0] - 1, inside[-1] + 1))
            kept = np.flatnonzero((self.centres_mm(axis) >= low) & (self.centres_mm(axis) <= high))
            box.append(slice(self.box[axis].start + int(kept[0]), self.box[axis].start + int(kept[-1]) + 1))
        return Grid(self.spacing_mm, self.shape, (box[0], box[1], box[2]))

    def centres_mm(self, axis: int) -> npt.NDArray[np.float64]:
        """Centres of the box' voxels along an axis."""
        index = np.arange(self.box[axis].start, self.box[axis].stop)
        return np.asarray(index * self.spacing_mm + (self.spacing_mm - 1) / 2)


@dataclass(frozen=True)
class Lesion:
    """One tumour, in millimetres.

    Attributes:
        core_radius_mm: Radius of the sphere with the volume of the tumour core (necrosis and enhancing rim).
        rim_mm: Mean thickness of the enhancing rim; 0 for a tumour that does not enhance.
        oedema_ml: Volume of the oedema around the core.
        push_mm: How far the tumour displaces the tissue at its edge.
        roughness: How irregular the core is, 0 for an ellipsoid.
    """

    core_radius_mm: float
    rim_mm: float
    oedema_ml: float
    push_mm: float
    roughness: float


@dataclass(frozen=True)
class Individual:
    """A person's brain with room for the tumours; every array covers the control points.

    Attributes:
        mni_mm: Three coordinates in MNI space.
        grey: Fraction of grey matter.
        white: Fraction of white matter.
        depth_mm: Distance to the surface, positive inside.
        centres_mm: Of the tumours, in mm of the field of view.
    """

    mni_mm: list[Volume]
    grey: Volume
    white: Volume
    depth_mm: Volume
    centres_mm: list[Point]


@dataclass(frozen=True)
class Anatomy:
    """Tissue of a person; every array covers the voxels of the brain box.

    Attributes:
        mask: Brain without skull.
        depth_mm: Distance to the surface, positive inside.
        csf: Fraction of cerebrospinal fluid; with grey and white it adds up to 1.
        grey: Fraction of grey matter.
        white: Fraction of white matter.
        mni_mm: Three coordinates in MNI space.
        fine: Noise of 2 mm, unit variance, for textures.
        mid: Noise of 5 mm, unit variance.
    """

    mask: npt.NDArray[np.bool_]
    depth_mm: Volume
    csf: Volume
    grey: Volume
    white: Volume
    mni_mm: list[Volume]
    fine: Volume
    mid: Volume


@cache
def load_template() -> Template:
    """Read the template out of nilearn's wheel without importing nilearn, which takes seconds.

    Raises:
        ModuleNotFoundError: nilearn is not installed.
    """
    package = importlib.util.find_spec("nilearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the phantom takes its anatomy from nilearn's wheel: pip install nilearn")
    folder = Path(package.origin).parent / "datasets" / "data"
    images = {}
    for tissue in ("t1", "gm", "wm"):
        image = nib.nifti1.load(folder / f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz")  # type: ignore[no-untyped-call]
        images[tissue] = np.asarray(image.dataobj)
    origin = np.linalg.inv(image.affine)[:3, 3]
    inside = ndimage.binary_opening(images["t1"][::2, ::2, ::2] > 0, iterations=2)  # without the optic nerves' remnants
    depth = 2 * (ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside))
    depth = ndimage.gaussian_filter(depth.astype(np.float32), 0.7)
    return Template(images["gm"] / np.float32(255), images["wm"] / np.float32(255), depth, origin)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Volume:
    """Gaussian noise of unit variance with the correlation of a Gaussian filter of `sigma` samples."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, sigma, mode="wrap", truncate=3)
    return np.asarray(noise / noise.std(), dtype=np.float32)


def knots(knot_mm: float = KNOT_MM) -> tuple[int, int, int]:
    """Number of control points over the brain box; the first lies one knot before it."""
    x, y, z = (int(np.ceil((high - low) / knot_mm)) + 4 for low, high in BOX_MM)
    return x, y, z


def evaluate(coefficients: Volume, grid: Grid, knot_mm: float = KNOT_MM) -> Volume:
    """Cubic B-spline with these coefficients at the voxels of the grid's brain box; linear functions stay linear."""
    out = coefficients
    for axis in (2, 1, 0):  # the largest step last, along the axis whose slices are contiguous
        position = (grid.centres_mm(axis) - BOX_MM[axis][0]) / knot_mm + 1
        first = np.floor(position).astype(int) - 1
        t = (position - first - 1).astype(np.float32)
        weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        along = [1, 1, 1]
        along[axis] = -1
        total = np.take(out, first, axis) * (weights[0] / 6).reshape(along)
        for k in (1, 2, 3):
            total += np.take(out, np.clip(first + k, 0, out.shape[axis] - 1), axis) * (weights[k] / 6).reshape(along)
        out = total
    return out


def knot_positions_mm() -> tuple[Volume, Volume, Volume]:
    """Where the control points lie in the field of view."""
    axes = [
        (np.arange(n, dtype=np.float32) - 1) * np.float32(KNOT_MM) + np.float32(low)
        for n, (low, _) in zip(knots(), BOX_MM, strict=True)
    ]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return x, y, z


def sample(array: Volume, coordinates: list[Volume]) -> Volume:
    """Linear interpolation of an array at fractional indices."""
    return np.asarray(ndimage.map_coordinates(array, coordinates, np.float32, order=1, mode="nearest"))


def sigmoid(x: Volume) -> Volume:
    """Logistic function, by tanh because it cannot overflow."""
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * x), dtype=np.float32)


def individual_map(rng: np.random.Generator, template: Template) -> list[Volume]:
    """MNI coordinates in millimetres at the control points: affine map, deformation and ventricles of one patient."""
    a, b, c = np.radians(rng.normal(0, (3.0, 2.0, 2.5)))  # nodding, tilting, turning
    nod = np.array(((1, 0, 0), (0, np.cos(a), -np.sin(a)), (0, np.sin(a), np.cos(a))))
    tilt = np.array(((np.cos(b), 0, np.sin(b)), (0, 1, 0), (-np.sin(b), 0, np.cos(b))))
    turn = np.array(((np.cos(c), -np.sin(c), 0), (np.sin(c), np.cos(c), 0), (0, 0, 1)))
    scale = rng.normal(0.927, 0.017) * rng.normal(1, 0.014, 3)
    # BraTS' first two axes run to the left and to the back, those of MNI to the right and to the front.
    matrix = np.diag((-1, -1, 1) / scale) @ nod @ tilt @ turn
    shift = np.array((0, -17, 5)) + rng.normal(0, (0.8, 2.0, 2.0))
    position = [x - np.float32(c) for x, c in zip(knot_positions_mm(), CENTRE_MM, strict=True)]

    def affine(points: list[Volume]) -> list[Volume]:
        return [
            np.asarray(sum(m * x for m, x in zip(row, points, strict=True)) + by, np.float32)
            for row, by in zip(matrix.astype(np.float32), shift.astype(np.float32), strict=True)
        ]

    depth = depth_at(template, affine(position))
    inside = np.clip(depth / 30, 0.2, 1)  # skulls are smoother than what they hold; steeper, and the map folds
    scales = ((32.0, 4.0, np.maximum(inside, 0.5)), (14.0, 2.6, inside), (7.0, 1.2, inside))
    for sigma_mm, amplitude_mm, weight in scales:
        for axis in range(3):
            noise = smooth_noise(rng, knots(), sigma_mm / KNOT_MM)
            position[axis] = position[axis] + amplitude_mm * weight * noise
    mni = affine(position)
    # Enlarge or shrink the lateral ventricles by stretching the template around each of them.
    stretch = rng.uniform(-0.25, 0.5)
    side = np.tanh(mni[0] / 4) * 12
    offset = [mni[0] - side, mni[1] + 15, mni[2] - 16]
    weight = stretch * np.exp(-((offset[0] / 16) ** 2) - (offset[1] / 42) ** 2 - (offset[2] / 18) ** 2)
    return [np.asarray(m - weight * o, dtype=np.float32) for m, o in zip(mni, offset, strict=True)]


def depth_at(template: Template, mni: list[Volume]) -> Volume:
    """Distance to the brain's surface at MNI coordinates, in mm of the template, positive inside."""
    return sample(template.depth_mm, [(m + np.float32(o)) / 2 for m, o in zip(mni, template.origin, strict=True)])


def tissue_at(template: Template, mni: list[Volume]) -> tuple[Volume, Volume]:
    """Grey and white matter of the template at MNI coordinates."""
    voxel = [m + np.float32(o) for m, o in zip(mni, template.origin, strict=True)]
    return sample(template.grey, voxel), sample(template.white, voxel)


def cerebrum(mni: list[Volume]) -> Volume:
    """1 above the tentorium and outside the brain stem, 0 below: where sulci and tumours belong."""
    x, y, z = mni
    tentorium = -6 - 0.35 * np.maximum(-38 - y, 0) - 30 * sigmoid((y + 28) / 4) * sigmoid((np.abs(x) - 20) / 3)
    return sigmoid((z - tentorium) / 2)


def sulci(rng: np.random.Generator, mni: list[Volume]) -> tuple[Volume, Volume]:
    """Walls of a patient's own sulci, at the control points.

    Returns:
        Signed distance in mm to the nearest wall (a sheet that stands on the surface), and how deep it reaches in mm.
    """
    side = np.where(mni[0] < 0, np.float32(-1), np.float32(1))
    offset = [mni[0] - side * 20, mni[1] + 18, mni[2] - 8]
    radius = np.sqrt(offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2) + 1
    # Noise that is constant along rays from the middle of each hemisphere has its zeros on sheets along these rays.
    ray = [(62 * o / radius + 100) / KNOT_MM + s for o, s in zip(offset, (side * 0.5, 0, 0), strict=True)]
    cube = (68, 68, 68)
    wall = sample(smooth_noise(rng, cube, 3.4 / KNOT_MM), ray) + side * np.float32(0.01)
    gradient = np.sqrt(sum(g**2 for g in np.gradient(wall, KNOT_MM)))
    gradient = ndimage.gaussian_filter(gradient, 1.5)
    depth = 11 + 5 * sample(smooth_noise(rng, cube, 4.0), ray)
    return np.asarray(wall / (gradient + 0.03), np.float32), np.asarray(depth, np.float32)


def place(
    rng: np.random.Generator, mni: list[Volume], white: Volume, depth: Volume, lesion: Lesion, taken: list[Point]
) -> Point:
    """Centre of a tumour in mm of the field of view: in the white matter of a hemisphere, off the midline."""
    radius = lesion.core_radius_mm
    allowed = (white > 0.45) & (np.abs(mni[0]) > 10 + 0.3 * radius) & (cerebrum(mni) > 0.8)
    allowed &= (depth > 5 + 0.45 * radius) & (mni[2] > -22)
    position = knot_positions_mm()
    for centre in taken:
        allowed &= sum((x - np.float32(c)) ** 2 for x, c in zip(position, centre, strict=True)) > 45**2
    candidates = np.flatnonzero(allowed)
    chosen = int(candidates[rng.integers(len(candidates))])
    return np.array([x.flat[chosen] for x in position], dtype=np.float64)


def displaced(mni: list[Volume], depth: Volume, centre: Point, lesion: Lesion) -> list[Volume]:
    """The map after a tumour has pushed the tissue away from its centre; the skull holds the surface in place."""
    offset = [x - np.float32(c) for x, c in zip(knot_positions_mm(), centre, strict=True)]
    radius = np.sqrt(offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2) + np.float32(1e-3)
    edge = lesion.core_radius_mm
    reach = np.where(radius < edge, radius / edge, np.exp(-(radius - edge) / 30))
    push = lesion.push_mm * reach * np.clip(depth / 14, 0, 1)
    index = np.indices(knots(), dtype=np.float32)
    source = [i - push * o / radius / KNOT_MM for i, o in zip(index, offset, strict=True)]
    return [sample(m, source) for m in mni]


def sharpened(grey: Volume, white: Volume) -> tuple[Volume, Volume]:
    """Tissue fractions nearer to one person's: the template's are blurred by the average over 152."""
    fluid = np.clip(1 - grey - white, 0, 1) ** 2
    total = grey**2 + white**2 + fluid + np.float32(1e-6)
    return grey**2 / total, white**2 / total


def brain_mask(depth: Volume, grid: Grid) -> npt.NDArray[np.bool_]:
    """The brain as skull stripping leaves it: one piece with a smooth edge 1 mm below the surface."""
    inside = ndimage.gaussian_filter((depth > 1).astype(np.float32), 1.2 / grid.spacing_mm, truncate=3) > 0.5
    pieces, _ = ndimage.label(inside)
    return np.asarray(pieces == np.argmax(np.bincount(pieces.ravel())[1:]) + 1)


def individual(rng: np.random.Generator, lesions: Sequence[Lesion]) -> Individual:
    """Deform the template into one person and make room for the tumours, wherever they find a place."""
    template = load_template()
    mni = individual_map(rng, template)
    white, depth = tissue_at(template, mni)[1], depth_at(template, mni)
    centres: list[Point] = []
    for lesion in lesions:
        centres.append(place(rng, mni, white, depth, lesion, centres))
        mni = displaced(mni, depth, centres[-1], lesion)
    grey, white = tissue_at(template, mni)
    return Individual(mni, grey, white, depth_at(template, mni), centres)


def voxelized(rng: np.random.Generator, person: Individual, sulcal_width_mm: float, grid: Grid) -> Anatomy:
    """Tissue fractions at the voxels: the deformed template with sulci and folia of the person's own.

    Args:
        rng: Source of everything random.
        person: The deformation.
        sulcal_width_mm: Half the width of the sulci at the surface.
        grid: Voxels at which to evaluate.
    """
    template = load_template()
    wall, reach = sulci(rng, person.mni_mm)
    fine = evaluate(rng.standard_normal(knots(1.6), dtype=np.float32), grid, 1.6)
    fine /= fine.std()
    mid = evaluate(smooth_noise(rng, knots(), 1.2), grid)
    mni = [evaluate(m, grid) for m in person.mni_mm]
    depth = depth_at(template, mni)
    mask = brain_mask(depth - 0.3 * mid - 0.2 * fine, grid)

    # What costs time is done near the brain only, a third of the box.
    near = depth > -5
    x, y, z = (m[near] for m in mni)
    grey, white = sharpened(*tissue_at(template, [x, y, z]))
    d, rough = depth[near], mid[near]
    distance = np.abs(evaluate(wall, grid)[near])
    below = evaluate(reach, grid)[near] - d  # mm from here to the floor of the nearest sulcus, if it reached so deep
    where = evaluate(cerebrum(person.mni_mm), grid)[near]
    width = sulcal_width_mm * np.clip(1.3 - d / 25, 0.4, 1.2)  # sulci narrow towards their floor
    fluid = sigmoid((width + 0.25 * rough - distance) / 0.3) * sigmoid(below / 0.8) * where
    cortex = sigmoid((width + 2.6 + 0.4 * rough - distance) / 0.5) * sigmoid((below + 2.6) / 0.8) * where
    # Folia of the cerebellum: thin leaves, wider apart than the template's average shows.
    leaf = np.sin((0.5 * y + z) * np.float32(2 * np.pi / 5.5) + 1.6 * rough)
    folia = (1 - where) * sigmoid((9 - d) / 2) * (np.abs(x) > 8)
    fluid = np.maximum(fluid, 0.45 * sigmoid((leaf - 0.75) / 0.1) * folia)
    white = np.maximum(white, 0.55 * sigmoid((-leaf - 0.6) / 0.1) * folia * sigmoid((d - 3) / 0.8)) * (1 - cortex)
    grey = np.maximum(grey, cortex * np.clip(1.3 * (grey + white + cortex), 0, 1)) * (1 - fluid)
    total = np.maximum(grey + white, 1)

    fractions = np.zeros((2, *near.shape), np.float32)
    fractions[:, near] = grey / total, white / total
    csf = 1 - fractions[0] - fractions[1]
    return Anatomy(mask, depth, csf, fractions[0], fractions[1], mni, fine, mid)
