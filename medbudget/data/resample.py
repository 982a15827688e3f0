"""Volumes and masks of a study: read and checked, brought to one grid, windowed, and cut.

Two geometries: in patient space ("physical"), and as the released 2-D conversion of de Wilde et al.
(2024) does it ("paper"), whose order of operations is reimplemented here, not copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from medbudget.data.items import BrokenCase
from medbudget.data.itk import read_volume
from medbudget.data.pixels import Array

Vector = tuple[float, ...]
# planes and masks by name, slice index, intensities that became 0 and 255
Cut = tuple[dict[str, Array], dict[str, Array], int, dict[str, tuple[float, float]]]

SPACING = (3.0, 0.5, 0.5)  # mm: slice, row, column
GRID = (30, 300, 300)  # voxels: slices, rows, columns
PERCENTILES = (0.5, 99.9)
TIMES = {"hbv": 4.0}  # white is that many times the gland's level; a tumour is two to three times
CENTRE = (30, 150, 150)  # voxels that set the window: farther out, the coil outshines the prostate
to_array = sitk.GetArrayFromImage  # (slices, rows, columns), a copy: a view dies with its image
MARGIN = 12  # voxels around what is resampled; a cubic B-spline has forgotten the rest by then


def describe_grid() -> dict[str, Any]:
    """Return what the settings of a preparation say of the grid and the window."""
    return {
        "spacing_mm": SPACING, "voxels": GRID, "percentiles": PERCENTILES, "times_gland": TIMES,
        "centre": CENTRE,
    }  # fmt: skip


def read_sequence(t2w: Path, case_id: str, name: str) -> sitk.Image:
    """Read one sequence of a study, which lies beside its T2W file."""
    return _read_volume(t2w.with_name(f"{case_id}_{name}.mha"), f"sequence {name}")


def _read_volume(file: Path, what: str) -> sitk.Image:
    """Read a scalar 3-D volume of finite values, or say what is wrong with the file."""
    if not file.is_file():
        raise BrokenCase(f"missing {what}: no {file.name}")
    try:
        image = read_volume(file)
    except BrokenCase as error:
        raise BrokenCase(f"{file.name}: {error}") from None
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise BrokenCase(f"{file.name} is not a gray 3-D volume: its size is {image.GetSize()}")
    if bad := int((~np.isfinite(to_array(image))).sum()):
        raise BrokenCase(f"{file.name} has {bad} values that are infinite or not a number")
    return image


class EmptyMask(BrokenCase):
    """A mask without a voxel that counts."""


def read_mask(file: Path, least: int, t2w: sitk.Image) -> sitk.Image:
    """Read a mask as 0 and 1, and check that it belongs to this T2W."""
    name = f"{file.parent.name}/{file.name}"
    image = _read_volume(file, f"mask ({file.parent.parent.name}/{file.parent.name})")
    apart = float(np.abs(_find_corners(image) - _find_corners(t2w)).max())
    if apart > 2 * max(*image.GetSpacing(), *t2w.GetSpacing()):
        raise BrokenCase(f"mask {name} lies {apart:.0f} mm off T2W: it belongs to another volume")
    mask = sitk.Cast(image >= least, sitk.sitkUInt8)
    if not to_array(mask).any():
        raise EmptyMask(f"mask {name} is empty (no value >= {least})")
    return mask


def _find_corners(image: sitk.Image) -> Array:
    """Return the lowest and highest coordinates of a volume's outer corners, in mm."""
    ends = ([-0.5] * 3, [edge - 0.5 for edge in image.GetSize()])
    corners = [image.TransformContinuousIndexToPhysicalPoint(end) for end in ends]
    return np.sort(corners, axis=0)  # whichever way it is stored


def cut_physical(
    volumes: Mapping[str, sitk.Image], masks: Mapping[str, sitk.Image], window: str
) -> Cut:
    """Cut one slice of T2W's grid in patient space out of all volumes.

    `masks` are "gland" and, in a positive case, "tumour", of 0 and 1.
    """
    # LPS: rows run to the back, columns to the left, however the file was stored
    origin, direction = target_grid(sitk.DICOMOrient(volumes["t2w"], "LPS"))
    inset = (np.array(GRID) - np.array(CENTRE)) / 2 * np.array(SPACING)
    centre = (CENTRE, shift(origin, direction, inset), direction)
    nearest = sitk.sitkNearestNeighbor
    stacks = {n: _resample(m, GRID, origin, direction, nearest) for n, m in masks.items()}
    index = _choose_slice(stacks)
    corner = shift(origin, direction, (index * SPACING[0], 0, 0))
    planes, ranges = {}, {}
    for name, volume in volumes.items():
        seen = volume if window == "volume" else _crop_to(volume, *centre, margin=0)
        ends = (0, 100) if window == "volume" else PERCENTILES
        low, high = (float(v) for v in np.percentile(to_array(seen), ends))
        if window == "gland" and name in TIMES:
            high = low + TIMES[name] * _find_level(volume, masks["gland"], low, name)
        near = _crop_to(volume, (1, *GRID[1:]), corner, direction, margin=MARGIN)
        near = sitk.Cast(near, sitk.sitkFloat32)
        plane = _resample(near, (1, *GRID[1:]), corner, direction, sitk.sitkBSpline)[0]
        planes[name] = quantise(plane, low, high, name)
        ranges[name] = (low, high)
    return planes, {name: stack[index] for name, stack in stacks.items()}, index, ranges


