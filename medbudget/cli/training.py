"""medbudget invert, tune: train words and adapters.

What a command returns are settings in force that the command line did not give; see `write_settings`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medbudget.cli.options import BaseOptions, Text, load_checked

DEFAULT = BaseOptions()


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
    loaded = load_checked(base, None, images=[images])
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
        _write_sheet(sheet, loaded, word, token, pictures, samples, record)
        print(f"look at {sheet}: images of {token}, what they are nearest to, training images")
    return word.record.get("settings", {})


def tune(
    images: Path, /, *, out: Path, token: Text | None = None, rank: Text = "16",
    n_vectors: int | None = None, preset: Text | None = None, steps: int | None = None,
    lr: float | None = None, word_lr: float | None = None, batch_size: int | None = None,
    init: Text | None = None, latents: Text | None = None, seed: int = 0,
    checkpoint: Path | None = None, checkpoint_every: int | None = None, samples: int = 8,
    overwrite: bool = False, base: BaseOptions = DEFAULT,
) -> dict[str, Any]:  # fmt: skip
    """Train an adapter on a folder of images: LoRA on the U-Net's attention, or all its weights.

    Args:
        images: folder of images of one class
        out: x.safetensors, which diffusers, A1111 and ComfyUI read
        token: the adapter's word, e.g. "<mine>": parts of a prompt that name it have the changes;
            default: none, all parts have them
        rank: 1 to 64, or full: all weights of the U-Net
        n_vectors: rows of a word that is trained beside it, to 74; default: the word stays --init
        preset: tiny, colab or paper; default: the base's
        steps: default: 50000, on tiny 1000
        lr: learning rate; default: 1e-4, full: 5e-6; on tiny 1e-2 and 1e-3
        word_lr: learning rate of the word
        batch_size: default: 1, on tiny 8
        init: the text trained on, e.g. "a scan"; default "*"
        latents: once (A1111), mean or resample
        seed: the same seed gives the same result
        checkpoint: file to save the state in and to go on from; default: OUT.ckpt until OUT is
            saved
        checkpoint_every: steps between checkpoints
        samples: images on the sheet at the end, OUT with the ending .png; 0: no sheet
        overwrite: replace OUT and its sheet if they are there
    """
    from medbudget import TuneSettings, load_images, tune_to
    from medbudget.embeddings import check_token
    from medbudget.files import check_apart, check_output, check_writable
    from medbudget.images import read_record

    if token is not None:
        check_token(token)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: an adapter's file ends in .safetensors")
    check_apart(out, images)
    check_writable(out)
    sheet, record = out.with_suffix(".png"), {"sheet of": token or "an adapter"}
    if samples:
        check_output(sheet, record, read_record, overwrite=overwrite)
    given: dict[str, Any] = {
        "rank": int(rank) if rank.isdigit() else rank, "n_vectors": n_vectors, "steps": steps,
        "lr": lr, "word_lr": word_lr, "batch_size": batch_size, "init": init, "latents": latents,
        "seed": seed or None, "checkpoint_every": checkpoint_every,
    }  # fmt: skip
    settings = TuneSettings(**{k: v for k, v in given.items() if v is not None})
    loaded = load_checked(base, None, images=[images])
    pictures = load_images(images, size=loaded.size)
    adapter = tune_to(
        out, loaded, pictures, token=token,
        settings=settings.complete(preset) if preset else settings,
        checkpoint=checkpoint, fast=base.fast, overwrite=overwrite,
        data=f"{len(pictures)} images of folder {images.name}",
    )  # fmt: skip
    size = out.stat().st_size / 1024
    print(f"{out} ({size:.0f} kB): {token or 'for all parts of a prompt'}, rank {adapter.rank}")
    in_force: dict[str, Any] = adapter.record.get("settings", {})
    if samples:
        _write_sheet(sheet, loaded, adapter, token or in_force["init"], pictures, samples, record)
        print(f"look at {sheet}: images drawn, what they are nearest to, training images")
    return in_force


def _write_sheet(
    path: Path, base: Any, trained: Any, prompt: str, images: Any, n: int, record: dict[str, str]
) -> None:
    """Draw images of what was trained, the training image nearest to each, and other ones."""
    from medbudget import Adapter, plots
    from medbudget import sample as draw
    from medbudget.files import atomic_path
    from medbudget.metrics import pixel_neighbours

    name, options = (
        trained.token or prompt,
        "adapters" if isinstance(trained, Adapter) else "embeddings",
    )
    drawn = draw(base, prompt, n=n, **{options: trained})
    distance, index = pixel_neighbours(drawn, images)
    rows = {name: drawn, "nearest training image": images[index], "training images": images}
    if (images != images[:, :1]).any():  # one gray panel for each modality
        colours = ("red", "green", "blue")
        rows = {
            f"{label}, {colour}": part[:, [c] * 3]
            for c, colour in enumerate(colours)
            for label, part in rows.items()
        }
    figure = plots.show_rows(
        rows, [f"{value:.2f}" for value in distance], columns=n,
        note=f"{name}: synthetic; {base.note or f'base {base.name}'}. Numbers: 1 - correlation "
        "with the nearest training image, over mirror images and small shifts; 0: a copy",
    )  # fmt: skip
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"medbudget": json.dumps(record)})
