"""Draw what surrounds the prostate: bones, muscles, vessels, bladder, levator ani and rectum.

Coordinates are in units of the slice's edge, 150 mm; `level` is the slice's: 0 at the prostate's apex,
1 at its base. Only the middle 100 mm are kept: femoral heads and vessels, iliopsoas, gluteus maximus
and coccyx lie outside.
"""

from __future__ import annotations

import numpy as np

from medbudget.data.phantoms.drawing import Rng
from medbudget.data.phantoms.sketch import Oval, Points, Sketch, outline

# Outlines: distance from the midline and distance from the slice's upper edge
# fmt: off
RECTUS = [(-0.01, -0.02), (0.09, -0.026), (0.18, 0.012), (0.10, 0.028), (-0.01, 0.03)]
SUPERIOR_RAMUS = [
    (0.13, 0.235), (0.22, 0.215), (0.36, 0.27), (0.55, 0.29),
    (0.55, 0.40), (0.36, 0.41), (0.27, 0.375), (0.20, 0.36),
]
PUBIC_BODY = [
    (0.011, 0.19), (0.08, 0.175), (0.18, 0.195), (0.33, 0.27), (0.40, 0.33),
    (0.33, 0.37), (0.22, 0.385), (0.10, 0.375), (0.025, 0.345),
]
PECTINEUS = [
    (0.15, 0.19), (0.23, 0.165), (0.34, 0.19), (0.42, 0.26), (0.40, 0.30), (0.30, 0.275), (0.2, 0.23),
]
OBTURATOR_EXTERNUS = [
    (0.27, 0.30), (0.40, 0.33), (0.52, 0.40), (0.5, 0.46), (0.36, 0.42), (0.28, 0.37),
]
ILIOPSOAS = [(0.44, 0.20), (0.55, 0.17), (0.6, 0.3), (0.5, 0.31)]
# fmt: on


def _on_side(side: int, points: Points, down: float = 0.0) -> Points:
    """Return points, given by their distance from the midline, on the left (-1) or right (1)."""
    return [(0.5 + side * x, y + down) for x, y in points]


def draw_walls(rng: Rng, sketch: Sketch, level: float) -> None:
    """Draw the sides and the back: ischium, femoral heads, muscles, coccyx, and fat with septa."""
    u = rng.uniform
    for _ in range(rng.integers(25, 60)):  # septa and small vessels in the fat
        x, y, turn, step = u(0.1, 0.9), u(0.62, 1.0), u(0, 2 * np.pi), u(0.01, 0.03)
        bends = [(i * step, turn + 0.3 * i) for i in range(4)]
        septum = [(x + far * np.cos(angle), y + far * np.sin(angle)) for far, angle in bends]
        sketch.line(septum, "fascia" if u() < 0.8 else "vein", u(0.0015, 0.0045))
    for side in (-1, 1):
        _draw_side_wall(rng, sketch, level, side)
    if level > 0.6 or u() < 0.3:
        coccyx = outline(0.5, u(0.96, 1.0), u(0.03, 0.05), 0.02)
        sketch.fill(coccyx, "marrow", "cortex", 0.008)
    for _ in range(rng.integers(3, 9)):  # anococcygeal ligament
        x = 0.5 + u(-0.03, 0.03)
        fibre = [(x, u(0.80, 0.88)), (x + u(-0.01, 0.01), 0.94), (x + u(-0.02, 0.02), 1.02)]
        sketch.line(fibre, "fascia", u(0.002, 0.006))


