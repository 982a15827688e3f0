"""Read DICOM images: each frame with its own place, rescale and window, put in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medbudget.data.decoding import (
    decode,
    find_padding,
    get_number,
    get_numbers,
    get_text,
    quiet,
    read_dataset,
    read_window,
    rescale,
)
from medbudget.data.items import BrokenCase
from medbudget.data.pixels import MAX_BYTES, PLANE_OF, Array, Numbers, Pixels, Window

if TYPE_CHECKING:
    from pydicom import Dataset

# millimetres of a pixel: in the patient, at the detector, on the film
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame or slice."""

    values: Array
    padding: Array | None
    window: Window | None
    position: Numbers | None
    orientation: Numbers | None
    spacing: Numbers | None


@quiet
def read_dicom(paths: Sequence[Path]) -> Pixels:
    """Read files of one series, or one file of one or more frames, as they are stored."""
    frames, kinds = [], set()
    for path in paths:
        data = read_dataset(path)
        frames += _read_frames(data)
        kinds.add(get_text(data, "PhotometricInterpretation"))
    first = frames[0]
    if len({(f.values.shape, f.spacing is None) for f in frames}) > 1 or len(kinds) > 1:
        raise BrokenCase("its slices differ in size or in colour model")
    if len(frames) * first.values.size * 4 > MAX_BYTES:
        raise BrokenCase(f"its {len(frames)} slices are too large for the memory; split the series")
    frame, step, order, uncut = _place(frames)
    frames = [frames[i] for i in order]
    none = np.zeros(first.values.shape[:2], bool)
    padded = any(f.padding is not None for f in frames)
    windows = tuple(f.window for f in frames)
    high, wide = get_numbers(data, "PixelAspectRatio", 2) or (1.0, 1.0)
    detector = "PixelSpacing" not in data and "ImagerPixelSpacing" in data
    spacing = first.spacing
    return Pixels(
        np.stack([f.values for f in frames]),
        spacing=(spacing[0], spacing[1]) if spacing else None,
        aspect=(high, wide),
        windows=windows if any(windows) else (),
        padding=np.stack([none if f.padding is None else f.padding for f in frames])
        if padded
        else None,
        inverted=kinds == {"MONOCHROME1"},
        note="spacing at the detector" if detector else "",
        frame=frame,
        steps=(*(spacing or (1.0, 1.0))[::-1], step) if frame else (),
        uncut=uncut,
    )


def _place(frames: Sequence[Frame]) -> tuple[Numbers, float, list[int], str]:
    """Return origin and direction, distance and order of slices, and why no other plane is cut."""
    first, n = frames[0], len(frames)
    if {f.position is None for f in frames} == {True, False}:
        raise BrokenCase("some of its slices have a position, others none")
    if first.orientation is None or (n > 1 and first.position is None):
        return (), 1.0, list(range(n)), "it has no position and orientation"
    for frame in frames[1:]:
        if frame.orientation is None or not is_parallel(frame.orientation, first.orientation):
            raise BrokenCase("its frames lie in several planes; export each as a file of its own")
        if not np.allclose(frame.spacing or 0, first.spacing or 0, rtol=1e-3):
            raise BrokenCase("its frames have several pixel spacings")
    axes = measure_axes(first.orientation)
    places = np.array([f.position or (0.0, 0.0, 0.0) for f in frames])
    along = places @ axes[:, 2]
    order = [int(i) for i in np.argsort(along, kind="stable")]
    places, along = places[order], along[order]
    steps = np.diff(along)
    if n > 1 and steps.min() < 1e-3:
        raise BrokenCase(
            "several images of a series lie at one position (time points, b-values?); "
            "put them into series of their own"
        )
    step = float(np.median(steps)) if n > 1 else 1.0
    drift = places - places[0] - np.outer(along - along[0], axes[:, 2])
    uncut = "" if first.spacing else "it states no pixel spacing"
    if n > 1 and is_uneven(steps):
        uncut = f"its slices lie {steps.min():g} to {steps.max():g} mm apart (is one missing?)"
    elif np.abs(drift).max() > 0.1 * step:
        uncut = "its slices are shifted (gantry tilt)"
    return (*map(float, places[0]), *map(float, axes.ravel())), step, order, uncut


def is_parallel(one: Numbers, other: Numbers) -> bool:
    """Do two orientations show the same plane, to a few hundredths of a degree?"""
    return bool(np.allclose(one, other, atol=1e-3))


def is_uneven(steps: Array) -> bool:
    """Does a distance of slices differ by a tenth from the median one?"""
    middle = np.median(steps)
    return bool((np.abs(steps - middle) > 0.1 * middle).any())


def measure_axes(orientation: Numbers) -> Array:
    """Return the directions of columns, rows and slices as the columns of a matrix."""
    right, down = np.array(orientation[:3]), np.array(orientation[3:])
    lengths = np.linalg.norm(right), np.linalg.norm(down)
    if not np.allclose(lengths, 1, atol=0.02) or abs(right @ down) > 0.02:
        raise BrokenCase("its orientation is no pair of directions at right angles")
    right = right / lengths[0]
    down = down - right * (right @ down)
    down = down / np.linalg.norm(down)
    return np.stack([right, down, np.cross(right, down)], axis=1)


def find_plane(axes: Array) -> str:
    """Return the plane that slices lie in, nearest."""
    return PLANE_OF["LPS"[int(np.abs(axes[:, 2]).argmax())]]


def _read_frames(data: Dataset) -> list[Frame]:
    """Read all frames of a file, each with what its functional groups say of it."""
    stored = decode(data)
    n, gray = len(stored), stored.ndim == 3
    shared = data.get("SharedFunctionalGroupsSequence") or []
    per_frame = data.get("PerFrameFunctionalGroupsSequence") or []
    if per_frame and len(per_frame) != n:
        raise BrokenCase(f"its header describes {len(per_frame)} frames, of {n}")

    def group(k: int, name: str) -> Dataset:
        for owner in (*per_frame[k : k + 1], *shared[:1]):
            if owner.get(name):
                return owner[name].value[0]
        return data

    frames = []
    for k, values in enumerate(stored):
        padding, window = None, None
        if gray:
            padding = find_padding(values, data)
            values = rescale(values, group(k, "PixelValueTransformationSequence"))
            window = read_window(group(k, "FrameVOILUTSequence"))
            bits = int(get_number(data, "BitsStored", 8))
            if window is None and bits < 8 and values.dtype == np.uint8:
                window = Window(0, 2**bits - 1)
        place = group(k, "PlanePositionSequence")
        position = get_numbers(place, "ImagePositionPatient", 3)
        measures = group(k, "PixelMeasuresSequence")
        spacing = next(filter(None, (get_numbers(measures, s, 2) for s in SPACINGS)), None)
        if spacing is not None and min(spacing) <= 0:
            raise BrokenCase("its pixel spacing is not above 0")
        orientation = get_numbers(
            group(k, "PlaneOrientationSequence"), "ImageOrientationPatient", 6
        )
        position = None if n > 1 and place is data else position
        frames.append(Frame(values, padding, window, position, orientation, spacing))
    return frames
