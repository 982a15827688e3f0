"""Run a function over many jobs, in processes where that pays."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from medbudget.processes import start_worker
from medbudget.progress import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_parallel(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, workers: int, desc: str
) -> Iterator[tuple[Job, Result]]:
    """Yield each job with what the function returns for it, in processes where that pays."""
    jobs = list(jobs)
    if not jobs:
        return
    with tqdm(total=len(jobs), desc=desc, unit="image") as bar:
        if workers == 1 or len(jobs) == 1:
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
