"""Draw prostate phantoms: T2W, ADC and DWI of one axial slice, with a tumour or without."""

from __future__ import annotations

import numpy as np

from medbudget.data.phantoms.drawing import Array, Mask, blend, ellipse, field, inside, place

PELVIS = (  # T2W, ADC and DWI from 0 to 1
    (0.58, 0.20, 0.07),  # fat
    (0.17, 0.36, 0.12),  # muscle
    (0.94, 0.92, 0.10),  # urine
    (0.26, 0.34, 0.16),  # wall of the bladder
    (0.80, 0.68, 0.19),  # peripheral zone
    (0.50, 0.50, 0.23),  # transition zone
    (0.27, 0.36, 0.14),  # capsule
    (0.20, 0.17, 0.86),  # tumour
    (0.30, 0.36, 0.20),  # wall of the rectum
    (0.04, 0.05, 0.03),  # gas
    (0.36, 0.11, 0.05),  # bone
)


def draw_prostate(
    rng: np.random.Generator, size: int, labels: tuple[str, ...]
) -> tuple[Array, Mask]:
    u = rng.uniform
    x, y = place(size, u(-0.07, 0.07), (u(-0.03, 0.03), u(-0.03, 0.03)), u(0.92, 1.10))
    warp = 0.010
    x, y = x + warp * field(rng, size, 5), y + warp * field(rng, size, 5)
    edge = 0.022
    gain = 1 + 0.05 * rng.standard_normal((11, 3))
    tissue = (np.array(PELVIS) * gain).astype(np.float32)[:, :, None, None]
    fat, muscle, urine, wall, zone_p, zone_t, capsule, tumour, rectal, gas, bone = tissue
    image: Array = np.broadcast_to(fat, (3, size, size)).astype(np.float32)
    image = image + np.array([0.07, 0.03, 0.01], np.float32)[:, None, None] * field(rng, size, 9)

    apart = u(0.345, 0.385)
    for side in (-1, 1):  # obturator muscles, and the acetabulum outside them
        lean = side * u(0.12, 0.30)
        cx, cy, long = 0.5 + side * apart, u(0.50, 0.56), u(0.22, 0.28)
        outer = ellipse(x, y, cx + side * 0.16, cy - 0.08, 0.13, 0.24, lean)
        image = blend(image, bone, inside(outer, edge))
        image = blend(
            image, muscle, inside(ellipse(x, y, cx, cy, u(0.055, 0.08), long, lean), edge)
        )

    cx, cy = 0.5 + u(-0.02, 0.02), u(0.49, 0.54)
    a, b = u(0.175, 0.235), u(0.135, 0.175)
    turn = u(-0.08, 0.08)

    rx, ry = cx + u(-0.03, 0.03), cy + b + u(0.135, 0.165)
    ra, rb = u(0.075, 0.115), u(0.065, 0.09)
    rectum = ellipse(x, y, rx, ry, ra, rb)
    image = blend(image, rectal, inside(rectum, edge))
    filling = gas + (0.35 * rectal * u(0, 1) if u() < 0.5 else 0)
    image = blend(image, filling, inside(rectum + 0.026, edge))

    bladder_b = u(0.09, 0.14)
    bladder_y = cy - b - bladder_b - u(0.0, 0.05)
    bladder_a = u(0.14, 0.22)
    bladder = ellipse(x, y, cx + u(-0.02, 0.02), bladder_y, bladder_a, bladder_b)
    image = blend(image, wall, inside(bladder - 0.018, edge))
    image = blend(image, urine, inside(bladder, edge))

    gland = ellipse(x, y, cx, cy, a, b, turn)
    image = blend(image, capsule, inside(gland - 0.012, edge))
    image = blend(image, zone_p, inside(gland, edge))
    share = u(0.62, 0.80)  # the transition zone grows with age
    inner_a, inner_b = a * share, b * (share - 0.04)
    inner = ellipse(x, y, cx, cy - b * 0.20, inner_a, inner_b, turn)
    nodules = np.array([0.13, 0.07, 0.03], np.float32)[:, None, None] * field(rng, size, 17)
    image = blend(image, capsule, 0.6 * inside(np.abs(inner) - 0.008, edge))
    image = blend(image, zone_t + nodules, inside(inner, edge))
    if u() < 0.35:  # prostatitis: mildly dark, and not bright on DWI
        spot = ellipse(
            x, y, cx + u(-0.7, 0.7) * a, cy + u(0.3, 0.7) * b, u(0.03, 0.06), u(0.03, 0.05)
        )
        image = blend(image, 0.6 * zone_p + 0.4 * capsule, 0.7 * inside(spot, 0.04))

    mask = np.zeros((size, size), np.bool_)
    if "tumour" in labels:
        la, lb = u(0.042, 0.085), u(0.038, 0.062)
        angle, far = u(0, 2 * np.pi), np.sqrt(u(0.02, 1))
        reach_x, reach_y = max(a - 0.8 * la, 0.02), max(b - 0.9 * lb, 0.02)
        dx, dy = far * reach_x * np.cos(angle), far * reach_y * np.sin(angle)
        tx = cx + np.cos(turn) * dx - np.sin(turn) * dy
        ty = cy + np.sin(turn) * dx + np.cos(turn) * dy
        lesion = ellipse(x, y, tx, ty, la, lb, u(0, np.pi))
        lesion = np.maximum(lesion + 0.008 * field(rng, size, 13), gland)
        seen = u(0.6, 1.0)  # conspicuity
        image = blend(image, tumour, seen * inside(lesion, 0.028))
        mask = (lesion < 0) & (gland < 0)

    coil = 1 + u(0.02, 0.06) * field(rng, size, 3)
    image = image * coil * u(0.93, 1.07, (3, 1, 1)).astype(np.float32)
    noise = rng.standard_normal((2, 3, size, size), dtype=np.float32)
    noise *= np.array([0.028, 0.035, 0.030], np.float32)[:, None, None] * u(0.7, 1.2)
    return np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2), mask  # Rician, as magnitude MRI
