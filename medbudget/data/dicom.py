"""Read DICOM images: each frame with its own place, rescale and window, put in order and turned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medbudget.data.decoding import (
    Numbers,
    Window,
    decode,
    find_padding,
    get_number,
    get_numbers,
    get_text,
    measure,
    quiet,
    read_dataset,
    read_window,
    rescale,
)
from medbudget.data.itk import MAX_BYTES, find_turn
from medbudget.data.prepare import BrokenCase

if TYPE_CHECKING:
    from pydicom import Dataset

Array = NDArray[Any]

# millimetres of a pixel: in the patient, at the detector, on the film
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")


@dataclass(frozen=True, eq=False)
class Pixels:
    """What was read."""

    values: Array  # (slices, H, W) gray, or (slices, H, W, 3) uint8 RGB
    spacing: tuple[float, float] | None = None  # mm: row, column; None where nobody stated it
    aspect: tuple[float, float] = (1.0, 1.0)  # height and width of a pixel, where spacing is None
    windows: tuple[Window | None, ...] = ()  # that the file asks for, one for each slice; or ()
    padding: Array | None = None  # (slices, H, W) bool: no image there
    inverted: bool = False  # white stands for the lowest value (MONOCHROME1)
    note: str = ""
    frame: Numbers = ()  # origin and direction of a volume, to compare it with a mask
    steps: Numbers = ()  # mm from pixel to pixel along the directions of `frame`


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
def count_frames(path: Path) -> int:
    """Return how many frames a file has, without reading its pixels."""
    return measure(read_dataset(path, pixels=False), path.stat().st_size)[0]


@quiet
def read_dicom(paths: Sequence[Path], plane: str) -> Pixels:
    """Read files of one series, or one file of one or more frames; see `volumes.read_pixels`."""
    frames, kinds = [], set()
    for path in paths:
        data = read_dataset(path)
        frames += _read_frames(data)
        kinds.add(get_text(data, "PhotometricInterpretation"))
        aspect = get_numbers(data, "PixelAspectRatio", 2) or (1.0, 1.0)
        detector = "PixelSpacing" not in data and "ImagerPixelSpacing" in data
    if len({(f.values.shape, f.spacing is None) for f in frames}) > 1 or len(kinds) > 1:
        raise BrokenCase("its slices differ in size or in colour model")
    if len(frames) * frames[0].values.size * 4 > MAX_BYTES:
        raise BrokenCase(f"its {len(frames)} slices are too large for the memory; split the series")
    origin, direction, step, order = _place(frames, plane)
    frames = [frames[i] for i in order]
    values = np.stack([frame.values for frame in frames])
    padding = None
    if any(frame.padding is not None for frame in frames):
        none = np.zeros(values.shape[1:3], bool)
        padding = np.stack([none if f.padding is None else f.padding for f in frames])
    windows = [frame.window for frame in frames]
    spacing = frames[0].spacing
    frame: Numbers = ()
    steps: Numbers = ()
    if direction:
        turned = find_turn(direction, plane, len(frames))
        mm = (*(spacing or (1.0, 1.0))[::-1], step)
        reach = [edge * (n - 1) for edge, n in zip(mm, values.shape[2::-1])]
        frame = turned.move(origin, direction, reach)
        steps = tuple(float(mm[axis]) for axis in turned.axes)
        values = turned.apply(values)
        padding = None if padding is None else turned.apply(padding)
        if turned.axes[2] == 2:  # sliced as it was acquired
            windows = windows[::-1] if turned.flips[2] else windows
        elif spacing is None:
            raise BrokenCase(
                "it states no pixel spacing: slice it as it is stored (--plane native)"
            )
        else:
            same = len({str(window) for window in windows}) == 1
            windows = windows[:1] * len(values) if same else []
        spacing = (mm[turned.axes[1]], mm[turned.axes[0]]) if spacing else None
        aspect = aspect if turned.axes[1] == 1 else aspect[::-1]
    return Pixels(
        values,
        spacing=None if spacing is None else (float(spacing[0]), float(spacing[1])),
        aspect=(aspect[0], aspect[1]),
        windows=tuple(windows) if any(windows) else (),
        padding=padding,
        inverted=kinds == {"MONOCHROME1"},
        note="spacing at the detector" if detector else "",
        frame=frame,
        steps=steps,
    )


def _place(frames: Sequence[Frame], plane: str) -> tuple[Numbers, Numbers, float, list[int]]:
    """Return origin, direction (row-major), distance and order of slices; () for no direction."""
    first, n = frames[0], len(frames)
    if {f.position is None for f in frames} == {True, False}:
        raise BrokenCase("some of its slices have a position, others none")
    if first.orientation is None or (n > 1 and first.position is None):
        if plane != "native":
            raise BrokenCase(f"it has no position and orientation: no {plane} plane is known")
        return (), (), 1.0, list(range(n))
    for frame in frames[1:]:
        if frame.orientation is None or not is_parallel(frame.orientation, first.orientation):
            raise BrokenCase("its frames lie in several planes; export each as a file of its own")
        if not np.allclose(frame.spacing or 0, first.spacing or 0, rtol=1e-3):
            raise BrokenCase("its frames have several pixel spacings")
    axes = measure_axes(first.orientation)
    places = np.array([f.position or (0.0, 0.0, 0.0) for f in frames])
    along = places @ axes[:, 2]
    order = [int(i) for i in np.argsort(along, kind="stable")]
    steps = np.diff(along[order])
    if n > 1 and steps.min() < 1e-3:
        raise BrokenCase(
            "several images of a series lie at one position (time points, b-values?); "
            "put them into series of their own"
        )
    step = float(np.median(steps)) if n > 1 else 1.0
    if plane != "native" and plane != find_plane(axes):
        drift = places - places[order[0]] - np.outer(along - along[order[0]], axes[:, 2])
        if n == 1:
            raise BrokenCase(f"it is one slice, which cannot be cut in the {plane} plane")
        if is_uneven(steps):
            raise BrokenCase(
                f"its slices lie {steps.min():g} to {steps.max():g} mm apart (is one missing?): it "
                f"cannot be cut in the {plane} plane; slice it as it is stored (--plane native)"
            )
        if np.abs(drift).max() > 0.1 * step:
            raise BrokenCase(f"its slices are shifted (gantry tilt): no {plane} plane can be cut")
    return tuple(map(float, places[order[0]])), tuple(map(float, axes.ravel())), step, order


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
    return ("sagittal", "coronal", "axial")[int(np.abs(axes[:, 2]).argmax())]


def _read_frames(data: Dataset) -> list[Frame]:
    """Read all frames of a file, each with what its functional groups say of it."""
    stored, gray = decode(data)
    n = len(stored)
    groups = [data.get("SharedFunctionalGroupsSequence") or [], []]
    per_frame = data.get("PerFrameFunctionalGroupsSequence") or []
    if per_frame and len(per_frame) != n:
        raise BrokenCase(f"its header describes {len(per_frame)} frames, of {n}")

    def group(k: int, name: str) -> Dataset:
        for owner in (*per_frame[k : k + 1], *groups[0][:1]):
            if owner.get(name):
                return owner[name].value[0]
        return data

    out = []
    for k in range(n):
        values, padding, window = stored[k], None, None
        if gray:
            padding = find_padding(values, data)
            values = rescale(values, group(k, "PixelValueTransformationSequence"))
            window = read_window(group(k, "FrameVOILUTSequence"))
            bits = int(get_number(data, "BitsStored", 8))
            if window is None and bits < 8 and values.dtype == np.uint8:
                window = Window(0, 2**bits - 1)
        place = group(k, "PlanePositionSequence")
        position = get_numbers(place, "ImagePositionPatient", 3)
        if n > 1 and place is data:
            position = None
        measures = group(k, "PixelMeasuresSequence")
        spacing = next(filter(None, (get_numbers(measures, s, 2) for s in SPACINGS)), None)
        if spacing is not None and min(spacing) <= 0:
            raise BrokenCase("its pixel spacing is not above 0")
        turned = group(k, "PlaneOrientationSequence")
        orientation = get_numbers(turned, "ImageOrientationPatient", 6)
        out.append(Frame(values, padding, window, position, orientation, spacing))
    return out
