"""From slices back to the patient's own space: the voxels, axes and label codes of the own files.

The inverse of `slices.slice_volume`. Slices that were not kept come back as background, and blocks that were reduced to
one pixel as blocks of one value; at the native resolution no label is lost on the kept slices.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.layouts import AXES
from datamodules.slice_set import CHANNELS, CLASSES, Manifest, Slices, SliceSet, write_atomically
from datamodules.slices import native_size_px

Voxels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class NativeSpace:
    """What the segmentation file of a volume says about its voxels; the manifest of a slice set keeps it as JSON.

    Attributes:
        shape: (X, Y, Z) of the file.
        axes: direction in which each axis of the file points, such as "LPS".
        affine: rows of the 4 x 4 matrix from voxel indices of the file to mm.
        qform_code: what the header says about its first way to give the affine (NIfTI-1).
        sform_code: the same of the second way.
        label_codes: code in the file of each class 0..3.
    """

    shape: Sequence[int]
    axes: str
    affine: Sequence[Sequence[float]]
    qform_code: int
    sform_code: int
    label_codes: Sequence[int]


def describe_file(segmentation: Path, label_codes: Mapping[int, int]) -> NativeSpace:
    """Read the header of a segmentation file; `label_codes` maps its codes to class indices, as `Volume` has it."""
    import nibabel

    library: Any = nibabel
    image = library.load(segmentation)
    codes: dict[int, int] = {}
    for code, index in label_codes.items():
        codes.setdefault(index, code)  # the first code of the background is 0
    return NativeSpace(
        shape=[int(length) for length in image.shape],
        axes="".join(library.aff2axcodes(image.affine)),
        affine=image.affine.tolist(),
        qform_code=int(image.header["qform_code"]),
        sform_code=int(image.header["sform_code"]),
        label_codes=[codes[index] for index in range(len(CLASSES))],
    )


def native_space(manifest: Manifest, volume: str) -> NativeSpace:
    """Look the space of a volume up in the manifest of its slice set.

    Raises:
        ValueError: if the set was prepared by a version that did not record it.
    """
    entries = {entry["volume"]: entry for entry in manifest.content.get("volumes", [])}
    try:
        return NativeSpace(**entries[volume]["native"])
    except KeyError as error:
        raise ValueError(
            f"{manifest.root}/dataset.json does not say in which space the files of {volume} are; an earlier version "
            "made it. Run the same `standin prepare` again: it adds what is missing and leaves the slices as they are."
        ) from error


def to_native(slices: Slices, z: npt.ArrayLike, space: NativeSpace, downsampling: int) -> Voxels:
    """Undo `slice_volume`: from the slices of one volume to its own voxels.

    Args:
        slices: class indices or grey levels, uint8 (n, H, W).
        z: place of each slice in the volume, (n,), as the index of the slice set has it.
        space: of the volume.
        downsampling: sides of the blocks of native pixels that became one pixel.

    Returns:
        uint8 (X, Y, Z), axes as in the patient's file; 0 where there was no slice.

    Raises:
        ValueError: if the slices do not fit the space.
    """
    import nibabel

    orientations: Any = nibabel.orientations
    own, ours = orientations.axcodes2ornt(space.axes), orientations.axcodes2ornt(AXES)
    order = np.argsort(orientations.ornt_transform(own, ours)[:, 0])
    shape = tuple(space.shape[axis] for axis in order)
    native_px = native_size_px(shape)
    places = np.asarray(z, np.int64)
    size = native_px // downsampling
    if slices.shape != (len(places), size, size):
        raise ValueError(
            f"Expected {len(places)} slices of {size} x {size} pixels for a volume of {tuple(space.shape)} voxels and "
            f"downsampling {downsampling}, but got {slices.shape}."
        )
    if len(np.unique(places)) < len(places) or not ((places >= 0) & (places < shape[2])).all():
        raise ValueError(f"Expected each z once and from 0 to {shape[2] - 1}, but got {places.tolist()}.")
    whole = np.repeat(np.repeat(slices, downsampling, axis=1), downsampling, axis=2)  # (n, native_px, native_px)
    x, y = ((native_px - length) // 2 for length in shape[:2])  # the odd pixel of the padding was at the end
    turned = np.zeros(shape, np.uint8)
    turned[:, :, places] = whole[:, x : x + shape[0], y : y + shape[1]].transpose(1, 2, 0)
    back = orientations.apply_orientation(turned, orientations.ornt_transform(ours, own))
    return np.ascontiguousarray(back)


def stored_volume(slices: SliceSet, volume: str, channel: str) -> Voxels:
    """Bring a channel of the stored slices of a volume back to the patient's own voxels.

    Returns:
        uint8 (X, Y, Z). Of "label" this is the reference: what `to_native` gives for a perfect prediction.
    """
    rows = slices.index.index[slices.index["volume"] == volume].to_numpy()
    values = slices.read(rows)[:, CHANNELS.index(channel)]
    downsampling = slices.manifest.content["downsampling"]
    return to_native(values, slices.index["z"][rows], native_space(slices.manifest, volume), downsampling)


def save_label_map(path: Path, labels: Voxels, space: NativeSpace) -> None:
    """Write class indices (X, Y, Z) as the label codes of the patient's own file; see `save_volume`."""
    save_volume(path, np.asarray(space.label_codes, np.uint8)[labels], space)


def save_volume(path: Path, values: Voxels, space: NativeSpace) -> None:
    """Write a `.nii.gz` file atomically, the same bytes for the same content.

    Args:
        path: the file; its folder is made.
        values: uint8 (X, Y, Z), axes as in the patient's file.
        space: of the volume.
    """
    import nibabel

    library: Any = nibabel
    image = library.Nifti1Image(values, np.asarray(space.affine))
    image.set_qform(image.affine, space.qform_code)
    image.set_sform(image.affine, space.sform_code)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