def _draw_side_wall(rng: Rng, sketch: Sketch, level: float, side: int) -> None:
    """Draw hip bone, hip joint, obturator internus with its vessels, and gluteus maximus."""
    u = rng.uniform
    lean, wide = u(-0.015, 0.015), u(0.034, 0.048)
    # fmt: off
    ischium = [  # and the floor of the acetabulum
        (0.30, 0.42), (0.36, 0.36), (0.58, 0.34), (0.62, 0.9), (0.50, 0.97), (0.435 + lean, 0.90),
        (0.37 + lean, 0.66),
    ]
    obturator_internus = [  # from the pubis to the lesser sciatic foramen
        (0.205, 0.375), (0.245, 0.36), (0.295, 0.44), (0.335 + lean, 0.60), (0.375 + lean, 0.76),
        (0.43 + lean, 0.90), (0.445 + lean, 0.945), (0.385 + lean, 0.925), (0.30 + lean, 0.80),
        (0.262 + lean - wide / 3, 0.62), (0.215 - wide / 4, 0.46),
    ]
    # fmt: on
    sketch.fill(_on_side(side, ischium), "marrow", "cortex", 0.011)
    if level > 0.45:  # femoral head, in the fluid of its joint
        head = outline(0.5 + side * u(0.50, 0.54), u(0.30, 0.36), 0.105, 0.115)
        sketch.fill(head, "fluid")
        bone = [(0.5 + side * 0.012 + 0.98 * (x - 0.5), y) for x, y in head]
        sketch.fill(bone, "marrow", "cortex", 0.010)
    fat_plane = [(0.26, 0.38), (0.315, 0.46), (0.36 + lean, 0.64), (0.42 + lean, 0.85)]
    sketch.line(_on_side(side, fat_plane), "fat", u(0.004, 0.014))
    sketch.fill(_on_side(side, obturator_internus), "muscle", "fascia", 0.003)
    for _ in range(rng.integers(2, 5)):  # septa between its bundles
        x, y = u(0.25, 0.31), u(0.45, 0.6)
        septum = [(x, y), (x + 0.03, y + 0.10), (x + 0.065, y + 0.2)]
        sketch.line(_on_side(side, septum), "fascia", 0.003)
    for i in range(rng.integers(4, 8)):  # obturator vessels in front, internal pudendal ones behind
        x, y = (u(0.24, 0.30), u(0.33, 0.41)) if i < 3 else (u(0.34, 0.40), u(0.86, 0.95))
        r = u(0.005, 0.013)
        vessel = outline(0.5 + side * x, y, r * u(1, 2), r, u(0, 3))
        sketch.fill(vessel, "vein" if u() < 0.6 else "flow void")
    top = u(0.93, 0.985)
    gluteus = [
        (0.12, 1.06), (0.2, top + 0.02), (0.36, top), (0.5, top - 0.05), (0.65, top), (0.6, 1.1),
    ]  # fmt: skip
    sketch.fill(_on_side(side, gluteus), "muscle", "fascia", 0.003)
    for x in np.arange(0.2, 0.5, 0.035):
        streak = _on_side(side, [(x, top + 0.012), (x + 0.03, 1.02)])
        sketch.line(streak, "fat", u(0.001, 0.005))


def draw_front(rng: Rng, sketch: Sketch, level: float, gland: Oval) -> None:
    """Draw the front: abdominal wall, muscles, femoral vessels, pubis or bladder, and veins."""
    u = rng.uniform
    abdominal_wall = u(0.06, 0.11)
    for _ in range(rng.integers(8, 20)):  # septa in the fat under the skin
        x, y = u(0, 1), u(0.0, 0.16)
        septum = [
            (x, y),
            (x + u(0.03, 0.1), y + u(-0.02, 0.02)),
            (x + u(0.1, 0.2), y + u(-0.03, 0.03)),
        ]
        sketch.line(septum, "fascia", u(0.0015, 0.004))
    for side in (-1, 1):
        sketch.fill(_on_side(side, RECTUS, abdominal_wall), "muscle")
        down = u(-0.01, 0.02)
        pubis = _on_side(side, PUBIC_BODY if level < 0.5 else SUPERIOR_RAMUS, down)
        sketch.fill(pubis, "marrow", "cortex", 0.008)
        sketch.fill(_on_side(side, PECTINEUS, down), "muscle", "fascia", 0.003)
        if level < 0.35:
            sketch.fill(_on_side(side, OBTURATOR_EXTERNUS), "muscle", "fat", 0.006)
        sketch.fill(_on_side(side, ILIOPSOAS), "muscle")
        x, y = u(0.42, 0.47), u(0.10, 0.16)
        femoral_vein = (0.5 + side * x, y, u(0.024, 0.03), "vein")
        femoral_artery = (0.5 + side * (x + 0.045), y - 0.012, u(0.018, 0.024), "flow void")
        for cx, cy, r, tissue in (femoral_vein, femoral_artery):
            vessel = outline(cx, cy, r, r * u(0.8, 1.1))
            sketch.fill(vessel, tissue if u() < 0.7 else "flow void", "fascia", 0.006)
        x, y = u(0.22, 0.30), u(0.06, 0.13)
        spermatic_cord = outline(0.5 + side * x, y, u(0.015, 0.025), u(0.012, 0.02))
        sketch.fill(spermatic_cord, "plexus", "fascia", 0.004)
    top = gland.y - gland.b
    if level < 0.5:
        symphysis = [(0.5, 0.175), (0.502, 0.26), (0.5, 0.355)]
        sketch.line(symphysis, "cortex", u(0.010, 0.020))
    elif level < 0.72:  # bladder neck or detrusor apron in front of the gland
        neck = outline(0.5, 0.5 * (0.2 + top), u(0.09, 0.13), 0.42 * (top - 0.2), 0, 2.4)
        sketch.fill(neck, "detrusor", "fascia", 0.004)
    else:
        b, a, thick = u(0.03, 0.055) + 0.04 * level, u(0.06, 0.11) + 0.04 * level, u(0.012, 0.030)
        y = top - b - thick + u(-0.01, 0.012)
        wall = outline(0.5, y, a + thick, b + thick, 0, 2.4)
        sketch.fill(wall, "detrusor", "fascia", 0.004)
        sketch.fill(outline(0.5, y, a, b, 0, u(2.3, 3.2)), "urine")
    for _ in range(rng.integers(6, 14)):  # dorsal venous complex
        x, y = u(-0.10, 0.10), u(0.005, 0.035)
        vein = outline(0.5 + x, top - y + 1.6 * x * x, u(0.008, 0.022), u(0.004, 0.009), 2 * x)
        sketch.fill(vein, "vein")
    sketch.line([(0.40, top + 0.008), (0.5, top - 0.01), (0.60, top + 0.008)], "fascia", 0.006)


