"""Draw shapes, fields and tubes in unit coordinates (x to the right, y down, 0 to 1)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

BENDS = 193  # places along an edge where a patient's irregularity is known
Array = NDArray[np.floating]
Mask = NDArray[np.bool_]
Points = list[tuple[float, float]]
FINE = 4  # pixels drawn for each pixel kept, along each axis


@lru_cache(maxsize=8)
def axes(size: int) -> tuple[Array, Array]:
    """Return pixel centres as a row ``(1, size)`` and a column ``(size, 1)`` from 0 to 1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[None, :], line[:, None]


@lru_cache(maxsize=32)
def _ramp(size: int, knots: int) -> Array:
    """Return weights ``(size, knots)`` of smooth interpolation, with unit power in each row."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size * (knots - 1)
    weight = np.exp(-0.5 * ((at[:, None] - np.arange(knots)) / 0.6) ** 2)
    weight /= np.sqrt((weight**2).sum(1, keepdims=True))
    return weight.astype(np.float32)


def field(rng: np.random.Generator, size: int, knots: int) -> Array:
    """Draw a smooth random field ``(size, size)`` of mean 0 and variance 1, about `knots` bumps wide."""
    ramp = _ramp(size, knots)
    return ramp @ rng.standard_normal((knots, knots)).astype(np.float32) @ ramp.T


def place(
    size: int, angle: float, shift: tuple[float, float], scale: float = 1.0
) -> tuple[Array, Array]:
    """Return unit coordinates of a body that lies tilted by `angle` (radians), shifted and scaled."""
    x, y = axes(size)
    dx, dy = x - 0.5 - shift[0], y - 0.5 - shift[1]
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    return (
        (cos * dx + sin * dy + 0.5).astype(np.float32),
        (cos * dy - sin * dx + 0.5).astype(np.float32),
    )


def inside(distance: Array, soft: float) -> Array:
    """Return the cover from 0 to 1, going over `soft` (unit coordinates) around distance 0."""
    return np.clip(0.5 - distance / soft, 0, 1)


def blend(image: Array, value: float | Array, cover: Array) -> Array:
    return image + (value - image) * cover


def clouds(rng: np.random.Generator, size: int, first: int, octaves: int = 4) -> Array:
    """Add up fields of doubling frequency and halving height: mean 0, variance about 1.

    The same random numbers are drawn at any `size`; what is too fine for it is left out.
    """
    total = np.zeros((size, size), np.float32)
    for k in range(octaves):
        knots = first * 2**k + 1
        own = np.random.default_rng(rng.integers(2**63))
        if knots <= size // 2:
            total += 0.55**k * field(own, size, knots)
    return total / np.sqrt(sum(0.55 ** (2 * k) for k in range(octaves)))


def grain(rng: np.random.Generator, size: int, acquired: int, smooth: float) -> Array:
    """Draw noise of variance 1 on the grid of an acquisition, brought to ``(size, size)``."""
    own = np.random.default_rng(rng.integers(2**63))
    noise = gaussian_filter(own.standard_normal((acquired, acquired), dtype=np.float32), smooth)
    return resize(noise / noise.std(), size)


def resize(image: Array, size: int, rule: Image.Resampling = Image.Resampling.LANCZOS) -> Array:
    """Resample a square image to ``(size, size)``, against aliases."""
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((size, size), rule))


def ellipse(
    x: Array,
    y: Array,
    cx: float,
    cy: float,
    a: float,
    b: float,
    angle: float = 0.0,
    power: float = 2,
) -> Array:
    """Return the approximate signed distance to a (super)ellipse, negative inside."""
    dx, dy = x - cx, y - cy
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    u, v = np.abs(cos * dx + sin * dy) / a, np.abs(cos * dy - sin * dx) / b
    return ((u**power + v**power) ** (1 / power) - 1) * min(a, b)


def lens(distance: Array, depth: float) -> Array:
    """Return the thickness of a rounded body: 0 at its edge, 1 from `depth` inside on."""
    inward = np.clip(-distance / depth, 0, 1)
    return np.sqrt(inward * (2 - inward))


def tube(distance: Array, radius: float, shell: float = 1.0) -> Array:
    """Return the thickness of a tube along the beam, in radii; `shell` < 1 leaves it hollow."""
    outer = np.sqrt(np.clip(1 - (distance / radius) ** 2, 0, 1))
    if shell >= 1:
        return outer
    return outer - 0.75 * np.sqrt(np.clip((1 - shell) ** 2 - (distance / radius) ** 2, 0, 1))


def draw_lines(size: int, lines: list[tuple[float, float, float, float, float, float]]) -> Array:
    """Draw lines (x0, y0, x1, y1, width, weight) ``(size, size)``; where they cross, the thicker."""
    total = np.zeros((size, size), np.float32)
    for x0, y0, x1, y1, width, weight in lines:
        reach = width / 2 + 2 / size
        left, right = (
            min(max(int(v * size), 0), size)
            for v in (min(x0, x1) - reach, max(x0, x1) + reach + 1 / size)
        )
        top, low = (
            min(max(int(v * size), 0), size)
            for v in (min(y0, y1) - reach, max(y0, y1) + reach + 1 / size)
        )
        if left >= right or top >= low:
            continue
        px, py = axes(size)[0][:, left:right], axes(size)[1][top:low]
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((px - x0) * dx + (py - y0) * dy) / (dx * dx + dy * dy + 1e-12), 0, 1)
        distance = np.hypot(px - x0 - along * dx, py - y0 - along * dy)
        view = total[top:low, left:right]
        np.maximum(view, weight * np.sqrt(np.clip(1 - (2 * distance / width) ** 2, 0, 1)), out=view)
    return total


def draw_letter(size: int, letter: str, x: float, y: float, height: float) -> Array:
    """Draw a capital letter of lead, ``(size, size)`` from 0 to 1."""
    canvas = Image.new("L", (size, size))
    font = ImageFont.load_default(max(4, height * size))
    ImageDraw.Draw(canvas).text((x * size, y * size), letter, fill=255, font=font)
    return np.asarray(canvas, np.float32) / 255


def shrink(image: Array, factor: int = FINE) -> Array:
    """Average blocks of `factor` pixels: ``(…, H, W)`` to ``(…, H / factor, W / factor)``."""
    *rest, h, w = image.shape
    return image.reshape(*rest, h // factor, factor, w // factor, factor).mean((-3, -1))


@lru_cache(maxsize=64)
def _spline(n: int, closed: bool) -> Array:
    """Return the matrix ``(12 n, n)`` that turns points into a smooth line through them."""
    unit = np.eye(n)[[*range(n), 0]] if closed else np.eye(n)
    spline = CubicSpline(range(len(unit)), unit, bc_type="periodic" if closed else "natural")
    return spline(np.linspace(0, len(unit) - 1, 12 * n))


def enlarge(image: Array, factor: int) -> Array:
    """Interpolate a square image by cubic splines, to `factor` times the size."""
    weights = _grid(len(image), factor)
    return weights @ image @ weights.T


@lru_cache(maxsize=4)
def _grid(n: int, factor: int) -> Array:
    at = (np.arange(n * factor) + 0.5) / factor - 0.5
    return CubicSpline(range(n), np.eye(n))(np.clip(at, 0, n - 1))


class Sketch:
    """A map of tissues, drawn by outlines; a patient's own tilt, size and irregularity bend them."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        u = rng.uniform
        self.size = size
        self.canvas = Image.new("L", (size, size))
        self.pen = ImageDraw.Draw(self.canvas)
        angle, scale = u(-0.05, 0.05), u(0.94, 1.08)
        self.turn = scale * np.array(
            [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        )
        self.shift = rng.uniform(-0.02, 0.02, 2)
        sizes = ((6, 0.010), (13, 0.0040), (33, 0.0020))  # bumps along an edge, height
        self.bend = np.stack([sum(sd * field(rng, BENDS, n) for n, sd in sizes) for _ in range(2)])

    def place(self, points: Points | Array) -> Array:
        """Return where points of the textbook lie in this patient, in pixels ``(n, 2)``."""
        at = (np.asarray(points) - 0.5) @ self.turn.T + 0.5 + self.shift
        column, row = np.rint(np.clip(at, 0, 1) * (BENDS - 1)).astype(int).T
        return (at + self.bend[:, row, column].T) * self.size

    def curve(self, points: Points, closed: bool = True) -> Array:
        """Return a smooth line through points, placed."""
        return self.place(_spline(len(points), closed) @ np.asarray(points))

    def blob(self, points: Points, label: int, rim: int = 0, width: float = 0.0) -> None:
        """Fill a smooth outline, with a rim of another tissue if one is named."""
        line = [tuple(p) for p in self.curve(points)]
        self.pen.polygon(line, fill=label)
        if width:
            self.pen.line(line, fill=rim, width=max(1, round(width * self.size)), joint="curve")

    def line(self, points: Points, label: int, width: float) -> None:
        """Draw a smooth line."""
        line = [tuple(p) for p in self.curve(points, closed=False)]
        self.pen.line(line, fill=label, width=max(1, round(width * self.size)), joint="curve")

    def labels(self) -> NDArray[np.intp]:
        """Return the map ``(size, size)``."""
        return np.asarray(self.canvas).astype(np.intp)

    def cover(self, points: Points, soft: float) -> Array:
        """Return the cover by a smooth outline, from 0 to 1, with a border `soft` wide."""
        canvas = Image.new("L", (self.size, self.size))
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in self.curve(points)], fill=255)
        return gaussian_filter(np.asarray(canvas, np.float32) / 255, soft * self.size)

    def stroke(self, points: Points, width: float, soft: float) -> Array:
        """Return the cover by a smooth line, from 0 to 1."""
        canvas = Image.new("L", (self.size, self.size))
        line = [tuple(p) for p in self.curve(points, closed=False)]
        ImageDraw.Draw(canvas).line(line, fill=255, width=max(1, round(width * self.size)))
        return gaussian_filter(np.asarray(canvas, np.float32) / 255, soft * self.size)


def oval(
    cx: float, cy: float, a: float, b: float, angle: float = 0.0, power: float = 2.0
) -> Points:
    """Return 12 points on a (super)ellipse."""
    t = 2 * np.pi * np.arange(12) / 12
    u, v = (a * np.sign(f) * np.abs(f) ** (2 / power) for f in (np.cos(t), np.sin(t)))
    v = v * b / a
    cos, sin = np.cos(angle), np.sin(angle)
    return list(zip(cx + cos * u - sin * v, cy + sin * u + cos * v))
