"""What was read of an image or a volume: its pixels and windows, turned as on a light box."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medbudget.data.items import BrokenCase

Array = NDArray[Any]
Numbers = tuple[float, ...]

MAX_BYTES = 4 * 2**30  # of one volume in memory
MAX_RATIO = 1100  # deflate makes zeros 1032 times smaller
SMALL = 64 * 2**20  # a blank image packs better still: so much is never refused

# where columns, rows and slices of a plane lead, so that it is seen as on a light box
TURNS = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIL"}
PLANE_OF = {letter: plane for plane, code in zip(TURNS, ("SI", "AP", "LR")) for letter in code}


@dataclass(frozen=True, eq=False)
class Window:
    """How intensities become 0..1 (PS3.3 C.11.2)."""

    low: float
    high: float
    sigmoid: bool = False
    table: Array | None = None  # of a VOI LUT: 0..1 for low, low + 1 ... high
    problem: str = ""  # why it cannot be applied

    def apply(self, values: Array) -> Array:
        """Map intensities to 0..1."""
        if self.problem:
            raise BrokenCase(f"{self.problem}; use --window percentile")
        values = values.astype(np.float64)
        if self.table is not None:
            index = np.clip(np.rint(values - self.low), 0, len(self.table) - 1)
            return self.table[index.astype(np.intp)]
        if not self.high > self.low:
            raise BrokenCase(f"its pixels have the one value {self.low:g}")
        scaled = (values - self.low) / (self.high - self.low)
        if self.sigmoid:
            return 1 / (1 + np.exp(np.clip(2 - 4 * scaled, -700, 700)))
        return np.clip(scaled, 0, 1)

    def __str__(self) -> str:
        kind = " (sigmoid)" if self.sigmoid else " (LUT)" if self.table is not None else ""
        return f"{self.low:g}..{self.high:g}{kind}"


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
    frame: Numbers = ()  # origin and direction (row-major) of a volume, in mm
    steps: Numbers = ()  # mm from pixel to pixel along the directions of `frame`
    uncut: str = ""  # why it can be sliced as it is stored alone


def find_most(held: int, packed: bool) -> int:
    """Return how many bytes of pixels can be in so many bytes of a file, compressed or not."""
    return min(MAX_BYTES, SMALL + MAX_RATIO * held if packed else held)


def turn(pixels: Pixels, plane: str) -> Pixels:
    """Turn a volume so that its slices in `plane` are seen as on a light box, without a copy.

    ``native`` is the plane in which it is stored. What has no direction in the patient stays as it
    is.
    """
    import SimpleITK as sitk

    if len(pixels.frame) != 12:
        if plane != "native" and pixels.uncut:
            raise BrokenCase(f"{pixels.uncut}: no {plane} plane is known")
        return pixels
    origin, direction = np.array(pixels.frame[:3]), np.reshape(pixels.frame[3:], (3, 3))
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(direction.ravel())
    stored = PLANE_OF[code[2]]
    plane = stored if plane == "native" else plane
    reason = f"it is one {stored} slice" if len(pixels.values) == 1 else pixels.uncut
    if plane != stored and reason:
        raise BrokenCase(
            f"{reason}: it cannot be cut in the {plane} plane; slice it as it is stored (--plane "
            "native)"
        )
    target = TURNS[plane]
    axes = [[PLANE_OF[letter] for letter in code].index(PLANE_OF[letter]) for letter in target]
    flips = [code[axis] != letter for axis, letter in zip(axes, target)]

    def move(values: Array) -> Array:
        values = values.transpose(*(2 - axis for axis in axes[::-1]), *range(3, values.ndim))
        return values[tuple(slice(None, None, -1 if flip else 1) for flip in flips[::-1])]

    reach = np.array(pixels.steps) * (np.array(pixels.values.shape[2::-1]) - 1)
    columns, values = direction[:, axes], move(pixels.values)
    origin = origin + columns @ (np.array(flips) * reach[axes])
    steps = tuple(pixels.steps[axis] for axis in axes)
    windows = pixels.windows
    if plane != stored:  # a slice has pixels of all: one window for all, or none
        windows = windows[:1] * len(values) if len(set(map(str, windows))) == 1 else ()
    elif flips[2]:
        windows = windows[::-1]
    return replace(
        pixels,
        values=values,
        spacing=pixels.spacing and (steps[1], steps[0]),
        aspect=pixels.aspect if axes[1] == 1 else pixels.aspect[::-1],
        windows=windows,
        padding=None if pixels.padding is None else move(pixels.padding),
        frame=(*map(float, origin), *map(float, (columns * np.where(flips, -1, 1)).ravel())),
        steps=steps,
    )
