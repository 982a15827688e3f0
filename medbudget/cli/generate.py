"""medbudget phantoms, invert, sample, inpaint, describe: make images and words."""

from __future__ import annotations

import sys
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

    Parameters
    ----------
    out
        folder to write PNG files to
    kind
        prostate, chest or histology
    label
        e.g. healthy; several for combined chest diseases
    n
        number of images
    size
        pixels of an edge
    seed
        the same seed gives the same result
    split
        train, val or test: they never overlap
    overwrite
        replace other images that are there
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
    print(f"wrote {n} {kind} phantoms ({drawn.labels[0]}, {split}) to {out}")


def invert(
    images: Path, /, *, token: Text, out: Path, preset: Text | None = None,
    n_vectors: int | None = None, steps: int | None = None, lr: float | None = None,
    batch_size: int | None = None, init: Text | None = None, latents: Text | None = None,
    seed: int = 0, checkpoint: Path | None = None, checkpoint_every: int | None = None,
    preview_every: int | None = None, log_dir: Path | None = None, overwrite: bool = False,
    base: BaseOptions = DEFAULT,
) -> None:  # fmt: skip
    """Train an embedding on a folder of images (Textual Inversion).

    Parameters
    ----------
    images
        folder of images of one class
    token
        the new word, e.g. "<mine>"
    out
        x.safetensors, x.pt (A1111) or x.bin (diffusers)
    preset
        tiny, colab or paper; default: the base's
    n_vectors
        rows, 1 to 74; paper: 64
    steps
        paper: 50000
    lr
        learning rate; paper: 0.005
    batch_size
        paper: 1
    init
        "*" (A1111), mean, or any text
    latents
        once (A1111), mean or resample
    seed
        the same seed gives the same result
    checkpoint
        file to save the state in and to go on from
    checkpoint_every
        steps between checkpoints
    preview_every
        steps between preview images
    log_dir
        write TensorBoard events there
    overwrite
        replace OUT if it is there
    """
    from medbudget import InversionSettings
    from medbudget import invert as run
    from medbudget.embeddings import check_token
    from medbudget.files import check_apart, check_output, hold

    check_token(token)
    if out.suffix not in (".safetensors", ".pt", ".bin"):
        raise ValueError(f"--out {out}: allowed endings are .safetensors, .pt, .bin")
    check_apart(out, images)
    check_output(out, overwrite=overwrite)
    loaded = base.load()
    settings = InversionSettings.preset(
        preset or loaded.preset, n_vectors=n_vectors, steps=steps, lr=lr, batch_size=batch_size,
        init=init, latents=latents, seed=seed, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    pictures = _square(loaded, images)
    count = f"{len(pictures)} image{'s' if len(pictures) > 1 else ''}"
    print(f"{count}, {settings.steps} steps of {settings.batch_size} on {loaded.device}")
    if len(pictures) < 5:
        print("note: a word from so few images copies them; the paper's smallest set has 5")
    callback, close = _observer(loaded, token, out, preview_every, log_dir)
    try:
        with hold(out):
            word = run(
                loaded, pictures, token=token, settings=settings, checkpoint=checkpoint,
                callback=callback, data=f"{count} of folder {images.name}",
            )  # fmt: skip
            word.save(out)
    finally:
        close()
    print(f"wrote {out} ({out.stat().st_size / 1024:.0f} kB): {token}, {len(word.vectors)} vectors")


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
            base.vae.to(base.device)
            images = draw(base, token, embeddings=[now], n=4)
            names = [f"step{state['step']:06d}_{i}" for i in range(len(images))]
            save_images(images, out.with_name(f"{out.stem}_previews"), names=names)

    return callback, writer.close if writer is not None else lambda: None


def _warn_of_other_base(e: Any, base: Any) -> None:
    """Say on stderr if an embedding names a base other than this one."""
    from medbudget.bases import compare_origin

    same, reason = compare_origin(e, base)
    if same is False:
        print(
            f"note: {e.token} was {reason}: images will differ from those it was trained for",
            file=sys.stderr,
        )


def sample(
    prompt: Text, /, *, out: Path, embeddings: Paths = None, n: int = 16, steps: int | None = None,
    cfg_scale: float = 2.0, negative_prompt: Text = "", seed: int = 0, overwrite: bool = False,
    base: BaseOptions = DEFAULT,
) -> None:  # fmt: skip
    """Generate images from a prompt; a command that was stopped goes on where it was.

    Parameters
    ----------
    prompt
        e.g. "<mine>" or "<a>:0.5 AND <b>:0.5"
    out
        folder for the PNG files
    embeddings
        embedding file; repeatable
    n
        number of images
    steps
        default: 25 on tiny, else 100
    cfg_scale
        classifier-free guidance; paper: 2
    negative_prompt
        what to guide away from
    seed
        of the first image; the next ones have the next seeds
    overwrite
        replace other images that are there
    """
    from medbudget import Embedding, save_images
    from medbudget import sample as draw
    from medbudget.files import check_output, check_writable, hold
    from medbudget.images import read_record
    from medbudget.progress import quiet, tqdm
    from medbudget.sampling import BLOCK, check_numbers, default_steps, total_guidance

    check_writable(out / "00000.png")
    words = [Embedding.load(path) for path in embeddings or []]
    loaded = base.load()
    for e in words:
        _warn_of_other_base(e, loaded)
    steps = default_steps(loaded) if steps is None else steps
    check_numbers(n=n, steps=steps, cfg_scale=cfg_scale)
    settings: dict[str, Any] = {
        "prompt": prompt, "negative_prompt": negative_prompt, "steps": steps,
        "cfg_scale": cfg_scale,
    }  # fmt: skip
    record = _describe_images(loaded, words, **settings)
    names = [f"{i:05d}" for i in range(n)]
    records = [{**record, "seed": seed + i} for i in range(n)]
    done = [
        check_output(out / f"{name}.png", mine, read_record, overwrite=overwrite)
        for name, mine in zip(names, records)
    ]
    with hold(out), tqdm(total=n, desc="sample", unit="image") as bar:
        for first in range(0, n, BLOCK):
            block = slice(first, min(first + BLOCK, n))
            if not all(done[block]):
                with quiet():
                    images = draw(
                        loaded, embeddings=words, n=len(names[block]), seed=seed + first, **settings
                    )
                save_images(images, out, names=names[block], records=records[block])
            bar.update(len(names[block]))
    kept = f", {sum(done)} of them kept" if any(done) else ""
    guidance = total_guidance(prompt, cfg_scale)
    print(f"{n} synthetic images in {out}{kept}; total guidance {guidance:g}")


def _describe_images(base: Any, words: list[Any], **settings: Any) -> dict[str, Any]:
    """Return what is written into every synthetic image's file."""
    from medbudget.files import hash_tensors

    record = {
        "synthetic": True,
        **settings,
        "base": Path(base.name).name,
        "base_hash": base.hash,
        "embeddings": {e.token: hash_tensors({"vectors": e.vectors}) for e in words},
    }
    if trained_on := " ".join(
        e.record["image_hashes"] for e in words if "image_hashes" in e.record
    ):
        record["training_images"] = trained_on
    return record


def inpaint(
    image: Path, /, *mask_and_prompt: Annotated[str, Parameter(name="[MASK] PROMPT")], out: Path,
    ellipse: Words = None, embeddings: Paths = None, save_masks: bool = False,
    strength: float = 0.75, mask_blur: float = 4.0, content: Text = "original", n: int = 1,
    steps: int | None = None, cfg_scale: float = 2.0, negative_prompt: Text = "", seed: int = 0,
    overwrite: bool = False, base: BaseOptions = DEFAULT,
) -> None:  # fmt: skip
    """Repaint what a mask covers: every mask on every image, or a mask for each image.

    Parameters
    ----------
    image
        an image, or a folder of them
    mask_and_prompt
        a mask file, white where to repaint, or a folder with a mask for each image under its name;
        left out with --ellipse. Then the prompt
    out
        folder for the PNG files
    ellipse
        x,y,rx,ry in fractions of the edge, e.g. .6,.55,.08,.06; repeatable
    embeddings
        embedding file; repeatable
    save_masks
        write each image's mask to OUT/masks too
    strength
        0 to 1: how far from the original
    mask_blur
        pixels at 512, scaled to the size
    content
        original, fill, noise or zeros
    n
        variants of each image and mask
    steps
        default: 25 on tiny, else 100
    cfg_scale
        classifier-free guidance; paper: 2
    negative_prompt
        what to guide away from
    seed
        the same seed gives the same result
    overwrite
        replace other images that are there
    """
    import torch

    from medbudget import Embedding, save_images
    from medbudget.files import check_apart, check_output, check_writable, hold
    from medbudget.images import find_images, read_record
    from medbudget.inpainting import check_masks
    from medbudget.inpainting import inpaint as run
    from medbudget.sampling import default_steps

    if len(mask_and_prompt) != (1 if ellipse else 2):
        raise ValueError(
            "write either IMAGE MASK PROMPT, or IMAGE PROMPT --ellipse x,y,rx,ry; found "
            f"{len(mask_and_prompt)} arguments after IMAGE and {len(ellipse or [])} ellipses"
        )
    prompt = mask_and_prompt[-1]
    check_apart(out, image, *([] if ellipse else [mask_and_prompt[0]]))
    check_writable(out / "00000.png")
    files = find_images(image)
    loaded = base.load()
    pictures = _square(loaded, image)
    if ellipse:
        masks = {f"ellipse{i}": _parse_ellipse(text) for i, text in enumerate(ellipse)}
    else:
        folder = Path(mask_and_prompt[0])
        masks = {p.stem: _square(loaded, p)[0, 0] for p in find_images(folder)}
        if folder.is_dir() and image.is_dir():
            missing = sorted({p.stem for p in files} - set(masks))
            if missing:
                raise ValueError(f"{folder} has no mask for {', '.join(missing[:5])}")
    paired = not ellipse and image.is_dir() and Path(mask_and_prompt[0]).is_dir()
    names, which, chosen = [], [], []
    for i, file in enumerate(files):
        for name, mask in masks.items():
            if paired and name != file.stem:
                continue
            names.append(file.stem if paired or len(masks) == 1 else f"{file.stem}_{name}")
            which.append(i)
            chosen.append(check_masks(mask, pictures.shape[-1])[0])
    settings: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "strength": strength,
        "mask_blur": mask_blur,
        "content": content,
        "steps": default_steps(loaded) if steps is None else steps,
        "cfg_scale": cfg_scale,
        "seed": seed,
    }
    words = [Embedding.load(path) for path in embeddings or []]
    record = _describe_images(loaded, words, prompt=prompt, **settings)
    outputs = [f"{name}_{k}" if n > 1 else name for name in names for k in range(n)]
    if len(set(outputs)) < len(outputs):
        double = next(name for name in outputs if outputs.count(name) > 1)
        raise ValueError(f"two images would be written to {out / double}.png: rename one of them")
    records = [{**record, "image": i} for i in range(len(outputs))]
    done = [
        check_output(out / f"{name}.png", mine, read_record, overwrite=overwrite)
        for name, mine in zip(outputs, records)
    ]
    with hold(out):
        if not all(done):
            painted = run(
                loaded, pictures[which], torch.stack(chosen), prompt, embeddings=words, n=n,
                **settings,
            )  # fmt: skip
            save_images(painted, out, names=outputs, records=records)
        if save_masks:
            binary = (torch.stack(chosen) >= 0.5).repeat_interleave(n, 0)
            gray = binary[:, None].expand(-1, 3, -1, -1).to(torch.uint8) * 255
            save_images(gray, out / "masks", names=outputs)
    print(f"{len(outputs)} inpainted images in {out}: synthetic under their masks")


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

    Parameters
    ----------
    images
        a folder, or one image
    """
    from medbudget import describe as run

    loaded = base.load()
    print(run(loaded, _square(loaded, images)))
