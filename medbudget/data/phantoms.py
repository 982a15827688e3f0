"""Phantoms: procedural look-alikes of the paper's three kinds of images, with lesion masks.

Geometry lives in unit coordinates (x to the right, y down, 0 to 1), so that a phantom is the same
"patient" at any size; grain lives in pixels, as a detector's does. Everything here is drawn from
textbook anatomy by this file alone: the embedded base was pretrained without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from medbudget.images import check_images

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]

KINDS: dict[str, tuple[str, ...]] = {
    "prostate": ("healthy", "tumour"),
    "chest": ("healthy", "cardiomegaly", "pleural_effusion", "pneumonia"),
    "histology": ("normal", "metastasis"),
}
SPLITS = ("train", "val", "test")
MIN_SIZE = 32


@dataclass(frozen=True, eq=False)
class Phantoms:
    """Phantom images with what is known about them.

    Attributes
    ----------
    images : torch.Tensor
        ``(n, 3, size, size) uint8``. Prostate: T2W, ADC and DWI as R, G and B; chest: three equal
        channels; histology: RGB.
    masks : torch.Tensor
        ``(n, size, size) bool``: the tumour, the abnormal region of the chest, the metastasis;
        all False where there is no lesion.
    labels : tuple of str
        n labels; combined ones are joined by "+".
    """

    images: torch.Tensor
    masks: torch.Tensor
    labels: tuple[str, ...]


def make_phantoms(
    kind: str,
    label: str | Sequence[str],
    n: int,
    *,
    size: int = 64,
    seed: int = 0,
    split: str = "train",
) -> Phantoms:
    """Draw `n` phantoms of one kind and label.

    Image i depends on kind, label, seed, split and i alone: the first k of n equal the k of a
    shorter call, and no image of one split or label shares its random numbers with another.

    Parameters
    ----------
    kind : {"prostate", "chest", "histology"}
    label : str or sequence of str
        Prostate ``healthy|tumour``; chest ``healthy|cardiomegaly|pleural_effusion|pneumonia``, of
        which several diseases may be combined; histology ``normal|metastasis``.
    n : int
        How many, at least 1.
    size : int
        Pixels an edge, at least 32; the anatomy is meant to be seen at 64 and more.
    seed : int
        0 to 2**64 - 1.
    split : {"train", "val", "test"}

    Raises
    ------
    ValueError
        An unknown kind, label or split, labels that exclude each other, or a number out of range.

    Examples
    --------
    >>> phantoms = make_phantoms("prostate", "tumour", 3)
    >>> tuple(phantoms.images.shape), tuple(phantoms.masks.shape)
    ((3, 3, 64, 64), (3, 64, 64))
    >>> phantoms.masks.any(2).any(1).tolist()  # each has a tumour
    [True, True, True]
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of phantom {kind!r}; allowed are {', '.join(KINDS)}")
    labels = _check_labels(kind, label)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed are {', '.join(SPLITS)}")
    if n < 1 or size < MIN_SIZE or not 0 <= seed < 2**64:
        raise ValueError(
            f"n >= 1, size >= {MIN_SIZE} and 0 <= seed < 2**64 are needed, "
            f"got n={n}, size={size}, seed={seed}"
        )
    draw = {"prostate": _draw_prostate, "chest": _draw_chest, "histology": _draw_histology}[kind]
    images = np.empty((n, 3, size, size), np.uint8)
    masks = np.empty((n, size, size), np.bool_)
    for index in range(n):
        rng = np.random.default_rng(_seed_words(kind, labels, split, seed, index))
        image, masks[index] = draw(rng, size, labels)
        images[index] = np.rint(np.clip(image, 0, 1) * 255)
    return Phantoms(torch.from_numpy(images), torch.from_numpy(masks), ("+".join(labels),) * n)


