"""Draw lymph-node sections in haematoxylin and eosin: lymphocytes, stroma and metastasis.

Coordinates are in units of the patch's edge, about 90 µm.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms.drawing import (
    FINE,
    Array,
    Line,
    Mask,
    Rng,
    axes,
    clouds,
    draw_lines,
    ellipse,
    field,
    grain,
    inside,
    rotate,
    shrink,
    window,
)

HAEMATOXYLIN = np.array([0.66, 0.70, 0.30], np.float32)[:, None, None]  # optical density in RGB
EOSIN = np.array([0.09, 0.95, 0.30], np.float32)[:, None, None]
CAMERA = 256  # pixels of the scanner along an edge of the patch


def draw_histology(rng: Rng, size: int, labels: tuple[str, ...]) -> tuple[Array, Mask]:
    """Draw one patch ``(3, size, size)``, RGB from 0 to 1, and its metastasis ``(4 size, 4 size)``."""
    u = rng.uniform
    size = FINE * size
    x, y = axes(size)
    border = np.ones((size, size), np.float32)  # above 0: lymphoid tissue, below: metastasis
    if "metastasis" in labels:
        angle = u(0, 2 * np.pi)
        along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        border = along - u(0.1, 0.8) + 0.06 * field(rng, size, 5) + 0.02 * field(rng, size, 14)
    mask = border < 0

    # stroma and cytoplasm
    fibres = draw_lines(size, _choose_fibres(rng))
    fibres = np.clip(gaussian_filter(fibres, 0.004 * size), 0, 1)
    texture = clouds(rng, size, 14, 5)
    eosin = u(0.22, 0.36) * (1 + 0.30 * texture) + 0.34 * fibres
    eosin = np.where(mask, 1.15 * eosin + 0.08, eosin)

    # lymphocytes, and fibroblasts along the fibres
    gap = u(0.085, 0.110)
    centres = _scatter(rng, gap, 0.20)
    n = len(centres[0])
    on_fibre = _read(fibres, centres)
    kept = (_read(border, centres) > 0.02) & (rng.uniform(size=n) < u(0.80, 0.97))
    kept &= on_fibre < rng.uniform(0.25, 0.9, n)
    radii = gap * rng.normal(0.39, 0.05, n).clip(0.28, 0.52)
    roundness = rng.uniform(0.78, 1, n)
    nuclei = _draw_nuclei(rng, size, centres, radii, roundness, kept, (0.75, 1.05), 0.15)
    fibroblasts = (rng.random(n) < 0.25) & (on_fibre > 0.4)
    flat = np.full(n, 0.3)
    spindles = _draw_nuclei(rng, size, centres, 1.3 * radii, flat, fibroblasts, (0.7, 0.95), 0.2)
    nuclei = np.maximum(nuclei, spindles)

    lumen = np.zeros((size, size), np.float32)
    if "metastasis" in labels:
        nuclei, lumen = _add_metastasis(rng, nuclei, border)
        membranes = np.abs(field(rng, size, 9)) < 0.06
        eosin = eosin + 0.08 * gaussian_filter((membranes & mask).astype(np.float32), 0.003 * size)

    # absorption, and the scanner
    clefts = inside(1.35 - np.abs(field(rng, size, 7)) - 0.15 * texture, 0.2) * (nuclei < 0.2)
    empty = np.maximum(clefts, lumen)[None]
    haze = (0.13 + 0.05 * texture) * (1 - 0.85 * empty)
    strength = u(0.95, 1.30)
    blue, pink = 1 + 0.05 * rng.standard_normal((2, 3, 1, 1)).astype(np.float32)
    density = HAEMATOXYLIN * blue * strength * (nuclei + haze)
    density = density + EOSIN * pink * np.maximum(eosin, 0) * (1 - 0.9 * empty)
    image = shrink(u(0.93, 0.98) * np.exp(-density))
    size //= FINE
    image = gaussian_filter(image, (0, 0.0035 * size, 0.0035 * size))
    noise = np.stack([grain(rng, size, CAMERA, 0.6) for _ in range(3)])
    return np.clip(image + 0.012 * noise, 0, 1), mask


def _choose_fibres(rng: Rng) -> list[Line]:
    """Return bundles of wavy collagen fibres as lines for `draw_lines`."""
    u, normal = rng.uniform, rng.normal
    lines: list[Line] = []
    for _ in range(rng.integers(1, 4)):
        bundle_x, bundle_y, direction = u(0, 1), u(0, 1), u(0, 2 * np.pi)
        for _ in range(rng.integers(4, 10)):
            x, y, angle = bundle_x + normal(0, 0.04), bundle_y + normal(0, 0.04), direction
            for _ in range(14):
                end_x, end_y = x + 0.06 * np.cos(angle), y + 0.06 * np.sin(angle)
                lines.append((x, y, end_x, end_y, u(0.008, 0.02), u(0.4, 1)))
                x, y, angle = end_x, end_y, angle + normal(0, 0.16)
    return lines


def _add_metastasis(rng: Rng, nuclei: Array, border: Array) -> tuple[Array, Array]:
    """Add large pale nuclei with nucleoli where `border` is below 0, some around a gland's lumen.

    Returns all nuclei and the cover of the lumen, each ``(size, size)``.
    """
    u = rng.uniform
    size = len(border)
    gap = u(0.14, 0.20)
    centres = _scatter(rng, gap, 0.22)
    free = np.ones(len(centres[0]), np.bool_)
    lumen = np.zeros((size, size), np.float32)
    if u() < 0.45:  # a gland: nuclei stand around a pale lumen
        x, y, a, b = u(0.25, 0.75), u(0.25, 0.75), u(0.10, 0.18), u(0.08, 0.13)
        turn = u(0, np.pi)
        gland = ellipse(*axes(size), x, y, a, b, turn)
        lumen = inside(np.maximum(gland, border + 0.05), 0.02)
        n = int(np.pi * (a + b + gap) / (0.62 * gap))
        around = 2 * np.pi * (np.arange(n) + u(-0.25, 0.25, n)) / n
        along, across = (a + 0.45 * gap) * np.cos(around), (b + 0.45 * gap) * np.sin(around)
        cos, sin = np.cos(turn), np.sin(turn)
        ring = [x + cos * along - sin * across, y + sin * along + cos * across]
        free = np.append(_read(gland, centres) > 0.8 * gap, np.ones(n, np.bool_))
        centres = np.concatenate([centres, ring], 1)
    n = len(free)
    kept = (_read(border, centres) < -0.01) & (rng.uniform(size=n) < 0.93) & free
    radii = gap * rng.normal(0.42, 0.085, n).clip(0.26, 0.64)
    roundness = rng.uniform(0.58, 0.95, n)
    large = _draw_nuclei(rng, size, centres, radii, roundness, kept, (0.38, 0.78), 0.45)
    centres = centres + 0.2 * radii * rng.normal(0, 1, (2, n))
    nucleoli = _draw_nuclei(rng, size, centres, 0.17 * radii, np.ones(n), kept, (0.35, 0.6), 0)
    return np.maximum(nuclei, large) + nucleoli * (large > 0.1), lumen


def _scatter(rng: Rng, gap: float, jitter: float) -> Array:
    """Return x and y ``(2, n)`` of points `gap` apart on a hexagonal lattice that overlaps the edges.

    `jitter` is the standard deviation of their displacement, in gaps.
    """
    rows, columns = np.arange(-gap, 1 + gap, gap * 0.87), np.arange(-gap, 1 + gap, gap)
    y = np.repeat(rows, len(columns))
    odd = np.repeat(np.arange(len(rows)) % 2, len(columns))
    x = np.tile(columns, len(rows)) + odd * gap / 2
    moved = [p + rng.normal(0, jitter * gap, p.shape) + rng.uniform(0, gap) for p in (x, y)]
    return np.stack(moved)


def _read(image: Array, points: Array) -> Array:
    """Return the image's values ``(n)`` at points ``(2, n)``; outside, those of its edge."""
    columns, rows = np.clip((points * len(image)).astype(int), 0, len(image) - 1)
    return image[rows, columns]


