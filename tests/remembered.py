"""Phantoms that one test drew are there for the others, in other processes too.

Drawing them is most of what many tests would take: an image is drawn at four times its size.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medbudget.data import phantoms

PLACE = "MEDBUDGET_TEST_PHANTOMS"  # names their folder; a test run has one for all its processes
_draw, _name = phantoms.make_phantoms, phantoms._seed_words
_off: list[bool] = []


@wraps(_draw)
def make_phantoms(
    kind: str, label: Any, n: int, *, size: int = 64, seed: int = 0, split: str = "train"
) -> phantoms.Phantoms:
    more: dict[str, Any] = {"size": size, "seed": seed, "split": split}
    if _off or not isinstance(n, int) or n < 1:
        return _draw(kind, label, n, **more)
    labels = (label,) if isinstance(label, str) else tuple(label)
    name = hashlib.sha256(repr((kind, labels, size, seed, split)).encode()).hexdigest()
    path = Path(os.environ[PLACE]) / f"{name}.npy"
    both = np.load(path) if path.exists() else np.empty((0, 4, size, size), np.uint8)
    if (start := len(both)) < n:  # image i does not depend on n
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                phantoms, "_seed_words", lambda *name: _name(*name[:-1], name[-1] + start)
            )
            drawn = _draw(kind, label, n - start, **more)
        new = torch.cat([drawn.images, drawn.masks[:, None].byte()], 1).numpy()
        both = np.concatenate([both, new])
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, both)
        os.replace(file.name, path)
    kept = torch.from_numpy(both[:n].copy())
    return phantoms.Phantoms(kept[:, :3].clone(), kept[:, 3].bool(), ("+".join(labels),) * n)


@contextmanager
def drawn_anew() -> Iterator[None]:
    """Draw phantoms as if none had been drawn before."""
    _off.append(True)
    try:
        yield
    finally:
        _off.pop()


if PLACE not in os.environ:
    os.environ[PLACE] = tempfile.mkdtemp(prefix="phantoms")
    atexit.register(shutil.rmtree, os.environ[PLACE], ignore_errors=True)
phantoms.make_phantoms = make_phantoms  # for every module that imports it from now on
