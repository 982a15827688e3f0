"""Features that were trained on nothing: random convolutions, and the power of detail by its size.

A pretrained network judges by what it was trained to see, and a generator may have been trained with
it: the autoencoder of the tiny base was, with EfficientNet-Lite0. No generator knows these two. That
random filters give usable distances for images unlike photographs is argued by Naeem et al. (2020),
arXiv 2002.09797.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

WIDTHS = (24, 32, 48, 64)  # filters of each layer; the image is halved after each
SIDE = 128  # pixels of the images that both look at
# Borders of the rings, in periods per image: half an octave each, up to the corners.
RINGS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91)
ROUNDING = 1 / 12  # variance that rounding to whole gray levels adds


@lru_cache(maxsize=1)
def draw_filters(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Draw filters ``(after, before, 3, 3)`` that keep the variance through a ReLU (He et al. 2015)."""
    rng = np.random.default_rng(seed)  # the same numbers on every machine
    shapes = [(after, before, 3, 3) for before, after in zip((3, *WIDTHS), WIDTHS)]
    drawn = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    return tuple(torch.from_numpy(w * (2 / w[0].size) ** 0.5) for w in drawn)


def convolve(images: torch.Tensor) -> torch.Tensor:
    """Return mean and standard deviation of each random filter's response.

    ``(B, 3, 128, 128)`` floats in [0, 255] to ``(B, 2 * sum(WIDTHS))``.
    """
    x, features = images / 127.5 - 1, []
    for filters in draw_filters():
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        x = F.relu(F.conv2d(padded, filters.to(x.device)))
        features += [x.mean((2, 3)), x.std((2, 3))]
        x = F.avg_pool2d(x, 2)
    return torch.cat(features, 1)


def ring_powers(images: torch.Tensor) -> torch.Tensor:
    """Return log10 of the mean power in rings of spatial frequency, coarse to fine, per channel.

    ``(B, 3, H, H)`` floats in [0, 255] to ``(B, 3 * 12)``. White noise of variance v has v in every
    ring. A Hann window keeps the borders, which do not meet, from leaking into all rings.
    """
    side = images.shape[-1]
    window = torch.hann_window(side, device=images.device)
    window = window[:, None] * window
    window = window / window.square().mean().sqrt()
    x = images - images.mean((2, 3), keepdim=True)
    power = torch.fft.fft2(x * window, norm="ortho").abs().square()
    line = torch.fft.fftfreq(side, 1 / side, device=images.device)
    radius = torch.hypot(line[:, None], line)
    rings = [(radius >= low) & (radius < high) for low, high in pairwise(RINGS)]
    means = torch.stack([power[..., ring].mean(-1) for ring in rings], 2)
    return (means + ROUNDING).log10().flatten(1)
