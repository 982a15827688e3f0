"""Inpainting: repaint what a mask covers, with any base, by A1111's rule (paper, section 4.5)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medbudget.base import Base, Words
from medbudget.files import check_apart, check_output, hash_tensors, hold
from medbudget.gpu import draw_in_batches
from medbudget.images import check_images, find_images, load_images, read_record, save_images
from medbudget.masks import (
    Mask,
    blur_masks,
    check_masks,
    ellipse,
    fill_masked,
    latent_masks,
    read_mask,
)
from medbudget.pictures import open_picture
from medbudget.progress import quiet, say, tqdm
from medbudget.sampling import (
    BATCH,
    Callback,
    Condition,
    add_first,
    check_counts,
    default_steps,
    denoise,
    draw_noises,
    make_record,
    make_sigmas,
    refuse_options,
)
from medbudget.settings import check_seed

CONTENTS = ("original", "fill", "noise", "zeros")
OVERLAYS = ("plain", "a1111")


def start_step(steps: int, strength: float) -> int:
    """Return the index of the sigma to start from: of 100 steps at .75 the last 76 are done."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    return steps - int(min(strength, 0.999) * steps) - 1


def inpaint(
    base: Base,
    image: torch.Tensor,
    mask: Mask,
    prompt: str,
    *,
    embeddings: Words = (),
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
    original pixels over the result where the blurred mask is not 1. Pixels where it is 0 come back
    bit-identical. Works with every base; no inpainting model is needed.

    Parameters
    ----------
    image : torch.Tensor
        ``(N, 3, H, H) uint8``, or one image without the first axis. H must fit the base.
    mask : array, tensor or path
        1 where to repaint; see `check_masks`. Any square size, soft or binary. One mask for all
        images, one for each, or several for one image. A mask of all 1 repaints everything.
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
    steps : int, optional
        Of the whole schedule; default 25 on ``tiny``, else 100.
    seed : int
        The k-th returned image has the seed ``seed + k``.
    n : int
        Variants of each image.
    callback : callable, optional
        As in `sample`.

    Returns
    -------
    torch.Tensor
        ``(N * n, 3, H, H) uint8``, the variants of one image next to each other.

    Raises
    ------
    ValueError
        Sizes that do not fit, an empty mask, or one that is smaller than a latent cell.

    Examples
    --------
    >>> from medbudget import load_base, make_phantoms
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
    images = check_images(image[None] if image.ndim == 3 else image, name="image").cpu()
    size = images.shape[-1]
    if images.shape[-2] != size:
        raise ValueError(f"image must be square, got {tuple(images.shape[2:])} (H, W); pad it")
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
    condition = Condition.encode(base, prompt, embeddings, negative_prompt, cfg_scale)
    under = images
    if content == "fill":
        under = fill_masked(images.expand(pairs, -1, -1, -1), soft.expand(pairs, -1, -1))
    means, stds = base.encode_posterior(under)
    order = torch.arange(pairs).repeat_interleave(n)
    seeds = range(check_seed(seed, len(order)), seed + len(order))
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
            base,
            z0 + noise * sigmas[0],
            sigmas,
            timesteps,
            condition,
            noises,
            blend=lambda denoised: (1 - m) * z0 + m * denoised,
            callback=add_first(callback, first),
        )
        share = reach[of_mask][:, None]
        mixed = images[of_image] * (1 - share) + base.decode(latents) * share
        return mixed.round().clamp(0, 255).to(torch.uint8)

    return draw_in_batches(draw, len(order), batch_size, desc="inpaint")


