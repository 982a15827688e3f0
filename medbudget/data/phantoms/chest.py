"""Draw chest radiographs as projections: thicknesses of tissue, air and bone along the beam.

Coordinates are in units of the image's edge. The patient's right is on the image's left (side -1).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms.drawing import (
    FINE,
    Array,
    Line,
    Mask,
    Rng,
    blend,
    clouds,
    draw_letter,
    draw_lines,
    ellipse,
    field,
    grain,
    inside,
    lens,
    shrink,
    tilted_axes,
    tube,
)

PLATE = 512  # pixels of the detector along an edge
SIDES = (-1, 1)


class Thorax(NamedTuple):
    """One patient's chest: images ``(4 size, 4 size)``, with distances that are negative inside."""

    x: Array  # 0 to 1 across the patient: the midline is at .5
    y: Array  # 0 to 1 from head to foot
    half: float  # half of the largest inner width
    top: float  # of the lungs
    base: float  # of the lungs, at the costophrenic angles
    inner: float  # half of the upper mediastinum's width
    depth: float  # of the body along the beam
    wall: Array  # the inner chest wall's distance from the midline
    body: Array  # distance to the skin
    soft: Array  # thickness of the body as if it held no air and no bone
    cavities: list[Array]  # distance to each half of the rib cage, past the diaphragm
    lungs: list[Array]  # distance to each lung
    dome: Array  # height below each side's dome of the diaphragm: negative above it


def draw_chest(rng: Rng, size: int, labels: tuple[str, ...]) -> tuple[Array, Mask]:
    """Draw one radiograph ``(3, size, size)`` from 0 to 1, and its disease ``(4 size, 4 size)``.

    The mask is the enlarged heart, the consolidated lung, the effusion, or all of them.
    """
    u = rng.uniform
    size = FINE * size
    chest = _choose_thorax(rng, size)
    x, y, depth = chest.x, chest.y, chest.depth
    away, side = np.abs(x - 0.5), np.where(x < 0.5, -1, 1)
    lung, cavity = np.minimum(*chest.lungs), np.minimum(*chest.cavities)

    # lungs: air takes tissue away; vessels and hila add some
    recess = np.maximum(cavity, y - chest.base - 0.03)  # lung in front of and behind the domes
    air = lens(lung, 0.085) * (0.86 + 0.10 * (0.6 - y)) + 0.16 * lens(recess, 0.06)
    image = chest.soft - u(0.64, 0.78) * np.minimum(air, 1.0) * depth
    image = image + u(0.18, 0.26) * _draw_vessels(rng, size) * inside(lung, 0.02)
    hilum = np.exp(-(((away - 0.105) / 0.045) ** 2) - ((y - 0.43 - 0.02 * side) / 0.075) ** 2)
    image = image + u(0.10, 0.20) * hilum * (1 + 0.25 * clouds(rng, size, 12))

    image, heart = _add_mediastinum(rng, image, chest, "cardiomegaly" in labels)
    below = 0.98 * depth * 0.9 * lens(chest.body, 0.16)  # liver and spleen
    cover = inside(-chest.dome, 0.012) * inside(away - chest.wall, 0.05)
    image = blend(image, np.maximum(image, below), cover)
    if u() < 0.75:  # gas in the stomach
        cx, cy = u(0.60, 0.70), chest.base + u(0.02, 0.07)
        bubble = ellipse(x, y, cx, cy, u(0.05, 0.09), u(0.025, 0.05), u(-0.3, 0.3))
        bubble = np.maximum(bubble, 0.012 - chest.dome)
        image = image - u(0.14, 0.26) * depth * lens(bubble, 0.03)
    bones = _draw_bones(rng, chest)
    image = image + u(1.15, 1.6) * bones * (1 - 0.55 * inside(-chest.dome, 0.03))

    mask = np.zeros((size, size), np.bool_)
    if "cardiomegaly" in labels:
        mask |= (heart < 0) & (chest.dome < 0.02)
    if "pneumonia" in labels:
        image, consolidation = _add_pneumonia(rng, image, chest, heart)
        mask |= consolidation
    if "pleural_effusion" in labels:
        image, fluid = _add_effusion(rng, image, chest, bones)
        mask |= fluid
    image = _acquire(rng, image, chest.body)
    return np.broadcast_to(image, (3, *image.shape)), mask


