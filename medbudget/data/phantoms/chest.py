"""Draw chest phantoms: radiographs of healthy and of ill patients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from medbudget.data.phantoms.drawing import Array, Mask, blend, ellipse, field, inside, place


class Thorax(NamedTuple):
    """Where the lungs are, for what is added to them."""

    x: Array
    y: Array
    lungs: list[Array]  # distance to each, negative inside
    walls: list[Array]  # the same, without the diaphragm
    soft: float  # tone of soft tissue
    half: float  # half of the inner width
    base: float  # height of the diaphragm
    inner: float  # half of the distance between the lungs


def draw_chest(rng: np.random.Generator, size: int, labels: tuple[str, ...]) -> tuple[Array, Mask]:
    u = rng.uniform
    x, y = place(size, u(-0.05, 0.05), (u(-0.025, 0.025), u(-0.025, 0.025)), u(0.95, 1.08))
    edge = 0.018
    half = u(0.335, 0.385)  # of the thorax's inner width
    top, base = u(0.10, 0.15), u(0.74, 0.82)
    away = np.abs(x - 0.5)

    shoulder = y - (0.02 + 0.55 * np.maximum(away - u(0.17, 0.21), 0) ** 1.15)
    flank = away - (half + u(0.085, 0.12) - 0.03 * np.sin(np.pi * y))
    soft = u(0.60, 0.70)
    image = soft + 0.05 * (y - 0.4) + 0.015 * field(rng, size, 6)
    image = image - 0.10 * np.clip((away - half) / 0.1, 0, 1)
    body = np.minimum(inside(-shoulder, 0.03), inside(np.maximum(flank, -y), 0.03))
    image = blend(np.full((size, size), u(0.02, 0.07), np.float32), image, body)

    lungs, domes, thorax = [], [], []
    inner = u(0.055, 0.075)
    for side in (-1, 1):  # image left is the patient's right: the dome there is the higher
        middle = 0.5 + side * (inner + half) / 2
        wide = (half - inner) / 2
        narrow = 0.40 * np.clip((0.45 - y) / (0.45 - top), 0, 1) ** 2
        across = (x - middle + side * narrow * wide * 0.55) / (wide * (1 - narrow))
        along = (y - (top + 0.95) / 2) / ((0.95 - top) / 2)
        shape = ((np.abs(across) ** 3.2 + np.abs(along) ** 3.2) ** (1 / 3.2) - 1) * wide
        dome_top = base - u(0.06, 0.09) - (0.025 if side < 0 else 0.0)
        dome = y - (dome_top + u(0.50, 0.70) * ((x - middle + side * 0.02) / wide) ** 2 * 0.16)
        thorax.append(shape)
        domes.append(dome)
        lungs.append(np.maximum(shape, dome))
    lung = np.minimum(lungs[0], lungs[1])
    air = u(0.15, 0.22)
    vessels = 0.030 * field(rng, size, 15) + 0.018 * field(rng, size, 27)
    hilum = u(0.10, 0.17) * np.exp(-(((away - 0.10) / 0.07) ** 2) - ((y - 0.44) / 0.11) ** 2)
    image = blend(image, air + 0.06 * (y - 0.5) + vessels + hilum, inside(lung, 0.03))

    gap = u(0.072, 0.084)  # between ribs
    bow = y - 0.42 * away - 0.15 * np.sqrt(np.maximum(half**2 - away**2, 0)) + u(0, gap)
    beat = (bow / gap) % 1 - 0.5
    cage = inside(np.minimum(thorax[0], thorax[1]) - 0.015, 0.03) * (y < base + 0.06)
    image = image + u(0.07, 0.11) * np.exp(-((beat / 0.17) ** 2)) * cage
    front = ((y + 0.75 * away + u(0, gap)) / (gap * 1.25)) % 1 - 0.5
    image = image + u(0.02, 0.05) * np.exp(-((front / 0.16) ** 2)) * cage * (y > 0.3)

    spine = np.exp(-(((x - 0.5) / 0.050) ** 4))
    image = blend(image, soft + 0.10, spine * (0.70 + 0.12 * np.cos(2 * np.pi * y / 0.062)))
    chest_top = inside(away - inner - 0.01 + 0.10 * (y - 0.34), 0.03) * inside(top - 0.06 - y, 0.08)
    image = blend(image, soft + 0.06, 0.75 * chest_top)
    windpipe = np.exp(-(((x - 0.5 - u(-0.008, 0.008)) / 0.020) ** 2)) * inside(y - 0.34, 0.06)
    image = image - 0.13 * windpipe
    for side in (-1, 1):  # clavicles
        out = side * (x - 0.5)
        bone = np.abs(y - (top + u(0.045, 0.075)) + 0.30 * (out - 0.05) - 0.35 * (out - 0.2) ** 2)
        reach = (out > 0.04) & (out < half + 0.05)
        image = image + 0.13 * np.exp(-((bone / 0.016) ** 2)) * reach * body

    big = "cardiomegaly" in labels
    ratio = u(0.56, 0.70) if big else u(0.40, 0.49)  # cardiothoracic ratio
    heart_a = ratio * half
    heart_b = heart_a * u(0.86, 0.98) if not big else heart_a * u(0.70, 0.80)
    left = 0.5 + (0.27 if not big else 0.22) * heart_a * u(0.85, 1.15)
    floor = base - u(0.005, 0.025)
    heart_d = ellipse(x, y, left, floor - heart_b * 0.72, heart_a, heart_b, u(0.10, 0.28))
    knob = ellipse(x, y, 0.5 + u(0.045, 0.06), u(0.30, 0.34), 0.045, 0.055)
    image = blend(image, soft + 0.02, 0.85 * inside(knob, edge))
    bottom = np.minimum(domes[0], domes[1])
    heart_tone = np.maximum(image, soft + 0.07 + 0.012 * field(rng, size, 6))
    image = blend(image, heart_tone, 0.93 * inside(heart_d, 0.026))
    image = blend(image, np.maximum(image, soft + 0.08), 0.6 * inside(-bottom, 0.03) * cage)

    mask = (heart_d < 0) & (bottom < 0.02) & big
    place_of = Thorax(x, y, lungs, thorax, soft, half, base, inner)
    if "pneumonia" in labels:
        image, lesion = _add_pneumonia(rng, image, place_of, heart_d)
        mask |= lesion
    if "pleural_effusion" in labels:
        image, lesion = _add_effusion(rng, image, place_of)
        mask |= lesion

    if u() < 0.6:  # gas in the stomach, under the left dome
        bubble = ellipse(x, y, u(0.62, 0.70), base + u(0.045, 0.08), u(0.035, 0.07), 0.025)
        image = blend(image, 0.42, 0.6 * inside(bubble, 0.03) * inside(-domes[1] - 0.02, 0.02))
    image = np.clip(image, 0, 1) ** u(0.90, 1.15)
    image = (image - 0.5) * u(0.95, 1.15) + 0.5 + u(-0.04, 0.04)
    grain = gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), 0.6)
    image = image + u(0.025, 0.045) * grain
    return np.broadcast_to(image, (3, size, size)), mask


def _add_pneumonia(
    rng: np.random.Generator, image: Array, thorax: Thorax, heart: Array
) -> tuple[Array, Mask]:
    """Draw patchy consolidation with ragged borders, in one lung or, less often, in both."""
    x, y, lungs, _, soft, half, base, _ = thorax
    u = rng.uniform
    size = image.shape[0]
    ragged = 0.35 * field(rng, size, 11) + 0.20 * field(rng, size, 21)
    first = int(u() < 0.5)
    cover = np.zeros_like(image)
    for k in (first, 1 - first)[: 2 if u() < 0.25 else 1]:
        side = (-1, 1)[k]
        for _ in range(1 + int(u() < 0.5)):
            cx, cy = 0.5 + side * u(0.45, 0.80) * half, u(0.34, base - 0.14)
            blob = ellipse(x, y, cx, cy, u(0.08, 0.13), u(0.08, 0.15), u(-0.6, 0.6))
            ramp = np.clip(0.75 - blob / 0.10 + ragged, 0, 1)
            cover = np.maximum(cover, ramp * inside(lungs[k], 0.03))
    cover = cover * inside(-heart, 0.02)
    tone = soft - u(0.0, 0.07) + 0.04 * field(rng, size, 15)
    return blend(image, np.maximum(image, tone), u(0.62, 0.85) * cover), cover > 0.5


def _add_effusion(rng: np.random.Generator, image: Array, thorax: Thorax) -> tuple[Array, Mask]:
    """Draw fluid that fills the angle of the diaphragm and climbs along the chest wall."""
    x, y, lungs, walls, soft, half, base, inner = thorax
    u = rng.uniform
    mask = np.zeros(image.shape, np.bool_)
    draw = u()
    for k in (0, 1):
        if not (draw < 0.2 or (draw < 0.6) == (k == 0)):
            continue
        side = (-1, 1)[k]
        out = np.clip((side * (x - 0.5) - inner) / (half - inner), 0, 1)
        level = base - u(0.10, 0.26) - u(0.10, 0.18) * (out**3 - 0.15)
        surface = level - y
        fluid = np.maximum(surface, walls[k] - 0.008)
        tone = soft + 0.10 + 0.03 * (y - 0.6)
        image = blend(image, np.maximum(image, tone), 0.92 * inside(fluid, 0.035))
        mask |= (surface < 0) & (lungs[k] < 0)
    return image, mask
