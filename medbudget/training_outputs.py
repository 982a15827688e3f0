"""Train words and adapters into files, and go on where an earlier call was stopped.

What is there as a call would make it is kept; anything else is refused, unless `overwrite` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from medbudget.adapter_files import AdapterError
from medbudget.adapters import Adapter
from medbudget.base import Base
from medbudget.embeddings import Embedding, EmbeddingError, check_token
from medbudget.files import PathLike, check_output, hash_tensors, hold
from medbudget.images import check_square, make_grid, read_record, save_images
from medbudget.progress import count, quiet, say
from medbudget.sampling.sampler import sample
from medbudget.training.inversion import InversionSettings, invert
from medbudget.training.lora import TuneSettings, tune

Tell: TypeAlias = "Callable[[dict[str, Any]], None]"
Trained = TypeVar("Trained", Embedding, Adapter)


def invert_to(
    path: PathLike, base: Base, images: torch.Tensor, *, token: str,
    settings: InversionSettings | None = None, checkpoint: PathLike | None = None,
    callback: Tell | None = None, preview_every: int = 0, overwrite: bool = False, **options: Any,
) -> Embedding:  # fmt: skip
    """Train an embedding into a file.

    Without a `checkpoint` of yours, the state is kept as ``PATH.ckpt`` until the word is saved.
    Every `preview_every` steps four images of the word go into ``PATH.previews``. The `options`
    and other parameters are those of `invert`.
    """
    path = Path(path)
    previews = path.with_name(f"{path.name}.previews")
    preview: dict[str, Any] = {"preview": True}

    def prepare(settings: InversionSettings, wanted: dict[str, Any]) -> list[str]:
        preview.update(wanted)
        for file in previews.glob("*.png"):
            check_output(file, preview, read_record, overwrite=overwrite)
        notes = [f"{settings.n_vectors} vectors"]
        if preview_every:
            notes.append(
                f"images of the word go into {previews} every {count(preview_every, 'step')}"
            )
        if len(images) < 5:
            notes.append("a word from so few images copies them; the paper's smallest set has 5")
        return notes

    def tell(state: dict[str, Any]) -> None:
        if preview_every and state["step"] % preview_every == 0:
            now = Embedding(state["vectors"].clone(), token)
            with quiet():
                drawn = make_grid(sample(base, token, embeddings=now, n=4))[None]
            save_images(drawn, previews, names=[f"step{state['step']:06d}"], records=[preview])
        if callback is not None:
            callback(state)

    def train(**more: Any) -> Embedding:
        return invert(base, images, token=token, callback=tell, **more, **options)

    return _train_to(
        path, base, images, check_token(token), settings or InversionSettings(), Embedding.load,
        train, prepare, checkpoint, overwrite,
    )  # fmt: skip


def tune_to(
    path: PathLike, base: Base, images: torch.Tensor, *, token: str | None = None,
    settings: TuneSettings | None = None, checkpoint: PathLike | None = None,
    overwrite: bool = False, **options: Any,
) -> Adapter:  # fmt: skip
    """Train an adapter into a file.

    Without a `checkpoint` of yours, the state is kept as ``PATH.ckpt`` until the adapter is saved.
    The `options` and other parameters are those of `tune`.
    """

    def prepare(settings: TuneSettings, wanted: dict[str, Any]) -> list[str]:
        word = f", a word of {count(settings.n_vectors, 'vector')}" if settings.n_vectors else ""
        notes = [f"rank {settings.rank}{word}"]
        if len(images) < 100:
            notes.append(
                "tuning on few images copies them: compare the results with the training images"
            )
        return notes

    def train(**more: Any) -> Adapter:
        return tune(base, images, token=token, **more, **options)

    return _train_to(
        Path(path), base, images, check_token(token) if token else "", settings or TuneSettings(),
        Adapter.load, train, prepare, checkpoint, overwrite,
    )  # fmt: skip


def _train_to(
    path: Path, base: Base, images: torch.Tensor, token: str, given: Any,
    load: Callable[[Path], Trained], train: Callable[..., Trained],
    prepare: Callable[[Any, dict[str, Any]], list[str]], checkpoint: PathLike | None, overwrite: bool,
) -> Trained:  # fmt: skip
    """Return what is in the file if this call made it; else train it, save it, drop the checkpoint.

    `prepare` returns what is said first: the size of what is trained, then other notes.
    """

    def identify(token: str, base: str, images: str, settings: Any) -> dict[str, Any]:
        own = {"token": token, "base": base, "images": images}
        return own | settings.without("checkpoint_every")

    def read(file: Path) -> dict[str, Any] | None:
        try:
            made = load(file)
            made_with = type(given)(**made.record["settings"])
            return identify(made.token, made.base_hash, made.record["images_hash"], made_with)
        except (EmbeddingError, AdapterError, KeyError, TypeError, ValueError):
            return None  # it says nothing of its making

    check_square(images)
    settings = given.complete(base.preset)
    wanted = identify(token, base.hash, hash_tensors({"images": images}), settings)
    if check_output(path, wanted, read, overwrite=overwrite):
        say(f"{path} is there already, made with these settings")
        return load(path)
    size, *notes = prepare(settings, wanted)
    state = path.with_name(f"{path.name}.ckpt") if checkpoint is None else Path(checkpoint)
    if state.resolve() == path.resolve():
        raise ValueError(f"{path} is to hold the result: name another file for the checkpoint")
    changes = ", ".join(sorted(given.given)) or "nothing"
    say(
        f"{count(len(images), 'image')}, {count(settings.steps, 'step')} of {settings.batch_size}, "
        f"learning rate {settings.lr:g} ({settings.schedule}), {size} on {base.device} (preset "
        f"{base.preset}; given: {changes})"
    )
    say(
        f"the state is kept in {state} every {count(settings.checkpoint_every, 'step')} and at "
        "Ctrl-C: the same call goes on from there"
    )
    for note in notes:
        say(note)
    with hold(path):
        trained = train(settings=settings, checkpoint=state)
        trained.save(path)
    if checkpoint is None:
        state.unlink(missing_ok=True)
    return trained
