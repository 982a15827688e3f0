"""The procedural, captioned corpus on which the embedded base is pretrained.

A *concept* is a ground, objects and grain, and how much all of them vary; every concept is drawn
several times. Nothing here draws anatomy and nothing is shared with the medical phantoms, which
are held out, as Stable Diffusion's pretraining held out the paper's data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

SIZE = 64
GROUNDS = ("plain", "gradient", "field", "stripes", "cells", "bands")
SHAPES = ("ellipse", "box", "ring", "blob", "bar", "diamond")
FILLS = ("flat", "shaded", "cloudy", "striped", "spotted")
COLOURS = {
    "black": (0, 0, 0), "gray": (0.5, 0.5, 0.5), "white": (1, 1, 1), "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.65, 0.15), "blue": (0.1, 0.2, 0.85), "yellow": (0.95, 0.9, 0.1),
    "orange": (0.95, 0.55, 0.1), "purple": (0.5, 0.15, 0.6), "pink": (0.95, 0.6, 0.75),
    "cyan": (0.1, 0.8, 0.85), "brown": (0.45, 0.27, 0.1), "olive": (0.5, 0.5, 0.1),
    "silver": (0.75, 0.75, 0.75), "charcoal": (0.25, 0.25, 0.25),
}  # fmt: skip
PLACES = tuple(
    f"{row} {column}".strip() if (row, column) != ("", "") else "center"
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
)
SIZES = ("tiny", "small", "medium", "large", "huge")
AMOUNTS = ("smooth", "faint", "grainy", "noisy")
EXTRA_WORDS = (
    "ground", "pair", "roaming", "rare", "mirrored", "coarse", "fine", "many", "few", "soft",
    "sharp", "wavy", "tilted", "a", "an", "of", "the", "and", "with", "on", "in", "image", "photo",
)  # fmt: skip
WORDS = tuple(
    dict.fromkeys(
        word
        for group in (GROUNDS, SHAPES, FILLS, COLOURS, PLACES, SIZES, AMOUNTS, EXTRA_WORDS)
        for phrase in group
        for word in phrase.split()
    )
)

_axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
Y, X = np.meshgrid(_axis, _axis, indexing="ij")


def colour_name(colour: np.ndarray) -> str:
    """Return the nearest colour word of an RGB triple in [0, 1]."""
    names = list(COLOURS)
    table = np.array([COLOURS[name] for name in names])
    return names[int(((table - np.asarray(colour)) ** 2).sum(1).argmin())]


def place_name(x: float, y: float) -> str:
    """Return the word pair of the cell of a 3x3 grid that holds (x, y), both in [0, 1]."""
    row, column = (min(2, max(0, int(3 * value))) for value in (y, x))
    return PLACES[3 * row + column]


@dataclass
class Thing:
    """One object of a concept; lengths in units of the image."""

    shape: str
    fill: str
    colour: np.ndarray
    second: np.ndarray
    x: float
    y: float
    radius: float
    aspect: float
    tilt: float
    edge: float
    opacity: float
    wobble: float
    pair: bool
    roam: float
    presence: float
    period: float


@dataclass
class Concept:
    """A kind of image; `vary` is the spread of everything from image to image."""

    ground: str
    colours: np.ndarray
    scale: float
    angle: float
    warp: float
    mirrored: bool
    gray: bool
    vary: float
    grain: float
    grain_blur: float
    grain_shared: bool
    light: float
    blur: float
    things: list[Thing] = field(default_factory=list)


def sample_concept(rng: np.random.Generator) -> Concept:
    """Draw a concept."""
    gray = rng.random() < 0.45
    names = list(COLOURS)

    def colour() -> np.ndarray:
        if gray:
            return np.full(3, rng.random(), np.float32)
        if rng.random() < 0.5:
            base = np.array(COLOURS[names[rng.integers(len(names))]], np.float32)
            return np.clip(base + rng.normal(0, 0.08, 3), 0, 1).astype(np.float32)
        return rng.random(3).astype(np.float32)

    count = int(
        rng.choice([0, 1, 2, 3, 4, 5, 6, 8], p=[0.06, 0.1, 0.14, 0.18, 0.18, 0.14, 0.12, 0.08])
    )
    things = [
        Thing(
            shape=SHAPES[rng.integers(len(SHAPES))],
            fill=str(rng.choice(FILLS, p=[0.4, 0.2, 0.16, 0.12, 0.12])),
            colour=colour(),
            second=colour(),
            x=float(rng.uniform(0.05, 0.95)) if rng.random() < 0.65 else 0.5,
            y=float(rng.uniform(0.02, 0.98)),
            radius=float(np.exp(rng.uniform(math.log(0.035), math.log(0.42)))),
            aspect=float(np.exp(rng.normal(0, 0.45))),
            tilt=float(rng.choice([0, rng.normal(0, 0.35), rng.uniform(0, math.pi)])),
            edge=float(np.exp(rng.uniform(math.log(0.008), math.log(0.08)))),
            opacity=float(rng.choice([1, rng.uniform(0.35, 1)])),
            wobble=float(rng.choice([0, rng.uniform(0, 0.25)])),
            pair=bool(rng.random() < 0.35),
            roam=float(rng.choice([0, 0.06, 0.2], p=[0.6, 0.25, 0.15])),
            presence=float(rng.choice([1, 0.6], p=[0.8, 0.2])),
            period=float(np.exp(rng.uniform(math.log(0.05), math.log(0.2)))),
        )
        for _ in range(count)
    ]
    things.sort(key=lambda thing: -thing.radius)  # small on top of large
    return Concept(
        ground=str(rng.choice(GROUNDS, p=[0.22, 0.14, 0.28, 0.1, 0.16, 0.1])),
        colours=np.stack([colour() for _ in range(3)]),
        scale=float(np.exp(rng.uniform(math.log(0.05), math.log(0.45)))),
        angle=float(rng.choice([0, math.pi / 2, rng.uniform(0, math.pi)])),
        warp=float(rng.choice([0, rng.uniform(0, 0.12)])),
        mirrored=bool(rng.random() < 0.3),
        gray=gray,
        vary=float(np.exp(rng.uniform(math.log(0.15), math.log(1.5)))),
        grain=float(rng.choice([0, rng.uniform(0.005, 0.05), rng.uniform(0.03, 0.14)], p=[0.25, 0.45, 0.3])),
        grain_blur=float(rng.choice([0, rng.uniform(0.3, 1.3)], p=[0.6, 0.4])),
        grain_shared=bool(gray or rng.random() < 0.4),
        light=float(rng.choice([0, rng.uniform(0, 0.5)])),
        blur=float(rng.choice([0, rng.uniform(0.2, 0.9)], p=[0.6, 0.4])),
        things=things,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _bank() -> np.ndarray:
    """Random fields of zero mean and unit spread at eight scales: (8, 64, 128, 128)."""
    rng = np.random.default_rng(20240703)
    scales = SIZE * np.geomspace(0.015, 0.25, 8)
    bank = np.empty((8, 64, 128, 128), np.float32)
    for i, scale in enumerate(scales):
        for j in range(64):
            noise = gaussian_filter(
                rng.standard_normal((128, 128)).astype(np.float32), scale, mode="wrap"
            )
            bank[i, j] = (noise - noise.mean()) / noise.std()
    return bank


def _field(rng: np.random.Generator, scale: float) -> np.ndarray:
    """A smooth random field (64, 64) with correlation length about `scale` of the image."""
    level = int(np.clip(round(7 * math.log(scale / 0.015) / math.log(0.25 / 0.015)), 0, 7))
    y, x = rng.integers(0, 128 - SIZE + 1, 2)
    tile = _bank()[level, rng.integers(64), y : y + SIZE, x : x + SIZE]
    flip = rng.integers(4)
    tile = tile[:: -1 if flip & 1 else 1, :: -1 if flip & 2 else 1]
    return tile.T if rng.random() < 0.5 else tile


def _ramp(value: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Map values in [0, 1] onto a line through the colours: (H, W) -> (H, W, 3)."""
    value = np.clip(value, 0, 1) * (len(colours) - 1)
    low = np.minimum(value.astype(np.int64), len(colours) - 2)
    part = (value - low)[..., None]
    return colours[low] * (1 - part) + colours[low + 1] * part


