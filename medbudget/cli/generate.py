"""medbudget phantoms, sample, interpolate, inpaint, describe: make images, and say what they show.

What a command returns are settings in force that the command line did not give; see `write_settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from medbudget.cli.options import BaseOptions, Drawing, Paths, Seed, Text, Words, load_checked

DEFAULT = BaseOptions()
DRAWING = Drawing()


def phantoms(
    out: Path, /, *, kind: Text = "prostate", label: Words = None, n: int = 100, size: int = 64,
    seed: Seed = 0, split: Text = "train", overwrite: bool = False,
) -> None:  # fmt: skip
    """Draw procedural stand-ins for medical images (phantoms).

    Args:
        out: folder to write PNG files to
        kind: prostate, chest or histology
        label: e.g. healthy; several for combined chest diseases
        n: number of images
        size: pixels of an edge
        split: train, val or test: they never overlap
        overwrite: replace other images that are there
    """
    from medbudget.data.phantoms import KINDS, make_phantoms
    from medbudget.images import check_folder, save_images
    from medbudget.progress import count

    labels = tuple(label) if label else (KINDS[kind][0],) if kind in KINDS else ("",)
    drawn = make_phantoms(kind, labels, n, size=size, seed=seed, split=split)
    about = {"phantoms": kind, "split": split, "size": size, "drawn_with": seed}
    records = {f"{i:05d}.png": {**about, "labels": [*labels], "number": i} for i in range(n)}
    check_folder(out, records, overwrite=overwrite)
    save_images(drawn.images, out, records=[*records.values()])
    print(f"wrote {count(n, f'{kind} phantom')} ({drawn.labels[0]}, {split}) to {out}")


def sample(
    prompt: Text, /, *, out: Path, embeddings: Paths = None, n: int = 16,
    negative_prompt: Text = "", options: Drawing = DRAWING,
) -> dict[str, Any]:  # fmt: skip
    """Generate images from a prompt, and a contact sheet; when stopped, the same command goes on.

    Args:
        prompt: e.g. "<mine>" or "<a>:0.5 AND <b>:0.5"
        out: folder for the PNG files
        embeddings: embedding file; repeatable
        n: number of images
        negative_prompt: what to guide away from
    """
    from medbudget.images import SHEET
    from medbudget.outputs import sample_to
    from medbudget.progress import count
    from medbudget.sampling.sampler import total_guidance

    words = embeddings or []
    there = set() if options.overwrite else set(out.glob("*.png"))
    paths, in_force = _draw(
        sample_to, options, out, prompt, prompt=prompt, words=words, embeddings=words, n=n,
        negative_prompt=negative_prompt, fast=options.fast,
    )  # fmt: skip
    kept = f", {len(there & set(paths))} of them kept" if there & set(paths) else ""
    guidance = total_guidance(prompt, options.cfg_scale)
    print(f"{count(n, 'synthetic image')} in {out}{kept}; total guidance {guidance:g}")
    print(f"look at {out / SHEET}")
    return in_force


def interpolate(
    a: Path, b: Path, /, *, out: Path, weights: Text = "0,0.25,0.5,0.75,1", method: Text = "and",
    n: int = 4, gif: bool = False, options: Drawing = DRAWING,
) -> dict[str, Any]:  # fmt: skip
    """Generate images on the way from one embedding to another, with the same noise at each share.

    Args:
        a: embedding file, or that of an adapter with a word
        b: embedding file, or that of an adapter with a word
        out: folder for a contact sheet, and for a folder of PNG files for each share
        weights: shares of B; that of A is the rest to 1
        method: and: compose predictions, as the paper does; or vectors: mix the embeddings
        n: images at each share
        gif: also write OUT/axis.gif
    """
    from medbudget.outputs import interpolate_to
    from medbudget.progress import count

    shares = _parse_numbers("--weights", weights, "shares such as 0,0.5,1")
    folders, in_force = _draw(
        interpolate_to, options, out, a, b, words=[a, b], weights=shares, method=method, n=n,
        gif=gif, fast=options.fast,
    )  # fmt: skip
    print(f"{count(n, 'synthetic image')} at each of {count(len(folders), 'share')} in {out}")
    return in_force


def inpaint(
    image: Path, /, *mask_and_prompt: Annotated[str, Parameter(name="[MASK] PROMPT")], out: Path,
    ellipse: Words = None, embeddings: Paths = None, save_masks: bool = False,
    strength: float = 0.75, mask_blur: float = 4.0, content: Text = "original",
    overlay: Text = "plain", n: int = 1, negative_prompt: Text = "", options: Drawing = DRAWING,
) -> dict[str, Any]:  # fmt: skip
    """Repaint what a mask covers: every mask on every image, or a mask for each image.

    Args:
        image: an image, or a folder of them
        mask_and_prompt: a mask file, white where to repaint, or a folder with a mask for each image
            under its name; left out with --ellipse. Then the prompt
        out: folder for the PNG files
        ellipse: x,y,rx,ry in fractions of the edge, e.g. .6,.55,.08,.06; repeatable
        embeddings: embedding file; repeatable
        save_masks: write each image's mask to OUT/masks too
        strength: 0 to 1: how far from the original
        mask_blur: pixels at 512, scaled to the size
        content: original, fill, noise or zeros
        overlay: plain, or a1111: paint a lesion as large as A1111 does, about a third larger
        n: variants of each image and mask
        negative_prompt: what to guide away from
    """
    from medbudget.outputs import inpaint_to
    from medbudget.progress import count
    from medbudget.sampling.masks import ellipse as make_ellipse

    if len(mask_and_prompt) != (1 if ellipse else 2):
        raise ValueError("write either IMAGE MASK PROMPT, or IMAGE PROMPT --ellipse x,y,rx,ry")
    mask: Any = Path(mask_and_prompt[0])
    if ellipse:
        unit = "x,y,rx,ry in fractions of the edge, e.g. .6,.55,.08,.06"
        numbers = [_parse_numbers("--ellipse", text, unit, 4) for text in ellipse]
        mask = {f"ellipse{i}": make_ellipse(four[:2], four[2:]) for i, four in enumerate(numbers)}
    prompt, words = mask_and_prompt[-1], embeddings or []
    paths, in_force = _draw(
        inpaint_to, options, out, image, mask, prompt, prompt=prompt, words=words,
        images=[image] if ellipse else [image, mask], embeddings=words, strength=strength,
        negative_prompt=negative_prompt, mask_blur=mask_blur, content=content, overlay=overlay, n=n,
        save_masks=save_masks,
    )  # fmt: skip
    print(f"{count(len(paths), 'inpainted image')} in {out}: synthetic under their masks")
    return in_force


def _draw(
    draw_to: Callable[..., list[Path]], options: Drawing, out: Path, *inputs: Any, prompt: str = "",
    words: Sequence[Path], images: Sequence[Path] = (), **more: Any,
) -> tuple[list[Path], dict[str, Any]]:  # fmt: skip
    """Load the base and draw on it; return what was written, and settings in force."""
    from medbudget.sampling.sampler import default_steps

    given = options.collect()
    base = load_checked(options, out, prompt, words=[*words, *given["adapters"]], images=images)
    made = draw_to(out, base, *inputs, **more, **given)
    return made, {"steps": default_steps(base)}


def _parse_numbers(option: str, text: str, unit: str, n: int | None = None) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or n not in (None, len(numbers)):
        raise ValueError(f"{option} {text!r}: write {unit}")
    return numbers


def describe(images: Path, /, *, base: BaseOptions = DEFAULT) -> None:
    """Write the visual words of an image (or the mean of a folder): a prompt, or an --init.

    Args:
        images: a folder, or one image
    """
    from medbudget.images import load_images
    from medbudget.tiny import describe as run

    loaded = load_checked(base, None, images=[images])
    print(run(loaded, load_images(images, size=loaded.size)))
