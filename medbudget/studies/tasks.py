"""A study's tasks: functions of settings and inputs, their results named by a hash of both.

A result is made under a lock, in a scratch folder, and renamed at the end. So a study can be killed
at any moment and run again, and runs here, in several processes, in k shares of a job array, or on a
Ray cluster: nothing is made twice but what was in flight, and the results are the same bytes.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from multiprocessing import active_children, get_context
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from medbudget.base import Base
from medbudget.files import hash_settings, write_json, write_tensors
from medbudget.loading import load_base
from medbudget.processes import start_worker
from medbudget.progress import quiet, tqdm
from medbudget.runs import Stopped
from medbudget.settings import check_counts


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


def check_planned(what: str, found: str, planned: str) -> None:
    """Raise unless something has the hash that it was planned with."""
    if found != planned:
        raise ValueError(
            f"{what} has hash {found} here, the study was planned with {planned}: use the same files "
            "and the same version of medbudget on every machine, or plan anew"
        )


@lru_cache(maxsize=1)
def get_base(name: str, base_hash: str) -> Base:
    """Load the base that a task names, checked against the hash it was planned with."""
    base = load_base(name)
    check_planned(f"base {name}", base.hash, base_hash)
    return base


def load_task_base(task: Task, store: Store) -> Base:
    """Load the base that a task's settings name."""
    return get_base(task.settings["base"], task.settings["base_hash"])


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


def parse_shard(text: str) -> tuple[int, int]:
    """Return (i, k) of ``"i/k"``, i from 1 to k: share i of k."""
    left, _, right = text.partition("/")
    if not (left.isdigit() and right.isdigit() and 1 <= int(left) <= int(right)):
        raise ValueError(
            f"shard {text!r} is not of the form i/k with i from 1 to k, such as 3/8; in a SLURM "
            "array: --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT with --array=1-8"
        )
    return int(left), int(right)


def run(
    tasks: Sequence[Task], store: Store, *, engine: str = "local", workers: int | None = None,
    shard: str = "1/1", address: str | None = None,
) -> int:  # fmt: skip
    """Make the results that are missing, and what they need; return how many this call made.

    Engine ``local`` is this process, or `workers` of them, by default one for each GPU; each loads
    the base, about 1 GB for ``tiny``. ``ray`` is the cluster at `address`, or one that is started
    here. `shard` ``"i/k"`` makes only every k-th task, from the i-th; shares may run side by side on
    one folder. All make the same bytes on machines of one kind.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f"unknown engine {engine!r}; allowed are local, ray")
    if engine == "ray" and workers is not None:
        raise ValueError("workers are for the local engine; Ray takes what its cluster has")
    i, k = parse_shard(shard)
    devices = torch.cuda.device_count()
    count = max(1, devices) if workers is None else workers
    check_counts(workers=count)
    check_needs(tasks, store)
    share = in_order(tasks)[i - 1 :: k]
    if engine == "local" and count == 1:
        with tqdm(share, desc="study", unit="task") as bar:
            return sum(ensure(task, store) for task in bar)
    get_base.cache_clear()  # others load it
    gc.collect()
    torch.cuda.empty_cache()
    if engine == "ray":
        return _run_ray(in_order(share), store, address)
    return _run_processes([task for task in share if not store.has(task)], store, count, devices)


def _run_processes(tasks: Sequence[Task], store: Store, workers: int, devices: int) -> int:
    others = set(active_children())
    context = get_context("spawn")
    numbers = context.Queue()
    for worker in range(workers):
        numbers.put(worker % devices if devices else None)
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(numbers,))
    with tqdm(total=len(tasks), desc="study", unit="task") as bar, quiet(), pool:
        futures = [pool.submit(_work, task, store) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
            return sum(future.result() for future in futures)
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died (out of memory?); what was made is kept: run the same "
                "command again with fewer --workers"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:
                process.terminate()  # a training saves its checkpoint first
            raise


def _start(numbers: Any) -> None:
    """Begin a worker, on a GPU of its own where there are some."""
    start_worker()
    device = numbers.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)


def _work(task: Task, store: Store) -> int:
    try:
        return ensure(task, store)
    except Stopped:  # the pool would give the next task to this process
        os._exit(1)


def _run_ray(tasks: Sequence[Task], store: Store, address: str | None) -> int:
    try:
        import ray
    except ImportError:
        raise ValueError("engine ray needs Ray: pip install 'medbudget[ray]'") from None
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    store = Store(store.folder.resolve(), {n: p.resolve() for n, p in store.sources.items()})
    gpus = float(any(n["Alive"] and n["Resources"].get("GPU") for n in ray.nodes()))

    def work(task: Task, store: Store, *needed: Any) -> int:
        return ensure(task, store)

    # Only lost nodes and processes are retried: an error of a task would come again.
    remote: Any = ray.remote(max_retries=-1)(work)
    refs: dict[str, Any] = {}
    paths = {}
    for task in tasks:
        if not store.has(task):
            needed = [refs[t.key] for t in task.inputs if t.key in refs]
            share = gpus if KINDS[task.kind].heavy else 0
            ref = remote.options(num_gpus=share).remote(task, store, *needed)
            refs[task.key], paths[ref] = ref, store.path(task)
    waiting, made = list(paths), 0
    with tqdm(total=len(waiting), desc="study", unit="task") as bar:
        while waiting:
            done, waiting = ray.wait(waiting)
            made += sum(ray.get(done))
            bar.update(len(done))
            if not all(paths[ref].exists() for ref in done):
                raise ValueError(
                    f"a node of the cluster does not write into {store.folder}: the study's folder "
                    "must be on storage that all nodes share under the same path (--store)"
                )
    return made
