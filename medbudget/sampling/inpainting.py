"""Inpainting: repaint what a mask covers, with any base, by A1111's rule (paper, section 4.5)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medbudget.adapters import Adapters
from medbudget.base import Base, Words
from medbudget.gpu import draw_in_batches
from medbudget.images import check_square, find_images
from medbudget.pictures import open_picture
from medbudget.progress import say
from medbudget.sampling.masks import (
    Mask,
    blur_masks,
    check_masks,
    fill_masked,
    latent_masks,
    read_mask,
)
from medbudget.sampling.sampler import (
    BATCH,
    Callback,
    Condition,
    default_steps,
    denoise,
    draw_noises,
    make_sigmas,
    refuse_options,
)
from medbudget.settings import check_counts, check_number, list_seeds

CONTENTS = ("original", "fill", "noise", "zeros")
OVERLAYS = ("plain", "a1111")


def start_step(steps: int, strength: float) -> int:
    """Return the index of the sigma to start from: of 100 steps at .75 the last 76 are done."""
    check_number("strength", strength, 0, 1)
    return steps - int(min(strength, 0.999) * steps) - 1


def inpaint(
    base: Base,
    image: torch.Tensor,
    mask: Mask,
    prompt: str,
    *,
    embeddings: Words = (),
    adapters: Adapters = (),
    negative_prompt: str = "",
    strength: float = 0.75,
    mask_blur: float = 4.0,
    content: str = "original",
    overlay: str = "plain",
    steps: int | None = None,
    cfg_scale: float = 2.0,
    seed: int = 0,
    n: int = 1,
    batch_size: int = BATCH,
    callback: Callback | None = None,
    **others: Any,
) -> torch.Tensor:
    """Repaint what `mask` covers so that it fits the prompt (paper, section 4.5).

    A1111's rule: blur the mask, round it on the latent grid to ``m``, start from the noised image
    ``z0``, replace the denoised prediction D of every step by ``(1 - m) z0 + m D``, and lay the
    original pixels over the result where the blurred mask is not 1: bit-identical where it is 0.

    Parameters
    ----------
    image : torch.Tensor
        ``(N, 3, H, H) uint8``, or one image without the first axis. H must fit the base.
    mask : array, tensor or path
        1 where to repaint; see `check_masks`. Any square size. One mask for all images, one for
        each, or several for one image.
    strength : float
        Share of the noise schedule, 0 to 1: how far the covered part may leave the original.
    mask_blur : float
        Standard deviation in pixels of a 512-pixel image, scaled to this one's size.
    content : {"original", "fill", "noise", "zeros"}
        What stands under the mask at the start: the image, colours of its surroundings, latent
        noise, or latent zeros. The last two want a strength near 1.
    overlay : {"plain", "a1111"}
        How far the painted pixels reach: as far as the blurred mask; or, as in A1111, twice the
        blurred mask, clipped, which paints a lesion of 20 pixels' radius about a third larger.
    n : int
        Variants of each image, which come next to each other: ``(N * n, 3, H, H)``; the k-th has
        the seed ``seed + k``. The other parameters are those of `sample`.

    Examples
    --------
    >>> from medbudget import ellipse, load_base, make_phantoms
    >>> base = load_base("tiny", device="cpu")
    >>> image = make_phantoms("prostate", "healthy", 1).images
    >>> mask = ellipse((0.5, 0.55), (0.15, 0.1))
    >>> painted = inpaint(base, image, mask, "blue ellipse", steps=3)
    >>> changed = (painted != image).any(1)[0]
    >>> changed.any().item(), changed[:16].any().item()  # under the mask; far from it
    (True, False)
    """
    refuse_options("inpaint", others)
    for name, value, allowed in (("content", content, CONTENTS), ("overlay", overlay, OVERLAYS)):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; allowed are {', '.join(allowed)}")
    steps = default_steps(base) if steps is None else steps
    check_counts(n=n, steps=steps, batch_size=batch_size)
    images = check_square(image[None] if image.ndim == 3 else image).cpu()
    size = images.shape[-1]
    shape = base.latent_shape(size)
    soft = blur_masks(check_masks(mask, size), mask_blur)
    cells = latent_masks(soft, shape[1:])
    pairs = max(len(images), len(soft))
    if {len(images), len(soft)} - {1, pairs}:
        raise ValueError(
            f"{len(images)} images and {len(soft)} masks: give one for all, or one for each"
        )
    first_step = start_step(steps, strength)
    sigmas, timesteps = (part[first_step:] for part in make_sigmas(base.alphas_cumprod, steps))
    condition = Condition.encode(base, prompt, embeddings, negative_prompt, cfg_scale, adapters)
    under = images
    if content == "fill":
        under = fill_masked(images.expand(pairs, -1, -1, -1), soft.expand(pairs, -1, -1))
    means, stds = base.encode_posterior(under)
    order = torch.arange(pairs).repeat_interleave(n)
    seeds = list_seeds(seed, len(order))
    reach = (2 * soft).clamp(max=1) if overlay == "a1111" else soft

    def draw(first: int, count: int) -> torch.Tensor:
        which = order[first : first + count]
        of_image, of_mask, of_under = (which % len(x) for x in (images, soft, under))
        noises = draw_noises(seeds[first : first + count], shape, base.device)
        m = cells[of_mask].to(base.device)
        z0 = means[of_under] + stds[of_under] * next(noises)
        noise = next(noises)
        if content in ("noise", "zeros"):
            z0 = (1 - m) * z0 + (m * next(noises) if content == "noise" else 0)
        latents = denoise(
            base, z0 + noise * sigmas[0], sigmas, timesteps, condition, noises,
            blend=lambda denoised: (1 - m) * z0 + m * denoised, callback=callback,
            first=first,
        )  # fmt: skip
        share = reach[of_mask][:, None]
        mixed = images[of_image] * (1 - share) + base.decode(latents) * share
        return mixed.round().clamp(0, 255).to(torch.uint8)

    return draw_in_batches(draw, len(order), batch_size, desc="inpaint")


def pair_masks(
    files: list[Path], mask: Mask | Mapping[str, Mask], size: int, n: int
) -> list[tuple[str, int, torch.Tensor]]:
    """Return name, image and mask ``(size, size)`` of every output."""
    if any(max(open_picture(file)[0].size) != size for file in files):
        say(f"images come out with {size} pixels, the size of the base's images")
    if isinstance(mask, str | os.PathLike):
        own = [{"": one} for one in _read_masks(Path(mask), files, size)]
    else:
        if not isinstance(mask, Mapping):
            mask = {str(i): one for i, one in enumerate(check_masks(mask, size))}
        suffix = "_{}" if len(mask) > 1 else ""
        named = {suffix.format(name): check_masks(one, size)[0] for name, one in mask.items()}
        own = [named] * len(files)
    counts = Counter(file.stem for file in files)
    jobs = [
        (stem + suffix + (f"_{k}" if n > 1 else ""), i, covered)
        for i, file in enumerate(files)
        for stem in (file.stem if counts[file.stem] == 1 else f"{file.stem}_{file.suffix[1:]}",)
        for suffix, covered in own[i].items()
        for k in range(n)
    ]
    name, times = Counter(name for name, _, _ in jobs).most_common(1)[0]
    if times > 1:
        raise ValueError(f"two images would be written to {name}.png: rename one of them")
    return jobs


def _read_masks(mask: Path, files: list[Path], size: int) -> list[torch.Tensor]:
    """Return the mask of each image: one for all, or that of its name in a folder."""
    found = find_images(mask)
    by_stem = {file.stem: file for file in found}
    if len(by_stem) < len(found):
        raise ValueError(f"two masks in {mask} have the same name but for their endings")
    if not mask.is_dir():
        by_stem = {file.stem: mask for file in files}
    if missing := sorted({file.stem for file in files} - set(by_stem)):
        raise ValueError(f"{mask} has no mask for {', '.join(missing[:5])}")
    for file in files:
        shape, (wide, high) = (open_picture(p)[0].size for p in (file, by_stem[file.stem]))
        if abs(wide * shape[1] - high * shape[0]) > max(wide, high, *shape):
            raise ValueError(
                f"mask {by_stem[file.stem]} has {wide} x {high} pixels (width x height), image "
                f"{file} has {shape[0]} x {shape[1]}: draw it on the image itself"
            )
    return [check_masks(read_mask(by_stem[file.stem], size=size))[0] for file in files]
