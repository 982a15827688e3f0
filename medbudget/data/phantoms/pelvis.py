"""Draw what is around the prostate into a map of tissues, and say what each sequence shows of them."""

from __future__ import annotations

import numpy as np

from medbudget.data.phantoms.drawing import Points, Sketch, oval

# T2W, ADC and DWI from 0 to 1 (white: urine on T2W and ADC, four times the gland on DWI); signal
# without diffusion weighting; coarse and fine mottle
TISSUE = {
    "fat": (0.345, 0.07, 0.10, 0.045, 0.08, 0.04),
    "muscle": (0.055, 0.33, 0.18, 0.16, 0.15, 0.25),
    "marrow": (0.20, 0.08, 0.09, 0.045, 0.16, 0.20),
    "cortex": (0.03, 0.10, 0.02, 0.02, 0.0, 0.2),
    "fascia": (0.15, 0.25, 0.10, 0.08, 0.1, 0.3),
    "void": (0.02, 0.20, 0.02, 0.02, 0.0, 0.2),
    "vein": (0.42, 0.55, 0.10, 0.20, 0.2, 0.2),
    "urine": (0.97, 0.93, 0.16, 1.00, 0.01, 0.0),
    "wall": (0.085, 0.42, 0.18, 0.25, 0.2, 0.25),
    "peripheral": (0.40, 0.56, 0.22, 0.50, 0.14, 0.14),
    "transition": (0.19, 0.41, 0.24, 0.40, 0.17, 0.22),
    "capsule": (0.11, 0.36, 0.18, 0.25, 0.1, 0.2),
    "stroma": (0.085, 0.34, 0.19, 0.25, 0.2, 0.2),
    "rectum": (0.095, 0.38, 0.20, 0.24, 0.2, 0.25),
    "mucosa": (0.19, 0.42, 0.20, 0.30, 0.2, 0.2),
    "stool": (0.16, 0.30, 0.12, 0.20, 0.4, 0.3),
    "gas": (0.012, 0.02, 0.01, 0.00, 0.0, 0.0),
}
NAMES = {name: i for i, name in enumerate(TISSUE)}


def _side(k: int, points: Points) -> Points:
    """Return points, given by their distance from the midline, on the left or on the right."""
    return [(0.5 + k * x, y) for x, y in points]


def draw_walls(rng: np.random.Generator, sketch: Sketch, level: float) -> None:
    """Draw what lies at the sides and behind: bone, obturator internus, gluteus, fat with septa."""
    u = rng.uniform
    for _ in range(int(rng.integers(25, 60))):  # septa and small vessels in the fat
        x, y, turn, step = u(0.1, 0.9), u(0.62, 1.0), u(0, 2 * np.pi), u(0.01, 0.03)
        points = [
            (x + i * step * np.cos(turn + 0.3 * i), y + i * step * np.sin(turn + 0.3 * i))
            for i in range(4)
        ]
        sketch.line(points, NAMES["fascia" if u() < 0.8 else "vein"], u(0.0015, 0.0045))
    for k in (-1, 1):
        lean, wide = u(-0.015, 0.015), u(0.034, 0.048)
        sketch.blob(  # ischium and the floor of the acetabulum
            _side(k, [(0.30, 0.42), (0.36, 0.36), (0.58, 0.34), (0.62, 0.9),
                (0.50, 0.97), (0.435 + lean, 0.90), (0.37 + lean, 0.66),]),
            NAMES["marrow"], NAMES["cortex"], 0.011,
        )  # fmt: skip
        if level > 0.45:  # femoral head in its socket
            head = oval(0.5 + k * u(0.50, 0.54), u(0.30, 0.36), 0.105, 0.115)
            sketch.blob(head, NAMES["vein"])
            sketch.blob(
                [(0.5 + k * 0.012 + 0.98 * (x - 0.5), y) for x, y in head],
                NAMES["marrow"],
                NAMES["cortex"],
                0.010,
            )
        muscle = [  # obturator internus, from the pubis to the lesser sciatic notch
            (0.205, 0.375), (0.245, 0.36), (0.295, 0.44), (0.335 + lean, 0.60), (0.375 + lean, 0.76),
            (0.43 + lean, 0.90), (0.445 + lean, 0.945), (0.385 + lean, 0.925),
            (0.30 + lean, 0.80), (0.262 + lean - wide / 3, 0.62), (0.215 - wide / 4, 0.46),
        ]  # fmt: skip
        sketch.line(
            _side(k, [(0.26, 0.38), (0.315, 0.46), (0.36 + lean, 0.64), (0.42 + lean, 0.85)]),
            NAMES["fat"],
            u(0.004, 0.014),
        )
        sketch.blob(_side(k, muscle), NAMES["muscle"], NAMES["fascia"], 0.003)
        for _ in range(int(rng.integers(2, 5))):  # fat between its bundles
            x, y = u(0.25, 0.31), u(0.45, 0.6)
            sketch.line(
                _side(k, [(x, y), (x + 0.03, y + 0.10), (x + 0.065, y + 0.2)]),
                NAMES["fascia"],
                0.003,
            )
        for i in range(int(rng.integers(4, 8))):  # internal pudendal and obturator vessels
            x, y = (u(0.24, 0.30), u(0.33, 0.41)) if i < 3 else (u(0.34, 0.40), u(0.86, 0.95))
            r = u(0.005, 0.013)
            sketch.blob(
                oval(0.5 + k * x, y, r * u(1, 2), r, u(0, 3)),
                NAMES["vein" if u() < 0.6 else "void"],
            )
        edge = u(0.93, 0.985)
        gluteus = [
            (0.12, 1.06),
            (0.2, edge + 0.02),
            (0.36, edge),
            (0.5, edge - 0.05),
            (0.65, edge),
            (0.6, 1.1),
        ]
        sketch.blob(_side(k, gluteus), NAMES["muscle"], NAMES["fascia"], 0.003)
        for x in np.arange(0.2, 0.5, 0.035):
            sketch.line(
                _side(k, [(x, edge + 0.012), (x + 0.03, 1.02)]), NAMES["fat"], u(0.001, 0.005)
            )
    if level > 0.6 or u() < 0.3:
        tip = oval(0.5, u(0.96, 1.0), u(0.03, 0.05), 0.02)
        sketch.blob(tip, NAMES["marrow"], NAMES["cortex"], 0.008)
    for _ in range(int(rng.integers(3, 9))):  # anococcygeal ligament
        x = 0.5 + u(-0.03, 0.03)
        sketch.line(
            [(x, u(0.80, 0.88)), (x + u(-0.01, 0.01), 0.94), (x + u(-0.02, 0.02), 1.02)],
            NAMES["fascia"],
            u(0.002, 0.006),
        )


