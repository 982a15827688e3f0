"""What all studies are made of: real images, words that are learned from them, images drawn."""

from __future__ import annotations

import gc
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from medbudget.base import Base
from medbudget.data.phantoms import make_phantoms
from medbudget.embeddings import Embedding
from medbudget.files import hash_tensors
from medbudget.images import load_images
from medbudget.inversion import InversionSettings, invert
from medbudget.loading import load_base
from medbudget.sampling import sample
from medbudget.studies.study import StudySettings
from medbudget.studies.tasks import Store, Task, kind, write_images
from medbudget.tiny import SPECS, find_trained

BLOCK = 16  # images of one task
TOKEN = "<class>"  # of every word that a study learns

# ------------------------------------------------------------------------------- what tasks do


@lru_cache(maxsize=1)
def _load(name: str) -> Base:
    return load_base(name)


def get_base(name: str, base_hash: str) -> Base:
    """Return the base that a task names, checked against the hash it was planned with."""
    base = _load(name)
    if base.hash != base_hash:
        raise ValueError(
            f"base {name} has hash {base.hash} here, the study was planned with {base_hash}: use "
            "the same weights on every machine, or plan anew"
        )
    return base


def forget_base() -> None:
    """Let go of the base that this process has loaded, and of its memory on a GPU."""
    _load.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


def _need_base(task: Task, store: Store) -> list[tuple[Hashable, ...]]:
    return [(get_base, task.settings["base"], task.settings["base_hash"])]


def read_source(sources: Mapping[str, Path], name: str, size: int) -> torch.Tensor:
    """Return the images of a named folder, or of one in it: ``role/train/healthy``.

    Raises
    ------
    ValueError
        No folder was given under this name.
    """
    role, _, inner = name.partition("/")
    if role not in sources:
        given = ", ".join(sources) or "none"
        raise ValueError(f"no folder of images {role!r} was given (given: {given}); use --data")
    return load_images(sources[role] / inner, size=size)


