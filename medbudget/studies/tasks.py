"""A study's tasks: pure functions of settings and inputs, their results named by a hash of both.

Whoever needs a result calls `ensure`. It is there, or it is made under a lock of the operating
system, in the folder of scratch files, and renamed. So a study can be killed anywhere, run again, or
run by many processes on one shared folder, and nothing is made twice but what was in flight.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors

from medbudget.artifacts import remove_checkpoint
from medbudget.base import Base, load_base
from medbudget.data.phantoms import make_phantoms
from medbudget.embeddings import Embedding
from medbudget.files import (
    InUseError,
    hash_settings,
    hash_tensors,
    hold,
    lock_file,
    write_bytes,
    write_json,
    write_text,
)
from medbudget.images import load_images
from medbudget.inversion import InversionSettings, invert
from medbudget.metrics import permutation_test
from medbudget.metrics.evaluation import frechet_score
from medbudget.metrics.features import features, load_extractor
from medbudget.sampling import sample

BLOCK = 16


@dataclass(frozen=True, eq=False)
class Task:
    """One result of a study.

    Attributes
    ----------
    kind : str
        One of `KINDS`: what is computed.
    settings : mapping
        JSON types; all that the result depends on beside its inputs.
    inputs : tuple of Task
        Results that it is computed from.
    """

    kind: str
    settings: Mapping[str, Any]
    inputs: tuple[Task, ...] = ()

    @cached_property
    def key(self) -> str:
        """Name of the result: 12 hex digits of kind, settings and the inputs' keys."""
        return hash_settings(
            {
                "kind": self.kind,
                "settings": dict(self.settings),
                "inputs": [task.key for task in self.inputs],
            }
        )


@dataclass(frozen=True)
class Store:
    """The folder of a study's results.

    Attributes
    ----------
    folder : Path
        ``folder/KIND/KEY.EXT`` holds a result and ``KEY.about.json`` what made it and how long
        that took.
    sources : mapping of str to path
        Folders of images, by the name that tasks of kind ``images`` call them.
    """

    folder: Path
    sources: Mapping[str, Path] = field(default_factory=dict)

    def path(self, task: Task) -> Path:
        """Return where a task's result is, or will be."""
        return self.folder / task.kind / f"{task.key}{KINDS[task.kind].suffix}"

    def has(self, task: Task) -> bool:
        """Tell whether the result is there."""
        return self.path(task).exists()

    def seconds(self, task: Task) -> float | None:
        """Return how long the result took to make, if it is there."""
        about = self.path(task).with_suffix(".about.json")
        if not (self.has(task) and about.exists()):
            return None
        value: float = json.loads(about.read_text(encoding="utf-8"))["seconds"]
        return value


# ------------------------------------------------------------------------------- what tasks do


@lru_cache(maxsize=1)
def _base(name: str) -> Base:
    return load_base(name)


def get_base(settings: Mapping[str, Any]) -> Base:
    """Return the base that a task names, checked against the hash it was planned with."""
    base = _base(settings["base"])
    if base.hash != settings["base_hash"]:
        raise ValueError(
            f"base {settings['base']} has hash {base.hash} here, the study was planned with "
            f"{settings['base_hash']}: use the same weights on every machine, or plan anew"
        )
    return base


def read_images(store: Store, tasks: Sequence[Task]) -> torch.Tensor:
    """Return the images ``(N, 3, H, W) uint8`` of tasks of kind ``images`` and ``block``."""
    return torch.cat([load_file(store.path(task))["images"] for task in tasks])


def _run_images(task: Task, store: Store, path: Path, scratch: Path) -> None:
    s = task.settings
    if s["source"] == "phantoms":
        images = make_phantoms(
            s["kind"], s["label"], s["n"], size=s["size"], seed=s["seed"], split=s["split"]
        ).images
    else:
        images = read_source(store.sources, s["source"], s["size"])
        if hash_tensors({"images": images}) != s["hash"]:
            raise ValueError(
                f"the images of {s['source']} are not those that the study was "
                "planned with: restore them, or plan anew"
            )
        images = images[: s["n"]]
    write_bytes(path, save_safetensors({"images": images.contiguous()}))


