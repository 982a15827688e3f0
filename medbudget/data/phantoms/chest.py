"""Draw chest radiographs as projections: thicknesses of tissue, air and bone along the beam."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms.drawing import (
    FINE,
    Array,
    Mask,
    blend,
    clouds,
    draw_letter,
    draw_lines,
    ellipse,
    field,
    grain,
    inside,
    lens,
    place,
    shrink,
    tube,
)

PLATE = 512  # pixels of the detector


def draw_chest(rng: np.random.Generator, size: int, labels: tuple[str, ...]) -> tuple[Array, Mask]:
    """Draw one radiograph ``(size, size)`` from 0 to 1, and the mask of its disease."""
    u = rng.uniform
    size = FINE * size
    x, y = place(size, u(-0.06, 0.06), (u(-0.03, 0.03), u(-0.03, 0.02)), u(0.98, 1.18))
    x = x + 0.004 * field(rng, size, 4)
    y = y + 0.004 * field(rng, size, 4)
    away, side = np.abs(x - 0.5), np.where(x < 0.5, -1, 1)
    half, top, base = u(0.325, 0.385), u(0.11, 0.18), u(0.78, 0.88)
    grow = np.clip((y - top) / (base - top), 0, 1.15)
    wall = half * (0.30 + 0.70 * np.sqrt(np.clip(1 - (1 - np.clip(grow * 1.25, 0, 1)) ** 2, 0, 1)))

    # body: a soft cylinder with neck, shoulders and arms
    neck = u(0.085, 0.125)
    slope, drop = u(0.30, 0.55), u(0.02, 0.06)
    beyond = np.maximum(away - neck, 0)
    shoulder = y - (top - 0.10 + drop * np.clip(beyond / 0.02, 0, 1) + slope * beyond**1.2) * (
        away > neck
    )
    flank = away - (half + u(0.06, 0.11)) - u(0.8, 1.6) * np.maximum(u(0.35, 0.5) - y, 0) ** 1.1
    body = np.maximum(-shoulder, flank)
    depth = u(0.95, 1.10)
    soft = depth * lens(body, 0.22) * (0.92 + 0.12 * y)
    fat = 0.03 * clouds(rng, size, 4)
    soft = soft * (1 + fat)

    # lungs: air takes tissue away
    lungs, domes = [], []
    inner, bow = u(0.05, 0.065), u(0.15, 0.26)
    for k in (-1, 1):  # image left is the patient's right: the dome there is higher
        out = k * (x - 0.5)
        dome_top = base - u(0.075, 0.10) - (0.03 if k < 0 else 0)
        middle = 0.5 * (inner + half)
        dome = y - dome_top - bow * np.abs((out - middle + 0.02) / (half - inner)) ** 2.2
        medial = inner + 0.02 * np.sin(3 * y) - 0.045 * np.clip((0.30 - y) / 0.2, 0, 1) - out
        lungs.append(
            np.maximum.reduce([out - wall + 0.012, medial, top - y + 0.35 * (out - 0.10) ** 2 * 9])
        )
        domes.append(dome)
    lung = np.minimum(np.maximum(lungs[0], domes[0]), np.maximum(lungs[1], domes[1]))
    thorax = np.minimum(lungs[0], lungs[1])
    air = lens(lung, 0.085) * (0.86 + 0.10 * (0.6 - y)) + 0.16 * lens(
        np.maximum(thorax, y - base - 0.03), 0.06
    )
    density = u(0.64, 0.78)
    image = soft - density * np.minimum(air, 1.0) * depth

    image = image + u(0.18, 0.26) * _draw_vessels(rng, size, x, y, lungs, inner, base) * inside(
        lung, 0.02
    )
    hilum = np.exp(-(((away - 0.105) / 0.045) ** 2) - ((y - 0.43 - 0.02 * side) / 0.075) ** 2)
    image = image + u(0.10, 0.20) * hilum * (1 + 0.25 * clouds(rng, size, 12))

    # mediastinum, heart, great vessels, trachea
    big = "cardiomegaly" in labels
    ratio = u(0.56, 0.68) if big else u(0.40, 0.49)  # heart's width to the thorax's
    width = 2 * ratio * half
    floor = base - u(0.03, 0.05)
    right, leftward = 0.33 * width, 0.67 * width
    long = leftward * u(0.80, 0.88)
    ventricle = ellipse(
        x, y, 0.5 + leftward - 0.86 * long, floor - 0.135, long, u(0.145, 0.165), u(0.35, 0.50)
    )
    atrium = ellipse(x, y, 0.5 - right + 0.075, floor - 0.12, 0.075, 0.125 + 0.2 * (ratio - 0.4))
    waist = ellipse(x, y, 0.515, 0.43, 0.062, 0.16)
    heart = np.minimum(np.minimum(ventricle, atrium), ellipse(x, y, 0.52, floor - 0.17, 0.10, 0.16))
    knob = ellipse(x, y, 0.5 + u(0.038, 0.052), u(0.27, 0.31), 0.040, 0.045)
    cava = np.maximum(np.abs(x - 0.468) - 0.026, np.maximum(0.16 - y, y - 0.62))
    core = np.maximum(away - inner + 0.012 + 0.03 * np.sin(3 * y), -y)
    image = image + 0.10 * lens(core, 0.05) * (y < base + 0.1)
    for shape, weight, rim in ((waist, 0.22, 0.06), (cava, 0.07, 0.03), (knob, 0.14, 0.03)):
        image = image + weight * lens(shape, rim) * inside(lung - 0.03, 0.06)
    room = inside(thorax - 0.03, 0.05)
    level = np.maximum(image, 0.84 * depth + 0.02 * clouds(rng, size, 5) + 0.08 * (y - 0.5))
    image = blend(image, level, inside(heart, 0.014) * (0.72 + 0.28 * lens(heart, 0.10)) * room)
    carina = u(0.36, 0.40)
    pipe = tube(np.abs(x - 0.5 - 0.008 + 0.01 * y), 0.021) * inside(y - carina, 0.02)
    fork = (
        tube(np.abs(y - carina - 0.75 * away + 0.0), 0.016)
        * inside(away - 0.085, 0.02)
        * (y > carina)
    )
    image = image - 0.17 * pipe - 0.10 * fork

    # below the diaphragm: liver, stomach, gas
    belly = np.minimum(np.where(x < 0.5, domes[0], domes[1]) * -1, 0.2)
    image = blend(
        image,
        np.maximum(image, 0.98 * depth * 0.9 * lens(body, 0.16)),
        inside(belly, 0.012) * inside(away - wall, 0.05),
    )
    if u() < 0.75:
        gas = ellipse(
            x, y, u(0.60, 0.70), base + u(0.02, 0.07), u(0.05, 0.09), u(0.025, 0.05), u(-0.3, 0.3)
        )
        image = image - u(0.14, 0.26) * depth * lens(np.maximum(gas, -domes[1] + 0.012), 0.03)

    bones = _draw_bones(rng, size, x, y, half, wall, top, base, body)
    under = inside(belly, 0.03)
    image = image + u(1.15, 1.6) * bones * (1 - 0.55 * under)
    mask = np.zeros((size, size), np.bool_)
    if big:
        mask |= (heart < 0) & (np.where(x < 0.5, domes[0], domes[1]) < 0.02)
    if "pneumonia" in labels:
        image, patch = _add_pneumonia(rng, image, x, y, lungs, domes, heart, depth, half, base)
        mask |= patch
    if "pleural_effusion" in labels:
        image, fluid = _add_effusion(
            rng, image, x, y, lungs, domes, depth, half, base, inner, bones
        )
        mask |= fluid
    image = np.broadcast_to(_acquire(rng, image, body, size), (3, size // FINE, size // FINE))
    return image, mask


def _draw_vessels(rng, size, x, y, lungs, inner, base) -> Array:
    """Branch vessels from the hila into the lungs: tapering tubes."""
    lines = []

    def branch(px: float, py: float, angle: float, length: float, width: float) -> None:
        bend = rng.normal(0, 0.25)
        for _ in range(3):
            qx, qy = px + np.cos(angle) * length / 3, py + np.sin(angle) * length / 3
            lines.append((px, py, qx, qy, width, width / 0.016))
            px, py, angle = qx, qy, angle + bend / 3
        if width > 0.0032:
            for sign in (-1, 1):
                branch(
                    px,
                    py,
                    angle + sign * rng.uniform(0.2, 0.6),
                    length * rng.uniform(0.65, 0.9),
                    width * rng.uniform(0.58, 0.74),
                )

    for k in (-1, 1):
        for angle in (-1.15, -0.6, -0.1, 0.35, 0.75, 1.15):
            turn = angle + rng.normal(0, 0.12)
            direction = turn if k > 0 else np.pi - turn
            branch(
                0.5 + k * rng.uniform(0.07, 0.10),
                0.43 + 0.03 * angle,
                direction,
                rng.uniform(0.075, 0.11),
                rng.uniform(0.011, 0.016),
            )
    return draw_lines(size, lines)


def _window(rows: Mask, columns: npt.NDArray[np.intp]) -> tuple[slice, slice]:
    """Return the smallest window around rows that are marked and columns that are listed."""
    (marked,) = np.nonzero(rows)
    return slice(marked[0], marked[-1] + 1), slice(columns[0], columns[-1] + 1)


def _draw_bones(rng, size, x, y, half, wall, top, base, body) -> Array:
    """Return the thickness of ribs, spine, clavicles, scapulae and humeri."""
    u = rng.uniform
    bones = np.zeros((size, size), np.float32)
    gap, first, slope = u(0.064, 0.074), top + u(0.0, 0.02), u(0.12, 0.20)
    strength, tilt = u(0.12, 0.17), u(0.15, 0.5)
    lowest, highest = y.min(1), y.max(1)  # of each row: what is drawn where a rib can be is quick
    for k in (-1, 1):
        out = k * (x - 0.5)
        lateral = np.clip(out / wall, 0, 1)
        rim = np.minimum(1 / np.sqrt(np.maximum(1 - lateral**2, 0.2)), 2.0)
        within = inside(out - wall - 0.004, 0.006) * (out > 0.012)
        lift = 0.03 * np.sin(np.pi * np.clip(lateral * 1.2, 0, 1))
        fall, tip = slope * lateral**2.4, (1 - lateral) ** 1.1
        stretch = np.sqrt(1 + (0.9 * lateral) ** 2)
        columns = np.flatnonzero((out > 0.012).any(0))
        for i in range(10):
            start = first + i * gap + rng.normal(0, 0.002)
            thick = 0.0115 + 0.0007 * min(i, 6)
            share = 0.6 + 0.06 * i
            near = (highest > start - 0.03 - 1.4 * thick) & (
                lowest < start + slope * share + 1.4 * thick
            )
            if near.any():
                part = _window(near, columns)
                back = start - lift[part] + fall[part] * share
                bones[part] += (
                    strength * tube((y[part] - back) / stretch[part], thick, 0.32)
                    * rim[part] * within[part]
                )  # fmt: skip
            if 0 < i < 6:  # anterior part: runs back to the middle, downwards, fainter
                end = start + slope * share + 0.02
                far = 0.10 + 0.012 * i
                near = (highest > end - 1.4 * thick) & (lowest < end + 1.2 * far + 1.4 * thick)
                if near.any():
                    part = _window(near, columns)
                    front = end + far * tip[part] * 1.15
                    fade = inside(0.10 + 0.035 * i / 2 - out[part], 0.03) * within[part]
                    bones[part] += (
                        0.62 * strength * tube((y[part] - front) / 1.15, thick * 1.12, 0.30)
                        * rim[part] * fade
                    )  # fmt: skip
        # clavicle, scapula, humerus
        knot = top + u(0.05, 0.085)
        curve = (
            knot
            - tilt * (out - 0.03)
            + 0.4 * np.maximum(out - 0.17, 0) ** 1.2
            - 0.012 * np.sin(out * 16 + k)
        )
        length = (out > 0.022) & (out < half * 0.98)
        bones += (
            0.24
            * tube((y - curve) / 1.03, 0.0135 + 0.01 * np.exp(-(((out - 0.03) / 0.03) ** 2)), 0.35)
            * length
        )
        edge = out - (half * 0.70 + 0.25 * (y - 0.12)) - 0.02 * np.sin(9 * y)
        blade = np.maximum.reduce([-edge, edge - 0.20 - 0.1 * (y - 0.2), knot + 0.02 - y, y - 0.44])
        bones += 0.06 * inside(blade, 0.012) + 0.10 * tube(edge, 0.011) * (y > knot + 0.03) * (
            y < 0.43
        )
        head = ellipse(x, y, 0.5 + k * (half + u(0.08, 0.11)), knot + 0.05, 0.055, 0.06)
        bones += 0.14 * lens(head, 0.05) * inside(body, 0.02)
    away = np.abs(x - 0.5 + 0.006 * np.sin(5 * y))
    step = 0.050 + 0.016 * y
    disc = np.cos(2 * np.pi * y / step)
    spine = inside(away - 0.036 - 0.008 * y, 0.010)
    bones += spine * (0.08 + 0.02 * np.clip(disc * 2, -1, 1)) * inside(-y - 0.05, 0.1)
    bones += 0.03 * tube(away - 0.024, 0.009) * np.clip(disc + 0.4, 0, 1) * spine
    bones += 0.035 * np.exp(-((away / 0.009) ** 2)) * np.clip(0.5 - disc, 0, 1)
    return bones * inside(body, 0.02) * (1 + 0.06 * clouds(rng, size, 24, 3))


def _add_pneumonia(rng, image, x, y, lungs, domes, heart, depth, half, base) -> tuple[Array, Mask]:
    """Add patchy consolidation with ragged borders, in one lung or, less often, in both."""
    u = rng.uniform
    size = image.shape[0]
    ragged = clouds(rng, size, 9, 5)
    cover = np.zeros_like(image)
    first = int(u() < 0.5)
    for k in (first, 1 - first)[: 2 if u() < 0.3 else 1]:
        for _ in range(int(rng.integers(1, 4))):
            cx, cy = 0.5 + (-1, 1)[k] * u(0.40, 0.80) * half, u(0.34, base - 0.14)
            patch = ellipse(x, y, cx, cy, u(0.06, 0.13), u(0.07, 0.16), u(-0.7, 0.7))
            ramp = np.clip(0.55 - patch / 0.11 + 0.33 * ragged, 0, 1)
            cover = np.maximum(cover, ramp * inside(np.maximum(lungs[k], domes[k]), 0.02))
    cover = cover * inside(-heart, 0.02)
    tone = 0.80 * depth * (1 + 0.06 * ragged)
    return blend(
        image, np.maximum(image, tone + 0.35 * (image - image.mean())), u(0.45, 0.85) * cover
    ), cover > 0.5


def _add_effusion(
    rng, image, x, y, lungs, domes, depth, half, base, inner, bones
) -> tuple[Array, Mask]:
    """Add fluid that fills the angle between ribs and diaphragm and climbs along the chest wall."""
    u = rng.uniform
    mask = np.zeros(image.shape, np.bool_)
    draw = u()
    for k in (0, 1):
        if not (draw < 0.2 or (draw < 0.6) == (k == 0)):
            continue
        out = np.clip(((-1, 1)[k] * (x - 0.5) - inner) / (half - inner), 0, 1)
        level = (
            base
            - u(0.06, 0.28)
            - u(0.10, 0.20) * (out**3 - 0.15)
            + 0.004 * field(rng, image.shape[0], 7)
        )
        surface = level - y
        tone = 0.90 * depth * (0.96 + 0.06 * y) + 0.9 * bones
        cover = inside(np.maximum(surface, lungs[k] - 0.006), 0.03) * u(0.86, 0.97)
        image = blend(image, np.maximum(image, tone), cover)
        mask |= (surface < 0) & (np.maximum(lungs[k], domes[k]) < 0)
    return image, mask


def _acquire(rng, image, body, size) -> Array:
    """Turn thicknesses into gray levels: scatter, blur, quantum noise, window, lead letter."""
    u = rng.uniform
    scatter = gaussian_filter(shrink(image), 0.06 * size / FINE)  # too wide for fine pixels
    image = 0.90 * image + 0.10 * scatter.repeat(FINE, 0).repeat(FINE, 1)
    low, high = np.percentile(image[body < 0], [1.5, 99.7])
    image = np.clip((image - low) / (high - low), -0.25, 1.2)
    image = u(0.14, 0.24) + u(0.62, 0.74) * image
    air = np.minimum(image - 0.1, 0) + 0.20 * u() ** 1.5
    image = blend(air, image, inside(body, 0.004))
    if u() < 0.7:
        right = u() < 0.8
        where = u(0.02, 0.12) if right else u(0.86, 0.94)
        letter = draw_letter(size, "R" if right else "L", where, u(0.01, 0.08), u(0.05, 0.07))
        image = blend(image, 0.93, 0.95 * letter)
    image = gaussian_filter(shrink(image), 0.0018 * size / FINE)
    noise = grain(rng, size // FINE, PLATE, 1.4)
    return np.clip(image + u(0.003, 0.007) * noise * inside(shrink(body), 0.01), 0, 1)
