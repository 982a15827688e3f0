"""Progress bars that obey TQDM_DISABLE in notebooks too, where tqdm itself does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm as _tqdm


def is_off() -> bool:
    """Tell whether the environment says TQDM_DISABLE=1."""
    return os.environ.get("TQDM_DISABLE", "0") not in ("", "0")


def tqdm(*args: Any, **kwargs: Any) -> Any:
    """Return ``tqdm.auto.tqdm``, disabled where the environment says TQDM_DISABLE=1.

    It says so now: tqdm itself reads the environment once, when it is imported.
    """
    kwargs["disable"] = is_off() or kwargs.get("disable", False)
    return _tqdm(*args, **kwargs)


def say(message: str) -> None:
    """Print a line without disturbing a bar."""
    _tqdm.write(message)


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Show no new bars, in this process and in those that it starts, inside the block."""
    before = os.environ.get("TQDM_DISABLE")
    if on:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if on:
            os.environ.pop("TQDM_DISABLE")
            if before is not None:
                os.environ["TQDM_DISABLE"] = before
