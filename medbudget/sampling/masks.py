"""Masks of inpainting: draw, read, blur and fill them, and judge the seams of what was painted."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter

from medbudget.images import check_images, fit_square
from medbudget.pictures import ImageError, open_picture
from medbudget.settings import check_number

BLUR_AT = 512  # pixels of the images for which `mask_blur` is given
Mask: TypeAlias = "torch.Tensor | npt.NDArray[Any] | str | os.PathLike[str]"


def ellipse(
    center: Sequence[float], radii: Sequence[float] | float, *, angle: float = 0.0, size: int = 512
) -> torch.Tensor:
    """Return a mask in the shape of an ellipse, ``(size, size) float32`` from 0 to 1.

    `center` is x to the right and y down, `radii` half the width and half the height or the radius of
    a circle, all in fractions of the image's edge; `angle` is in radians, clockwise as seen; `size`
    in pixels, any, as `inpaint` resizes masks to its images.

    Examples
    --------
    >>> mask = ellipse((0.5, 0.5), (0.25, 0.25), size=64)
    >>> tuple(mask.shape), round(mask.mean().item(), 3)  # π / 16 of the image
    ((64, 64), 0.196)
    """
    (x, y), (a, b) = center, (radii, radii) if isinstance(radii, int | float) else radii
    if not (abs(x) <= 2 and abs(y) <= 2 and 0 < a <= 2 and 0 < b <= 2 and math.isfinite(angle)):
        raise ValueError(
            f"an ellipse is given in fractions of the edge, not in pixels, got center={center}, "
            f"radii={radii}, angle={angle}; write e.g. (0.5, 0.6), (0.1, 0.08)"
        )
    line = (torch.arange(size) + 0.5) / size
    dx, dy = line[None, :] - x, line[:, None] - y
    u = (math.cos(angle) * dx + math.sin(angle) * dy) / a
    v = (math.cos(angle) * dy - math.sin(angle) * dx) / b
    r = (u**2 + v**2).sqrt()
    slope = ((u / a) ** 2 + (v / b) ** 2).sqrt() / r.clamp(min=1e-6)  # of r, per unit of length
    return (0.5 + (1 - r) / slope.clamp(min=1e-6) * size).clamp(0, 1)


def brush_mask(
    strokes: Iterable[tuple[Sequence[Sequence[float]], float]], *, size: int
) -> torch.Tensor:
    """Return the mask of strokes with a round brush, ``(size, size) float32`` of 0 and 1.

    A stroke is points ``(x, y)`` and the brush's radius, in fractions of the image's edge.
    """
    line = (torch.arange(size) + 0.5) / size
    x, y = line[None, :], line[:, None]
    mask = torch.zeros(size, size)
    for points, radius in strokes:
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[-1]]):
            dx, dy = bx - ax, by - ay
            along = ((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, 1e-12)
            along = along.clamp(0, 1)
            near = (x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2 <= radius**2
            mask[near] = 1
    return mask


def read_mask(path: str | os.PathLike[str], *, size: int | None = None) -> torch.Tensor:
    """Read a mask file as ``(H, W) float32``, from 0 (keep) to 1 (repaint).

    White on black, labels 0 and 1, one colour on black, or one colour on transparency; several
    colours, shades all over (a picture) and more than 8 bits raise ImageError. With `size`, it is
    fitted into a square as `load_image` fits an image.
    """
    try:
        image, _ = open_picture(path)
    except ImageError as error:
        raise ImageError(f"{path} {error}") from None
    usable = image.mode in ("L", "RGB", "RGBA")
    pixels = np.asarray(image.convert("RGBA"))
    colours = np.unique(pixels[pixels[..., 3] > 0][:, :3], axis=0)
    gray = pixels[..., 0]
    if image.mode == "RGBA":
        gray = pixels[..., 3]
        usable &= len(colours) <= 1
    elif (colours != colours[:, :1]).any():
        gray = np.where((pixels[..., :3] == 0).all(-1), 0, 255)
        usable &= len(colours) <= 2 and not colours[0].any()  # they are sorted: black comes first
    elif gray.max() == 1:
        gray = gray * 255
    else:  # neither labels without white nor a picture's shades all over
        usable &= not 0 < gray.max() < 128 and ((gray > 25) & (gray < 230)).mean() <= 0.5
    if not usable:
        raise ImageError(
            f"{path} is no mask ({image.mode}, {len(colours)} colours, highest value {gray.max()}): "
            "a mask is white where to repaint, black elsewhere, 8 bits"
        )
    mask = Image.fromarray(gray.astype(np.uint8))
    if size is not None:
        mask = fit_square(mask, size)
    return torch.from_numpy(np.asarray(mask).astype(np.float32) / 255)


def check_masks(mask: Mask, size: int | None = None) -> torch.Tensor:
    """Return one or several masks as ``(M, H, W) float32`` from 0 (keep) to 1 (repaint).

    They are ``(H, W)`` or ``(M, H, W)``: bool, integers 0/1 or 0..255, floats 0..1; or a file, see
    `read_mask`. Square masks are brought to `size` pixels, with soft borders.
    """
    if isinstance(mask, str | os.PathLike):
        mask = read_mask(mask)
    values = torch.as_tensor(mask)
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(
            f"a mask must have shape (H, W) or (M, H, W), got {tuple(values.shape)}; take one "
            "channel of an image"
        )
    if values.dtype != torch.bool and not values.is_floating_point():
        values = values.double() / (255 if values.max() > 1 else 1)
    values = values.float()
    if not ((values >= 0) & (values <= 1)).all():  # NaN neither
        raise ValueError(
            "a mask must have values from 0 (keep) to 1 (repaint), or integers up to 255"
        )
    if size is not None and values.shape[1:] != (size, size):
        if values.shape[1] != values.shape[2]:
            raise ValueError(
                f"the mask has {tuple(values.shape[1:])} pixels (H, W), the image is a square of "
                f"{size}; crop or pad the mask as the image was"
            )
        values = F.interpolate(
            values[:, None], size=(size, size), mode="bilinear", antialias=True
        ).clamp(0, 1)[:, 0]
    if empty := [i for i, one in enumerate(values) if one.max() < 0.5]:
        raise ValueError(f"mask {empty[0]} is empty: it covers no pixel by half; draw a larger one")
    return values


def blur_masks(masks: torch.Tensor, mask_blur: float) -> torch.Tensor:
    """Blur ``(M, H, W)`` masks; `mask_blur` is a standard deviation at 512 pixels.

    The Gaussian is cut at 4 standard deviations: farther out a mask is exactly 0.
    """
    check_number("mask_blur", mask_blur, 0)
    sigma = mask_blur * masks.shape[-1] / BLUR_AT
    if sigma == 0:
        return masks
    blurred = gaussian_filter(masks.numpy(), (0, sigma, sigma), mode="nearest", truncate=4)
    return torch.from_numpy(blurred).clamp(0, 1)


def latent_masks(masks: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Resize blurred masks to the latent grid and round them: ``(M, 1, h, w) float32`` of 0 and 1."""
    small = F.interpolate(masks[:, None], size=tuple(shape), mode="bicubic", antialias=True)
    small = small.round().clamp(0, 1)
    if empty := [i for i, one in enumerate(small) if not one.any()]:
        raise ValueError(
            f"mask {empty[0]} vanishes on the latent grid of {shape[0]}x{shape[1]} cells; draw a "
            "larger one, or lower mask_blur"
        )
    return small