def _choose_thorax(rng: Rng, size: int) -> Thorax:
    """Choose one patient's chest, drawn with `size` pixels an edge."""
    u = rng.uniform
    x, y = tilted_axes(size, u(-0.06, 0.06), (u(-0.03, 0.03), u(-0.03, 0.02)), u(0.98, 1.18))
    x = x + 0.004 * field(rng, size, 4)
    y = y + 0.004 * field(rng, size, 4)
    away = np.abs(x - 0.5)
    half, top, base = u(0.325, 0.385), u(0.11, 0.18), u(0.78, 0.88)
    down = np.clip((y - top) / (base - top) * 1.25, 0, 1)
    wall = half * (0.30 + 0.70 * np.sqrt(1 - (1 - down) ** 2))

    # body: a soft cylinder with neck, shoulders and arms
    neck, slope, drop = u(0.085, 0.125), u(0.30, 0.55), u(0.02, 0.06)
    beyond = np.maximum(away - neck, 0)
    height = top - 0.10 + drop * np.clip(beyond / 0.02, 0, 1) + slope * beyond**1.2
    shoulder = y - height * (away > neck)
    flank = away - (half + u(0.06, 0.11)) - u(0.8, 1.6) * np.maximum(u(0.35, 0.5) - y, 0) ** 1.1
    body = np.maximum(-shoulder, flank)
    depth = u(0.95, 1.10)
    soft = depth * lens(body, 0.22) * (0.92 + 0.12 * y) * (1 + 0.03 * clouds(rng, size, 4))

    inner, bow = u(0.05, 0.065), u(0.15, 0.26)
    cavities, domes = [], []
    for side in SIDES:
        out = side * (x - 0.5)
        medial = inner + 0.02 * np.sin(3 * y) - 0.045 * np.clip((0.30 - y) / 0.2, 0, 1) - out
        apex = top - y + 0.35 * (out - 0.10) ** 2 * 9
        cavities.append(np.maximum.reduce([out - wall + 0.012, medial, apex]))
        dome_top = base - u(0.075, 0.10) - (0.03 if side < 0 else 0)  # the right one is higher
        middle = 0.5 * (inner + half)
        bent = np.abs((out - middle + 0.02) / (half - inner)) ** 2.2
        domes.append(y - dome_top - bow * bent)
    lungs = [np.maximum(cavity, dome) for cavity, dome in zip(cavities, domes)]
    dome = np.where(x < 0.5, domes[0], domes[1])
    return Thorax(x, y, half, top, base, inner, depth, wall, body, soft, cavities, lungs, dome)


def _draw_vessels(rng: Rng, size: int) -> Array:
    """Branch vessels from the hila into the lungs: tapering tubes, by their thickness."""
    u = rng.uniform
    lines: list[Line] = []

    def branch(x: float, y: float, angle: float, length: float, width: float) -> None:
        bend = rng.normal(0, 0.25)
        for _ in range(3):
            end_x, end_y = x + np.cos(angle) * length / 3, y + np.sin(angle) * length / 3
            lines.append((x, y, end_x, end_y, width, width / 0.016))
            x, y, angle = end_x, end_y, angle + bend / 3
        if width > 0.0032:
            for turn in (-1, 1):
                narrower = angle + turn * u(0.2, 0.6), length * u(0.65, 0.9), width * u(0.58, 0.74)
                branch(x, y, *narrower)

    for side in SIDES:
        for angle in (-1.15, -0.6, -0.1, 0.35, 0.75, 1.15):
            turn = angle + rng.normal(0, 0.12)
            direction = turn if side > 0 else np.pi - turn
            x, y = 0.5 + side * u(0.07, 0.10), 0.43 + 0.03 * angle
            branch(x, y, direction, u(0.075, 0.11), u(0.011, 0.016))
    return draw_lines(size, lines)


