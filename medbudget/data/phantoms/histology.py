"""Draw histology phantoms: lymph tissue, with a metastasis or without."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms.drawing import Array, Mask, axes, ellipse, field, inside

HAEMATOXYLIN = (0.65, 0.72, 0.28)  # optical density per unit of stain in R, G and B
EOSIN = (0.10, 0.92, 0.38)


def _stamp(
    size: int, x: Array, y: Array, a: Array, b: Array, angle: Array, tone: Array, hollow: Array
) -> Array:
    """Sum of soft elliptic nuclei as stain density ``(size, size)``, each drawn in its own window.

    `hollow` lightens the middle (open chromatin); overlapping nuclei saturate.
    """
    reach = int(np.ceil(max(a.max(), b.max()) * size + 1.5))
    step = np.arange(-reach, reach + 1)
    px, py = x * size - 0.5, y * size - 0.5
    cols, rows = np.rint(px).astype(int)[:, None] + step, np.rint(py).astype(int)[:, None] + step
    dx, dy = (cols - px[:, None])[:, None, :], (rows - py[:, None])[:, :, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    wide, high = (a * size)[:, None, None], (b * size)[:, None, None]
    r = np.sqrt(((cos * dx + sin * dy) / wide) ** 2 + ((cos * dy - sin * dx) / high) ** 2)
    cover = np.clip(0.5 + (1 - r) * np.minimum(wide, high) / 1.2, 0, 1)
    density = cover * tone[:, None, None] * (1 - hollow[:, None, None] * np.clip(1 - r * r, 0, 1))
    keep = ((rows >= 0) & (rows < size))[:, :, None] & ((cols >= 0) & (cols < size))[:, None, :]
    flat = rows[:, :, None] * size + cols[:, None, :]
    total = np.bincount(flat[keep], density[keep], size * size).reshape(size, size)
    return np.minimum(total, tone.max()).astype(np.float32)


def _scatter(rng: np.random.Generator, gap: float, jitter: float) -> tuple[Array, Array]:
    """Points `gap` apart on a shaken hexagonal lattice that reaches past the image."""
    rows = np.arange(-gap, 1 + gap, gap * 0.87)
    cols = np.arange(-gap, 1 + gap, gap)
    y = np.repeat(rows, len(cols))
    x = np.tile(cols, len(rows)) + np.repeat((np.arange(len(rows)) % 2) * gap / 2, len(cols))
    return (
        x + rng.normal(0, jitter * gap, x.shape) + rng.uniform(0, gap),
        y + rng.normal(0, jitter * gap, y.shape) + rng.uniform(0, gap),
    )


def draw_histology(
    rng: np.random.Generator, size: int, labels: tuple[str, ...]
) -> tuple[Array, Mask]:
    u = rng.uniform
    x, y = axes(size)
    ink, pink = u(1.00, 1.30), u(0.24, 0.40)
    mask = np.zeros((size, size), np.bool_)
    border = np.full((size, size), 1.0, np.float32)  # > 0: lymph tissue, < 0: metastasis
    if "metastasis" in labels:
        angle = u(0, 2 * np.pi)
        along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        border = along - u(0.15, 0.75) + 0.05 * field(rng, size, 6)
        mask = border < 0

    strands = np.exp(-((field(rng, size, 5) / 0.16) ** 2))  # reticular fibres, vessels
    eosin = pink * (0.75 + 0.18 * field(rng, size, 9)) + 0.25 * strands
    haze = 0.16 + 0.05 * field(rng, size, 13)

    def at(field: Array, px: Array, py: Array) -> Array:
        last = size - 1
        return field[
            np.clip((py * size).astype(int), 0, last), np.clip((px * size).astype(int), 0, last)
        ]

    gap = u(0.088, 0.108)
    nx, ny = _scatter(rng, gap, 0.13)
    crowd = u(0.82, 0.98)
    keep = (rng.uniform(size=nx.shape) < crowd) & (at(border, nx, ny) > 0.03)
    keep &= at(strands, nx, ny) < rng.uniform(0.5, 1.4, nx.shape)
    nx, ny = nx[keep], ny[keep]
    stain = np.zeros((size, size), np.float32)
    if len(nx):
        a = gap * rng.normal(0.42, 0.03, nx.shape).clip(0.34, 0.50)
        b = a * rng.uniform(0.82, 1.0, nx.shape)
        tone = rng.normal(0.95, 0.10, nx.shape).clip(0.65, 1.2)
        stain = _stamp(
            size, nx, ny, a, b, rng.uniform(0, np.pi, nx.shape), tone, np.full_like(a, 0.12)
        )

    if mask.any():
        eosin = np.where(mask, 0.85 * eosin + 0.10, eosin)
        wide = u(0.150, 0.205)
        mx, my = _scatter(rng, wide, 0.17)
        lumen = np.full((size, size), 1.0, np.float32)
        if u() < 0.45:  # a gland: nuclei stand around a pale lumen
            reach = border < -0.12
            spots = np.argwhere(reach[size // 5 : -size // 5, size // 5 : -size // 5])
            row, col = spots[int(u() * len(spots))] + size // 5 if len(spots) else (0, 0)
            gx, gy = (col + 0.5) / size, (row + 0.5) / size
            ga, gb, turn = u(0.09, 0.15), u(0.07, 0.11), u(0, np.pi)
            if len(spots):
                lumen = ellipse(x, y, gx, gy, ga, gb, turn)
                count = int(np.pi * (ga + gb + wide) / (0.62 * wide))
                around = 2 * np.pi * (np.arange(count) + rng.uniform(-0.2, 0.2, count)) / count
                da, db = (ga + 0.45 * wide) * np.cos(around), (gb + 0.45 * wide) * np.sin(around)
                ring_x = gx + np.cos(turn) * da - np.sin(turn) * db
                ring_y = gy + np.sin(turn) * da + np.cos(turn) * db
                free = at(lumen, mx, my) > 0.85 * wide
                mx, my = np.concatenate([mx[free], ring_x]), np.concatenate([my[free], ring_y])
        keep = (at(border, mx, my) < -0.01) & (rng.uniform(size=mx.shape) < 0.94)
        mx, my = mx[keep], my[keep]
        if len(mx):
            a = wide * rng.normal(0.43, 0.075, mx.shape).clip(0.28, 0.62)
            b = a * rng.uniform(0.58, 0.95, mx.shape)
            tone = rng.normal(0.66, 0.13, mx.shape).clip(0.38, 1.0)
            turn_all = rng.uniform(0, np.pi, mx.shape)
            hollow = rng.uniform(0.15, 0.50, mx.shape)
            stain = np.maximum(stain, _stamp(size, mx, my, a, b, turn_all, tone, hollow))
            ox, oy = mx + rng.normal(0, 0.12, mx.shape) * a, my + rng.normal(0, 0.12, mx.shape) * b
            dot = 0.16 * a
            stain = stain + 0.45 * _stamp(
                size, ox, oy, dot, dot, turn_all, np.full_like(a, 0.9), np.zeros_like(a)
            )
        haze = haze + 0.04 * mask
        pale = inside(lumen, 0.03)
        eosin, haze = eosin * (1 - 0.85 * pale), haze * (1 - 0.8 * pale)
    gaps = inside(1.0 - np.abs(field(rng, size, 9)) / 2.6, 0.06) * (stain < 0.2)
    eosin, haze = eosin * (1 - 0.7 * gaps), haze * (1 - 0.7 * gaps)
    dye = np.array([HAEMATOXYLIN, EOSIN], np.float32) * (1 + 0.04 * rng.standard_normal((2, 3)))
    chromatin = gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), 0.7)
    stain = ink * (stain * (1 + 0.22 * chromatin) + haze)
    density = dye[0][:, None, None] * stain + dye[1][:, None, None] * np.maximum(eosin, 0)
    image = u(0.93, 0.99) * np.exp(-density)
    return image + 0.012 * rng.standard_normal((3, size, size), dtype=np.float32), mask
