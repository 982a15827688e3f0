"""medbudget phantoms, invert, sample, interpolate, inpaint, describe: make images and words.

What a command returns are settings in force that the command line did not give; see `write_settings`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from medbudget.cli.options import BaseOptions, Paths, Text, Words

DEFAULT = BaseOptions()


def phantoms(
    out: Path, /, *, kind: Text = "prostate", label: Words = None, n: int = 100, size: int = 64,
    seed: int = 0, split: Text = "train", overwrite: bool = False,
) -> None:  # fmt: skip
    """Draw procedural stand-ins for medical images (phantoms).

    Args:
        out: folder to write PNG files to
        kind: prostate, chest or histology
        label: e.g. healthy; several for combined chest diseases
        n: number of images
        size: pixels of an edge
        seed: the same seed gives the same result
        split: train, val or test: they never overlap
        overwrite: replace other images that are there
    """
    from medbudget import make_phantoms, save_images
    from medbudget.data.phantoms import KINDS
    from medbudget.images import check_folder
    from medbudget.progress import count

    labels = tuple(label) if label else (KINDS[kind][0],) if kind in KINDS else ("",)
    drawn = make_phantoms(kind, labels, n, size=size, seed=seed, split=split)
    about = {"phantoms": kind, "split": split, "size": size, "drawn_with": seed}
    records = {f"{i:05d}.png": {**about, "labels": [*labels], "number": i} for i in range(n)}
    check_folder(out, records, overwrite=overwrite)
    save_images(drawn.images, out, records=[*records.values()])
    print(f"wrote {count(n, f'{kind} phantom')} ({drawn.labels[0]}, {split}) to {out}")


def invert(
    images: Path, /, *, token: Text, out: Path, preset: Text | None = None,
    n_vectors: int | None = None, steps: int | None = None, lr: float | None = None,
    batch_size: int | None = None, init: Text | None = None, latents: Text | None = None,
    seed: int = 0, checkpoint: Path | None = None, checkpoint_every: int | None = None,
    preview_every: int = 0, samples: int = 8, log_dir: Path | None = None,
    overwrite: bool = False, base: BaseOptions = DEFAULT,
) -> dict[str, Any]:  # fmt: skip
    """Train an embedding on a folder of images (Textual Inversion).

    Args:
        images: folder of images of one class
        token: the new word, e.g. "<mine>"
        out: x.safetensors, x.pt (A1111) or x.bin (diffusers)
        preset: tiny, colab or paper; default: the base's
        n_vectors: rows, 1 to 74; paper: 64
        steps: paper: 50000
        lr: learning rate; paper: 0.005
        batch_size: paper: 1
        init: "*" (A1111), mean, or any text
        latents: once (A1111), mean or resample
        seed: the same seed gives the same result
        checkpoint: file to save the state in and to go on from; default: OUT.ckpt until OUT is
            saved
        checkpoint_every: steps between checkpoints
        preview_every: steps between previews in OUT.previews
        samples: images of the word on the sheet at the end, OUT with the ending .png; 0: no sheet
        log_dir: write TensorBoard events there
        overwrite: replace OUT, its sheet and its previews if they are there
    """
    from medbudget import InversionSettings, invert_to, load_images
    from medbudget.embeddings import check_token
    from medbudget.files import check_apart, check_output, check_writable
    from medbudget.images import read_record

    check_token(token)
    if out.suffix not in (".safetensors", ".pt", ".bin"):
        raise ValueError(f"--out {out}: allowed endings are .safetensors, .pt, .bin")
    check_apart(out, images)
    check_writable(out)
    sheet, record = out.with_suffix(".png"), {"sheet of": token}
    if samples:
        check_output(sheet, record, read_record, overwrite=overwrite)
    writer: Any = None
    if log_dir is not None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--log-dir needs TensorBoard: pip install tensorboard") from None
        writer = SummaryWriter(log_dir)

    def log(state: dict[str, Any]) -> None:
        for name in ("loss", "lr", "grad_norm"):
            writer.add_scalar(name, state[name], state["step"])

    given: dict[str, Any] = {
        "n_vectors": n_vectors, "steps": steps, "lr": lr, "batch_size": batch_size, "init": init,
        "latents": latents, "seed": seed or None, "checkpoint_every": checkpoint_every,
    }  # fmt: skip
    settings = InversionSettings(**{k: v for k, v in given.items() if v is not None})
    loaded = _load_base(base, None, images=[images])
    pictures = load_images(images, size=loaded.size)
    try:
        word = invert_to(
            out, loaded, pictures, token=token,
            settings=settings.complete(preset) if preset else settings,
            checkpoint=checkpoint, callback=log if writer else None, preview_every=preview_every,
            fast=base.fast, overwrite=overwrite,
            data=f"{len(pictures)} images of folder {images.name}",
        )  # fmt: skip
    finally:
        if writer is not None:
            writer.close()
    print(f"{out} ({out.stat().st_size / 1024:.0f} kB): {token}, {len(word.vectors)} vectors")
    if samples:
        _write_sheet(sheet, loaded, word, pictures, samples, record)
        print(f"look at {sheet}: images of {token}, what they are nearest to, training images")
    return word.record.get("settings", {})


def _write_sheet(
    path: Path, base: Any, word: Any, images: Any, n: int, record: dict[str, str]
) -> None:
    """Draw images of a word, the training image nearest to each, and other training images."""
    from medbudget import plots
    from medbudget import sample as draw
    from medbudget.files import atomic_path
    from medbudget.metrics import pixel_neighbours

    drawn = draw(base, word.token, embeddings=word, n=n)
    distance, index = pixel_neighbours(drawn, images)
    rows = {word.token: drawn, "nearest training image": images[index], "training images": images}
    if (images != images[:, :1]).any():  # one gray panel for each modality
        colours = ("red", "green", "blue")
        rows = {
            f"{label}, {colour}": part[:, [c] * 3]
            for c, colour in enumerate(colours)
            for label, part in rows.items()
        }
    figure = plots.show_rows(
        rows, [f"{value:.2f}" for value in distance], columns=n,
        note=f"{word.token}: synthetic; {base.note or f'base {base.name}'}. Numbers: 1 - correlation "
        "with the nearest training image, over mirror images and small shifts; 0: a copy",
    )  # fmt: skip
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"medbudget": json.dumps(record)})


def sample(
    prompt: Text, /, *, out: Path, embeddings: Paths = None, n: int = 16, steps: int | None = None,
    cfg_scale: float = 2.0, negative_prompt: Text = "", seed: int = 0, overwrite: bool = False,
    base: BaseOptions = DEFAULT,
) -> dict[str, Any]:  # fmt: skip
    """Generate images from a prompt, and a contact sheet; when stopped, the same command goes on.

    Args:
        prompt: e.g. "<mine>" or "<a>:0.5 AND <b>:0.5"
        out: folder for the PNG files
        embeddings: embedding file; repeatable
        n: number of images
        steps: default: 25 on tiny, else 100
        cfg_scale: classifier-free guidance; paper: 2
        negative_prompt: what to guide away from
        seed: of the first image; the next ones have the next seeds
        overwrite: replace other images that are there
    """
    from medbudget import sample_to
    from medbudget.images import SHEET
    from medbudget.progress import count
    from medbudget.sampling import default_steps, total_guidance

    loaded = _load_base(base, out, prompt, words=embeddings or [])
    kept = set(out.glob("*.png"))
    paths = sample_to(
        out, loaded, prompt, embeddings=embeddings or [], negative_prompt=negative_prompt, n=n,
        steps=steps, cfg_scale=cfg_scale, seed=seed, fast=base.fast, overwrite=overwrite,
    )  # fmt: skip
    same = 0 if overwrite else len(kept & set(paths))
    there = f", {same} of them kept" if same else ""
    guidance = total_guidance(prompt, cfg_scale)
    print(f"{count(n, 'synthetic image')} in {out}{there}; total guidance {guidance:g}")
    print(f"look at {out / SHEET}")
    return {"steps": default_steps(loaded)}


def interpolate(
    a: Path, b: Path, /, *, out: Path, weights: Text = "0,0.25,0.5,0.75,1", method: Text = "and",
    n: int = 4, steps: int | None = None, cfg_scale: float = 2.0, seed: int = 0, gif: bool = False,
    overwrite: bool = False, base: BaseOptions = DEFAULT,
) -> dict[str, Any]:  # fmt: skip
    """Generate images on the way from one embedding to another, with the same noise at each share.

    Args:
        a: embedding file
        b: embedding file
        out: folder for a contact sheet, and for a folder of PNG files for each share
        weights: shares of B; that of A is the rest to 1
        method: and: compose predictions, as the paper does; or vectors: mix the embeddings
        n: images at each share
        steps: default: 25 on tiny, else 100
        cfg_scale: classifier-free guidance; paper: 2
        seed: of the first image; the next ones have the next seeds
        gif: also write OUT/axis.gif
        overwrite: replace other images that are there
    """
    from medbudget import interpolate_to
    from medbudget.progress import count
    from medbudget.sampling import default_steps

    shares = _parse_numbers("--weights", weights, "shares such as 0,0.5,1")
    loaded = _load_base(base, out, words=[a, b])
    folders = interpolate_to(
        out, loaded, a, b, weights=shares, method=method, n=n, steps=steps, cfg_scale=cfg_scale,
        seed=seed, fast=base.fast, gif=gif, overwrite=overwrite,
    )  # fmt: skip
    print(f"{count(n, 'synthetic image')} at each of {count(len(folders), 'share')} in {out}")
    return {"steps": default_steps(loaded)}


def inpaint(
    image: Path, /, *mask_and_prompt: Annotated[str, Parameter(name="[MASK] PROMPT")], out: Path,
    ellipse: Words = None, embeddings: Paths = None, save_masks: bool = False,
    strength: float = 0.75, mask_blur: float = 4.0, content: Text = "original",
    overlay: Text = "plain", n: int = 1, steps: int | None = None, cfg_scale: float = 2.0,
    negative_prompt: Text = "", seed: int = 0,
    overwrite: bool = False, base: BaseOptions = DEFAULT,
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
        steps: default: 25 on tiny, else 100
        cfg_scale: classifier-free guidance; paper: 2
        negative_prompt: what to guide away from
        seed: the same seed gives the same result
        overwrite: replace other images that are there
    """
    from medbudget import ellipse as draw
    from medbudget import inpaint_to
    from medbudget.progress import count
    from medbudget.sampling import default_steps

    if len(mask_and_prompt) != (1 if ellipse else 2):
        raise ValueError(
            "write either IMAGE MASK PROMPT, or IMAGE PROMPT --ellipse x,y,rx,ry; found "
            f"{len(mask_and_prompt)} arguments after IMAGE and {count(len(ellipse or []), 'ellipse')}"
        )
    mask: Any = Path(mask_and_prompt[0])
    if ellipse:
        unit = "x,y,rx,ry in fractions of the edge, e.g. .6,.55,.08,.06"
        numbers = [_parse_numbers("--ellipse", text, unit, 4) for text in ellipse]
        mask = {f"ellipse{i}": draw(four[:2], four[2:]) for i, four in enumerate(numbers)}
    pictures = [image] if ellipse else [image, mask]
    prompt = mask_and_prompt[-1]
    loaded = _load_base(base, out, prompt, words=embeddings or [], images=pictures)
    paths = inpaint_to(
        out, loaded, image, mask, prompt, embeddings=embeddings or [],
        negative_prompt=negative_prompt, strength=strength, mask_blur=mask_blur, content=content,
        overlay=overlay, steps=steps, cfg_scale=cfg_scale, seed=seed, n=n, save_masks=save_masks,
        overwrite=overwrite,
    )  # fmt: skip
    print(f"{count(len(paths), 'inpainted image')} in {out}: synthetic under their masks")
    return {"steps": default_steps(loaded)}


def _load_base(
    base: BaseOptions, out: Path | None, prompt: str = "", *, words: Sequence[Path] = (),
    images: Sequence[Path] = (),
) -> Any:  # fmt: skip
    """Load a base, once it is sure that the other files are there, and that the output can be."""
    from medbudget import Embedding, parse_prompt
    from medbudget.images import check_folder, find_images

    if out is not None:
        check_folder(out, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when the files are used
        for path in images:
            find_images(path)
        tokens = [Embedding.load(path).token for path in words]
    if prompt:
        parse_prompt(prompt, tokens=tokens)
    return base.load()


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
    from medbudget import describe as run
    from medbudget import load_images

    loaded = _load_base(base, None, images=[images])
    print(run(loaded, load_images(images, size=loaded.size)))
