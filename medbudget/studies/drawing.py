"""What all studies are made of: real images, words that are learned from them, images drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from medbudget.base import Base
from medbudget.data.phantoms import make_phantoms
from medbudget.embeddings import Embedding
from medbudget.files import hash_tensors
from medbudget.images import load_images, shrink
from medbudget.inversion import InversionSettings, invert
from medbudget.loading import load_base
from medbudget.sampling import sample
from medbudget.studies.study import StudySettings
from medbudget.studies.tasks import Store, Task, kind
from medbudget.tiny import SIZE, SPECS, find_trained

BLOCK = 16  # images of one task
TOKEN = "<class>"  # of every word that a study learns

# ------------------------------------------------------------------------------- what tasks do


@lru_cache(maxsize=1)
def get_base(name: str, base_hash: str) -> Base:
    """Load the base that a task names, checked against the hash it was planned with."""
    base = load_base(name)
    if base.hash != base_hash:
        raise ValueError(
            f"base {name} has hash {base.hash} here, the study was planned with {base_hash}: use "
            "the same weights on every machine, or plan anew"
        )
    return base


def load_task_base(task: Task, store: Store) -> Base:
    """Load the base that a task's settings name."""
    return get_base(task.settings["base"], task.settings["base_hash"])


def read_source(sources: Mapping[str, Path], name: str, size: int) -> torch.Tensor:
    """Return the images of a named folder, or of one in it: ``role/train/healthy``."""
    role, _, inner = name.partition("/")
    if role not in sources:
        given = ", ".join(sources) or "none"
        raise ValueError(f"no folder of images {role!r} was given (given: {given}); use --data")
    return load_images(sources[role] / inner, size=size)


@kind("images", ".safetensors")
def _run_images(task: Task, store: Store) -> torch.Tensor:
    s = task.settings
    if s["source"] == "phantoms":
        what = {key: s[key] for key in ("size", "seed", "split")}
        return make_phantoms(s["kind"], s["label"], s["n"], **what).images
    images = read_source(store.sources, s["source"], s["size"])
    if hash_tensors({"images": images}) != s["hash"]:
        raise ValueError(
            f"the images of {s['source']} are not those that the study was planned with: restore "
            "them, or plan anew"
        )
    return images[: s["n"]]


@kind("shrunk", ".safetensors")
def _run_shrunk(task: Task, store: Store) -> torch.Tensor:
    return shrink(store.read_images(task.inputs), task.settings["size"])


@kind("embedding", ".safetensors", heavy=True, needs=load_task_base)
def _run_embedding(task: Task, store: Store) -> Callable[[Path], Any]:
    s = task.settings
    embedding = invert(
        load_task_base(task, store), store.read_images(task.inputs)[: s["cases"]],
        token=s["token"], settings=InversionSettings(**s["inversion"]),
        checkpoint=store.scratch(task, "checkpoint"), data=f"{s['cases']} cases of a study",
    )  # fmt: skip
    record = {key: value for key, value in embedding.record.items() if key != "seconds"}
    return replace(embedding, record=record).save


@kind("word", ".safetensors")
def _run_word(task: Task, store: Store) -> Callable[[Path], Any]:
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
    return replace(word, token=TOKEN).save


@kind("block", ".safetensors", heavy=True, needs=load_task_base)
def _run_block(task: Task, store: Store) -> torch.Tensor:
    s = task.settings
    tokens = s.get("tokens") or [TOKEN] * len(task.inputs)
    words = [Embedding.load(store.path(t), token=name) for t, name in zip(task.inputs, tokens)]
    return sample(
        load_task_base(task, store), s["prompt"], embeddings=words, n=BLOCK, steps=s["steps"],
        cfg_scale=s["cfg_scale"], seed=s["seed"] + BLOCK * s["block"], batch_size=BLOCK,
        size=s["size"],
    )  # fmt: skip


# ------------------------------------------------------------------------------- their planning


