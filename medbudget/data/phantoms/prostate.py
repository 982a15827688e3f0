"""Draw axial slices of the pelvis at the prostate: T2W, ADC and high-b DWI.

A map of tissues first, after textbook anatomy and 150 mm wide as PI-CAI's crop; then what each
sequence makes of it: coil shading, noise on its own grid, and diffusion maps of 2 mm voxels that are
empty where there is no signal. The middle 100 mm are kept, in a window as a radiologist sets it: at
64 px a crop of 150 mm leaves 20 px for the gland, and a window up to urine leaves the gland dark.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms.drawing import (
    FINE,
    Array,
    Mask,
    Rng,
    axes,
    blend,
    clouds,
    enlarge,
    field,
    grain,
    resize,
)
from medbudget.data.phantoms.pelvis import draw_front, draw_rectum, draw_walls
from medbudget.data.phantoms.sketch import Oval, Points, Sketch, outline

Scalar = TypeVar("Scalar", bound=np.generic)
Tones = tuple[float | None, ...]  # of T2W, ADC, DWI and the signal without diffusion weighting
VOXELS = 75  # of the diffusion maps along an edge: 2 mm
T2W_VOXELS = 300  # 0.5 mm
WIDER = 1.5  # the slice that is drawn, in edges of the image that is kept
WINDOW = (1.7, 1.2, 1.25)  # gains of T2W, ADC and DWI
BLUR = 0.0030  # standard deviation of T2W's point spread: 0.45 mm


def draw_prostate(rng: Rng, size: int, labels: tuple[str, ...]) -> tuple[Array, Mask]:
    """Draw one slice ``(3, size, size)`` of 100 mm, and its tumour ``(4 size, 4 size)``.

    The channels are T2W, ADC and DWI: black is 0, white 1, and some pixels are above.
    """
    u = rng.uniform
    kept, size = size, FINE * round(WIDER * size)
    sketch = Sketch(rng, size)
    level = u()  # of the slice: 0 at the apex, 1 at the base
    cy, a, b = u(0.49, 0.53), u(0.125, 0.170), u(0.095, 0.130)
    gland = Oval(0.5 + u(-0.012, 0.012), cy, a, b)
    draw_walls(rng, sketch, level)
    draw_front(rng, sketch, level, gland)
    gas = draw_rectum(rng, sketch, gland)
    _draw_gland(rng, sketch, gland)

    *signals, coarse, fine = sketch.signals()
    coarse_clouds, fine_clouds = clouds(rng, size, 9, 4), clouds(rng, size, 36, 3)
    mottle = 1 + coarse * coarse_clouds + fine * fine_clouds
    maps: list[Array] = [signal * mottle for signal in signals]
    within = sketch.cover(outline(gland.x, cy, 0.975 * a, 0.965 * b, 0, 2.2), 0.003)
    _add_benign_lesions(rng, sketch, maps, gland, within)
    # chosen for the healthy too, so that no later random number depends on the label
    tumour, tones, conspicuity = _choose_tumour(rng, gland)
    mask = np.zeros((size, size), np.bool_)
    if "tumour" in labels:
        cover = within * sketch.cover(tumour, 0.004)
        _mix(maps, tones, cover * conspicuity * (1 + 0.1 * fine_clouds))
        mask = cover > 0.5
    if gas and u() < 0.7:  # susceptibility: signal piles up in front of the gas, and ADC is wrong
        first, last = sorted(rng.integers(6, 13, 2))
        edge = [gas[i % 12] for i in range(first, last + 2)]
        ridge = sketch.cover(edge, width=u(0.010, 0.022), soft=0.004)
        _mix(maps, (None, u(0.08, 0.3), u(0.4, 0.95), 0.5), ridge * u(0.5, 1))
    image = _acquire(rng, maps, size // FINE) * np.array(WINDOW, np.float32)[:, None, None]
    return crop_middle(image, kept), crop_middle(mask, FINE * kept)


def crop_middle(images: NDArray[Scalar], size: int) -> NDArray[Scalar]:
    """Return the middle ``(…, size, size)`` of images ``(…, s, s)``."""
    first = (images.shape[-1] - size) // 2
    return images[..., first : first + size, first : first + size]


def _mix(maps: list[Array], tones: Tones, cover: Array) -> None:
    """Blend each map towards its tone where there is a cover; None leaves a map as it is."""
    for c, tone in enumerate(tones):
        if tone is not None:
            maps[c] = blend(maps[c], tone, np.clip(cover, 0, 1))


def _draw_gland(rng: Rng, sketch: Sketch, gland: Oval) -> None:
    """Draw capsule, zones, benign nodules, fibromuscular stroma, urethra and ejaculatory ducts."""
    u = rng.uniform
    cx, cy, a, b = gland
    sketch.tissues["peripheral zone"] *= [u(0.7, 1.25), u(0.85, 1.1), u(0.85, 1.15), 1, 1, 1]
    sketch.tissues["transition zone"] *= [u(0.8, 1.25), u(0.85, 1.15), u(0.85, 1.15), 1, 1, 1]
    dent = u(0.0, 0.10)  # the rectum flattens the gland
    contour = [
        (x, y - dent * b * np.exp(-(((x - cx) / (0.5 * a)) ** 2)) * (y > cy))
        for x, y in outline(cx, cy, a, b, 0, 2.2)
    ]
    sketch.fill(contour, "peripheral zone", "capsule", 0.006)
    for _ in range(rng.integers(6, 16)):  # septa of the peripheral zone fan out
        angle = u(0.0, np.pi)
        septum = [gland.at(angle, f, f) for f in (0.6, 0.8, 0.95)]
        sketch.line(septum, "transition zone", u(0.002, 0.006))
    share = u(0.60, 0.88)  # the transition zone grows with age
    inner = Oval(cx, cy - b * (1 - share) * 0.80, a * share, b * (share + 0.03))
    sketch.fill(outline(*inner, 0, 2.1), "transition zone", "capsule", 0.005)
    for i in range(
        rng.integers(4, 14)
    ):  # hyperplasia: glandular (bright) or stromal (dark) nodules
        angle, far, r, tone = u(0, 2 * np.pi), np.sqrt(u(0, 0.72)), u(0.010, 0.036), u(0.6, 1.5)
        contrast = [tone, 0.7 + 0.3 * tone, 1.25 - 0.2 * tone, 1, 1.3, 1.3]
        sketch.tissues[f"nodule {i}"] = sketch.tissues["transition zone"] * contrast
        x, y = inner.at(angle, far, far)
        nodule = outline(x, y, r, r * u(0.7, 1.0), u(0, 3))
        sketch.fill(nodule, f"nodule {i}", "capsule", u(0.001, 0.004))
        for _ in range(rng.integers(0, 4) if tone > 1 else 0):  # retention cysts
            s = u(0.002, 0.006)
            cyst = outline(x + u(-0.5, 0.5) * r, y + u(-0.5, 0.5) * r, s, s)
            sketch.fill(cyst, "peripheral zone")
    back = cy - 0.88 * b + u(0.10, 0.22) * b
    anterior = [
        (cx - 0.55 * a, cy - 0.80 * b),
        (cx, cy - 0.99 * b),
        (cx + 0.55 * a, cy - 0.80 * b),
        (cx + 0.2 * a, back),
        (cx - 0.2 * a, back),
    ]
    sketch.fill(anterior, "fibromuscular stroma")
    urethra = outline(cx, cy + u(0.0, 0.25) * b, u(0.006, 0.012), u(0.006, 0.014))
    sketch.fill(urethra, "fluid", "capsule", 0.004)
    for side in (-1, 1):  # ejaculatory ducts in the central zone
        duct = outline(cx + side * 0.010, cy + 0.55 * b, 0.004, 0.004)
        sketch.fill(duct, "fluid", "capsule", 0.003)


def _add_benign_lesions(
    rng: Rng, sketch: Sketch, maps: list[Array], gland: Oval, within: Array
) -> None:
    """Add prostatitis and stromal nodules, with soft borders, where `within` is 1."""
    u = rng.uniform
    for _ in range(rng.integers(0, 4)):  # prostatitis: wedges or diffuse, hardly bright on DWI
        angle = u(0.05, np.pi - 0.05)
        size, turn = (u(0.018, 0.055), u(0.012, 0.026)), angle + u(-0.5, 0.5)
        patch = outline(*gland.at(angle, 0.84, 0.80), *size, turn)
        cover = within * sketch.cover(patch, 0.008) * u(0.3, 1.0)
        _mix(maps, (0.16, u(0.30, 0.44), u(0.26, 0.40), 0.45), cover)
    for _ in range(
        rng.integers(0, 4)
    ):  # stromal nodules: dark on T2W and ADC, rather bright on DWI
        far, angle, r = np.sqrt(u(0, 0.5)), u(np.pi, 2 * np.pi), u(0.012, 0.030)
        nodule = outline(*gland.at(angle, far, 0.9 * far), r, r * u(0.7, 1))
        cover = within * sketch.cover(nodule, 0.004) * u(0.5, 1.0)
        _mix(maps, (0.11, u(0.26, 0.36), u(0.28, 0.44), 0.4), cover)


def _choose_tumour(rng: Rng, gland: Oval) -> tuple[Points, Tones, float]:
    """Return a tumour's outline, its tones, and its conspicuity from 0 to 1."""
    u = rng.uniform
    a = 0.024 + 0.050 * u() ** 1.5
    b = a * u(0.55, 0.9)
    if u() < 0.75:  # peripheral zone, mostly behind and at the sides
        angle = u(0.05, np.pi - 0.05)
        x = gland.x + (gland.a - 0.9 * b) * np.cos(angle)
        y = gland.y + (gland.b - 0.9 * b) * np.sin(angle)
        turn = angle + np.pi / 2
    else:  # transition zone
        x, y = gland.x + u(-0.5, 0.5) * gland.a, gland.y + u(-0.7, 0.1) * gland.b
        turn = u(0, np.pi)
    points = [
        (px + 0.15 * a * rng.normal(), py + 0.15 * a * rng.normal())
        for px, py in outline(x, y, a, b, turn)
    ]
    return points, (u(0.10, 0.16), u(0.20, 0.31), u(0.38, 0.75), 0.45), u(0.45, 1.0)


