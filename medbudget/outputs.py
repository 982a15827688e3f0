"""Draw into files, and go on where an earlier call was stopped.

What is there as a call would make it is kept; anything else is refused, unless `overwrite` says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from medbudget.adapters import Adapters, AnyAdapter
from medbudget.base import Base, Word, Words, choose_speed
from medbudget.files import (
    PathLike,
    atomic_path,
    check_apart,
    check_output,
    hash_tensors,
    hold,
)
from medbudget.images import (
    SHEET,
    check_folder,
    find_images,
    load_images,
    make_grid,
    read_record,
    save_images,
    to_pil,
)
from medbudget.progress import quiet, say, tqdm
from medbudget.sampling.composition import axis_prompts
from medbudget.sampling.inpainting import inpaint, pair_masks
from medbudget.sampling.masks import Mask
from medbudget.sampling.sampler import (
    BATCH,
    Condition,
    default_steps,
    draw_images,
    load_all,
    make_record,
    refuse_options,
)
from medbudget.settings import check_counts, list_seeds

MOST = 100_000  # images in one folder
IS_SHEET = {"contact_sheet": True}
INPAINTING = (
    "negative_prompt", "strength", "mask_blur", "content", "overlay", "steps", "cfg_scale",
)  # fmt: skip


def sample_to(
    folder: PathLike, base: Base, prompt: str, *, embeddings: Words = (),
    adapters: Adapters = (), negative_prompt: str = "", n: int = 16, steps: int | None = None,
    cfg_scale: float = 2.0, seed: int = 0, size: int | None = None, fast: bool | None = None,
    overwrite: bool = False,
) -> list[Path]:  # fmt: skip
    """Draw images into PNG files ``00000.png`` …, and return their paths.

    Each file records how it was made. ``contact_sheet.png`` shows the first 64. The parameters are
    those of `sample`.
    """
    folder = Path(folder)
    steps = default_steps(base) if steps is None else steps
    check_counts(n=n, steps=steps)
    if n > MOST:
        raise ValueError(f"n must be at most {MOST} in one folder, got {n}: use several folders")
    seeds, shape = list_seeds(seed, n), base.latent_shape(size)
    words, loaded = load_all(base, embeddings, adapters)
    condition = Condition.encode(base, prompt, words, negative_prompt, cfg_scale, loaded)
    if not prompt.strip():
        say("the prompt is empty: the images show what the base draws without one")
    settings = {"prompt": prompt, "negative_prompt": negative_prompt, "steps": steps}
    record = make_record(base, words, loaded, **settings, cfg_scale=cfg_scale)
    if size not in (None, base.size):
        record |= {"size": size}
    records = {f"{i:05d}.png": record | {"seed": own} for i, own in enumerate(seeds)}
    done = check_folder(folder, records, overwrite=overwrite)
    check_output(folder / SHEET, IS_SHEET, read_record, overwrite=overwrite)
    base = choose_speed(base, fast, n - sum(done))
    condition = condition.match(base)

    def draw(block: slice) -> torch.Tensor:
        return draw_images(base, condition, steps, shape, seeds[block])

    paths = _save_blocks(folder, records, done, draw, desc="sample")
    _save_sheet(folder, load_images(paths[:64], size=min(128, size or base.size)))
    return paths


def interpolate_to(
    folder: PathLike, base: Base, a: Word | AnyAdapter, b: Word | AnyAdapter, *,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), method: str = "and", n: int = 4,
    adapters: Adapters = (), gif: bool = False, overwrite: bool = False, **options: Any,
) -> list[Path]:  # fmt: skip
    """Draw images on the way from `a` to `b` into a folder for each share of `b`; return these.

    ``contact_sheet.png`` has a row for each image and a column for each share, and ``axis.gif``,
    if `gif`, goes there and back. The parameters are those of `interpolate`, the others those of
    `sample_to`.
    """
    folder = Path(folder)
    axis = axis_prompts(base, a, b, weights, method, adapters)
    sheets = [SHEET, "axis.gif"] if gif else [SHEET]
    for name, read in zip(sheets, (read_record, _read_comment)):
        check_output(folder / name, IS_SHEET, read, overwrite=overwrite)
    images = {}
    for share, (prompt, words, own) in axis.items():
        part = folder / f"{share:g}"
        paths = sample_to(
            part, base, prompt, embeddings=words, adapters=own, n=n, overwrite=overwrite, **options
        )
        images[part] = load_images(paths)
    columns = torch.stack([*images.values()], 1)
    _save_sheet(folder, columns[:8].flatten(0, 1), columns=len(axis))
    if gif:
        way = [to_pil(make_grid(one, columns=4)) for one in images.values()]
        with atomic_path(folder / "axis.gif") as temporary:
            way[0].save(
                temporary, format="GIF", save_all=True, append_images=way[1:] + way[-2:0:-1],
                duration=400, loop=0, comment=b"medbudget",
            )  # fmt: skip
    return [*images]


def inpaint_to(
    folder: PathLike, base: Base, image: PathLike, mask: Mask | Mapping[str, Mask], prompt: str, *,
    embeddings: Words = (), adapters: Adapters = (), seed: int = 0, n: int = 1,
    save_masks: bool = False, overwrite: bool = False, **options: Any,
) -> list[Path]:  # fmt: skip
    """Repaint image files into PNG files, and return their paths, variants next to each other.

    `image` is a file or a folder; images come out in the base's size. `mask` is one for all images,
    a folder with a mask for each image under its name, or several with names, each for all images;
    `save_masks` writes each image's mask to ``FOLDER/masks`` too. The `options` are those of
    `inpaint`.
    """
    folder = Path(folder)
    masked = mask if isinstance(mask, str | os.PathLike) else None
    check_apart(folder, image, masked)
    files = find_images(image)
    defaults = signature(inpaint).parameters
    settings = {key: options.pop(key, defaults[key].default) for key in INPAINTING}
    refuse_options("inpaint", options)
    settings["steps"] = settings["steps"] or default_steps(base)
    check_counts(n=n, steps=settings["steps"])
    words, loaded = load_all(base, embeddings, adapters)
    if not prompt.strip():
        say("the prompt is empty: the base paints what it would without one")
    jobs = pair_masks(files, mask, base.size, n)
    seeds = list_seeds(seed, len(jobs))
    images = load_images(files, size=base.size)
    record = make_record(base, words, loaded, prompt=prompt, **settings)
    hashes = [hash_tensors({"image": one}) for one in images]
    records = {
        f"{name}.png": record
        | {"seed": own, "image": files[i].name, "image_hash": hashes[i]}
        | {"mask_hash": hash_tensors({"mask": covered})}
        for own, (name, i, covered) in zip(seeds, jobs)
    }
    mask_records = {
        name: {"mask_hash": own["mask_hash"]} for name, own in records.items() if save_masks
    }
    results = [folder / name for name in records] + [folder / "masks" / x for x in mask_records]
    originals = [*files, *(find_images(masked) if masked else [])]
    if replaced := {p.resolve() for p in results} & {p.resolve() for p in originals}:
        raise ValueError(f"{replaced.pop()} is an original: choose another folder for the results")
    done = check_folder(folder, records, overwrite=overwrite)
    masks_done = [
        check_output(folder / "masks" / name, own, read_record, overwrite=overwrite)
        for name, own in mask_records.items()
    ]

    def draw(block: slice) -> torch.Tensor:
        _, which, masks = zip(*jobs[block])
        return inpaint(
            base, images[list(which)], torch.stack(masks), prompt, embeddings=words,
            adapters=loaded, seed=seeds[block][0], **settings,
        )  # fmt: skip

    def draw_masks(block: slice) -> torch.Tensor:
        masks = torch.stack([covered for *_, covered in jobs[block]])
        return (masks >= 0.5)[:, None].expand(-1, 3, -1, -1).to(torch.uint8) * 255

    if save_masks:
        _save_blocks(folder / "masks", mask_records, masks_done, draw_masks, desc="masks")
    return _save_blocks(folder, records, done, draw, desc="inpaint")


def _save_blocks(
    folder: Path, records: Mapping[str, dict[str, Any]], done: Sequence[bool],
    draw: Callable[[slice], torch.Tensor], *, desc: str,
) -> list[Path]:  # fmt: skip
    """Write what ``draw(block)`` returns, for every block of files that is not `done` already."""
    paths = [folder / name for name in records]
    with hold(folder), tqdm(total=len(paths), desc=desc, unit="image") as bar:
        for first in range(0, len(paths), BATCH):
            block = slice(first, first + BATCH)
            if not all(done[block]):
                with quiet():
                    images = draw(block)
                names = [path.stem for path in paths[block]]
                save_images(images, folder, names=names, records=[*records.values()][block])
            bar.update(len(paths[block]))
    return paths


def _save_sheet(folder: Path, images: torch.Tensor, *, columns: int = 8) -> None:
    """Write ``contact_sheet.png``, which `load_images` passes over; small images are enlarged."""
    zoom = max(1, 128 // images.shape[-1])
    large = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    sheet = make_grid(large, columns=columns)[None]
    save_images(sheet, folder, names=[Path(SHEET).stem], records=[IS_SHEET])


def _read_comment(path: Path) -> Mapping[str, Any] | None:
    """Return `IS_SHEET` for a GIF of ours."""
    return IS_SHEET if b"medbudget" in path.read_bytes()[:2000] else None