def read_source(sources: Mapping[str, Path], name: str, size: int) -> torch.Tensor:
    """Return the images of a named folder, or of one in it: ``role/train/healthy``.

    Raises
    ------
    ValueError
        No folder was given under this name.
    """
    role, _, inner = name.partition("/")
    if role not in sources:
        have = ", ".join(sources) or "none"
        raise ValueError(f"no folder of images {name!r} was given (given: {have}); use --data")
    return load_images(sources[role] / inner, size=size)


def _run_embedding(task: Task, store: Store, path: Path, scratch: Path) -> None:
    s = task.settings
    cases = read_images(store, task.inputs)[: s["cases"]]
    settings = InversionSettings(**s["inversion"])
    embedding = invert(
        get_base(s), cases, token=s["token"], settings=settings,
        checkpoint=scratch.with_suffix(".ckpt"), data=f"{s['cases']} cases of a study",
    )  # fmt: skip
    record = {key: value for key, value in embedding.record.items() if key != "seconds"}
    replace(embedding, record=record).save(path)


def _run_block(task: Task, store: Store, path: Path, scratch: Path) -> None:
    s = task.settings
    tokens = s.get("tokens") or ["<class>"] * len(task.inputs)
    words = [Embedding.load(store.path(t), token=name) for t, name in zip(task.inputs, tokens)]
    images = sample(
        get_base(s), s["prompt"], embeddings=words, n=BLOCK, steps=s["steps"],
        cfg_scale=s["cfg_scale"], seed=s["seed"] + BLOCK * s["block"], batch_size=BLOCK,
        size=s["size"],
    )  # fmt: skip
    write_bytes(path, save_safetensors({"images": images}))


def read_sets(task: Task, store: Store) -> list[torch.Tensor]:
    """Return the sets of images that a task's settings ``sets`` cut its inputs into."""
    found, first = [], 0
    for count, n in task.settings["sets"]:
        found.append(read_images(store, task.inputs[first : first + count])[:n])
        first += count
    return found


def _run_score(task: Task, store: Store, path: Path, scratch: Path) -> None:
    made, real = read_sets(task, store)
    scores: dict[str, Any] = {}
    for name in task.settings["extractors"]:
        extractor = load_extractor(name)
        x, y = features(real, extractor), features(made, extractor)
        scores[extractor.distance_name] = frechet_score(x, y, extractor).to_dict()
    write_json(path, scores)


def _run_compare(task: Task, store: Store, path: Path, scratch: Path) -> None:
    a, b, real = (features(x, task.settings["extractor"]) for x in read_sets(task, store))
    test = permutation_test(
        a, b, real, paired=task.settings["paired"], repeats=task.settings["repeats"], seed=0
    )
    write_json(path, {"difference": test.difference, "p_value": test.p_value})


def _steps_of_training(task: Task) -> float:
    inversion = task.settings["inversion"]
    return float(inversion["steps"] * inversion["batch_size"])


def _passes_of_sampling(task: Task) -> float:
    return float(task.settings["steps"] * (1 if task.settings["cfg_scale"] == 1 else 2))


def count_images(task: Task) -> float:
    """Return how many images the sets of a task hold: the cost of kinds that compare sets."""
    return float(sum(n for _, n in task.settings["sets"]))


def _cut_training(task: Task, parts: int) -> Task:
    inversion = task.settings["inversion"] | {"steps": 4 * parts}
    return Task(task.kind, dict(task.settings) | {"inversion": inversion}, task.inputs)


def _cut_sampling(task: Task, parts: int) -> Task:
    return Task(task.kind, dict(task.settings) | {"steps": 2 * parts}, task.inputs)


def cut_sets(task: Task, parts: int) -> Task:
    """Keep so many blocks of each set, or all of a set that is one file, but as few images."""
    sets: list[list[int]] = []
    inputs: list[Task] = []
    first = 0
    for count, n in task.settings["sets"]:
        keep = min(count, parts)
        sets.append([keep, min(n, BLOCK * parts)])
        inputs += task.inputs[first : first + keep]
        first += count
    return Task(task.kind, dict(task.settings) | {"sets": sets}, tuple(inputs))


