"""What all studies are made of: real images, words that are learned from them, images drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medbudget.adapter_files import is_adapter
from medbudget.adapters import Adapter
from medbudget.classifier import ClassifierSettings
from medbudget.data.phantoms import make_phantoms
from medbudget.embeddings import Embedding
from medbudget.files import hash_tensors
from medbudget.images import load_images, shrink
from medbudget.sampling.sampler import sample
from medbudget.studies.study import StudySettings
from medbudget.studies.tasks import Store, Task, check_planned, kind, load_task_base
from medbudget.tiny import SIZE, SPECS, find_trained
from medbudget.training.inversion import InversionSettings, invert

BLOCK = 16  # images of one task
TOKEN = "<class>"  # of every word that a study learns


def read_source(sources: Mapping[str, Path], name: str, size: int) -> torch.Tensor:
    """Return the images of a named folder, or of one in it: ``role/train/healthy``."""
    role, _, inner = name.partition("/")
    if role not in sources:
        raise ValueError(f"no folder of images {role!r} was given; use --data {role}=FOLDER")
    return load_images(sources[role] / inner, size=size)


@kind("images", ".safetensors")
def _run_images(task: Task, store: Store) -> torch.Tensor:
    s = task.settings
    if s["source"] == "phantoms":
        what = {key: s[key] for key in ("size", "seed", "split")}
        return make_phantoms(s["kind"], s["label"], s["n"], **what).images
    images = read_source(store.sources, s["source"], s["size"])
    check_planned(f"folder {s['source']}", hash_tensors({"images": images}), s["hash"])
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
    path = find_trained(s["kind"], s["label"], n_vectors=s["vectors"], cases=s["cases"])
    word = Embedding.load(path)
    check_planned("the base of the words that ship", word.base_hash, s["base_hash"])
    check_planned(f"the word for {s['label']}", hash_tensors({"v": word.vectors}), s["hash"])
    return replace(word, token=TOKEN).save


def load_trained(path: Path, token: str = TOKEN) -> Embedding | Adapter:
    """Read a word, under a token, or an adapter."""
    return Adapter.load(path) if is_adapter(path) else Embedding.load(path, token=token)


@kind("drawn", ".safetensors", heavy=True, needs=load_task_base)
@kind("block", ".safetensors", heavy=True, needs=load_task_base)
def _run_block(task: Task, store: Store) -> torch.Tensor:
    s = task.settings
    tokens = s.get("tokens") or [TOKEN] * len(task.inputs)
    trained = [load_trained(store.path(one), token) for one, token in zip(task.inputs, tokens)]
    options: dict[str, Any] = {
        "embeddings": [one for one in trained if isinstance(one, Embedding)],
        "adapters": [one for one in trained if isinstance(one, Adapter)],
    }
    return sample(
        load_task_base(task, store), s.get("prompt", TOKEN), n=BLOCK, batch_size=BLOCK,
        steps=s["steps"], cfg_scale=s["cfg_scale"], seed=s["seed"] + BLOCK * s["block"],
        size=s["size"], **options,
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Plans the tasks that studies share."""

    s: StudySettings
    base_hash: str
    sources: Mapping[str, Path]  # folders of real images and other files, by role

    @property
    def base(self) -> dict[str, Any]:
        """The base, as settings of a task."""
        return {"base": self.s.base, "base_hash": self.base_hash}

    def inversion(self, **changes: Any) -> InversionSettings:
        """Return the settings that words are learned with."""
        return InversionSettings.preset(self.s.inversion, **{**self.s.overrides, **changes})

    def classifier(self) -> ClassifierSettings:
        """Return the settings of all classifiers."""
        return ClassifierSettings.preset(self.s.classifier, **self.s.changes)

    def phantoms(self, kind: str, label: str, split: str, n: int) -> Task:
        """Return the task of `n` phantoms of a class."""
        settings = {
            "source": "phantoms", "kind": kind, "label": label, "split": split, "seed": 0, "n": n,
            "size": self.s.size,
        }  # fmt: skip
        return Task("images", settings)

    def folder(self, source: str, n: int) -> Task:
        """Return the task of the first `n` images of a folder (see `read_source`), or raise."""
        images = read_source(self.sources, source, self.s.size)
        if len(images) < n:
            raise ValueError(
                f"{len(images)} images for {source}, {n} are needed: give more, or ask for fewer"
            )
        digest = hash_tensors({"images": images})
        return Task("images", {"source": source, "hash": digest, "n": n, "size": self.s.size})

    def shrink(self, tasks: Sequence[Task], size: int) -> tuple[Task, ...]:
        """Return tasks of images of `size` pixels: those given, or one that averages them down."""
        if size == self.s.size:
            return tuple(tasks)
        return (Task("shrunk", {"size": size}, tuple(tasks)),)

    def word(self, train: Task, *, vectors: int | None = None, cases: int | None = None) -> Task:
        """Return the task of a word that is learned from the first `cases` images of a class.

        A word that ships with the package stands in where it was learned in the same way.
        """
        s, vectors, cases = self.s, vectors or self.s.vectors, cases or self.s.cases
        inversion = asdict(self.inversion(n_vectors=vectors))
        kind, label, size = (train.settings.get(key, "") for key in ("kind", "label", "size"))
        if (s.base, size) == ("tiny", SIZE) and (kind, label, vectors, cases) in SPECS:
            word = Embedding.load(find_trained(kind, label, n_vectors=vectors, cases=cases))
            if word.record["settings"] == inversion:
                settings = {
                    "kind": kind, "label": label, "vectors": vectors, "cases": cases,
                    "base_hash": self.base_hash, "hash": hash_tensors({"v": word.vectors}),
                }  # fmt: skip
                return Task("word", settings)
        settings = self.base | {"token": TOKEN, "cases": cases, "inversion": inversion}
        return Task("embedding", settings, (train,))

    def blocks(
        self, inputs: Sequence[Task], *, n: int, kind: str = "block", **changes: Any
    ) -> tuple[Task, ...]:
        """Return the tasks of `n` images in blocks of 16, the last one filled up.

        `changes` are to the settings of a block: ``cfg_scale``, ``seed``, and for words ``prompt``
        and ``tokens``, which rename them: all are learned as ``<class>``.
        """
        s = self.s
        settings = self.base | {
            "steps": s.steps, "size": s.size, "cfg_scale": float(s.cfg_scale), "seed": 0,
        }  # fmt: skip
        settings |= {"prompt": TOKEN} if kind == "block" else {}
        blocks = [settings | changes | {"block": i} for i in range(-(-n // BLOCK))]
        return tuple(Task(kind, block, tuple(inputs)) for block in blocks)

    def describe(self, phantoms: bool) -> str:
        """Say what the images are, as every report does."""
        real = "phantoms" if phantoms else "the images given"
        return f"Synthetic images on base {self.s.base}, {real} as real ones."
