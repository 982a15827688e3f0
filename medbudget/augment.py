"""Augmentation of a batch at once, on its device, with every sample's own draws.

What de Wilde et al. (2024) did with albumentations 1.3.0 at their level "heavy": in their order,
flip, noise, gamma, shift + scale + rotation, contrast and brightness, optical distortion, dropped
channel. Here both warps are one resampling, and contrast follows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Augmentation:
    """How strong each transformation is; the defaults are the paper's "heavy", 0 (gamma 1) is none."""

    flip: float = 0.5  # probability of a left-right flip
    noise: float = 0.1  # largest variance, of images in [0, 1]; each sample draws its own
    gamma: float = 0.1  # smallest exponent, up to 1: smaller is brighter
    shift: float = 0.1  # largest, as a share of the edge
    scale: float = 0.2  # largest change of size
    rotate: float = 45.0  # largest, degrees
    distortion: float = 0.05  # largest coefficient of the radial distortion, of either sign
    contrast: float = 0.2  # largest change of the factor 1
    brightness: float = 0.2  # largest change of the offset 0
    drop_channel: float = 0.8  # probability that one channel is set to 0


HEAVY = Augmentation()
NONE = Augmentation(
    flip=0, noise=0, gamma=1, shift=0, scale=0, rotate=0, distortion=0, contrast=0, brightness=0,
    drop_channel=0,
)  # fmt: skip
LEVELS = {"heavy": HEAVY, "none": NONE}


@dataclass(frozen=True, eq=False)
class Draws:
    """What each of B samples undergoes; tensors ``(B,)``."""

    flip: torch.Tensor  # bool
    variance: torch.Tensor  # of the noise
    gamma: torch.Tensor  # exponent
    angle: torch.Tensor  # radians, counter-clockwise
    scale: torch.Tensor  # factor; above 1 enlarges
    shift: torch.Tensor  # (B, 2): x, y as shares of width and height
    distortion: torch.Tensor  # coefficient of the radial distortion
    contrast: torch.Tensor  # factor
    brightness: torch.Tensor  # offset
    dropped: torch.Tensor  # int64: the channel that is set to 0, or -1


def draw_augmentation(
    n: int, settings: Augmentation = HEAVY, *, generator: torch.Generator
) -> Draws:
    """Draw what `n` samples undergo, each on its own, on the generator's device."""
    u = torch.rand(12, n, generator=generator, device=generator.device)
    signed = 2 * u - 1
    channel = (3 * u[10]).long().clamp(max=2)
    return Draws(
        flip=u[0] < settings.flip,
        variance=u[1] * settings.noise,
        gamma=1 - u[2] * (1 - settings.gamma),
        angle=signed[3] * (settings.rotate * torch.pi / 180),
        scale=1 + signed[4] * settings.scale,
        shift=signed[5:7].T * settings.shift,
        distortion=signed[7] * settings.distortion,
        contrast=1 + signed[8] * settings.contrast,
        brightness=signed[9] * settings.brightness,
        dropped=torch.where(u[11] < settings.drop_channel, channel, -1),
    )


def warp(
    images: torch.Tensor, *, angle: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor,
    distortion: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Rotate, scale and shift about the centre, then distort radially: one bilinear resampling.

    With d from the centre as a share of the width, output at d shows what the moved image has at
    d (1 + k |d|^2 + k |d|^4). What lies outside is mirrored at the centre of the border pixels.
    Images are ``(B, C, H, W)`` floats; the draws are those of `Draws`.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    square = (x[None, :] ** 2 + y[:, None] ** 2) / width**2

    def each(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 1, 1)

    factor = 1 + each(distortion) * (square + square**2)
    dx = x * factor - each(shift[:, 0] * width)
    dy = y[:, None] * factor - each(shift[:, 1] * height)
    cos, sin = each(angle.cos() / scale), each(angle.sin() / scale)
    # y points down, so that a counter-clockwise turn has these signs; in grid_sample's units
    grid = torch.stack(
        [
            (cos * dx - sin * dy) * (2 / max(width - 1, 1)),
            (sin * dx + cos * dy) * (2 / max(height - 1, 1)),
        ],
        -1,
    )
    return F.grid_sample(
        images, grid.to(images.dtype), mode="bilinear", padding_mode="reflection",
        align_corners=True,
    )  # fmt: skip


def augment(
    images: torch.Tensor, settings: Augmentation = HEAVY, *, generator: torch.Generator
) -> torch.Tensor:
    """Augment ``(B, 3, H, W)`` floats in [0, 1]; the same generator state gives the same result."""
    if not images.is_floating_point() or images.ndim != 4:
        raise ValueError(
            f"images must be float (B, C, H, W) in [0, 1], got {images.dtype} "
            f"{tuple(images.shape)}; divide uint8 images by 255"
        )
    draws = draw_augmentation(len(images), settings, generator=generator)

    def each(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 1, 1, 1)

    if settings.flip:
        images = torch.where(each(draws.flip), images.flip(3), images)
    if settings.noise:
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        images = noise.mul_(each(draws.variance.sqrt())).add_(images).clamp_(0, 1)
    if settings.gamma < 1:
        images = images ** each(draws.gamma)
    if settings.shift or settings.scale or settings.rotate or settings.distortion:
        images = warp(
            images, angle=draws.angle, scale=draws.scale, shift=draws.shift,
            distortion=draws.distortion,
        )  # fmt: skip
    if settings.contrast or settings.brightness:
        images = (images * each(draws.contrast)).add_(each(draws.brightness)).clamp_(0, 1)
    if settings.drop_channel:
        keep = torch.arange(images.shape[1], device=images.device) != draws.dropped[:, None]
        images = images * keep[:, :, None, None].to(images.dtype)
    return images
