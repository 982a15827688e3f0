"""Where a study runs: here, on several GPUs, in k shares of a job array, or on a Ray cluster.

All engines call `ensure` on the same tasks in the same blocks, so the results are the same bytes.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from medbudget.progress import tqdm
from medbudget.studies.tasks import (
    KINDS,
    Store,
    Task,
    check_shared,
    ensure,
    in_order,
    see_shared,
)

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Plan:
    """What a study has and lacks.

    Attributes
    ----------
    total, done : dict of str to int
        Tasks by kind.
    seconds : dict of str to float or None
        Estimated time of the missing ones by kind, from those that are done; None where none is.
    bytes : int or None
        Estimated size of what is missing.
    """

    total: dict[str, int]
    done: dict[str, int]
    seconds: dict[str, float | None]
    bytes: int | None


def plan(tasks: Sequence[Task], store: Store) -> Plan:
    """Count what is there and what is missing, and estimate time and disk from measured ones."""
    total: dict[str, int] = {}
    done: dict[str, int] = {}
    rates: dict[str, list[float]] = {}
    sizes: dict[str, list[int]] = {}
    missing: list[Task] = []
    for task in in_order(tasks):
        total[task.kind] = total.get(task.kind, 0) + 1
        done.setdefault(task.kind, 0)
        if store.has(task):
            done[task.kind] += 1
            sizes.setdefault(task.kind, []).append(store.path(task).stat().st_size)
            seconds = store.seconds(task)
            if seconds is not None:
                rates.setdefault(task.kind, []).append(seconds / KINDS[task.kind].cost(task))
        else:
            missing.append(task)
    estimate: dict[str, float | None] = {}
    size: float | None = 0.0
    for kind in total:
        lacking = [task for task in missing if task.kind == kind]
        known = rates.get(kind)
        cost = sum(map(KINDS[kind].cost, lacking))
        estimate[kind] = cost * sum(known) / len(known) if known else (None if lacking else 0.0)
        if size is not None and lacking:
            have = sizes.get(kind)
            size = size + len(lacking) * sum(have) / len(have) if have else None
    return Plan(total, done, estimate, None if size is None else round(size))


def simulate(
    tasks: Sequence[Task], seconds: Callable[[Task], float], workers: int
) -> tuple[float, float]:
    """Return when a study would end on `workers` machines, and their busy time, in seconds.

    List scheduling (Graham 1966): whoever is free takes the first task whose inputs are there.

    Parameters
    ----------
    seconds : callable
        How long a task takes.

    Raises
    ------
    ValueError
        No workers.
    """
    if workers < 1:
        raise ValueError(f"at least one worker is needed, got {workers}")
    waiting = in_order(tasks)
    ends: dict[str, float] = {}
    running: list[tuple[float, str]] = []
    now = busy = 0.0
    while waiting or running:
        for task in list(waiting):
            if len(running) == workers:
                break
            if all(ends.get(t.key, float("inf")) <= now for t in task.inputs):
                length = seconds(task)
                ends[task.key] = now + length
                busy += length
                heapq.heappush(running, (now + length, task.key))
                waiting.remove(task)
        now, _ = heapq.heappop(running)
    return now, busy


def clean(tasks: Sequence[Task], store: Store, *, delete: bool = False) -> dict[Path, int]:
    """Return files of the store that `tasks` do not use, with their sizes, and delete them if told.

    Only what `ensure` writes is looked at: results by kind, what is said about them, and scratch.
    """
    used = {store.path(task) for task in in_order(tasks)}
    used |= {path.with_suffix(".about.json") for path in used}
    folders = [store.folder / name for name in (*KINDS, "scratch")]
    found = {
        path: path.stat().st_size
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path not in used and path.is_file() and path.suffix != ".claim"
    }
    for path in found if delete else ():
        path.unlink(missing_ok=True)
    return found


def parse_shard(text: str) -> tuple[int, int]:
    """Return (i, k) of ``"i/k"``, i from 1 to k: share i of k.

    Raises
    ------
    ValueError
        Another form or range.
    """
    left, _, right = text.partition("/")
    if not (left.isdigit() and right.isdigit() and 1 <= int(left) <= int(right)):
        raise ValueError(
            f"shard {text!r} is not of the form i/k with i from 1 to k, such as 3/8; in a SLURM "
            "array: --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT with --array=1-8"
        )
    return int(left), int(right)


def run(
    tasks: Sequence[Task],
    store: Store,
    *,
    engine: str = "local",
    shard: str = "1/1",
    address: str | None = None,
    gpus: float | None = None,
    on_done: Callable[[Task], None] | None = None,
) -> int:
    """Make the results that are missing; return how many this call made.

    Parameters
    ----------
    tasks : sequence of Task
        The wanted results; what they need is made too.
    engine : {"local", "ray"}
        ``local``: this process, or one process per GPU where there are several. ``ray``: the
        cluster at `address`, or one that is started here.
    shard : str
        ``"i/k"``: only every k-th task, from the i-th. Shares may run side by side on one folder.
    address : str, optional
        Of a Ray cluster.
    gpus : float, optional
        GPUs that a heavy Ray task asks for; default 1 where the cluster has any, else 0.
    on_done : callable, optional
        Called in this process with each task that is there (local engine with one process).

    Raises
    ------
    ValueError
        Unknown engine or shard, or a store that Ray's nodes do not share.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; allowed are {', '.join(ENGINES)}")
    i, k = parse_shard(shard)
    mine = in_order(tasks)[i - 1 :: k]
    if engine == "ray":
        return _run_ray(mine, store, address, gpus)
    count = torch.cuda.device_count()
    if count > 1:
        return _run_gpus(mine, store, count)
    made = 0
    for task in tqdm(mine, desc="study", unit="task"):
        made += ensure(task, store)
        if on_done is not None:
            on_done(task)
    return made