def _find_level(volume: sitk.Image, mask: sitk.Image, low: float, name: str) -> float:
    """Return the median under a mask, above `low`, without what is more than twice as bright."""
    inside = sitk.Resample(mask, volume, sitk.Transform(), sitk.sitkNearestNeighbor)
    values = to_array(volume)[to_array(inside) > 0] - low
    if not values.size:
        raise BrokenCase(f"the gland lies outside sequence {name}'s field of view")
    usual = values[values <= 2 * max(0.0, float(np.median(values)))]  # else a tumour raises it
    return float(np.median(usual))


def cut_paper(volumes: Mapping[str, sitk.Image], masks: Mapping[str, sitk.Image]) -> Cut:
    """Cut as the released script does: every volume on its own, scaled before it is cropped."""
    nearest = sitk.sitkNearestNeighbor
    stacks = {name: _crop_centre(_respace(mask, nearest)) for name, mask in masks.items()}
    index = _choose_slice(stacks)
    planes, ranges = {}, {}
    for name, volume in volumes.items():
        values = _respace(volume, sitk.sitkBSpline)
        low, high = float(values.min()), float(values.max())
        scaled = (values - values.min()) / (values.max() - values.min())
        planes[name] = (_crop_centre(scaled)[index] * 255).astype(np.uint8)  # the script truncates
        ranges[name] = (low, high)
    return planes, {name: stack[index] for name, stack in stacks.items()}, index, ranges


def target_grid(t2w: sitk.Image) -> tuple[Vector, Vector]:
    """Return origin and direction (row-major) of the target grid of a T2W volume.

    The grid continues T2W's own first voxel in steps of the target spacing, and is centred on T2W
    to within half a step.
    """
    spacing = np.array(SPACING[::-1])
    steps = np.round(np.array(t2w.GetSize()) * np.array(t2w.GetSpacing()) / spacing)
    corner = np.trunc((steps - GRID[::-1]) / 2) * spacing
    return shift(t2w.GetOrigin(), t2w.GetDirection(), corner[::-1]), t2w.GetDirection()


def shift(origin: Vector, direction: Vector, millimetres: Sequence[float] | Array) -> Vector:
    """Move a point along slice, row and column."""
    step = np.reshape(direction, (3, 3)) @ np.asarray(millimetres)[::-1]
    return tuple(map(float, np.asarray(origin) + step))


def quantise(values: Array, low: float, high: float, name: str) -> Array:
    """Map intensities low..high to 0..255, clip and round."""
    if not high > low:
        raise BrokenCase(f"sequence {name} has the one value {low:g} around the gland")
    scaled = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255
    return np.rint(scaled).astype(np.uint8)


def _choose_slice(masks: Mapping[str, Array]) -> int:
    """Return the median slice of the gland, or the slice with the largest tumour area."""
    name = "tumour" if "tumour" in masks else "gland"
    area = masks[name].reshape(len(masks[name]), -1).sum(axis=1)
    if not area.any():
        raise BrokenCase(f"the {name} lies outside the crop of {GRID} voxels")
    return int(area.argmax()) if name == "tumour" else int(np.median(np.flatnonzero(area)))


def _resample(
    image: sitk.Image, shape: Sequence[int], origin: Vector, direction: Vector, interpolator: int
) -> Array:
    """Resample onto a grid of the target spacing; 0 outside. One thread: cases run in parallel."""
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in reversed(shape)])
    resampler.SetOutputSpacing(SPACING[::-1])
    resampler.SetOutputOrigin(origin)
    resampler.SetOutputDirection(direction)
    resampler.SetInterpolator(interpolator)
    resampler.SetNumberOfThreads(1)
    return sitk.GetArrayFromImage(resampler.Execute(image))


def _crop_to(
    image: sitk.Image, shape: Sequence[int], origin: Vector, direction: Vector, *, margin: int
) -> sitk.Image:
    """Return the part of a volume under a grid: nothing else is resampled."""
    axes = np.reshape(direction, (3, 3)) * np.array(SPACING[::-1])
    corners = np.array([*np.ndindex(2, 2, 2)]).T * (np.array(shape[::-1]) - 1)[:, None]
    points = (np.asarray(origin)[:, None] + axes @ corners).T.tolist()
    indices = np.array([image.TransformPhysicalPointToContinuousIndex(point) for point in points])
    size = np.array(image.GetSize())
    low = np.clip(np.floor(indices.min(axis=0)) - margin, 0, size - 1).astype(int)
    high = np.clip(np.ceil(indices.max(axis=0)) + margin, 0, size - 1).astype(int)
    if (indices.max(axis=0) < -0.5).any() or (indices.min(axis=0) > size - 0.5).any():
        raise BrokenCase("a sequence lies outside T2W's field of view")
    return image[tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high))]


def _respace(image: sitk.Image, interpolator: int) -> Array:
    """Resample a whole volume to the target spacing, from its own first voxel."""
    extent = np.array(image.GetSize()) * np.array(image.GetSpacing())
    shape = np.round(extent / np.array(SPACING[::-1])).astype(int)[::-1]
    return _resample(image, shape.tolist(), image.GetOrigin(), image.GetDirection(), interpolator)


def _crop_centre(values: Array) -> Array:
    """Crop or zero-pad to the target size around the array's centre."""
    starts = [int((length - wanted) / 2) for length, wanted in zip(values.shape, GRID)]
    lacks = [(max(-s, 0), max(w - n + s, 0)) for s, n, w in zip(starts, values.shape, GRID)]
    crop = tuple(slice(max(s, 0), max(s, 0) + wanted) for s, wanted in zip(starts, GRID))
    return np.pad(values, lacks)[crop]
