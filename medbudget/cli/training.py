"""medbudget invert, tune: train words and adapters.

What a command returns are settings in force that the command line did not give; see `write_settings`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from medbudget.cli.options import Text, Training, load_checked

DEFAULT = Training()


def invert(
    images: Path, /, *, token: Text, out: Path, n_vectors: int | None = None,
    preview_every: int = 0, options: Training = DEFAULT,
) -> dict[str, Any]:  # fmt: skip
    """Train an embedding on a folder of images (Textual Inversion).

    Args:
        images: folder of images of one class
        token: the new word, e.g. "<mine>"
        out: x.safetensors, x.pt (A1111) or x.bin (diffusers)
        n_vectors: rows, 1 to 74; paper: 64
        preview_every: steps between previews in OUT.previews
    """
    from medbudget.training.inversion import InversionSettings
    from medbudget.training_outputs import invert_to

    if out.suffix not in (".safetensors", ".pt", ".bin"):
        raise ValueError(f"--out {out}: allowed endings are .safetensors, .pt, .bin")
    settings = options.make_settings(InversionSettings, n_vectors=n_vectors)
    train = partial(invert_to, token=token, preview_every=preview_every)
    word = _train(train, images, out, token, settings, options)
    print(f"{out} ({out.stat().st_size / 1024:.0f} kB): {token}, {len(word.vectors)} vectors")
    return word.record.get("settings", {})


def tune(
    images: Path, /, *, out: Path, token: Text | None = None, rank: Text = "16",
    n_vectors: int | None = None, word_lr: float | None = None, options: Training = DEFAULT,
) -> dict[str, Any]:  # fmt: skip
    """Train an adapter on a folder of images: LoRA on the U-Net's attention, or all its weights.

    Args:
        images: folder of images of one class
        out: x.safetensors, which diffusers, A1111 and ComfyUI read
        token: the adapter's word, e.g. "<mine>": parts of a prompt that name it have the changes;
            default: none, all parts have them
        rank: 1 to 64, or full: all weights of the U-Net
        n_vectors: rows of a word that is trained beside it, to 74; default: the word stays --init
        word_lr: learning rate of the word
    """
    from medbudget.training.lora import TuneSettings
    from medbudget.training_outputs import tune_to

    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: an adapter's file ends in .safetensors")
    given = int(rank) if rank.isdecimal() else rank
    settings = options.make_settings(TuneSettings, rank=given, n_vectors=n_vectors, word_lr=word_lr)
    adapter = _train(partial(tune_to, token=token), images, out, token, settings, options)
    size = out.stat().st_size / 1024
    print(f"{out} ({size:.0f} kB): {token or 'for all parts of a prompt'}, rank {adapter.rank}")
    return adapter.record.get("settings", {})


def _train(
    train: Callable[..., Any], images: Path, out: Path, token: str | None, settings: Any,
    options: Training,
) -> Any:  # fmt: skip
    """Check what the files and the token are, train, and draw a sheet."""
    from medbudget.embeddings import check_token
    from medbudget.files import check_apart, check_output, check_writable
    from medbudget.images import load_images, read_record

    if token is not None:
        check_token(token)
    check_apart(out, images)
    check_writable(out)
    sheet, record = out.with_suffix(".png"), {"sheet of": token or "an adapter"}
    if options.samples:
        check_output(sheet, record, read_record, overwrite=options.overwrite)
    loaded = load_checked(options, None, images=[images])
    pictures = load_images(images, size=loaded.size)
    trained = train(
        out, loaded, pictures, settings=settings, checkpoint=options.checkpoint, fast=options.fast,
        overwrite=options.overwrite, data=f"{len(pictures)} images of folder {images.name}",
    )  # fmt: skip
    if options.samples:
        prompt = token or trained.record.get("settings", {})["init"]
        _write_sheet(sheet, loaded, trained, prompt, pictures, options.samples, record)
        print(f"look at {sheet}: images drawn, what they are nearest to, training images")
    return trained


def _write_sheet(
    path: Path, base: Any, trained: Any, prompt: str, images: Any, n: int, record: dict[str, str]
) -> None:
    """Draw images of what was trained, the training image nearest to each, and other ones."""
    from medbudget import plots
    from medbudget.adapters import Adapter
    from medbudget.files import atomic_path
    from medbudget.metrics import pixel_neighbours
    from medbudget.sampling.sampler import sample as draw

    name = trained.token or prompt
    kind = "adapters" if isinstance(trained, Adapter) else "embeddings"
    drawn = draw(base, prompt, n=n, **{kind: trained})
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