def find_tumours(images: torch.Tensor) -> torch.Tensor:
    """Return where prostate phantoms show a tumour, ``(N, H, W) bool``: the phantom's own rule.

    Restricted diffusion: DWI (blue) brighter than ADC (green) by a tenth of the range, after a
    blur of half a pixel at 64 against grain. No other tissue of the phantom does that.

    Parameters
    ----------
    images : torch.Tensor
        ``(N, 3, H, W) uint8``, T2W, ADC and DWI.
    """
    check_images(images)
    excess = images[:, 2].float() - images[:, 1].float()
    sigma = 0.5 * images.shape[-1] / 64
    smooth = gaussian_filter(excess.cpu().numpy(), (0, sigma, sigma))
    return torch.from_numpy(smooth > 25.5)


def _check_labels(kind: str, label: str | Sequence[str]) -> tuple[str, ...]:
    """Return the labels as a tuple, or raise."""
    allowed = KINDS[kind]
    labels = (label,) if isinstance(label, str) else tuple(label)
    unknown = [one for one in labels if one not in allowed]
    if unknown or not labels:
        found = ", ".join(map(repr, unknown)) or "none"
        raise ValueError(f"unknown label {found} for {kind}; allowed are {', '.join(allowed)}")
    if len(set(labels)) != len(labels):
        raise ValueError(f"a label is named twice in {labels}")
    if len(labels) > 1 and (kind != "chest" or allowed[0] in labels):
        raise ValueError(f"{' + '.join(labels)} cannot be combined; only chest diseases can")
    return labels


def _seed_words(
    kind: str, labels: tuple[str, ...], split: str, seed: int, index: int
) -> tuple[int, ...]:
    """Name one image by six 32-bit words; a fixed number of them, so that none can run together."""
    which = sum(1 << KINDS[kind].index(one) for one in labels)
    return (
        SPLITS.index(split) + 1,
        list(KINDS).index(kind) + 1,
        which,
        seed & 0xFFFFFFFF,
        seed >> 32,
        index,
    )


# ---- drawing tools ------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _axes(size: int) -> tuple[Array, Array]:
    """Pixel centres as a row ``(1, size)`` and a column ``(size, 1)`` from 0 to 1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[None, :], line[:, None]


@lru_cache(maxsize=32)
def _ramp(size: int, knots: int) -> Array:
    """Smooth interpolation from `knots` values to `size` pixels, ``(size, knots)``; unit power."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size * (knots - 1)
    weight = np.exp(-0.5 * ((at[:, None] - np.arange(knots)) / 0.6) ** 2)
    weight /= np.sqrt((weight**2).sum(1, keepdims=True))
    return weight.astype(np.float32)


def _field(rng: np.random.Generator, size: int, knots: int) -> Array:
    """A smooth random field ``(size, size)`` of mean 0 and variance 1, about `knots` bumps wide."""
    ramp = _ramp(size, knots)
    return ramp @ rng.standard_normal((knots, knots)).astype(np.float32) @ ramp.T


def _place(
    size: int, angle: float, shift: tuple[float, float], scale: float = 1.0
) -> tuple[Array, Array]:
    """Unit coordinates of a body that lies tilted by `angle` (radians), shifted and scaled."""
    x, y = _axes(size)
    dx, dy = x - 0.5 - shift[0], y - 0.5 - shift[1]
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    return (
        (cos * dx + sin * dy + 0.5).astype(np.float32),
        (cos * dy - sin * dx + 0.5).astype(np.float32),
    )


def _ellipse(
    x: Array, y: Array, cx: float, cy: float, a: float, b: float, angle: float = 0.0
) -> Array:
    """Approximate signed distance (unit coordinates, negative inside) to an ellipse."""
    dx, dy = x - cx, y - cy
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    u, v = (cos * dx + sin * dy) / a, (cos * dy - sin * dx) / b
    return (np.sqrt(u * u + v * v) - 1) * min(a, b)


def _inside(distance: Array, soft: float) -> Array:
    """Coverage from 0 to 1, going over `soft` (unit coordinates) around distance 0."""
    return np.clip(0.5 - distance / soft, 0, 1)


def _blend(image: Array, value: float | Array, cover: Array) -> Array:
    return image + (value - image) * cover


# ---- prostate -----------------------------------------------------------------------------------

