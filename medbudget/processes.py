"""Stopping where one can go on: signals between two steps, workers that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import torch


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Put Ctrl-C and SIGTERM off to the end of the block; yields whether one has come.

    A loop asks between two steps, and saves what it has before it leaves the block. Then the signal
    does what it would have done. A second one does so at once. Outside the main thread, which alone
    gets signals, nothing is put off.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            restore()
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        restore()
        if len(came) == 1:
            signal.raise_signal(came[0])


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
