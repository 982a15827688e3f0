"""Draw lymph-node sections in haematoxylin and eosin: lymphocytes, stroma, and metastasis."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms.drawing import (
    FINE,
    Array,
    Mask,
    axes,
    clouds,
    draw_lines,
    ellipse,
    field,
    grain,
    inside,
    shrink,
)

HAEMATOXYLIN = np.array([0.66, 0.70, 0.30], np.float32)[:, None, None]  # optical density in RGB
EOSIN = np.array([0.09, 0.95, 0.30], np.float32)[:, None, None]
CAMERA = 256  # pixels of the scanner for a patch


def draw_histology(
    rng: np.random.Generator, size: int, labels: tuple[str, ...]
) -> tuple[Array, Mask]:
    """Draw one patch ``(3, size, size)`` from 0 to 1, about 90 µm wide, and its mask."""
    u = rng.uniform
    size = FINE * size
    x, y = axes(size)
    mask = np.zeros((size, size), np.bool_)
    border = np.ones((size, size), np.float32)  # > 0: lymph tissue, < 0: metastasis
    if "metastasis" in labels:
        angle = u(0, 2 * np.pi)
        along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        border = along - u(0.1, 0.8) + 0.06 * field(rng, size, 5) + 0.02 * field(rng, size, 14)
        mask = border < 0
    fibres = draw_lines(size, _fibres(rng))
    fibres = np.clip(gaussian_filter(fibres, 0.004 * size), 0, 1)
    texture = clouds(rng, size, 14, 5)
    eosin = u(0.22, 0.36) * (1 + 0.30 * texture) + 0.34 * fibres
    eosin = np.where(mask, 1.15 * eosin + 0.08, eosin)

    gap = u(0.085, 0.110)
    nx, ny = _scatter(rng, gap, 0.20)
    keep = (_at(border, nx, ny) > 0.02) & (rng.uniform(size=nx.shape) < u(0.80, 0.97))
    keep &= _at(fibres, nx, ny) < rng.uniform(0.25, 0.9, nx.shape)
    a = gap * rng.normal(0.39, 0.05, nx.shape).clip(0.28, 0.52)
    small = _nuclei(
        rng,
        size,
        nx,
        ny,
        a,
        rng.uniform(0.78, 1, nx.shape),
        (0.75, 1.05),
        0.15,
        keep,
    )
    stain = small
    spindles = rng.random(nx.shape) < 0.25  # fibroblasts along the fibres
    spindles &= _at(fibres, nx, ny) > 0.4
    flat = np.full_like(a, 0.3)
    long = _nuclei(rng, size, nx, ny, 1.3 * a, flat, (0.7, 0.95), 0.2, spindles)
    stain = np.maximum(stain, long)

    pale = np.zeros((size, size), np.float32)
    if "metastasis" in labels:
        wide = u(0.14, 0.20)
        mx, my = _scatter(rng, wide, 0.22)
        free = np.ones(len(mx), np.bool_)
        if u() < 0.45:  # a gland: nuclei stand around a pale lumen
            gx, gy, ga, gb, turn = (
                u(0.25, 0.75),
                u(0.25, 0.75),
                u(0.10, 0.18),
                u(0.08, 0.13),
                u(0, np.pi),
            )
            lumen = np.maximum(ellipse(x, y, gx, gy, ga, gb, turn), border + 0.05)
            pale = inside(lumen, 0.02)
            count = int(np.pi * (ga + gb + wide) / (0.62 * wide))
            around = 2 * np.pi * (np.arange(count) + rng.uniform(-0.25, 0.25, count)) / count
            da, db = (ga + 0.45 * wide) * np.cos(around), (gb + 0.45 * wide) * np.sin(around)
            free = _at(ellipse(x, y, gx, gy, ga, gb, turn), mx, my) > 0.8 * wide
            mx = np.concatenate([mx, gx + np.cos(turn) * da - np.sin(turn) * db])
            my = np.concatenate([my, gy + np.sin(turn) * da + np.cos(turn) * db])
            free = np.append(free, np.ones(count, np.bool_))
        keep = (_at(border, mx, my) < -0.01) & (rng.uniform(size=mx.shape) < 0.93)
        keep &= free
        a = wide * rng.normal(0.42, 0.085, mx.shape).clip(0.26, 0.64)
        b = rng.uniform(0.58, 0.95, mx.shape)
        large = _nuclei(rng, size, mx, my, a, b, (0.38, 0.78), 0.45, keep)
        dots = _nuclei(
            rng,
            size,
            mx + 0.2 * a * rng.normal(0, 1, a.shape),
            my + 0.2 * a * rng.normal(0, 1, a.shape),
            0.17 * a,
            np.ones_like(a),
            (0.35, 0.6),
            0,
            keep,
        )
        stain = np.maximum(stain, large) + dots * (large > 0.1)
        edges = np.abs(field(rng, size, 9)) < 0.06  # borders between cells
        eosin = eosin + 0.08 * gaussian_filter((edges & mask).astype(np.float32), 0.003 * size)
    clefts = inside(1.35 - np.abs(field(rng, size, 7)) - 0.15 * texture, 0.2) * (stain < 0.2)
    empty = np.maximum(clefts, pale)[None]
    haze = 0.13 + 0.05 * texture
    ink = u(0.95, 1.30)
    hue = 1 + 0.05 * rng.standard_normal((2, 3, 1, 1)).astype(np.float32)
    density = HAEMATOXYLIN * hue[0] * ink * (stain + haze * (1 - 0.85 * empty)) + EOSIN * hue[
        1
    ] * np.maximum(eosin, 0) * (1 - 0.9 * empty)
    image = u(0.93, 0.98) * np.exp(-density)
    image = gaussian_filter(shrink(image), (0, *(0.0035 * size / FINE,) * 2))
    noise = np.stack([grain(rng, size // FINE, CAMERA, 0.6) for _ in range(3)])
    return np.clip(image + 0.012 * noise, 0, 1), mask


def _fibres(rng: np.random.Generator) -> list[tuple[float, float, float, float, float, float]]:
    """Return bundles of wavy stroma fibres."""
    lines = []
    for _ in range(int(rng.integers(1, 4))):
        px, py, main = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0, 2 * np.pi)
        for _ in range(int(rng.integers(4, 10))):
            fx, fy, angle = px + rng.normal(0, 0.04), py + rng.normal(0, 0.04), main
            for _ in range(14):
                qx, qy = fx + 0.06 * np.cos(angle), fy + 0.06 * np.sin(angle)
                lines.append((fx, fy, qx, qy, rng.uniform(0.008, 0.02), rng.uniform(0.4, 1)))
                fx, fy, angle = qx, qy, angle + rng.normal(0, 0.16)
    return lines


def _scatter(rng: np.random.Generator, gap: float, jitter: float) -> tuple[Array, Array]:
    """Return points `gap` apart on a shaken hexagonal lattice that reaches past the image."""
    rows, cols = np.arange(-gap, 1 + gap, gap * 0.87), np.arange(-gap, 1 + gap, gap)
    y = np.repeat(rows, len(cols))
    x = np.tile(cols, len(rows)) + np.repeat((np.arange(len(rows)) % 2) * gap / 2, len(cols))
    return (
        x + rng.normal(0, jitter * gap, x.shape) + rng.uniform(0, gap),
        y + rng.normal(0, jitter * gap, y.shape) + rng.uniform(0, gap),
    )


def _at(values: Array, px: Array, py: Array) -> Array:
    """Read a field ``(size, size)`` at points; those outside read its border."""
    last = len(values) - 1
    rows, cols = (np.clip((p * len(values)).astype(int), 0, last) for p in (py, px))
    return values[rows, cols]


def _nuclei(rng, size, px, py, a, ratio, tones, hollow, keep) -> Array:
    """Draw the nuclei to keep, with membrane, clumped chromatin and uneven outlines."""
    total = np.zeros((size, size), np.float32)
    x, y = axes(size)
    clumps = clouds(rng, size, 60, 3)
    turns, stains = rng.uniform(0, np.pi, len(px)), rng.uniform(*tones, len(px))
    dents, phases = rng.normal(0, 0.05, (len(px), 3)), rng.uniform(0, 6, (len(px), 3))
    for i in np.flatnonzero(keep):
        cx, cy, r, flat, turn, tone = px[i], py[i], a[i], ratio[i], turns[i], stains[i]
        reach = 1.3 * r
        left, right = (int(np.clip(v * size, 0, size)) for v in (cx - reach, cx + reach))
        top, low = (int(np.clip(v * size, 0, size)) for v in (cy - reach, cy + reach))
        if left >= right or top >= low:
            continue
        dx, dy = x[:, left:right] - cx, y[top:low] - cy
        p, q = (
            (np.cos(turn) * dx + np.sin(turn) * dy) / r,
            (np.cos(turn) * dy - np.sin(turn) * dx) / (r * flat),
        )
        theta = np.arctan2(q, p)
        bumps = sum(dents[i, k] * np.cos((k + 2) * theta + phases[i, k]) for k in range(3))
        rho = np.hypot(p, q) * (1 + bumps)
        body = (
            tone
            * (1 - hollow * np.clip(1 - rho**2, 0, 1))
            * (1 + 0.30 * clumps[top:low, left:right])
        )
        rim = 0.25 * tone * np.exp(-(((rho - 0.9) / 0.12) ** 2))
        cover = np.clip(0.5 + (1 - rho) * r * flat / 0.012, 0, 1)
        view = total[top:low, left:right]
        np.maximum(view, cover * (body + rim), out=view)
    return total