def _draw_nuclei(
    rng: Rng,
    size: int,
    centres: Array,
    radii: Array,
    roundness: Array,
    kept: Mask,
    tones: tuple[float, float],
    hollow: float,
) -> Array:
    """Draw nuclei ``(size, size)`` with membrane, clumped chromatin and uneven outlines.

    `centres` are ``(2, n)``. `radii` (half the long axis), `roundness` (short axis over long one) and
    `kept` (which to draw) are ``(n)``. `tones` are the palest and the darkest; `hollow`, 0 to 1, is
    how much paler a nucleus is in its middle.
    """
    total = np.zeros((size, size), np.float32)
    x, y = axes(size)
    n = len(radii)
    clumps = clouds(rng, size, 60, 3)
    turns, stains = rng.uniform(0, np.pi, n), rng.uniform(*tones, n)
    dents, phases = rng.normal(0, 0.05, (n, 3)), rng.uniform(0, 6, (n, 3))
    for i in np.flatnonzero(kept):
        (cx, cy), r, flat, tone = centres[:, i], radii[i], roundness[i], stains[i]
        view = window(size, cx - 1.3 * r, cx + 1.3 * r, cy - 1.3 * r, cy + 1.3 * r)
        along, across = rotate(x[:, view[1]] - cx, y[view[0]] - cy, turns[i])
        along, across = along / r, across / (r * flat)
        theta = np.arctan2(across, along)
        bumps = sum(dents[i, k] * np.cos((k + 2) * theta + phases[i, k]) for k in range(3))
        rho = np.hypot(along, across) * (1 + bumps)
        chromatin = tone * (1 - hollow * np.clip(1 - rho**2, 0, 1)) * (1 + 0.30 * clumps[view])
        membrane = 0.25 * tone * np.exp(-(((rho - 0.9) / 0.12) ** 2))
        cover = np.clip(0.5 + (1 - rho) * r * flat / 0.012, 0, 1)
        total[view] = np.maximum(total[view], cover * (chromatin + membrane))
    return total