@kind("images", ".safetensors")
def _run_images(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    s = task.settings
    if s["source"] == "phantoms":
        images = make_phantoms(
            s["kind"], s["label"], s["n"], size=s["size"], seed=s["seed"], split=s["split"]
        ).images
    else:
        images = read_source(store.sources, s["source"], s["size"])
        if hash_tensors({"images": images}) != s["hash"]:
            raise ValueError(
                f"the images of {s['source']} are not those that the study was planned with: "
                "restore them, or plan anew"
            )
        images = images[: s["n"]]
    write_images(path, images)


@kind("embedding", ".safetensors", heavy=True, needs=_need_base)
def _run_embedding(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    s = task.settings
    embedding = invert(
        get_base(s["base"], s["base_hash"]), store.read_images(task.inputs)[: s["cases"]],
        token=s["token"], settings=InversionSettings(**s["inversion"]), checkpoint=checkpoint,
        data=f"{s['cases']} cases of a study",
    )  # fmt: skip
    record = {key: value for key, value in embedding.record.items() if key != "seconds"}
    replace(embedding, record=record).save(path)


@kind("word", ".safetensors")
def _run_word(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    """Copy a word that ships with the package, under the token that words of studies have."""
    s = task.settings
    word = Embedding.load(
        find_trained(s["kind"], s["label"], n_vectors=s["vectors"], cases=s["cases"])
    )
    if word.base_hash != s["base_hash"] or hash_tensors({"v": word.vectors}) != s["hash"]:
        raise ValueError(
            f"the word for {s['label']} in this package is not the one that the study was planned "
            "with: use the same version of medbudget on every machine, or plan anew"
        )
    replace(word, token=TOKEN).save(path)


@kind("block", ".safetensors", heavy=True, needs=_need_base)
def _run_block(task: Task, store: Store, path: Path, checkpoint: Path) -> None:
    s = task.settings
    tokens = s.get("tokens") or [TOKEN] * len(task.inputs)
    words = [Embedding.load(store.path(t), token=name) for t, name in zip(task.inputs, tokens)]
    images = sample(
        get_base(s["base"], s["base_hash"]), s["prompt"], embeddings=words, n=BLOCK,
        steps=s["steps"], cfg_scale=s["cfg_scale"], seed=s["seed"] + BLOCK * s["block"],
        batch_size=BLOCK, size=s["size"],
    )  # fmt: skip
    write_images(path, images)


# ------------------------------------------------------------------------------- their planning


def plan_phantoms(kind: str, label: str, split: str, n: int, size: int) -> Task:
    """Return the task of `n` phantoms of a class."""
    settings = {
        "source": "phantoms", "kind": kind, "label": label, "split": split, "seed": 0, "n": n,
        "size": size,
    }  # fmt: skip
    return Task("images", settings)


def plan_folder(sources: Mapping[str, Path], source: str, n: int, size: int) -> Task:
    """Return the task of the first `n` images of a folder; see `read_source`."""
    return plan_images(source, read_source(sources, source, size), n, size)


def plan_images(source: str, images: torch.Tensor, n: int, size: int) -> Task:
    """Return the task of the first `n` images that `read_source` gave.

    Raises
    ------
    ValueError
        Fewer images.
    """
    if len(images) < n:
        raise ValueError(
            f"{len(images)} images for {source}, {n} are needed: give more, or ask for fewer"
        )
    settings = {"source": source, "hash": hash_tensors({"images": images}), "n": n, "size": size}
    return Task("images", settings)


def plan_word(
    s: StudySettings, base_hash: str, train: Task, *, vectors: int | None = None,
    cases: int | None = None,
) -> Task:  # fmt: skip
    """Return the task that learns a word from the first `cases` images of a class."""
    changes = dict(s.overrides) | {"n_vectors": vectors or s.vectors}
    settings = {
        "base": s.base, "base_hash": base_hash, "token": TOKEN, "cases": cases or s.cases,
        "inversion": asdict(InversionSettings.preset(s.inversion, **changes)),
    }  # fmt: skip
    return Task("embedding", settings, (train,))


def plan_shipped_word(
    s: StudySettings, base_hash: str, train: Task, *, cases: int | None = None
) -> Task:
    """Return the word of a class of phantoms that comes with the package, else `plan_word`."""
    cases = cases or s.cases
    name, label = (str(train.settings.get(key)) for key in ("kind", "label"))
    if s.base != "tiny" or s.overrides or (name, label, s.vectors, cases) not in SPECS:
        return plan_word(s, base_hash, train, cases=cases)
    word = Embedding.load(find_trained(name, label, n_vectors=s.vectors, cases=cases))
    settings = {
        "kind": name, "label": label, "vectors": s.vectors, "cases": cases,
        "base_hash": base_hash, "hash": hash_tensors({"v": word.vectors}),
    }  # fmt: skip
    return Task("word", settings)


def plan_blocks(
    s: StudySettings, base_hash: str, words: Sequence[Task], prompt: str = TOKEN, *, n: int,
    steps: int | None = None, cfg_scale: float | None = None, seed: int = 0,
    tokens: Sequence[str] = (),
) -> tuple[Task, ...]:  # fmt: skip
    """Return the tasks of `n` images in blocks of 16, the last one filled up.

    All words are learned as ``<class>``; `tokens` renames them for a prompt of several.
    """
    settings: dict[str, Any] = {
        "base": s.base, "base_hash": base_hash, "prompt": prompt, "steps": steps or s.steps,
        "cfg_scale": float(s.cfg_scale if cfg_scale is None else cfg_scale), "size": s.size,
        "seed": seed,
    }  # fmt: skip
    if tokens:
        settings["tokens"] = list(tokens)
    blocks = range(-(-n // BLOCK))
    return tuple(Task("block", settings | {"block": i}, tuple(words)) for i in blocks)


def describe_images(s: StudySettings, phantoms: bool) -> str:
    """Return what the images are, as every report says it."""
    base = "on the tiny base" if s.base == "tiny" else f"on base {s.base}"
    real = "phantoms" if phantoms else "the images given"
    return f"Synthetic images {base}, {real} as real ones."