def draw_rectum(rng: Rng, sketch: Sketch, gland: Oval) -> Points:
    """Draw levator ani, neurovascular bundles and rectum; return the outline of gas in it, if any."""
    u = rng.uniform
    cx, cy, a, b = gland
    ra, rb = a * u(0.75, 1.0), u(0.058, 0.095)
    x, y = cx + u(-0.015, 0.015), cy + b + rb + u(0.012, 0.022)
    wide, low = a + u(0.018, 0.034), y + rb + u(0.004, 0.025)
    left = [
        (0.5 - wide * 0.84, cy - 0.9 * b),
        (0.5 - wide, cy + 0.1 * b),
        (0.5 - wide * 0.92, y - 0.25 * rb),
        (0.5 - wide * 0.66, low - 0.03),
    ]
    levator = [*left, (0.5, low), *[(1 - px, py) for px, py in left[::-1]]]
    sketch.fill(levator, "fat" if u() < 0.5 else "plexus")  # around prostate and rectum
    for side in (-1, 1):  # neurovascular bundles at five and seven o'clock, and lateral veins
        for _ in range(rng.integers(6, 12)):
            angle = u(-0.5, 1.1)
            dx, dy = (a + u(0.008, 0.03)) * np.cos(angle), (b + u(0.005, 0.025)) * np.sin(angle)
            r = u(0.003, 0.008)
            tissue = ("vein", "fascia", "flow void")[rng.integers(3)]
            sketch.fill(outline(cx + side * dx, cy + dy, r, r * u(0.7, 2)), tissue)
    sketch.line(levator, "muscle", u(0.016, 0.028))
    sketch.line(levator[3:6], "muscle", u(0.025, 0.045))  # puborectalis, behind the rectum
    reach, height = 0.9 * a, cy + 0.75 * b
    rectoprostatic = [(cx - reach, height), (cx, cy + b + 0.008), (cx + reach, height)]
    sketch.line(rectoprostatic, "fascia", 0.005)

    power, turn = u(2.0, 2.6), u(-0.12, 0.12)
    sketch.fill(outline(x, y, ra, rb, turn, power), "rectal muscle", "fascia", 0.003)
    wall = u(0.013, 0.026)
    inner = outline(x, y + u(-0.006, 0.006), ra - wall, rb - wall, turn, power)
    sketch.fill(inner, "mucosa")
    lumen = outline(x, y, ra - wall - 0.006, (rb - wall - 0.006) * u(0.35, 1.0), turn, power)
    content = u()
    sketch.fill(lumen, "gas" if content < 0.6 else "stool")
    if content < 0.25:  # stool or fluid below the gas
        sketch.fill(outline(x + u(-0.03, 0.03), y + 0.4 * rb, 0.5 * ra, 0.3 * rb), "stool")
    for _ in range(rng.integers(0, 4)):  # bubbles and folds
        r = u(0.004, 0.012)
        spot = outline(x + u(-0.6, 0.6) * ra, y + u(-0.4, 0.4) * rb, r, r)
        sketch.fill(spot, "gas" if u() < 0.6 else "mucosa")
    return lumen if content < 0.6 else []