def fill_masked(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Fill what masks cover with colours of the surroundings: ``(N, 3, H, W) uint8`` both ways.

    Averages over the uncovered pixels, from wide to narrow; a narrower one counts as far as it
    sees uncovered pixels.
    """
    out = np.empty(images.shape, np.float32)
    for i, (image, mask) in enumerate(zip(images.numpy().astype(np.float32), masks.numpy())):
        keep = 1 - mask
        total = keep.sum()
        mean = (image * keep).sum((1, 2)) / total if total > 0.5 else np.full(3, 127.5)
        filled: npt.NDArray[np.floating] = np.broadcast_to(mean[:, None, None], image.shape)
        for share in (0.5, 0.125, 0.03, 0.008):
            sigma = share * image.shape[-1]
            seen = gaussian_filter(keep, sigma)
            colour = gaussian_filter(image * keep, (0, sigma, sigma)) / np.maximum(seen, 1e-6)
            filled = (filled + np.clip(seen, 0, 1) * (colour - filled)).astype(np.float32)
        out[i] = image * keep + filled * mask
    return torch.from_numpy(np.rint(np.clip(out, 0, 255)).astype(np.uint8))


def seam_ratio(images: torch.Tensor, mask: Mask) -> npt.NDArray[np.float64]:
    """Return how much a mask's border stands out, ``(N,)``: 1 is not at all.

    The mean step between neighbouring pixels (gray levels, root of the sum of squares over both
    directions, mean of the channels) on the border, two pixels wide, over that of the pixels up to
    three away from it on both sides.

    `images` are ``(N, 3, H, H) uint8``; one mask for all of them or one for each.
    """
    check_images(images)
    masks = check_masks(mask, images.shape[-1]).numpy() >= 0.5
    if len(masks) not in (1, len(images)):
        raise ValueError(f"{len(images)} images and {len(masks)} masks: one for all or each")
    down, right = np.gradient(images.cpu().numpy().astype(np.float64), axis=(2, 3))
    steepness = np.hypot(down, right).mean(1)
    ratios = []
    for i, steps in enumerate(steepness):
        inside = masks[i % len(masks)]
        border = binary_dilation(inside) & ~binary_erosion(inside, border_value=1)
        near = binary_dilation(border, iterations=3) & ~border
        if not near.any() or not border.any():
            raise ValueError(f"mask {i % len(masks)} has no border inside the image")
        ratios.append(steps[border].mean() / max(steps[near].mean(), 1e-9))
    return np.array(ratios)
