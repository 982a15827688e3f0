"""Where a study runs: here, in several processes, in k shares of a job array, or on a Ray cluster.

All engines call `ensure` on the same tasks, so the results are the same bytes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any

import torch

from medbudget.processes import start_worker
from medbudget.progress import quiet, tqdm
from medbudget.runs import Stopped
from medbudget.settings import check_counts
from medbudget.studies.drawing import get_base
from medbudget.studies.tasks import KINDS, Store, Task, check_needs, ensure, in_order


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
