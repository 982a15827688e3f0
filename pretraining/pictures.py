"""Draw a corpus with the statistics of pictures: dead leaves, clip art, crops of photographs.

Nothing in it is medical. Dead leaves follow Baradad et al. 2021 (arXiv 2106.05963). The photographs
are those that scikit-image and scikit-learn ship under free licences (`PHOTOGRAPHS`); clip art is
public domain (openclipart), read from a folder where one is given.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

PHOTOGRAPHS = {  # file of scikit-image or scikit-learn: author or source, licence
    "astronaut.png": "NASA, public domain",
    "brick.png": "Rob Tuytel, CC0",
    "camera.png": "Lav Varshney, CC0",
    "chelsea.png": "Stefan van der Walt, CC0",
    "china.jpg": "Daniel Ehrensperger, CC BY",
    "coffee.png": "Rachel Michetti, CC0",
    "flower.jpg": "Kate Adamson, CC BY",
    "grass.png": "Linolafett, CC0",
    "gravel.png": "Rob Tuytel, CC0",
    "hubble_deep_field.jpg": "NASA and ESA, public domain",
    "rocket.jpg": "SpaceX, CC0",
}


@lru_cache(maxsize=1)
def load_photographs() -> list[np.ndarray]:
    """Load the photographs that are installed, ``(H, W, 3) uint8`` each."""
    import skimage
    import sklearn

    folders = (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets" / "images",
    )
    files = [folder / name for folder in folders for name in PHOTOGRAPHS]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files if file.exists()]


@lru_cache(maxsize=1)
def list_clipart(folder: str) -> list[Path]:
    """List the PNG files below a folder of clip art, at most 20,000 of them."""
    return sorted(Path(folder).rglob("*.png"))[:20_000] if folder else []


def make_texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw noise ``(size, size, 3)`` in [0, 1] whose power falls as 1 / f**(2 * slope)."""
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    radius[0, 0] = 1 / size
    slope = rng.uniform(0.4, 2.2)
    noise = np.fft.rfft2(rng.standard_normal((3, size, size))) / radius**slope
    field = np.fft.irfft2(noise, s=(size, size)).transpose(1, 2, 0)
    field = (field - field.mean((0, 1))) / field.std((0, 1))
    if rng.random() < 0.4:  # gray
        field[...] = field[..., :1]
    elif rng.random() < 0.6:  # one dominant colour axis, as in nature
        field = field[..., :1] * rng.normal(0, 1, 3) + 0.2 * field
    return np.clip(rng.random(3) + rng.uniform(0.03, 0.25) * field, 0, 1).astype(np.float32)