def _add_mediastinum(rng: Rng, image: Array, chest: Thorax, enlarged: bool) -> tuple[Array, Array]:
    """Add great vessels, heart and airways; return the image and the distance to the heart."""
    u = rng.uniform
    x, y, depth = chest.x, chest.y, chest.depth
    away = np.abs(x - 0.5)
    ratio = u(0.56, 0.68) if enlarged else u(0.40, 0.49)  # cardiothoracic
    width = 2 * ratio * chest.half
    floor = chest.base - u(0.03, 0.05)
    right, left = 0.33 * width, 0.67 * width  # of the midline
    a = left * u(0.80, 0.88)
    b, turn = u(0.145, 0.165), u(0.35, 0.50)
    left_ventricle = ellipse(x, y, 0.5 + left - 0.86 * a, floor - 0.135, a, b, turn)
    b = 0.125 + 0.2 * (ratio - 0.4)
    right_atrium = ellipse(x, y, 0.5 - right + 0.075, floor - 0.12, 0.075, b)
    middle = ellipse(x, y, 0.52, floor - 0.17, 0.10, 0.16)
    heart = np.minimum.reduce([left_ventricle, right_atrium, middle])
    pedicle = ellipse(x, y, 0.515, 0.43, 0.062, 0.16)  # of the great vessels
    aortic_knob = ellipse(x, y, 0.5 + u(0.038, 0.052), u(0.27, 0.31), 0.040, 0.045)
    vena_cava = np.maximum.reduce([np.abs(x - 0.468) - 0.026, 0.16 - y, y - 0.62])
    core = np.maximum(away - chest.inner + 0.012 + 0.03 * np.sin(3 * y), -y)
    image = image + 0.10 * lens(core, 0.05) * (y < chest.base + 0.1)
    over_lung = inside(np.minimum(*chest.lungs) - 0.03, 0.06)
    for shape, thickness, rim in (
        (pedicle, 0.22, 0.06),
        (vena_cava, 0.07, 0.03),
        (aortic_knob, 0.14, 0.03),
    ):
        image = image + thickness * lens(shape, rim) * over_lung
    tone = 0.84 * depth + 0.02 * clouds(rng, len(image), 5) + 0.08 * (y - 0.5)
    cover = inside(heart, 0.014) * (0.72 + 0.28 * lens(heart, 0.10))
    cover = cover * inside(np.minimum(*chest.cavities) - 0.03, 0.05)
    image = blend(image, np.maximum(image, tone), cover)
    carina = u(0.36, 0.40)
    trachea = tube(x - 0.5 - 0.008 + 0.01 * y, 0.021) * inside(y - carina, 0.02)
    bronchi = tube(y - carina - 0.75 * away, 0.016) * inside(away - 0.085, 0.02) * (y > carina)
    return image - 0.17 * trachea - 0.10 * bronchi, heart