def _acquire(rng: Rng, maps: list[Array], size: int) -> Array:
    """Return T2W, ADC and DWI ``(3, size, size)`` of maps of tissue: shaded, blurred and noisy."""
    u = rng.uniform
    y = axes(size)[1]
    gain = 0.90 * np.exp(0.10 * rng.normal())
    coil = gain * np.exp(u(0.2, 0.9) * (y - 0.55) + 0.07 * field(rng, size, 3))
    spread = u(0.009, 0.016)
    blurred = gaussian_filter(resize(maps[0], size), BLUR * size)
    t2w = np.hypot(blurred * coil + spread * grain(rng, size, T2W_VOXELS, 0.45), 0.3 * spread)
    adc, dwi, signal = (resize(one, VOXELS, Image.Resampling.BOX) for one in maps[1:])
    return np.stack([t2w, *_measure_diffusion(rng, adc, dwi, signal, size)])


def _measure_diffusion(rng: Rng, adc: Array, dwi: Array, signal: Array, size: int) -> list[Array]:
    """Return ADC and DWI ``(size, size)`` as a scanner computes them from noisy voxels."""
    u = rng.uniform
    x, y = axes(VOXELS)
    for from_side in (1 - x, x):  # the flanks fold over at the sides, their fat suppressed or not
        middle = u(0.05, 0.15) - u(0.3, 0.6) * (y - u(0.4, 0.5)) ** 2
        wide = u(0.012, 0.019) * np.exp(0.4 * field(rng, VOXELS, 9))
        distance = np.abs(from_side - middle - 0.004 * field(rng, VOXELS, 12))
        cover = np.clip(1.5 - distance / wide, 0, 1)
        bright = u(0.1, 0.4) if u() < 0.6 else u(1.0, 4.0)
        signal, adc = blend(signal, 0.6, cover), blend(adc, u(0.3, 0.4), cover)
        dwi = blend(dwi, bright, cover)
    signal = signal * np.exp(0.4 * field(rng, VOXELS, 5)) + 0.04 * np.exp(-y / 0.08)
    spread = u(0.010, 0.018)
    noise = rng.standard_normal((5, VOXELS, VOXELS), dtype=np.float32)
    doubt = 0.022 * gaussian_filter(noise[0], 0.8) / 0.35 + 0.010 * noise[1]
    measured = signal + doubt > 0.085  # elsewhere the maps are empty
    dwi = np.hypot(
        dwi * np.exp(0.12 * field(rng, VOXELS, 3)) + spread * noise[2], spread * noise[3]
    )
    adc = adc + np.minimum(0.020 + 0.004 / np.maximum(signal, 0.03), 0.15) * noise[4]
    voxels = [np.where(measured, np.maximum(one, 0), 0) for one in (adc, dwi)]
    maps = [np.clip(enlarge(one, T2W_VOXELS // VOXELS), 0, 1) for one in voxels]
    return [resize(one, size) for one in maps]
