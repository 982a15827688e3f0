"""How far a study is, while it runs: bars in a terminal or notebook, lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from medbudget.progress import is_off, quiet, tqdm
from medbudget.studies.planning import Plan, plan
from medbudget.studies.tasks import Store, Task, in_order

LOOK = 1.0  # seconds between two looks at the store
LINE = 15.0  # seconds between two lines of a log


def format_time(seconds: float) -> str:
    """Return a time in the unit that suits it: ``40 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_line(tasks: Sequence[Task], store: Store, workers: int) -> str:
    """Return the state in one line: done of total by kind, seconds a task, and what is left."""
    found = plan(tasks, store)
    parts = []
    for kind, total in found.total.items():
        measured = found.speed.get(kind)
        each = ""
        if measured and found.done[kind]:
            mine = [t for t in in_order(tasks) if t.kind == kind]
            each = f" ({format_time(sum(map(measured.seconds, mine)) / total)} each)"
        parts.append(f"{kind} {found.done[kind]}/{total}{each}")
    return " · ".join(parts) + f"; {format_left(found, workers)}"


def format_left(found: Plan, workers: int) -> str:
    """Return what is left to do in words; a lower bound where a kind was not measured yet."""
    known = sum(seconds for seconds in found.seconds.values() if seconds is not None)
    if found.all_seconds is None and not known:
        return "time left not known yet"
    least = "about" if found.all_seconds is not None else "at least"
    return f"{least} {format_time(known / workers)} left"


@contextmanager
def show_progress(tasks: Sequence[Task], store: Store, workers: int) -> Iterator[None]:
    """Look at the store every second and show how far each kind of task is.

    It sees what others make in the same folder too. Bars where standard error is a terminal or a
    notebook, a line now and then where it is a file.
    """
    if is_off():
        yield
        return
    done = threading.Event()
    in_file = not (sys.stderr.isatty() or "ipykernel" in sys.modules)
    show = _lines if in_file else _bars
    thread = threading.Thread(target=show, args=(tasks, store, workers, done), daemon=True)
    thread.start()
    try:
        with quiet(in_file or workers > 1):
            yield
    finally:
        done.set()
        thread.join()


def _lines(tasks: Sequence[Task], store: Store, workers: int, done: threading.Event) -> None:
    last, before = "", -LINE
    while True:
        over = done.wait(LOOK)
        if over or time.monotonic() - before >= LINE:
            line = format_line(tasks, store, workers)
            if line != last:
                print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
                last, before = line, time.monotonic()
        if over:
            return


def _bars(tasks: Sequence[Task], store: Store, workers: int, done: threading.Event) -> None:
    missing = in_order(tasks)
    bars = {
        kind: tqdm(total=sum(t.kind == kind for t in missing), desc=f"{kind:<12}", unit="task")
        for kind in dict.fromkeys(task.kind for task in missing)
    }
    over = False
    start = True
    while True:
        there = [task for task in missing if store.has(task)]
        missing = [task for task in missing if task not in there]
        for task in there:
            bars[task.kind].update()
        if start:  # what was there before tells nothing of the speed
            for bar in bars.values():
                bar.initial = bar.n
                bar.refresh()
            start = False
        if there:
            left = format_left(plan(tasks, store), workers)
            next(iter(bars.values())).set_postfix_str(f"study: {left}")
        if over:
            break
        over = done.wait(LOOK)
    for bar in bars.values():
        bar.close()
