"""Draw shapes and smooth random fields in unit coordinates: x to the right, y down, 0 to 1."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]


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


def ellipse(
    x: Array, y: Array, cx: float, cy: float, a: float, b: float, angle: float = 0.0
) -> Array:
    """Return the approximate signed distance (unit coordinates, negative inside) to an ellipse."""
    dx, dy = x - cx, y - cy
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    u, v = (cos * dx + sin * dy) / a, (cos * dy - sin * dx) / b
    return (np.sqrt(u * u + v * v) - 1) * min(a, b)


def inside(distance: Array, soft: float) -> Array:
    """Return the cover from 0 to 1, going over `soft` (unit coordinates) around distance 0."""
    return np.clip(0.5 - distance / soft, 0, 1)


def blend(image: Array, value: float | Array, cover: Array) -> Array:
    return image + (value - image) * cover
