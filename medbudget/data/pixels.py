"""What was read of an image or a volume: its pixels and windows, turned as on a light box."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from medbudget.data.items import BrokenCase

Array = NDArray[Any]
Numbers = tuple[float, ...]

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
    steps: Numbers = (1.0, 1.0, 1.0)  # mm from pixel to pixel along columns, rows and slices
    stated: bool = False  # else nobody said how many mm `steps` are: they hold the aspect alone
    windows: tuple[Window | None, ...] = ()  # that the file asks for, one for each slice; or ()
    padding: Array | None = None  # (slices, H, W) bool: no image there
    inverted: bool = False  # white stands for the lowest value (MONOCHROME1)
    note: str = ""
    frame: Numbers = ()  # origin and direction (row-major) of a volume, in mm
    uncut: str = ""  # why it can be sliced as it is stored alone

    @property
    def spacing(self) -> tuple[float, float] | None:
        """Millimetres from row to row and from column to column, where they are stated."""
        return (self.steps[1], self.steps[0]) if self.stated else None

    def to_volume(self, values: Array) -> sitk.Image:
        """Place values of this shape in the patient."""
        image = sitk.GetImageFromArray(np.ascontiguousarray(values), isVector=values.ndim == 4)
        image.SetOrigin(self.frame[:3])
        image.SetDirection(self.frame[3:])
        image.SetSpacing(self.steps)
        return image


def turn(pixels: Pixels, plane: str) -> Pixels:
    """Turn a volume so that its slices in `plane` are seen as on a light box.

    ``native`` is the plane in which it is stored. What has no direction in the patient stays as it
    is.
    """
    if len(pixels.frame) != 12:
        if plane != "native" and pixels.uncut:
            raise BrokenCase(f"{pixels.uncut}: no {plane} plane is known")
        return pixels
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(pixels.frame[3:])
    stored = PLANE_OF[code[2]]
    plane = stored if plane == "native" else plane
    reason = f"it is one {stored} slice" if len(pixels.values) == 1 else pixels.uncut
    if plane != stored and reason:
        raise BrokenCase(f"{reason}: no {plane} plane can be cut; slice it with --plane native")
    if code == TURNS[plane]:
        return pixels
    image = sitk.DICOMOrient(pixels.to_volume(pixels.values), TURNS[plane])
    padding, windows = pixels.padding, pixels.windows
    if padding is not None:
        padded = sitk.DICOMOrient(pixels.to_volume(padding.astype(np.uint8)), TURNS[plane])
        padding = sitk.GetArrayFromImage(padded) > 0
    if plane != stored:  # a slice has pixels of all: one window for all, or none
        windows = windows[:1] * image.GetDepth() if len(set(map(str, windows))) == 1 else ()
    elif code[2] != TURNS[plane][2]:
        windows = windows[::-1]
    return replace(
        pixels,
        values=sitk.GetArrayFromImage(image),
        steps=image.GetSpacing(),
        windows=windows,
        padding=padding,
        frame=(*image.GetOrigin(), *image.GetDirection()),
    )
