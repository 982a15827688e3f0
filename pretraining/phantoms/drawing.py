"""Draw shapes, fields and tubes in unit coordinates (x to the right, y down, 0 to 1)."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from medbudget.data.phantoms.drawing import Array, axes, field


def clouds(rng: np.random.Generator, size: int, first: int, octaves: int = 4) -> Array:
    """Add up fields of doubling frequency and halving height: mean 0, variance about 1."""
    total = sum(
        0.55**k * field(rng, size, min(first * 2**k, size // 2) + 1) for k in range(octaves)
    )
    return total / np.sqrt(sum(0.55 ** (2 * k) for k in range(octaves)))


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