@dataclass(frozen=True)
class Plan:
    """Plans the tasks that studies share."""

    s: StudySettings
    base_hash: str
    sources: Mapping[str, Path]  # folders of real images and other files, by role

    def phantoms(self, kind: str, label: str, split: str, n: int) -> Task:
        """Return the task of `n` phantoms of a class."""
        settings = {
            "source": "phantoms", "kind": kind, "label": label, "split": split, "seed": 0, "n": n,
            "size": self.s.size,
        }  # fmt: skip
        return Task("images", settings)

    def folder(self, source: str, n: int, images: torch.Tensor | None = None) -> Task:
        """Return the task of the first `n` images of a folder (see `read_source`), or raise.

        `images` are all that are in it, where they were read before.
        """
        size = self.s.size
        images = read_source(self.sources, source, size) if images is None else images
        if len(images) < n:
            raise ValueError(
                f"{len(images)} images for {source}, {n} are needed: give more, or ask for fewer"
            )
        images_hash = hash_tensors({"images": images})
        return Task("images", {"source": source, "hash": images_hash, "n": n, "size": size})

    def shrink(self, tasks: Sequence[Task], size: int) -> tuple[Task, ...]:
        """Return tasks of images of `size` pixels: those given, or one that averages them down."""
        if size == self.s.size:
            return tuple(tasks)
        return (Task("shrunk", {"size": size}, tuple(tasks)),)

    def word(self, train: Task, *, vectors: int | None = None, cases: int | None = None) -> Task:
        """Return the task that learns a word from the first `cases` images of a class."""
        s = self.s
        settings = {
            "base": s.base, "base_hash": self.base_hash, "token": TOKEN, "cases": cases or s.cases,
            "inversion": self._inversion(vectors),
        }  # fmt: skip
        return Task("embedding", settings, (train,))

    def shipped_word(
        self, train: Task, *, vectors: int | None = None, cases: int | None = None
    ) -> Task:
        """Return the word of a class of phantoms that comes with the package, else `word`.

        It must have been learned as the study would learn it.
        """
        s, vectors, cases = self.s, vectors or self.s.vectors, cases or self.s.cases
        name, label = (str(train.settings.get(key)) for key in ("kind", "label"))
        other = s.base != "tiny" or train.settings.get("size") != SIZE
        if other or (name, label, vectors, cases) not in SPECS:
            return self.word(train, vectors=vectors, cases=cases)
        word = Embedding.load(find_trained(name, label, n_vectors=vectors, cases=cases))
        if word.record["settings"] != self._inversion(vectors):
            return self.word(train, vectors=vectors, cases=cases)
        settings = {
            "kind": name, "label": label, "vectors": vectors, "cases": cases,
            "base_hash": self.base_hash, "hash": hash_tensors({"v": word.vectors}),
        }  # fmt: skip
        return Task("word", settings)

    def _inversion(self, vectors: int | None) -> dict[str, Any]:
        """Return the settings that a word is learned with."""
        changes = {**self.s.overrides, "n_vectors": vectors or self.s.vectors}
        return asdict(InversionSettings.preset(self.s.inversion, **changes))

    def blocks(
        self, words: Sequence[Task], prompt: str = TOKEN, *, n: int, steps: int | None = None,
        cfg_scale: float | None = None, seed: int = 0, tokens: Sequence[str] = (),
    ) -> tuple[Task, ...]:  # fmt: skip
        """Return the tasks of `n` images in blocks of 16, the last one filled up.

        All words are learned as ``<class>``; `tokens` renames them for a prompt of several.
        """
        s = self.s
        settings: dict[str, Any] = {
            "base": s.base, "base_hash": self.base_hash, "prompt": prompt,
            "steps": steps or s.steps, "size": s.size, "seed": seed,
            "cfg_scale": float(s.cfg_scale if cfg_scale is None else cfg_scale),
        }  # fmt: skip
        if tokens:
            settings["tokens"] = list(tokens)
        blocks = range(-(-n // BLOCK))
        return tuple(Task("block", settings | {"block": i}, tuple(words)) for i in blocks)

    def describe(self, phantoms: bool) -> str:
        """Say what the images are, as every report does."""
        base = "on the tiny base" if self.s.base == "tiny" else f"on base {self.s.base}"
        real = "phantoms" if phantoms else "the images given"
        return f"Synthetic images {base}, {real} as real ones."