def draw_dead_leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw overlapping shapes of power-law radii, each filled with a texture of its own."""
    axis = np.arange(size, dtype=np.float32) + 0.5
    image = make_texture(rng, size)
    gray = rng.random() < 0.4
    corners = int(rng.choice([0, 3, 4, 6]))
    for _ in range(int(rng.integers(5, 60))):
        radius = size * 0.02 / (rng.random() * 0.97 + 0.03) ** 0.8
        cx, cy = rng.uniform(-0.1, 1.1, 2) * size
        dx, dy = axis[None] - cx, axis[:, None] - cy
        turn = rng.uniform(0, math.pi)
        u = (dx * math.cos(turn) + dy * math.sin(turn)) / math.exp(rng.normal(0, 0.4))
        v = dy * math.cos(turn) - dx * math.sin(turn)
        if corners:
            angles = turn + 2 * math.pi * np.arange(corners) / corners
            distance = np.max([u * math.cos(a) + v * math.sin(a) for a in angles], 0) - radius
        else:
            distance = np.sqrt(u * u + v * v) - radius
        cover = np.clip(0.5 - distance / rng.choice([1.0, 1.0, 3.0, 8.0]), 0, 1)[..., None]
        if cover.max() == 0:
            continue
        shift = rng.integers(0, size, 2)
        fill = np.roll(make_texture(rng, size), shift, (0, 1))
        shade = 1 + rng.uniform(-0.3, 0.3) * (v / (radius + 1))[..., None] * cover
        image = image * (1 - cover) + np.clip(fill * shade, 0, 1) * cover
    if gray:
        image = np.broadcast_to(image.mean(-1, keepdims=True), image.shape)
    return image


def crop_photograph(rng: np.random.Generator, size: int) -> np.ndarray:
    """Crop a photograph at a random scale, turned and mirrored at random."""
    photographs = load_photographs()
    photograph = photographs[rng.integers(len(photographs))]
    short = min(photograph.shape[:2])
    edge = int(short * math.exp(rng.uniform(math.log(0.2), 0)))
    y, x = (int(rng.integers(0, length - edge + 1)) for length in photograph.shape[:2])
    crop = Image.fromarray(photograph[y : y + edge, x : x + edge])
    image = np.asarray(crop.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    image = np.rot90(image, rng.integers(4))[:, :: rng.choice([-1, 1])]
    if rng.random() < 0.4:
        image = np.broadcast_to(image.mean(-1, keepdims=True), image.shape)
    elif rng.random() < 0.3:
        image = image[..., rng.permutation(3)]
    return np.clip(image ** rng.uniform(0.7, 1.4), 0, 1)


def paste_clipart(rng: np.random.Generator, size: int, folder: str) -> np.ndarray:
    """Paste one to four pieces of clip art on a texture."""
    files = list_clipart(folder)
    image = Image.fromarray((make_texture(rng, size) * 255).astype(np.uint8))
    for _ in range(int(rng.integers(1, 5))):
        try:
            piece = Image.open(files[rng.integers(len(files))]).convert("RGBA")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        scale = size * rng.uniform(0.3, 1.1) / max(piece.size)
        piece = piece.resize([max(2, int(s * scale)) for s in piece.size], Image.Resampling.BOX)
        place = tuple(int(rng.uniform(-0.2, 0.8) * size) for _ in range(2))
        image.paste(piece, place, piece)
    pixels = np.asarray(image, np.float32) / 255
    return pixels.mean(-1, keepdims=True).repeat(3, -1) if rng.random() < 0.4 else pixels


def draw_picture(rng: np.random.Generator, size: int, clipart: str = "") -> np.ndarray:
    """Draw one picture ``(size, size, 3) uint8`` of a random kind, some blurred, some with grain."""
    kind = rng.random()
    if kind < 0.45:
        image = draw_dead_leaves(rng, size)
    elif kind < 0.85 or not list_clipart(clipart):
        image = crop_photograph(rng, size)
    else:
        image = paste_clipart(rng, size, clipart)
    if rng.random() < 0.35:
        image = gaussian_filter(image, (*[rng.uniform(0.3, 2.0)] * 2, 0))
    if rng.random() < 0.45:
        grain = rng.standard_normal((size, size, 1 if rng.random() < 0.6 else 3))
        grain = gaussian_filter(grain, (*[rng.uniform(0, 1.2)] * 2, 0))
        image = image + rng.uniform(0.005, 0.08) * grain / (grain.std() + 1e-6)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def draw_siblings(index: int, images: int, size: int, clipart: str = "") -> np.ndarray:
    """Draw pictures ``(images, 3, size, size) uint8`` of one scene: shifted, lighter or darker."""
    rng = np.random.default_rng([13, index])
    margin = size // 8
    scene = draw_picture(rng, size + margin, clipart).astype(np.float32)
    siblings = np.empty((images, 3, size, size), np.uint8)
    for sibling in siblings:
        y, x = rng.integers(0, margin + 1, 2)
        crop = scene[y : y + size, x : x + size] * rng.uniform(0.9, 1.1) + rng.uniform(-8, 8)
        sibling[:] = np.rint(np.clip(crop, 0, 255)).transpose(2, 0, 1)
    return siblings
