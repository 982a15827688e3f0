"""Draw a map of the pelvis's tissues by outlines, and read each sequence's signal from it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms.drawing import Array, Rng, field

Points = list[tuple[float, float]]  # x and y in units of the image's edge, y downwards
# For each tissue T2W, ADC and DWI (1: urine on T2W and ADC, four times the gland on DWI), the signal
# without diffusion weighting (1: urine), and the relative contrast of coarse and of fine mottle
TISSUES = {
    "fat": (0.345, 0.07, 0.10, 0.045, 0.08, 0.04),
    "muscle": (0.055, 0.33, 0.18, 0.16, 0.15, 0.25),
    "marrow": (0.20, 0.08, 0.09, 0.045, 0.16, 0.20),
    "cortex": (0.03, 0.10, 0.02, 0.02, 0.0, 0.2),
    "fascia": (0.15, 0.25, 0.10, 0.08, 0.1, 0.3),
    "flow void": (0.02, 0.20, 0.02, 0.02, 0.0, 0.2),
    "vein": (0.42, 0.55, 0.10, 0.20, 0.2, 0.2),
    "fluid": (0.42, 0.55, 0.10, 0.20, 0.2, 0.2),  # in joints, urethra and ducts
    "urine": (0.97, 0.93, 0.16, 1.00, 0.01, 0.0),
    "detrusor": (0.085, 0.42, 0.18, 0.25, 0.2, 0.25),
    "peripheral zone": (0.40, 0.56, 0.22, 0.50, 0.14, 0.14),
    "transition zone": (0.19, 0.41, 0.24, 0.40, 0.17, 0.22),
    "capsule": (0.11, 0.36, 0.18, 0.25, 0.1, 0.2),
    "fibromuscular stroma": (0.085, 0.34, 0.19, 0.25, 0.2, 0.2),
    "rectal muscle": (0.095, 0.38, 0.20, 0.24, 0.2, 0.25),
    "mucosa": (0.19, 0.42, 0.20, 0.30, 0.2, 0.2),
    "plexus": (0.19, 0.42, 0.20, 0.30, 0.2, 0.2),  # of small vessels in fat
    "stool": (0.16, 0.30, 0.12, 0.20, 0.4, 0.3),
    "gas": (0.012, 0.02, 0.01, 0.00, 0.0, 0.0),
}
BENDS = 193  # grid points along an edge at which a patient's irregularity is given


class Oval(NamedTuple):
    """An upright oval: centre and half axes, in units of the image's edge."""

    x: float
    y: float
    a: float
    b: float

    def at(self, angle: float, across: float, down: float) -> tuple[float, float]:
        """Return the point at an angle (radians, clockwise from the right) and shares of the axes."""
        return self.x + across * self.a * np.cos(angle), self.y + down * self.b * np.sin(angle)


def outline(
    x: float, y: float, a: float, b: float, angle: float = 0.0, power: float = 2.0
) -> Points:
    """Return 12 points on an ellipse, turned by `angle` (radians); a higher `power` is squarer."""
    t = 2 * np.pi * np.arange(12) / 12
    along, across = (a * np.sign(f) * np.abs(f) ** (2 / power) for f in (np.cos(t), np.sin(t)))
    across = across * b / a
    cos, sin = np.cos(angle), np.sin(angle)
    return list(zip(x + cos * along - sin * across, y + sin * along + cos * across))


@lru_cache(maxsize=64)
def _spline_weights(n: int, closed: bool) -> Array:
    """Return the matrix ``(12 n, n)`` that turns points into a smooth line through them."""
    unit = np.eye(n)[[*range(n), 0]] if closed else np.eye(n)
    spline = CubicSpline(range(len(unit)), unit, bc_type="periodic" if closed else "natural")
    return spline(np.linspace(0, len(unit) - 1, 12 * n))


class Sketch:
    """A map of tissues ``(size, size)``, drawn by smooth lines through points of an atlas.

    A patient's tilt, size and irregularity, chosen once at random, bend every line. All is fat at
    first; what is drawn later covers what was drawn before.
    """

    def __init__(self, rng: Rng, size: int) -> None:
        u = rng.uniform
        self.size = size
        self.tissues = {name: np.array(values) for name, values in TISSUES.items()}
        self._canvas = Image.new("L", (size, size))  # of numbers of tissues
        angle, scale = u(-0.05, 0.05), u(0.94, 1.08)
        cos, sin = np.cos(angle), np.sin(angle)
        self._turn = scale * np.array([[cos, -sin], [sin, cos]])
        self._shift = u(-0.02, 0.02, 2)
        bumps = ((6, 0.010), (13, 0.0040), (33, 0.0020))  # along an edge, and their height
        self._bend = np.stack([sum(h * field(rng, BENDS, n) for n, h in bumps) for _ in range(2)])

    def fill(self, points: Points, tissue: str, rim: str = "", width: float = 0.0) -> None:
        """Fill a smooth outline with a tissue; `rim` is the tissue of a line along it, `width` wide."""
        curve = self._curve(points, closed=True)
        ImageDraw.Draw(self._canvas).polygon(curve, fill=self._number(tissue))
        if rim:
            self._stroke(curve, rim, width)

    def line(self, points: Points, tissue: str, width: float) -> None:
        """Draw a smooth line of a tissue."""
        self._stroke(self._curve(points, closed=False), tissue, width)

    def cover(self, points: Points, soft: float, width: float | None = None) -> Array:
        """Return how much of each pixel a smooth outline covers, 0 to 1, ``(size, size)``.

        With a `width` it is a line of that width. `soft` is the standard deviation of the blur. The
        map is not changed.
        """
        canvas = Image.new("L", (self.size, self.size))
        if width is None:
            ImageDraw.Draw(canvas).polygon(self._curve(points, closed=True), fill=255)
        else:
            curve = self._curve(points, closed=False)
            ImageDraw.Draw(canvas).line(curve, fill=255, width=self._pixels(width))
        return gaussian_filter(np.asarray(canvas, np.float32) / 255, soft * self.size)

    def signals(self) -> list[Array]:
        """Return each of the six columns of `TISSUES` as an image ``(size, size)``."""
        numbers = np.asarray(self._canvas).astype(np.intp)
        return [column[numbers] for column in np.array([*self.tissues.values()], np.float32).T]

    def _curve(self, points: Points, closed: bool) -> Points:
        """Return a smooth line through points of the atlas, in this patient's pixels."""
        atlas = _spline_weights(len(points), closed) @ np.asarray(points)
        moved = (atlas - 0.5) @ self._turn.T + 0.5 + self._shift
        column, row = np.rint(np.clip(moved, 0, 1) * (BENDS - 1)).astype(int).T
        pixels = (moved + self._bend[:, row, column].T) * self.size
        return [(x, y) for x, y in pixels.tolist()]

    def _stroke(self, curve: Points, tissue: str, width: float) -> None:
        fill, pixels = self._number(tissue), self._pixels(width)
        ImageDraw.Draw(self._canvas).line(curve, fill=fill, width=pixels, joint="curve")

    def _number(self, tissue: str) -> int:
        return list(self.tissues).index(tissue)

    def _pixels(self, width: float) -> int:
        return max(1, round(width * self.size))
