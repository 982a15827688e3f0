"""Draw axial prostate MRI: T2W, apparent diffusion coefficient (ADC) and high-b DWI, 150 mm wide."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from medbudget.data.phantoms.drawing import Array, Mask, axes, blend, field, inside, place
from pretraining.phantoms.drawing import clouds, draw_lines, ellipse

# T2W, ADC, DWI from 0 to 1
TISSUE = {
    "fat": (0.66, 0.02, 0.035),
    "muscle": (0.13, 0.42, 0.085),
    "urine": (0.95, 0.93, 0.10),
    "wall": (0.22, 0.45, 0.15),
    "marrow": (0.40, 0.10, 0.05),
    "cortex": (0.05, 0.04, 0.03),
    "peripheral": (0.62, 0.62, 0.20),
    "transition": (0.36, 0.48, 0.22),
    "capsule": (0.16, 0.40, 0.13),
    "tumour": (0.22, 0.26, 0.62),
    "rectum": (0.24, 0.42, 0.17),
    "gas": (0.03, 0.02, 0.03),
}


def draw_prostate(
    rng: np.random.Generator, size: int, labels: tuple[str, ...]
) -> tuple[Array, Mask]:
    """Draw one slice ``(3, size, size)`` from 0 to 1, and the mask of its tumour."""
    u = rng.uniform
    x, y = place(size, u(-0.05, 0.05), (u(-0.03, 0.03), u(-0.03, 0.03)), u(0.92, 1.12))
    x = x + 0.014 * field(rng, size, 4) + 0.007 * field(rng, size, 9) + 0.002 * field(rng, size, 24)
    y = y + 0.014 * field(rng, size, 4) + 0.007 * field(rng, size, 9) + 0.002 * field(rng, size, 24)
    edge = 0.009
    gain = 1 + 0.06 * rng.standard_normal((len(TISSUE), 3)).astype(np.float32)
    tissue = {
        name: (np.array(value, np.float32) * gain[i])[:, None, None]
        for i, (name, value) in enumerate(TISSUE.items())
    }

    def paint(
        image: Array, name: str, shape: Array, soft: float = edge, cover: float = 1.0, mix=0.0
    ) -> Array:
        return blend(image, tissue[name] * (1 + mix), cover * inside(shape, soft))

    grain = clouds(rng, size, 14, 4)
    image = tissue["fat"] * (
        1 + np.array([0.10, 0.3, 0.2], np.float32)[:, None, None] * clouds(rng, size, 5, 4)
    )
    image = image * np.ones((3, size, size), np.float32)
    septa = draw_lines(size, _septa(rng))
    image = blend(image, tissue["capsule"], 0.45 * septa)

    cx, cy = 0.5 + u(-0.02, 0.02), u(0.47, 0.54)
    a, b = u(0.150, 0.205), u(0.110, 0.155)
    turn = u(-0.08, 0.08)
    high = u() < 0.5  # a slice through the base shows the bladder, a lower one the symphysis

    # pelvic walls: bone outside, obturator internus inside
    for k in (-1, 1):
        lean = k * u(0.05, 0.16)
        wall = 0.5 + k * u(0.325, 0.36)
        bone = ellipse(
            x, y, wall + k * u(0.145, 0.165), u(0.52, 0.60), 0.105, u(0.19, 0.25), lean, 2.6
        )
        image = paint(image, "cortex", bone - 0.012)
        image = paint(image, "marrow", bone, mix=0.22 * grain)
        inner = ellipse(
            x,
            y,
            wall - k * 0.015,
            u(0.54, 0.60),
            u(0.050, 0.080),
            u(0.25, 0.32),
            lean + k * 0.06,
            2.6,
        )
        image = paint(image, "muscle", inner, mix=0.20 * clouds(rng, size, 12, 4))
        hip = ellipse(
            x, y, 0.5 + k * u(0.40, 0.46), u(0.20, 0.28), 0.10, u(0.05, 0.08), k * u(0.2, 0.9)
        )
        image = paint(image, "muscle", hip, mix=0.22 * grain)
        gluteal = ellipse(
            x, y, 0.5 + k * u(0.36, 0.46), u(0.90, 0.98), 0.14, u(0.03, 0.06), k * u(-0.6, -0.3)
        )
        image = paint(image, "muscle", gluteal, mix=0.22 * grain)
        front = ellipse(
            x,
            y,
            0.5 + k * u(0.27, 0.33),
            u(0.17, 0.22),
            u(0.10, 0.14),
            u(0.045, 0.07),
            k * u(0.35, 0.55),
        )
        image = paint(image, "muscle", front, mix=0.22 * grain)
        for _ in range(int(rng.integers(2, 5))):  # femoral and obturator vessels
            vx, vy, vr = 0.5 + k * u(0.28, 0.42), u(0.10, 0.34), u(0.010, 0.020)
            vessel = ellipse(x, y, vx, vy, vr, vr * u(0.8, 1.3))
            image = paint(image, "capsule", vessel - 0.005)
            image = paint(image, "cortex" if u() < 0.6 else "urine", vessel, cover=0.8)
    abdomen = ellipse(x, y, 0.5, u(0.02, 0.05), u(0.15, 0.22), u(0.03, 0.045))
    image = paint(image, "muscle", abdomen, mix=0.2 * grain)

    if high:
        height, breadth = u(0.075, 0.13), u(0.12, 0.20)
        by = cy - b - height - u(-0.015, 0.02)
        bladder = ellipse(
            x, y, cx + u(-0.02, 0.02), by, breadth, height, u(-0.05, 0.05), u(2.2, 3.4)
        )
        image = paint(image, "wall", bladder - u(0.014, 0.024), mix=0.15 * grain)
        image = paint(image, "urine", bladder, mix=0.015 * field(rng, size, 3))
    else:
        for k in (-1, 1):
            pubis = ellipse(
                x, y, 0.5 + k * 0.105, u(0.16, 0.20), 0.095, u(0.065, 0.085), k * 0.35, 2.6
            )
            image = paint(image, "cortex", pubis - 0.008)
            image = paint(image, "marrow", pubis, mix=0.22 * grain)
        plexus = ellipse(x, y, cx, cy - b - 0.025, 0.10, 0.030)
        image = blend(
            image,
            tissue["urine"] * (0.55 + 0.3 * clouds(rng, size, 26, 3)),
            0.8 * inside(plexus, 0.02),
        )

    # rectum, mesorectal fat, levator ani around both
    ra, rb = u(0.095, 0.170), u(0.060, 0.100)
    ry = cy + b + rb + u(0.020, 0.035)
    rx = cx + u(-0.03, 0.03)
    sling = np.minimum(
        ellipse(x, y, cx, cy, a + 0.030, b + 0.05), ellipse(x, y, rx, ry, ra + 0.035, rb + 0.03)
    )
    image = paint(
        image,
        "muscle",
        np.maximum(
            np.abs(sling - 0.004) - u(0.005, 0.010) * (1 + 0.9 * clouds(rng, size, 7, 2)),
            cy - 0.4 * b - y,
        ),
        mix=0.15 * grain,
    )
    rectum = ellipse(x, y, rx, ry, ra, rb, u(-0.15, 0.15), 2.3)
    image = paint(image, "rectum", rectum, mix=0.25 * grain)
    lumen = rectum + u(0.014, 0.024)
    image = paint(image, "gas", lumen)
    if u() < 0.6:  # stool
        stool = np.maximum(
            lumen, ellipse(x, y, rx + u(-0.03, 0.03), ry + u(0, 0.04), 0.6 * ra, 0.55 * rb)
        )
        image = blend(
            image,
            tissue["rectum"] * (0.9 + 0.5 * clouds(rng, size, 20, 4)),
            0.9 * inside(stool, 0.02),
        )

    # the gland: capsule, peripheral zone, transition zone with nodules
    gland = ellipse(x, y, cx, cy, a, b, turn, 2.2)
    vein = np.abs(gland - 0.020) - 0.009 + 0.012 * np.maximum(clouds(rng, size, 22, 3), -1.5)
    image = blend(
        image,
        tissue["urine"] * 0.7,
        0.7 * inside(vein, 0.01) * inside(np.abs(x - cx) * -1 + 0.55 * a, 0.03),
    )
    image = paint(image, "capsule", gland - 0.007)
    stripes = np.sin(60 * np.arctan2(y - cy + b, x - cx) + 2 * field(rng, size, 6))
    image = paint(
        image, "peripheral", gland, mix=0.10 * grain + 0.05 * stripes * (field(rng, size, 5) > 0)
    )
    share = u(0.66, 0.86)  # the transition zone grows with age
    ia, ib = a * share, b * (share + 0.02)
    iy = cy - b * (1 - share) * 0.85
    zone = ellipse(x, y, cx, iy, ia, ib, turn, 2.1)
    image = paint(image, "capsule", np.abs(zone) - 0.004, cover=0.7)
    image = paint(image, "transition", zone, mix=0.20 * clouds(rng, size, 16, 4))
    image = _draw_nodules(rng, image, tissue, x, y, zone, (cx, iy, ia, ib))
    stroma = ellipse(x, y, cx, cy - 0.92 * b, 0.45 * a, 0.17 * b)
    image = paint(image, "muscle", stroma, 0.03, 0.85)
    urethra = ellipse(x, y, cx, cy + 0.12 * b, 0.012, 0.014)
    image = blend(image, tissue["urine"] * 0.75, 0.6 * inside(urethra, 0.012))
    for _ in range(
        int(rng.integers(0, 3))
    ):  # prostatitis: wedges, mildly dark, hardly bright on DWI
        angle = u(0.1, np.pi - 0.1)
        spot = ellipse(
            x,
            y,
            cx + 0.86 * a * np.cos(angle),
            cy + 0.82 * b * np.sin(angle),
            u(0.02, 0.05),
            u(0.012, 0.03),
            angle,
        )
        patch = np.maximum(np.maximum(spot + 0.006 * grain, gland), -zone)
        image = blend(
            image,
            0.45 * tissue["peripheral"] + 0.55 * tissue["wall"],
            u(0.3, 0.8) * inside(patch, 0.03),
        )

    mask = np.zeros((size, size), np.bool_)
    if "tumour" in labels:
        la, lb = u(0.028, 0.062), u(0.020, 0.042)
        if u() < 0.78:  # peripheral zone
            angle = u(0.12, np.pi - 0.12)
            tx, ty = cx + (a - 0.75 * lb) * np.cos(angle), cy + (b - 0.8 * lb) * np.sin(angle)
            lesion = ellipse(x, y, tx, ty, la, lb, angle + np.pi / 2)
        else:
            lesion = ellipse(
                x, y, cx + u(-0.6, 0.6) * ia, iy + u(-0.5, 0.3) * ib, la, lb, u(0, np.pi)
            )
        lesion = np.maximum(lesion + 0.005 * grain, gland + 0.004)
        seen = u(0.55, 1.0)  # some are hard to see
        image = blend(image, tissue["tumour"] * (1 + 0.08 * grain), seen * inside(lesion, 0.012))
        mask = lesion < 0
    return _acquire(rng, image, size), mask


def _septa(rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Return thin lines of connective tissue through the fat."""
    lines = []
    for _ in range(int(rng.integers(25, 45))):
        px, py, angle = rng.uniform(0, 1), rng.uniform(0.05, 1), rng.uniform(0, np.pi)
        for _ in range(4):
            qx, qy = px + 0.035 * np.cos(angle), py + 0.035 * np.sin(angle)
            lines.append((px, py, qx, qy, rng.uniform(0.003, 0.006), rng.uniform(0.4, 1)))
            px, py, angle = qx, qy, angle + rng.normal(0, 0.4)
    return lines