def inpaint_to(
    folder: str | os.PathLike[str],
    base: Base,
    image: str | os.PathLike[str],
    mask: Mask | Mapping[str, Mask],
    prompt: str,
    *,
    embeddings: Words = (),
    negative_prompt: str = "",
    strength: float = 0.75,
    mask_blur: float = 4.0,
    content: str = "original",
    overlay: str = "plain",
    steps: int | None = None,
    cfg_scale: float = 2.0,
    seed: int = 0,
    n: int = 1,
    save_masks: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Repaint image files into PNG files, and go on where an earlier call was stopped.

    Each file records how it was made. Files that are there as this call would make them are kept;
    any other is refused, unless `overwrite` says so. Originals are never replaced. The other
    parameters are those of `inpaint`.

    Parameters
    ----------
    image : path
        A file or a folder. Images come out in the base's size.
    mask : mask, path, or mapping of str to mask
        One for all images; a folder with a mask for each image under its name; or several with
        names, each for all images.
    save_masks : bool
        Write each image's mask to ``FOLDER/masks`` too.

    Returns
    -------
    list of Path
        The images, variants next to each other.
    """
    folder = Path(folder)
    check_apart(folder, image, mask if isinstance(mask, str | os.PathLike) else None)
    files = find_images(image)
    steps = default_steps(base) if steps is None else steps
    check_counts(n=n, steps=steps)
    words = base.load_words(embeddings)
    if not prompt.strip():
        say("the prompt is empty: the base paints what it would without one")
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt, "strength": strength, "mask_blur": mask_blur,
        "content": content, "overlay": overlay, "steps": steps, "cfg_scale": cfg_scale,
    }  # fmt: skip
    jobs = _pair(files, mask, base.size, n)
    check_seed(seed, len(jobs))
    images = load_images(files, size=base.size)
    record = make_record(base, words, prompt=prompt, **settings)
    hashes = [hash_tensors({"image": one}) for one in images]
    records = [
        record
        | {"seed": seed + i, "image": files[which].name, "image_hash": hashes[which]}
        | {"mask_hash": hash_tensors({"mask": own})}
        for i, (_, which, own) in enumerate(jobs)
    ]
    paths = [folder / f"{name}.png" for name, _, _ in jobs]
    mask_records = [{"mask_hash": own["mask_hash"]} for own in records]
    mask_paths = [folder / "masks" / path.name for path in paths] if save_masks else []
    originals = [*files, *(find_images(mask) if isinstance(mask, str | os.PathLike) else [])]
    if replaced := {p.resolve() for p in [*paths, *mask_paths]} & {p.resolve() for p in originals}:
        raise ValueError(f"{replaced.pop()} is an original: choose another folder for the results")
    done = [
        check_output(path, own, read_record, overwrite=overwrite)
        for path, own in zip(paths, records)
    ]
    for path, own in zip(mask_paths, mask_records):
        check_output(path, own, read_record, overwrite=overwrite)
    with hold(folder), tqdm(total=len(jobs), desc="inpaint", unit="image") as bar:
        for first in range(0, len(jobs), BATCH):
            block = slice(first, min(first + BATCH, len(jobs)))
            names = [name for name, _, _ in jobs[block]]
            own_masks = torch.stack([own for _, _, own in jobs[block]])
            if not all(done[block]):
                with quiet():
                    painted = inpaint(
                        base, images[[which for _, which, _ in jobs[block]]], own_masks, prompt,
                        embeddings=words, seed=seed + first, **settings,
                    )  # fmt: skip
                save_images(painted, folder, names=names, records=records[block])
            if save_masks:
                binary = (own_masks >= 0.5)[:, None].expand(-1, 3, -1, -1)
                save_images(
                    binary.to(torch.uint8) * 255, folder / "masks", names=names,
                    records=mask_records[block],
                )  # fmt: skip
            bar.update(block.stop - first)
    return paths


def _pair(
    files: list[Path], mask: Mask | Mapping[str, Mask], size: int, n: int
) -> list[tuple[str, int, torch.Tensor]]:
    """Return name, image and mask ``(size, size)`` of every output."""
    shapes = [open_picture(file)[0].size for file in files]
    if any(max(shape) != size for shape in shapes):
        say(f"images come out with {size} pixels, the size of the base's images")
    names = _make_names(files)
    if isinstance(mask, Mapping):
        several = {name: check_masks(one, size)[0] for name, one in mask.items()}
        suffixes = [f"_{name}" for name in several] if len(several) > 1 else [""]
        pairs = [
            (f"{name}{suffix}", i, own)
            for i, name in enumerate(names)
            for suffix, own in zip(suffixes, several.values())
        ]
    elif isinstance(mask, str | os.PathLike):
        mask_files = find_images(mask)
        if Path(mask).is_dir():
            by_stem = {file.stem: file for file in mask_files}
            if len(by_stem) < len(mask_files):
                raise ValueError(f"two masks in {mask} have the same name but for their endings")
            if missing := sorted({file.stem for file in files} - set(by_stem)):
                raise ValueError(f"{mask} has no mask for {', '.join(missing[:5])}")
            mask_files = [by_stem[file.stem] for file in files]
        else:
            mask_files = mask_files * len(files)
        for file, own, shape in zip(files, mask_files, shapes):
            wide, high = open_picture(own)[0].size
            if abs(wide * shape[1] - high * shape[0]) > max(wide, high, *shape):
                raise ValueError(
                    f"mask {own} has {wide} x {high} pixels (width x height), image {file} has "
                    f"{shape[0]} x {shape[1]}: draw it on the image itself"
                )
        read = {own: check_masks(read_mask(own, size=size))[0] for own in set(mask_files)}
        pairs = [(name, i, read[mask_files[i]]) for i, name in enumerate(names)]
    else:
        pairs = [(name, i, check_masks(mask, size)[0]) for i, name in enumerate(names)]
    if n > 1:
        pairs = [(f"{name}_{k}", i, own) for name, i, own in pairs for k in range(n)]
    if twice := [
        name for name, count in Counter(name for name, _, _ in pairs).items() if count > 1
    ]:
        raise ValueError(f"two images would be written to {twice[0]}.png: rename one of them")
    return pairs


def _make_names(files: list[Path]) -> list[str]:
    """Return the stem of each file, with its ending where two have the same stem."""
    counts = Counter(file.stem for file in files)
    return [
        file.stem if counts[file.stem] == 1 else f"{file.stem}_{file.suffix[1:]}" for file in files
    ]


__all__ = ["check_masks", "ellipse", "inpaint", "inpaint_to", "start_step"]
