"""medbudget phantoms, invert, sample, inpaint, describe: make images and words."""

from __future__ import annotations

from collections.abc import Callable
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
    from medbudget.files import check_output
    from medbudget.images import read_record

    labels = tuple(label) if label else (KINDS[kind][0],) if kind in KINDS else ("",)
    drawn = make_phantoms(kind, labels, n, size=size, seed=seed, split=split)
    about = {"phantoms": kind, "split": split, "size": size, "drawn_with": seed}
    records = [{**about, "labels": list(labels), "number": i} for i in range(n)]
    for i, record in enumerate(records):
        check_output(out / f"{i:05d}.png", record, read_record, overwrite=overwrite)
    save_images(drawn.images, out, records=records)
    print(f"wrote {n} {kind} phantom{'s' * (n > 1)} ({drawn.labels[0]}, {split}) to {out}")


def invert(
    images: Path, /, *, token: Text, out: Path, preset: Text | None = None,
    n_vectors: int | None = None, steps: int | None = None, lr: float | None = None,
    batch_size: int | None = None, init: Text | None = None, latents: Text | None = None,
    seed: int = 0, checkpoint: Path | None = None, checkpoint_every: int | None = None,
    preview_every: int | None = None, log_dir: Path | None = None, overwrite: bool = False,
    base: BaseOptions = DEFAULT,
) -> None:  # fmt: skip
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
        preview_every: steps between preview images
        log_dir: write TensorBoard events there
        overwrite: replace OUT if it is there
    """
    from medbudget import InversionSettings, invert_to
    from medbudget.embeddings import check_token
    from medbudget.files import check_apart, check_writable

    check_token(token)
    if out.suffix not in (".safetensors", ".pt", ".bin"):
        raise ValueError(f"--out {out}: allowed endings are .safetensors, .pt, .bin")
    check_apart(out, images)
    check_writable(out)
    loaded = base.load()
    given: dict[str, Any] = {
        "n_vectors": n_vectors, "steps": steps, "lr": lr, "batch_size": batch_size, "init": init,
        "latents": latents, "seed": seed or None, "checkpoint_every": checkpoint_every,
    }  # fmt: skip
    settings = InversionSettings(**{k: v for k, v in given.items() if v is not None})
    pictures = _square(loaded, images)
    callback, close = _observer(loaded, token, out, preview_every, log_dir)
    try:
        word = invert_to(
            out, loaded, pictures, token=token,
            settings=settings.complete(preset) if preset else settings,
            checkpoint=checkpoint, callback=callback, fast=base.fast, overwrite=overwrite,
            data=f"{len(pictures)} images of folder {images.name}",
        )  # fmt: skip
    finally:
        close()
    print(f"{out} ({out.stat().st_size / 1024:.0f} kB): {token}, {len(word.vectors)} vectors")


def _square(base: Any, images: Path) -> Any:
    from medbudget import load_images

    return load_images(images, size=base.size)


def _observer(
    base: Any, token: str, out: Path, preview_every: int | None, log_dir: Path | None
) -> tuple[Callable[[dict[str, Any]], None] | None, Callable[[], None]]:
    """Return the callback for previews and TensorBoard, and what closes it."""
    from medbudget import Embedding, save_images
    from medbudget import sample as draw

    writer: Any = None
    if log_dir is not None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--log-dir needs TensorBoard: pip install tensorboard") from None
        writer = SummaryWriter(log_dir)
    if writer is None and not preview_every:
        return None, lambda: None

    def callback(state: dict[str, Any]) -> None:
        if writer is not None:
            for name in ("loss", "lr", "grad_norm"):
                writer.add_scalar(name, state[name], state["step"])
        if preview_every and state["step"] % preview_every == 0:
            now = Embedding(state["vectors"].clone(), token)
            images = draw(base, token, embeddings=now, n=4)
            names = [f"step{state['step']:06d}_{i}" for i in range(len(images))]
            save_images(images, out.with_name(f"{out.stem}_previews"), names=names)

    return callback, writer.close if writer is not None else lambda: None


def sample(
    prompt: Text, /, *, out: Path, embeddings: Paths = None, n: int = 16, steps: int | None = None,
    cfg_scale: float = 2.0, negative_prompt: Text = "", seed: int = 0, overwrite: bool = False,
    base: BaseOptions = DEFAULT,
) -> None:  # fmt: skip
    """Generate images from a prompt; a command that was stopped goes on where it was.

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
    from medbudget.files import check_writable
    from medbudget.sampling import total_guidance

    if out.is_dir():
        check_writable(out / "0.png")
    loaded = base.load()
    kept = set(out.glob("*.png"))
    paths = sample_to(
        out, loaded, prompt, embeddings=embeddings or [], negative_prompt=negative_prompt, n=n,
        steps=steps, cfg_scale=cfg_scale, seed=seed, fast=base.fast, overwrite=overwrite,
    )  # fmt: skip
    count = 0 if overwrite else len(kept & set(paths))
    there = f", {count} of them kept" if count else ""
    print(
        f"{n} synthetic image{'s' * (n > 1)} in {out}{there}; total guidance "
        f"{total_guidance(prompt, cfg_scale):g}"
    )


def inpaint(
    image: Path, /, *mask_and_prompt: Annotated[str, Parameter(name="[MASK] PROMPT")], out: Path,
    ellipse: Words = None, embeddings: Paths = None, save_masks: bool = False,
    strength: float = 0.75, mask_blur: float = 4.0, content: Text = "original",
    overlay: Text = "plain", n: int = 1, steps: int | None = None, cfg_scale: float = 2.0,
    negative_prompt: Text = "", seed: int = 0,
    overwrite: bool = False, base: BaseOptions = DEFAULT,
) -> None:  # fmt: skip
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
    from medbudget import inpaint_to
    from medbudget.files import check_writable

    if len(mask_and_prompt) != (1 if ellipse else 2):
        raise ValueError(
            "write either IMAGE MASK PROMPT, or IMAGE PROMPT --ellipse x,y,rx,ry; found "
            f"{len(mask_and_prompt)} arguments after IMAGE and {len(ellipse or [])} ellipses"
        )
    mask: Any = Path(mask_and_prompt[0])
    if ellipse:
        mask = {f"ellipse{i}": _parse_ellipse(text) for i, text in enumerate(ellipse)}
    if out.is_dir():
        check_writable(out / "0.png")
    paths = inpaint_to(
        out, base.load(), image, mask, mask_and_prompt[-1], embeddings=embeddings or [],
        negative_prompt=negative_prompt, strength=strength, mask_blur=mask_blur, content=content,
        overlay=overlay, steps=steps, cfg_scale=cfg_scale, seed=seed, n=n, save_masks=save_masks,
        overwrite=overwrite,
    )  # fmt: skip
    print(
        f"{len(paths)} inpainted image{'s' * (len(paths) > 1)} in {out}: synthetic under their masks"
    )


def _parse_ellipse(text: str) -> Any:
    from medbudget.inpainting import ellipse

    try:
        x, y, rx, ry = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"--ellipse {text!r}: write x,y,rx,ry in fractions of the edge, e.g. .6,.55,.08,.06"
        ) from None
    return ellipse((x, y), (rx, ry))


def describe(images: Path, /, *, base: BaseOptions = DEFAULT) -> None:
    """Write the visual words of an image (or the mean of a folder): a prompt, or an --init.

    Args:
        images: a folder, or one image
    """
    from medbudget import describe as run

    loaded = base.load()
    print(run(loaded, _square(loaded, images)))