def _draw_nodules(rng, image, tissue, x, y, zone, where) -> Array:
    """Draw benign nodules: round, with a dark rim, glandular (bright) or stromal (dark)."""
    cx, cy, a, b = where
    for _ in range(int(rng.integers(2, 8))):
        angle, far = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 0.75))
        r = rng.uniform(0.014, 0.040)
        shape = ellipse(
            x,
            y,
            cx + far * a * np.cos(angle),
            cy + far * b * np.sin(angle),
            r,
            r * rng.uniform(0.75, 1.1),
        )
        shape = np.maximum(shape, zone + 0.004)
        tone = rng.uniform(0.55, 1.6)
        value = (
            tissue["transition"]
            * np.array([tone, 0.75 + 0.25 * tone, 1.25 - 0.2 * tone], np.float32)[:, None, None]
        )
        image = blend(
            image, value * (1 + 0.15 * clouds(rng, len(y), 30, 3)), 0.85 * inside(shape, 0.010)
        )
        image = blend(image, tissue["capsule"], 0.55 * inside(np.abs(shape) - 0.002, 0.006))
    return image


def _acquire(rng: np.random.Generator, image: Array, size: int) -> Array:
    """Add coil shading and Rician noise; the diffusion maps come from a grid four times coarser."""
    u = rng.uniform
    shade = np.exp(0.10 * field(rng, size, 3))
    t2w = gaussian_filter(image[0] * shade, 0.0022 * size)
    noise = gaussian_filter(
        rng.standard_normal((2, size, size), dtype=np.float32), (0, 0.0020 * size, 0.0020 * size)
    )
    noise *= u(0.012, 0.024) / noise.std()
    t2w = np.hypot(t2w + noise[0], noise[1])
    coarse = 96
    factor = size / coarse
    moved = np.roll(image[1:], int(u(-0.008, 0.008) * size), 1)  # distortion along the phase axis
    low = np.stack([_resample(gaussian_filter(m, 0.45 * factor), coarse) for m in moved])
    glare = 0.5 * u() ** 4 * np.exp(-(axes(coarse)[0] if u() < 0.5 else 1 - axes(coarse)[0]) / 0.04)
    signal = low[1] * np.exp(0.15 * field(rng, coarse, 3)) + glare
    spread = u(0.012, 0.024)
    dwi = np.hypot(
        signal + spread * rng.standard_normal((coarse, coarse)),
        spread * rng.standard_normal((coarse, coarse)),
    )
    doubt = spread / np.maximum(low[1] + 0.10 * low[0], 0.02)  # little signal, noisy quotient
    adc = np.maximum(
        low[0] + np.minimum(0.45 * doubt, 0.25) * rng.standard_normal((coarse, coarse)), 0
    )
    speckle = gaussian_filter(rng.standard_normal((coarse, coarse)), 0.6) > 0.45
    adc = np.where(low[0] < 0.06, 0.7 * adc * speckle, adc)
    fine = [
        np.clip(zoom(m, size / coarse, order=1, grid_mode=True, mode="nearest"), 0, 1)
        for m in (adc, dwi)
    ]
    return np.stack([np.clip(t2w, 0, 1), *fine]).astype(np.float32)


def _resample(image: Array, size: int) -> Array:
    """Take every so-manieth pixel of a blurred image: ``(S, S)`` to ``(size, size)``."""
    at = ((np.arange(size) + 0.5) * image.shape[0] / size).astype(int)
    return image[np.ix_(at, at)]
