"""Work for a widget in a thread of its own: the newest request alone, stopped when out of date."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

DELAY = 0.4  # seconds without a change before work starts


class Stopped(Exception):
    """Raised inside a job when it is out of date or was stopped."""


class Live:
    """Runs the newest of many requests in a thread, so that the kernel stays free.

    A request waits `delay` seconds for a newer one, which replaces it; a job that is already
    running when a newer one comes, or when `stop` is called, ends at its next ``check()``.

    Parameters
    ----------
    work : callable
        ``work(check, *arguments)``; calls ``check()`` often.
    report : callable
        Told "waiting", "drawing", "done", "stopped" or "error: …".
    """

    def __init__(
        self, work: Callable[..., None], report: Callable[[str], None], *, delay: float = DELAY
    ) -> None:
        self.work, self.report, self.delay = work, report, delay
        self._newest = 0
        self._lock = threading.Lock()  # one job at a time
        self._timer = threading.Timer(0, print)

    def request(self, *arguments: Any) -> None:
        """Ask for ``work(check, *arguments)`` soon."""
        self._cancel()
        self.report("waiting")
        self._timer = threading.Timer(self.delay, self._run, (self._newest, arguments))
        self._timer.daemon = True
        self._timer.start()

    def stop(self, *_: Any) -> None:
        """End what waits or runs."""
        self._cancel()
        self.report("stopped")

    def wait(self, seconds: float = 60) -> None:
        """Block until the last request is done (for scripts and tests)."""
        if self._timer.is_alive():
            self._timer.join(seconds)

    def _cancel(self) -> None:
        self._newest += 1
        self._timer.cancel()

    def _run(self, number: int, arguments: tuple[Any, ...]) -> None:
        def check(_: Any = None) -> None:
            if number != self._newest:
                raise Stopped

        with self._lock:
            try:
                check()
                self.report("drawing")
                self.work(check, *arguments)
                check()
                self.report("done")
            except Stopped:
                pass
            except Exception as error:  # a thread's exception would be lost: show it
                self.report(f"error: {error}")
