"""A study's tasks: functions of settings and inputs, their results named by a hash of both.

`ensure` makes a result unless it is there: under a lock, in a scratch folder, and renamed at the
end. So a study can be killed at any moment and run again, or run by many processes on one shared
folder, and nothing is made twice but what was in flight.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from medbudget.files import hash_settings, write_json, write_tensors


@dataclass(frozen=True, eq=False)
class Task:
    """One result of a study."""

    kind: str  # what is computed: a key of KINDS
    settings: Mapping[str, Any]  # JSON types: all that the result depends on beside its inputs
    inputs: tuple[Task, ...] = ()  # results that it is computed from

    @cached_property
    def key(self) -> str:
        """Name of the result: 12 hex digits of kind, settings and the inputs' keys."""
        inputs = [task.key for task in self.inputs]
        return hash_settings({"kind": self.kind, "settings": dict(self.settings), "inputs": inputs})


def score_sets(
    kind: str, settings: Mapping[str, Any], *sets: tuple[Sequence[Task], int],
    others: Sequence[Task] = (),
) -> Task:  # fmt: skip
    """Return a task over sets of images, of each the first n; see `Store.read_sets`."""
    cuts = {"sets": [[len(tasks), n] for tasks, n in sets]}
    inputs = [task for tasks, _ in sets for task in tasks]
    return Task(kind, {**settings, **cuts}, (*inputs, *others))


@dataclass(frozen=True)
class Store:
    """The folder of a study's results, ``folder/KIND/KEY.EXT``, and the files that it reads."""

    folder: Path
    sources: Mapping[str, Path] = field(default_factory=dict)  # by role: see `Recipe.roles`

    def path(self, task: Task) -> Path:
        """Return where a task's result is, or will be."""
        return self.folder / task.kind / f"{task.key}{KINDS[task.kind].suffix}"

    def has(self, task: Task) -> bool:
        """Tell whether the result is there."""
        return self.path(task).exists()

    def scratch(self, task: Task, name: str = "") -> Path:
        """Return the folder of a task's checkpoint and lock, or a file there, while it is made."""
        return self.folder / "scratch" / task.key / name

    def read_json(self, task: Task) -> Any:
        """Return a result of kind JSON."""
        return json.loads(self.path(task).read_text(encoding="utf-8"))

    def read_images(self, tasks: Sequence[Task]) -> torch.Tensor:
        """Return the images ``(N, 3, H, W) uint8`` of tasks that make images."""
        return torch.cat([load_file(self.path(task))["images"] for task in tasks])

    def read_sets(self, task: Task) -> list[torch.Tensor]:
        """Return the sets of images that a task's settings ``sets`` cut its inputs into."""
        inputs = iter(task.inputs)
        return [
            self.read_images([next(inputs) for _ in range(count)])[:n]
            for count, n in task.settings["sets"]
        ]


Run = Callable[[Task, Store], Any]


@dataclass(frozen=True)
class Kind:
    """How the tasks of a kind are run."""

    run: Run  # returns a dict (JSON), images, or what writes the result to a path
    suffix: str  # of the result's file
    heavy: bool = False  # wants a GPU where there is one
    needs: Run | None = None  # loads what a task needs beside its inputs, or raises


KINDS: dict[str, Kind] = {}
_ALONE = Lock()  # the number of threads is of a whole process


def kind(name: str, suffix: str = ".json", **options: Any) -> Callable[[Run], Run]:
    """Decorate the function that runs tasks of a kind."""

    def register(run: Run) -> Run:
        KINDS[name] = Kind(run, suffix, **options)
        return run

    return register


def in_order(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks and all that they need, each key once, in levels: inputs come first."""
    levels: dict[str, int] = {}
    every: dict[str, Task] = {}

    def visit(task: Task) -> int:
        if task.key not in levels:
            levels[task.key] = 1 + max(map(visit, task.inputs), default=-1)
            every[task.key] = task
        return levels[task.key]

    for task in tasks:
        visit(task)
    return sorted(every.values(), key=lambda task: levels[task.key])


def count(tasks: Sequence[Task], store: Store) -> dict[str, tuple[int, int]]:
    """Return by kind how many results are there, and how many there will be."""
    every = in_order(tasks)
    done = Counter(task.kind for task in every if store.has(task))
    return {kind: (done[kind], n) for kind, n in Counter(task.kind for task in every).items()}


def check_needs(tasks: Sequence[Task], store: Store) -> None:
    """Load what the missing results need, so that a study ends before its first task if one fails."""
    for task in in_order(tasks):
        needs = KINDS[task.kind].needs
        if needs is not None and not store.has(task):
            needs(task, store)


def ensure(task: Task, store: Store, *, wait: float = 1.0) -> int:
    """Make a result and what it needs, unless others have; return how many this call made."""
    path, scratch = store.path(task), store.scratch(task)
    made = 0
    while not path.exists() or scratch.exists():  # the scratch folder is removed last
        if not path.exists():
            made += sum(ensure(needed, store, wait=wait) for needed in task.inputs)
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(scratch / "lock", timeout=0).acquire()
        except (Timeout, FileNotFoundError):  # in use, or removed just now by who was done
            time.sleep(wait)
            continue
        with held:
            if not path.exists():
                make_result(task, store)
                made += 1
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def make_result(task: Task, store: Store) -> None:
    """Make a result out of its inputs, which are there.

    It is computed on one thread: sums in another order would make the bytes depend on the cores.
    """
    path = store.path(task)
    with _ALONE:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            result = KINDS[task.kind].run(task, store)
        finally:
            torch.set_num_threads(threads)
    temporary = store.scratch(task, f"result{path.suffix}")
    if isinstance(result, dict):
        write_json(temporary, result)
    elif isinstance(result, torch.Tensor):
        write_tensors(temporary, {"images": result})
    else:
        result(temporary)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, path)