# T2W, ADC, DWI from 0 to 1
_FAT = (0.58, 0.20, 0.07)
_MUSCLE = (0.17, 0.36, 0.12)
_URINE = (0.94, 0.92, 0.10)
_BLADDER_WALL = (0.26, 0.34, 0.16)
_PERIPHERAL = (0.80, 0.68, 0.19)
_TRANSITION = (0.50, 0.50, 0.23)
_CAPSULE = (0.27, 0.36, 0.14)
_TUMOUR = (0.20, 0.17, 0.86)
_RECTAL_WALL = (0.30, 0.36, 0.20)
_GAS = (0.04, 0.05, 0.03)
_BONE = (0.36, 0.11, 0.05)
_ZONES = (_PERIPHERAL, _TRANSITION, _CAPSULE, _TUMOUR)
_PELVIS = (_FAT, _MUSCLE, _URINE, _BLADDER_WALL, *_ZONES, _RECTAL_WALL, _GAS, _BONE)


def _draw_prostate(
    rng: np.random.Generator, size: int, labels: tuple[str, ...]
) -> tuple[Array, Mask]:
    u = rng.uniform
    x, y = _place(size, u(-0.07, 0.07), (u(-0.03, 0.03), u(-0.03, 0.03)), u(0.92, 1.10))
    warp = 0.010
    x, y = x + warp * _field(rng, size, 5), y + warp * _field(rng, size, 5)
    edge = 0.022
    gain = 1 + 0.05 * rng.standard_normal((11, 3))
    tissue = np.array(_PELVIS)
    tissue = (tissue * gain).astype(np.float32)
    fat, muscle, urine, wall, zone_p, zone_t, capsule, tumour, rectal, gas, bone = tissue[
        :, :, None, None
    ]
    image: Array = np.broadcast_to(fat, (3, size, size)).astype(np.float32)
    image = image + np.array([0.07, 0.03, 0.01], np.float32)[:, None, None] * _field(rng, size, 9)

    apart = u(0.345, 0.385)
    for side in (-1, 1):  # obturator muscles, and the acetabulum outside them
        lean = side * u(0.12, 0.30)
        cx, cy, long = 0.5 + side * apart, u(0.50, 0.56), u(0.22, 0.28)
        outer = _ellipse(x, y, cx + side * 0.16, cy - 0.08, 0.13, 0.24, lean)
        image = _blend(image, bone, _inside(outer, edge))
        image = _blend(
            image, muscle, _inside(_ellipse(x, y, cx, cy, u(0.055, 0.08), long, lean), edge)
        )

    cx, cy = 0.5 + u(-0.02, 0.02), u(0.49, 0.54)
    a, b = u(0.175, 0.235), u(0.135, 0.175)
    turn = u(-0.08, 0.08)

    rx, ry = cx + u(-0.03, 0.03), cy + b + u(0.135, 0.165)
    ra, rb = u(0.075, 0.115), u(0.065, 0.09)
    rectum = _ellipse(x, y, rx, ry, ra, rb)
    image = _blend(image, rectal, _inside(rectum, edge))
    filling = gas + (0.35 * rectal * u(0, 1) if u() < 0.5 else 0)
    image = _blend(image, filling, _inside(rectum + 0.026, edge))

    bladder_b = u(0.09, 0.14)
    bladder_y = cy - b - bladder_b - u(0.0, 0.05)
    bladder_a = u(0.14, 0.22)
    bladder = _ellipse(x, y, cx + u(-0.02, 0.02), bladder_y, bladder_a, bladder_b)
    image = _blend(image, wall, _inside(bladder - 0.018, edge))
    image = _blend(image, urine, _inside(bladder, edge))

    gland = _ellipse(x, y, cx, cy, a, b, turn)
    image = _blend(image, capsule, _inside(gland - 0.012, edge))
    image = _blend(image, zone_p, _inside(gland, edge))
    share = u(0.62, 0.80)  # the transition zone grows with age
    inner_a, inner_b = a * share, b * (share - 0.04)
    inner = _ellipse(x, y, cx, cy - b * 0.20, inner_a, inner_b, turn)
    nodules = np.array([0.13, 0.07, 0.03], np.float32)[:, None, None] * _field(rng, size, 17)
    image = _blend(image, capsule, 0.6 * _inside(np.abs(inner) - 0.008, edge))
    image = _blend(image, zone_t + nodules, _inside(inner, edge))
    if u() < 0.35:  # prostatitis: mildly dark, and not bright on DWI
        spot = _ellipse(
            x, y, cx + u(-0.7, 0.7) * a, cy + u(0.3, 0.7) * b, u(0.03, 0.06), u(0.03, 0.05)
        )
        image = _blend(image, 0.6 * zone_p + 0.4 * capsule, 0.7 * _inside(spot, 0.04))

    mask = np.zeros((size, size), np.bool_)
    if "tumour" in labels:
        la, lb = u(0.042, 0.085), u(0.038, 0.062)
        angle, far = u(0, 2 * np.pi), np.sqrt(u(0.02, 1))
        reach_x, reach_y = max(a - 0.8 * la, 0.02), max(b - 0.9 * lb, 0.02)
        dx, dy = far * reach_x * np.cos(angle), far * reach_y * np.sin(angle)
        tx = cx + np.cos(turn) * dx - np.sin(turn) * dy
        ty = cy + np.sin(turn) * dx + np.cos(turn) * dy
        lesion = _ellipse(x, y, tx, ty, la, lb, u(0, np.pi))
        lesion = np.maximum(lesion + 0.008 * _field(rng, size, 13), gland)
        seen = u(0.6, 1.0)  # conspicuity
        image = _blend(image, tumour, seen * _inside(lesion, 0.028))
        mask = (lesion < 0) & (gland < 0)

    coil = 1 + u(0.02, 0.06) * _field(rng, size, 3)
    image = image * coil * u(0.93, 1.07, (3, 1, 1)).astype(np.float32)
    noise = rng.standard_normal((2, 3, size, size), dtype=np.float32)
    noise *= np.array([0.028, 0.035, 0.030], np.float32)[:, None, None] * u(0.7, 1.2)
    return np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2), mask  # Rician, as magnitude MRI


