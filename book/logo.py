"""Draw the logo and the favicon: five squares, from noise to a shape, as sampling goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

STATIC = Path(__file__).parent / "_static"
CELLS = 8
BLUE, ORANGE = np.array([0, 114, 178]), np.array([213, 94, 0])


def draw_square(noise: float, rng: np.random.Generator) -> np.ndarray:
    """Return (CELLS, CELLS, 3) uint8: a bright disc with a small orange spot, under noise."""
    y, x = np.mgrid[:CELLS, :CELLS] + 0.5
    disc = np.hypot(x - CELLS / 2, y - CELLS / 2) < 0.42 * CELLS
    image = np.where(disc[..., None], 0.55 * BLUE + 0.45 * 255, BLUE)
    image[2:4, 4:6] = ORANGE
    mixed = (1 - noise) * image + noise * rng.integers(0, 256, (CELLS, CELLS, 1))
    return mixed.clip(0, 255).astype(np.uint8)


def main() -> None:
    rng = np.random.default_rng(0)
    squares = [draw_square(noise, rng) for noise in (1.0, 0.7, 0.45, 0.2, 0.0)]
    gap = np.zeros((CELLS, 2, 4), np.uint8)
    parts = []
    for square in squares:
        opaque = np.full((CELLS, CELLS, 1), 255, np.uint8)
        parts += [np.concatenate([square, opaque], axis=2), gap]
    logo = Image.fromarray(np.concatenate(parts[:-1], axis=1))
    logo.resize((logo.width * 8, logo.height * 8), Image.Resampling.NEAREST).save(
        STATIC / "logo.png", optimize=True
    )
    icon = Image.fromarray(squares[-1]).resize((64, 64), Image.Resampling.NEAREST)
    icon.save(STATIC / "favicon.png", optimize=True)


if __name__ == "__main__":
    main()