def draw_front(rng: np.random.Generator, sketch: Sketch, level: float, top: float) -> None:
    """Draw what lies in front: abdominal wall, adductors, vessels, pubis or bladder."""
    u = rng.uniform
    wall = u(0.06, 0.11)
    for _ in range(int(rng.integers(8, 20))):
        x, y = u(0, 1), u(0.0, 0.16)
        sketch.line(
            [(x, y), (x + u(0.03, 0.1), y + u(-0.02, 0.02)), (x + u(0.1, 0.2), y + u(-0.03, 0.03))],
            NAMES["fascia"],
            u(0.0015, 0.004),
        )
    for k in (-1, 1):
        sketch.blob(
            _side(
                k,
                [
                    (-0.01, wall - 0.02),
                    (0.09, wall - 0.026),
                    (0.18, wall + 0.012),
                    (0.10, wall + 0.028),
                    (-0.01, wall + 0.03),
                ],
            ),
            NAMES["muscle"],
        )
        drop = u(-0.01, 0.02)
        ramus = [
            (0.13, 0.235),
            (0.22, 0.215),
            (0.36, 0.27),
            (0.55, 0.29),
            (0.55, 0.40),
            (0.36, 0.41),
            (0.27, 0.375),
            (0.20, 0.36),
        ]
        if level < 0.5:
            ramus = [
                (0.011, 0.19),
                (0.08, 0.175),
                (0.18, 0.195),
                (0.33, 0.27),
                (0.40, 0.33),
                (0.33, 0.37),
                (0.22, 0.385),
                (0.10, 0.375),
                (0.025, 0.345),
            ]
        sketch.blob(
            _side(k, [(x, y + drop) for x, y in ramus]), NAMES["marrow"], NAMES["cortex"], 0.008
        )
        pectineus = [
            (0.15, 0.19),
            (0.23, 0.165),
            (0.34, 0.19),
            (0.42, 0.26),
            (0.40, 0.30),
            (0.30, 0.275),
            (0.2, 0.23),
        ]
        sketch.blob(
            _side(k, [(x, y + drop) for x, y in pectineus]), NAMES["muscle"], NAMES["fascia"], 0.003
        )
        if level < 0.35:  # obturator externus between the rami
            externus = [
                (0.27, 0.30),
                (0.40, 0.33),
                (0.52, 0.40),
                (0.5, 0.46),
                (0.36, 0.42),
                (0.28, 0.37),
            ]
            sketch.blob(_side(k, externus), NAMES["muscle"], NAMES["fat"], 0.006)
        sketch.blob(
            _side(k, [(0.44, 0.20), (0.55, 0.17), (0.6, 0.3), (0.5, 0.31)]), NAMES["muscle"]
        )
        x, y = u(0.42, 0.47), u(0.10, 0.16)
        for dx, dy, r, name in (
            (0, 0, u(0.024, 0.03), "vein"),
            (0.045, -0.012, u(0.018, 0.024), "void"),
        ):
            sketch.blob(
                oval(0.5 + k * (x + dx), y + dy, r, r * u(0.8, 1.1)),
                NAMES[name if u() < 0.7 else "void"],
                NAMES["fascia"],
                0.006,
            )
        cord = oval(0.5 + k * u(0.22, 0.30), u(0.06, 0.13), u(0.015, 0.025), u(0.012, 0.02))
        sketch.blob(cord, NAMES["mucosa"], NAMES["fascia"], 0.004)
    if level < 0.5:  # the symphysis, retropubic fat and veins
        sketch.line([(0.5, 0.175), (0.502, 0.26), (0.5, 0.355)], NAMES["cortex"], u(0.010, 0.020))
    elif level < 0.72:  # the bladder's neck or the detrusor apron in front of the gland
        sketch.blob(
            oval(0.5, 0.5 * (0.2 + top), u(0.09, 0.13), 0.42 * (top - 0.2), 0, 2.4),
            NAMES["wall"],
            NAMES["fascia"],
            0.004,
        )
    else:
        height, wide, thick = (
            u(0.03, 0.055) + 0.04 * level,
            u(0.06, 0.11) + 0.04 * level,
            u(0.012, 0.030),
        )
        by = top - height - thick + u(-0.01, 0.012)
        sketch.blob(
            oval(0.5, by, wide + thick, height + thick, 0, 2.4),
            NAMES["wall"],
            NAMES["fascia"],
            0.004,
        )
        sketch.blob(oval(0.5, by, wide, height, 0, u(2.3, 3.2)), NAMES["urine"])
    for _ in range(int(rng.integers(6, 14))):  # dorsal venous complex
        x, y = u(-0.10, 0.10), u(0.005, 0.035)
        sketch.blob(
            oval(0.5 + x, top - y + 1.6 * x * x, u(0.008, 0.022), u(0.004, 0.009), 2 * x),
            NAMES["vein"],
        )
    sketch.line(
        [(0.40, top + 0.008), (0.5, top - 0.01), (0.60, top + 0.008)], NAMES["fascia"], 0.006
    )


