"""Progress bars that obey TQDM_DISABLE in notebooks too, where tqdm itself does not."""

from __future__ import annotations

import os
from typing import Any

from tqdm.auto import tqdm as _tqdm


def tqdm(*args: Any, **kwargs: Any) -> Any:
    """Return ``tqdm.auto.tqdm``, disabled where the environment says TQDM_DISABLE=1."""
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        kwargs["disable"] = True
    return _tqdm(*args, **kwargs)