# ---- chest --------------------------------------------------------------------------------------


def _draw_chest(rng: np.random.Generator, size: int, labels: tuple[str, ...]) -> tuple[Array, Mask]:
    u = rng.uniform
    x, y = _place(size, u(-0.05, 0.05), (u(-0.025, 0.025), u(-0.025, 0.025)), u(0.95, 1.08))
    edge = 0.018
    half = u(0.335, 0.385)  # of the thorax's inner width
    top, base = u(0.10, 0.15), u(0.74, 0.82)
    away = np.abs(x - 0.5)

    shoulder = y - (0.02 + 0.55 * np.maximum(away - u(0.17, 0.21), 0) ** 1.15)
    flank = away - (half + u(0.085, 0.12) - 0.03 * np.sin(np.pi * y))
    soft = u(0.60, 0.70)
    image = soft + 0.05 * (y - 0.4) + 0.015 * _field(rng, size, 6)
    image = image - 0.10 * np.clip((away - half) / 0.1, 0, 1)
    body = np.minimum(_inside(-shoulder, 0.03), _inside(np.maximum(flank, -y), 0.03))
    image = _blend(np.full((size, size), u(0.02, 0.07), np.float32), image, body)

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
    vessels = 0.030 * _field(rng, size, 15) + 0.018 * _field(rng, size, 27)
    hilum = u(0.10, 0.17) * np.exp(-(((away - 0.10) / 0.07) ** 2) - ((y - 0.44) / 0.11) ** 2)
    image = _blend(image, air + 0.06 * (y - 0.5) + vessels + hilum, _inside(lung, 0.03))

    gap = u(0.072, 0.084)  # between ribs
    bow = y - 0.42 * away - 0.15 * np.sqrt(np.maximum(half**2 - away**2, 0)) + u(0, gap)
    beat = (bow / gap) % 1 - 0.5
    cage = _inside(np.minimum(thorax[0], thorax[1]) - 0.015, 0.03) * (y < base + 0.06)
    image = image + u(0.07, 0.11) * np.exp(-((beat / 0.17) ** 2)) * cage
    front = ((y + 0.75 * away + u(0, gap)) / (gap * 1.25)) % 1 - 0.5
    image = image + u(0.02, 0.05) * np.exp(-((front / 0.16) ** 2)) * cage * (y > 0.3)

    spine = np.exp(-(((x - 0.5) / 0.050) ** 4))
    image = _blend(image, soft + 0.10, spine * (0.70 + 0.12 * np.cos(2 * np.pi * y / 0.062)))
    chest_top = _inside(away - inner - 0.01 + 0.10 * (y - 0.34), 0.03) * _inside(
        top - 0.06 - y, 0.08
    )
    image = _blend(image, soft + 0.06, 0.75 * chest_top)
    windpipe = np.exp(-(((x - 0.5 - u(-0.008, 0.008)) / 0.020) ** 2)) * _inside(y - 0.34, 0.06)
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
    heart_d = _ellipse(x, y, left, floor - heart_b * 0.72, heart_a, heart_b, u(0.10, 0.28))
    knob = _ellipse(x, y, 0.5 + u(0.045, 0.06), u(0.30, 0.34), 0.045, 0.055)
    image = _blend(image, soft + 0.02, 0.85 * _inside(knob, edge))
    bottom = np.minimum(domes[0], domes[1])
    heart_tone = np.maximum(image, soft + 0.07 + 0.012 * _field(rng, size, 6))
    image = _blend(image, heart_tone, 0.93 * _inside(heart_d, 0.026))
    image = _blend(image, np.maximum(image, soft + 0.08), 0.6 * _inside(-bottom, 0.03) * cage)

    mask = np.zeros((size, size), np.bool_)
    if big:
        mask |= (heart_d < 0) & (bottom < 0.02)
    if "pneumonia" in labels:
        image, found = _add_pneumonia(rng, image, x, y, lungs, heart_d, soft, half, base)
        mask |= found
    if "pleural_effusion" in labels:
        image, found = _add_effusion(rng, image, x, y, lungs, thorax, soft, half, base, inner)
        mask |= found

    if u() < 0.6:  # gas in the stomach, under the left dome
        bubble = _ellipse(x, y, u(0.62, 0.70), base + u(0.045, 0.08), u(0.035, 0.07), 0.025)
        image = _blend(image, 0.42, 0.6 * _inside(bubble, 0.03) * _inside(-domes[1] - 0.02, 0.02))
    image = np.clip(image, 0, 1) ** u(0.90, 1.15)
    image = (image - 0.5) * u(0.95, 1.15) + 0.5 + u(-0.04, 0.04)
    grain = gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), 0.6)
    image = image + u(0.025, 0.045) * grain
    return np.broadcast_to(image, (3, size, size)), mask


