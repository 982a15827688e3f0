"""Draw shapes, fields and tubes in unit coordinates (x to the right, y down, 0 to 1)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]


@lru_cache(maxsize=8)
def axes(size: int) -> tuple[Array, Array]:
    """Return pixel centres as a row ``(1, size)`` and a column ``(size, 1)``."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[None, :], line[:, None]


@lru_cache(maxsize=32)
def _spline(size: int, knots: int) -> Array:
    """Return weights ``(size, knots)`` of smooth interpolation, with unit power in each row."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size * (knots - 1)
    weight = np.exp(-0.5 * ((at[:, None] - np.arange(knots)) / 0.6) ** 2)
    return (weight / np.sqrt((weight**2).sum(1, keepdims=True))).astype(np.float32)


def field(rng: np.random.Generator, size: int, knots: int) -> Array:
    """Draw a smooth random field ``(size, size)``, mean 0, variance 1, about `knots` bumps wide."""
    spline = _spline(size, knots)
    return spline @ rng.standard_normal((knots, knots)).astype(np.float32) @ spline.T


def clouds(rng: np.random.Generator, size: int, first: int, octaves: int = 4) -> Array:
    """Add up fields of doubling frequency and halving height: mean 0, variance about 1."""
    total = sum(
        0.55**k * field(rng, size, min(first * 2**k, size // 2) + 1) for k in range(octaves)
    )
    return total / np.sqrt(sum(0.55 ** (2 * k) for k in range(octaves)))


def place(
    size: int, angle: float, shift: tuple[float, float], scale: float = 1.0
) -> tuple[Array, Array]:
    """Return unit coordinates of a body that is turned by `angle` (radians), shifted and scaled."""
    x, y = axes(size)
    dx, dy = x - 0.5 - shift[0], y - 0.5 - shift[1]
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    return (
        (cos * dx + sin * dy + 0.5).astype(np.float32),
        (cos * dy - sin * dx + 0.5).astype(np.float32),
    )


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


def inside(distance: Array, soft: float) -> Array:
    """Return the cover from 0 to 1, which changes over `soft` around distance 0."""
    return np.clip(0.5 - distance / soft, 0, 1)


def blend(image: Array, value: float | Array, cover: Array) -> Array:
    """Paint `value` over an image where `cover` is 1."""
    return image + (value - image) * cover


def lens(distance: Array, depth: float) -> Array:
    """Return the thickness of a rounded body: 0 at its edge, 1 from `depth` inside on."""
    return np.sqrt(np.clip(-distance / depth, 0, 1) * (2 - np.clip(-distance / depth, 0, 1)))


def tube(distance: Array, radius: float, shell: float = 1.0) -> Array:
    """Return the thickness of a tube along the beam, in radii; `shell` < 1 leaves it hollow."""
    outer = np.sqrt(np.clip(1 - (distance / radius) ** 2, 0, 1))
    if shell >= 1:
        return outer
    return outer - 0.75 * np.sqrt(np.clip((1 - shell) ** 2 - (distance / radius) ** 2, 0, 1))


def draw_lines(size: int, lines: list[tuple[float, float, float, float, float, float]]) -> Array:
    """Draw lines (x0, y0, x1, y1, width, weight) ``(size, size)``; where they cross, they add up."""
    total = np.zeros((size, size), np.float32)
    for x0, y0, x1, y1, width, weight in lines:
        reach = width / 2 + 2 / size
        left, right = (
            int(np.clip(v * size, 0, size))
            for v in (min(x0, x1) - reach, max(x0, x1) + reach + 1 / size)
        )
        top, low = (
            int(np.clip(v * size, 0, size))
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
    from PIL import ImageFont

    canvas = Image.new("L", (size, size))
    font = ImageFont.load_default(max(4, height * size))
    ImageDraw.Draw(canvas).text((x * size, y * size), letter, fill=255, font=font)
    return np.asarray(canvas, np.float32) / 255


def shrink(image: Array, factor: int) -> Array:
    """Average blocks of `factor` pixels: ``(…, H, W)`` to ``(…, H / factor, W / factor)``."""
    *rest, h, w = image.shape
    return image.reshape(*rest, h // factor, factor, w // factor, factor).mean((-3, -1))
