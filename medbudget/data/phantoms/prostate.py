"""Draw axial slices of the pelvis at the prostate: T2W, ADC and high-b DWI as R, G and B.

A map of tissues first, after textbook anatomy (150 mm wide, as PI-CAI's crop); then what each
sequence makes of it: coil shading, noise of its own grid, and diffusion maps of 2 mm voxels, cut off
where there is no signal. Shown is the middle, 100 mm wide, in a window as one reads it: at 64 px a
crop of 150 mm leaves 20 px for the gland, and urine as white leaves the gland dark.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms.drawing import (
    FINE,
    Array,
    Mask,
    Points,
    Sketch,
    axes,
    blend,
    clouds,
    enlarge,
    field,
    grain,
    oval,
    resize,
)
from medbudget.data.phantoms.pelvis import NAMES, TISSUE, draw_front, draw_rectum, draw_walls

Scalar = TypeVar("Scalar", bound=np.generic)
VOXELS = 75  # of 2 mm, of the diffusion maps
T2W_VOXELS = 300  # of 0.5 mm
WIDER = 1.5  # times the image's edge is drawn, and the middle kept
WINDOW = (1.7, 1.2, 1.25)  # gains of T2W, ADC and DWI
BLUR = 0.0030  # standard deviation of T2W's point spread: 0.45 mm


def draw_prostate(
    rng: np.random.Generator, size: int, labels: tuple[str, ...]
) -> tuple[Array, Mask]:
    """Draw one slice ``(3, size, size)`` from 0 to 1, and the mask of its tumour."""
    u = rng.uniform
    tissue = [np.array(values) for values in TISSUE.values()]
    kept, size = size, FINE * round(WIDER * size)
    sketch = Sketch(rng, size)
    level = u()  # of the slice: 0 at the apex, 1 at the base
    cy, a, b = u(0.49, 0.53), u(0.125, 0.170), u(0.095, 0.130)
    cx = 0.5 + u(-0.012, 0.012)
    draw_walls(rng, sketch, level)
    draw_front(rng, sketch, level, cy - b)
    rectum = draw_rectum(rng, sketch, cx, cy, a, b)
    _draw_gland(rng, sketch, tissue, cx, cy, a, b)

    # overlays with soft borders: inflammation, benign nodules without a rim, tumour
    index = sketch.labels()
    table = np.array(tissue, np.float32)
    coarse, fine = clouds(rng, size, 9, 4), clouds(rng, size, 36, 3)
    mottle = 1 + table[index, 4] * coarse + table[index, 5] * fine
    maps = [table[index, c] * mottle for c in range(4)]
    gland = sketch.cover(oval(cx, cy, 0.975 * a, 0.965 * b, 0, 2.2), 0.003)
    for _ in range(int(rng.integers(0, 4))):  # prostatitis: wedges, diffuse, hardly bright on DWI
        angle = u(0.05, np.pi - 0.05)
        spot = oval(
            cx + 0.84 * a * np.cos(angle), cy + 0.80 * b * np.sin(angle),
            u(0.018, 0.055), u(0.012, 0.026), angle + u(-0.5, 0.5),
        )  # fmt: skip
        cover = gland * sketch.cover(spot, 0.008) * u(0.3, 1.0)
        _mix(maps, (0.16, u(0.30, 0.44), u(0.26, 0.40), 0.45), cover)
    for _ in range(int(rng.integers(0, 4))):  # stromal nodules: dark on T2W and ADC, rather bright
        far, angle = np.sqrt(u(0, 0.5)), u(np.pi, 2 * np.pi)
        r = u(0.012, 0.030)
        spot = oval(
            cx + far * a * np.cos(angle), cy + 0.9 * far * b * np.sin(angle), r, r * u(0.7, 1)
        )
        cover = gland * sketch.cover(spot, 0.004) * u(0.5, 1.0)
        _mix(maps, (0.11, u(0.26, 0.36), u(0.28, 0.44), 0.4), cover)
    mask = np.zeros((size, size), np.bool_)
    tumour = _place_tumour(
        rng, cx, cy, a, b
    )  # drawn by chance in the healthy too: the same patient
    if "tumour" in labels:
        outline, tones, seen = tumour
        cover = gland * sketch.cover(outline, 0.004)
        _mix(maps, tones, cover * seen * (1 + 0.1 * fine))
        mask = cover > 0.5
    if (
        rectum and u() < 0.7
    ):  # gas bends the field: signal piles up in front of it, and ADC is wrong
        first, last = sorted(rng.integers(6, 13, 2))
        ridge = sketch.stroke(
            [rectum[i % 12] for i in range(first, last + 2)], u(0.010, 0.022), 0.004
        )
        _mix(maps, (None, u(0.08, 0.3), u(0.4, 0.95), 0.5), ridge * u(0.5, 1))
    slices = _acquire(rng, maps, size // FINE) * np.array(WINDOW, np.float32)[:, None, None]
    return crop_middle(slices, kept), crop_middle(mask, FINE * kept)


def crop_middle(images: npt.NDArray[Scalar], size: int) -> npt.NDArray[Scalar]:
    """Return the middle ``size x size`` pixels of images ``(…, s, s)``."""
    first = (images.shape[-1] - size) // 2
    return images[..., first : first + size, first : first + size]


def _mix(maps: list[Array], tones: tuple[float | None, ...], cover: Array) -> None:
    """Blend four maps towards four tones; None leaves one alone."""
    for c, tone in enumerate(tones):
        if tone is not None:
            maps[c] = blend(maps[c], tone, np.clip(cover, 0, 1))


def _draw_gland(
    rng: np.random.Generator,
    sketch: Sketch,
    tissue: list[Array],
    cx: float,
    cy: float,
    a: float,
    b: float,
) -> None:
    """Draw capsule, peripheral zone, transition zone with nodules, stroma, urethra and ducts."""
    u = rng.uniform
    own = [len(tissue) + i for i in range(2)]
    tissue.append(
        tissue[NAMES["peripheral"]] * np.array([u(0.7, 1.25), u(0.85, 1.1), u(0.85, 1.15), 1, 1, 1])
    )
    tissue.append(
        tissue[NAMES["transition"]]
        * np.array([u(0.8, 1.25), u(0.85, 1.15), u(0.85, 1.15), 1, 1, 1])
    )
    dent = u(0.0, 0.10)  # the rectum flattens the gland
    outline = [
        (x, y - dent * b * np.exp(-(((x - cx) / (0.5 * a)) ** 2)) * (y > cy))
        for x, y in oval(cx, cy, a, b, 0, 2.2)
    ]
    sketch.blob(outline, own[0], NAMES["capsule"], 0.006)
    for _ in range(int(rng.integers(6, 16))):  # septa of the peripheral zone fan out
        angle = u(0.0, np.pi)
        points = [
            (cx + f * a * np.cos(angle), cy + f * b * np.sin(angle)) for f in (0.6, 0.8, 0.95)
        ]
        sketch.line(points, own[1], u(0.002, 0.006))
    share = u(0.60, 0.88)  # the transition zone grows with age
    ia, ib = a * share, b * (share + 0.03)
    iy = cy - b * (1 - share) * 0.80
    sketch.blob(oval(cx, iy, ia, ib, 0, 2.1), own[1], NAMES["capsule"], 0.005)
    for _ in range(
        int(rng.integers(4, 14))
    ):  # benign nodules: glandular (bright) or stromal (dark)
        angle, far = u(0, 2 * np.pi), np.sqrt(u(0, 0.72))
        r = u(0.010, 0.036)
        tone = u(0.6, 1.5)
        tissue.append(
            tissue[own[1]] * np.array([tone, 0.7 + 0.3 * tone, 1.25 - 0.2 * tone, 1, 1.3, 1.3])
        )
        x, y = cx + far * ia * np.cos(angle), iy + far * ib * np.sin(angle)
        sketch.blob(
            oval(x, y, r, r * u(0.7, 1.0), u(0, 3)),
            len(tissue) - 1,
            NAMES["capsule"],
            u(0.001, 0.004),
        )
        for _ in range(int(rng.integers(0, 4)) if tone > 1 else 0):  # cystic ducts
            s = u(0.002, 0.006)
            sketch.blob(oval(x + u(-0.5, 0.5) * r, y + u(-0.5, 0.5) * r, s, s), own[0])
    front = u(0.10, 0.22) * b
    sketch.blob(
        [
            (cx - 0.55 * a, cy - 0.80 * b),
            (cx, cy - 0.99 * b),
            (cx + 0.55 * a, cy - 0.80 * b),
            (cx + 0.2 * a, cy - 0.88 * b + front),
            (cx - 0.2 * a, cy - 0.88 * b + front),
        ],
        NAMES["stroma"],
    )
    sketch.blob(
        oval(cx, cy + u(0.0, 0.25) * b, u(0.006, 0.012), u(0.006, 0.014)),
        NAMES["vein"],
        NAMES["capsule"],
        0.004,
    )
    for k in (-1, 1):  # ejaculatory ducts in the central zone
        sketch.blob(
            oval(cx + k * 0.010, cy + 0.55 * b, 0.004, 0.004),
            NAMES["vein"],
            NAMES["capsule"],
            0.003,
        )


def _place_tumour(
    rng: np.random.Generator, cx: float, cy: float, a: float, b: float
) -> tuple[Points, tuple[float, ...], float]:
    """Return a tumour's outline, its tones on the four maps, and how much of it shows."""
    u = rng.uniform
    la = 0.024 + 0.050 * u() ** 1.5
    lb = la * u(0.55, 0.9)
    if u() < 0.75:  # peripheral zone, mostly behind and at the sides
        angle = u(0.05, np.pi - 0.05)
        x, y = cx + (a - 0.9 * lb) * np.cos(angle), cy + (b - 0.9 * lb) * np.sin(angle)
        turn = angle + np.pi / 2
    else:
        x, y, turn = cx + u(-0.5, 0.5) * a, cy + u(-0.7, 0.1) * b, u(0, np.pi)
    points = [
        (px + 0.15 * la * rng.normal(), py + 0.15 * la * rng.normal())
        for px, py in oval(x, y, la, lb, turn)
    ]
    return points, (u(0.10, 0.16), u(0.20, 0.31), u(0.38, 0.75), 0.45), u(0.45, 1.0)


