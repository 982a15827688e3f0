"""Run a function over many jobs; workers end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

import torch

from medbudget.progress import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


def start_worker() -> None:
    """Begin a worker of a pool: one thread, deaf to Ctrl-C, ending with its parent.

    Threads started before a fork are not there after it. Ctrl-C reaches all processes of a terminal;
    the parent decides. A parent that was killed cannot tell its workers, which would go on for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def run_parallel(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, workers: int, desc: str
) -> Iterator[tuple[Job, Result]]:
    """Yield each job with what the function returns for it, in processes where that pays."""
    jobs = list(jobs)
    with tqdm(total=len(jobs), desc=desc, unit="image") as bar:
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                yield job, function(job)
                bar.update()
            return
        # as torch's own DataLoader: fork on Linux, where it saves each worker all imports
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        pool = ProcessPoolExecutor(
            min(workers, len(jobs)), mp_context=context, initializer=start_worker
        )
        try:
            futures = {pool.submit(function, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.update()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died (out of memory?); what was made is kept: run the same "
                "command again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
