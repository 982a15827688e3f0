"""Workers that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

import torch


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