def _acquire(rng: np.random.Generator, maps: list[Array], size: int) -> Array:
    """Add coil shading and noise; the diffusion maps come from voxels of 2 mm."""
    u = rng.uniform
    y = axes(size)[1]
    gain = 0.90 * np.exp(0.10 * rng.normal())
    shade = gain * np.exp(u(0.2, 0.9) * (y - 0.55) + 0.07 * field(rng, size, 3))
    spread = u(0.009, 0.016)
    seen = gaussian_filter(resize(maps[0], size), BLUR * size)
    t2w = np.hypot(seen * shade + spread * grain(rng, size, T2W_VOXELS, 0.45), 0.3 * spread)
    signal, adc, dwi = (resize(maps[c], VOXELS, Image.Resampling.BOX) for c in (3, 1, 2))
    return np.stack([t2w, *_measure_diffusion(rng, signal, adc, dwi, size)])


def _measure_diffusion(
    rng: np.random.Generator, signal: Array, adc: Array, dwi: Array, size: int
) -> list[Array]:
    """Return ADC and DWI ``(size, size)`` as a scanner computes them from noisy voxels."""
    u = rng.uniform
    n = VOXELS
    x, y = axes(n)
    for k in (0, 1):  # the flanks fold over at the sides, their fat suppressed or not
        middle = u(0.05, 0.15) - u(0.3, 0.6) * (y - u(0.4, 0.5)) ** 2
        wide = u(0.012, 0.019) * np.exp(0.4 * field(rng, n, 9))
        cover = np.clip(
            1.5 - np.abs((x if k else 1 - x) - middle - 0.004 * field(rng, n, 12)) / wide, 0, 1
        )
        bright = u(0.1, 0.4) if u() < 0.6 else u(1.0, 4.0)
        signal, adc = blend(signal, 0.6, cover), blend(adc, u(0.3, 0.4), cover)
        dwi = blend(dwi, bright, cover)
    signal = signal * np.exp(0.4 * field(rng, n, 5)) + 0.04 * np.exp(-y / 0.08)
    spread = u(0.010, 0.018)
    noise = rng.standard_normal((5, n, n), dtype=np.float32)
    doubt = 0.022 * gaussian_filter(noise[0], 0.8) / 0.35 + 0.010 * noise[1]
    seen = signal + doubt > 0.085  # else the maps are left empty
    dwi = np.hypot(dwi * np.exp(0.12 * field(rng, n, 3)) + spread * noise[2], spread * noise[3])
    adc = adc + np.minimum(0.020 + 0.004 / np.maximum(signal, 0.03), 0.15) * noise[4]
    out = []
    for one in (adc, dwi):
        known = np.where(seen, np.maximum(one, 0), 0)
        grid = enlarge(known, T2W_VOXELS // n)
        out.append(resize(np.clip(grid, 0, 1), size))
    return out
