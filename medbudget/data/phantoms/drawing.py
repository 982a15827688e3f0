"""Draw random fields, shapes and lines on square images.

Lengths are in units of the image's edge: x from 0 to 1 to the right, y from 0 to 1 downwards.
Distances to a shape are negative inside it. All images are ``(size, size) float``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]
Rng = np.random.Generator
Line = tuple[float, float, float, float, float, float]  # x0, y0, x1, y1, width, height
FINE = 4  # pixels drawn for each pixel kept, along each axis


@lru_cache(maxsize=8)
def axes(size: int) -> tuple[Array, Array]:
    """Return the coordinates of pixel centres: x as a row ``(1, size)``, y as a column ``(size, 1)``."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[None, :], line[:, None]


def tilted_axes(
    size: int, angle: float, shift: tuple[float, float], scale: float
) -> tuple[Array, Array]:
    """Return x and y ``(size, size)`` of a body that is tilted (radians), shifted and scaled."""
    x, y = axes(size)
    dx, dy = x - 0.5 - shift[0], y - 0.5 - shift[1]
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    tilted_x, tilted_y = cos * dx + sin * dy + 0.5, cos * dy - sin * dx + 0.5
    return tilted_x.astype(np.float32), tilted_y.astype(np.float32)


def rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Return coordinates along axes that are turned by `angle` (radians)."""
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


@lru_cache(maxsize=32)
def _field_weights(size: int, knots: int) -> Array:
    """Return weights ``(size, knots)`` of smooth interpolation, with unit power in each row."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size * (knots - 1)
    weights = np.exp(-0.5 * ((at[:, None] - np.arange(knots)) / 0.6) ** 2)
    weights /= np.sqrt((weights**2).sum(1, keepdims=True))
    return weights.astype(np.float32)


def field(rng: Rng, size: int, knots: int) -> Array:
    """Draw a smooth random field of mean 0 and variance 1, with about `knots` bumps along an edge."""
    weights = _field_weights(size, knots)
    return weights @ rng.standard_normal((knots, knots)).astype(np.float32) @ weights.T


def clouds(rng: Rng, size: int, first: int, octaves: int = 4) -> Array:
    """Add up fields of doubling frequency and falling amplitude: mean 0, variance about 1.

    The first has `first` + 1 knots. The same random numbers are drawn at any `size`; fields that
    are too fine for it are left out.
    """
    total = np.zeros((size, size), np.float32)
    for k in range(octaves):
        knots = first * 2**k + 1
        own = np.random.default_rng(rng.integers(2**63))
        if knots <= size // 2:
            total += 0.55**k * field(own, size, knots)
    return total / np.sqrt(sum(0.55 ** (2 * k) for k in range(octaves)))


def grain(rng: Rng, size: int, acquired: int, smooth: float) -> Array:
    """Draw noise of variance 1 on a grid of `acquired` pixels an edge, resampled to `size`.

    `smooth` is the standard deviation of its blur in acquired pixels.
    """
    own = np.random.default_rng(rng.integers(2**63))
    noise = gaussian_filter(own.standard_normal((acquired, acquired), dtype=np.float32), smooth)
    return resize(noise / noise.std(), size)


def resize(image: Array, size: int, rule: Image.Resampling = Image.Resampling.LANCZOS) -> Array:
    """Resample an image to ``(size, size)`` without aliasing."""
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((size, size), rule))


def shrink(image: Array, factor: int = FINE) -> Array:
    """Average blocks of `factor` pixels: ``(…, H, W)`` to ``(…, H / factor, W / factor)``."""
    *rest, h, w = image.shape
    return image.reshape(*rest, h // factor, factor, w // factor, factor).mean((-3, -1))


def enlarge(image: Array, factor: int) -> Array:
    """Interpolate an image by cubic splines to `factor` times its size."""
    weights = _spline_weights(len(image), factor)
    return weights @ image @ weights.T


@lru_cache(maxsize=4)
def _spline_weights(n: int, factor: int) -> Array:
    """Return the weights ``(n factor, n)`` of `n` pixels in the pixels of the enlarged line."""
    at = (np.arange(n * factor) + 0.5) / factor - 0.5
    return CubicSpline(range(n), np.eye(n))(np.clip(at, 0, n - 1))


def inside(distance: Array, soft: float) -> Array:
    """Return how much of each pixel a shape covers, 0 to 1, with a border of width `soft`."""
    return np.clip(0.5 - distance / soft, 0, 1)


def blend(image: Array, value: float | Array, cover: Array) -> Array:
    """Mix `value` into the image by its `cover`: 0 leaves the image, 1 replaces it."""
    return image + (value - image) * cover


def ellipse(
    x: Array, y: Array, cx: float, cy: float, a: float, b: float, angle: float = 0.0
) -> Array:
    """Return the approximate distance to an ellipse with half axes `a` and `b`, turned (radians)."""
    along, across = rotate(x - cx, y - cy, angle)
    return (np.sqrt((along / a) ** 2 + (across / b) ** 2) - 1) * min(a, b)


def lens(distance: Array, depth: float) -> Array:
    """Return the thickness of a rounded body: 0 at its edge, 1 from `depth` inside on."""
    inward = np.clip(-distance / depth, 0, 1)
    return np.sqrt(inward * (2 - inward))


def tube(distance: Array, radius: float, shell: float = 1.0) -> Array:
    """Return the thickness of a tube along the beam, in radii, by the distance to its axis.

    Within its wall, `shell` radii thick, a quarter is left: 1 is a solid cylinder.
    """
    squared = (distance / radius) ** 2
    hollow = np.sqrt(np.clip((1 - shell) ** 2 - squared, 0, 1))
    return np.sqrt(np.clip(1 - squared, 0, 1)) - 0.75 * hollow


def window(size: int, x0: float, x1: float, y0: float, y1: float) -> tuple[slice, slice]:
    """Return the rows and columns of an image from (x0, y0) to (x1, y1), cut off at its edges."""
    left, right, top, bottom = (min(max(int(v * size), 0), size) for v in (x0, x1, y0, y1))
    return slice(top, bottom), slice(left, right)


def draw_lines(size: int, lines: list[Line]) -> Array:
    """Draw lines with a round profile ``(size, size)``; where they cross, the higher one counts."""
    total = np.zeros((size, size), np.float32)
    x, y = axes(size)
    for x0, y0, x1, y1, width, height in lines:
        reach, pixel = width / 2 + 2 / size, 1 / size
        rows, columns = window(
            size, min(x0, x1) - reach, max(x0, x1) + reach + pixel,
            min(y0, y1) - reach, max(y0, y1) + reach + pixel,
        )  # fmt: skip
        px, py = x[:, columns] - x0, y[rows] - y0
        dx, dy = x1 - x0, y1 - y0
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy + 1e-12), 0, 1)
        distance = np.hypot(px - along * dx, py - along * dy)
        view = total[rows, columns]
        round_top = np.sqrt(np.clip(1 - (2 * distance / width) ** 2, 0, 1))
        np.maximum(view, height * round_top, out=view)
    return total


def draw_letter(size: int, letter: str, x: float, y: float, height: float) -> Array:
    """Draw a letter with its upper left corner at (x, y), 0 to 1."""
    canvas = Image.new("L", (size, size))
    font = ImageFont.load_default(max(4, height * size))
    ImageDraw.Draw(canvas).text((x * size, y * size), letter, fill=255, font=font)
    return np.asarray(canvas, np.float32) / 255