@dataclass(frozen=True)
class Kind:
    """What a kind of task runs and which file it makes.

    Attributes
    ----------
    run : callable
        ``run(task, store, path, scratch)`` writes the result to `path`, from the inputs'
        ``store.path(…)``; `scratch` is a path for checkpoints that outlive an interruption.
    suffix : str
    heavy : bool
        Whether it wants a GPU where there is one.
    cost : callable
        Relative cost within the kind, to estimate the time of those that are missing.
    cut : callable, optional
        ``cut(task, parts)``: a small version, of 1 or 2 parts, to time before any is done; as it
        is where None.
    """

    run: Callable[[Task, Store, Path, Path], None]
    suffix: str
    heavy: bool = False
    cost: Callable[[Task], float] = lambda task: 1.0
    cut: Callable[[Task, int], Task] | None = None


KINDS = {
    "images": Kind(_run_images, ".safetensors"),
    "embedding": Kind(_run_embedding, ".safetensors", True, _steps_of_training, _cut_training),
    "block": Kind(_run_block, ".safetensors", True, _passes_of_sampling, _cut_sampling),
    "score": Kind(_run_score, ".json", cost=count_images, cut=cut_sets),
    "compare": Kind(_run_compare, ".json", cost=count_images, cut=cut_sets),
}


def warm_up(task: Task) -> None:
    """Load what a task's process loads once, so that it is not in the task's measured time."""
    if "base_hash" in task.settings:
        get_base(task.settings)


def in_order(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks and all that they need, inputs first, each key once."""
    found: dict[str, Task] = {}

    def visit(task: Task) -> None:
        if task.key not in found:
            for needed in task.inputs:
                visit(needed)
            found[task.key] = task

    for task in tasks:
        visit(task)
    return list(found.values())


# --------------------------------------------------------------------------------- making them


def ensure(task: Task, store: Store, *, wait: float = 1.0) -> int:
    """Make a result and whatever it needs, unless they are there; return how many this call made.

    Where another process makes it, wait until it is done, or until that process has died.
    """
    path = store.path(task)
    made = 0
    while not path.exists():
        made += sum(ensure(needed, store, wait=wait) for needed in task.inputs)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with hold(path):
                if not path.exists():
                    _make(task, store, path)
                    return made + 1
        except InUseError:
            time.sleep(wait)
    if lock_file(path).exists():  # of one who died between renaming and letting go
        with suppress(InUseError), hold(path):
            remove_checkpoint(_scratch(task, store).with_suffix(".ckpt"))
    return made


def _scratch(task: Task, store: Store) -> Path:
    return store.folder / "scratch" / task.key


def _make(task: Task, store: Store, path: Path) -> None:
    scratch = _scratch(task, store)
    scratch.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    result = scratch.with_suffix(path.suffix)
    with one_thread():
        KINDS[task.kind].run(task, store, result, scratch)
    write_json(
        path.with_suffix(".about.json"),
        {
            "kind": task.kind,
            "settings": dict(task.settings),
            "inputs": [t.key for t in task.inputs],
            "seconds": round(time.monotonic() - start, 2),
        },
    )
    os.replace(result, path)
    remove_checkpoint(scratch.with_suffix(".ckpt"))


_threads: list[int] = []  # what to go back to, once for each thread of Python that is at work


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: sums in another order would make the bytes depend on the cores.

    Studies use more cores by more workers, which is faster too where matrices are small.
    """
    _threads.append(torch.get_num_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        before = _threads.pop()
        if not _threads:
            torch.set_num_threads(before)


def check_shared(folder: Path) -> str:
    """Write a random word into the store, for `see_shared` on another machine to find."""
    word = os.urandom(8).hex()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "shared.txt", word)
    return word


def see_shared(folder: Path, word: str) -> bool:
    """Tell whether this machine sees the word that `check_shared` wrote."""
    file = folder / "shared.txt"
    return file.exists() and file.read_text(encoding="utf-8") == word