def _draw_bones(rng: Rng, chest: Thorax) -> Array:
    """Return the thickness of ribs, clavicles, scapulae, humeral heads and spine."""
    u = rng.uniform
    x, y = chest.x, chest.y
    bones = np.zeros_like(chest.body)
    gap, first, slope = u(0.064, 0.074), chest.top + u(0.0, 0.02), u(0.12, 0.20)
    strength, tilt = u(0.12, 0.17), u(0.15, 0.5)
    for side in SIDES:
        out = side * (x - 0.5)
        starts = first + gap * np.arange(10) + rng.normal(0, 0.002, 10)
        _add_ribs(bones, chest, out, starts.tolist(), slope, strength)
        sternal = chest.top + u(0.05, 0.085)  # height of the clavicle's inner end
        clavicle = sternal - tilt * (out - 0.03) + 0.4 * np.maximum(out - 0.17, 0) ** 1.2
        clavicle = clavicle - 0.012 * np.sin(out * 16 + side)
        radius = 0.0135 + 0.01 * np.exp(-(((out - 0.03) / 0.03) ** 2))
        length = (out > 0.022) & (out < chest.half * 0.98)
        bones += 0.24 * tube((y - clavicle) / 1.03, radius, 0.35) * length
        edge = out - (chest.half * 0.70 + 0.25 * (y - 0.12)) - 0.02 * np.sin(9 * y)
        scapula = [-edge, edge - 0.20 - 0.1 * (y - 0.2), sternal + 0.02 - y, y - 0.44]
        border = 0.10 * tube(edge, 0.011) * (y > sternal + 0.03) * (y < 0.43)
        bones += 0.06 * inside(np.maximum.reduce(scapula), 0.012) + border
        shoulder = 0.5 + side * (chest.half + u(0.08, 0.11))
        humerus = ellipse(x, y, shoulder, sternal + 0.05, 0.055, 0.06)
        bones += 0.14 * lens(humerus, 0.05) * inside(chest.body, 0.02)
    away = np.abs(x - 0.5 + 0.006 * np.sin(5 * y))
    disc = np.cos(2 * np.pi * y / (0.050 + 0.016 * y))  # 1 in a vertebra, -1 in a disc
    spine = inside(away - 0.036 - 0.008 * y, 0.010)
    bones += spine * (0.08 + 0.02 * np.clip(disc * 2, -1, 1)) * inside(-y - 0.05, 0.1)
    bones += 0.03 * tube(away - 0.024, 0.009) * np.clip(disc + 0.4, 0, 1) * spine  # pedicles
    bones += 0.035 * np.exp(-((away / 0.009) ** 2)) * np.clip(0.5 - disc, 0, 1)  # spinous processes
    return bones * inside(chest.body, 0.02) * (1 + 0.06 * clouds(rng, len(bones), 24, 3))


def _add_ribs(
    bones: Array, chest: Thorax, out: Array, starts: list[float], slope: float, strength: float
) -> None:
    """Add one side's ribs to `bones`, in place.

    They leave the spine at heights `starts`; `out` is the distance from the midline on that side.
    """
    columns = np.flatnonzero((out > 0.012).any(0))
    half = slice(columns[0], columns[-1] + 1)
    bones, out, y, wall = bones[:, half], out[:, half], chest.y[:, half], chest.wall[:, half]
    lowest, highest = chest.y.min(1), chest.y.max(1)  # of each row

    def rows(start: float, end: float) -> slice:
        """Return the rows that hold heights from `start` to `end`: drawing only these is quick."""
        near = np.flatnonzero((highest > start) & (lowest < end))
        return slice(near[0], near[-1] + 1) if len(near) else slice(0)

    lateral = np.clip(out / wall, 0, 1)
    rim = np.minimum(1 / np.sqrt(np.maximum(1 - lateral**2, 0.2)), 2.0)  # seen edge-on at the side
    within = inside(out - wall - 0.004, 0.006) * (out > 0.012)
    lift = 0.03 * np.sin(np.pi * np.clip(lateral * 1.2, 0, 1))
    fall, rise = slope * lateral**2.4, (1 - lateral) ** 1.1
    stretch = np.sqrt(1 + (0.9 * lateral) ** 2)
    for i, start in enumerate(starts):
        share = 0.6 + 0.06 * i
        radius = 0.0115 + 0.0007 * min(i, 6)
        r = rows(start - 0.03 - 1.4 * radius, start + slope * share + 1.4 * radius)
        arch = (y[r] - (start - lift[r] + fall[r] * share)) / stretch[r]
        bones[r] += strength * tube(arch, radius, 0.32) * rim[r] * within[r]
        if 0 < i < 6:  # anterior part: runs back to the middle, downwards, fainter
            end, far = start + slope * share + 0.02, 0.10 + 0.012 * i
            r = rows(end - 1.4 * radius, end + 1.2 * far + 1.4 * radius)
            fade = inside(0.10 + 0.035 * i / 2 - out[r], 0.03) * within[r]
            arch = (y[r] - (end + far * rise[r] * 1.15)) / 1.15
            bones[r] += 0.62 * strength * tube(arch, radius * 1.12, 0.30) * rim[r] * fade