def _work_on_gpu(number: int, count: int, tasks: Sequence[Task], store: Store) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    return sum(ensure(task, store) for task in tasks[number::count])


def _run_gpus(tasks: Sequence[Task], store: Store, count: int) -> int:
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        work = [pool.submit(_work_on_gpu, i, count, tasks, store) for i in range(count)]
        return sum(future.result() for future in work)


def _run_ray(tasks: Sequence[Task], store: Store, address: str | None, gpus: float | None) -> int:
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError:
        raise ValueError("engine ray needs Ray: pip install 'medbudget[ray]'") from None
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    store = Store(store.folder.resolve(), {n: p.resolve() for n, p in store.sources.items()})
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if gpus is None:
        gpus = 1.0 if any(node["Resources"].get("GPU") for node in nodes) else 0.0

    word = check_shared(store.folder)
    see: Any = ray.remote(num_cpus=0)(see_shared)
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        if not ray.get(see.options(scheduling_strategy=there).remote(store.folder, word)):
            raise ValueError(
                f"node {node['NodeManagerAddress']} does not see {store.folder}: the study's "
                "folder must be on storage that all nodes share under the same path (--store)"
            )

    def work(task: Task, store: Store, *needed: Any) -> int:
        return ensure(task, store)

    # Only lost nodes and processes are retried: an error of a task would come again.
    remote: Any = ray.remote(max_retries=-1)(work)
    refs: dict[str, Any] = {}
    for task in in_order(tasks):
        if not store.has(task):
            needed = [refs[t.key] for t in task.inputs if t.key in refs]
            share = gpus if KINDS[task.kind].heavy else 0
            refs[task.key] = remote.options(num_gpus=share).remote(task, store, *needed)
    made, waiting = 0, list(refs.values())
    with tqdm(total=len(waiting), desc="study on Ray", unit="task") as bar:
        while waiting:
            ready, waiting = ray.wait(waiting)
            made += sum(ray.get(ready))
            bar.update(len(ready))
    return made
