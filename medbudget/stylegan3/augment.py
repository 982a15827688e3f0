"""Adaptive discriminator augmentation in small, after Karras et al. 2020 (arXiv 2006.06676).

The discriminator sees every image, real or generated, through random changes of probability `p`,
and `p` follows how much it overfits. One affine map and one colour map for each image, all images
at once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def _chosen(n: int, p: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(n, generator=generator) < p


def _affine(n: int, p: float, generator: torch.Generator) -> torch.Tensor:
    """Draw maps from places in the new image to places in the old one, ``(n, 2, 3)``.

    In the units of `torch.nn.functional.affine_grid`: the image goes from -1 to 1.
    """
    turn = torch.eye(2).repeat(n, 1, 1)
    flip = _chosen(n, p, generator) & (torch.rand(n, generator=generator) < 0.5)
    turn[flip, 0] *= -1
    quarter = torch.randint(0, 4, (n,), generator=generator) * _chosen(n, p, generator)
    # Scale and rotation need an interpolation, so they come more rarely than what does not.
    scale = torch.exp2(0.2 * torch.randn(n, generator=generator) * _chosen(n, p, generator))
    rare = 1 - math.sqrt(1 - p)
    angle = (2 * torch.rand(n, generator=generator) - 1) * math.pi * _chosen(n, rare, generator)
    angle = angle + quarter * (math.pi / 2)
    cosine, sine = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    return torch.cat([rotation @ turn / scale[:, None, None], torch.zeros(n, 2, 1)], 2)


def _shift(n: int, p: float, size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw shifts of whole pixels, up to an eighth of the image, in units of `affine_grid`."""
    limit = size // 8
    pixels = torch.randint(-limit, limit + 1, (n, 2), generator=generator)
    return 2 / size * pixels * _chosen(n, p, generator)[:, None]


def _colour(n: int, p: float, generator: torch.Generator) -> torch.Tensor:
    """Draw maps of colour ``(n, 3, 4)``: brightness, contrast, saturation, in this order."""
    bright = 0.2 * torch.randn(n, generator=generator) * _chosen(n, p, generator)
    contrast = torch.exp2(0.5 * torch.randn(n, generator=generator) * _chosen(n, p, generator))
    saturation = torch.exp2(torch.randn(n, generator=generator) * _chosen(n, p, generator))
    gray = torch.full((3, 3), 1 / 3)
    matrix = gray + (torch.eye(3) - gray) * saturation[:, None, None]
    matrix = matrix * contrast[:, None, None]
    return torch.cat([matrix, matrix.sum(2, keepdim=True) * bright[:, None, None]], 2)


def augment(
    images: torch.Tensor, p: float, generator: torch.Generator, *, colour: bool = True
) -> torch.Tensor:
    """Change each of ``(B, 3, H, H) float32`` images at random, each way with probability `p`.

    Flips, quarter turns and shifts move pixels only; without `colour`, brightness, contrast and
    saturation stay. The draws come from a generator on the CPU, so that they do not depend on the
    device. With `p` 0 the images themselves come back.
    """
    if p == 0:
        return images
    n, size = len(images), images.shape[2]
    theta = _affine(n, p, generator)
    theta[:, :, 2] = _shift(n, p, size, generator)
    matrix = _colour(n, p, generator).to(images.device)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if not colour:
        return moved
    return torch.einsum("bij,bjhw->bihw", matrix[:, :, :3], moved) + matrix[:, :, 3, None, None]


def adapt(p: float, signs: float, images: int, *, target: float, images_to_one: float) -> float:
    """Return the next `p`: up where the discriminator overfits, else down.

    `signs` is the mean sign of the discriminator's logits of real images since the last change, so
    many `images` ago: the paper's r_t, 0 without and 1 with complete overfitting.
    """
    step = images / images_to_one * (1 if signs > target else -1)
    return min(max(p + step, 0.0), 1.0)