def _add_pneumonia(rng: Rng, image: Array, chest: Thorax, heart: Array) -> tuple[Array, Mask]:
    """Add patchy consolidation with ragged borders, in one lung or, less often, in both."""
    u = rng.uniform
    ragged = clouds(rng, len(image), 9, 5)
    cover = np.zeros_like(image)
    first = int(u() < 0.5)
    for k in (first, 1 - first)[: 2 if u() < 0.3 else 1]:
        for _ in range(rng.integers(1, 4)):
            cx, cy = 0.5 + SIDES[k] * u(0.40, 0.80) * chest.half, u(0.34, chest.base - 0.14)
            a, b, turn = u(0.06, 0.13), u(0.07, 0.16), u(-0.7, 0.7)
            patch = ellipse(chest.x, chest.y, cx, cy, a, b, turn)
            ramp = np.clip(0.55 - patch / 0.11 + 0.33 * ragged, 0, 1)
            cover = np.maximum(cover, ramp * inside(chest.lungs[k], 0.02))
    cover = cover * inside(-heart, 0.02)
    tone = 0.80 * chest.depth * (1 + 0.06 * ragged) + 0.35 * (image - image.mean())
    return blend(image, np.maximum(image, tone), u(0.45, 0.85) * cover), cover > 0.5


def _add_effusion(rng: Rng, image: Array, chest: Thorax, bones: Array) -> tuple[Array, Mask]:
    """Add fluid that fills the costophrenic angle and climbs along the chest wall as a meniscus."""
    u = rng.uniform
    x, y, inner = chest.x, chest.y, chest.inner
    mask = np.zeros(image.shape, np.bool_)
    draw = u()
    sides = (0, 1) if draw < 0.2 else (0,) if draw < 0.6 else (1,)  # both, right, left
    for k in sides:
        out = np.clip((SIDES[k] * (x - 0.5) - inner) / (chest.half - inner), 0, 1)
        level = chest.base - u(0.06, 0.28) - u(0.10, 0.20) * (out**3 - 0.15)
        surface = level + 0.004 * field(rng, len(image), 7) - y
        tone = 0.90 * chest.depth * (0.96 + 0.06 * y) + 0.9 * bones
        cover = inside(np.maximum(surface, chest.cavities[k] - 0.006), 0.03) * u(0.86, 0.97)
        image = blend(image, np.maximum(image, tone), cover)
        mask |= (surface < 0) & (chest.lungs[k] < 0)
    return image, mask


def _acquire(rng: Rng, image: Array, body: Array) -> Array:
    """Turn thicknesses ``(4 s, 4 s)`` into gray levels ``(s, s)``.

    Adds scatter, blur, quantum noise, a window and a lead letter.
    """
    u = rng.uniform
    size = len(image) // FINE
    scatter = gaussian_filter(shrink(image), 0.06 * size)  # too wide for fine pixels
    image = 0.90 * image + 0.10 * scatter.repeat(FINE, 0).repeat(FINE, 1)
    low, high = np.percentile(image[body < 0], [1.5, 99.7])
    image = np.clip((image - low) / (high - low), -0.25, 1.2)
    image = u(0.14, 0.24) + u(0.62, 0.74) * image
    air = np.minimum(image - 0.1, 0) + 0.20 * u() ** 1.5
    image = blend(air, image, inside(body, 0.004))
    if u() < 0.7:
        letter, x = ("R", u(0.02, 0.12)) if u() < 0.8 else ("L", u(0.86, 0.94))
        lead = draw_letter(FINE * size, letter, x, u(0.01, 0.08), u(0.05, 0.07))
        image = blend(image, 0.93, 0.95 * lead)
    image = gaussian_filter(shrink(image), 0.0018 * size)
    noise = grain(rng, size, PLATE, 1.4)
    return np.clip(image + u(0.003, 0.007) * noise * inside(shrink(body), 0.01), 0, 1)