def draw_rectum(
    rng: np.random.Generator, sketch: Sketch, cx: float, cy: float, a: float, b: float
) -> Points:
    """Draw levator ani and rectum; return the outline of what is in the rectum."""
    u = rng.uniform
    ra, rb = a * u(0.75, 1.0), u(0.058, 0.095)
    rx, ry = cx + u(-0.015, 0.015), cy + b + rb + u(0.012, 0.022)
    out, low = a + u(0.018, 0.034), ry + rb + u(0.004, 0.025)
    sling = [
        (0.5 - out * 0.84, cy - 0.9 * b),
        (0.5 - out, cy + 0.1 * b),
        (0.5 - out * 0.92, ry - 0.25 * rb),
        (0.5 - out * 0.66, low - 0.03),
        (0.5, low),
    ]
    sling = [*sling, *[(1 - x, y) for x, y in sling[-2::-1]]]
    sketch.blob(sling, NAMES["fat" if u() < 0.5 else "mucosa"])  # fat and veins around both
    for k in (-1, 1):  # bundles of vessels and nerves at five and seven o'clock, and lateral veins
        for _ in range(int(rng.integers(6, 12))):
            angle = u(-0.5, 1.1)
            x, y = (a + u(0.008, 0.03)) * np.cos(angle), (b + u(0.005, 0.025)) * np.sin(angle)
            r = u(0.003, 0.008)
            name = ("vein", "fascia", "void")[int(rng.integers(3))]
            sketch.blob(oval(cx + k * x, cy + y, r, r * u(0.7, 2)), NAMES[name])
    sketch.line(sling, NAMES["muscle"], u(0.016, 0.028))
    sketch.line(sling[3:6], NAMES["muscle"], u(0.025, 0.045))
    sketch.line(
        [(cx - 0.9 * a, cy + 0.75 * b), (cx, cy + b + 0.008), (cx + 0.9 * a, cy + 0.75 * b)],
        NAMES["fascia"],
        0.005,
    )
    flat = u(2.0, 2.6)
    turn = u(-0.12, 0.12)
    sketch.blob(oval(rx, ry, ra, rb, turn, flat), NAMES["rectum"], NAMES["fascia"], 0.003)
    wall = u(0.013, 0.026)
    inner = oval(rx, ry + u(-0.006, 0.006), ra - wall, rb - wall, turn, flat)
    sketch.blob(inner, NAMES["mucosa"])
    full = oval(rx, ry, ra - wall - 0.006, (rb - wall - 0.006) * u(0.35, 1.0), turn, flat)
    content = u()
    sketch.blob(full, NAMES["gas" if content < 0.6 else "stool"])
    if content < 0.25:  # stool in the gas, or the level of a fluid
        sketch.blob(oval(rx + u(-0.03, 0.03), ry + 0.4 * rb, 0.5 * ra, 0.3 * rb), NAMES["stool"])
    for _ in range(int(rng.integers(0, 4))):
        r = u(0.004, 0.012)
        sketch.blob(
            oval(rx + u(-0.6, 0.6) * ra, ry + u(-0.4, 0.4) * rb, r, r),
            NAMES["gas" if u() < 0.6 else "mucosa"],
        )
    return full if content < 0.6 else []