def _add_pneumonia(
    rng: np.random.Generator,
    image: Array,
    x: Array,
    y: Array,
    lungs: list[Array],
    heart: Array,
    soft: float,
    half: float,
    base: float,
) -> tuple[Array, Mask]:
    """Patchy consolidation with ragged borders, in one lung or, less often, in both."""
    u = rng.uniform
    size = image.shape[0]
    ragged = 0.35 * _field(rng, size, 11) + 0.20 * _field(rng, size, 21)
    first = int(u() < 0.5)
    cover = np.zeros_like(image)
    for k in (first, 1 - first)[: 2 if u() < 0.25 else 1]:
        side = (-1, 1)[k]
        for _ in range(1 + int(u() < 0.5)):
            cx, cy = 0.5 + side * u(0.45, 0.80) * half, u(0.34, base - 0.14)
            blob = _ellipse(x, y, cx, cy, u(0.08, 0.13), u(0.08, 0.15), u(-0.6, 0.6))
            ramp = np.clip(0.75 - blob / 0.10 + ragged, 0, 1)
            cover = np.maximum(cover, ramp * _inside(lungs[k], 0.03))
    cover = cover * _inside(-heart, 0.02)
    tone = soft - u(0.0, 0.07) + 0.04 * _field(rng, size, 15)
    return _blend(image, np.maximum(image, tone), u(0.62, 0.85) * cover), cover > 0.5


