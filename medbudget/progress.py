"""Progress bars that obey TQDM_DISABLE in notebooks too, where tqdm itself does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm as _tqdm


def tqdm(*args: Any, **kwargs: Any) -> Any:
    """Return ``tqdm.auto.tqdm``, disabled where the environment says TQDM_DISABLE=1.

    It says so now: tqdm itself reads the environment once, when it is imported.
    """
    off = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return _tqdm(*args, **{**kwargs, "disable": off or kwargs.get("disable", False)})


def say(message: str) -> None:
    """Print a line without disturbing a bar."""
    _tqdm.write(message)


def count(n: int, noun: str) -> str:
    """Write ``1 image`` or ``2 images``."""
    return f"{n} {noun}{'s' * (n != 1)}"


@contextmanager
def quiet() -> Iterator[None]:
    """Show no new bars, in this process and in those that it starts, inside the block."""
    before = os.environ.get("TQDM_DISABLE", "0")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ["TQDM_DISABLE"] = before