def _waves(rng: np.random.Generator, period: float, angle: float, warp: float) -> np.ndarray:
    along = X * math.cos(angle) + Y * math.sin(angle)
    if warp:
        along = along + warp * 0.5 * _field(rng, 0.25)
    return 0.5 + 0.5 * np.sin(2 * math.pi * (along / period + rng.random()))


def _spots(rng: np.random.Generator, period: float, jitter: float = 0.8) -> np.ndarray:
    """Many small blobs at about `period` apart, 1 within and 0 between: (64, 64)."""
    n = max(3, round(1 / period))
    centres = (np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2) + 0.5) / n
    centres = centres + rng.uniform(-0.5, 0.5, centres.shape) * jitter / n
    radii = rng.uniform(0.2, 0.48, len(centres)) / n
    image = np.zeros((SIZE, SIZE), np.float32)
    for (cx, cy), r in zip(centres, radii):
        x0, x1 = max(0, int((cx - 1.4 * r) * SIZE)), min(SIZE, int((cx + 1.4 * r) * SIZE) + 2)
        y0, y1 = max(0, int((cy - 1.4 * r) * SIZE)), min(SIZE, int((cy + 1.4 * r) * SIZE) + 2)
        if x0 >= x1 or y0 >= y1:
            continue
        distance = np.hypot(X[y0:y1, x0:x1] - cx, Y[y0:y1, x0:x1] - cy)
        spot = np.clip((r - distance) * SIZE / 1.5 + 0.5, 0, 1)
        image[y0:y1, x0:x1] = np.maximum(image[y0:y1, x0:x1], spot)
    return image