def _add_effusion(
    rng: np.random.Generator,
    image: Array,
    x: Array,
    y: Array,
    lungs: list[Array],
    thorax: list[Array],
    soft: float,
    half: float,
    base: float,
    inner: float,
) -> tuple[Array, Mask]:
    """Fluid that fills the angle between ribs and diaphragm and climbs along the chest wall."""
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
        fluid = np.maximum(surface, thorax[k] - 0.008)
        tone = soft + 0.10 + 0.03 * (y - 0.6)
        image = _blend(image, np.maximum(image, tone), 0.92 * _inside(fluid, 0.035))
        mask |= (surface < 0) & (lungs[k] < 0)
    return image, mask


# ---- histology ----------------------------------------------------------------------------------

_HAEMATOXYLIN = (0.65, 0.72, 0.28)  # optical density per unit of stain in R, G and B
_EOSIN = (0.10, 0.92, 0.38)


def _stamp(
    size: int, x: Array, y: Array, a: Array, b: Array, angle: Array, tone: Array, hollow: Array
) -> Array:
    """Sum of soft elliptic nuclei as stain density ``(size, size)``, each drawn in its own window.

    `hollow` lightens the middle (open chromatin); overlapping nuclei saturate.
    """
    reach = int(np.ceil(max(a.max(), b.max()) * size + 1.5))
    step = np.arange(-reach, reach + 1)
    px, py = x * size - 0.5, y * size - 0.5
    cols, rows = np.rint(px).astype(int)[:, None] + step, np.rint(py).astype(int)[:, None] + step
    dx, dy = (cols - px[:, None])[:, None, :], (rows - py[:, None])[:, :, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    wide, high = (a * size)[:, None, None], (b * size)[:, None, None]
    r = np.sqrt(((cos * dx + sin * dy) / wide) ** 2 + ((cos * dy - sin * dx) / high) ** 2)
    cover = np.clip(0.5 + (1 - r) * np.minimum(wide, high) / 1.2, 0, 1)
    density = cover * tone[:, None, None] * (1 - hollow[:, None, None] * np.clip(1 - r * r, 0, 1))
    keep = ((rows >= 0) & (rows < size))[:, :, None] & ((cols >= 0) & (cols < size))[:, None, :]
    flat = rows[:, :, None] * size + cols[:, None, :]
    total = np.bincount(flat[keep], density[keep], size * size).reshape(size, size)
    return np.minimum(total, tone.max()).astype(np.float32)


def _scatter(rng: np.random.Generator, gap: float, jitter: float) -> tuple[Array, Array]:
    """Points `gap` apart on a shaken hexagonal lattice that reaches past the image."""
    rows = np.arange(-gap, 1 + gap, gap * 0.87)
    cols = np.arange(-gap, 1 + gap, gap)
    y = np.repeat(rows, len(cols))
    x = np.tile(cols, len(rows)) + np.repeat((np.arange(len(rows)) % 2) * gap / 2, len(cols))
    return (
        x + rng.normal(0, jitter * gap, x.shape) + rng.uniform(0, gap),
        y + rng.normal(0, jitter * gap, y.shape) + rng.uniform(0, gap),
    )


def _draw_histology(
    rng: np.random.Generator, size: int, labels: tuple[str, ...]
) -> tuple[Array, Mask]:
    u = rng.uniform
    x, y = _axes(size)
    ink, pink = u(1.00, 1.30), u(0.24, 0.40)
    mask = np.zeros((size, size), np.bool_)
    border = np.full((size, size), 1.0, np.float32)  # > 0: lymph tissue, < 0: metastasis
    if "metastasis" in labels:
        angle = u(0, 2 * np.pi)
        along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        border = along - u(0.15, 0.75) + 0.05 * _field(rng, size, 6)
        mask = border < 0

    strands = np.exp(-((_field(rng, size, 5) / 0.16) ** 2))  # reticular fibres, vessels
    eosin = pink * (0.75 + 0.18 * _field(rng, size, 9)) + 0.25 * strands
    haze = 0.16 + 0.05 * _field(rng, size, 13)

    def at(field: Array, px: Array, py: Array) -> Array:
        last = size - 1
        return field[
            np.clip((py * size).astype(int), 0, last), np.clip((px * size).astype(int), 0, last)
        ]

    gap = u(0.088, 0.108)
    nx, ny = _scatter(rng, gap, 0.13)
    crowd = u(0.82, 0.98)
    keep = (rng.uniform(size=nx.shape) < crowd) & (at(border, nx, ny) > 0.03)
    keep &= at(strands, nx, ny) < rng.uniform(0.5, 1.4, nx.shape)
    nx, ny = nx[keep], ny[keep]
    stain = np.zeros((size, size), np.float32)
    if len(nx):
        a = gap * rng.normal(0.42, 0.03, nx.shape).clip(0.34, 0.50)
        b = a * rng.uniform(0.82, 1.0, nx.shape)
        tone = rng.normal(0.95, 0.10, nx.shape).clip(0.65, 1.2)
        stain = _stamp(
            size, nx, ny, a, b, rng.uniform(0, np.pi, nx.shape), tone, np.full_like(a, 0.12)
        )

    if mask.any():
        eosin = np.where(mask, 0.85 * eosin + 0.10, eosin)
        wide = u(0.150, 0.205)
        mx, my = _scatter(rng, wide, 0.17)
        lumen = np.full((size, size), 1.0, np.float32)
        if u() < 0.45:  # a gland: nuclei stand around a pale lumen
            reach = border < -0.12
            spots = np.argwhere(reach[size // 5 : -size // 5, size // 5 : -size // 5])
            row, col = spots[int(u() * len(spots))] + size // 5 if len(spots) else (0, 0)
            gx, gy = (col + 0.5) / size, (row + 0.5) / size
            ga, gb, turn = u(0.09, 0.15), u(0.07, 0.11), u(0, np.pi)
            if len(spots):
                lumen = _ellipse(x, y, gx, gy, ga, gb, turn)
                count = int(np.pi * (ga + gb + wide) / (0.62 * wide))
                around = 2 * np.pi * (np.arange(count) + rng.uniform(-0.2, 0.2, count)) / count
                da, db = (ga + 0.45 * wide) * np.cos(around), (gb + 0.45 * wide) * np.sin(around)
                ring_x = gx + np.cos(turn) * da - np.sin(turn) * db
                ring_y = gy + np.sin(turn) * da + np.cos(turn) * db
                free = at(lumen, mx, my) > 0.85 * wide
                mx, my = np.concatenate([mx[free], ring_x]), np.concatenate([my[free], ring_y])
        keep = (at(border, mx, my) < -0.01) & (rng.uniform(size=mx.shape) < 0.94)
        mx, my = mx[keep], my[keep]
        if len(mx):
            a = wide * rng.normal(0.43, 0.075, mx.shape).clip(0.28, 0.62)
            b = a * rng.uniform(0.58, 0.95, mx.shape)
            tone = rng.normal(0.66, 0.13, mx.shape).clip(0.38, 1.0)
            turn_all = rng.uniform(0, np.pi, mx.shape)
            hollow = rng.uniform(0.15, 0.50, mx.shape)
            stain = np.maximum(stain, _stamp(size, mx, my, a, b, turn_all, tone, hollow))
            ox, oy = mx + rng.normal(0, 0.12, mx.shape) * a, my + rng.normal(0, 0.12, mx.shape) * b
            dot = 0.16 * a
            stain = stain + 0.45 * _stamp(
                size, ox, oy, dot, dot, turn_all, np.full_like(a, 0.9), np.zeros_like(a)
            )
        haze = haze + 0.04 * mask
        pale = _inside(lumen, 0.03)
        eosin, haze = eosin * (1 - 0.85 * pale), haze * (1 - 0.8 * pale)
    gaps = _inside(1.0 - np.abs(_field(rng, size, 9)) / 2.6, 0.06) * (stain < 0.2)
    eosin, haze = eosin * (1 - 0.7 * gaps), haze * (1 - 0.7 * gaps)
    dye = np.array([_HAEMATOXYLIN, _EOSIN], np.float32) * (1 + 0.04 * rng.standard_normal((2, 3)))
    chromatin = gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), 0.7)
    stain = ink * (stain * (1 + 0.22 * chromatin) + haze)
    density = dye[0][:, None, None] * stain + dye[1][:, None, None] * np.maximum(eosin, 0)
    image = u(0.93, 0.99) * np.exp(-density)
    return image + 0.012 * rng.standard_normal((3, size, size), dtype=np.float32), mask