def _ground(concept: Concept, rng: np.random.Generator) -> np.ndarray:
    shift = rng.normal(0, 0.04 * concept.vary, (3, 1 if concept.gray else 3))
    colours = np.clip(concept.colours + shift, 0, 1).astype(np.float32)
    angle = concept.angle + rng.normal(0, 0.08 * concept.vary)
    if concept.ground == "plain":
        image = np.broadcast_to(colours[0], (SIZE, SIZE, 3))
    elif concept.ground == "gradient":
        along = X * math.cos(angle) + Y * math.sin(angle)
        image = _ramp((along - along.min()) / np.ptp(along), colours)
    elif concept.ground == "field":
        image = _ramp(0.5 + 0.28 * _field(rng, concept.scale), colours)
    elif concept.ground == "stripes":
        period = min(0.4, max(0.06, concept.scale)) * math.exp(rng.normal(0, 0.06 * concept.vary))
        image = _ramp(_waves(rng, period, angle, concept.warp * 2), colours[:2])
    elif concept.ground == "cells":
        period = min(0.25, max(0.07, concept.scale))
        tone = 0.25 * _field(rng, 0.05)
        spots = _spots(rng, period)
        image = _ramp(np.clip(spots + tone * spots, 0, 1), colours[:2])
    else:
        along = X * math.cos(angle) + Y * math.sin(angle) + 0.03 * _field(rng, 0.2)
        edges = np.sort(np.array([0.33, 0.66]) + rng.normal(0, 0.06 * concept.vary, 2))
        steps = sum(np.clip((along - edge) * SIZE / 3 + 0.5, 0, 1) for edge in edges)
        image = _ramp(steps / 2, colours)
    if concept.mirrored:
        image = np.concatenate([image[:, : SIZE // 2], image[:, : SIZE // 2][:, ::-1]], 1)
    return np.array(image, np.float32)


def _draw(image: np.ndarray, thing: Thing, concept: Concept, rng: np.random.Generator) -> None:
    vary = concept.vary
    spread = 0.025 * vary + thing.roam
    dx, dy = rng.normal(0, spread, 2)
    grow = math.exp(rng.normal(0, 0.1 * vary))
    aspect = thing.aspect * math.exp(rng.normal(0, 0.07 * vary))
    turn = rng.normal(0, 0.1 * vary)
    tint = rng.normal(0, 0.03 * vary, (2, 1 if concept.gray else 3))
    colours = np.clip(np.stack([thing.colour, thing.second]) + tint, 0, 1).astype(np.float32)
    waves = rng.normal(0, thing.wobble, 3), rng.uniform(0, 2 * math.pi, 3)
    sides = (1, -1) if thing.pair and abs(thing.x - 0.5) > 0.05 else (1,)
    for side in sides:
        cx = 0.5 + side * (thing.x - 0.5 + dx) + (rng.normal(0, 0.01 * vary) if side < 0 else 0)
        cy = thing.y + dy + (rng.normal(0, 0.01 * vary) if side < 0 else 0)
        a = thing.radius * grow * math.sqrt(aspect)
        b = thing.radius * grow / math.sqrt(aspect)
        if thing.shape == "bar":
            a, b = a * 2.2, b * 0.35
        reach = (max(a, b) * 1.6 + 0.03) * SIZE
        x0, x1 = max(0, int(cx * SIZE - reach)), min(SIZE, int(cx * SIZE + reach) + 1)
        y0, y1 = max(0, int(cy * SIZE - reach)), min(SIZE, int(cy * SIZE + reach) + 1)
        if x0 >= x1 or y0 >= y1:
            continue
        view = slice(y0, y1), slice(x0, x1)
        angle = side * (thing.tilt + turn)
        px, py = X[view] - cx, Y[view] - cy
        u = (px * math.cos(angle) + py * math.sin(angle)) * side / a
        v = (-px * math.sin(angle) + py * math.cos(angle)) / b
        if thing.shape in ("box", "bar"):
            rho = (u**4 + v**4) ** 0.25
        elif thing.shape == "diamond":
            rho = np.abs(u) + np.abs(v)
        else:
            rho = np.sqrt(u * u + v * v)
        if thing.wobble or thing.shape == "blob":
            theta = np.arctan2(v, u)
            gain = 0.6 if thing.shape == "blob" else 1
            bump = sum(
                amount * np.cos(k * theta + phase) for k, amount, phase in zip((2, 3, 5), *waves)
            )
            rho = rho / np.clip(
                1
                + gain * bump
                + (0.12 * np.cos(3 * theta + waves[1][0]) if thing.shape == "blob" else 0),
                0.4,
                1.8,
            )
        margin = (1 - rho) if thing.shape != "ring" else 0.22 - np.abs(rho - 0.8)
        alpha = 1 / (1 + np.exp(-np.clip(margin * min(a, b) / thing.edge * 4, -30, 30)))
        if thing.fill == "flat":
            inside = colours[0]
        elif thing.fill == "shaded":
            inside = _ramp(1 - np.minimum(rho, 1) ** 2, colours[::-1])
        elif thing.fill == "cloudy":
            inside = _ramp(0.5 + 0.3 * _field(rng, thing.period), colours)[view]
        elif thing.fill == "striped":
            inside = _ramp(_waves(rng, thing.period, thing.tilt + 1.57, 0.1), colours)[view]
        else:
            inside = _ramp(_spots(rng, max(0.06, thing.period)), colours)[view]
        alpha = (alpha * thing.opacity)[..., None]
        image[view] = image[view] * (1 - alpha) + inside * alpha


def render(concept: Concept, rng: np.random.Generator) -> np.ndarray:
    """Draw one image of a concept: ``(64, 64, 3) uint8``."""
    image = _ground(concept, rng)
    for thing in concept.things:
        if thing.presence == 1 or rng.random() < thing.presence:
            _draw(image, thing, concept, rng)
    if concept.warp and concept.ground != "stripes":
        shift = concept.warp * 0.35 * SIZE
        rows = Y * SIZE - 0.5 + shift * _field(rng, 0.25)
        columns = X * SIZE - 0.5 + shift * _field(rng, 0.25)
        image = np.stack(
            [
                map_coordinates(image[..., c], [rows, columns], order=1, mode="nearest")
                for c in range(3)
            ],
            -1,
        )
    if concept.light:
        image = image * (1 + concept.light * 0.5 * np.clip(_field(rng, 0.25), -1.5, 1.5))[..., None]
    if concept.blur:
        image = gaussian_filter(image, (concept.blur, concept.blur, 0))
    if concept.grain:
        noise = rng.standard_normal((SIZE, SIZE, 1 if concept.grain_shared else 3)).astype(
            np.float32
        )
        if concept.grain_blur:
            noise = gaussian_filter(noise, (concept.grain_blur, concept.grain_blur, 0))
            noise /= noise.std() + 1e-6
        image = image + concept.grain * math.exp(rng.normal(0, 0.1 * concept.vary)) * noise
    if concept.gray:
        image = np.broadcast_to(image.mean(-1, keepdims=True), image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def make_caption(concept: Concept) -> str:
    """Describe a concept in dense plain words, objects from large to small, ground first."""
    first, second = colour_name(concept.colours[0]), colour_name(concept.colours[1])
    amount = AMOUNTS[int(np.searchsorted([0.004, 0.03, 0.075], concept.grain))]
    words = [amount, first]
    if concept.ground != "plain":
        words += [second, "coarse" if concept.scale > 0.15 else "fine"]
    words += ["mirrored"] * concept.mirrored + [concept.ground, "ground"]
    for thing in concept.things:
        size = SIZES[int(np.searchsorted([0.06, 0.11, 0.2, 0.32], thing.radius))]
        words += ["rare"] * (thing.presence < 1) + ["roaming"] * (thing.roam > 0.1)
        words += ["pair"] * thing.pair
        words += [size, colour_name(thing.colour)]
        words += [thing.fill] * (thing.fill != "flat") + [thing.shape]
        words += place_name(thing.x, thing.y).split()
    return " ".join(words[:75])


def make_concept(seed: int, index: int, images: int) -> tuple[np.ndarray, str]:
    """Return the images ``(images, 64, 64, 3) uint8`` and the caption of concept `index`."""
    rng = np.random.default_rng([seed, index])
    concept = sample_concept(rng)
    return np.stack([render(concept, rng) for _ in range(images)]), make_caption(concept)
